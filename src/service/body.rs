//! What a handler answers with, encoded.

use bytes::Bytes;

use crate::frame::{Entries, Frame, HEAD_ROOM};

/// What a handler answers with, encoded, and the metadata of the reply.
#[derive(Debug, Clone)]
pub(crate) struct Body {
    /// The payload, and room in front of it for the head of its frame, so that a large payload is not copied.
    bytes: Vec<u8>,
    /// Where the payload begins.
    start: usize,
    /// The metadata that middleware has set on the reply. Empty without middleware.
    pub(crate) metadata: Entries,
}

impl Body {
    /// A body with the payload that `write` appends.
    pub(super) fn written<E>(write: impl FnOnce(&mut Vec<u8>) -> Result<(), E>) -> Result<Self, E> {
        let mut bytes = Vec::with_capacity(2 * HEAD_ROOM);
        bytes.resize(HEAD_ROOM, 0);
        write(&mut bytes)?;
        Ok(Self { bytes, start: HEAD_ROOM, metadata: Entries::default() })
    }

    pub(crate) fn payload(&self) -> &[u8] {
        &self.bytes[self.start..]
    }

    pub(crate) fn into_payload(self) -> Bytes {
        Bytes::from(self.bytes).slice(self.start..)
    }

    /// The body of a message with `frame` only, and with this payload in it.
    pub(crate) fn in_frame(self, frame: &Frame) -> Bytes {
        frame.to_body_around(self.bytes, self.start)
    }
}

impl From<Vec<u8>> for Body {
    fn from(bytes: Vec<u8>) -> Self {
        Self { bytes, start: 0, metadata: Entries::default() }
    }
}
