//! Claims: what an instance knows of calls that the broker delivers again.
//!
//! The broker redelivers a message when the channel or the connection ends over which it was delivered. The instance
//! that has it may still be alive and run it. So the instances ask each other, in `locate.rs`. A call that has ended after
//! its delivery was lost is remembered here, and does not run again.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::Instant;
use uuid::Uuid;

use super::message::{Message, MessageEnd, Source};
use crate::frame::Frame;

/// How many oneway calls an instance remembers that ended after their delivery was lost.
const MAX_REMEMBERED: usize = 65_536;
/// How long it remembers them.
const MEMORY: Duration = Duration::from_secs(3600);

/// What is heard of a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Heard {
    /// This instance runs it.
    Runs(Arc<str>),
    /// An instance is done with it.
    Ended(MessageEnd),
    /// It has failed, and is to be tried again.
    Failed,
}

/// What one instance knows of the calls of a service that were delivered more than once.
#[derive(Debug, Default)]
pub(super) struct Claims {
    /// Who waits on this instance to hear of a call.
    listeners: HashMap<Uuid, Vec<mpsc::UnboundedSender<Heard>>>,
    /// Oneway calls whose handlers have ended, but whose outcome is still on its way to the broker: a dead letter, or a
    /// copy for another attempt. Until it has arrived, they count as running.
    ending: HashSet<Uuid>,
    /// The queues of other instances that want to hear how a call ends that runs here.
    wanted: HashMap<Uuid, HashSet<Arc<str>>>,
    /// Oneway calls that are done here although their delivery was lost.
    done: HashMap<Uuid, MessageEnd>,
    /// When each of `done` may be forgotten.
    forgettable: VecDeque<(Instant, Uuid)>,
    /// Messages with several oneway calls. Some of these may be done while others still run.
    shared: Vec<Weak<Message>>,
}

impl Claims {
    /// From now on, what is heard of a call is sent to the receiver.
    pub(super) fn listen(&mut self, id: Uuid) -> mpsc::UnboundedReceiver<Heard> {
        let (listener, heard) = mpsc::unbounded_channel();
        self.listeners.entry(id).or_default().push(listener);
        heard
    }

    /// Removes listeners that have gone.
    pub(super) fn forget(&mut self, id: Uuid) {
        if let Some(listeners) = self.listeners.get_mut(&id) {
            listeners.retain(|listener| !listener.is_closed());
            if listeners.is_empty() {
                self.listeners.remove(&id);
            }
        }
    }

    /// Passes on what is heard of a call.
    pub(super) fn hear(&self, id: Uuid, heard: &Heard) {
        for listener in self.listeners.get(&id).into_iter().flatten() {
            // An error means that the listener has gone.
            let _ = listener.send(heard.clone());
        }
    }

    /// Notes a message with several oneway calls.
    pub(super) fn share(&mut self, message: &Arc<Message>) {
        if self.shared.len() == self.shared.capacity() {
            self.shared.retain(|message| message.strong_count() > 0);
        }
        self.shared.push(Arc::downgrade(message));
    }

    /// Another instance asks about a call; it wants the answer at `queue`. `source` is the queue that the call came
    /// from if it runs here. Returns the answer, if there is one.
    pub(super) fn asked(&mut self, id: Uuid, queue: Arc<str>, source: Option<Source>) -> Option<Heard> {
        if let Some(source) = source {
            // Nobody is told how other calls end.
            if source == Source::Work {
                self.wanted.entry(id).or_default().insert(queue);
            }
            return Some(Heard::Runs(Arc::default()));
        }
        self.end_of(id).map(Heard::Ended)
    }

    /// How a oneway call has ended here, whatever happened to its delivery.
    fn end_of(&self, id: Uuid) -> Option<MessageEnd> {
        let shared = self.shared.iter().filter_map(Weak::upgrade);
        let in_shared = shared.filter_map(|message| message.done().iter().find(|done| done.0 == id).map(|done| done.1));
        self.done.get(&id).copied().into_iter().chain(in_shared).max()
    }

    /// Whether another delivery of a oneway call must not run, since the call is done here. `frames` is the number of
    /// frames in its message.
    pub(super) fn is_done(&self, frame: &Frame, frames: usize) -> bool {
        self.end_of(frame.id).is_some_and(|end| end.ends(frame, frames))
    }

    /// The handler of a oneway call has ended.
    pub(super) fn ends(&mut self, id: Uuid) {
        self.ending.insert(id);
    }

