//! Presence: whether a service has an instance, as far as its client has heard.
//!
//! It is learned from replies, from signs of life, and from the broker's answers to questions (`line/task/asking.rs`).
//! By it, the client decides whether a call that nobody answers fails with `NoService` or a time-out, and whether to
//! ask the broker.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// How long the news that a service has an instance counts.
const FRESH: Duration = Duration::from_secs(1);
/// How long the news that it has none counts. While calls wait for an instance, the broker is asked every second.
const GONE: Duration = Duration::from_secs(2);
/// A service without an instance for this long certainly has none that runs a call. An instance that drains still runs
/// calls, but reports them within two seconds.
const CERTAIN: Duration = Duration::from_secs(3);
/// The pause until the next question, if the last answer was yes or did not come. Each instance receives the question,
/// so it is long.
const PAUSE: Duration = Duration::from_secs(5);
/// The pause until the next question, if the last answer was no.
const PAUSE_GONE: Duration = Duration::from_millis(500);

/// The news that a service has no instance.
#[derive(Debug, Clone, Copy)]
struct Gone {
    /// When it was heard first.
    since: Instant,
    /// When it was heard last.
    last: Instant,
    /// The number of the last message that had been sent when the broker was first asked.
    message: u64,
}

/// The moment at which a client hears something, and which messages it has sent by then.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Moment {
    pub(crate) now: Instant,
    /// The number of the last message that was sent.
    pub(crate) last: u64,
    /// The same number about a second ago.
    pub(crate) earlier: u64,
}

/// The presence of one service. Only the client's line uses it, so nobody waits for the lock.
#[derive(Debug, Default)]
pub(crate) struct Presence(Mutex<Seen>);

/// What was heard of a service.
#[derive(Debug, Default)]
struct Seen {
    /// When an instance was last known, if that is the latest news.
    heard: Option<Instant>,
    /// That there is none, if that is the latest news.
    gone: Option<Gone>,
    /// The number of the last message that had been sent at the last sign of an instance.
    sign: u64,
    /// When the broker was last asked.
    asked: Option<Instant>,
}

impl Presence {
    /// An instance has answered a call in the message with this number, or has reported that it runs it.
    ///
    /// An instance that drains does so too, though it accepts no further calls. So only the answer to a call that was
    /// sent within the last second shows that calls are accepted.
    pub(crate) fn heard(&self, message: u64, moment: Moment) {
        let mut seen = self.seen();
        seen.sign = moment.last;
        if message > moment.earlier && !seen.is_gone(moment.now) {
            (seen.heard, seen.gone) = (Some(moment.now), None);
        }
    }

    /// The broker has said that there is an instance.
    pub(crate) fn is_there(&self, moment: Moment) {
        let mut seen = self.seen();
        (seen.heard, seen.gone, seen.sign) = (Some(moment.now), None, moment.last);
    }

    /// The broker has said that there is no instance. `message` is the last message that had been sent when it was
    /// asked.
    pub(crate) fn is_gone(&self, message: u64, now: Instant) {
        let mut seen = self.seen();
        let known = seen.gone.filter(|gone| is_within(2 * GONE, Some(gone.last), now));
        let gone = known.map_or(Gone { since: now, last: now, message }, |gone| Gone { last: now, ..gone });
        (seen.heard, seen.gone) = (None, Some(gone));
    }

    /// Whether there is no instance, as far as the broker has said lately.
    pub(crate) fn is_absent(&self, now: Instant) -> bool {
        self.seen().is_gone(now)
    }

    /// Whether there was none for so long that no instance can be running a call without having reported it.
    pub(crate) fn is_certainly_absent(&self, now: Instant) -> bool {
        self.seen().is_certainly_gone(now)
    }

    /// Whether the call in this message certainly has nobody who runs it: there is no instance now, there was no sign
    /// of one since the message was sent, and no draining instance can have it.
    pub(crate) fn is_absent_since(&self, message: u64, now: Instant) -> bool {
        let seen = self.seen();
        let left_later = seen.gone.is_some_and(|gone| gone.message < message);
        seen.is_gone(now) && seen.sign < message && (left_later || seen.is_certainly_gone(now))
    }

    /// Whether there was an instance within the last second.
    pub(crate) fn is_fresh(&self, now: Instant) -> bool {
        is_within(FRESH, self.seen().heard, now)
    }

