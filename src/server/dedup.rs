//! Calls of methods with `dedup`, by request id: which run, who else waits for them, and how they ended.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use uuid::Uuid;

use crate::clock::later;
use crate::codec::Codec;
use crate::frame::{Frame, Kind};
use crate::service::Answer;

/// How many answers an instance remembers of one service, and how many bytes of them; those that would be forgotten
/// first anyway make room.
const MAX_ANSWERS: usize = 65_536;
const MAX_BYTES: usize = 64 * 1024 * 1024;
/// What an answer takes besides its own bytes, roughly.
const OVERHEAD: usize = 256;
/// How many deliveries of one call wait for its answer.
const MAX_WAITING: usize = 1024;

/// A call is the same if all of this is: who knows an id does not get the answer of another method by it, and a request
/// not what a oneway call tells its operators.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key {
    id: Uuid,
    kind: Kind,
    method: Option<Arc<str>>,
    codec: Codec,
}

impl Key {
    fn of(frame: &Frame) -> Self {
        Self { id: frame.id, kind: frame.kind, method: frame.metadata.method.clone(), codec: frame.codec }
    }
}

/// What is known of a call that was delivered.
#[derive(Debug)]
pub(super) enum Known {
    /// It ended like this.
    Ended(Answer),
    /// It runs, and who asks is told when it ends.
    Runs,
    /// It runs, and too many wait for it already.
    Crowded,
}

/// The calls of one service; `W` is what a further delivery of one that runs leaves, to be told.
#[derive(Debug)]
pub(super) struct Dedup<W> {
    calls: HashMap<Key, Call<W>>,
    /// When those that ended are forgotten; the number tells apart what is forgotten at one time.
    forgettable: BTreeMap<(Instant, u64), Key>,
    next_number: u64,
    bytes: usize,
    repeated: u64,
}

#[derive(Debug)]
enum Call<W> {
    Runs(Vec<W>),
    Ended { answer: Answer, until: Instant },
}

impl<W> Default for Dedup<W> {
    fn default() -> Self {
        Self { calls: HashMap::new(), forgettable: BTreeMap::new(), next_number: 0, bytes: 0, repeated: 0 }
    }
}

impl<W> Dedup<W> {
    /// What is known of a call; `waiter` is left with one that runs.
    pub(super) fn recall(&mut self, frame: &Frame, waiter: impl FnOnce() -> W) -> Option<Known> {
        let known = match self.calls.get_mut(&Key::of(frame))? {
            Call::Ended { until, .. } if *until <= Instant::now() => return None,
            Call::Ended { answer, .. } => Known::Ended(answer.clone()),
            Call::Runs(waiting) if waiting.len() >= MAX_WAITING => return Some(Known::Crowded),
            Call::Runs(waiting) => {
                waiting.push(waiter());
                Known::Runs
            }
        };
        self.repeated += 1;
        Some(known)
    }

    /// Notes that a call of which nothing is known begins to run.
    pub(super) fn begin(&mut self, frame: &Frame) {
        self.forget_until(Instant::now());
        self.calls.insert(Key::of(frame), Call::Runs(Vec::new()));
    }

    /// Notes that a call does not run any more. Its `answer`, if it is to be remembered, is so for the time `window`.
    /// Gives out who waits for it.
    pub(super) fn end(&mut self, frame: &Frame, answer: Option<Answer>, window: Duration) -> Vec<W> {
        let key = Key::of(frame);
        let waiting = match self.calls.remove(&key) {
            Some(Call::Runs(waiting)) => waiting,
            Some(Call::Ended { .. }) | None => Vec::new(),
        };
        let now = Instant::now();
        if let Some(answer) = answer {
            let until = later(now, window);
            self.bytes += size(&answer);
            self.next_number += 1;
            self.forgettable.insert((until, self.next_number), key.clone());
            self.calls.insert(key, Call::Ended { answer, until });
        }
        self.forget_until(now);
        waiting
    }

    /// How many deliveries were answered without running the call again.
    pub(super) fn repeated(&self) -> u64 {
        self.repeated
    }

    /// Forgets what has had its time, and as much more as is over a bound.
    fn forget_until(&mut self, now: Instant) {
        loop {
            let over = self.bytes > MAX_BYTES || self.forgettable.len() > MAX_ANSWERS;
            let Some(first) = self.forgettable.first_entry() else { return };
            if !over && first.key().0 > now {
                return;
            }
            // It has not run again since: it would have been forgotten before.
            if let Some(Call::Ended { answer, .. }) = self.calls.remove(&first.remove()) {
                self.bytes -= size(&answer);
            }
        }
    }
}

fn size(answer: &Answer) -> usize {
    OVERHEAD
        + match answer {
            Answer::Result(payload) | Answer::ServiceError(payload) => payload.len(),
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

    /// Notes a call that ran and ended with so many bytes.
    fn ended(dedup: &mut Dedup<u32>, bytes: usize) -> Frame {
        let frame = call("add");
        dedup.begin(&frame);
        assert!(dedup.end(&frame, Some(Answer::Result(vec![0; bytes])), WINDOW).is_empty());
        frame
    }

    fn remembers(dedup: &mut Dedup<u32>, frame: &Frame) -> bool {
        matches!(dedup.recall(frame, || 0), Some(Known::Ended(Answer::Result(_))))
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_is_remembered_for_its_time() {
        let mut dedup = Dedup::default();
        let frame = ended(&mut dedup, 1);
        assert!(remembers(&mut dedup, &frame) && remembers(&mut dedup, &frame));
        assert_eq!(dedup.repeated(), 2);
        tokio::time::advance(WINDOW).await;
        assert!(!remembers(&mut dedup, &frame));
        dedup.begin(&frame);
        assert!(matches!(dedup.recall(&frame, || 0), Some(Known::Runs)));
    }

    #[tokio::test]
    async fn who_comes_while_it_runs_is_told_at_its_end() {
        let mut dedup = Dedup::default();
        let frame = call("add");
        assert!(dedup.recall(&frame, || 1).is_none());
        dedup.begin(&frame);
        assert!(matches!(dedup.recall(&frame, || 1), Some(Known::Runs)));
        assert!(matches!(dedup.recall(&frame, || 2), Some(Known::Runs)));
        assert_eq!(dedup.end(&frame, None, WINDOW), [1, 2]);
        assert!(dedup.recall(&frame, || 3).is_none(), "it had no answer to remember");
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
        dedup.begin(&frame);
        for _ in 0..MAX_WAITING {
            assert!(matches!(dedup.recall(&frame, || 0), Some(Known::Runs)));
        }
        assert!(matches!(dedup.recall(&frame, || 0), Some(Known::Crowded)));
    }
}
