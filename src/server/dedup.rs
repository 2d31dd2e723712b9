//! The memory behind [`Method::dedup`](crate::Method::dedup): for each call, whether it is running, which deliveries
//! wait for its answer, and how it ended.
//!
//! A call may come in several attempts: the caller retries it, or sends it twice to get the faster answer. Each attempt
//! has an id of its own and may be delivered more than once. All of them are the same call here.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use uuid::Uuid;

use crate::clock::later;
use crate::codec::Codec;
use crate::frame::{Frame, Kind};
use crate::service::Answer;

/// How many answers an instance remembers for one service. Beyond that, the oldest are forgotten early.
const MAX_ANSWERS: usize = 65_536;
/// How many bytes of answers an instance remembers for one service. Beyond that, the oldest are forgotten early.
const MAX_BYTES: usize = 64 * 1024 * 1024;
/// What an answer takes besides its own bytes, roughly, in bytes.
const OVERHEAD: usize = 256;
/// How many deliveries of one call may wait for its answer.
const MAX_WAITING: usize = 1024;

/// What makes two deliveries the same call. The user is part of it, as the broker verified it, and so is the method:
/// who learns the id of another user's call does not get its answer. The kind is part of it too, so that a request does
/// not get the answer to a oneway call, which is only for operators.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key {
    call_id: Uuid,
    user: Option<Arc<str>>,
    kind: Kind,
    method: Option<Arc<str>>,
    codec: Codec,
}

impl Key {
    fn of(frame: &Frame, user: Option<&Arc<str>>) -> Self {
        let method = frame.metadata.method.clone();
        Self { call_id: frame.call_id(), user: user.cloned(), kind: frame.kind, method, codec: frame.codec }
    }
}

/// What is known about a call that was delivered.
#[derive(Debug)]
pub(super) enum Known {
    /// It ended with this answer.
    Ended(Answer),
    /// It is running. The delivery gets its answer when it ends.
    Runs,
    /// It is running, and too many deliveries wait for it already.
    Crowded,
}

/// The calls of one service. `W` is what is kept of a delivery that waits for the answer.
#[derive(Debug)]
pub(super) struct Dedup<W> {
    calls: HashMap<Key, KnownCall<W>>,
    /// The calls that have ended, by the time when they are forgotten. The number distinguishes those with the same
    /// time.
    forgettable: BTreeMap<(Instant, u64), Key>,
    next_number: u64,
    bytes: usize,
}

#[derive(Debug)]
enum KnownCall<W> {
    Runs(Vec<W>),
    Ended {
        /// The attempt that ran.
        attempt: Uuid,
        answer: Answer,
        /// Its key in `forgettable`.
        until: (Instant, u64),
    },
}

impl<W> Default for Dedup<W> {
    fn default() -> Self {
        Self { calls: HashMap::new(), forgettable: BTreeMap::new(), next_number: 0, bytes: 0 }
    }
}

impl<W> Dedup<W> {
    /// What is known about a call of this user. If it is running, `waiter` is kept until it ends.
    pub(super) fn recall(
        &mut self,
        frame: &Frame,
        user: Option<&Arc<str>>,
        waiter: impl FnOnce() -> W,
    ) -> Option<Known> {
        match self.calls.get_mut(&Key::of(frame, user))? {
            KnownCall::Ended { until: (until, _), .. } if *until <= Instant::now() => None,
            // A fault answers the attempt that met it. Another attempt is made because of it, and runs.
            KnownCall::Ended { attempt, answer: Answer::Fault(_), .. } if *attempt != frame.id => None,
            KnownCall::Ended { answer, .. } => Some(Known::Ended(answer.clone())),
            KnownCall::Runs(waiting) if waiting.len() >= MAX_WAITING => Some(Known::Crowded),
            KnownCall::Runs(waiting) => {
                waiting.push(waiter());
                Some(Known::Runs)
            }
        }
    }

