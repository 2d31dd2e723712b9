//! What cannot leave at this moment, in the order in which it came, each until a time of its own.

use std::collections::{BTreeMap, BTreeSet};

use tokio::time::Instant;

/// Entries in the order in which they came; each is wanted until its time.
#[derive(Debug)]
pub(super) struct Waiting<T> {
    entries: BTreeMap<u64, (Instant, T)>,
    times: BTreeSet<(Instant, u64)>,
    /// The number of the next entry.
    next: u64,
}

impl<T> Default for Waiting<T> {
    fn default() -> Self {
        Self { entries: BTreeMap::new(), times: BTreeSet::new(), next: 0 }
    }
}

impl<T> Waiting<T> {
    pub(super) fn push(&mut self, until: Instant, entry: T) {
        self.times.insert((until, self.next));
        self.entries.insert(self.next, (until, entry));
        self.next += 1;
    }

    /// The one that has waited longest.
    pub(super) fn pop(&mut self) -> Option<T> {
        let (number, (until, entry)) = self.entries.pop_first()?;
        self.times.remove(&(until, number));
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
        self.times.pop_first();
        self.entries.remove(&number).map(|(_, entry)| entry)
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
            waiting.push(at(seconds), entry);
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
}
