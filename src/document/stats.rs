//! The document with an instance's statistics, as a whole and by method. `server/about.rs` fills it in.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::{Document, STATS, since_1970};

/// How busy an instance of a service is: the document `hopline.v1.stats`. Numbers of what has happened count from the
/// start of the instance. A [`Registry`](crate::Registry) gathers them.
///
/// ```
/// # async fn example(client: hopline::Client) -> Result<(), hopline::Error> {
/// for stats in client.registry().stats("demo").await? {
///     for method in &stats.methods {
///         let mean = method.handler_time.mean().unwrap_or_default();
///         println!("{}.{}: {} calls of {mean:?}", stats.service, method.name, method.finished);
///     }
/// }
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename = "hopline.v1.stats", default)]
#[non_exhaustive]
pub struct InstanceStats {
    /// The service, as `name.vMAJOR`.
    pub service: String,
    /// The instance's id: what [`Call::to`](crate::Call::to) takes.
    pub instance: String,
    /// The time by the clock of its machine when it replied, in milliseconds since 1970. 0 if it does not tell.
    pub now_ms: u64,
    /// Calls that are running now.
    pub running: u64,
    /// Calls that have run, however they ended.
    pub finished: u64,
    /// Deliveries that were answered with the reply to an earlier delivery of the same call, by
    /// [`Method::dedup`](crate::Method::dedup).
    pub repeated: u64,
    /// Frames that could not be read. The frames after one in the same message cannot be found, so they are not
    /// counted.
    pub malformed: u64,
    /// Frames that could be read but were not run: the method is unknown, the arguments grow too large when
    /// decompressed, the frame does not belong in the queue that it came from, or the call came back and must not run
    /// twice.
    pub refused: u64,
    /// Cancels of calls that were not running here. Every instance receives every cancel, so most of these belong to
    /// another instance; some came too late, or were forged.
    pub cancels_ignored: u64,
    /// The CPU time, in microseconds, that its process has used since it began. `None` where the system does not tell.
    pub cpu_micros: Option<u64>,
    /// The memory of its process that is resident, in bytes. `None` where the system does not tell.
    pub memory_bytes: Option<u64>,
    /// The statistics of each method, sorted by name. Empty if the instance does not report them.
    pub methods: Vec<MethodStats>,
}

impl Document for InstanceStats {
    const QUESTION: &str = STATS;
    const TYPE: &str = "hopline.v1.stats";

    fn source(&self) -> (&str, &str) {
        (&self.service, &self.instance)
    }
}

/// The statistics of one method of an instance.
///
/// A call that runs ends in one of four ways: with a result, with the method's own error, with a fault, or cancelled
/// because its caller gave up. [`finished`](Self::finished) is the sum of the four.
///
/// ```
/// # fn example(stats: hopline::InstanceStats) {
/// for method in &stats.methods {
///     let faults: u64 = method.faults.values().sum();
///     println!("{}: {faults} of {} calls ended with a fault", method.name, method.finished);
/// }
/// # }
/// ```
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct MethodStats {
    /// The method's name, or `*` as in [`MethodInfo`](crate::MethodInfo).
    pub name: String,
    /// Calls that are running now.
    pub running: u64,
    /// Calls that have run, however they ended. A oneway call that is retried counts once for each attempt.
    pub finished: u64,
    /// How many of `finished` ended with the method's own error.
    pub service_errors: u64,
    /// How many of `finished` ended with a fault, by the name of its code, such as `NOT_FOUND`. Codes that did not
    /// occur are left out. `DEADLINE_EXCEEDED` counts the handlers that were stopped at their deadline, and `INTERNAL`
    /// those that panicked.
    pub faults: BTreeMap<String, u64>,
    /// How many of `finished` were stopped half-way because their callers gave up.
    pub cancelled: u64,
    /// Calls that did not run because nobody waited for them any more: they had been cancelled, or their deadline had
    /// passed.
    pub expired: u64,
    /// Calls that did not run for another reason: the server's rule or a policy forbids them, there was no room for them,
    /// their arguments cannot be decompressed, or they came back and may have run before.
    pub refused: u64,
    /// Deliveries that the broker marked as redelivered.
    pub redelivered: u64,
    /// Deliveries that were answered with the reply to an earlier delivery of the same call, by
    /// [`Method::dedup`](crate::Method::dedup).
    pub repeated: u64,
    /// Calls that ran on the task that reads the queue, since the queue in front of their pool was full:
    /// [`QueueFull::CallerRuns`](crate::QueueFull::CallerRuns).
    pub caller_runs: u64,
    /// The arguments of the calls that have begun, in bytes, as they came: compressed arguments count as such.
    pub received_bytes: u64,
    /// What the handlers have returned, in bytes, before it is compressed. Faults do not count.
    pub returned_bytes: u64,
    /// The last call that ended with a fault. `None` if there was none.
    pub last_fault: Option<LastFault>,
    /// How long the handlers ran, for all calls that have finished.
    pub handler_time: Histogram,
    /// How long calls waited between being sent and the start of their handlers. Redelivered calls are not counted. The
    /// time is the difference of two machines' clocks, and is wrong by as much as these differ.
    pub queue_time: Histogram,
}