    /// Notes that a call begins to run. Nothing was known about it, or it ended with a fault.
    pub(super) fn begin(&mut self, frame: &Frame, user: Option<&Arc<str>>) {
        self.forget_until(Instant::now());
        // It may have ended by a fault before.
        if let Some(KnownCall::Ended { answer, until, .. }) =
            self.calls.insert(Key::of(frame, user), KnownCall::Runs(Vec::new()))
        {
            self.bytes -= size(&answer);
            self.forgettable.remove(&until);
        }
    }

    /// Notes that a call has stopped running. If there is an `answer` to remember, it is remembered for the time
    /// `window`. Returns the deliveries that wait for the answer.
    pub(super) fn end(
        &mut self,
        frame: &Frame,
        user: Option<&Arc<str>>,
        answer: Option<Answer>,
        window: Duration,
    ) -> Vec<W> {
        let key = Key::of(frame, user);
        let waiting = match self.calls.remove(&key) {
            Some(KnownCall::Runs(waiting)) => waiting,
            Some(KnownCall::Ended { .. }) | None => Vec::new(),
        };
        let now = Instant::now();
        if let Some(answer) = answer {
            self.bytes += size(&answer);
            self.next_number += 1;
            let until = (later(now, window), self.next_number);
            self.forgettable.insert(until, key.clone());
            self.calls.insert(key, KnownCall::Ended { attempt: frame.id, answer, until });
        }
        self.forget_until(now);
        waiting
    }

    /// Forgets the answers whose time is over, and further ones while there are too many.
    fn forget_until(&mut self, now: Instant) {
        loop {
            let over = self.bytes > MAX_BYTES || self.forgettable.len() > MAX_ANSWERS;
            let Some(first) = self.forgettable.first_entry() else { return };
            if !over && first.key().0 > now {
                return;
            }
            // It has not begun to run again: that would have removed it from here.
            if let Some(KnownCall::Ended { answer, .. }) = self.calls.remove(&first.remove()) {
                self.bytes -= size(&answer);
            }
        }
    }
}

