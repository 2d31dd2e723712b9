//! The wire: frames of a fixed header, metadata and payload, several in one message. `docs/wire.md` specifies it.

mod entries;
mod metadata;
mod trace;

use std::fmt;

use bytes::{BufMut, Bytes};
use uuid::Uuid;

pub(crate) use self::entries::{Entries, Excess, check as check_entries, set as set_entry};
use self::metadata::Names;
pub(crate) use self::metadata::{MAX_USER_ENTRIES, Metadata, More};
pub(crate) use self::trace::{Trace, Traceparent};
use crate::codec::Codec;
use crate::compression::{self, Compression, Refusal};
use crate::error::Code;

/// The media type of a message's body.
pub(crate) const CONTENT_TYPE: &str = "application/vnd.hopline";

const MAGIC: [u8; 2] = *b"HL";
const VERSION: u8 = 1;
const HEADER: usize = 32;
/// What a small frame takes, in bytes.
const TYPICAL: usize = 384;
/// How many frames one message may hold.
pub(crate) const MAX_FRAMES: usize = 1024;
/// How many bytes a frame's metadata may take.
const MAX_METADATA: usize = 64 * 1024;

const FLAG_COMPRESSION: u8 = 0b0011;
const FLAG_IDEMPOTENT: u8 = 0b0100;
const FLAG_SERVICE_ERROR: u8 = 0b1000;

/// What a frame is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub(crate) enum Kind {
    Request = 1,
    Reply = 2,
    Oneway = 3,
    Event = 4,
    StreamItem = 5,
    StreamEnd = 6,
    Cancel = 7,
    Credit = 8,
    KeepAlive = 9,
    Locate = 10,
}

impl Kind {
    fn from_number(number: u8) -> Option<Self> {
        [
            Self::Request,
            Self::Reply,
            Self::Oneway,
            Self::Event,
            Self::StreamItem,
            Self::StreamEnd,
            Self::Cancel,
            Self::Credit,
            Self::KeepAlive,
            Self::Locate,
        ]
        .into_iter()
        .find(|kind| *kind as u8 == number)
    }
}

/// One request, reply or other unit of the conversation.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Frame {
    pub(crate) kind: Kind,
    pub(crate) codec: Codec,
    pub(crate) status: Code,
    /// The method may be run twice without harm.
    pub(crate) idempotent: bool,
    /// The payload is the method's own error.
    pub(crate) service_error: bool,
    pub(crate) id: Uuid,
    pub(crate) metadata: Metadata,
    /// How the payload is compressed.
    pub(crate) compression: Option<Compression>,
    /// As it is on the wire: compressed, if it is.
    pub(crate) payload: Bytes,
}

impl Frame {
    pub(crate) fn new(kind: Kind, id: Uuid, codec: Codec, metadata: Metadata, payload: Bytes) -> Self {
        Self {
            kind,
            codec,
            status: Code::Ok,
            idempotent: false,
            service_error: false,
            id,
            metadata,
            compression: None,
            payload,
        }
    }

    /// The payload as it was before it was compressed, if it was: then no more than `cap` bytes.
    pub(crate) fn plain_payload(&self, cap: usize) -> Result<Bytes, Refusal> {
        match self.compression {
            None => Ok(self.payload.clone()),
            Some(compression) => compression.decompress(&self.payload, cap).map(Bytes::from),
        }
    }
}

/// What is wrong with a body: which field, at which byte.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("frame field `{field}` at byte {offset}: {problem}")]
pub(crate) struct FrameError {
    pub(crate) field: &'static str,
    pub(crate) offset: usize,
    pub(crate) problem: String,
    /// How an answer to it names the fault.
    pub(crate) code: Code,
    /// Where the frame begins, and the id it names if it got that far.
    pub(crate) frame: usize,
    pub(crate) id: Option<Uuid>,
}

impl Frame {
    /// Appends the frame to `body`.
    pub(crate) fn encode(&self, body: &mut Vec<u8>) {
        body.reserve(HEADER + 128 + self.payload.len());
        let start = self.encode_head(body);
        body.extend_from_slice(&self.payload);
        set_length(body, start + 28, self.payload.len());
    }

    /// A body with this frame alone.
    pub(crate) fn to_body(&self) -> Bytes {
        let mut body = Vec::new();
        self.encode(&mut body);
        body.into()
    }

