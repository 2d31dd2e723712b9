//! Points in time: those that a user sets, without an overflow, and what this machine's clock says.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::runtime::Handle;
use tokio::time::{Instant, Sleep, sleep_until};

/// The longest wait, 30 years. It stands for every longer one, so that adding several of them stays within what the
/// clock can express.
const FOREVER: Duration = Duration::from_secs(30 * 365 * 24 * 3600);

/// The point in time that is `wait` after `instant`. Use this wherever `wait` comes from a user:
/// `Instant + Duration::MAX` panics, and people write `Duration::MAX` for "never".
pub(crate) fn later(instant: Instant, wait: Duration) -> Instant {
    instant + wait.min(FOREVER)
}

/// Resolves at `instant`. Never resolves without one, which is useful in a `select!`.
pub(crate) async fn at(instant: Option<Instant>) {
    match instant {
        Some(instant) => tokio::time::sleep_until(instant).await,
        None => std::future::pending().await,
    }
}

/// A timer that works on any thread. It uses the tokio runtime of the thread that makes it, or if there is none, `runtime`.
pub(crate) fn timer(runtime: &Handle, at: Instant) -> Sleep {
    let _entered = Handle::try_current().is_err().then(|| runtime.enter());
    sleep_until(at)
}

/// The time by this machine's clock, in milliseconds since 1970.
pub(crate) fn unix_millis() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
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
