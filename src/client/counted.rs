//! What a client counts of its calls, by method, for metrics.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::time::Instant;

use super::Client;
use super::request::Request;
use crate::counting::{EndCounts, EndOfCall, LinkCounts, MAX_METHODS, TimesTold};
use crate::error::{Code, Error};
use crate::frame::Trace;
use crate::middleware::Reply;

/// A service as `name.vMAJOR`, and a method.
type MethodName = (Arc<str>, Arc<str>);

/// What is counted of the calls of one method.
#[derive(Debug, Default)]
pub(crate) struct CalledMethod {
    ends: EndCounts,
    /// How many calls have begun. Those that have not ended are in flight.
    begun: AtomicU64,
    /// First attempts of calls, and others of calls that a middleware or a route tries again.
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
    pub(crate) attempts: [(&'static str, u64); 3],
    /// By reason.
    pub(crate) rejected: [(&'static str, u64); 1],
}

impl CalledMethod {
    /// Counts an attempt that is handed to the line. It is the first of its call if its number is 1.
    pub(super) fn attempts(&self, number: u32) {
        let counter = if number == 1 { &self.first } else { &self.retried };
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

    fn told(&self, name: Option<MethodName>) -> CalledMethodTold {
        let number = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        // In this order, so that no call has ended that has not begun.
        let ended = self.ends.count();
        CalledMethodTold {
            name,
            in_flight: number(&self.begun).saturating_sub(ended),
            ends: self.ends.told(),
            attempts: [
                ("first", number(&self.first)),
                ("retry", number(&self.retried)),
                ("resend", number(&self.resent)),
            ],
            rejected: [("in_flight", number(&self.crowded_out))],
        }
    }
}

/// The methods that a client has called. Their counters stay as long as the client, whatever it forgets of them.
#[derive(Debug, Default)]
pub(crate) struct CalledMethods {
    methods: Mutex<BTreeMap<MethodName, Arc<CalledMethod>>>,
    /// The methods that came when there were counters for many already.
    others: Arc<CalledMethod>,
}

impl CalledMethods {
    /// The counters of a method.
    pub(super) fn method(&self, service: &Arc<str>, method: &Arc<str>) -> Arc<CalledMethod> {
        let mut methods = self.methods.lock().unwrap_or_else(PoisonError::into_inner);
        let is_full = methods.len() >= MAX_METHODS;
        let key = (service.clone(), method.clone());
        match methods.get(&key) {
            Some(known) => known.clone(),
            None if is_full => self.others.clone(),
            None => methods.entry(key).or_default().clone(),
        }
    }

    pub(crate) fn told(&self) -> Vec<CalledMethodTold> {
        let methods = self.methods.lock().unwrap_or_else(PoisonError::into_inner);
        let named = methods.iter().map(|(name, method)| method.told(Some(name.clone())));
        named.chain([self.others.told(None)]).collect()
    }
}

/// What a client has counted, without the client: it does not keep the connection open.
#[derive(Debug, Clone)]
pub(crate) struct ClientCounts {
    pub(crate) methods: Arc<CalledMethods>,
    pub(crate) link: Arc<LinkCounts>,
}

impl Client {
    pub(crate) fn counts(&self) -> ClientCounts {
        ClientCounts { methods: self.0.targets.called(), link: self.0.line.link() }
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
        let method = request.target.as_ref().ok()?.counted.clone()?;
        method.begun.fetch_add(1, Ordering::Relaxed);
        let trace = request.context.as_ref().map(|context| context.trace().id());
        Some(Self { method, since: Instant::now(), trace, is_over: false })
    }

    /// Counts how it has ended. `trace` is what was sent with its last attempt, if that is known.
    pub(super) fn ends(mut self, outcome: &Result<Reply, Error>, trace: Option<Trace>) {
        let end = match outcome {
            Ok(reply) if reply.own_error => EndOfCall::ServiceError,
            Ok(_) => EndOfCall::Coded(Code::Ok),
            Err(error) => error.into(),
        };
        self.trace = trace.map(|trace| trace.id()).or(self.trace);
        self.counts(end);
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
        self.method.ends.add(end, self.since.elapsed(), self.trace);
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
    fn methods_over_the_limit_share_their_counters() {
        let methods = CalledMethods::default();
        let service = Arc::from("demo.v1");
        for number in 0..MAX_METHODS + 10 {
            methods.method(&service, &format!("m{number}").into()).attempts(1);
        }
        methods.method(&service, &"m7".into()).attempts(2);
        let told = methods.told();
        assert_eq!(told.len(), MAX_METHODS + 1);
        let others = told.last().expect("it is there");
        assert_eq!((&others.name, others.attempts[0].1), (&None, 10));
        let m7 = told.iter().find(|told| told.name.as_ref().is_some_and(|(_, method)| **method == *"m7"));
        assert_eq!(m7.expect("it was called").attempts.map(|(_, count)| count), [1, 1, 0]);
    }

    #[test]
    fn a_call_that_is_dropped_was_cancelled() {
        let method = Arc::<CalledMethod>::default();
        method.begun.fetch_add(2, Ordering::Relaxed);
        let call = MeasuredCall { method: method.clone(), since: Instant::now(), trace: None, is_over: false };
        drop(call);
        let told = method.told(None);
        assert_eq!((told.in_flight, told.ends.len(), told.ends[0].0), (1, 1, EndOfCall::Coded(Code::Cancelled)));
    }
}