/// How many bytes an answer takes, roughly.
fn size(answer: &Answer) -> usize {
    OVERHEAD
        + match answer {
            Answer::Result(payload) | Answer::ServiceError(payload) => payload.payload().len(),
            Answer::Fault(fault) => fault.message.len(),
        }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::frame::Metadata;

    const WINDOW: Duration = Duration::from_secs(60);

    fn call(method: &str) -> Frame {
        let metadata = Metadata { method: Some(method.into()), ..Metadata::default() };
        Frame::new(Kind::Request, Uuid::new_v4(), Codec::Json, metadata, Bytes::new())
    }

    /// Another attempt of a call.
    fn retried(first: &Frame) -> Frame {
        let mut frame = Frame { id: Uuid::new_v4(), ..first.clone() };
        frame.metadata.more_mut().call_id = Some(first.call_id());
        frame
    }

    /// Notes a call that ran and ended with so many bytes.
    fn ended(dedup: &mut Dedup<u32>, bytes: usize) -> Frame {
        let frame = call("add");
        dedup.begin(&frame, None);
        assert!(dedup.end(&frame, None, Some(Answer::Result(vec![0; bytes].into())), WINDOW).is_empty());
        frame
    }

    fn recall(dedup: &mut Dedup<u32>, frame: &Frame, waiter: u32) -> Option<Known> {
        dedup.recall(frame, None, || waiter)
    }

    fn remembers(dedup: &mut Dedup<u32>, frame: &Frame) -> bool {
        matches!(recall(dedup, frame, 0), Some(Known::Ended(Answer::Result(_))))
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_is_remembered_for_its_time() {
        let mut dedup = Dedup::default();
        let frame = ended(&mut dedup, 1);
        assert!(remembers(&mut dedup, &frame) && remembers(&mut dedup, &frame));
        tokio::time::advance(WINDOW).await;
        assert!(!remembers(&mut dedup, &frame));
        dedup.begin(&frame, None);
        assert!(matches!(recall(&mut dedup, &frame, 0), Some(Known::Runs)));
    }

    #[tokio::test]
    async fn who_comes_while_it_runs_is_told_at_its_end() {
        let mut dedup = Dedup::default();
        let frame = call("add");
        assert!(recall(&mut dedup, &frame, 1).is_none());
        dedup.begin(&frame, None);
        assert!(matches!(recall(&mut dedup, &frame, 1), Some(Known::Runs)));
        assert!(matches!(recall(&mut dedup, &retried(&frame), 2), Some(Known::Runs)));
        assert_eq!(dedup.end(&frame, None, None, WINDOW), [1, 2]);
        assert!(recall(&mut dedup, &frame, 3).is_none(), "it had no answer to remember");
    }

    #[tokio::test]
    async fn another_attempt_gets_what_the_call_came_to_and_no_fault() {
        let mut dedup = Dedup::default();
        let frame = call("add");
        let fault = || Answer::Fault(crate::Fault::new(crate::Code::Unavailable, "not now"));
        dedup.begin(&frame, None);
        dedup.end(&frame, None, Some(fault()), WINDOW);
        let again = retried(&frame);
        assert!(matches!(recall(&mut dedup, &frame, 0), Some(Known::Ended(Answer::Fault(_)))));
        assert!(recall(&mut dedup, &again, 0).is_none(), "it is made because of the fault");
        dedup.begin(&again, None);
        dedup.end(&again, None, Some(Answer::ServiceError(vec![1].into())), WINDOW);
        for attempt in [&frame, &again, &retried(&again)] {
            assert!(matches!(recall(&mut dedup, attempt, 0), Some(Known::Ended(Answer::ServiceError(_)))));
        }
        assert_eq!((dedup.calls.len(), dedup.forgettable.len(), dedup.bytes), (1, 1, OVERHEAD + 1));
    }

    #[tokio::test]
    async fn another_user_does_not_get_the_answer() {
        let mut dedup = Dedup::default();
        let (alice, bob): (Arc<str>, Arc<str>) = ("alice".into(), "bob".into());
        let frame = call("add");
        dedup.begin(&frame, Some(&alice));
        dedup.end(&frame, Some(&alice), Some(Answer::Result(vec![1].into())), WINDOW);
        for user in [None, Some(&bob)] {
            assert!(dedup.recall(&frame, user, || 0).is_none());
        }
        assert!(matches!(dedup.recall(&frame, Some(&alice), || 0), Some(Known::Ended(_))));
    }

    #[tokio::test]
    async fn another_method_serialization_or_kind_is_another_call() {
        let mut dedup = Dedup::default();
        let frame = ended(&mut dedup, 1);
        let other = Frame { id: frame.id, ..call("remove") };
        assert!(!remembers(&mut dedup, &other));
        assert!(!remembers(&mut dedup, &Frame { codec: Codec::Cbor, ..frame.clone() }));
        assert!(!remembers(&mut dedup, &Frame { kind: Kind::Oneway, ..frame.clone() }));
        assert!(remembers(&mut dedup, &frame));
    }

    #[tokio::test]
    async fn the_oldest_answers_make_room_when_there_are_too_many_or_too_large_ones() {
        let mut dedup = Dedup::default();
        let oldest = ended(&mut dedup, 1);
        let next = ended(&mut dedup, 1);
        let large: Vec<_> = (0..4).map(|_| ended(&mut dedup, MAX_BYTES / 4 - OVERHEAD)).collect();
        assert!(!remembers(&mut dedup, &oldest) && !remembers(&mut dedup, &next));
        assert!(large.iter().all(|frame| remembers(&mut dedup, frame)));
        for _ in 0..MAX_ANSWERS {
            ended(&mut dedup, 1);
        }
        assert!(large.iter().all(|frame| !remembers(&mut dedup, frame)));
        assert_eq!((dedup.calls.len(), dedup.forgettable.len()), (MAX_ANSWERS, MAX_ANSWERS));
        assert_eq!(dedup.bytes, MAX_ANSWERS * (OVERHEAD + 1));
    }

    #[tokio::test]
    async fn too_many_do_not_wait_for_one_call() {
        let mut dedup = Dedup::default();
        let frame = call("add");
        dedup.begin(&frame, None);
        for _ in 0..MAX_WAITING {
            assert!(matches!(recall(&mut dedup, &frame, 0), Some(Known::Runs)));
        }
        assert!(matches!(recall(&mut dedup, &frame, 0), Some(Known::Crowded)));
    }
}