    /// Whether another instance is known to have a delivery of a oneway call.
    pub(super) fn is_held(&self, id: Uuid) -> bool {
        self.listeners.contains_key(&id) || self.wanted.contains_key(&id)
    }

    /// A oneway call has ended. `lost` tells whether its delivery was lost in the meantime. Returns the queues of the
    /// instances that want to hear of it.
    pub(super) fn end(&mut self, id: Uuid, heard: &Heard, lost: bool) -> HashSet<Arc<str>> {
        self.ending.remove(&id);
        self.hear(id, heard);
        if let Heard::Ended(end) = heard
            && lost
        {
            self.remember(id, *end);
        }
        self.wanted.remove(&id).unwrap_or_default()
    }

    /// Whether the outcome of a oneway call is still on its way to the broker.
    pub(super) fn is_ending(&self, id: Uuid) -> bool {
        self.ending.contains(&id)
    }

    /// Whether no outcome is on its way, and nobody wants to hear of one.
    #[cfg(test)]
    pub(super) fn are_quiet(&self) -> bool {
        self.ending.is_empty() && self.wanted.is_empty()
    }

    /// Remembers how a call has ended.
    pub(super) fn remember(&mut self, id: Uuid, end: MessageEnd) {
        let now = Instant::now();
        while let Some(&(until, oldest)) = self.forgettable.front()
            && (until <= now || self.forgettable.len() >= MAX_REMEMBERED)
        {
            self.forgettable.pop_front();
            self.done.remove(&oldest);
        }
        match self.done.entry(id) {
            Entry::Vacant(new) => {
                new.insert(end);
                self.forgettable.push_back((now + MEMORY, id));
            }
            Entry::Occupied(mut known) => *known.get_mut() = end.max(*known.get()),
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::codec::Codec;
    use crate::frame::{Kind, Metadata};

    #[tokio::test(start_paused = true)]
    async fn who_asks_for_a_call_that_runs_hears_of_its_end_and_later_only_if_its_delivery_was_lost() {
        let mut claims = Claims::default();
        let (id, other) = (Uuid::new_v4(), Uuid::new_v4());
        let queue: Arc<str> = "asker".into();
        assert_eq!(claims.asked(id, queue.clone(), None), None);
        assert_eq!(claims.asked(id, queue.clone(), Some(Source::Work)), Some(Heard::Runs("".into())));
        let mut heard = claims.listen(id);
        let over = Heard::Ended(MessageEnd::Over);
        assert!(claims.is_held(id) && !claims.is_held(other));
        assert_eq!(claims.end(id, &over, true), HashSet::from([queue.clone()]));
        assert_eq!(heard.recv().await.as_ref(), Some(&over));
        assert_eq!(claims.asked(id, queue.clone(), None).as_ref(), Some(&over));
        assert_eq!(claims.end(other, &over, false), HashSet::new());
        assert_eq!(claims.asked(other, queue.clone(), None), None);
        tokio::time::advance(MEMORY).await;
        claims.end(other, &Heard::Failed, true);
        claims.end(other, &over, true);
        assert_eq!(claims.asked(id, queue, None), None, "it has had its time");
    }

    #[test]
    fn of_a_call_that_was_moved_only_what_is_not_the_copy_is_done_with_until_it_is_over() {
        let mut claims = Claims::default();
        let first = Frame::new(Kind::Oneway, Uuid::new_v4(), Codec::Cbor, Metadata::default(), Bytes::new());
        let mut second = first.clone();
        second.metadata.more_mut().attempt = Some(2);
        claims.remember(first.id, MessageEnd::Moved(1));
        assert!(claims.is_done(&first, 2) && !claims.is_done(&first, 1));
        claims.remember(first.id, MessageEnd::Moved(2));
        claims.remember(first.id, MessageEnd::Moved(1));
        assert!(claims.is_done(&first, 1) && !claims.is_done(&second, 1));
        assert_eq!(claims.asked(first.id, "asker".into(), None), Some(Heard::Ended(MessageEnd::Moved(2))));
        claims.remember(first.id, MessageEnd::Over);
        claims.remember(first.id, MessageEnd::Moved(3));
        assert!(claims.is_done(&second, 1));
    }

    #[test]
    fn listeners_that_have_gone_leave_nothing_behind() {
        let mut claims = Claims::default();
        let id = Uuid::new_v4();
        let (gone, stays) = (claims.listen(id), claims.listen(id));
        drop(gone);
        claims.forget(id);
        assert_eq!(claims.listeners[&id].len(), 1);
        drop(stays);
        claims.forget(id);
        assert!(claims.listeners.is_empty());
    }
}