    /// A body with this frame alone, and for its payload what `write` appends.
    pub(crate) fn to_body_with<E>(&self, write: impl FnOnce(&mut Vec<u8>) -> Result<(), E>) -> Result<Bytes, E> {
        let mut body = Vec::with_capacity(TYPICAL);
        self.encode_head(&mut body);
        let payload = body.len();
        write(&mut body)?;
        let length = body.len() - payload;
        set_length(&mut body, 28, length);
        Ok(body.into())
    }

    /// Appends header and metadata; tells where they begin.
    fn encode_head(&self, body: &mut Vec<u8>) -> usize {
        let start = body.len();
        body.put_slice(&MAGIC);
        body.put_u8(VERSION);
        body.put_u8(self.codec as u8);
        body.put_u8(self.kind as u8);
        body.put_u8(self.status as u8);
        let idempotent = if self.idempotent { FLAG_IDEMPOTENT } else { 0 };
        let service_error = if self.service_error { FLAG_SERVICE_ERROR } else { 0 };
        body.put_u8(idempotent | service_error | self.compression.map_or(0, |compression| compression as u8));
        body.put_u8(0);
        body.put_slice(self.id.as_bytes());
        body.put_u64(0);
        self.metadata.encode(body);
        let metadata = body.len() - start - HEADER;
        set_length(body, start + 24, metadata);
        start
    }
}

/// The `body` of one frame with its payload compressed, or as it is where that would not make it smaller.
pub(crate) fn compressed(body: Bytes, compression: Compression) -> Bytes {
    let payload_at = HEADER + length_at(&body, 24);
    if body.len() - payload_at < compression::MIN_SIZE {
        return body;
    }
    let mut smaller = body[..payload_at].to_vec();
    if !compression.compress(&body[payload_at..], &mut smaller) || smaller.len() >= body.len() {
        return body;
    }
    smaller[6] |= compression as u8;
    let payload = smaller.len() - payload_at;
    set_length(&mut smaller, 28, payload);
    smaller.shrink_to_fit();
    smaller.into()
}

/// The length that a frame's header has at this byte.
fn length_at(frame: &[u8], at: usize) -> usize {
    u32::from_be_bytes([frame[at], frame[at + 1], frame[at + 2], frame[at + 3]]) as usize
}

fn set_length(body: &mut [u8], at: usize, bytes: usize) {
    body[at..at + 4].copy_from_slice(&length(bytes).to_be_bytes());
}

/// Payloads and metadata are checked against the size cap, far below 4 GiB, before they come here or right after.
fn length(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX)
}

/// The frames of a body, in order; after an error there are no more, since nothing tells where the next one begins.
pub(crate) struct Frames {
    body: Bytes,
    offset: usize,
    count: usize,
    broken: bool,
    names: Names,
}

/// Reads the frames of a message's body.
pub(crate) fn decode(body: Bytes) -> Frames {
    Frames { body, offset: 0, count: 0, broken: false, names: Names::default() }
}

/// The refusal of a body over the cap, which is not read.
pub(crate) fn too_large(body: &[u8], cap: usize) -> FrameError {
    FrameError {
        field: "body",
        offset: cap,
        problem: format!("{} bytes are over the cap of {cap}", body.len()),
        code: Code::ResourceExhausted,
        frame: 0,
        id: named_id(body),
    }
}

/// The id that a frame names, if it is long enough to.
fn named_id(frame: &[u8]) -> Option<Uuid> {
    frame.get(8..24).and_then(|bytes| Uuid::from_slice(bytes).ok())
}

impl Iterator for Frames {
    type Item = Result<Frame, FrameError>;

    fn next(&mut self) -> Option<Self::Item> {
        let nothing_left = self.offset == self.body.len() && self.count > 0;
        if self.broken || nothing_left {
            return None;
        }
        let frame = self.read();
        self.broken = frame.is_err();
        self.count += 1;
        Some(frame)
    }
}

