//! Adding a time that a user has set to a point in time, without an overflow.

use std::time::Duration;

use tokio::time::Instant;

/// The longest wait, 30 years. It stands for every longer one, so that adding several of them stays within what the
/// clock can express.
const FOREVER: Duration = Duration::from_secs(30 * 365 * 24 * 3600);

/// The point in time that is `wait` after `instant`. Use this wherever `wait` comes from a user:
/// `Instant + Duration::MAX` panics, and people write `Duration::MAX` for "never".
pub(crate) fn later(instant: Instant, wait: Duration) -> Instant {
    instant + wait.min(FOREVER)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_wait_is_too_long_for_the_clock() {
        let now = Instant::now();
        assert_eq!(later(now, Duration::ZERO), now);
        assert_eq!(later(now, Duration::from_secs(7)), now + Duration::from_secs(7));
        let mut far = now;
        for _ in 0..3 {
            far = later(far, Duration::MAX);
        }
        assert!(far > now + FOREVER);
    }
}
