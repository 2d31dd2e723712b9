//! The window: how many bytes may be on their way to the broker at once.
//!
//! Bytes that were given to a socket cannot be taken back, even if their caller gives up. So a client's line and a
//! server's task of replies give the socket only as many bytes as the connection carries without a queue of its own.
//! Everything else waits in [`Waiting`](crate::outgoing::Waiting), where it can still be dropped or overtaken.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

/// How long a message may wait on its way, in addition to the shortest round trip. With less, a connection whose speed
/// changes would be idle at times. With more, every message would arrive later.
const QUEUEING: Duration = Duration::from_millis(100);
/// The size of a new window, in bytes.
const FIRST: usize = 64 * 1024;
/// The smallest size of a window, in bytes. When nothing is on its way, a message of any size may be sent.
const LEAST: usize = 4 * 1024;
/// The largest size of a window, in bytes.
const MOST: usize = 16 * 1024 * 1024;
/// About how many bytes a message needs around its body: AMQP's frames, its properties and the names of exchange and
/// key.
pub(crate) const AROUND: usize = 200;
/// The shortest round trip is measured again when it was not seen for this long, since the route may have changed.
const STALE: Duration = Duration::from_secs(30);
/// The same at first, when the measured times already suggest that the route has become longer. Each time that it has
/// not, it is doubled, up to [`STALE`].
const DOUBTFUL: Duration = Duration::from_secs(3);

/// The bytes on their way: those of all messages after the last one that is known to have arrived.
///
/// The broker reads a connection in order. So a message has arrived when the broker has confirmed it or a later one.
/// But a queue may take long to confirm. That is why a *probe* is sent when the window is full: a message to nobody,
/// which the broker confirms as soon as it reads it. The time until its confirm tells how fast the connection is. The
/// window then grows or shrinks to the number of bytes that arrive within the shortest round trip plus [`QUEUEING`].
#[derive(Debug)]
pub(crate) struct Window {
    /// How many bytes may be on their way.
    size: usize,
    /// The messages on their way, in the order in which they were sent.
    away: VecDeque<InTransit>,
    /// How many bytes have been sent on this connection in all.
    sent: u64,
    /// How many of these are known to have arrived.
    arrived: u64,
    /// The number of the probe that is on its way. There is at most one.
    probe: Option<u64>,
    /// Whether something had to wait for room since the last probe was sent.
    full: bool,
    /// The shortest round trip, and when one about as short was last seen.
    shortest: Option<(Duration, Instant)>,
    /// Whether nothing is sent until everything has arrived. A probe that is alone on its way then shows the shortest
    /// round trip.
    emptying: bool,
    /// The shortest round trip before the window was emptied, until it is measured again.
    doubted: Option<Duration>,
    /// For how long the shortest round trip is not doubted, although it was not seen.
    trust: Duration,
}

/// A message on its way.
#[derive(Debug)]
struct InTransit {
    /// The number that its sender gave it.
    number: u64,
    /// The value of [`Window::sent`] after this message: once it has arrived, so have all these bytes.
    end: u64,
    /// When it was sent.
    at: Instant,
    /// How many bytes were on their way at that moment, with its own.
    on_the_way: usize,
}

impl Default for Window {
    fn default() -> Self {
        Self {
            size: FIRST,
            away: VecDeque::new(),
            sent: 0,
            arrived: 0,
            probe: None,
            full: false,
            shortest: None,
            emptying: false,
            doubted: None,
            trust: DOUBTFUL,
        }
    }
}

impl Window {
    /// How many bytes may be sent now; 0 when there is no room. When nothing is on its way, a larger message may be
    /// sent as well.
    ///
    /// A little room counts as none. Otherwise each confirm would make room for one call, which would be sent in a
    /// message of its own, though it could share the next one.
    pub(crate) fn room(&self) -> usize {
        Some(self.rest()).filter(|room| *room >= self.size / 8).unwrap_or(0)
    }

