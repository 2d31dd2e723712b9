//! How many bytes may be on their way to the broker at once: as many as the connection carries without making them wait
//! there, where nothing can be taken back. What is over it waits here, and can be.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

/// How long what is handed over may wait on its way, on top of the shortest round trip: with less, a connection whose
/// speed changes is idle at times; with more, everything comes later.
const QUEUEING: Duration = Duration::from_millis(100);
/// What a window is at first, at least and at most, in bytes. A message may always leave when none is on its way.
const FIRST: usize = 64 * 1024;
const LEAST: usize = 4 * 1024;
const MOST: usize = 16 * 1024 * 1024;
/// How many bytes a message takes up around its body, about.
const AROUND: usize = 200;
/// The shortest round trip is measured again when it has not been seen for so long: the way may be another one. The latter
/// holds where it seems to be.
const STALE: Duration = Duration::from_secs(30);
const DOUBTFUL: Duration = Duration::from_secs(3);

/// The bytes on their way, which are those of messages after the last that is known to have arrived.
///
/// That a message has arrived is known by the broker's confirm of it or of a later one. But a queue may take its time over
/// a confirm. So a *probe* follows what fills the window: a message to nobody, which the broker confirms as soon as it
/// reads it. The time that it takes says how fast the connection is, and the window grows or shrinks to what that carries
/// within the shortest round trip and [`QUEUEING`].
#[derive(Debug)]
pub(crate) struct Window {
    size: usize,
    away: VecDeque<Away>,
    sent: u64,
    arrived: u64,
    /// The number of the probe that is on its way.
    probe: Option<u64>,
    /// Whether something was held back since the last probe left.
    full: bool,
    /// The shortest round trip, and when it was last seen.
    shortest: Option<(Duration, Instant)>,
    /// Whether nothing is to leave until all has arrived: what is alone shows the shortest round trip.
    emptying: bool,
}

#[derive(Debug)]
struct Away {
    number: u64,
    /// How many bytes had been sent with it.
    end: u64,
    at: Instant,
    /// How many were on their way then, its own included.
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
        }
    }
}

impl Window {
    /// How many bytes may leave; none while there is no room. One message may be larger. A little room is none: else each
    /// message would take one call, when the next might share it.
    pub(crate) fn room(&self) -> usize {
        match self.on_the_way() {
            0 => self.size,
            _ if self.emptying => 0,
            bytes => Some(self.size.saturating_sub(bytes)).filter(|room| *room >= self.size / 8).unwrap_or(0),
        }
    }

    fn on_the_way(&self) -> usize {
        (self.sent - self.arrived) as usize
    }

    /// Something is held back, since there is no room.
    pub(crate) fn hold(&mut self) {
        self.full = true;
    }

    /// Whether a probe is to leave now, before what else leaves.
    pub(crate) fn is_to_probe(&self, now: Instant) -> bool {
        let is_stale = || self.shortest.is_none_or(|(_, seen)| now.saturating_duration_since(seen) > STALE);
        self.probe.is_none() && (self.full || self.away.is_empty() && is_stale())
    }

    /// A message has left: each has a greater number than the one before.
    pub(crate) fn sent(&mut self, number: u64, bytes: usize, now: Instant) {
        self.sent += (bytes + AROUND) as u64;
        self.away.push_back(Away { number, end: self.sent, at: now, on_the_way: self.on_the_way() });
    }

    /// A probe has left.
    pub(crate) fn probed(&mut self, number: u64, now: Instant) {
        self.sent(number, 0, now);
        self.probe = Some(number);
        self.full = false;
    }

    /// The broker has said something of a message, and so has read it and all before it.
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
            (self.emptying, self.shortest) = (false, None);
        }
    }

    /// The shortest round trip that is known.
    pub(crate) fn round_trip(&self) -> Duration {
        self.shortest.map_or(Duration::ZERO, |(shortest, _)| shortest)
    }

    /// Whether a message has arrived, for all that is known.
    pub(crate) fn has_arrived(&self, number: u64) -> bool {
        self.away.front().is_none_or(|first| first.number > number)
    }

    /// Since when the first of what is on its way is, if anything is.
    pub(crate) fn waits_since(&self) -> Option<Instant> {
        self.away.front().map(|first| first.at)
    }

    /// Since when the probe is on its way, if one is.
    pub(crate) fn probing_since(&self) -> Option<Instant> {
        let probe = self.probe?;
        self.away.iter().rev().find(|away| away.number == probe).map(|away| away.at)
    }

    /// A probe took so long, behind so many bytes.
    fn measured(&mut self, took: Duration, bytes: usize, now: Instant) {
        let Some((shortest, seen)) = self.shortest else {
            self.shortest = Some((took, now));
            return;
        };
        let allowed = shortest.min(took) + QUEUEING;
        // What was on its way arrived in this time: so much arrives in the time that is allowed.
        let carries = (bytes as f64 * allowed.as_secs_f64() / took.as_secs_f64().max(1e-6)) as usize;
        self.size = if took > allowed {
            carries.clamp(self.size / 4, self.size).max(LEAST)
        } else if !self.full {
            self.size
        } else if took <= shortest + QUEUEING / 4 {
            // Far from all that it carries: where the way is long, the rest would take its time.
            (self.size * 2).min(MOST)
        } else {
            carries.clamp(self.size, self.size * 2).min(MOST)
        };
        let unseen = now.saturating_duration_since(seen);
        // Where next to nothing is on the way, and takes long nevertheless, the way has become longer.
        let is_doubtful = took > allowed && self.size == LEAST && unseen > DOUBTFUL;
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
        /// What is on its way, and when its confirm comes; not at all for what a queue does not confirm.
        confirms: VecDeque<(u64, Instant)>,
        confirmed: bool,
        delivered: usize,
        /// The longest that something has waited on the way, for less than the round trip.
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

        /// Sends messages of this size for so long, as many as may leave, and gives the part of the link's rate that they
        /// took up.
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
}
