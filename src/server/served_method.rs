//! A method as a server serves it: its declaration, its handler, and its statistics.

use std::array;
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::bulkhead::Bulkhead;
use crate::clock::unix_millis;
#[cfg(feature = "metrics")]
use crate::counting::{CallTimes, EndCounts};
use crate::document::{Histogram, LastFault, MethodStats};
use crate::error::{Code, Fault, RefusedBy};
use crate::headers::cut;
use crate::pace::Pace;
use crate::service::{Answer, Handler, Method};

/// How much is kept of what the last fault says, in bytes.
const MAX_TOLD: usize = 256;

/// All that a worker needs to run a call of a method. It looks this up once for each frame.
pub(super) struct ServedMethod {
    pub(super) method: Method,
    pub(super) handler: Handler,
    /// `None`: its calls run where those of the service do, in the same places.
    pub(super) bulkhead: Option<Bulkhead>,
    /// How long its oneway calls take. Nobody replies to these, so their senders cannot measure it.
    pub(super) pace: Pace,
    /// Its statistics since the server started.
    pub(super) counts: Counts,
    /// How long its calls took from their delivery to their end.
    #[cfg(feature = "metrics")]
    pub(super) ends: EndCounts,
    /// How long its calls waited, by the clock of this machine.
    #[cfg(feature = "metrics")]
    pub(super) waits: CallTimes,
}

impl ServedMethod {
    pub(super) fn new(method: Method, handler: Handler, bulkhead: Option<Bulkhead>) -> Self {
        Self {
            method,
            handler,
            bulkhead,
            pace: Pace::default(),
            counts: Counts::default(),
            #[cfg(feature = "metrics")]
            ends: EndCounts::default(),
            #[cfg(feature = "metrics")]
            waits: CallTimes::default(),
        }
    }

    /// Its statistics as they are now, for the document that clients ask for.
    pub(super) fn stats(&self) -> MethodStats {
        MethodStats { name: self.method.name.clone(), ..self.counts.told() }
    }
}

/// How a handler's run ended. Each finished call is counted under one of these.
#[derive(Debug, Clone, Copy)]
pub(super) enum RunEnd<'a> {
    /// With a result of so many bytes.
    Result(usize),
    /// With the method's own error, of so many bytes.
    ServiceError(usize),
    Fault(&'a Fault),
    /// The handler was stopped because its caller gave up.
    Cancelled,
}

impl<'a> RunEnd<'a> {
    /// The end of a run whose handler was not stopped: its answer tells.
    pub(super) fn of(answer: &'a Answer) -> Self {
        match answer {
            Answer::Result(body) => Self::Result(body.payload().len()),
            Answer::ServiceError(body) => Self::ServiceError(body.payload().len()),
            Answer::Fault(fault) => Self::Fault(fault),
        }
    }
}

/// The counters of a method. Many calls update them at once without a lock, so a reader may see a call in one counter
/// and not yet in another.
pub(super) struct Counts {
    running: AtomicU64,
    service_errors: AtomicU64,
    /// Indexed by the number of the code.
    faults: [AtomicU64; Code::ALL.len()],
    cancelled: AtomicU64,
    expired: AtomicU64,
    /// By what has refused them.
    refused: [AtomicU64; RefusedBy::ALL.len()],
    redelivered: AtomicU64,
    repeated: AtomicU64,
    caller_runs: AtomicU64,
    received_bytes: AtomicU64,
    returned_bytes: AtomicU64,
    last_fault: Mutex<Option<LastFault>>,
    handler_time: Counted,
    queue_time: Counted,
}

impl Default for Counts {
    fn default() -> Self {
        Self {
            running: AtomicU64::default(),
            service_errors: AtomicU64::default(),
            faults: array::from_fn(|_| AtomicU64::default()),
            cancelled: AtomicU64::default(),
            expired: AtomicU64::default(),
            refused: array::from_fn(|_| AtomicU64::default()),
            redelivered: AtomicU64::default(),
            repeated: AtomicU64::default(),
            caller_runs: AtomicU64::default(),
            received_bytes: AtomicU64::default(),
            returned_bytes: AtomicU64::default(),
            last_fault: Mutex::default(),
            handler_time: Counted::default(),
            queue_time: Counted::default(),
        }
    }
}

impl Counts {
    /// Counts a handler that begins, with arguments of so many `bytes`. `queued` is how long its call has waited, or
    /// `None` if that is not to be counted.
    pub(super) fn begins(&self, bytes: usize, queued: Option<Duration>) {
        one_more(&self.running);
        more(&self.received_bytes, bytes);
        if let Some(queued) = queued {
            self.queue_time.add(queued);
        }
    }

    /// How many handlers run now.
    pub(super) fn running(&self) -> u64 {
        self.running.load(Ordering::Relaxed)
    }

    /// Counts a handler that has ended, and ran for the time `ran`.
    pub(super) fn ends(&self, end: RunEnd<'_>, ran: Duration) {
        self.running.fetch_sub(1, Ordering::Relaxed);
        self.handler_time.add(ran);
        match end {
            RunEnd::Result(bytes) => more(&self.returned_bytes, bytes),
            RunEnd::ServiceError(bytes) => {
                more(&self.returned_bytes, bytes);
                one_more(&self.service_errors);
            }
            RunEnd::Fault(fault) => self.fails(fault),
            RunEnd::Cancelled => one_more(&self.cancelled),
        }
    }

    fn fails(&self, fault: &Fault) {
        one_more(&self.faults[fault.code as usize]);
        let (code, message) = (fault.code.name().to_owned(), cut(&fault.message, MAX_TOLD).to_owned());
        let last = LastFault { code, message, at_ms: unix_millis() };
        *self.last_fault.lock().expect("no panic while holding the last fault") = Some(last);
    }

