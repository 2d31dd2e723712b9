//! The wire: a frame is a header of 32 bytes, metadata and a payload. A message holds one frame or several.
//!
//! The guide's page "The wire" specifies it. This module does no I/O. Nothing is allocated for a length before it was
//! checked against the bytes that are there, so a hostile message costs no more than its own size.

#[cfg(test)]
mod any_body;
mod block;
mod changed;
mod entries;
mod metadata;
mod trace;
#[cfg(test)]
mod vectors;

use std::convert::Infallible;
use std::fmt;

use bytes::{BufMut, Bytes};
use uuid::Uuid;

pub(crate) use self::block::{HEAD_ROOM, to_keep};
pub(crate) use self::changed::{compressed, with_remaining};
pub(crate) use self::entries::{Entries, Excess, check as check_entries, set as set_entry};
use self::metadata::Names;
pub(crate) use self::metadata::{MAX_USER_ENTRIES, Metadata, More, micros, millis};
pub(crate) use self::trace::{Trace, Traceparent};
use crate::codec::Codec;
use crate::compression::{Compression, CompressionRefusal};
use crate::error::Code;
use crate::limits::{MAX_FRAMES, MAX_METADATA};

/// The media type of a message's body.
pub(crate) const CONTENT_TYPE: &str = "application/vnd.hopline";

/// Every frame begins with these bytes.
const MAGIC: [u8; 2] = *b"HL";
/// The version of the wire in each frame's header.
const VERSION: u8 = 1;
/// The size of a frame's header, in bytes.
const HEADER: usize = 32;

/// The bits of the flags that hold the number of the compression.
const FLAG_COMPRESSION: u8 = 0b0011;
/// Set in a request of an idempotent method.
const FLAG_IDEMPOTENT: u8 = 0b0100;
/// Set in a reply whose payload is the method's own error.
const FLAG_SERVICE_ERROR: u8 = 0b1000;

/// What a frame is, as the number of its type on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub(crate) enum Kind {
    /// A call that wants a reply.
    Request = 1,
    /// The reply to a request.
    Reply = 2,
    /// A call without a reply.
    Oneway = 3,
    /// An event for subscribers.
    Event = 4,
    /// Reserved for streams: refused by this version.
    StreamItem = 5,
    /// Reserved for streams: refused by this version.
    StreamEnd = 6,
    /// The caller of a request has given up. With the id zero, it is a question whether anybody is there.
    Cancel = 7,
    /// Reserved for streams: refused by this version.
    Credit = 8,
    /// A sign of life: an instance says that it still runs a request.
    KeepAlive = 9,
    /// The question to other instances whether they run a call.
    Locate = 10,
}

impl Kind {
    /// Whether nobody waits for a reply, so that the broker may keep it for as long as it takes.
    pub(crate) fn is_kept(self) -> bool {
        matches!(self, Self::Oneway | Self::Event)
    }

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

/// One request, reply or other frame, as it was read or as it will be written.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Frame {
    pub(crate) kind: Kind,
    pub(crate) codec: Codec,
    /// [`Code::Ok`] except in replies that are faults.
    pub(crate) status: Code,
    /// Whether the method may run twice without harm.
    pub(crate) idempotent: bool,
    /// Whether the payload is the method's own error.
    pub(crate) service_error: bool,
    /// The id of this attempt: what replies, cancels, signs of life and claims go by.
    pub(crate) id: Uuid,
    pub(crate) metadata: Metadata,
    /// How the payload is compressed. `None`: not at all.
    pub(crate) compression: Option<Compression>,
    /// The payload as it is on the wire, which may be compressed.
    pub(crate) payload: Bytes,
}

impl Frame {
    /// A frame with the status `Ok`, without flags and compression.
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

    /// The payload without compression. A compressed payload may decompress to at most `cap` bytes.
    pub(crate) fn plain_payload(&self, cap: usize) -> Result<Bytes, CompressionRefusal> {
        match self.compression {
            None => Ok(self.payload.clone()),
            Some(compression) => compression.decompress(&self.payload, cap).map(Bytes::from),
        }
    }
}

