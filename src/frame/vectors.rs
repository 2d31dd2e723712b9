//! The frames of `docs/wire.md`, byte by byte, and what holds for any other body.

use std::time::Duration;

use serde_json::Value;

use super::*;
use crate::compression::Readable;
use crate::limits::MAX_MESSAGE_SIZE;

const DOCUMENT: &str = include_str!("../../docs/wire.md");

/// The sections of the document that hold a vector: one that is lost or new must not go unnoticed.
const ACCEPTED: &[&str] = &[
    "minimal request",
    "request of a second attempt",
    "request with every metadata key",
    "request without arguments",
    "JSON request",
    "MessagePack request",
    "raw request",
    "reply",
    "reply of a chosen instance",
    "JSON reply",
    "raw reply",
    "typed error",
    "fault",
    "permanent fault",
    "reply too large",
    "oneway",
    "event",
    "event of a version",
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
    "call's id as text",
    "call's id of 15 bytes",
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
            "metadata 4" => metadata.traceparent = Traceparent::new(value).map(Box::new),
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
            "metadata 14" => metadata.more_mut().call_id = Some(value.parse().expect("a UUID")),
            "metadata 15" => metadata.more_mut().running = Some(value.parse().expect("a number")),
            "metadata 17" => metadata.more_mut().event_version = Some(number()),
            "metadata 16" => metadata.more_mut().is_permanent = number() != 0,
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

pub(super) fn read(body: impl Into<Bytes>) -> Result<Vec<Frame>, FrameError> {
    decode(body.into()).collect()
}

pub(super) fn written<'a>(frames: impl IntoIterator<Item = &'a Frame>) -> Bytes {
    let mut body = Vec::new();
    frames.into_iter().for_each(|frame| frame.encode(&mut body));
    body.into()
}

/// A request without payload whose metadata is these bytes.
pub(super) fn with_metadata(metadata: &[u8]) -> Bytes {
    let empty = Frame::new(Kind::Request, Uuid::nil(), Codec::Cbor, Metadata::default(), Bytes::new()).to_body();
    [&empty[..24], &length(metadata.len()).to_be_bytes(), &empty[28..32], metadata].concat().into()
}

/// What holds for any body: every error names its place, and nothing comes after one.
pub(super) fn check_any(body: &Bytes) {
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
                Err(CompressionRefusal::NotBuiltIn(_)) => continue,
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
        format!("| payload that is compressed | {} bytes at least |", crate::compression::MIN_SIZE),
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
