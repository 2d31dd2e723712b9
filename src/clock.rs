//! Points in time that are there to be waited for.

use std::time::Duration;

use tokio::time::Instant;

/// As long as anything waits that is to wait for ever: a clock that counts on from there does not overflow.
const FOREVER: Duration = Duration::from_secs(30 * 365 * 24 * 3600);

/// The time `wait` after `instant`, however long a user has set that to be.
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
