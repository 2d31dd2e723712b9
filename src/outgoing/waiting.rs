//! Entries that cannot be sent yet: each waits until its own time is over, and a rule decides which is sent first.
//!
//! A client's line keeps calls here that wait for a connection, for a place among the calls in flight, or for room on
//! the way to the broker. A server's task of replies keeps replies here. It does no I/O.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use tokio::time::Instant;
use uuid::Uuid;

/// The size, in bytes, that is assumed for every entry that keeps its order. With its real size, a small entry would be
/// sent before a large one that came earlier.
const IN_ORDER: usize = 1024;
/// By how many bits `turns_taken` is finer than one byte. When many entries wait, each gets only a fraction of a byte
/// for every byte that is sent.
const FINE: u32 = 16;

/// A queue of entries. Each is wanted until its own time.
///
/// Entries are sent in the order in which they came, with these exceptions:
///
/// - A more urgent entry is sent first.
/// - A smaller entry is sent before a larger one. But small entries cannot hold up a large one for ever. Imagine that
///   all entries were sent side by side, one byte of each in turn. No entry is sent later than it would be finished in
///   that case.
/// - Entries that keep their order, such as events, are sent in that order, whatever their sizes.
/// - An entry that has waited for more than half of its time is sent when no other entry is left. Without this rule,
///   every entry would wait almost until its end when there is more to send than the connection carries, and its result
///   would be of no use to anybody.
#[derive(Debug)]
pub(crate) struct Waiting<T> {
    /// All entries. The first one is sent next.
    entries: BTreeMap<Turn, WaitingEntry<T>>,
    /// Finds an entry by its id.
    turns: HashMap<Uuid, Turn>,
    /// Finds the entry whose time is over first.
    times: BTreeSet<(Instant, Turn)>,
    /// The number of the next entry that is pushed.
    next: u64,
    /// How many bytes would have been sent of an entry that has waited since the beginning, if all entries were sent
    /// side by side. In units of 2^-16 bytes.
    turns_taken: u64,
}

/// What is kept of one entry.
#[derive(Debug)]
struct WaitingEntry<T> {
    id: Uuid,
    /// When it was pushed.
    since: Instant,
    /// When nobody wants it any more.
    until: Instant,
    /// Its size, in bytes.
    bytes: usize,
    /// Whether it is sent in the order of arrival, whatever its size and age.
    keeps_order: bool,
    what: T,
}

/// The place of an entry among the others. The smallest is sent first; the fields are compared from the first to the
/// last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Turn {
    /// `None` until the entry has waited for half of its time; then the moment at which that half was over. Such
    /// entries come after all others, the newest first.
    late: Option<std::cmp::Reverse<Instant>>,
    /// Greater urgency comes first.
    urgency: std::cmp::Reverse<u8>,
    /// The value of `turns_taken` at which the entry would have been sent completely.
    after: u64,
    /// The order of arrival. It makes every turn different.
    number: u64,
}

/// What decides when an entry is sent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Weight {
    /// Greater urgency is sent first. 0 is normal; calls use their priority, cancels and signs of life use 255.
    pub(crate) urgency: u8,
    /// The size of the entry, in bytes: smaller is sent first.
    pub(crate) bytes: usize,
    /// Whether the entry is sent in the order of arrival among all others that have this set. Then its size and the
    /// time that it has waited do not count. Events need this.
    pub(crate) keeps_order: bool,
}

impl<T> Default for Waiting<T> {
    fn default() -> Self {
        Self { entries: BTreeMap::new(), turns: HashMap::new(), times: BTreeSet::new(), next: 0, turns_taken: 0 }
    }
}

impl<T> Waiting<T> {
    /// Adds an entry that is wanted until `until`.
    pub(crate) fn push(&mut self, id: Uuid, until: Instant, weight: Weight, what: T) {
        let place = if weight.keeps_order { IN_ORDER } else { weight.bytes };
        let (urgency, after) = (std::cmp::Reverse(weight.urgency), self.turns_taken + ((place as u64) << FINE));
        let turn = Turn { late: None, urgency, after, number: self.next };
        self.next += 1;
        let Weight { bytes, keeps_order, .. } = weight;
        self.put(turn, WaitingEntry { id, since: Instant::now(), until, bytes, keeps_order, what });
    }