impl Frames {
    fn read(&mut self) -> Result<Frame, FrameError> {
        let start = self.offset;
        let rest = self.body.slice(start..);
        let id = named_id(&rest);
        let error = |field, at, code, problem: String| FrameError {
            field,
            offset: start + at,
            problem,
            code,
            frame: start,
            id,
        };
        let malformed = |field, at, problem| Err(error(field, at, Code::InvalidArgument, problem));
        let unknown = |field, at, problem| Err(error(field, at, Code::Unimplemented, problem));

        if self.count == MAX_FRAMES {
            return malformed("magic", 0, format!("more than {MAX_FRAMES} frames in one message"));
        }
        if rest.get(..2).is_some_and(|magic| magic != MAGIC) {
            return Err(FrameError {
                id: None,
                ..error("magic", 0, Code::InvalidArgument, format!("{:02x}{:02x} is not 484c (HL)", rest[0], rest[1]))
            });
        }
        if rest.len() < HEADER {
            return malformed("header", 0, format!("{} bytes left, a header takes {HEADER}", rest.len()));
        }
        if rest[2] != VERSION {
            return unknown("protocol version", 2, format!("version {} is not spoken here, {VERSION} is", rest[2]));
        }
        let Some(codec) = Codec::from_number(rest[3]) else {
            return unknown("serialization", 3, format!("{} is none of 0 raw, 1 CBOR, 2 JSON, 3 MessagePack", rest[3]));
        };
        let Some(kind) = Kind::from_number(rest[4]) else {
            return unknown("message type", 4, format!("{} is not in 1 to 10", rest[4]));
        };
        let Some(status) = Code::from_number(rest[5]) else {
            return unknown("status", 5, format!("{} is not in 0 to 16", rest[5]));
        };
        let flags = rest[6];
        let compression = match Compression::from_number(flags & FLAG_COMPRESSION) {
            Ok(compression) => compression,
            Err(problem) => return unknown("flags", 6, problem),
        };
        if flags & !(FLAG_COMPRESSION | FLAG_IDEMPOTENT | FLAG_SERVICE_ERROR) != 0 {
            return unknown("flags", 6, format!("{flags:#010b} sets bits that version {VERSION} does not define"));
        }
        if rest[7] != 0 {
            return unknown("reserved", 7, format!("{} is not 0", rest[7]));
        }
        let (metadata_length, payload_length) = (length_at(&rest, 24), length_at(&rest, 28));
        let left = rest.len() - HEADER;
        if metadata_length > MAX_METADATA {
            return malformed("metadata length", 24, format!("{metadata_length} is over the cap of {MAX_METADATA}"));
        }
        if metadata_length > left {
            return malformed("metadata length", 24, format!("{metadata_length} is more than the {left} bytes left"));
        }
        let left = left - metadata_length;
        if payload_length > left {
            return malformed("payload length", 28, format!("{payload_length} is more than the {left} bytes left"));
        }
        let payload_at = HEADER + metadata_length;
        let metadata = Metadata::decode(&rest[HEADER..payload_at], &self.names)
            .map_err(|(field, at, problem)| error(field, HEADER + at, Code::InvalidArgument, problem))?;
        self.offset = start + payload_at + payload_length;
        self.names = Names { method: metadata.method.clone(), instance: metadata.instance.clone() };
        Ok(Frame {
            kind,
            codec,
            status,
            idempotent: flags & FLAG_IDEMPOTENT != 0,
            service_error: flags & FLAG_SERVICE_ERROR != 0,
            id: id.unwrap_or_default(),
            metadata,
            compression,
            payload: rest.slice(payload_at..payload_at + payload_length),
        })
    }
}

impl fmt::Debug for Frames {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Frames").field("offset", &self.offset).field("count", &self.count).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::collection::vec;
    use proptest::option;
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;
    use crate::client::MAX_MESSAGE_SIZE;
    use crate::compression::Readable;

    const DOCUMENT: &str = include_str!("../docs/wire.md");

    /// The sections of the document that hold a vector: one that is lost or new must not go unnoticed.
    const ACCEPTED: &[&str] = &[
        "minimal request",
        "request with every metadata key",
        "request without arguments",
        "JSON request",
        "MessagePack request",
        "raw request",
        "reply",
        "JSON reply",
        "raw reply",
        "typed error",
        "fault",
        "reply too large",
        "oneway",
        "event",
        "cancel",
        "two frames in one body",
        "lz4 request",
        "zstd reply",
        "lz4 block cut off",
        "lz4 block of another size",
        "lz4 size out of reach",
        "lz4 size over the cap",
        "zstd frame cut off",
        "zstd size over the cap",
        "unknown metadata keys",
        "metadata in other forms",
    ];
    const REFUSED: &[&str] = &[
        "empty body",
        "wrong magic",
        "truncated header",
        "version 2",
        "version 0",
        "unknown serialization",
        "type 0",
        "type 11",
        "unknown status",
        "compression 3",
        "undefined flag",
        "reserved byte",
        "metadata beyond the body",
        "metadata over its cap",
        "metadata of 4 GiB",
        "payload beyond the body",
        "payload of 4 GiB",
        "no metadata",
        "metadata that is no map",
        "text as a metadata key",
        "method that is a number",
        "method that is not UTF-8",
        "method in pieces",
        "method over its cap",
        "instance over its cap",
        "negative time",
        "fraction of a time",
        "number in the user's map",
        "a user's map of 129 entries",
        "one size of two",
        "compressions as text",
        "metadata that ends early",
        "map without its end",
        "trailing bytes in metadata",
        "a user's map of 2^60 entries",
        "text of 2^60 bytes",
        "second frame broken",
        "second frame cut off",
    ];

