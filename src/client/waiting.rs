//! What cannot leave at this moment, in the order in which it came, each until a time of its own.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use tokio::time::Instant;
use uuid::Uuid;

/// Entries in the order in which they came; each is wanted until its time.
#[derive(Debug)]
pub(super) struct Waiting<T> {
    entries: BTreeMap<u64, (Instant, Uuid, T)>,
    numbers: HashMap<Uuid, u64>,
    times: BTreeSet<(Instant, u64)>,
    /// The number of the next entry.
    next: u64,
}

impl<T> Default for Waiting<T> {
    fn default() -> Self {
        Self { entries: BTreeMap::new(), numbers: HashMap::new(), times: BTreeSet::new(), next: 0 }
    }
}

impl<T> Waiting<T> {
    pub(super) fn push(&mut self, id: Uuid, until: Instant, entry: T) {
        self.times.insert((until, self.next));
        self.numbers.insert(id, self.next);
        self.entries.insert(self.next, (until, id, entry));
        self.next += 1;
    }

    /// The one that has waited longest.
    pub(super) fn pop(&mut self) -> Option<T> {
        let number = *self.entries.first_key_value()?.0;
        self.take(number)
    }

    /// The one of this id, the last if there are several.
    pub(super) fn remove(&mut self, id: Uuid) -> Option<T> {
        let number = *self.numbers.get(&id)?;
        self.take(number)
    }

    /// Gives each entry another time.
    pub(super) fn retime(&mut self, until: impl Fn(&T) -> Instant) {
        self.times.clear();
        for (number, (time, _, entry)) in &mut self.entries {
            *time = until(entry);
            self.times.insert((*time, *number));
        }
    }

    fn take(&mut self, number: u64) -> Option<T> {
        let (until, id, entry) = self.entries.remove(&number)?;
        self.times.remove(&(until, number));
        if self.numbers.get(&id) == Some(&number) {
            self.numbers.remove(&id);
        }
        Some(entry)
    }

    /// When the next one's time is over.
    pub(super) fn next_end(&self) -> Option<Instant> {
        self.times.first().map(|(until, _)| *until)
    }

    /// One whose time is over.
    pub(super) fn pop_ended(&mut self, now: Instant) -> Option<T> {
        let (until, number) = *self.times.first()?;
        if until > now {
            return None;
        }
        self.take(number)
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn entries_leave_in_the_order_in_which_they_came_or_when_their_time_is_over() {
        let now = Instant::now();
        let at = |seconds| now + Duration::from_secs(seconds);
        let mut waiting = Waiting::default();
        for (seconds, entry) in [(9, "a"), (1, "b"), (5, "c"), (1, "d")] {
            waiting.push(Uuid::new_v4(), at(seconds), entry);
        }
        assert_eq!(waiting.next_end(), Some(at(1)));
        assert_eq!(waiting.pop_ended(now), None);
        assert_eq!(
            [waiting.pop_ended(at(1)), waiting.pop_ended(at(1)), waiting.pop_ended(at(1))],
            [Some("b"), Some("d"), None]
        );
        assert_eq!([waiting.pop(), waiting.pop(), waiting.pop()], [Some("a"), Some("c"), None]);
        assert!(waiting.is_empty() && waiting.next_end().is_none());
    }

    #[test]
    fn an_entry_is_found_by_its_id_and_can_have_another_time() {
        let now = Instant::now();
        let mut waiting = Waiting::default();
        let ids = [Uuid::new_v4(), Uuid::new_v4(), Uuid::new_v4()];
        for (number, id) in ids.into_iter().enumerate() {
            waiting.push(id, now, number);
        }
        assert_eq!([waiting.remove(ids[1]), waiting.remove(ids[1])], [Some(1), None]);
        waiting.retime(|number| now + Duration::from_secs(*number as u64));
        assert_eq!([waiting.pop_ended(now), waiting.pop_ended(now)], [Some(0), None]);
        assert_eq!((waiting.pop(), waiting.numbers.len(), waiting.times.len()), (Some(2), 0, 0));
    }
}
