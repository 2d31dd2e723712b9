//! EventTurns: events that are ordered by a key wait for each other here. Those of one key have one line, and run one after the
//! other in the order of delivery; those of other keys run beside them.

use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Weak};

use futures::FutureExt as _;
use tokio::sync::{Mutex, OwnedMutexGuard};
use tokio_util::task::TaskTracker;

use super::message::{Message, Source};
use super::worker::Worker;
use crate::frame::Frame;

/// The turn of one event. The next one of its key has its turn when this is dropped.
pub(super) type Turn = OwnedMutexGuard<()>;

/// The lines of all keys of which an event waits or runs.
#[derive(Default)]
pub(super) struct EventTurns(HashMap<u64, Weak<Mutex<()>>>);

impl EventTurns {
    /// Enters the line of this key, behind all that have entered it before. The future ends when it is its turn.
    fn enter(&mut self, key: u64) -> impl Future<Output = Turn> + Send + use<> {
        if self.0.len() == self.0.capacity() {
            self.0.retain(|_, line| line.strong_count() > 0);
        }
        let line = self.0.get(&key).and_then(Weak::upgrade).unwrap_or_default();
        self.0.insert(key, Arc::downgrade(&line));
        // Whoever locks a mutex is in its line from when it is first polled.
        let mut turn = Box::pin(line.lock_owned());
        let at_once = (&mut turn).now_or_never();
        async move {
            match at_once {
                Some(turn) => turn,
                None => turn.await,
            }
        }
    }
}

impl Worker {
    /// Whether events are handled in the order of a key, and come from a queue that other instances read after this one.
    /// What is not settled stays so until the connection ends, which gives it back in order.
    pub(super) fn leaves_in_order(&self, source: Source) -> bool {
        self.service.order.is_some() && source == Source::Work
    }

    /// Decides about an event when it is its turn. `false`: it is not ordered.
    pub(super) fn takes_turns(self: &Arc<Self>, frame: &Frame, message: &Arc<Message>, tasks: &TaskTracker) -> bool {
        let Some(order) = &self.service.order else { return false };
        let payload = frame.plain_payload(self.site.max_size).ok();
        let Some(key) = payload.and_then(|payload| order(frame.codec, &payload)) else { return false };
        let turn = self.turns().enter(key);
        let (worker, frame, message) = (self.clone(), frame.clone(), message.clone());
        tasks.spawn(async move {
            let turn = turn.await;
            if worker.leaves_in_order(message.source) && worker.site.draining.is_cancelled() && !message.has_begun() {
                return;
            }
            message.begin();
            worker.take_again(frame, &message, Some(turn));
        });
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn those_of_one_key_have_their_turn_in_the_order_in_which_they_entered_and_those_of_others_at_once() {
        let mut turns = EventTurns::default();
        let first = turns.enter(1).await;
        let (second, other, third) = (turns.enter(1), turns.enter(2), turns.enter(1));
        let (mut second, mut third) = (Box::pin(second), Box::pin(third));
        drop(other.now_or_never().expect("nobody is before it"));
        assert!((&mut third).now_or_never().is_none() && (&mut second).now_or_never().is_none());
        drop(first);
        assert!((&mut third).now_or_never().is_none(), "it entered last");
        drop(second.await);
        drop(third.await);
        for key in 0..1000 {
            drop(turns.enter(key).await);
        }
        assert!(turns.0.len() < 500, "lines in which nobody is are forgotten: {}", turns.0.len());
    }
}