    /// The same for messages that follow others at once: a little room is used up, too.
    pub(crate) fn rest(&self) -> usize {
        match self.on_the_way() {
            0 => self.size,
            _ if self.emptying => 0,
            bytes => self.size.saturating_sub(bytes),
        }
    }

    fn on_the_way(&self) -> usize {
        (self.sent - self.arrived) as usize
    }

    /// Notes that something has to wait, since there is no room. This causes the next probe.
    pub(crate) fn hold(&mut self) {
        self.full = true;
    }

    /// Whether a probe is to be sent now, before anything else.
    pub(crate) fn is_to_probe(&self, now: Instant) -> bool {
        let is_stale = || self.shortest.is_none_or(|(_, seen)| now.saturating_duration_since(seen) > STALE);
        self.probe.is_none() && (self.full || self.away.is_empty() && is_stale())
    }

    /// Notes that a message of `bytes` was sent. Each has a greater `number` than the one before.
    pub(crate) fn sent(&mut self, number: u64, bytes: usize, now: Instant) {
        self.sent += (bytes + AROUND) as u64;
        self.away.push_back(InTransit { number, end: self.sent, at: now, on_the_way: self.on_the_way() });
    }

    /// Notes that a probe was sent.
    pub(crate) fn probed(&mut self, number: u64, now: Instant) {
        self.sent(number, 0, now);
        self.probe = Some(number);
        self.full = false;
    }

    /// Notes that the broker has said something of a message: it has read this one, and all before it.
    pub(crate) fn arrived(&mut self, number: u64, now: Instant) {
        let count = self.away.partition_point(|away| away.number <= number);
        let probe = self.probe.take_if(|probe| *probe <= number);
        let Some(last) = count.checked_sub(1).and_then(|last| self.away.get(last)) else { return };
        self.arrived = last.end;
        let took = now.saturating_duration_since(last.at);
        if let Some(probe) = self.away.iter().find(|away| Some(away.number) == probe) {
            self.measured(now.saturating_duration_since(probe.at), probe.on_the_way, now);
        }
        self.away.drain(..count);
        if let Some((shortest, seen)) = &mut self.shortest
            && is_short(took, *shortest)
        {
            (*shortest, *seen) = (took.min(*shortest), now);
        }
        if self.emptying && self.away.is_empty() {
            self.emptying = false;
            self.doubted = self.shortest.take().map(|(shortest, _)| shortest);
        }
    }

    /// The shortest known round trip; 0 before the first measurement.
    pub(crate) fn round_trip(&self) -> Duration {
        self.shortest.map_or(Duration::ZERO, |(shortest, _)| shortest)
    }

    /// Whether a message is known to have arrived.
    pub(crate) fn has_arrived(&self, number: u64) -> bool {
        self.away.front().is_none_or(|first| first.number > number)
    }

    /// When the oldest message on its way was sent.
    pub(crate) fn waits_since(&self) -> Option<Instant> {
        self.away.front().map(|first| first.at)
    }

    /// When the probe on its way was sent. If that was long ago, something is wrong with the broker or the connection.
    pub(crate) fn probing_since(&self) -> Option<Instant> {
        let probe = self.probe?;
        self.away.iter().rev().find(|away| away.number == probe).map(|away| away.at)
    }