    /// Whether the broker should be asked now about calls that nobody has answered. If so, this counts as asked. If a
    /// drain waits for such a call, it is asked even if other calls were answered.
    pub(crate) fn asks(&self, for_drain: bool, now: Instant) -> bool {
        let mut seen = self.seen();
        let pause = if for_drain || seen.gone.is_some() { PAUSE_GONE } else { PAUSE };
        let is_fresh = !for_drain && is_within(FRESH, seen.heard, now);
        let asks = !is_fresh && !is_within(pause, seen.asked, now);
        if asks {
            seen.asked = Some(now);
        }
        asks
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Seen {
    fn is_gone(&self, now: Instant) -> bool {
        is_within(GONE, self.gone.map(|gone| gone.last), now)
    }

    fn is_certainly_gone(&self, now: Instant) -> bool {
        self.is_gone(now) && self.gone.is_some_and(|gone| now.saturating_duration_since(gone.since) >= CERTAIN)
    }
}

fn is_within(time: Duration, then: Option<Instant>, now: Instant) -> bool {
    then.is_some_and(|then| now.saturating_duration_since(then) < time)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moment(now: Instant, last: u64) -> Moment {
        Moment { now, last, earlier: last - 1 }
    }

    #[test]
    fn a_service_is_asked_about_when_nothing_is_heard_of_it_and_not_too_often() {
        let (presence, start) = (Presence::default(), Instant::now());
        let at = |millis| start + Duration::from_millis(millis);
        assert!(presence.asks(false, at(0)) && !presence.asks(false, at(4999)));
        presence.heard(9, moment(at(4500), 9));
        assert!(presence.is_fresh(at(5499)) && !presence.asks(false, at(5499)));
        assert!(!presence.is_fresh(at(5500)) && presence.asks(false, at(5500)));
        presence.is_gone(7, at(5600));
        assert!(!presence.asks(false, at(5999)) && presence.asks(false, at(6000)));
        presence.is_there(moment(at(6600), 9));
        assert!(!presence.seen().is_gone(at(6600)) && presence.is_fresh(at(6700)));
        assert!(!presence.asks(false, at(6700)) && presence.asks(true, at(6700)), "a drain waits");
    }

    #[test]
    fn what_was_heard_last_is_true_for_a_while() {
        let (presence, start) = (Presence::default(), Instant::now());
        let at = |millis| start + Duration::from_millis(millis);
        assert!(!presence.seen().is_gone(start) && !presence.is_fresh(start), "nothing is known");
        presence.heard(1, moment(start, 1));
        presence.is_gone(7, start);
        assert!(!presence.is_fresh(start) && presence.seen().is_gone(at(1999)));
        assert!(!presence.seen().is_gone(at(2000)), "one may have come");
    }

    #[test]
    fn who_drains_replies_and_is_not_there_nevertheless() {
        let (presence, start) = (Presence::default(), Instant::now());
        let at = |millis| start + Duration::from_millis(millis);
        presence.heard(1, moment(at(0), 9));
        assert!(!presence.is_fresh(at(0)), "the call left long ago");
        presence.is_gone(7, at(100));
        presence.heard(9, moment(at(200), 9));
        assert!(presence.seen().is_gone(at(200)), "the broker knows better");
        for millis in [1100, 2100, 3000] {
            presence.is_gone(7, at(millis));
        }
        assert!(!presence.is_certainly_absent(at(3099)) && presence.is_certainly_absent(at(3100)));
        presence.is_gone(7, at(9000));
        assert!(!presence.is_certainly_absent(at(9000)), "nobody has asked for long");
        presence.heard(10, moment(at(12_000), 10));
        assert!(presence.is_fresh(at(12_000)));
    }

    #[test]
    fn a_call_is_nobodys_if_no_sign_of_anybody_was_seen_since_it_left() {
        let (presence, start) = (Presence::default(), Instant::now());
        presence.heard(1, moment(start, 7));
        presence.is_gone(7, start);
        assert!(!presence.is_absent_since(7, start) && presence.is_absent_since(8, start));
        presence.is_there(moment(start, 8));
        presence.is_gone(8, start);
        assert!(!presence.is_absent_since(8, start));
    }

    #[test]
    fn a_call_that_left_before_anybody_asked_may_run_on_an_instance_that_drains() {
        let (presence, start) = (Presence::default(), Instant::now());
        for seconds in 0..4 {
            let now = start + Duration::from_secs(seconds);
            presence.is_gone(2, now);
            // An instance that runs it would have reported it by then.
            assert_eq!(presence.is_absent_since(2, now), seconds == 3);
            assert!(presence.is_absent_since(3, now));
        }
    }
}
