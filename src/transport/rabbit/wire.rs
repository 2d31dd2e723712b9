//! The wire: the socket of one connection, beneath lapin.
//!
//! lapin logs in, opens and closes channels, declares, and begins and ends consumers. It does not have the socket for
//! that, but a [`Pipe`]. The socket belongs to the wire, which reads it with one task. Frames that carry messages, acks
//! and confirms do not reach lapin: the wire reads and writes them itself. Every other frame it passes on, byte by
//! byte.
//!
//! So a frame that arrives wakes one task, and not a thread as well. Whoever publishes writes to the socket itself. A
//! return is found by the number of its publication. It is known what has left, and a message cannot break the thread
//! that reads for all others.

mod channel;
mod incoming;
mod pipe;
mod reading;
mod state;
mod awaiting;
mod unsent;

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use bytes::{BufMut as _, Bytes};
use tokio::sync::{Notify, oneshot};

use self::awaiting::AwaitingConfirm;
use self::channel::{ChannelUse, Envelope, WireChannel};
pub(super) use self::pipe::Pipe;
use self::state::{WireState, push_publication};
use self::unsent::AT_ONCE;
use super::frames::{ACK, GET, Method, NACK, REJECT, put_method, put_short};
use super::properties::Content;
use super::socket::{SocketReader, SocketWriter};
use crate::transport::{Confirm, Loss, Lost, Publication, ReceiptSender, Settle};

/// How many of the first bytes from the other side are kept: RabbitMQ says there who it is.
const FIRST_WORDS: usize = 2048;

/// Gets the deliveries of a consumer.
pub(super) type Sink = Arc<dyn Fn(Arrived) + Send + Sync>;
/// Where the answer to a question for a message goes. `None` inside: the queue is empty.
type Answer = oneshot::Sender<Result<Option<Arrived>, ChannelClosed>>;

/// A publication that was handed in, and where its outcome is told.
#[derive(Debug)]
pub(super) struct Submitted {
    pub(super) publication: Publication,
    pub(super) outcome: ReceiptSender,
}

impl Submitted {
    /// Tells the outcome. It does not matter if nobody waits for it.
    pub(super) fn tell(self, what: Result<Confirm, Lost>) {
        self.outcome.tell(what);
    }
}

/// A publication that was sent and is not confirmed.
#[derive(Debug)]
struct Flight {
    handed: Submitted,
    /// Where it ends among all bytes of the connection.
    end: u64,
    /// Whether the broker has returned it.
    returned: bool,
}

/// A publication whose channel or connection ended before its confirm.
#[derive(Debug)]
pub(super) struct Unfinished {
    pub(super) handed: Submitted,
    /// Whether all of it has left, so that the broker may have got it.
    pub(super) has_left: bool,
    /// Whether the broker has returned it.
    pub(super) returned: bool,
}

/// A message that has arrived.
#[derive(Debug)]
pub(super) struct Arrived {
    pub(super) envelope: Envelope,
    pub(super) content: Content,
    pub(super) body: Bytes,
}

/// The broker has closed a channel.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct ChannelClosed {
    /// AMQP's reply code, such as 404. 0 if the connection has ended.
    pub(super) code: u16,
    /// The broker's words.
    pub(super) text: String,
}

/// The socket of one connection. Its task reads it; whoever publishes or acknowledges writes to it.
pub(super) struct Wire {
    socket: SocketWriter,
    state: Mutex<WireState>,
    /// Wakes the task.
    wake: Notify,
    /// Tells that what was read has been handled.
    handled: Notify,
    /// The first bytes from the other side. They show which protocol it speaks.
    first_words: OnceLock<Vec<u8>>,
}

impl fmt::Debug for Wire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Wire").finish_non_exhaustive()
    }
}

impl Wire {
    /// Takes a socket over. The task has to be spawned. It ends with the connection, or when the pipe is dropped.
    pub(super) fn new(
        (reader, socket): (SocketReader, SocketWriter),
    ) -> (Arc<Self>, Pipe, impl Future<Output = ()> + Send) {
        let (wake, handled, first_words) = (Notify::new(), Notify::new(), OnceLock::new());
        let wire = Arc::new(Self { socket, state: Mutex::default(), wake, handled, first_words });
        (wire.clone(), Pipe::new(wire.clone()), reading::run(wire, reader))
    }

