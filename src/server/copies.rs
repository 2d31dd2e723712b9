//! Copies: while a server moves to another connection, its own queues are bound over both. A call or event arrives
//! twice then, and one of the two is dropped.

use std::collections::HashMap;

use uuid::Uuid;

use crate::frame::Kind;

/// What has arrived over one of two connections and not yet over the other.
#[derive(Debug)]
pub(super) struct Copies {
    /// The number of the connection that the server moves from.
    old: u64,
    /// The number of the connection that it moves to.
    new: u64,
    /// How many more times a frame has arrived over the old connection than over the new one.
    ahead: HashMap<(Kind, Uuid), i64>,
    /// Whether nothing more arrives over one of the two.
    one_is_left: bool,
    /// The connection that will be left, and the id of the last frame that arrives over it.
    last: Option<(u64, Uuid)>,
}

impl Copies {
    /// From now on, everything may arrive over both connections.
    pub(super) fn of(old: u64, new: u64) -> Self {
        Self { old, new, ahead: HashMap::new(), one_is_left: false, last: None }
    }

    /// Whether this frame has arrived before over the other connection.
    pub(super) fn is_copy(&mut self, connection: u64, kind: Kind, id: Uuid) -> bool {
        let step = match connection {
            connection if connection == self.old => 1,
            connection if connection == self.new => -1,
            // This is a connection of an earlier move that was given up. Everything arrives over the old connection,
            // too.
            connection => return (self.old..self.new).contains(&connection),
        };
        let ahead = self.ahead.get(&(kind, id)).copied().unwrap_or_default();
        let is_copy = ahead * step < 0;
        if ahead + step == 0 {
            self.ahead.remove(&(kind, id));
        } else if is_copy || !self.one_is_left {
            self.ahead.insert((kind, id), ahead + step);
        }
        is_copy
    }

    /// When a frame with this id arrives, nothing more arrives over this connection through an exchange.
    pub(super) fn is_left_after(&mut self, id: Uuid, connection: u64) {
        self.last = Some((connection, id));
    }

    /// Whether this is that frame.
    pub(super) fn is_last(&mut self, id: Uuid) -> bool {
        let Some((connection, _)) = self.last.take_if(|(_, last)| *last == id) else { return false };
        self.is_left(connection);
        true
    }

    /// How many copies are still to come.
    #[cfg(test)]
    pub(super) fn awaited(&self) -> usize {
        self.ahead.len()
    }

    /// Nothing more comes over this connection: of what has come over the other one alone, there is no copy.
    pub(super) fn is_left(&mut self, connection: u64) {
        if connection == self.old {
            self.ahead.retain(|_, ahead| *ahead > 0);
        } else if connection == self.new {
            self.ahead.retain(|_, ahead| *ahead < 0);
        } else {
            return;
        }
        self.one_is_left = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: u64 = 1;
    const NEW: u64 = 2;

    #[test]
    fn of_two_copies_the_one_that_comes_later_is_known_as_one() {
        let [one, two] = [Uuid::from_u128(1), Uuid::from_u128(2)];
        let mut copies = Copies::of(OLD, NEW);
        let mut is_copy = |by, id| copies.is_copy(by, Kind::Request, id);
        assert!(!is_copy(OLD, one) && is_copy(NEW, one));
        assert!(!is_copy(NEW, two) && is_copy(OLD, two));
        // A frame that is sent twice runs twice, whichever of its copies arrive first.
        assert!(!is_copy(OLD, one) && !is_copy(OLD, one));
        assert!(is_copy(NEW, one) && is_copy(NEW, one) && !is_copy(NEW, one));
        assert!(is_copy(OLD, one) && !is_copy(OLD, one));
        // A cancel has the same id as its call.
        assert!(!copies.is_copy(NEW, Kind::Cancel, one));
    }

    #[test]
    fn once_the_old_connection_is_left_nothing_more_is_noted() {
        let id = Uuid::from_u128;
        let mut copies = Copies::of(OLD, NEW);
        assert!(!copies.is_copy(OLD, Kind::Event, id(1)) && !copies.is_copy(NEW, Kind::Event, id(2)));
        copies.is_left(OLD);
        assert!(copies.is_copy(NEW, Kind::Event, id(1)));
        for _ in 0..2 {
            assert!(!copies.is_copy(NEW, Kind::Event, id(1)) && !copies.is_copy(NEW, Kind::Event, id(3)));
        }
        assert!(copies.ahead.is_empty());
    }

    #[test]
    fn once_a_move_is_given_up_what_has_come_over_the_new_connection_alone_is_still_known() {
        let id = Uuid::from_u128;
        let mut copies = Copies::of(OLD, NEW);
        assert!(!copies.is_copy(NEW, Kind::Oneway, id(1)) && !copies.is_copy(OLD, Kind::Oneway, id(2)));
        copies.is_left(NEW);
        assert!(copies.is_copy(OLD, Kind::Oneway, id(1)));
        for _ in 0..2 {
            assert!(!copies.is_copy(OLD, Kind::Oneway, id(1)) && !copies.is_copy(OLD, Kind::Oneway, id(3)));
        }
        assert!(copies.ahead.is_empty());
    }

    #[test]
    fn what_an_earlier_move_leaves_late_has_no_say_about_the_next_one() {
        let (later, id) = (NEW + 1, Uuid::from_u128(1));
        let mut copies = Copies::of(OLD, later);
        assert!(!copies.is_copy(later, Kind::Oneway, id));
        copies.is_left(NEW);
        assert!(copies.is_copy(NEW, Kind::Oneway, id), "it comes over the old connection, too");
        assert!(copies.is_copy(OLD, Kind::Oneway, id));
        assert!(!copies.is_copy(OLD, Kind::Oneway, id) && copies.is_copy(later, Kind::Oneway, id));
        // A later connection has nothing to do with them.
        assert!(!copies.is_copy(later + 1, Kind::Oneway, id) && copies.ahead.is_empty());
    }
}
