//! The task of a wire: it reads the socket, hands over what has arrived, and writes what others could not.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::super::frames::{
    BLOCKED, CHANNEL_CLOSE, CHANNEL_CLOSED, CONNECTION_CLOSE, HEARTBEAT, Head, UNBLOCKED, is_known, is_whole, method,
};
use super::channel::{ChannelUse, Happened};
use super::incoming::Incoming;
use super::state::WireState;
use super::{FIRST_WORDS, Wire};

/// lapin is told as often that the broker is there, if it sends only what lapin does not see.
const SIGN_OF_LIFE: Duration = Duration::from_secs(1);

/// Reads until the socket ends or lapin needs it no more.
pub(super) async fn run(wire: Arc<Wire>, mut socket: super::SocketReader) {
    // When the runtime ends, this is dropped where it waits.
    let _end = End(wire.clone());
    let mut incoming = Incoming::default();
    let is_plain = socket.is_plain();
    let mut told = Instant::now();
    let error = loop {
        let is_full = {
            let state = wire.lock();
            if state.lapin_is_gone {
                break None;
            }
            state.may_write() && (!state.unsent.is_empty() || wire.socket.is_behind())
        };
        tokio::select! {
            is_open = incoming.fill(&mut socket) => {
                let handled = wire.handle(&mut incoming, is_plain, &mut told);
                match (is_open, handled) {
                    (Err(error), _) | (_, Err(error)) => break Some(error),
                    (Ok(false), _) => break None,
                    (Ok(true), Ok(())) => {}
                }
            }
            writable = wire.socket.writable(), if is_full => {
                if let Err(error) = writable {
                    break Some(error);
                }
                wire.flush_rest();
            }
            () = wire.wake.notified() => {}
        }
    };
    wire.end(error);
}

/// Ends the wire when the task is dropped.
struct End(Arc<Wire>);

impl Drop for End {
    fn drop(&mut self) {
        self.0.end(Some(io::Error::other("the runtime has ended")));
    }
}

impl Wire {
    /// Handles what has arrived, and leaves there what is not complete.
    ///
    /// # Errors
    /// What the other side sends is not AMQP.
    fn handle(&self, incoming: &mut Incoming, is_plain: bool, told: &mut Instant) -> io::Result<()> {
        if incoming.is_empty() {
            return Ok(());
        }
        self.first_words.get_or_init(|| incoming.read[..incoming.read.len().min(FIRST_WORDS)].to_vec());
        let mut happened = Vec::new();
        let result = {
            let mut guard = self.lock();
            let state = &mut *guard;
            let before = state.for_lapin.len();
            let result = self.take_frames(state, incoming, is_plain, &mut happened);
            let now = Instant::now();
            if state.for_lapin.len() > before {
                *told = now;
            } else if now.duration_since(*told) > SIGN_OF_LIFE {
                *told = now;
                state.pass_on(&HEARTBEAT);
            }
            state.reads += 1;
            result
        };
        self.handled.notify_waiters();
        for what in happened {
            match what {
                Happened::Delivered(sink, arrived) => sink(arrived),
                Happened::Confirmed(outcome, confirm) => outcome.tell(Ok(confirm)),
                Happened::Got(answer, arrived) => _ = answer.send(Ok(arrived)),
            }
        }
        result
    }

    /// Takes the whole frames out of what has arrived.
    fn take_frames(
        &self,
        state: &mut WireState,
        incoming: &mut Incoming,
        is_plain: bool,
        happened: &mut Vec<Happened>,
    ) -> io::Result<()> {
        if !incoming.go_on(state, happened)? {
            return Ok(());
        }
        let read = &mut incoming.read;
        while let Some(kind) = read.first() {
            if !is_known(*kind) {
                // lapin says what it is, as far as it knows.
                state.pass_on(&read.split());
                return Ok(());
            }
            let Some(head) = Head::of(read) else { return Ok(()) };
            state.check_size(head)?;
            if read.len() < head.size {
                if is_plain && let Some(channel) = state.channels.get_mut(&head.channel) {
                    incoming.begin_large(head, channel);
                }
                return Ok(());
            }
            let frame = read.split_to(head.size).freeze();
            if !is_whole(&frame) {
                return Err(broken("a frame without its end"));
            }
            let called = method(&frame).map(|(method, _)| method);
            match (state.channels.get_mut(&head.channel), called) {
                // The broker reads nothing more than the confirm of this.
                (_, Some(CONNECTION_CLOSE)) if head.channel == 0 => state.is_closing = true,
                (_, Some(BLOCKED)) if head.channel == 0 => state.is_blocked = true,
                (_, Some(UNBLOCKED)) if head.channel == 0 => {
                    state.is_blocked = false;
                    self.wake.notify_one();
                }
                (Some(channel), called) if channel.takes(head, called) => {
                    if channel.handle(&frame, happened).is_none() {
                        return Err(broken("a method without its arguments"));
                    }
                    continue;
                }
                (Some(_), Some(CHANNEL_CLOSE | CHANNEL_CLOSED)) => state.end_channel(head.channel, &frame),
                _ => {}
            }
            state.pass_on(&frame);
        }
        Ok(())
    }

    /// Writes what is left, after the socket was full.
    fn flush_rest(&self) {
        let mut state = self.lock();
        state.is_full = false;
        if state.may_write() && state.unsent.is_empty() {
            // With TLS, something that is encrypted may be left.
            let left = self.socket.write(&[]);
            state.is_broken |= left.is_err_and(|error| error.kind() != io::ErrorKind::WouldBlock);
        }
        self.flush(state);
    }

    /// Notes the end of the connection.
    fn end(&self, error: Option<io::Error>) {
        let mut state = self.lock();
        if state.ended.is_some() {
            return;
        }
        state.ended = Some(error);
        for channel in state.channels.values_mut() {
            match &mut channel.purpose {
                // The answers will not come. Whoever waits sees the end of the connection.
                ChannelUse::Get(answer) => drop(answer.take()),
                ChannelUse::Consume { .. } => {}
                // What is not confirmed stays, with its outcomes, for whoever publishes.
                ChannelUse::Publish { idle, .. } => idle.clear(),
            }
        }
        state.tell_closed();
        if let Some(lapin) = state.lapin.take() {
            lapin.wake();
        }
        drop(state);
        self.socket.shut_down();
        self.handled.notify_waiters();
    }
}

/// The other side does not keep to AMQP.
pub(super) fn broken(what: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the other side does not keep to AMQP: it has sent {what}"))
}
