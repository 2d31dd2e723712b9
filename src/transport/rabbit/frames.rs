//! AMQP frames, as far as Hopline reads and writes them itself: those that carry messages, acks and confirms.
//!
//! Nothing here calls itself. Tables and arrays in each other, as many as there may be, are skipped by their length.

use std::borrow::Cow;

use bytes::{BufMut as _, BytesMut};

/// A frame with a method.
pub(super) const METHOD: u8 = 1;
/// A frame with the properties of a message.
pub(super) const HEADER: u8 = 2;
/// A frame with a part of a message's body.
pub(super) const BODY: u8 = 3;
/// The last byte of every frame.
pub(super) const END: u8 = 0xCE;
/// The bytes of a frame in front of its payload: kind, channel, length.
pub(super) const HEAD: usize = 7;
/// The bytes of a frame around its payload.
pub(super) const AROUND: usize = HEAD + 1;
/// A sign of life.
pub(super) const HEARTBEAT: [u8; AROUND] = [8, 0, 0, 0, 0, 0, 0, END];
/// AMQP's class of the methods for messages.
pub(super) const BASIC: u16 = 60;

/// A method: its class, and its number in the class.
pub(super) type Method = (u16, u16);

pub(super) const BLOCKED: Method = (10, 60);
pub(super) const UNBLOCKED: Method = (10, 61);
pub(super) const TUNE_OK: Method = (10, 31);
pub(super) const CONNECTION_CLOSE: Method = (10, 50);
pub(super) const CHANNEL_CLOSE: Method = (20, 40);
pub(super) const CHANNEL_CLOSED: Method = (20, 41);
pub(super) const CANCEL: Method = (BASIC, 30);
pub(super) const PUBLISH: Method = (BASIC, 40);
pub(super) const RETURN: Method = (BASIC, 50);
pub(super) const DELIVER: Method = (BASIC, 60);
pub(super) const GET: Method = (BASIC, 70);
pub(super) const GOT: Method = (BASIC, 71);
pub(super) const GOT_NOTHING: Method = (BASIC, 72);
pub(super) const ACK: Method = (BASIC, 80);
pub(super) const REJECT: Method = (BASIC, 90);
pub(super) const NACK: Method = (BASIC, 120);

/// What stands in front of every frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Head {
    /// What is in the frame.
    pub(super) kind: u8,
    pub(super) channel: u16,
    /// The length of the whole frame.
    pub(super) size: usize,
}

impl Head {
    /// The head of the frame with which `bytes` begin. `None` if it has not arrived completely.
    pub(super) fn of(bytes: &[u8]) -> Option<Self> {
        let mut fields = Fields(bytes);
        let (kind, channel, payload) = (fields.u8()?, fields.u16()?, fields.u32()?);
        Some(Self { kind, channel, size: payload as usize + AROUND })
    }
}

/// Whether a frame can begin with this byte.
pub(super) fn is_known(kind: u8) -> bool {
    matches!(kind, METHOD | HEADER | BODY) || kind == HEARTBEAT[0]
}

/// Whether this whole frame ends as a frame must.
pub(super) fn is_whole(frame: &[u8]) -> bool {
    frame.last() == Some(&END)
}

/// The payload of a whole frame.
pub(super) fn payload(frame: &[u8]) -> &[u8] {
    frame.get(HEAD..frame.len().saturating_sub(1)).unwrap_or_default()
}

/// The method of a whole frame, and its arguments. `None` if the frame has no method.
pub(super) fn method(frame: &[u8]) -> Option<(Method, Fields<'_>)> {
    let mut fields = Fields(payload(frame));
    let method = (frame.first() == Some(&METHOD)).then(|| Some((fields.u16()?, fields.u16()?)))??;
    Some((method, fields))
}

