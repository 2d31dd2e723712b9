//! How long calls have waited, whatever the clocks of their senders say.
//!
//! A frame tells when it was sent, by the clock of its sender's machine. The difference to this machine's clock is the time
//! that it has taken, and the difference between the clocks. The latter is the same for all frames of a sender, so it goes
//! away when the least difference of the last minutes is taken off: what is left is how much longer a frame has taken than
//! the fastest of its sender.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::map::FastMap;

/// A least difference counts for at least this long, and at most twice as long. Clocks drift apart only slowly.
const KEPT: Duration = Duration::from_secs(120);
/// How many senders are known in each of these times. What others send is not counted.
const MAX_SENDERS: usize = 4096;

/// The least differences by sender, in milliseconds.
#[derive(Debug, Default)]
pub(super) struct SenderClocks(Mutex<Differences>);

/// The differences in two generations. After [`KEPT`], `young` becomes `old`, and the old ones are forgotten.
#[derive(Debug, Default)]
struct Differences {
    young: FastMap<Arc<str>, i64>,
    old: FastMap<Arc<str>, i64>,
    since: Option<Instant>,
}

impl SenderClocks {
    /// How much longer a frame of `sender` took than the fastest of the last minutes. `difference` is by how many milliseconds
    /// this machine's clock is ahead of what the frame says. `None` if there are too many senders.
    pub(super) fn waited(&self, sender: &Arc<str>, difference: i64, now: Instant) -> Option<Duration> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let since = *kept.since.get_or_insert(now);
        if now.saturating_duration_since(since) >= KEPT {
            kept.old = std::mem::take(&mut kept.young);
            kept.since = Some(now);
        }
        let before = kept.old.get(sender).copied();
        let is_full = kept.young.len() >= MAX_SENDERS;
        let least = match kept.young.get_mut(sender) {
            Some(least) => {
                *least = difference.min(*least);
                *least
            }
            None if is_full => return None,
            None => {
                kept.young.insert(sender.clone(), difference);
                difference
            }
        };
        let least = before.map_or(least, |before| before.min(least));
        Some(Duration::from_millis(difference.saturating_sub(least).try_into().unwrap_or_default()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_clock_that_is_wrong_by_an_hour_changes_nothing() {
        let hour = 3_600_000;
        for skew in [0, hour, -hour] {
            let (clocks, now, sender) = (SenderClocks::default(), Instant::now(), Arc::from("web 1"));
            let waited = |took: i64| clocks.waited(&sender, took + skew, now);
            assert_eq!(waited(20), Some(Duration::ZERO), "the first is the fastest so far");
            assert_eq!([waited(70), waited(5), waited(70)], [Some(50 * MS), Some(Duration::ZERO), Some(65 * MS)]);
        }
    }

    #[test]
    fn a_clock_that_was_put_right_is_believed_after_some_minutes() {
        let (clocks, start, sender) = (SenderClocks::default(), Instant::now(), Arc::from("web 1"));
        let waited = |difference, after: u32| clocks.waited(&sender, difference, start + KEPT * after / 2);
        assert_eq!(waited(1000, 0), Some(Duration::ZERO));
        // From now on the difference is 4 s more.
        assert_eq!(waited(5000, 1), Some(4000 * MS));
        assert_eq!(waited(5000, 2), Some(4000 * MS), "the generation before counts");
        assert_eq!([waited(5000, 4), waited(5003, 4)], [Some(Duration::ZERO), Some(3 * MS)]);
    }

    #[test]
    fn senders_that_are_made_up_do_not_pile_up() {
        let (clocks, now) = (SenderClocks::default(), Instant::now());
        for number in 0..MAX_SENDERS {
            assert!(clocks.waited(&format!("web {number}").into(), 0, now).is_some());
        }
        assert_eq!(clocks.waited(&Arc::from("one more"), 0, now), None);
        assert_eq!(clocks.waited(&Arc::from("web 7"), 9, now), Some(9 * MS));
        assert!(clocks.waited(&Arc::from("one more"), 0, now + KEPT).is_some());
    }
}
