//! How busy an instance is, as a whole and by method.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{Document, STATS};

/// How busy an instance of a service is: the document `hopline.v1.stats`. All numbers count from its start.
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
    /// The instance's id.
    pub instance: String,
    /// Calls that run now.
    pub running: u64,
    /// Calls that it has run, however they ended.
    pub finished: u64,
    /// Deliveries that got the reply of an earlier one, by [`Method::dedup`](crate::Method::dedup).
    pub repeated: u64,
    /// Frames that came to it and could not be read; what followed each in its message counts with it.
    pub malformed: u64,
    /// Frames that could be read and were not to be run: unknown methods, bombs, what does not belong where it came, and
    /// what came back to be run twice.
    pub refused: u64,
    /// Cancels of calls that did not run here: of another instance's, for each hears of each; late or forged.
    pub cancels_ignored: u64,
    /// The same by method, in the order of their names. Empty from an instance that does not tell.
    pub methods: Vec<MethodStats>,
}

impl Document for InstanceStats {
    const QUESTION: &str = STATS;
    const TYPE: &str = "hopline.v1.stats";

    fn source(&self) -> (&str, &str) {
        (&self.service, &self.instance)
    }
}

/// What an instance counts of one of its methods.
///
/// Each call that runs ends in one of four ways: with a result, with the method's own error, with a fault, or dropped because
/// its caller gave up. So [`finished`](Self::finished) is the sum of these.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct MethodStats {
    /// The method's name.
    pub name: String,
    /// Calls that run now.
    pub running: u64,
    /// Calls that have run, however they ended. A oneway call that is tried again counts once for each attempt.
    pub finished: u64,
    /// Of those, how many ended with the method's own error.
    pub service_errors: u64,
    /// Of those, how many ended with a fault, by the name of its code, such as `NOT_FOUND`; codes that did not occur are left out.
    /// `DEADLINE_EXCEEDED` counts handlers that were stopped at their deadline, `INTERNAL` those that panicked.
    pub faults: BTreeMap<String, u64>,
    /// Of those, how many were dropped half-way because their callers gave up.
    pub cancelled: u64,
    /// Calls that came and did not run, because nobody waited for them any more: they were cancelled, or their deadline had
    /// passed.
    pub expired: u64,
    /// Calls that came and were not to be run: the server's rule forbids them, their arguments cannot be decompressed, or they
    /// came back and may have run before.
    pub refused: u64,
    /// Deliveries that the broker says it has delivered before.
    pub redelivered: u64,
    /// Deliveries that got the reply of an earlier one, by [`Method::dedup`](crate::Method::dedup).
    pub repeated: u64,
    /// How long handlers ran, of all calls that have finished.
    pub handler_time: Histogram,
    /// How long calls waited until their handlers began, from when they were sent. It is told by the clocks of two machines, and
    /// is as wrong as these differ. Only calls that came for the first time are counted.
    pub queue_time: Histogram,
}

/// How long something took, each time that it happened: a histogram.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct Histogram {
    /// How often it happened.
    pub count: u64,
    /// All of the times together, in microseconds.
    pub sum_micros: u64,
    /// How often it took no longer than each of [`Histogram::BOUNDS`], and longer than the bound before; the last number counts what
    /// took longer than all of them. Empty if nothing is told.
    pub buckets: Vec<u64>,
}

impl Histogram {
    /// The upper bounds of [`buckets`](Self::buckets), in ascending order. A version of the document has the same ones for ever.
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

    /// All of the times together.
    #[must_use]
    pub fn sum(&self) -> Duration {
        Duration::from_micros(self.sum_micros)
    }

    /// The mean; none if it never happened.
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
