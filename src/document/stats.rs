//! The document with an instance's statistics, as a whole and by method. `server/about.rs` fills it in.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{Document, STATS};

/// How busy an instance of a service is: the document `hopline.v1.stats`. All numbers count from the start of the
/// instance. [`Client::stats`](crate::Client::stats) collects them.
///
/// ```
/// # use std::time::Duration;
/// # async fn example(client: hopline::Client) -> Result<(), hopline::Error> {
/// for stats in client.stats(Duration::from_millis(500)).await? {
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
    /// The method's name.
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
    /// Calls that did not run for another reason: the server's rule forbids them, their arguments cannot be
    /// decompressed, or they came back and may have run before.
    pub refused: u64,
    /// Deliveries that the broker marked as redelivered.
    pub redelivered: u64,
    /// Deliveries that were answered with the reply to an earlier delivery of the same call, by
    /// [`Method::dedup`](crate::Method::dedup).
    pub repeated: u64,
    /// How long the handlers ran, for all calls that have finished.
    pub handler_time: Histogram,
    /// How long calls waited between being sent and the start of their handlers. Redelivered calls are not counted. The
    /// time is the difference of two machines' clocks, and is wrong by as much as these differ.
    pub queue_time: Histogram,
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
}
