//! Whether a service has an instance, as far as its client has heard.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// For how long what was heard of a service is true.
const FRESH: Duration = Duration::from_secs(1);
/// How long after a question that was answered with yes, or not at all, the next one is asked: each instance gets it.
const PAUSE: Duration = Duration::from_secs(5);

/// Of one service. The client's line is the only one who looks here, so nobody waits for the lock.
#[derive(Debug, Default)]
pub(crate) struct Presence(Mutex<Seen>);

#[derive(Debug, Default, Clone, Copy)]
struct Seen {
    /// When it was last known that there is an instance.
    heard: Option<Instant>,
    asked: Option<Instant>,
    /// Whether the last thing that was heard is that there is none.
    absent: bool,
}

impl Presence {
    /// An instance has given a sign of life.
    pub(crate) fn heard(&self, now: Instant) {
        self.update(|seen| (seen.heard, seen.absent) = (Some(now), false));
    }

    /// The broker says that there is none.
    pub(crate) fn is_gone(&self) {
        self.update(|seen| seen.absent = true);
    }

    /// Whether there is none, as far as is known.
    pub(crate) fn is_absent(&self) -> bool {
        self.update(|seen| seen.absent)
    }

    /// Whether there was an instance a moment ago.
    pub(crate) fn is_fresh(&self, now: Instant) -> bool {
        self.update(|seen| !seen.absent && is_within(FRESH, seen.heard, now))
    }

    /// Whether the broker is to be asked about calls that nobody has answered; if so, it has been now.
    pub(crate) fn asks(&self, now: Instant) -> bool {
        self.update(|seen| {
            let pause = if seen.absent { FRESH } else { PAUSE };
            let asks = !is_within(FRESH, seen.heard, now) && !is_within(pause, seen.asked, now);
            if asks {
                seen.asked = Some(now);
            }
            asks
        })
    }

    fn update<T>(&self, change: impl FnOnce(&mut Seen) -> T) -> T {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
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
        presence.is_gone();
        assert!(presence.is_absent() && !presence.asks(at(6499)) && presence.asks(at(6500)));
        presence.heard(at(6600));
        assert!(!presence.is_absent() && presence.is_fresh(at(6700)));
    }

    #[test]
    fn what_was_just_heard_counts_no_more_once_nobody_is_there() {
        let (presence, now) = (Presence::default(), Instant::now());
        presence.heard(now);
        presence.is_gone();
        assert!(!presence.is_fresh(now) && presence.is_absent());
    }
}