    fn put(&mut self, turn: Turn, entry: WaitingEntry<T>) {
        self.times.insert((entry.until, turn));
        self.turns.insert(entry.id, turn);
        self.entries.insert(turn, entry);
    }

    /// Takes out the entry that is to be sent next.
    ///
    /// An entry at the front may have become late since it was pushed. It is then put back with its new turn, and the
    /// next one is looked at.
    pub(crate) fn pop(&mut self, now: Instant) -> Option<T> {
        loop {
            let (&turn, entry) = self.entries.first_key_value()?;
            let half = entry.since + entry.until.saturating_duration_since(entry.since) / 2;
            if turn.late.is_some() || now <= half || entry.keeps_order {
                let entry = self.take(turn)?;
                self.turns_taken += ((entry.bytes as u64) << FINE) / (self.entries.len() as u64 + 1);
                return Some(entry.what);
            }
            let entry = self.take(turn)?;
            self.put(Turn { late: Some(std::cmp::Reverse(half)), ..turn }, entry);
        }
    }

    /// Takes out the entry with this id; the last one if there are several.
    pub(crate) fn remove(&mut self, id: Uuid) -> Option<T> {
        let turn = *self.turns.get(&id)?;
        Some(self.take(turn)?.what)
    }

    /// Gives every entry a new end. A client does this when the broker's alarm begins or ends: calls wait for less time
    /// then.
    pub(crate) fn retime(&mut self, until: impl Fn(&T) -> Instant) {
        self.times.clear();
        for (turn, entry) in &mut self.entries {
            entry.until = until(&entry.what);
            self.times.insert((entry.until, *turn));
        }
    }

    fn take(&mut self, turn: Turn) -> Option<WaitingEntry<T>> {
        let entry = self.entries.remove(&turn)?;
        self.times.remove(&(entry.until, turn));
        if self.turns.get(&entry.id) == Some(&turn) {
            self.turns.remove(&entry.id);
        }
        Some(entry)
    }

    /// When the next entry's time is over: its owner wakes up then and calls [`Waiting::pop_ended`].
    pub(crate) fn next_end(&self) -> Option<Instant> {
        self.times.first().map(|(until, _)| *until)
    }

    /// Takes out an entry whose time is over, if there is one.
    pub(crate) fn pop_ended(&mut self, now: Instant) -> Option<T> {
        let (until, turn) = *self.times.first()?;
        if until > now {
            return None;
        }
        Some(self.take(turn)?.what)
    }