    /// Uses the measurement of a probe: it was confirmed after `took`, and `bytes` were on their way when it was sent.
    fn measured(&mut self, took: Duration, bytes: usize, now: Instant) {
        let Some((shortest, seen)) = self.shortest else {
            let is_as_before = self.doubted.take().is_some_and(|before| is_short(took, before));
            self.trust = if is_as_before { (self.trust * 2).min(STALE) } else { DOUBTFUL };
            self.shortest = Some((took, now));
            return;
        };
        let allowed = shortest.min(took) + QUEUEING;
        // `bytes` arrived within `took`. So this many arrive within the time that is allowed.
        let carries = (bytes as f64 * allowed.as_secs_f64() / took.as_secs_f64().max(1e-6)) as usize;
        self.size = if took > allowed {
            carries.clamp(self.size / 4, self.size).max(LEAST)
        } else if !self.full {
            self.size
        } else if took <= shortest + QUEUEING / 4 {
            // Almost nothing waits on the way, so the connection carries much more. On a long route, growing in smaller
            // steps would take too much time.
            (self.size * 2).min(MOST)
        } else {
            carries.clamp(self.size, self.size * 2).min(MOST)
        };
        let unseen = now.saturating_duration_since(seen);
        // The window has become smaller, and the probe still takes too long: perhaps the route has become longer. Or
        // nothing else was on the way, and it takes long.
        let is_alone = bytes <= AROUND && !is_short(took, shortest);
        let is_doubtful = (took > allowed || is_alone) && unseen > self.trust;
        self.emptying = is_doubtful || !is_short(took, shortest) && unseen > STALE;
    }
}

