//! What a client counts of its calls, by method, for metrics.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use tokio::time::Instant;

use super::Client;
use super::called::{CalledMethod, CalledMethods, MethodName};
use super::request::Request;
use crate::counting::{EndCounts, LinkCounts, TimesTold};
use crate::error::{Code, EndOfCall, Error};
use crate::frame::Trace;
use crate::middleware::{Breaker, Breakers, Reply};

/// What is counted of the calls of one method.
#[derive(Debug, Default)]
pub(super) struct MethodCounts {
    ends: EndCounts,
    /// How many calls have begun. Those that have not ended are in flight.
    begun: AtomicU64,
    /// First attempts of calls, and others of calls that a policy, a middleware or a route tries again.
    first: AtomicU64,
    retried: AtomicU64,
    /// Attempts that were sent once more, since their connection was lost.
    resent: AtomicU64,
    /// Calls over the limit of those in flight.
    crowded_out: AtomicU64,
}

/// What was counted of a method, or of all those that have no counters of their own.
#[derive(Debug)]
pub(crate) struct CalledMethodTold {
    /// `None` for those that have no counters of their own.
    pub(crate) name: Option<MethodName>,
    pub(crate) ends: Vec<(EndOfCall, TimesTold)>,
    pub(crate) in_flight: u64,
    /// By kind.
    pub(crate) attempts: [(&'static str, u64); 5],
    /// By reason.
    pub(crate) rejected: [(&'static str, u64); 4],
    /// By what the cache had.
    pub(crate) cache: [(&'static str, u64); 4],
    /// By what else policies have done.
    pub(crate) policies: [(&'static str, u64); 5],
    /// Each as buckets, and their sum.
    pub(crate) retries: (Vec<u64>, u64),
    pub(crate) hedges: (Vec<u64>, u64),
    pub(crate) retry_delay: TimesTold,
}

impl MethodCounts {
    /// Counts an attempt that is handed to the line: the first of its call, or one after a failure.
    pub(super) fn attempts(&self, is_first: bool) {
        let counter = if is_first { &self.first } else { &self.retried };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts an attempt that leaves once more.
    pub(super) fn leaves_again(&self) {
        self.resent.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a call over the limit of those in flight.
    pub(super) fn is_crowded_out(&self) {
        self.crowded_out.fetch_add(1, Ordering::Relaxed);
    }
}

impl CalledMethod {
    pub(super) fn told(&self, name: Option<MethodName>) -> CalledMethodTold {
        let Self { counts, policies } = self;
        let number = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        // In this order, so that no call has ended that has not begun.
        let ended = counts.ends.count();
        let (of_calls, done) = (&policies.of_calls, policies.now());
        CalledMethodTold {
            name,
            in_flight: number(&counts.begun).saturating_sub(ended),
            ends: counts.ends.told(),
            attempts: [
                ("first", number(&counts.first)),
                ("retry", number(&counts.retried)),
                ("resend", number(&counts.resent)),
                ("hedge", done.hedges),
                ("fork", done.forks),
            ],
            rejected: [
                ("in_flight", number(&counts.crowded_out)),
                ("budget", done.refused_by_budget),
                ("circuit", done.refused_by_breaker),
                ("rate", done.refused_by_rate),
            ],
            cache: [
                ("hit", done.cache_hits),
                ("miss", done.cache_misses),
                ("shared", done.cache_shared),
                ("stale", done.cache_stale),
            ],
            policies: [
                ("breaker_opened", done.opened),
                ("failed_back", done.failed_back),
                ("hedge_won", done.hedges_won),
                ("value_for_error", done.values_for_errors),
                ("waited_for_rate", done.waited_for_rate),
            ],
            retries: of_calls.retries.told(),
            hedges: of_calls.hedges.told(),
            retry_delay: of_calls.retry_delay.told(),
        }
    }
}

/// What a client has counted, without the client: it does not keep the connection open.
#[derive(Debug, Clone)]
pub(crate) struct ClientCounts {
    pub(crate) methods: Arc<CalledMethods>,
    pub(crate) link: Arc<LinkCounts>,
    breakers: Weak<Breakers>,
}

impl ClientCounts {
    /// The breakers that there are, as long as the client is there.
    pub(crate) fn breakers(&self) -> Vec<Breaker> {
        self.breakers.upgrade().map(|breakers| breakers.all()).unwrap_or_default()
    }
}

impl Client {
    pub(crate) fn counts(&self) -> ClientCounts {
        let breakers = self.0.policies.breakers.as_ref().map(Arc::downgrade).unwrap_or_default();
        ClientCounts { methods: self.0.targets.called(), link: self.0.line.link(), breakers }
    }
}

/// A call that has begun, and is counted when it ends. If it is dropped before that, its caller has given up.
#[derive(Debug)]
pub(super) struct MeasuredCall {
    method: Arc<CalledMethod>,
    since: Instant,
    /// The trace of the handler that makes the call.
    trace: Option<u128>,
    is_over: bool,
}

impl MeasuredCall {
    /// Counts a call that begins. `None` for a question of discovery, and for a method whose name is wrong.
    pub(super) fn begins<P>(request: &Request<P>) -> Option<Self> {
        let target = request.target.as_ref().ok().filter(|target| !target.is_question())?;
        let method = target.counted.clone();
        method.counts.begun.fetch_add(1, Ordering::Relaxed);
        let trace = request.context.as_ref().map(|context| context.trace().id());
        Some(Self { method, since: Instant::now(), trace, is_over: false })
    }

    /// Counts how it has ended. `trace` is what was sent with its last attempt, if that is known.
    pub(super) fn ends(mut self, outcome: &Result<Reply, Error>, trace: Option<Trace>) {
        self.trace = trace.map(|trace| trace.id()).or(self.trace);
        self.counts(outcome.into());
    }

    /// Counts a call that has failed before it was sent. Returns its error.
    pub(super) fn has_not_begun(mut self, error: Error) -> Error {
        self.counts((&error).into());
        error
    }

    /// Counts a oneway call, which ends when the broker has it.
    pub(super) fn sends(mut self, outcome: &Result<(), Error>) {
        self.counts(outcome.as_ref().map_or_else(EndOfCall::from, |()| EndOfCall::Coded(Code::Ok)));
    }

    fn counts(&mut self, end: EndOfCall) {
        self.is_over = true;
        self.method.counts.ends.add(end, self.since.elapsed(), self.trace);
    }
}

impl Drop for MeasuredCall {
    fn drop(&mut self) {
        if !self.is_over {
            self.counts(EndOfCall::Coded(Code::Cancelled));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_that_is_dropped_was_cancelled() {
        let method = Arc::<CalledMethod>::default();
        method.counts.begun.fetch_add(2, Ordering::Relaxed);
        let call = MeasuredCall { method: method.clone(), since: Instant::now(), trace: None, is_over: false };
        drop(call);
        let told = method.told(None);
        assert_eq!((told.in_flight, told.ends.len(), told.ends[0].0), (1, 1, EndOfCall::Coded(Code::Cancelled)));
    }
}