    /// Counts a call that does not run because nobody waits for it any more.
    pub(super) fn expires(&self) {
        one_more(&self.expired);
    }

    /// Counts a call that must not run.
    pub(super) fn refuses(&self, by: RefusedBy) {
        one_more(&self.refused[by as usize]);
    }

    /// The calls that must not run, by what has refused them.
    #[cfg(feature = "metrics")]
    pub(super) fn refused(&self) -> &[AtomicU64; RefusedBy::ALL.len()] {
        &self.refused
    }

    /// Counts a delivery that the broker marked as redelivered.
    pub(super) fn is_redelivered(&self) {
        one_more(&self.redelivered);
    }

    /// Counts a call that gets the reply to an earlier delivery.
    pub(super) fn repeats(&self) {
        one_more(&self.repeated);
    }

    /// Counts a call that runs on the task that reads the queue, since there is no room for it.
    pub(super) fn caller_runs(&self) {
        one_more(&self.caller_runs);
    }

    /// How many calls got the reply to an earlier delivery. The instance's sum is made of these.
    pub(super) fn repeated(&self) -> u64 {
        self.repeated.load(Ordering::Relaxed)
    }

    /// The counters as they are now. The name is left empty, because it is not known here.
    fn told(&self) -> MethodStats {
        let number = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let faults = Code::ALL.iter().map(|code| (code.name().to_owned(), number(&self.faults[*code as usize])));
        let handler_time = self.handler_time.told();
        MethodStats {
            name: String::new(),
            running: number(&self.running),
            finished: handler_time.count,
            service_errors: number(&self.service_errors),
            faults: faults.filter(|(_, count)| *count > 0).collect::<BTreeMap<_, _>>(),
            cancelled: number(&self.cancelled),
            expired: number(&self.expired),
            refused: self.refused.iter().map(number).sum(),
            redelivered: number(&self.redelivered),
            repeated: number(&self.repeated),
            caller_runs: number(&self.caller_runs),
            received_bytes: number(&self.received_bytes),
            returned_bytes: number(&self.returned_bytes),
            last_fault: self.last_fault.lock().expect("no panic while holding the last fault").clone(),
            handler_time,
            queue_time: self.queue_time.told(),
        }
    }
}

fn one_more(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

fn more(counter: &AtomicU64, bytes: usize) {
    counter.fetch_add(bytes as u64, Ordering::Relaxed);
}

/// A [`Histogram`] that is being filled. It sums nanoseconds, so that handlers that take less than a microsecond count
/// too.
#[derive(Default)]
struct Counted {
    nanos: AtomicU64,
    buckets: [AtomicU64; Histogram::BOUNDS.len() + 1],
}

impl Counted {
    fn add(&self, time: Duration) {
        self.nanos.fetch_add(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
        one_more(&self.buckets[Histogram::BOUNDS.partition_point(|bound| *bound < time)]);
    }

    fn told(&self) -> Histogram {
        let buckets: Vec<u64> = self.buckets.iter().map(|bucket| bucket.load(Ordering::Relaxed)).collect();
        Histogram { count: buckets.iter().sum(), sum_micros: self.nanos.load(Ordering::Relaxed) / 1000, buckets }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::outcome::timed_out;

    #[test]
    fn each_end_of_a_run_is_counted_once() {
        let counts = Counts::default();
        let [late, fault] = [timed_out(), Fault::new(Code::NotFound, "no such thing")];
        let ends = [
            RunEnd::Fault(&late),
            RunEnd::Fault(&fault),
            RunEnd::Result(7),
            RunEnd::ServiceError(3),
            RunEnd::Cancelled,
        ];
        for end in ends {
            counts.begins(5, Some(Duration::from_millis(2)));
            counts.ends(end, Duration::from_nanos(600));
        }
        counts.begins(5, None);
        let told = counts.told();
        assert_eq!((told.running, told.finished, told.service_errors, told.cancelled), (1, 5, 1, 1));
        assert_eq!(told.faults, BTreeMap::from([("DEADLINE_EXCEEDED".to_owned(), 1), ("NOT_FOUND".to_owned(), 1)]));
        assert_eq!((told.handler_time.count, told.handler_time.sum_micros), (5, 3), "fractions are kept");
        assert_eq!((told.queue_time.count, told.queue_time.sum_micros), (5, 10_000));
        assert_eq!((told.received_bytes, told.returned_bytes), (30, 10));
        let last = told.last_fault.expect("there was one");
        assert_eq!((last.code.as_str(), last.message.as_str()), ("NOT_FOUND", "no such thing"));
        assert!(last.at().is_some_and(|at| at.elapsed().is_ok()), "{last:?}");
    }

    #[test]
    fn a_long_fault_is_told_in_part() {
        let counts = Counts::default();
        counts.begins(0, None);
        counts.ends(RunEnd::Fault(&Fault::new(Code::Internal, "ö".repeat(1000))), Duration::ZERO);
        assert_eq!(counts.told().last_fault.expect("there was one").message, "ö".repeat(MAX_TOLD / 2));
    }

    #[test]
    fn a_time_is_counted_below_the_first_bound_that_it_does_not_exceed() {
        let counted = Counted::default();
        let bounds = Histogram::BOUNDS;
        for time in [Duration::ZERO, bounds[0], bounds[0] + Duration::from_nanos(1), bounds[15], Duration::MAX / 1000] {
            counted.add(time);
        }
        let told = counted.told();
        assert_eq!((told.buckets.len(), told.count), (17, 5));
        assert_eq!((told.buckets[0], told.buckets[1], told.buckets[15], told.buckets[16]), (2, 1, 1, 1));
    }
}
