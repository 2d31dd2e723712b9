//! What the users of a wire share: bytes to be sent, channels, and what goes to and from lapin.

use std::collections::HashMap;
use std::io;
use std::task::Waker;

use bytes::{BufMut as _, BytesMut};
use tokio::sync::oneshot;

use super::super::frames::{
    AROUND, BODY, CANCEL, CHANNEL_CLOSE, CONNECTION_CLOSE, Fields, HEADER, Head, Method, PUBLISH, TUNE_OK, begin, end,
    frame, method, put_method, put_short,
};
use super::super::properties;
use super::channel::{ChannelUse, WireChannel};
use super::reading::broken;
use super::unsent::Unsent;
use super::{Answer, ChannelClosed};
use crate::transport::Publication;

/// The largest frame, in bytes, before the broker has agreed to another size, and if it sets no limit.
pub(super) const FRAME_MAX: usize = 128 * 1024;

/// A channel that the broker has closed, and who is told.
pub(super) enum Closed {
    ForPublishing(oneshot::Sender<ChannelClosed>, ChannelClosed),
    ForGetting(Answer, ChannelClosed),
}

/// What the users of a wire share.
pub(super) struct WireState {
    pub(super) unsent: Unsent,
    /// The channels whose messages do not reach lapin.
    pub(super) channels: HashMap<u16, WireChannel>,
    /// The largest frame that both sides accept, in bytes.
    pub(super) frame_max: usize,
    /// Whether the broker reads nothing for now. Then nothing is written, so that it is known what has not left.
    pub(super) is_blocked: bool,
    /// Whether the socket took nothing the last time. The task waits until it takes something again.
    pub(super) is_full: bool,
    /// Whether the socket has refused to be written.
    pub(super) is_broken: bool,
    /// Whether lapin or the broker is closing the connection. Then nothing more may be sent.
    pub(super) is_closing: bool,
    /// The task has ended. The error is `None` after lapin was told, and if the other side has ended the connection.
    pub(super) ended: Option<Option<io::Error>>,
    /// Channels that the broker has closed, which is not told yet.
    pub(super) closed: Vec<Closed>,
    /// What is for lapin, and who is woken when there is something.
    pub(super) for_lapin: BytesMut,
    pub(super) lapin: Option<Waker>,
    /// Whether lapin has read something that it has not handled.
    pub(super) lapin_is_busy: bool,
    /// Whether lapin has no pipe any more.
    pub(super) lapin_is_gone: bool,
    /// What lapin has written of a frame that is not complete.
    pub(super) from_lapin: BytesMut,
    /// How many times the task has handled what it has read.
    pub(super) reads: u64,
}

impl Default for WireState {
    fn default() -> Self {
        Self {
            unsent: Unsent::default(),
            channels: HashMap::new(),
            frame_max: FRAME_MAX,
            is_blocked: false,
            is_full: false,
            is_broken: false,
            is_closing: false,
            ended: None,
            closed: Vec::new(),
            for_lapin: BytesMut::new(),
            lapin: None,
            lapin_is_busy: false,
            lapin_is_gone: false,
            from_lapin: BytesMut::new(),
            reads: 0,
        }
    }
}

impl WireState {
    /// Whether something may be written now, and nobody writes.
    pub(super) fn may_write(&self) -> bool {
        !self.is_blocked && !self.is_broken && !self.unsent.is_being_written()
    }

    /// Checks that a frame is not larger than the connection allows.
    pub(super) fn check_size(&self, head: Head) -> io::Result<()> {
        match head.size > self.frame_max.max(FRAME_MAX) {
            true => Err(broken(format!("a frame of {} bytes, and the connection allows fewer", head.size))),
            false => Ok(()),
        }
    }

    /// Pushes frames to be sent.
    pub(super) fn push(&mut self, write: impl FnOnce(&mut BytesMut)) {
        self.unsent.push(write);
    }

    /// Takes over what lapin has written: whole frames only, so that others fit between them.
    pub(super) fn push_from_lapin(&mut self, bytes: &[u8]) {
        self.from_lapin.extend_from_slice(bytes);
        loop {
            let size = match Head::of(&self.from_lapin) {
                // The first words of a connection are no frame.
                _ if self.from_lapin.starts_with(b"AMQP") => 8,
                Some(head) => head.size,
                None => return,
            };
            if self.from_lapin.len() < size {
                return;
            }
            let whole = self.from_lapin.split_to(size);
            self.push(|out| out.put_slice(&whole));
            self.note(&whole);
        }
    }

    pub(super) fn push_settlement(&mut self, channel: u16, method: Method, tag: u64, flags: u8) {
        self.push(|out| {
            put_method(out, channel, method, |out| {
                out.put_u64(tag);
                out.put_u8(flags);
            });
        });
    }

