//! The publications of a channel that the broker has not confirmed.

use std::collections::VecDeque;

/// What is known of the publications of one channel. The broker numbers them from 1, and confirms them by number.
#[derive(Debug)]
pub(super) struct AwaitingConfirm<T> {
    /// The number of the first in `waiting`.
    first: u64,
    /// The publications from `first` on. `None` for one that is confirmed.
    waiting: VecDeque<Option<T>>,
    /// How many of them are not confirmed.
    count: usize,
}

impl<T> AwaitingConfirm<T> {
    /// For a channel on which so many messages were published and confirmed before.
    pub(super) fn after(earlier: u64) -> Self {
        Self { first: earlier + 1, waiting: VecDeque::new(), count: 0 }
    }

    /// The number of the next publication.
    pub(super) fn next_number(&self) -> u64 {
        self.first + self.waiting.len() as u64
    }

    /// Notes that the next publication was sent.
    pub(super) fn push(&mut self, publication: T) {
        self.waiting.push_back(Some(publication));
        self.count += 1;
    }

    pub(super) fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The publication with this number, unless it is confirmed.
    pub(super) fn get_mut(&mut self, number: u64) -> Option<&mut T> {
        let place = usize::try_from(number.checked_sub(self.first)?).ok()?;
        self.waiting.get_mut(place)?.as_mut()
    }

    /// Takes out what the broker confirms: the publication with this number and, if `multiple`, all before it. The
    /// number 0 then stands for all of them.
    pub(super) fn confirmed(&mut self, number: u64, multiple: bool, mut each: impl FnMut(T)) {
        let Some(place) = number.checked_sub(self.first).and_then(|place| usize::try_from(place).ok()) else {
            return if multiple && number == 0 {
                self.take(self.waiting.len(), each)
            };
        };
        if multiple {
            return self.take(place.saturating_add(1).min(self.waiting.len()), each);
        }
        if let Some(publication) = self.waiting.get_mut(place).and_then(Option::take) {
            self.count -= 1;
            each(publication);
        }
        while let Some(None) = self.waiting.front() {
            self.waiting.pop_front();
            self.first += 1;
        }
    }

    fn take(&mut self, places: usize, mut each: impl FnMut(T)) {
        self.first += places as u64;
        for publication in self.waiting.drain(..places).flatten() {
            self.count -= 1;
            each(publication);
        }
    }

    /// Takes out everything that is not confirmed, in the order of publishing.
    pub(super) fn into_rest(self) -> impl Iterator<Item = T> {
        self.waiting.into_iter().flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Confirms, and returns what was confirmed.
    fn confirmed(unconfirmed: &mut AwaitingConfirm<u64>, number: u64, multiple: bool) -> Vec<u64> {
        let mut all = Vec::new();
        unconfirmed.confirmed(number, multiple, |publication| all.push(publication));
        all
    }

    fn of(earlier: u64, count: u64) -> AwaitingConfirm<u64> {
        let mut unconfirmed = AwaitingConfirm::after(earlier);
        for _ in 0..count {
            let number = unconfirmed.next_number();
            unconfirmed.push(number);
        }
        unconfirmed
    }

    #[test]
    fn confirms_find_their_publications_in_any_order() {
        let mut unconfirmed = of(1, 6);
        assert_eq!(unconfirmed.next_number(), 8);
        assert_eq!(confirmed(&mut unconfirmed, 4, false), [4]);
        assert_eq!(confirmed(&mut unconfirmed, 2, false), [2]);
        assert_eq!(confirmed(&mut unconfirmed, 5, true), [3, 5]);
        assert!(unconfirmed.get_mut(5).is_none() && unconfirmed.get_mut(6).is_some());
        assert_eq!(confirmed(&mut unconfirmed, 0, true), [6, 7]);
        assert!(unconfirmed.is_empty());
        assert_eq!(unconfirmed.next_number(), 8);
    }

    #[test]
    fn what_is_not_there_is_not_confirmed() {
        let mut unconfirmed = of(0, 3);
        assert_eq!(confirmed(&mut unconfirmed, 9, false), [0; 0]);
        assert_eq!(confirmed(&mut unconfirmed, 0, false), [0; 0]);
        assert_eq!(confirmed(&mut unconfirmed, 2, true), [1, 2]);
        assert_eq!(confirmed(&mut unconfirmed, 2, true), [0; 0]);
        assert_eq!(confirmed(&mut unconfirmed, 1, false), [0; 0]);
        assert_eq!(confirmed(&mut unconfirmed, u64::MAX, true), [3]);
        assert_eq!(unconfirmed.next_number(), 4);
    }

    #[test]
    fn the_rest_comes_in_the_order_of_publishing() {
        let mut unconfirmed = of(0, 5);
        confirmed(&mut unconfirmed, 3, false);
        assert_eq!(unconfirmed.into_rest().collect::<Vec<_>>(), [1, 2, 4, 5]);
    }
}