impl MethodStats {
    /// The calls that have ended with the method's own error or with a fault.
    #[must_use]
    pub fn errors(&self) -> u64 {
        self.faults.values().fold(self.service_errors, |sum, count| sum.saturating_add(*count))
    }

    /// Both together: the numbers are summed up, and the later of the two last faults is kept. So what several
    /// instances say of a method becomes one.
    ///
    /// ```
    /// # async fn example(client: hopline::Client) -> Result<(), hopline::Error> {
    /// let stats = client.registry().stats("demo").await?;
    /// let of_add = stats.iter().flat_map(|stats| &stats.methods).filter(|method| method.name == "add");
    /// let add = of_add.fold(hopline::MethodStats::default(), |sum, method| sum.with(method));
    /// println!("{} calls", add.finished);
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn with(&self, other: &Self) -> Self {
        let mut faults = self.faults.clone();
        for (code, count) in &other.faults {
            let sum: &mut u64 = faults.entry(code.clone()).or_default();
            *sum = sum.saturating_add(*count);
        }
        let when = |fault: &&LastFault| fault.at_ms;
        Self {
            name: other.name.clone(),
            running: self.running.saturating_add(other.running),
            finished: self.finished.saturating_add(other.finished),
            service_errors: self.service_errors.saturating_add(other.service_errors),
            faults,
            cancelled: self.cancelled.saturating_add(other.cancelled),
            expired: self.expired.saturating_add(other.expired),
            refused: self.refused.saturating_add(other.refused),
            redelivered: self.redelivered.saturating_add(other.redelivered),
            repeated: self.repeated.saturating_add(other.repeated),
            caller_runs: self.caller_runs.saturating_add(other.caller_runs),
            received_bytes: self.received_bytes.saturating_add(other.received_bytes),
            returned_bytes: self.returned_bytes.saturating_add(other.returned_bytes),
            last_fault: self.last_fault.iter().chain(&other.last_fault).max_by_key(when).cloned(),
            handler_time: self.handler_time.with(&other.handler_time),
            queue_time: self.queue_time.with(&other.queue_time),
        }
    }
}

/// The last fault of a method, and when it was.
///
/// ```
/// # fn example(method: hopline::MethodStats) {
/// if let Some(fault) = &method.last_fault {
///     println!("{} failed with {}: {}", method.name, fault.code, fault.message);
/// }
/// # }
/// ```
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct LastFault {
    /// The name of its code, such as `NOT_FOUND`.
    pub code: String,
    /// What it says, shortened to 256 bytes.
    pub message: String,
    /// When it was, in milliseconds since 1970, by the clock of the instance's machine. See [`at`](Self::at).
    pub at_ms: u64,
}

impl LastFault {
    /// When it was, by the clock of the instance's machine. `None` if that is not known.
    #[must_use]
    pub fn at(&self) -> Option<SystemTime> {
        since_1970(self.at_ms)
    }
}

/// A histogram of times: how often something happened, and how long it took.
///
/// ```
/// # fn example(method: hopline::MethodStats) {
/// if let Some(mean) = method.queue_time.mean() {
///     println!("{} calls of {} waited {mean:?} on average", method.queue_time.count, method.name);
/// }
/// # }
/// ```
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct Histogram {
    /// How often it happened.
    pub count: u64,
    /// The sum of all times, in microseconds.
    pub sum_micros: u64,
    /// How often the time was at most each of [`Histogram::BOUNDS`] and above the bound before it. One more number at
    /// the end counts the times above all bounds. Empty if the instance does not report it.
    pub buckets: Vec<u64>,
}

impl Histogram {
    /// The upper bounds of [`buckets`](Self::buckets), in ascending order. They never change within a version of the
    /// document.
    pub const BOUNDS: [Duration; 16] = [
        Duration::from_micros(100),
        Duration::from_micros(250),
        Duration::from_micros(500),
        Duration::from_millis(1),
        Duration::from_micros(2500),
        Duration::from_millis(5),
        Duration::from_millis(10),
        Duration::from_millis(25),
        Duration::from_millis(50),
        Duration::from_millis(100),
        Duration::from_millis(250),
        Duration::from_millis(500),
        Duration::from_secs(1),
        Duration::from_millis(2500),
        Duration::from_secs(5),
        Duration::from_secs(10),
    ];

    /// The sum of all times, in whole microseconds.
    #[must_use]
    pub fn sum(&self) -> Duration {
        Duration::from_micros(self.sum_micros)
    }

    /// Both together.
    #[must_use]
    pub fn with(&self, other: &Self) -> Self {
        let length = self.buckets.len().max(other.buckets.len());
        let bucket = |of: &Self, i: usize| of.buckets.get(i).copied().unwrap_or_default();
        Self {
            count: self.count.saturating_add(other.count),
            sum_micros: self.sum_micros.saturating_add(other.sum_micros),
            buckets: (0..length).map(|i| bucket(self, i).saturating_add(bucket(other, i))).collect(),
        }
    }