/// Reads one value after the other. Each is `None` when the bytes are used up.
#[derive(Debug, Clone, Copy)]
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl<'a> Fields<'a> {
    pub(super) fn bytes(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (taken, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*taken)
    }

    pub(super) fn u8(&mut self) -> Option<u8> {
        self.array().map(u8::from_be_bytes)
    }

    pub(super) fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    pub(super) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    /// A text with a length of one byte. Bytes that are not UTF-8 are replaced.
    pub(super) fn short(&mut self) -> Option<Cow<'a, str>> {
        let length = self.u8()?;
        self.bytes(length.into()).map(String::from_utf8_lossy)
    }

    /// Bytes with a length of four bytes: a long text, a table or an array.
    pub(super) fn long(&mut self) -> Option<&'a [u8]> {
        let length = self.u32()?;
        self.bytes(length as usize)
    }
}

/// Writes a frame. `write` writes its payload.
pub(super) fn frame(out: &mut BytesMut, kind: u8, channel: u16, write: impl FnOnce(&mut BytesMut)) {
    begin(out, kind, channel, 0);
    let start = out.len();
    write(out);
    let length = (out.len() - start) as u32;
    out[start - 4..start].copy_from_slice(&length.to_be_bytes());
    end(out);
}

/// Writes what stands in front of a payload of this length.
pub(super) fn begin(out: &mut BytesMut, kind: u8, channel: u16, length: u32) {
    out.put_u8(kind);
    out.put_u16(channel);
    out.put_u32(length);
}

/// Writes what stands behind a payload.
pub(super) fn end(out: &mut BytesMut) {
    out.put_u8(END);
}

/// Writes the frame of a method. `write` writes its arguments.
pub(super) fn put_method(out: &mut BytesMut, channel: u16, (class, number): Method, write: impl FnOnce(&mut BytesMut)) {
    frame(out, METHOD, channel, |out| {
        out.put_u16(class);
        out.put_u16(number);
        write(out);
    });
}

/// Writes a text of at most 255 bytes.
///
/// # Errors
/// A sentence that contains the text, if it is longer. Nothing is written then.
pub(super) fn put_short(out: &mut BytesMut, text: &str) -> Result<(), String> {
    let length = u8::try_from(text.len()).map_err(|_| too_long(text))?;
    out.put_u8(length);
    out.put_slice(text.as_bytes());
    Ok(())
}

/// A sentence about a name that has more than 255 bytes.
pub(super) fn too_long(name: &str) -> String {
    format!("`{name}` is longer than the 255 bytes that AMQP allows for a name")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_is_read_as_it_was_written() {
        let mut out = BytesMut::new();
        put_method(&mut out, 7, ACK, |out| {
            out.put_u64(3);
            put_short(out, "name").expect("a short one");
        });
        let head = Head::of(&out).expect("it is there");
        assert_eq!(head, Head { kind: METHOD, channel: 7, size: out.len() });
        assert!(is_known(head.kind) && is_whole(&out));
        let (method, mut fields) = method(&out).expect("it is one");
        assert_eq!((method, fields.u64(), fields.short().as_deref()), (ACK, Some(3), Some("name")));
        assert_eq!((fields.u8(), fields.short(), fields.long()), (None, None, None));
    }

    #[test]
    fn what_has_not_arrived_completely_is_not_read() {
        assert_eq!(Head::of(&HEARTBEAT[..6]), None);
        assert_eq!(Head::of(&HEARTBEAT).map(|head| head.size), Some(8));
        assert!(method(&HEARTBEAT).is_none());
        assert!(method(&[METHOD, 0, 0, 0, 0, 0, 1, 0, END]).is_none());
        assert_eq!(Fields(&[3, b'a']).short(), None);
        assert_eq!(Fields(&[0, 0, 0, 2, 1]).long(), None);
    }

    #[test]
    fn a_name_that_is_too_long_is_named_and_not_written() {
        let mut out = BytesMut::new();
        assert!(put_short(&mut out, &"x".repeat(256)).is_err_and(|why| why.contains("255 bytes")));
        assert!(out.is_empty());
        put_short(&mut out, &"x".repeat(255)).expect("it is short enough");
    }
}
