//! The wire: frames of a fixed header, metadata and payload, several in one message. `docs/wire.md` specifies it.

#[cfg(test)]
mod any_body;
mod entries;
mod metadata;
mod trace;
#[cfg(test)]
mod vectors;

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
    /// The id of this attempt: what replies, cancels, signs of life and claims go by.
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

    /// The id of the call that this is an attempt of: the same in all of them.
    pub(crate) fn call_id(&self) -> Uuid {
        self.metadata.more().call_id.unwrap_or(self.id)
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
