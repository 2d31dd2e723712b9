//! The wire: frames of a fixed header, metadata and payload, several in one message. `docs/wire.md` specifies it.

use std::fmt;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use minicbor::data::Type;
use minicbor::decode::Error as CborError;
use minicbor::{Decoder, Encoder};
use uuid::Uuid;

use crate::codec::Codec;
use crate::error::Code;

/// The media type of a message's body.
pub(crate) const CONTENT_TYPE: &str = "application/vnd.hopline";

const MAGIC: [u8; 2] = *b"HL";
const VERSION: u8 = 1;
const HEADER: usize = 32;
/// How many frames one message may hold.
const MAX_FRAMES: usize = 1024;
/// How many bytes a frame's metadata may take.
const MAX_METADATA: usize = 64 * 1024;

const FLAG_COMPRESSION: u8 = 0b0011;
const FLAG_IDEMPOTENT: u8 = 0b0100;
const FLAG_SERVICE_ERROR: u8 = 0b1000;

/// What a frame is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
    pub(crate) payload: Bytes,
}

impl Frame {
    pub(crate) fn new(kind: Kind, id: Uuid, codec: Codec, metadata: Metadata, payload: Bytes) -> Self {
        Self { kind, codec, status: Code::Ok, idempotent: false, service_error: false, id, metadata, payload }
    }
}

/// What travels beside the payload. Each field has a small integer as its key on the wire.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Metadata {
    pub(crate) method: Option<String>,
    /// Time left when the frame was sent.
    pub(crate) remaining: Option<Duration>,
    /// The sender's clock, in milliseconds since 1970.
    pub(crate) sent_at: Option<u64>,
    pub(crate) traceparent: Option<String>,
    /// The instance that sent the frame.
    pub(crate) instance: Option<String>,
    pub(crate) sequence: Option<u64>,
    /// How long the handler took.
    pub(crate) handler_time: Option<Duration>,
    /// 1 for the first attempt.
    pub(crate) attempt: Option<u64>,
    pub(crate) retry_after: Option<Duration>,
    /// The user's own entries, in the order they were set.
    pub(crate) user: Vec<(String, String)>,
    pub(crate) error: Option<String>,
    /// Size of a reply that was over the cap, and the cap, in bytes.
    pub(crate) too_large: Option<(u64, u64)>,
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
    pub(crate) fn encode(&self, body: &mut BytesMut) {
        let start = body.len();
        body.reserve(HEADER + 128 + self.payload.len());
        body.put_slice(&MAGIC);
        body.put_u8(VERSION);
        body.put_u8(self.codec as u8);
        body.put_u8(self.kind as u8);
        body.put_u8(self.status as u8);
        let idempotent = if self.idempotent { FLAG_IDEMPOTENT } else { 0 };
        let service_error = if self.service_error { FLAG_SERVICE_ERROR } else { 0 };
        body.put_u8(idempotent | service_error);
        body.put_u8(0);
        body.put_slice(self.id.as_bytes());
        body.put_u32(0);
        body.put_u32(length(self.payload.len()));
        self.metadata.encode(body);
        let metadata = length(body.len() - start - HEADER);
        body[start + 24..start + 28].copy_from_slice(&metadata.to_be_bytes());
        body.put_slice(&self.payload);
    }

    /// A body with this frame alone.
    pub(crate) fn to_body(&self) -> Bytes {
        let mut body = BytesMut::new();
        self.encode(&mut body);
        body.freeze()
    }
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
}

