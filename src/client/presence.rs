//! Whether a service has an instance, as far as its client has heard.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// For how long it is true that a service has an instance, once that was heard, and how soon it may be asked again.
const FRESH: Duration = Duration::from_secs(1);
/// For how long it is true that it has none: while calls wait for one, it is asked every second.
const GONE: Duration = Duration::from_secs(2);
/// How long after a question that was answered with yes, or not at all, the next one is asked: each instance gets it.
const PAUSE: Duration = Duration::from_secs(5);

/// Of one service. The client's line is the only one who looks here, so nobody waits for the lock.
#[derive(Debug, Default)]
pub(crate) struct Presence(Mutex<Seen>);

#[derive(Debug, Default)]
struct Seen {
    /// When there was an instance, if that is what was heard last.
    heard: Option<Instant>,
    /// When there was none, if that is.
    gone: Option<Instant>,
    asked: Option<Instant>,
}

impl Presence {
    /// An instance has given a sign of life.
    pub(crate) fn heard(&self, now: Instant) {
        let mut seen = self.seen();
        (seen.heard, seen.gone) = (Some(now), None);
    }

    /// The broker says that there is none.
    pub(crate) fn is_gone(&self, now: Instant) {
        let mut seen = self.seen();
        (seen.heard, seen.gone) = (None, Some(now));
    }

    /// Whether there was none a moment ago.
    pub(crate) fn is_absent(&self, now: Instant) -> bool {
        is_within(GONE, self.seen().gone, now)
    }

    /// Whether there was an instance a moment ago.
    pub(crate) fn is_fresh(&self, now: Instant) -> bool {
        is_within(FRESH, self.seen().heard, now)
    }

    /// Whether the broker is to be asked about calls that nobody has answered; if so, it has been now.
    pub(crate) fn asks(&self, now: Instant) -> bool {
        let mut seen = self.seen();
        let pause = if seen.gone.is_some() { FRESH } else { PAUSE };
        let asks = !is_within(FRESH, seen.heard, now) && !is_within(pause, seen.asked, now);
        if asks {
            seen.asked = Some(now);
        }
        asks
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn is_within(time: Duration, then: Option<Instant>, now: Instant) -> bool {
    then.is_some_and(|then| now.saturating_duration_since(then) < time)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_is_asked_about_when_nothing_is_heard_of_it_and_not_too_often() {
        let (presence, start) = (Presence::default(), Instant::now());
        let at = |millis| start + Duration::from_millis(millis);
        assert!(presence.asks(at(0)) && !presence.asks(at(4999)));
        presence.heard(at(4500));
        assert!(presence.is_fresh(at(5499)) && !presence.asks(at(5499)));
        assert!(!presence.is_fresh(at(5500)) && presence.asks(at(5500)));
        presence.is_gone(at(5600));
        assert!(!presence.asks(at(6499)) && presence.asks(at(6500)));
        presence.heard(at(6600));
        assert!(!presence.is_absent(at(6600)) && presence.is_fresh(at(6700)));
    }

    #[test]
    fn what_was_heard_last_is_true_for_a_while() {
        let (presence, start) = (Presence::default(), Instant::now());
        let at = |millis| start + Duration::from_millis(millis);
        assert!(!presence.is_absent(start) && !presence.is_fresh(start), "nothing is known");
        presence.heard(start);
        presence.is_gone(start);
        assert!(!presence.is_fresh(start) && presence.is_absent(at(1999)));
        assert!(!presence.is_absent(at(2000)), "one may have come");
    }
}
