//! Where handlers run, and what becomes of calls for which there is no room.

/// How many threads a pool has at most.
const MAX_THREADS: usize = 1_024;

/// Where handlers run. [`Service::dispatch`](crate::Service::dispatch) sets it for a service, and
/// [`Method::dispatch`](crate::Method::dispatch) for a method.
///
/// ```
/// use hopline::{Context, Dispatch, Fault, Method, QueueFull, Service};
///
/// let hash = |_: Context, (text,): (String,)| async move { Ok::<_, Fault>(text.len()) };
/// // Its handlers keep a processor busy: they get two threads of their own.
/// let service = Service::new("hashes", 1).dispatch(Dispatch::Pool(2)).method("hash", hash);
/// // This method gets one of its own. 100 calls of it may wait for that; more are refused.
/// let pool = Dispatch::BoundedPool { threads: 1, queue: 100, when_full: QueueFull::Refuse };
/// let service = service.method(Method::new("hash-file").dispatch(pool).concurrency(1), hash);
/// # let _ = service;
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Dispatch {
    /// On the task that reads the queue, one after the other. For handlers that take a few microseconds.
    Inline,
    /// On one task each, as soon as the handler waits for something. Until then the handlers of calls that came in one
    /// message run one after the other, which is fast. A handler must not block: it would hold up other calls, and the
    /// messages that tell callers that their calls are still running.
    #[default]
    Spawn,
    /// On one of tokio's blocking threads each. For handlers that block.
    Blocking,
    /// On a runtime of its own with this many threads, at least 1 and at most 1 024. Other services, or the other methods of the service,
    /// are not held up. How many calls run there at once says `concurrency`: a thread has several if they wait for
    /// something.
    Pool(usize),
    /// As [`Pool`](Self::Pool), with a bounded queue in front of it: calls that find all places taken wait in the
    /// instance.
    BoundedPool {
        /// How many threads there are, at least 1 and at most 1 024.
        threads: usize,
        /// How many calls wait for a place, beside those that run.
        queue: usize,
        /// What becomes of a call that finds the queue full.
        when_full: QueueFull,
    },
}

impl Dispatch {
    /// How many threads of its own it has, if any.
    pub(crate) fn threads(self) -> Option<usize> {
        match self {
            Self::Pool(threads) | Self::BoundedPool { threads, .. } => Some(threads.clamp(1, MAX_THREADS)),
            Self::Inline | Self::Spawn | Self::Blocking => None,
        }
    }

    /// How many calls wait in front of the pool, and what becomes of others, if that is bounded.
    pub(crate) fn queue(self) -> Option<(usize, QueueFull)> {
        match self {
            Self::BoundedPool { queue, when_full, .. } => Some((queue, when_full)),
            Self::Inline | Self::Spawn | Self::Blocking | Self::Pool(_) => None,
        }
    }
}

/// What becomes of a call that finds the queue in front of a [`Dispatch::BoundedPool`] full.
///
/// It is about calls with an answer. Oneway calls wait in the instance until there is a place, however many the broker
/// delivers.
///
/// ```
/// use hopline::{Dispatch, QueueFull};
///
/// let patient = Dispatch::BoundedPool { threads: 4, queue: 100, when_full: QueueFull::CallerRuns };
/// assert_ne!(patient, Dispatch::Pool(4));
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum QueueFull {
    /// It runs on the task that reads the queue, beside the places. Until it has ended, nothing more is read, and further
    /// calls of the service wait at the broker, for any instance. The handler must not block its thread.
    /// [`MethodStats::caller_runs`](crate::MethodStats::caller_runs) counts such calls. A call to this one instance, or to
    /// all, waits for a place instead: behind it there may be a cancel.
    CallerRuns,
    /// It is answered with `RESOURCE_EXHAUSTED` and a [`retry_after`](crate::Fault::retry_after) of 100 ms. It has not run.
    /// [`MethodStats::refused`](crate::MethodStats::refused) counts it.
    Refuse,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pool_has_threads_and_not_too_many() {
        let bounded = |threads| Dispatch::BoundedPool { threads, queue: 0, when_full: QueueFull::Refuse };
        for (given, threads) in [(0, 1), (2, 2), (usize::MAX, MAX_THREADS)] {
            assert_eq!((Dispatch::Pool(given).threads(), bounded(given).threads()), (Some(threads), Some(threads)));
        }
    }
}