/// Reads the frames of a message's body.
pub(crate) fn decode(body: Bytes) -> Frames {
    Frames { body, offset: 0, count: 0, broken: false }
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
        let id = rest.get(8..24).and_then(|bytes| Uuid::from_slice(bytes).ok());
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
            return unknown("message type", 4, format!("{} is not in 1 to 9", rest[4]));
        };
        let Some(status) = Code::from_number(rest[5]) else {
            return unknown("status", 5, format!("{} is not in 0 to 16", rest[5]));
        };
        let flags = rest[6];
        if flags & FLAG_COMPRESSION != 0 {
            return unknown(
                "flags",
                6,
                format!("compression {} is not spoken here: send it uncompressed", flags & FLAG_COMPRESSION),
            );
        }
        if flags & !(FLAG_COMPRESSION | FLAG_IDEMPOTENT | FLAG_SERVICE_ERROR) != 0 {
            return unknown("flags", 6, format!("{flags:#010b} sets bits that version {VERSION} does not define"));
        }
        if rest[7] != 0 {
            return unknown("reserved", 7, format!("{} is not 0", rest[7]));
        }
        let number = |at: usize| u32::from_be_bytes([rest[at], rest[at + 1], rest[at + 2], rest[at + 3]]) as usize;
        let (metadata_length, payload_length) = (number(24), number(28));
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
        let metadata = Metadata::decode(&rest[HEADER..payload_at])
            .map_err(|(field, at, problem)| error(field, HEADER + at, Code::InvalidArgument, problem))?;
        self.offset = start + payload_at + payload_length;
        Ok(Frame {
            kind,
            codec,
            status,
            idempotent: flags & FLAG_IDEMPOTENT != 0,
            service_error: flags & FLAG_SERVICE_ERROR != 0,
            id: id.unwrap_or_default(),
            metadata,
            payload: rest.slice(payload_at..payload_at + payload_length),
        })
    }
}

mod key {
    pub(super) const METHOD: u64 = 1;
    pub(super) const REMAINING: u64 = 2;
    pub(super) const SENT_AT: u64 = 3;
    pub(super) const TRACEPARENT: u64 = 4;
    pub(super) const INSTANCE: u64 = 5;
    pub(super) const SEQUENCE: u64 = 6;
    pub(super) const HANDLER_TIME: u64 = 7;
    pub(super) const ATTEMPT: u64 = 8;
    pub(super) const RETRY_AFTER: u64 = 9;
    pub(super) const USER: u64 = 10;
    pub(super) const ERROR: u64 = 11;
    pub(super) const TOO_LARGE: u64 = 12;
}

