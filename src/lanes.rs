//! Which queues take what they get: a queue that does not answer is to hold up no other.
//!
//! RabbitMQ stops reading a connection that has published 32 messages to a quorum queue that does not confirm them, or 400 to
//! a classic queue. What follows them then waits, wherever it is to go. So no more is sent to where nothing is confirmed.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::Duration;

use tokio::time::Instant;

/// How many messages of a lane may be unconfirmed when the broker confirms none.
const MOST: usize = 30;
/// For how long it may confirm none, on top of a round trip.
const PATIENCE: Duration = Duration::from_millis(50);

/// Where a message goes: those that go to the same queue share a lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Lane(u64);

impl Lane {
    pub(crate) fn of(queue: impl Hash) -> Self {
        let mut hasher = DefaultHasher::new();
        queue.hash(&mut hasher);
        Self(hasher.finish())
    }
}

/// The lanes in which messages are on their way.
#[derive(Debug, Default)]
pub(crate) struct Lanes(HashMap<Lane, Traffic>);

#[derive(Debug)]
struct Traffic {
    unconfirmed: usize,
    /// When the broker last confirmed something, or the first was sent.
    progress: Instant,
}

impl Lanes {
    pub(crate) fn sent(&mut self, lane: Lane, now: Instant) {
        self.0.entry(lane).or_insert(Traffic { unconfirmed: 0, progress: now }).unconfirmed += 1;
    }

    /// The broker has said what became of a message.
    pub(crate) fn concluded(&mut self, lane: Lane, now: Instant) {
        let Some(traffic) = self.0.get_mut(&lane) else { return };
        (traffic.unconfirmed, traffic.progress) = (traffic.unconfirmed - 1, now);
        if traffic.unconfirmed == 0 {
            self.0.remove(&lane);
        }
    }

    /// Whether a lane is to get nothing more for now.
    pub(crate) fn is_stuck(&self, lane: Lane, round_trip: Duration, now: Instant) -> bool {
        self.0
            .get(&lane)
            .is_some_and(|traffic| traffic.unconfirmed >= MOST && traffic.progress + round_trip + PATIENCE < now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lane_is_stuck_when_it_has_much_unconfirmed_and_nothing_is_confirmed() {
        let (mut lanes, now, round_trip) = (Lanes::default(), Instant::now(), Duration::from_millis(5));
        let [one, other] = ["one", "other"].map(Lane::of);
        for _ in 1..MOST {
            lanes.sent(one, now);
        }
        let later = now + PATIENCE + 2 * round_trip;
        assert!(!lanes.is_stuck(one, round_trip, later), "one more may leave");
        lanes.sent(one, later);
        assert!(lanes.is_stuck(one, round_trip, later) && !lanes.is_stuck(other, round_trip, later));
        assert!(!lanes.is_stuck(one, round_trip, now), "it has had no time");
        assert!(!lanes.is_stuck(one, PATIENCE, later), "its broker is far away");
        lanes.sent(one, later);
        lanes.concluded(one, later);
        assert!(!lanes.is_stuck(one, round_trip, later), "it goes on");
        assert!(lanes.is_stuck(one, round_trip, later + PATIENCE + 2 * round_trip));
        for _ in 0..MOST {
            lanes.concluded(one, later);
        }
        assert!(lanes.0.is_empty());
    }
}
