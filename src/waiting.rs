//! What cannot leave at this moment, each until a time of its own, and which of it leaves first.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use tokio::time::Instant;
use uuid::Uuid;

/// The size in the place of which that counts which keeps its order.
const IN_ORDER: usize = 1024;
/// By how many bits the count of turns is finer than a byte: many may share one.
const FINE: u32 = 16;

/// Entries that wait, each of which is wanted until its time.
///
/// They leave in the order in which they came, with these exceptions:
/// - The more urgent one leaves first.
/// - The smaller one leaves first, unless a larger one would have left by now if all that wait had left byte by byte, in
///   turns.
/// - What keeps its order leaves in that, as if all of it had the same size.
/// - One that has waited for more than half of its time leaves when no other is there. Where more comes than can leave, all
///   would else leave at the end of their time, when it is of no more use to anybody.
#[derive(Debug)]
pub(crate) struct Waiting<T> {
    entries: BTreeMap<Turn, Entry<T>>,
    turns: HashMap<Uuid, Turn>,
    times: BTreeSet<(Instant, Turn)>,
    /// The number of the next entry.
    next: u64,
    /// How many bytes would have left of each that has waited all the time, if they took turns.
    turns_taken: u64,
}

#[derive(Debug)]
struct Entry<T> {
    id: Uuid,
    since: Instant,
    until: Instant,
    bytes: usize,
    keeps_order: bool,
    what: T,
}

/// How an entry stands to the others: the least leaves first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Turn {
    /// Whether it has waited for more than half of its time, and then since when: the last of them leaves first.
    late: Option<std::cmp::Reverse<Instant>>,
    urgency: std::cmp::Reverse<u8>,
    /// It would have left when as many turns were taken.
    after: u64,
    number: u64,
}

/// What decides when an entry leaves.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Weight {
    /// The greater leaves first.
    pub(crate) urgency: u8,
    pub(crate) bytes: usize,
    /// Whether it leaves in the order of all others that do, as events do, however large it is and however long it has waited.
    pub(crate) keeps_order: bool,
}

impl<T> Default for Waiting<T> {
    fn default() -> Self {
        Self { entries: BTreeMap::new(), turns: HashMap::new(), times: BTreeSet::new(), next: 0, turns_taken: 0 }
    }
}

impl<T> Waiting<T> {
    pub(crate) fn push(&mut self, id: Uuid, until: Instant, weight: Weight, what: T) {
        let place = if weight.keeps_order { IN_ORDER } else { weight.bytes };
        let (urgency, after) = (std::cmp::Reverse(weight.urgency), self.turns_taken + ((place as u64) << FINE));
        let turn = Turn { late: None, urgency, after, number: self.next };
        self.next += 1;
        let Weight { bytes, keeps_order, .. } = weight;
        self.put(turn, Entry { id, since: Instant::now(), until, bytes, keeps_order, what });
    }

    fn put(&mut self, turn: Turn, entry: Entry<T>) {
        self.times.insert((entry.until, turn));
        self.turns.insert(entry.id, turn);
        self.entries.insert(turn, entry);
    }

    /// The next to leave.
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

    /// The one of this id, the last if there are several.
    pub(crate) fn remove(&mut self, id: Uuid) -> Option<T> {
        let turn = *self.turns.get(&id)?;
        Some(self.take(turn)?.what)
    }

    /// Gives each entry another time.
    pub(crate) fn retime(&mut self, until: impl Fn(&T) -> Instant) {
        self.times.clear();
        for (turn, entry) in &mut self.entries {
            entry.until = until(&entry.what);
            self.times.insert((entry.until, *turn));
        }
    }

    fn take(&mut self, turn: Turn) -> Option<Entry<T>> {
        let entry = self.entries.remove(&turn)?;
        self.times.remove(&(entry.until, turn));
        if self.turns.get(&entry.id) == Some(&turn) {
            self.turns.remove(&entry.id);
        }
        Some(entry)
    }

    /// When the next one's time is over.
    pub(crate) fn next_end(&self) -> Option<Instant> {
        self.times.first().map(|(until, _)| *until)
    }

    /// One whose time is over.
    pub(crate) fn pop_ended(&mut self, now: Instant) -> Option<T> {
        let (until, turn) = *self.times.first()?;
        if until > now {
            return None;
        }
        Some(self.take(turn)?.what)
    }

    /// Takes out all of them.
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
            // As one comes, one leaves.
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