type Problem = (&'static str, usize, String);

impl Metadata {
    fn encode(&self, body: &mut BytesMut) {
        let numbers = [
            (key::REMAINING, self.remaining.map(millis)),
            (key::SENT_AT, self.sent_at),
            (key::SEQUENCE, self.sequence),
            (key::HANDLER_TIME, self.handler_time.map(micros)),
            (key::ATTEMPT, self.attempt),
            (key::RETRY_AFTER, self.retry_after.map(millis)),
        ];
        let texts = [
            (key::METHOD, &self.method),
            (key::TRACEPARENT, &self.traceparent),
            (key::INSTANCE, &self.instance),
            (key::ERROR, &self.error),
        ];
        let entries = numbers.iter().filter(|(_, number)| number.is_some()).count()
            + texts.iter().filter(|(_, text)| text.is_some()).count()
            + usize::from(!self.user.is_empty())
            + usize::from(self.too_large.is_some());

        let mut cbor = Encoder::new(Growing(body));
        // A growing buffer takes whatever comes, so nothing here can fail.
        let _ = cbor.map(entries as u64);
        for (key, text) in texts {
            if let Some(text) = text {
                let _ = cbor.u64(key).and_then(|cbor| cbor.str(text));
            }
        }
        for (key, number) in numbers {
            if let Some(number) = number {
                let _ = cbor.u64(key).and_then(|cbor| cbor.u64(number));
            }
        }
        if !self.user.is_empty() {
            let _ = cbor.u64(key::USER).and_then(|cbor| cbor.map(self.user.len() as u64));
            for (name, value) in &self.user {
                let _ = cbor.str(name).and_then(|cbor| cbor.str(value));
            }
        }
        if let Some((size, limit)) = self.too_large {
            let _ = cbor.u64(key::TOO_LARGE).and_then(|cbor| cbor.array(2)?.u64(size)?.u64(limit));
        }
    }

    fn decode(bytes: &[u8]) -> Result<Self, Problem> {
        let mut metadata = Self::default();
        let mut cbor = Decoder::new(bytes);
        let entries = cbor.map().map_err(|error| problem("metadata", &cbor, error))?;
        let mut read = 0;
        while entries.map_or_else(|| cbor.datatype().is_ok_and(|next| next != Type::Break), |entries| read < entries) {
            read += 1;
            let key = cbor.u64().map_err(|error| problem("metadata key", &cbor, error))?;
            let field = field_name(key);
            metadata.decode_value(key, &mut cbor).map_err(|error| problem(field, &cbor, error))?;
        }
        if entries.is_none() {
            cbor.skip().map_err(|error| problem("metadata", &cbor, error))?;
        }
        if cbor.position() != bytes.len() {
            return Err((
                "metadata",
                cbor.position(),
                format!("{} bytes after the map", bytes.len() - cbor.position()),
            ));
        }
        Ok(metadata)
    }

    fn decode_value(&mut self, key: u64, cbor: &mut Decoder<'_>) -> Result<(), CborError> {
        match key {
            key::METHOD => self.method = Some(cbor.str()?.to_owned()),
            key::REMAINING => self.remaining = Some(Duration::from_millis(cbor.u64()?)),
            key::SENT_AT => self.sent_at = Some(cbor.u64()?),
            key::TRACEPARENT => self.traceparent = Some(cbor.str()?.to_owned()),
            key::INSTANCE => self.instance = Some(cbor.str()?.to_owned()),
            key::SEQUENCE => self.sequence = Some(cbor.u64()?),
            key::HANDLER_TIME => self.handler_time = Some(Duration::from_micros(cbor.u64()?)),
            key::ATTEMPT => self.attempt = Some(cbor.u64()?),
            key::RETRY_AFTER => self.retry_after = Some(Duration::from_millis(cbor.u64()?)),
            key::USER => {
                // An iterator of borrowed pairs: nothing is allocated before an entry is really there.
                for entry in cbor.map_iter::<&str, &str>()? {
                    let (name, value) = entry?;
                    self.user.push((name.to_owned(), value.to_owned()));
                }
            }
            key::ERROR => self.error = Some(cbor.str()?.to_owned()),
            key::TOO_LARGE => self.too_large = Some(cbor.decode()?),
            _ => cbor.skip()?,
        }
        Ok(())
    }
}

fn field_name(key: u64) -> &'static str {
    match key {
        key::METHOD => "metadata 1 (method)",
        key::REMAINING => "metadata 2 (remaining time)",
        key::SENT_AT => "metadata 3 (sender's clock)",
        key::TRACEPARENT => "metadata 4 (traceparent)",
        key::INSTANCE => "metadata 5 (instance)",
        key::SEQUENCE => "metadata 6 (sequence)",
        key::HANDLER_TIME => "metadata 7 (handler time)",
        key::ATTEMPT => "metadata 8 (attempt)",
        key::RETRY_AFTER => "metadata 9 (retry after)",
        key::USER => "metadata 10 (user's map)",
        key::ERROR => "metadata 11 (error text)",
        key::TOO_LARGE => "metadata 12 (size and cap)",
        _ => "metadata of an unknown key",
    }
}

fn problem(field: &'static str, cbor: &Decoder<'_>, error: CborError) -> Problem {
    (field, error.position().unwrap_or(cbor.position()), error.to_string())
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// Lets minicbor write into the message's body.
struct Growing<'a>(&'a mut BytesMut);

impl minicbor::encode::Write for Growing<'_> {
    type Error = std::convert::Infallible;

    fn write_all(&mut self, bytes: &[u8]) -> Result<(), Self::Error> {
        self.0.put_slice(bytes);
        Ok(())
    }
}

impl fmt::Debug for Frames {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Frames").field("offset", &self.offset).field("count", &self.count).finish_non_exhaustive()
    }
}
