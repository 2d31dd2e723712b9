//! Whether a service has an instance, as far as its client has heard.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// For how long it is true that a service has an instance, once that was heard.
const FRESH: Duration = Duration::from_secs(1);
/// For how long it is true that it has none: while calls wait for one, it is asked every second.
const GONE: Duration = Duration::from_secs(2);
/// For how long nobody has to have been there for it to be certain that none runs a call and has not reported that yet:
/// instances do so within two seconds.
const CERTAIN: Duration = Duration::from_secs(3);
/// How long after a question that was answered with yes, or not at all, the next one is asked: each instance gets it.
const PAUSE: Duration = Duration::from_secs(5);
/// The same after one that was answered with no: every look asks.
const PAUSE_GONE: Duration = Duration::from_millis(500);

/// That there is no instance, if that is what was heard last.
#[derive(Debug, Clone, Copy)]
struct Gone {
    since: Instant,
    /// When it was said last.
    last: Instant,
    /// The number of the last message that had left when it was asked first.
    message: u64,
}

/// When a client hears something, and which messages it has sent by then.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Moment {
    pub(crate) now: Instant,
    /// The number of the last message that left.
    pub(crate) last: u64,
    /// The same of a second ago, about.
    pub(crate) earlier: u64,
}

/// Of one service. The client's line is the only one who looks here, so nobody waits for the lock.
#[derive(Debug, Default)]
pub(crate) struct Presence(Mutex<Seen>);

#[derive(Debug, Default)]
struct Seen {
    /// When there was an instance, if that is what was heard last.
    heard: Option<Instant>,
    gone: Option<Gone>,
    /// The number of the last message that had left when there was the last sign of an instance.
    sign: u64,
    asked: Option<Instant>,
}

impl Presence {
    /// An instance replies to a call that left with this message, or reports that it runs it. One that drains does so too,
    /// though it takes no calls any more: so only calls that left a moment ago say that others are taken.
    pub(crate) fn heard(&self, message: u64, moment: Moment) {
        let mut seen = self.seen();
        seen.sign = moment.last;
        if message > moment.earlier && !seen.is_gone(moment.now) {
            (seen.heard, seen.gone) = (Some(moment.now), None);
        }
    }

    /// The broker says that there is an instance.
    pub(crate) fn is_there(&self, moment: Moment) {
        let mut seen = self.seen();
        (seen.heard, seen.gone, seen.sign) = (Some(moment.now), None, moment.last);
    }

    /// The broker says that there is none. It was asked when this message was the last that had left.
    pub(crate) fn is_gone(&self, message: u64, now: Instant) {
        let mut seen = self.seen();
        let known = seen.gone.filter(|gone| is_within(2 * GONE, Some(gone.last), now));
        let gone = known.map_or(Gone { since: now, last: now, message }, |gone| Gone { last: now, ..gone });
        (seen.heard, seen.gone) = (None, Some(gone));
    }

    /// Whether there has been none for so long that none runs a call without having said so.
    pub(crate) fn is_certainly_absent(&self, now: Instant) -> bool {
        self.seen().is_certainly_gone(now)
    }

    /// Whether there was none a moment ago, nor any sign of one since this message left, and none that drains can have it.
    pub(crate) fn is_absent_since(&self, message: u64, now: Instant) -> bool {
        let seen = self.seen();
        let left_later = seen.gone.is_some_and(|gone| gone.message < message);
        seen.is_gone(now) && seen.sign < message && (left_later || seen.is_certainly_gone(now))
    }

    /// Whether there was an instance a moment ago.
    pub(crate) fn is_fresh(&self, now: Instant) -> bool {
        is_within(FRESH, self.seen().heard, now)
    }

    /// Whether the broker is to be asked about calls that nobody has answered; if so, it has been now. Where a drain waits for
    /// such a call, what was heard of others does not matter.
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
            // It would have been reported by then.
            assert_eq!(presence.is_absent_since(2, now), seconds == 3);
            assert!(presence.is_absent_since(3, now));
        }
    }
}
