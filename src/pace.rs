//! The usual time of a method's handler, estimated from the times that were measured.
//!
//! A client keeps one [`Pace`] for each method that it calls, from the times that replies report, and decides by it how
//! many calls share a message. A server keeps one for the oneway calls of each method, and decides by it how many calls
//! of one message it runs itself.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// A moving average of the times that a handler took.
#[derive(Debug, Default)]
pub(crate) struct Pace(
    /// In nanoseconds; 0 before the first report.
    AtomicU64,
);

impl Pace {
    /// Adds a measured time to the average.
    ///
    /// The average moves by an eighth of the difference, and it rises by at most a half at a time. So a single slow
    /// reply changes little: perhaps its thread only had to wait for a CPU. A method that has become slow is known as
    /// slow after about twenty replies.
    pub(crate) fn report(&self, time: Duration) {
        let time = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX).max(1);
        let average = self.0.load(Ordering::Relaxed);
        let next = match average {
            0 => time,
            _ if time > average => average + ((time - average) / 8).min(average / 2 + 1_000),
            _ => average - (average - time) / 8,
        };
        // Only one task writes. The others may read a value that was true a moment ago.
        self.0.store(next.max(1), Ordering::Relaxed);
    }

    /// The average, or `None` if nothing was reported yet.
    pub(crate) fn average(&self) -> Option<Duration> {
        match self.0.load(Ordering::Relaxed) {
            0 => None,
            nanos => Some(Duration::from_nanos(nanos)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pace_follows_what_is_reported_and_forgives_one_slow_reply() {
        let (quick, slow) = (Duration::from_micros(10), Duration::from_millis(20));
        let pace = Pace::default();
        assert_eq!(pace.average(), None);
        pace.report(slow);
        assert_eq!(pace.average(), Some(slow));
        (0..100).for_each(|_| pace.report(quick));
        assert!(pace.average().expect("reported") < quick * 2);
        pace.report(slow);
        assert!(pace.average().expect("reported") < quick * 2);
        (0..30).for_each(|_| pace.report(slow));
        assert!(pace.average().expect("reported") > Duration::from_millis(1));
        pace.report(Duration::ZERO);
        assert!(pace.average().is_some());
    }
}
