//! What clients and servers count for metrics: how calls ended and how long they took, how many share a message, and what
//! became of the connection. Only with the cargo feature `metrics`.
//!
//! Counting takes no lock, except for an exemplar, which only a call with a trace has, and which is left out rather than
//! waited for.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::time::Instant;

use crate::error::EndOfCall;
use crate::state::State;

/// The times of the calls of a method, by how they ended. An end takes memory from the first call that has it.
#[derive(Debug)]
pub(crate) struct EndCounts([OnceLock<Box<CallTimes>>; EndOfCall::COUNT]);

impl Default for EndCounts {
    fn default() -> Self {
        Self(std::array::from_fn(|_| OnceLock::new()))
    }
}

impl EndCounts {
    /// Counts a call that has ended. `trace` is the id of its trace, if it has one.
    pub(crate) fn add(&self, end: EndOfCall, took: Duration, trace: Option<u128>) {
        self.0[end.place()].get_or_init(Box::default).add(took, trace);
    }

    /// How many calls have ended.
    pub(crate) fn count(&self) -> u64 {
        self.0.iter().filter_map(OnceLock::get).map(|times| times.count()).sum()
    }

    /// The ends that there were.
    pub(crate) fn told(&self) -> Vec<(EndOfCall, TimesTold)> {
        let all = EndOfCall::all().zip(&self.0);
        all.filter_map(|(end, times)| Some((end, times.get()?.told()))).collect()
    }
}

/// The upper bounds of the times of calls.
pub(crate) const BOUNDS: [Duration; 17] = [
    Duration::from_micros(100),
    Duration::from_micros(300),
    Duration::from_micros(600),
    Duration::from_millis(1),
    Duration::from_millis(2),
    Duration::from_millis(5),
    Duration::from_millis(10),
    Duration::from_millis(20),
    Duration::from_millis(50),
    Duration::from_millis(100),
    Duration::from_millis(200),
    Duration::from_millis(500),
    Duration::from_secs(1),
    Duration::from_secs(2),
    Duration::from_secs(5),
    Duration::from_secs(10),
    Duration::from_secs(30),
];

/// A call that stands for the others in its bucket: whoever looks at the bucket finds its trace.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct CallExemplar {
    pub(crate) trace: u128,
    pub(crate) took: Duration,
    pub(crate) at: SystemTime,
}

type Exemplars = [Mutex<Option<CallExemplar>>; BOUNDS.len() + 1];

/// How long something took: for example, the calls that have ended in one way.
#[derive(Debug, Default)]
pub(crate) struct CallTimes {
    nanos: AtomicU64,
    buckets: [AtomicU64; BOUNDS.len() + 1],
    /// The last call of each bucket that had a trace. Made for the first.
    exemplars: OnceLock<Box<Exemplars>>,
}

/// What a histogram of times has counted.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct TimesTold {
    /// Each bucket by itself, and last what is above all bounds.
    pub(crate) buckets: Vec<u64>,
    pub(crate) sum: Duration,
    /// One for each bucket.
    pub(crate) exemplars: Vec<Option<CallExemplar>>,
}

impl CallTimes {
    /// Counts a time. `trace` is the id of the trace that it belongs to, if there is one.
    pub(crate) fn add(&self, took: Duration, trace: Option<u128>) {
        let bucket = BOUNDS.partition_point(|bound| *bound < took);
        self.nanos.fetch_add(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
        self.buckets[bucket].fetch_add(1, Ordering::Relaxed);
        if let Some(trace) = trace {
            let exemplars = self.exemplars.get_or_init(Box::default);
            if let Ok(mut kept) = exemplars[bucket].try_lock() {
                *kept = Some(CallExemplar { trace, took, at: SystemTime::now() });
            }
        }
    }

    fn count(&self) -> u64 {
        self.buckets.iter().map(|bucket| bucket.load(Ordering::Relaxed)).sum()
    }

    pub(crate) fn told(&self) -> TimesTold {
        let exemplars = match self.exemplars.get() {
            Some(kept) => kept.iter().map(|kept| *kept.lock().unwrap_or_else(PoisonError::into_inner)).collect(),
            None => vec![None; self.buckets.len()],
        };
        TimesTold {
            buckets: self.buckets.iter().map(|bucket| bucket.load(Ordering::Relaxed)).collect(),
            sum: Duration::from_nanos(self.nanos.load(Ordering::Relaxed)),
            exemplars,
        }
    }
}

/// How many there were of something each time: of frames in a message, or of retries of a call.
#[derive(Debug, Default)]
pub(crate) struct Spread {
    sum: AtomicU64,
    buckets: [AtomicU64; Self::BOUNDS.len() + 1],
}

impl Spread {
    /// As many frames as share a message at most are the highest bound.
    pub(crate) const BOUNDS: [u64; 7] = [1, 2, 4, 8, 16, 32, 64];