/// What is wrong with the body of a message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("frame field `{field}` at byte {offset}: {problem}")]
pub(crate) struct FrameError {
    /// The field that is wrong.
    pub(crate) field: &'static str,
    /// The position of the error in the body, in bytes.
    pub(crate) offset: usize,
    pub(crate) problem: String,
    /// The code of the fault that answers it.
    pub(crate) code: Code,
    /// The position of the frame in the body, in bytes.
    pub(crate) frame: usize,
    /// The id of the frame, if it could be read, so that its sender can be answered.
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

    /// The body of a message with this frame only.
    pub(crate) fn to_body(&self) -> Bytes {
        self.to_body_of(&self.payload)
    }

    /// The same, with another payload.
    pub(crate) fn to_body_of(&self, payload: &[u8]) -> Bytes {
        let body: Result<_, Infallible> = self.to_body_with(|body| {
            body.reserve_exact(payload.len());
            body.extend_from_slice(payload);
            Ok(())
        });
        body.unwrap_or_default()
    }

    /// The same, but `write` appends the payload. This spares a copy.
    pub(crate) fn to_body_with<E>(&self, write: impl FnOnce(&mut Vec<u8>) -> Result<(), E>) -> Result<Bytes, E> {
        block::written(|body| {
            self.encode_head(body);
            let payload = body.len();
            write(body)?;
            let length = body.len() - payload;
            set_length(body, 28, length);
            Ok(())
        })
    }

    /// Appends header and metadata to `body`. Returns the position where the frame begins.
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

/// The length in a frame's header at this position.
fn length_at(frame: &[u8], at: usize) -> usize {
    u32::from_be_bytes([frame[at], frame[at + 1], frame[at + 2], frame[at + 3]]) as usize
}

/// Writes a length into a frame's header.
fn set_length(body: &mut [u8], at: usize, bytes: usize) {
    body[at..at + 4].copy_from_slice(&length(bytes).to_be_bytes());
}

/// A length as it is written. All lengths are checked against a cap far below 4 GiB, before this or right after it.
fn length(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX)
}

/// The frames of a body, one after the other. An error is the last item, since it is not known where the next frame
/// begins.
pub(crate) struct Frames {
    body: Bytes,
    offset: usize,
    count: usize,
    broken: bool,
    /// The names in the last frame. Those of the next are often the same, and are shared then.
    names: Names,
}

/// Reads the frames in the body of a message.
pub(crate) fn decode(body: Bytes) -> Frames {
    Frames { body, offset: 0, count: 0, broken: false, names: Names::default() }
}

/// How many frames a body has, if all of them are well-formed.
pub(crate) fn likely_count(body: &[u8]) -> usize {
    let (mut rest, mut count) = (body, 0);
    while count < MAX_FRAMES && rest.len() >= HEADER {
        let size = HEADER.saturating_add(length_at(rest, 24)).saturating_add(length_at(rest, 28));
        rest = rest.get(size..).unwrap_or_default();
        count += 1;
    }
    count
}

/// The error for a body that is larger than `cap` bytes, which is not read.
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

/// The id in a frame's header, if the frame is long enough for it.
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
    /// Reads the next frame. Every length is checked before it is used.
    fn read(&mut self) -> Result<Frame, FrameError> {
        let start = self.offset;
        let rest = &self.body[start..];
        let id = named_id(rest);
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
        let (metadata_length, payload_length) = (length_at(rest, 24), length_at(rest, 28));
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
        let payload = self.body.slice(start + payload_at..start + payload_at + payload_length);
        self.offset = start + payload_at + payload_length;
        self.names.keep(&metadata);
        Ok(Frame {
            kind,
            codec,
            status,
            idempotent: flags & FLAG_IDEMPOTENT != 0,
            service_error: flags & FLAG_SERVICE_ERROR != 0,
            id: id.unwrap_or_default(),
            metadata,
            compression,
            payload,
        })
    }
}

impl fmt::Debug for Frames {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Frames").field("offset", &self.offset).field("count", &self.count).finish_non_exhaustive()
    }
}
