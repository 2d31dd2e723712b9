//! Changes to a frame that is written already.

use std::time::Duration;

use bytes::Bytes;

use super::{HEADER, length_at, metadata, set_length};
use crate::compression::{self, Compression};

/// The `body` of one frame with a compressed payload. If the payload is small, or compression does not make it smaller,
/// it is returned as it is.
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

/// The `body` of one frame with another remaining time, which takes the place of that in it. `None` if it has none, or
/// if the new one needs more bytes.
pub(crate) fn with_remaining(body: &Bytes, remaining: Duration) -> Option<Bytes> {
    let metadata = body.get(HEADER..HEADER + length_at(body, 24))?;
    let number = metadata::remaining(metadata)?;
    let (at, size) = (HEADER + number.start, number.len());
    let millis = metadata::millis(remaining).to_be_bytes();
    let (unused, millis) = millis.split_at(millis.len() - size);
    if unused.iter().any(|byte| *byte != 0) {
        return None;
    }
    let mut body = body.to_vec();
    body[at..at + size].copy_from_slice(millis);
    Some(body.into())
}