    /// A fenced block of the document: its heading, the word after the fence, and its lines as key and value.
    struct Vector {
        name: &'static str,
        sort: &'static str,
        lines: Vec<(&'static str, &'static str)>,
    }

    impl Vector {
        fn body(&self) -> Bytes {
            self.lines.iter().filter(|(key, _)| *key == "hex").flat_map(|(_, hex)| bytes(hex)).collect()
        }

        fn one(&self, key: &str) -> &'static str {
            let found = self.lines.iter().find(|(other, _)| *other == key);
            found.unwrap_or_else(|| panic!("`{}` has no line `{key}`", self.name)).1
        }
    }

    fn bytes(hex: &str) -> Vec<u8> {
        let byte = |hex| u8::from_str_radix(hex, 16).expect("two digits");
        hex.split(' ').map(byte).collect()
    }

    /// The vectors of one sort. Every block below the heading of the vectors must be one of either sort.
    fn vectors(sort: &str) -> Vec<Vector> {
        let (_, section) = DOCUMENT.split_once("\n## Test vectors\n").expect("a section of test vectors");
        let (section, _) = section.split_once("\n## ").unwrap_or((section, ""));
        let mut name = "";
        let mut open = false;
        let mut found: Vec<Vector> = Vec::new();
        for line in section.lines() {
            if let Some(fence) = line.strip_prefix("```") {
                open = !open;
                if open {
                    assert!(["vector", "refused"].contains(&fence), "a block of sort `{fence}` below `{name}`");
                    found.push(Vector { name, sort: fence, lines: Vec::new() });
                }
            } else if open {
                let (key, value) = line.split_at(14);
                let vector = found.last_mut().expect("a block is open");
                vector.lines.push((key.trim_end(), &value[1..]));
            } else if let Some(heading) = line.strip_prefix("#### ") {
                name = heading;
            }
        }
        assert!(!open, "`{name}` does not end");
        found.into_iter().filter(|vector| vector.sort == sort).collect()
    }

    fn names(vectors: &[Vector]) -> Vec<&str> {
        vectors.iter().map(|vector| vector.name).collect()
    }

    /// The frames that a vector describes, each with the value of its payload where it gives one.
    fn described(vector: &Vector) -> Vec<(Frame, Option<Value>)> {
        let mut frames: Vec<(Frame, Option<Value>)> = Vec::new();
        for &(key, value) in &vector.lines {
            if key == "type" {
                let kind = [
                    ("request", Kind::Request),
                    ("reply", Kind::Reply),
                    ("oneway", Kind::Oneway),
                    ("event", Kind::Event),
                    ("stream item", Kind::StreamItem),
                    ("stream end", Kind::StreamEnd),
                    ("cancel", Kind::Cancel),
                    ("credit", Kind::Credit),
                    ("keep-alive", Kind::KeepAlive),
                    ("locate", Kind::Locate),
                ];
                let kind = kind.into_iter().find(|(name, _)| *name == value).expect("a type of message").1;
                let blank = Frame::new(kind, Uuid::nil(), Codec::Raw, Metadata::default(), Bytes::new());
                frames.push((blank, None));
                continue;
            }
            if matches!(key, "hex" | "form" | "refusal") {
                continue;
            }
            let (frame, payload_value) = frames.last_mut().expect("a frame's first line is its type");
            let number = || value.parse::<u64>().expect("a number");
            let metadata = &mut frame.metadata;
            match key {
                "serialization" => {
                    let named = |codec: &Codec| codec.name() == value;
                    frame.codec = (0..4).filter_map(Codec::from_number).find(named).expect("a serialization");
                }
                "status" => {
                    frame.status = *Code::ALL.iter().find(|code| code.name() == value).expect("a status");
                }
                "flag" if value == "idempotent" => frame.idempotent = true,
                "flag" if value == "service error" => frame.service_error = true,
                "id" => frame.id = value.parse().expect("a UUID"),
                "metadata 1" => metadata.method = Some(value.into()),
                "metadata 2" => metadata.remaining = Some(Duration::from_millis(number())),
                "metadata 3" => metadata.sent_at = Some(number()),
                "metadata 4" => metadata.traceparent = Traceparent::new(value),
                "metadata 5" => metadata.instance = Some(value.into()),
                "metadata 6" => metadata.more_mut().sequence = Some(number()),
                "metadata 7" => metadata.handler_time = Some(Duration::from_micros(number())),
                "metadata 8" => metadata.more_mut().attempt = Some(number()),
                "metadata 9" => metadata.more_mut().retry_after = Some(Duration::from_millis(number())),
                "metadata 10" => {
                    let (name, text) = value.split_once('=').expect("name=text");
                    metadata.more_mut().user.push((name.to_owned(), text.to_owned()));
                }
                "metadata 11" => metadata.more_mut().error = Some(value.to_owned()),
                "metadata 12" => {
                    let (size, cap) = value.split_once(" of ").expect("size of cap");
                    metadata.more_mut().too_large = Some((size.parse().expect("a size"), cap.parse().expect("a cap")));
                }
                "metadata 13" => metadata.accepts = Readable(number()),
                "compression" => {
                    let named = |compression: &Compression| compression.name() == value;
                    frame.compression = [Compression::Zstd, Compression::Lz4].into_iter().find(named);
                }
                "payload" if value == "empty" => {}
                "payload" => frame.payload = bytes(value).into(),
                "value" => *payload_value = Some(serde_json::from_str(value).expect("JSON")),
                other => panic!("`{}` has a line `{other} {value}`, which says nothing here", vector.name),
            }
        }
        frames
    }

    fn read(body: impl Into<Bytes>) -> Result<Vec<Frame>, FrameError> {
        decode(body.into()).collect()
    }

    fn written<'a>(frames: impl IntoIterator<Item = &'a Frame>) -> Bytes {
        let mut body = Vec::new();
        frames.into_iter().for_each(|frame| frame.encode(&mut body));
        body.into()
    }

    /// A request without payload whose metadata is these bytes.
    fn with_metadata(metadata: &[u8]) -> Bytes {
        let empty = Frame::new(Kind::Request, Uuid::nil(), Codec::Cbor, Metadata::default(), Bytes::new()).to_body();
        [&empty[..24], &length(metadata.len()).to_be_bytes(), &empty[28..32], metadata].concat().into()
    }

    /// What holds for any body: every error names its place, and nothing comes after one.
    fn check_any(body: &Bytes) {
        let mut frames = decode(body.clone());
        while let Some(frame) = frames.next() {
            let Err(error) = frame else { continue };
            assert!(!error.field.is_empty() && !error.problem.is_empty(), "{error}");
            assert!(error.frame <= error.offset && error.offset <= body.len(), "{error} of {} bytes", body.len());
            assert!(matches!(error.code, Code::InvalidArgument | Code::Unimplemented), "{error:?}");
            assert!(frames.next().is_none(), "nothing tells where the next frame begins");
        }
    }

    #[test]
    fn the_wire_document_has_every_vector() {
        assert_eq!(names(&vectors("vector")), ACCEPTED);
        assert_eq!(names(&vectors("refused")), REFUSED);
    }

    #[test]
    fn frames_of_the_wire_document_are_read_as_described() {
        for vector in vectors("vector") {
            let described: Vec<Frame> = described(&vector).into_iter().map(|(frame, _)| frame).collect();
            assert!(!described.is_empty(), "`{}` describes nothing", vector.name);
            assert_eq!(read(vector.body()), Ok(described), "{}", vector.name);
        }
    }

    #[test]
    fn frames_of_the_wire_document_are_written_to_the_letter() {
        for vector in vectors("vector") {
            let frames: Vec<Frame> = described(&vector).into_iter().map(|(frame, _)| frame).collect();
            let other_form = vector.lines.contains(&("form", "other"));
            let body = written(&frames);
            assert_eq!(body == vector.body(), !other_form, "{}: {body:02x?}", vector.name);
            assert_eq!(read(body), Ok(frames), "{}", vector.name);
        }
    }

    #[test]
    fn payloads_of_the_wire_document_hold_the_values_it_gives() {
        for vector in vectors("vector") {
            for (frame, value) in described(&vector) {
                let payload = match frame.plain_payload(MAX_MESSAGE_SIZE) {
                    Ok(payload) => payload,
                    Err(Refusal::NotBuiltIn(_)) => continue,
                    Err(refusal) => {
                        assert_eq!(refusal.code().name(), vector.one("refusal"), "{}: {refusal}", vector.name);
                        continue;
                    }
                };
                match value {
                    Some(value) => assert_eq!(frame.codec.decode(&payload), Ok(value), "{}", vector.name),
                    None => {
                        assert!(frame.codec == Codec::Raw || frame.payload.is_empty(), "{} has no value", vector.name)
                    }
                }
            }
        }
    }

    #[test]
    fn bodies_of_the_wire_document_are_refused_as_described() {
        for vector in vectors("refused") {
            let known = |key| ["hex", "frames before", "field", "offset", "status"].contains(&key);
            assert!(vector.lines.iter().all(|(key, _)| known(*key)), "`{}` says what is not checked", vector.name);
            let mut frames: Vec<_> = decode(vector.body()).collect();
            let error = frames.pop().expect("at least the error").expect_err(vector.name);
            assert_eq!(frames.len().to_string(), vector.one("frames before"), "{}", vector.name);
            assert_eq!(error.field, vector.one("field"), "{}: {error}", vector.name);
            assert_eq!(error.offset.to_string(), vector.one("offset"), "{}: {error}", vector.name);
            assert_eq!(error.code.name(), vector.one("status"), "{}: {error}", vector.name);
            check_any(&vector.body());
        }
    }

    #[test]
    fn the_limits_are_those_of_the_wire_document() {
        for limit in [
            format!("| frames in one body | {MAX_FRAMES} |"),
            format!("| metadata of a frame | {MAX_METADATA} bytes |"),
            format!("| name of a method or an instance in metadata | {} bytes |", metadata::MAX_NAME),
            format!("| entries of the user's map | {MAX_USER_ENTRIES} |"),
            format!("| payload that is compressed | {} bytes at least |", compression::MIN_SIZE),
        ] {
            assert!(DOCUMENT.contains(&limit), "{limit}");
        }
        for code in Code::ALL {
            let row = format!("| {} | {} |", *code as u8, code.name());
            assert!(DOCUMENT.contains(&row), "{row}");
        }
    }

    #[test]
    fn a_broken_frame_tells_its_id_where_it_got_that_far() {
        let id = Uuid::from_u128(7);
        let body = Frame::new(Kind::Request, id, Codec::Cbor, Metadata::default(), Bytes::new()).to_body();
        let id_of = |body: Bytes| read(body).expect_err("broken").id;
        assert_eq!(id_of(body.slice(..24)), Some(id));
        assert_eq!(id_of(body.slice(..23)), None);
        let mut not_ours = body.to_vec();
        not_ours[0] = b'h';
        assert_eq!(id_of(not_ours.into()), None, "what is no frame has no id");
    }

    #[test]
    fn a_body_holds_as_many_frames_as_allowed_and_not_one_more() {
        let frame = Frame::new(Kind::Cancel, Uuid::nil(), Codec::Raw, Metadata::default(), Bytes::new());
        let full = written(std::iter::repeat_n(&frame, MAX_FRAMES));
        assert_eq!(read(full.clone()).map(|frames| frames.len()), Ok(MAX_FRAMES));
        let over = [full.clone(), frame.to_body()].concat();
        let error = read(over).expect_err("one too many");
        assert_eq!((error.field, error.offset), ("magic", full.len()));
    }

    #[test]
    fn metadata_up_to_its_cap_is_read() {
        let text = |bytes: usize| [&[0xa1, 0x0b, 0x7a][..], &length(bytes).to_be_bytes(), &vec![b'x'; bytes]].concat();
        let fits = read(with_metadata(&text(MAX_METADATA - 7))).expect("just fits");
        assert_eq!(fits[0].metadata.more().error.as_ref().map(String::len), Some(MAX_METADATA - 7));
        let error = read(with_metadata(&text(MAX_METADATA - 6))).expect_err("one byte over");
        assert_eq!((error.field, error.offset), ("metadata length", 24));
    }

    #[test]
    fn deep_nesting_under_an_unknown_key_does_not_overflow_the_stack() {
        let deep = 16_000;
        let nested =
            |open: &[u8], close: &[u8]| [&[0xa1, 0x18, 99][..], &open.repeat(deep), &[0], &close.repeat(deep)].concat();
        // Arrays of one and of indefinite length, one in the other, maps, tags.
        let whole = [nested(&[0x81], &[]), nested(&[0x9f], &[0xff]), nested(&[0xbf, 0], &[0xff]), nested(&[0xc1], &[])];
        for metadata in whole {
            let frames = read(with_metadata(&metadata)).expect("well-formed");
            assert_eq!(frames[0].metadata, Metadata::default());
            let cut = metadata.len().min(deep);
            read(with_metadata(&metadata[..cut])).expect_err("cut off");
        }
        let mixed = nested(&[0x82, 0x9f], &[0xff, 0]);
        read(with_metadata(&mixed)).expect("arrays of two, the first of indefinite length");
        let error = read(with_metadata(&[0x81].repeat(100_000))).expect_err("over the cap");
        assert_eq!(error.field, "metadata length");
    }

    #[test]
    fn a_claim_of_2_to_the_60_allocates_nothing() {
        let huge = [0x10, 0, 0, 0, 0, 0, 0, 0];
        // A map of entries; under the user's key, the error's, the sizes' and an unknown one: maps, texts, bytes, arrays.
        let claims: [&[u8]; 9] = [
            &[0xbb],
            &[0xa1, 10, 0xbb],
            &[0xa1, 10, 0xa1, 0x7b],
            &[0xa1, 11, 0x7b],
            &[0xa1, 12, 0x9b],
            &[0xa1, 0x18, 99, 0xbb],
            &[0xa1, 0x18, 99, 0x9b],
            &[0xa1, 0x18, 99, 0x7b],
            &[0xa1, 0x18, 99, 0x5b],
        ];
        for claim in claims {
            let body = with_metadata(&[claim, &huge].concat());
            read(body.clone()).expect_err("there is not that much");
            check_any(&body);
        }
    }

    /// Any text, its characters from all of Unicode.
    fn text() -> impl Strategy<Value = String> {
        vec(any::<char>(), 0..40).prop_map(String::from_iter)
    }

    fn millis() -> impl Strategy<Value = Duration> {
        any::<u64>().prop_map(Duration::from_millis)
    }

    prop_compose! {
        fn metadata()(
            texts in [option::of(text()), option::of(text()), option::of(text())],
            traceparent in option::of("[ -~]{55}"),
            times in (option::of(millis()), option::of(millis()), option::of(any::<u64>().prop_map(Duration::from_micros))),
            numbers in [option::of(any::<u64>()), option::of(any::<u64>()), option::of(any::<u64>())],
            user in vec((text(), text()), 0..30),
            too_large in option::of(any::<(u64, u64)>()),
            accepts in any::<u64>(),
        ) -> Metadata {
            let [method, instance, error] = texts;
            let (method, instance) = (method.map(Into::into), instance.map(Into::into));
            let traceparent = traceparent.as_deref().and_then(Traceparent::new);
            let (remaining, retry_after, handler_time) = times;
            let [sent_at, sequence, attempt] = numbers;
            let more = More { sequence, attempt, retry_after, user, error, too_large };
            let accepts = Readable(accepts);
            let more = (more != More::default()).then(|| Box::new(more));
            Metadata { method, remaining, sent_at, traceparent, instance, handler_time, accepts, more }
        }
    }

    prop_compose! {
        fn frame()(
            (kind, codec, status) in (1_u8..=9, 0_u8..=3, 0_u8..=16),
            (idempotent, service_error) in any::<(bool, bool)>(),
            id in any::<u128>(),
            metadata in metadata(),
            compression in 0_u8..=2,
            payload in vec(any::<u8>(), 0..200),
        ) -> Frame {
            Frame {
                kind: Kind::from_number(kind).expect("1 to 10"),
                codec: Codec::from_number(codec).expect("0 to 3"),
                status: Code::from_number(status).expect("0 to 16"),
                idempotent,
                service_error,
                id: Uuid::from_u128(id),
                metadata,
                compression: Compression::from_number(compression).expect("0 to 2"),
                payload: payload.into(),
            }
        }
    }

    /// Well-formed CBOR of any shape, nested, with lengths given and not.
    fn cbor() -> impl Strategy<Value = Vec<u8>> {
        let wrapped = |head: u8, tail: &[u8], parts: Vec<Vec<u8>>| [&[head][..], &parts.concat(), tail].concat();
        let leaf = prop_oneof![
            any::<u64>().prop_map(|number| minicbor::to_vec(number).expect("grows")),
            any::<i64>().prop_map(|number| minicbor::to_vec(number).expect("grows")),
            any::<f64>().prop_map(|number| minicbor::to_vec(number).expect("grows")),
            text().prop_map(|text| minicbor::to_vec(text).expect("grows")),
            vec(any::<u8>(), 0..20)
                .prop_map(|bytes| minicbor::to_vec(minicbor::bytes::ByteVec::from(bytes)).expect("grows")),
            prop_oneof![Just(0xf4_u8), Just(0xf5), Just(0xf6), Just(0xf7)].prop_map(|simple| vec![simple]),
            Just(vec![0xf9, 0x3e, 0x00]),
            Just(vec![0x7f, 0x61, b'a', 0x60, 0xff]),
            Just(vec![0x5f, 0x41, 0xff, 0xff]),
        ];
        leaf.prop_recursive(6, 60, 6, move |inner| {
            let pairs = || vec((inner.clone(), inner.clone()).prop_map(|(key, value)| [key, value].concat()), 0..5);
            prop_oneof![
                vec(inner.clone(), 0..6).prop_map(move |items| wrapped(0x80 | items.len() as u8, &[], items)),
                vec(inner.clone(), 0..6).prop_map(move |items| wrapped(0x9f, &[0xff], items)),
                pairs().prop_map(move |pairs| wrapped(0xa0 | pairs.len() as u8, &[], pairs)),
                pairs().prop_map(move |pairs| wrapped(0xbf, &[0xff], pairs)),
                inner.clone().prop_map(move |item| wrapped(0xc1, &[], vec![item])),
            ]
        })
    }

    proptest! {
        #[test]
        fn frames_come_back_as_they_were_written(frames in vec(frame(), 1..6)) {
            prop_assert_eq!(read(written(&frames)), Ok(frames));
        }

        #[test]
        fn arbitrary_bytes_are_frames_or_an_error(body in vec(any::<u8>(), 0..200)) {
            check_any(&body.into());
        }

        #[test]
        fn arbitrary_metadata_is_read_or_an_error(metadata in vec(any::<u8>(), 0..100), map in any::<bool>()) {
            let metadata = if map { [&[0xa3][..], &metadata].concat() } else { metadata };
            check_any(&with_metadata(&metadata));
        }

        #[test]
        fn broken_bodies_are_frames_or_an_error(
            frames in vec(frame(), 1..4),
            changes in vec((any::<prop::sample::Index>(), any::<u8>()), 0..5),
            cut in option::of(any::<prop::sample::Index>()),
            more in vec(any::<u8>(), 0..40),
        ) {
            let mut body = written(&frames).to_vec();
            for (at, byte) in changes {
                let at = at.index(body.len());
                body[at] = byte;
            }
            if let Some(cut) = cut {
                body.truncate(cut.index(body.len()));
            }
            body.extend(more);
            check_any(&body.into());
        }

        #[test]
        fn a_body_cut_off_is_an_error(frame in frame(), cut in any::<prop::sample::Index>()) {
            let body = frame.to_body();
            prop_assert!(read(body.slice(..cut.index(body.len()))).is_err());
        }

        #[test]
        fn unknown_metadata_of_any_shape_is_skipped_to_its_very_end(values in vec((14_u64.., cbor()), 1..4), method in text()) {
            let mut metadata = vec![0xa1 + values.len() as u8];
            for (key, value) in values {
                metadata.extend(minicbor::to_vec(key).expect("grows"));
                metadata.extend(value);
            }
            metadata.push(1);
            metadata.extend(minicbor::to_vec(&method).expect("grows"));
            let frames = read(with_metadata(&metadata)).map_err(|error| TestCaseError::fail(error.to_string()))?;
            prop_assert_eq!(&frames[0].metadata, &Metadata { method: Some(method.into()), ..Metadata::default() });
        }
    }
}