    /// Counts a time at which there were so many.
    pub(crate) fn add(&self, count: usize) {
        let count = count as u64;
        self.sum.fetch_add(count, Ordering::Relaxed);
        self.buckets[Self::BOUNDS.partition_point(|bound| *bound < count)].fetch_add(1, Ordering::Relaxed);
    }

    /// The buckets, each by itself, and the sum of all.
    pub(crate) fn told(&self) -> (Vec<u64>, u64) {
        let buckets = self.buckets.iter().map(|bucket| bucket.load(Ordering::Relaxed)).collect();
        (buckets, self.sum.load(Ordering::Relaxed))
    }
}

/// What a client or a server counts of its connection.
#[derive(Debug, Default)]
pub(crate) struct LinkCounts {
    reconnects: AtomicU64,
    blocked: Mutex<BlockedTime>,
    pub(crate) sent: Spread,
    pub(crate) received: Spread,
}

/// For how long the broker has taken nothing.
#[derive(Debug, Default)]
struct BlockedTime {
    since: Option<Instant>,
    before: Duration,
}

impl BlockedTime {
    fn total(&self) -> Duration {
        self.before + self.since.map(|since| since.elapsed()).unwrap_or_default()
    }

    fn is_over(&mut self) {
        self.before = self.total();
        self.since = None;
    }
}

impl LinkCounts {
    /// The state changes.
    pub(crate) fn changes(&self, was: &State, new: &State) {
        let has_connection = new.missing().is_none();
        if has_connection && matches!(was, State::Reconnecting { .. }) {
            self.reconnects.fetch_add(1, Ordering::Relaxed);
        }
        let mut blocked = self.blocked();
        match new {
            State::Blocked { since, .. } => blocked.since = blocked.since.or(Some(*since)),
            _ => blocked.is_over(),
        }
    }

    /// The connection is lost.
    pub(crate) fn is_lost(&self) {
        self.blocked().is_over();
    }

    /// How often it has connected again.
    pub(crate) fn reconnects(&self) -> u64 {
        self.reconnects.load(Ordering::Relaxed)
    }

    /// For how long the broker has taken nothing, up to now.
    pub(crate) fn blocked_time(&self) -> Duration {
        self.blocked().total()
    }

    fn blocked(&self) -> MutexGuard<'_, BlockedTime> {
        self.blocked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Code;

    #[test]
    fn a_call_is_counted_below_the_first_bound_that_it_does_not_exceed() {
        let counts = EndCounts::default();
        let ok = EndOfCall::Coded(Code::Ok);
        for took in [Duration::ZERO, BOUNDS[0], BOUNDS[0] + Duration::from_nanos(1), Duration::from_secs(31)] {
            counts.add(ok, took, None);
        }
        counts.add(EndOfCall::Timeout, Duration::from_secs(1), Some(7));
        let told = counts.told();
        assert_eq!((told.len(), counts.count()), (2, 5));
        assert_eq!((told[0].0, &told[0].1.buckets[..2], told[0].1.buckets[17]), (ok, &[2, 1][..], 1));
        assert_eq!(told[0].1.sum, Duration::from_secs(31) + BOUNDS[0] * 2 + Duration::from_nanos(1));
        assert!(told[0].1.exemplars.iter().all(Option::is_none));
        let late = &told[1].1;
        let seen: Vec<_> = late.exemplars.iter().flatten().map(|seen| (seen.trace, seen.took)).collect();
        assert_eq!(seen, [(7, Duration::from_secs(1))]);
        assert!(late.exemplars[12].is_some(), "it stands at its bucket");
    }

    #[test]
    fn messages_are_counted_by_how_many_frames_they_hold() {
        let spread = Spread::default();
        [1, 1, 2, 3, 64, 65].into_iter().for_each(|frames| spread.add(frames));
        assert_eq!(spread.told(), (vec![2, 1, 1, 0, 0, 0, 1, 1], 136));
    }

    #[tokio::test(start_paused = true)]
    async fn the_time_without_room_at_the_broker_adds_up_and_ends_with_its_connection() {
        let (link, reason) = (LinkCounts::default(), || "low on memory".into());
        let blocked = || State::Blocked { reason: reason(), since: Instant::now() };
        let lost = || State::Reconnecting { attempt: 1, since: Instant::now(), reason: reason() };
        let second = Duration::from_secs(1);
        link.changes(&State::Ready, &blocked());
        tokio::time::advance(second).await;
        assert_eq!(link.blocked_time(), second, "up to now");
        link.changes(&blocked(), &State::Ready);
        tokio::time::advance(second).await;
        link.changes(&State::Ready, &blocked());
        tokio::time::advance(second).await;
        link.is_lost();
        tokio::time::advance(second).await;
        assert_eq!((link.blocked_time(), link.reconnects()), (second * 2, 0));
        link.changes(&lost(), &State::Ready);
        link.changes(&State::Ready, &State::Degraded { reason: reason(), since: Instant::now() });
        link.changes(&lost(), &State::Closed);
        assert_eq!(link.reconnects(), 1);
    }
}