/// Whether a round trip is about as short as the shortest.
fn is_short(took: Duration, shortest: Duration) -> bool {
    took <= shortest + shortest / 4
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A link that carries one message after the other, and a sender that always has more to send.
    struct Link {
        window: Window,
        now: Instant,
        number: u64,
        /// Bytes a second.
        rate: f64,
        round_trip: Duration,
        free_at: Instant,
        /// The messages whose confirms will come, with the time of each. A queue that confirms nothing adds none.
        confirms: VecDeque<(u64, Instant)>,
        confirmed: bool,
        delivered: usize,
        /// The longest time that a message has waited on the link, without the round trip.
        waited: Duration,
    }

    impl Link {
        fn new(rate: f64, round_trip: Duration) -> Self {
            let now = Instant::now();
            Self {
                window: Window::default(),
                now,
                number: 0,
                rate,
                round_trip,
                free_at: now,
                confirms: VecDeque::new(),
                confirmed: true,
                delivered: 0,
                waited: Duration::ZERO,
            }
        }

        fn leave(&mut self, bytes: usize, probe: bool) {
            self.number += 1;
            let bytes = if probe { 0 } else { bytes };
            let around = Duration::from_secs_f64((bytes + AROUND) as f64 / self.rate);
            self.free_at = self.free_at.max(self.now) + around;
            self.waited = self.waited.max(self.free_at - self.now);
            if probe {
                self.window.probed(self.number, self.now);
            } else {
                self.window.sent(self.number, bytes, self.now);
                self.delivered += bytes + AROUND;
            }
            if probe || self.confirmed {
                self.confirms.push_back((self.number, self.free_at + self.round_trip));
            }
        }

        /// Sends messages of `size` bytes for `time`, as many as the window allows. Returns how much of the link's rate
        /// they used.
        fn run(&mut self, time: Duration, size: usize) -> f64 {
            let (until, before) = (self.now + time, self.delivered);
            self.waited = Duration::ZERO;
            loop {
                if self.window.is_to_probe(self.now) {
                    self.leave(100, true);
                }
                while self.window.room() > 0 {
                    self.leave(size, false);
                }
                self.window.hold();
                if self.window.is_to_probe(self.now) {
                    self.leave(100, true);
                }
                let (number, at) = self.confirms.pop_front().expect("a probe at least is on its way");
                if at > until {
                    self.confirms.push_front((number, at));
                    self.now = until;
                    return (self.delivered - before) as f64 / (time.as_secs_f64() * self.rate);
                }
                self.now = at;
                self.window.arrived(number, at);
            }
        }
    }

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_slow_link_is_kept_busy_and_little_waits_on_it() {
        for (rate, milliseconds, size) in [(125e3, 100, 1000), (125e3, 2, 4000), (1.25e6, 300, 1000), (1e4, 100, 500)] {
            let mut link = Link::new(rate, Duration::from_millis(milliseconds));
            link.run(20 * SECOND, size);
            let used = link.run(20 * SECOND, size);
            // The probes take up some of it.
            assert!(used > 0.8, "{rate} {milliseconds}: {used}");
            let most = QUEUEING * 2 + link.round_trip + Duration::from_secs_f64((size + LEAST) as f64 / rate);
            assert!(link.waited < most, "{rate} {milliseconds}: {:?}", link.waited);
        }
    }

    #[test]
    fn a_fast_link_is_not_held_up() {
        let mut link = Link::new(1e8, Duration::from_micros(300));
        link.run(SECOND / 10, 10_000);
        let used = link.run(SECOND, 10_000);
        assert!(used > 0.9, "{used}");
        assert!(link.window.size <= MOST);
    }

    #[test]
    fn what_changes_on_the_way_is_noticed() {
        let mut link = Link::new(1.25e6, Duration::from_millis(10));
        link.run(10 * SECOND, 1000);
        link.rate = 125e3;
        link.run(5 * SECOND, 1000);
        let used = link.run(10 * SECOND, 1000);
        assert!(used > 0.9 && link.waited < 3 * QUEUEING, "slower: {used} {:?}", link.waited);
        link.rate = 1.25e6;
        link.run(5 * SECOND, 1000);
        let used = link.run(10 * SECOND, 1000);
        assert!(used > 0.9, "faster: {used}");
        link.round_trip = 10 * QUEUEING;
        link.run(10 * SECOND, 1000);
        let used = link.run(STALE, 1000);
        assert!(used > 0.7, "farther: {used}");
    }

    #[test]
    fn a_route_that_has_become_longer_is_noticed_whatever_the_size_of_the_messages() {
        for size in (250..=8000).step_by(250) {
            for milliseconds in [20, 50, 100, 150, 200, 400] {
                let mut link = Link::new(125e3, Duration::from_millis(1));
                link.run(SECOND, size);
                link.round_trip = Duration::from_millis(milliseconds);
                link.run(2 * DOUBTFUL, size);
                let used = link.run(10 * SECOND, size);
                assert!(used > 0.75, "{size} bytes, {milliseconds} ms: {used} {:?}", link.window);
            }
        }
    }

    #[test]
    fn a_queue_that_confirms_nothing_holds_nobody_up() {
        let mut link = Link::new(1.25e6, Duration::from_millis(10));
        link.run(10 * SECOND, 1000);
        link.confirmed = false;
        link.run(SECOND, 1000);
        let used = link.run(20 * SECOND, 1000);
        assert!(used > 0.5, "{used}");
        assert!(link.window.away.len() < 1000, "{}", link.window.away.len());
    }

    #[test]
    fn a_message_may_leave_when_none_is_on_its_way_and_nothing_is_asked_while_there_is_room() {
        let (mut window, now) = (Window::default(), Instant::now());
        assert!(window.is_to_probe(now), "the first one");
        window.probed(1, now);
        window.sent(2, 100 * FIRST, now);
        assert_eq!(window.room(), 0);
        assert!(!window.has_arrived(2));
        window.arrived(2, now + SECOND / 10);
        assert!(window.room() == FIRST && window.has_arrived(2) && window.probing_since().is_none());
        window.probed(3, now);
        window.arrived(3, now + SECOND / 10);
        window.sent(4, FIRST / 2, now);
        assert!(!window.is_to_probe(now + SECOND));
        window.arrived(4, now + SECOND);
        assert!(window.is_to_probe(now + 2 * STALE));
    }

    #[test]
    fn a_route_that_has_become_as_much_longer_as_may_be_queued_is_measured_again() {
        let (mut window, mut now, mut number) = (Window::default(), Instant::now(), 0);
        let mut lone_probe = |window: &mut Window, took: Duration| {
            number += 1;
            window.probed(number, now);
            now += took;
            window.hold();
            window.arrived(number, now);
        };
        lone_probe(&mut window, Duration::from_millis(1));
        // Nothing else is on the way, so these show the route, although each takes no longer than may be.
        for _ in 0..50 {
            lone_probe(&mut window, QUEUEING);
        }
        assert_eq!(window.round_trip(), QUEUEING);
    }
}