    fn lock(&self) -> MutexGuard<'_, WireState> {
        self.state.lock().expect("no panic while holding the state")
    }

    /// The first bytes from the other side.
    pub(super) fn first_words(&self) -> &[u8] {
        self.first_words.get().map_or(&[], Vec::as_slice)
    }

    /// Gives the deliveries on a channel to `sink`, from now on.
    pub(super) fn consume(&self, channel: u16, sink: Sink) {
        self.register(channel, ChannelUse::Consume { sink: Some(sink), held: None });
    }

    /// Gives nobody the deliveries on a channel. The broker requeues them when the channel is closed.
    pub(super) fn stop_consuming(&self, channel: u16) {
        let mut state = self.lock();
        if let Some(WireChannel { purpose: ChannelUse::Consume { sink, .. }, .. }) = state.channels.get_mut(&channel) {
            let sink = sink.take();
            drop(state);
            drop(sink);
        }
    }

    /// Lets messages be published on a channel in confirm mode, on which `earlier` messages were published before.
    /// Returns what tells if the broker closes the channel.
    pub(super) fn publish_on(&self, channel: u16, earlier: u64) -> oneshot::Receiver<ChannelClosed> {
        let (closed, told) = oneshot::channel();
        let unconfirmed = AwaitingConfirm::after(earlier);
        self.register(channel, ChannelUse::Publish { unconfirmed, closed: Some(closed), idle: Vec::new() });
        told
    }

    /// Lets single messages be asked for on a channel.
    pub(super) fn get_on(&self, channel: u16) {
        self.register(channel, ChannelUse::Get(None));
    }

    fn register(&self, channel: u16, purpose: ChannelUse) {
        self.lock().channels.insert(channel, WireChannel::new(purpose));
    }

    /// Publishes a message on a channel. `user` is who publishes it.
    ///
    /// # Errors
    /// The publication, if the channel or the connection has ended.
    pub(super) fn publish(&self, channel: u16, user: Option<&str>, handed: Submitted) -> Result<(), Box<Submitted>> {
        self.push(channel, user, handed)?;
        self.write();
        Ok(())
    }

    /// The same, but nothing is written before [`write`](Self::write).
    pub(super) fn push(&self, channel: u16, user: Option<&str>, handed: Submitted) -> Result<(), Box<Submitted>> {
        let mut guard = self.lock();
        let state = &mut *guard;
        if state.ended.is_some() || state.is_closing {
            return Err(Box::new(handed));
        }
        let Some(WireChannel { purpose: ChannelUse::Publish { unconfirmed, .. }, is_closing: false, .. }) =
            state.channels.get_mut(&channel)
        else {
            return Err(Box::new(handed));
        };
        let number = unconfirmed.next_number();
        let pushed = push_publication(&mut state.unsent, channel, &handed.publication, user, number, state.frame_max);
        if let Err(reason) = pushed {
            drop(guard);
            handed.tell(Err(Lost { loss: Loss::Refused, reason: reason.into() }));
            return Ok(());
        }
        unconfirmed.push(Flight { handed, end: state.unsent.pushed(), returned: false });
        Ok(())
    }

    /// Writes what was pushed.
    pub(super) fn write(&self) {
        self.flush(self.lock());
    }

    /// Waits until everything on a channel is confirmed. Never resolves if the channel ends before.
    pub(super) async fn all_confirmed(&self, channel: u16) {
        let told = match self.lock().channels.get_mut(&channel) {
            Some(WireChannel { purpose: ChannelUse::Publish { unconfirmed, idle, .. }, .. })
                if !unconfirmed.is_empty() =>
            {
                let (tell, told) = oneshot::channel();
                idle.push(tell);
                told
            }
            _ => return,
        };
        if told.await.is_err() {
            std::future::pending().await
        }
    }

    /// Ends publishing on a channel, and returns what is not confirmed, in the order of publishing. Nothing more may be
    /// published on it meanwhile.
    pub(super) async fn take_unfinished(&self, channel: u16) -> Vec<Unfinished> {
        // Whoever writes does not wait for anything. After that it is known what has left.
        while self.lock().unsent.is_being_written() {
            tokio::task::yield_now().await;
        }
        let mut state = self.lock();
        let left = state.unsent.left();
        match state.channels.remove(&channel) {
            Some(WireChannel { purpose: ChannelUse::Publish { unconfirmed, .. }, .. }) => unfinished(unconfirmed, left),
            _ => Vec::new(),
        }
    }

    /// Asks for a message of a queue. The channel has to be known by [`get_on`](Self::get_on), and to have no other
    /// question.
    pub(super) fn get(&self, channel: u16, queue: &str) -> oneshot::Receiver<Result<Option<Arrived>, ChannelClosed>> {
        let (answer, told) = oneshot::channel();
        let mut guard = self.lock();
        let state = &mut *guard;
        if state.ended.is_some() || state.is_closing {
            // Without an answer, the end of the connection is awaited.
            return told;
        }
        let Some(WireChannel { purpose: ChannelUse::Get(asked), is_closing: false, .. }) =
            state.channels.get_mut(&channel)
        else {
            let text = "the broker has closed the channel on which messages are taken out: ask again".to_owned();
            let _ = answer.send(Err(ChannelClosed { code: 0, text }));
            return told;
        };
        *asked = Some(answer);
        state.push(|out| {
            put_method(out, channel, GET, |out| {
                out.put_u16(0);
                // Its length was checked before the channel was opened.
                let _ = put_short(out, queue);
                out.put_u8(0);
            });
        });
        self.flush(guard);
        told
    }

    /// Acknowledges a delivery or, if `multiple`, it and all before it on the channel.
    pub(super) fn ack(&self, channel: u16, tag: u64, multiple: bool) {
        self.send(channel, ACK, tag, multiple.into());
    }

    /// Settles a delivery. An ack is for this delivery alone.
    pub(super) fn settle(&self, channel: u16, tag: u64, settle: Settle) {
        match settle {
            Settle::Ack => self.ack(channel, tag, false),
            // The second bit stands for "requeue", the first for "multiple".
            Settle::GiveBack => self.send(channel, NACK, tag, 2),
            Settle::Failed => self.send(channel, REJECT, tag, 1),
            Settle::Discard => self.send(channel, REJECT, tag, 0),
        }
    }

    /// Sends what is said of a delivery. Nobody needs to know whether it arrives: if the channel ends before, the
    /// broker requeues the delivery.
    fn send(&self, channel: u16, method: Method, tag: u64, flags: u8) {
        let mut guard = self.lock();
        let state = &mut *guard;
        match state.channels.get_mut(&channel) {
            Some(WireChannel { is_closing: false, .. }) if state.is_closing => {}
            Some(WireChannel { is_closing: false, purpose: ChannelUse::Consume { held: Some(held), .. }, .. }) => {
                held.push((method, tag, flags));
            }
            Some(WireChannel { is_closing: false, .. }) => {
                state.push_settlement(channel, method, tag, flags);
                self.flush(guard);
            }
            _ => {}
        }
    }

    /// Holds back what is said of deliveries until lapin has cancelled the consumer of this channel.
    pub(super) fn hold_until_cancelled(&self, channel: u16) {
        if let Some(WireChannel { purpose: ChannelUse::Consume { held, .. }, .. }) =
            self.lock().channels.get_mut(&channel)
        {
            held.get_or_insert_default();
        }
    }

    /// Writes what the socket takes now. The task writes the rest. The lock is not held for that: whoever pushes
    /// something meanwhile leaves it to whoever writes.
    fn flush<'wire>(&'wire self, mut state: MutexGuard<'wire, WireState>) {
        if !state.may_write() || state.is_full || state.unsent.is_empty() {
            return;
        }
        let until = state.unsent.left() + AT_ONCE;
        let mut result = Ok(());
        while result.is_ok() && state.may_write() && !state.unsent.is_empty() && state.unsent.left() < until {
            let mut writing = state.unsent.take();
            drop(state);
            result = writing.write_to(|parts| self.socket.write(parts));
            state = self.lock();
            state.unsent.put_back(writing);
        }
        match result.map_err(|error| error.kind()) {
            Ok(()) => {}
            Err(io::ErrorKind::WouldBlock) => state.is_full = true,
            // The task sees the end of the connection as well, after everything that has arrived.
            Err(_) => state.is_broken = true,
        }
        if state.is_broken {
            return;
        }
        if !state.unsent.is_empty() || self.socket.is_behind() {
            self.wake.notify_one();
        }
    }

    /// Ends the connection at once. Nothing more is read.
    pub(super) fn cut(&self) {
        self.socket.shut_down();
    }

    /// Waits until the wire has read once more, if something has arrived, and lapin has handled everything that is for
    /// it, or until the wire has ended. So it shows whether the broker says something. More may be unread.
    pub(super) async fn is_caught_up(&self) {
        let before = self.lock().reads;
        loop {
            let mut handled = std::pin::pin!(self.handled.notified());
            handled.as_mut().enable();
            let has_unread = self.socket.has_unread();
            {
                let state = self.lock();
                let has_read = state.reads > before || !has_unread;
                if state.ended.is_some()
                    || state.lapin_is_gone
                    || has_read && state.for_lapin.is_empty() && !state.lapin_is_busy
                {
                    return;
                }
            }
            handled.await;
        }
    }
}

/// What is known of each publication on a channel that has ended.
fn unfinished(unconfirmed: AwaitingConfirm<Flight>, left: u64) -> Vec<Unfinished> {
    let each = unconfirmed.into_rest();
    each.map(|Flight { handed, end, returned }| Unfinished { handed, has_left: end <= left, returned }).collect()
}

#[cfg(test)]
mod tests;
