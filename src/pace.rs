//! How long a method's handler takes, going by how long it took.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// A moving average of handler times.
#[derive(Debug, Default)]
pub(crate) struct Pace(
    /// In nanoseconds; 0 before the first report.
    AtomicU64,
);

impl Pace {
    /// Takes one more report into a moving average.
    ///
    /// A single slow reply, as of a thread that had to wait for its turn, moves it little: it may rise by a half at a time.
    /// So a method that becomes slow is known as slow after some twenty replies.
    pub(crate) fn report(&self, time: Duration) {
        let time = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX).max(1);
        let average = self.0.load(Ordering::Relaxed);
        let next = match average {
            0 => time,
            _ if time > average => average + ((time - average) / 8).min(average / 2 + 1_000),
            _ => average - (average - time) / 8,
        };
        // One task reports; the others may read what was true a moment ago.
        self.0.store(next.max(1), Ordering::Relaxed);
    }

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
