//! Which queues do not confirm what they are sent, so that one such queue does not hold up all others.
//!
//! RabbitMQ stops reading from a connection when too many of its messages are unconfirmed: 32 to a quorum queue, 400 to
//! a classic queue. Everything that is sent on this connection then waits, whichever queue it goes to. So a client's
//! line and a server's task of replies send nothing more to a queue before that happens.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::Duration;

use tokio::time::Instant;

/// How many unconfirmed messages a queue may have. It gets more only if it has confirmed something lately.
const MOST: usize = 30;
/// How long a queue may confirm nothing, in addition to one round trip, before it counts as stuck.
const PATIENCE: Duration = Duration::from_millis(50);

/// The messages that go to the same queue. It is a hash of whatever names the queue.
///
/// Two queues with the same hash would count as one. That does no harm: at worst, one of them waits for the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Lane(u64);

impl Lane {
    /// The lane of a queue. `queue` is anything that is the same for all messages to it, such as its name.
    pub(crate) fn of(queue: impl Hash) -> Self {
        let mut hasher = DefaultHasher::new();
        queue.hash(&mut hasher);
        Self(hasher.finish())
    }
}

/// The lanes with unconfirmed messages.
#[derive(Debug, Default)]
pub(crate) struct Lanes(HashMap<Lane, LaneTraffic>);

/// What is known of the unconfirmed messages of one lane.
#[derive(Debug)]
struct LaneTraffic {
    /// How many messages are unconfirmed, at least 1.
    unconfirmed: usize,
    /// When the broker last confirmed one of its messages. Before the first confirm: when the first message was sent.
    progress: Instant,
}

impl Lanes {
    /// Notes that a message was sent on a lane.
    pub(crate) fn sent(&mut self, lane: Lane, now: Instant) {
        self.0.entry(lane).or_insert(LaneTraffic { unconfirmed: 0, progress: now }).unconfirmed += 1;
    }

    /// Notes that the broker has told what became of a message: it was confirmed, returned or refused, or it was lost.
    pub(crate) fn concluded(&mut self, lane: Lane, now: Instant) {
        let Some(traffic) = self.0.get_mut(&lane) else { return };
        (traffic.unconfirmed, traffic.progress) = (traffic.unconfirmed - 1, now);
        if traffic.unconfirmed == 0 {
            self.0.remove(&lane);
        }
    }

    /// Whether nothing more is to be sent on a lane for now. `round_trip` is the shortest known time to the broker and
    /// back.
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