    /// The smallest of [`BOUNDS`](Self::BOUNDS) that at least the given share of all times does not exceed: with 0.99
    /// the bound of the 99th percentile. `Duration::MAX` if it exceeds all bounds, and `None` if there are no buckets
    /// or it never happened. A share below 0 counts as 0, and one above 1 as 1.
    ///
    /// ```
    /// # fn example(method: hopline::MethodStats) {
    /// if let Some(bound) = method.handler_time.quantile(0.99) {
    ///     println!("99 % of the calls of {} took at most {bound:?}", method.name);
    /// }
    /// # }
    /// ```
    #[must_use]
    pub fn quantile(&self, share: f64) -> Option<Duration> {
        let all = self.buckets.iter().fold(0_u64, |sum, count| sum.saturating_add(*count));
        let wanted = (share.clamp(0.0, 1.0) * all as f64).ceil().max(1.0);
        let mut counted = 0_u64;
        let bucket = self.buckets.iter().position(|count| {
            counted = counted.saturating_add(*count);
            counted as f64 >= wanted
        })?;
        Some(Self::BOUNDS.get(bucket).copied().unwrap_or(Duration::MAX))
    }

    /// The mean time, or `None` if it never happened.
    #[must_use]
    pub fn mean(&self) -> Option<Duration> {
        self.sum_micros.checked_div(self.count).map(Duration::from_micros)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bounds_of_times_ascend() {
        assert!(Histogram::BOUNDS.is_sorted_by(|less, more| less < more));
    }

    #[test]
    fn the_mean_of_nothing_is_none() {
        assert_eq!(Histogram::default().mean(), None);
        let times = Histogram { count: 4, sum_micros: 10, ..Histogram::default() };
        assert_eq!((times.mean(), times.sum()), (Some(Duration::from_micros(2)), Duration::from_micros(10)));
    }

    #[test]
    fn a_quantile_is_the_bound_that_a_share_does_not_exceed() {
        let mut times = Histogram { count: 100, sum_micros: 0, buckets: vec![0; 17] };
        assert_eq!((times.quantile(0.5), Histogram::default().quantile(0.5)), (None, None));
        (times.buckets[3], times.buckets[5], times.buckets[16]) = (50, 49, 1);
        let expected = [(-1.0, 3), (0.0, 3), (0.5, 3), (0.51, 5), (0.99, 5)];
        for (share, bound) in expected {
            assert_eq!(times.quantile(share), Some(Histogram::BOUNDS[bound]), "{share}");
        }
        assert_eq!([0.991, 1.0, 7.0].map(|share| times.quantile(share)), [Some(Duration::MAX); 3]);
        assert_eq!(times.quantile(f64::NAN), Some(Histogram::BOUNDS[3]), "nonsense is no panic");
    }

    #[test]
    fn what_two_instances_count_is_summed_up() {
        let fault = |at_ms| Some(LastFault { at_ms, ..LastFault::default() });
        let times = Histogram { count: 2, sum_micros: 7, buckets: vec![1, 1] };
        let mut one =
            MethodStats { name: "add".into(), running: 1, finished: 2, last_fault: fault(5), ..MethodStats::default() };
        one.handler_time = times.clone();
        one.faults = BTreeMap::from([("INTERNAL".into(), 1), ("ABORTED".into(), 1)]);
        let mut two =
            MethodStats { finished: 3, caller_runs: 2, received_bytes: 8, last_fault: fault(3), ..one.clone() };
        two.faults = BTreeMap::from([("INTERNAL".into(), 4)]);
        let sum = MethodStats::default().with(&one).with(&two);
        assert_eq!((sum.name.as_str(), sum.running, sum.finished, sum.received_bytes), ("add", 2, 5, 8));
        assert_eq!(sum.caller_runs, 2);
        assert_eq!(sum.faults, BTreeMap::from([("ABORTED".into(), 1), ("INTERNAL".into(), 5)]));
        assert_eq!(sum.last_fault, fault(5));
        assert_eq!(sum.handler_time, Histogram { count: 4, sum_micros: 14, buckets: vec![2, 2] });
        assert_eq!(sum.queue_time, Histogram::default());
    }

    #[test]
    fn what_a_peer_says_of_itself_does_no_harm_however_large_it_is() {
        let times = Histogram { count: u64::MAX, sum_micros: u64::MAX, buckets: vec![u64::MAX; 100] };
        assert_eq!(times.quantile(1.0), Some(Histogram::BOUNDS[0]));
        assert_eq!(times.with(&times), times);
        let faults = BTreeMap::from([("A".to_owned(), u64::MAX), ("B".to_owned(), u64::MAX)]);
        let mut stats = MethodStats { finished: u64::MAX, service_errors: 1, faults, ..MethodStats::default() };
        (stats.handler_time, stats.queue_time) = (times.clone(), Histogram::default());
        assert_eq!(stats.with(&stats), stats.with(&MethodStats::default()).with(&stats));
        assert_eq!((stats.with(&stats).finished, stats.errors()), (u64::MAX, u64::MAX));
    }
}