    /// Empties the queue. Returns the entries in the order in which they would have been sent.
    pub(crate) fn clear(&mut self) -> impl Iterator<Item = T> {
        self.turns.clear();
        self.times.clear();
        std::mem::take(&mut self.entries).into_values().map(|entry| entry.what)
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const ANY: Weight = Weight { urgency: 0, bytes: 0, keeps_order: false };

    fn bytes(bytes: usize) -> Weight {
        Weight { bytes, ..ANY }
    }

    fn all<T>(waiting: &mut Waiting<T>, now: Instant) -> Vec<T> {
        std::iter::from_fn(|| waiting.pop(now)).collect()
    }

    #[test]
    fn entries_leave_in_the_order_in_which_they_came_or_when_their_time_is_over() {
        let now = Instant::now();
        let at = |seconds| now + Duration::from_secs(seconds);
        let mut waiting = Waiting::default();
        for (seconds, entry) in [(9, "a"), (1, "b"), (5, "c"), (1, "d")] {
            waiting.push(Uuid::new_v4(), at(seconds), ANY, entry);
        }
        assert_eq!(waiting.next_end(), Some(at(1)));
        assert_eq!(waiting.pop_ended(now), None);
        assert_eq!(
            [waiting.pop_ended(at(1)), waiting.pop_ended(at(1)), waiting.pop_ended(at(1))],
            [Some("b"), Some("d"), None]
        );
        assert_eq!(all(&mut waiting, now), ["a", "c"]);
        assert!(waiting.is_empty() && waiting.next_end().is_none());
    }

    #[test]
    fn an_entry_is_found_by_its_id_and_can_have_another_time() {
        let now = Instant::now();
        let mut waiting = Waiting::default();
        let ids = [Uuid::new_v4(), Uuid::new_v4(), Uuid::new_v4()];
        for (number, id) in ids.into_iter().enumerate() {
            waiting.push(id, now + Duration::from_secs(9), ANY, number);
        }
        assert_eq!([waiting.remove(ids[1]), waiting.remove(ids[1])], [Some(1), None]);
        waiting.retime(|number| now + Duration::from_secs(*number as u64));
        assert_eq!([waiting.pop_ended(now), waiting.pop_ended(now)], [Some(0), None]);
        assert_eq!((waiting.pop(now), waiting.turns.len(), waiting.times.len()), (Some(2), 0, 0));
    }

    #[test]
    fn small_entries_leave_first_until_it_is_a_large_ones_turn() {
        let now = Instant::now();
        let until = now + Duration::from_secs(9);
        let mut waiting = Waiting::default();
        waiting.push(Uuid::new_v4(), until, bytes(1000), 1000);
        let mut order = Vec::new();
        for _ in 0..30 {
            // For each entry that comes, one is sent.
            waiting.push(Uuid::new_v4(), until, bytes(100), 100);
            order.extend(waiting.pop(now));
        }
        let before = order.iter().position(|size| *size == 1000).expect("it is not held up for ever");
        assert_eq!(before, 18, "{order:?}");
    }

    #[test]
    fn a_small_entry_leaves_before_large_ones_that_came_before_it() {
        let now = Instant::now();
        let until = now + Duration::from_secs(9);
        let mut waiting = Waiting::default();
        for number in 0..4 {
            waiting.push(Uuid::new_v4(), until, bytes(64_000), number);
        }
        assert_eq!(waiting.pop(now), Some(0));
        waiting.push(Uuid::new_v4(), until, bytes(100), 9);
        assert_eq!(all(&mut waiting, now), [9, 1, 2, 3]);
    }

    #[test]
    fn what_is_urgent_leaves_first() {
        let (now, mut waiting) = (Instant::now(), Waiting::default());
        for urgency in [0, 3, 9, 3] {
            let weight = Weight { urgency, bytes: 100 * usize::from(urgency), keeps_order: false };
            waiting.push(Uuid::new_v4(), now + Duration::from_secs(9), weight, urgency);
        }
        assert_eq!(all(&mut waiting, now), [9, 3, 3, 0]);
    }

    #[tokio::test(start_paused = true)]
    async fn what_keeps_its_order_does_so_whatever_its_size_and_its_age() {
        let mut waiting = Waiting::default();
        for (number, bytes) in [(0, 20_000), (1, 10), (2, 500), (3, 100_000)] {
            let until = Instant::now() + Duration::from_secs(10 - number);
            waiting.push(Uuid::new_v4(), until, Weight { urgency: 0, bytes, keeps_order: true }, number);
            tokio::time::advance(Duration::from_secs(2)).await;
        }
        assert_eq!(all(&mut waiting, Instant::now()), [0, 1, 2, 3]);
    }

    #[tokio::test(start_paused = true)]
    async fn what_has_waited_for_half_of_its_time_leaves_after_all_others_the_last_first() {
        let mut waiting = Waiting::default();
        for number in 0..4 {
            waiting.push(Uuid::new_v4(), Instant::now() + Duration::from_secs(10), ANY, number);
            tokio::time::advance(Duration::from_secs(2)).await;
        }
        // They have waited for 8, 6, 4 and 2 s.
        let ids = waiting.turns.len();
        assert_eq!(all(&mut waiting, Instant::now()), [2, 3, 1, 0]);
        assert_eq!((ids, waiting.turns.len(), waiting.times.len()), (4, 0, 0));
    }
}