    /// Notes what lapin tells the broker.
    fn note(&mut self, whole: &[u8]) {
        match (Head::of(whole), method(whole)) {
            (_, Some((TUNE_OK, mut fields))) => {
                let _channel_max = fields.u16();
                // Without a limit, the usual one is as good.
                let frame_max = fields.u32().filter(|limit| *limit > 0);
                self.frame_max = frame_max.map_or(FRAME_MAX, |limit| limit as usize);
            }
            (_, Some((CONNECTION_CLOSE, _))) => self.is_closing = true,
            (Some(head), Some((CHANNEL_CLOSE, _))) => {
                if let Some(channel) = self.channels.get_mut(&head.channel) {
                    channel.is_closing = true;
                }
            }
            (Some(head), Some((CANCEL, _))) => {
                let Some(channel) = self.channels.get_mut(&head.channel) else { return };
                let ChannelUse::Consume { held, .. } = &mut channel.purpose else { return };
                for (method, tag, flags) in held.take().unwrap_or_default() {
                    self.push_settlement(head.channel, method, tag, flags);
                }
            }
            _ => {}
        }
    }

    /// Gives lapin bytes to read.
    pub(super) fn pass_on(&mut self, bytes: &[u8]) {
        self.for_lapin.extend_from_slice(bytes);
        if let Some(lapin) = self.lapin.take() {
            lapin.wake();
        }
    }

    /// The broker closes a channel, or confirms that lapin has.
    pub(super) fn end_channel(&mut self, number: u16, frame: &[u8]) {
        let told = match method(frame) {
            Some((CHANNEL_CLOSE, fields)) => closed(fields),
            _ => ChannelClosed::default(),
        };
        let Some(channel) = self.channels.get_mut(&number) else { return };
        channel.is_closing = true;
        match &mut channel.purpose {
            ChannelUse::Publish { closed, idle, .. } => {
                idle.clear();
                self.closed.extend(closed.take().map(|closed| Closed::ForPublishing(closed, told)));
                // Whoever publishes takes out what is not confirmed.
                return;
            }
            ChannelUse::Get(answer) => self.closed.extend(answer.take().map(|answer| Closed::ForGetting(answer, told))),
            ChannelUse::Consume { .. } => {}
        }
        self.channels.remove(&number);
    }

    /// Tells of the channels that were closed. lapin has to know it before: if a channel of which it does not know that
    /// was dropped, it would end the connection.
    pub(super) fn tell_closed(&mut self) {
        for closed in self.closed.drain(..) {
            // It does not matter if nobody waits for it.
            match closed {
                Closed::ForPublishing(closed, told) => _ = closed.send(told),
                Closed::ForGetting(answer, told) => _ = answer.send(Err(told)),
            }
        }
    }
}

/// The code and the words with which the broker closes a channel.
fn closed(mut fields: Fields<'_>) -> ChannelClosed {
    let code = fields.u16().unwrap_or_default();
    ChannelClosed { code, text: fields.short().map(|text| text.into_owned()).unwrap_or_default() }
}

/// Pushes the frames of a publication.
///
/// # Errors
/// A sentence that names what is too long for AMQP. Nothing is pushed then.
pub(super) fn push_publication(
    unsent: &mut Unsent,
    channel: u16,
    publication: &Publication,
    user: Option<&str>,
    number: u64,
    frame_max: usize,
) -> Result<(), String> {
    let Publication { exchange, key, mandatory, properties, body } = publication;
    unsent.try_push(|out| {
        let mut named = Ok(());
        put_method(out, channel, PUBLISH, |out| {
            out.put_u16(0);
            named = put_short(out, exchange).and_then(|()| put_short(out, key));
            out.put_u8(u8::from(*mandatory));
        });
        let start = out.len();
        frame(out, HEADER, channel, |out| {
            named = std::mem::replace(&mut named, Ok(()))
                .and_then(|()| properties::put(out, properties, body.len(), number, user));
        });
        let size = out.len() - start;
        if named.is_ok() && size > frame_max {
            return Err(format!(
                "the headers and properties of a message take {size} bytes, and the connection allows {frame_max}: send \
                 less in headers, or give the address a larger `frame_max`"
            ));
        }
        named
    })?;
    let mut rest = body.clone();
    while !rest.is_empty() {
        let part = rest.split_to(rest.len().min(frame_max - AROUND));
        unsent.push(|out| begin(out, BODY, channel, part.len() as u32));
        unsent.push_bytes(part);
        unsent.push(end);
    }
    Ok(())
}
