//! What arrives: bytes that are not handled yet, and a large body that is read to where it stays.

use std::io;

use bytes::{Buf as _, BytesMut};

use super::super::frames::{AROUND, BODY, END, HEAD, Head};
use super::super::socket::SocketReader;
use super::channel::{Happened, WireChannel};
use super::reading::broken;
use super::state::WireState;

/// How many bytes there is room for when the socket is read.
const ROOM: usize = 64 * 1024;
/// A body of this size, in bytes, is read to where it stays.
const LARGE: u64 = 64 * 1024;
/// The same, if so much of a frame has not arrived. Each frame costs one read more.
const MISSING: usize = 16 * 1024;
/// The room that is made for a large body at once, in bytes, at most.
const MOST_ROOM: usize = 4 * 1024 * 1024;

/// What arrives on a socket.
#[derive(Debug, Default)]
pub(super) struct Incoming {
    /// What has arrived and is not handled.
    pub(super) read: BytesMut,
    large: Option<LargeBody>,
}

/// A body whose frames are read without a copy: of each of them first its payload, to the end of `bytes`, and then its
/// last byte with the head of the next frame.
#[derive(Debug)]
struct LargeBody {
    channel: u16,
    /// The size of the body.
    size: usize,
    bytes: BytesMut,
    /// How many bytes of the frame's payload are still to come.
    left: usize,
}

impl Incoming {
    /// Waits until something has arrived. `false` when the other side has ended the connection. Nothing is lost if this
    /// is dropped.
    ///
    /// # Errors
    /// Those of the socket.
    pub(super) async fn fill(&mut self, socket: &mut SocketReader) -> io::Result<bool> {
        let Some(large) = &mut self.large else { return socket.read(&mut self.read, ROOM).await };
        if large.left == 0 {
            let wanted = if large.bytes.len() < large.size { 1 + HEAD } else { 1 };
            let missing = wanted - self.read.len();
            return Ok(socket.read_some(&mut self.read, missing).await? > 0);
        }
        large.bytes.reserve(large.left.min(MOST_ROOM));
        let count = socket.read_some(&mut large.bytes, large.left).await?;
        large.left -= count;
        Ok(count > 0)
    }

    /// Whether there is something that may be handled.
    pub(super) fn is_empty(&self) -> bool {
        self.read.is_empty() && self.large.is_none()
    }

    /// If a frame of a large body has begun to arrive, reads the rest of that body to where it stays.
    pub(super) fn begin_large(&mut self, head: Head, channel: &mut WireChannel) {
        if head.kind != BODY || head.size - self.read.len() < MISSING || !channel.takes(head, None) {
            return;
        }
        let Some((size, bytes)) = channel.large_body(LARGE) else { return };
        let mut bytes = std::mem::take(bytes);
        let payload = head.size - AROUND;
        bytes.reserve(size.saturating_sub(bytes.len()).min(MOST_ROOM));
        let there = &self.read[HEAD..];
        bytes.extend_from_slice(there);
        self.large = Some(LargeBody { channel: head.channel, size, bytes, left: payload - there.len() });
        self.read.clear();
    }

    /// Goes on with a large body. Returns whether the frames in `read` are to be handled now.
    ///
    /// # Errors
    /// What the other side sends is not AMQP.
    pub(super) fn go_on(&mut self, state: &mut WireState, happened: &mut Vec<Happened>) -> io::Result<bool> {
        let Some(large) = self.large.as_mut() else { return Ok(true) };
        let (0, Some(last)) = (large.left, self.read.first()) else { return Ok(false) };
        if *last != END {
            return Err(broken("a frame without its end"));
        }
        let is_complete = large.bytes.len() >= large.size;
        if !is_complete {
            let Some(head) = Head::of(&self.read[1..]) else { return Ok(false) };
            if (head.kind, head.channel) == (BODY, large.channel) {
                state.check_size(head)?;
                large.left = head.size - AROUND;
                self.read.clear();
                return Ok(false);
            }
        }
        self.read.advance(1);
        if let Some(LargeBody { channel, bytes, .. }) = self.large.take()
            && let Some(channel) = state.channels.get_mut(&channel)
        {
            channel.put_back(bytes, is_complete, happened);
        }
        Ok(true)
    }
}
