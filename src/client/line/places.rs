//! Places among the calls in flight, where they are limited, and the calls that wait for one.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;
use uuid::Uuid;

use super::super::builder::WhenFull;
use super::super::replies::Place;
use crate::waiting::{Waiting, Weight};

/// The places of a client's calls, and those that wait for one.
#[derive(Debug)]
pub(super) struct Places<T> {
    /// None where there is no limit.
    limit: Option<Limit>,
    pub(super) crowd: Waiting<T>,
}

#[derive(Debug)]
struct Limit {
    free: Arc<Semaphore>,
    places: usize,
    when_full: WhenFull,
}

/// What becomes of a call that comes.
#[derive(Debug)]
pub(super) enum Entry {
    /// It goes on, with a place that is given back when this is dropped; none where there is no limit.
    In(Option<Place>),
    /// It waits for its place.
    Waits,
    /// So many are in flight already.
    Full(usize),
}

impl<T> Places<T> {
    pub(super) fn new(max_in_flight: Option<(usize, WhenFull)>) -> Self {
        let limit = |(places, when_full)| Limit { free: Arc::new(Semaphore::new(places)), places, when_full };
        Self { limit: max_in_flight.map(limit), crowd: Waiting::default() }
    }

    /// Whether all places are taken.
    pub(super) fn is_full(&self) -> bool {
        self.limit.as_ref().is_some_and(|limit| limit.free.available_permits() == 0)
    }

    /// How many calls may be in flight.
    pub(super) fn limit(&self) -> usize {
        self.limit.as_ref().map_or(usize::MAX, |limit| limit.places)
    }

    /// What becomes of a call that comes now, and of whose place nothing is needed after `until`.
    pub(super) fn enter(&self, until: Instant) -> Entry {
        let Some(limit) = &self.limit else { return Entry::In(None) };
        // Who came before goes before.
        match self.crowd.is_empty().then(|| self.take()).flatten() {
            Some(permit) => Entry::In(Some(Place::new(permit, until))),
            None if limit.when_full == WhenFull::Wait => Entry::Waits,
            None => Entry::Full(limit.places),
        }
    }

    /// Lets a call wait for its place.
    pub(super) fn wait(&mut self, id: Uuid, until: Instant, entry: T) {
        self.crowd.push(id, until, Weight::default(), entry);
    }

    /// The next of those that wait, if there is a place for it.
    pub(super) fn seat(&mut self, now: Instant, until: impl FnOnce(&T) -> Instant) -> Option<(Place, T)> {
        let permit = if self.crowd.is_empty() { None } else { self.take() }?;
        let entry = self.crowd.pop(now)?;
        Some((Place::new(permit, until(&entry)), entry))
    }

    fn take(&self) -> Option<OwnedSemaphorePermit> {
        self.limit.as_ref()?.free.clone().try_acquire_owned().ok()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn places(count: usize, when_full: WhenFull) -> Places<u32> {
        Places::new(Some((count, when_full)))
    }

    fn later() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    fn seated(places: &mut Places<u32>) -> Vec<(Place, u32)> {
        std::iter::from_fn(|| places.seat(Instant::now(), |_| later())).collect()
    }

    #[test]
    fn without_a_limit_every_call_goes_on_without_a_place() {
        let places = Places::<u32>::new(None);
        assert!(matches!(places.enter(later()), Entry::In(None)));
        assert!(!places.is_full());
    }

    #[test]
    fn a_call_too_many_is_refused_or_waits_as_chosen() {
        let (refusing, waiting) = (places(1, WhenFull::Refuse), places(1, WhenFull::Wait));
        let Entry::In(Some(_one)) = refusing.enter(later()) else { panic!("there is room") };
        let Entry::In(Some(_two)) = waiting.enter(later()) else { panic!("there is room") };
        assert!(refusing.is_full() && matches!(refusing.enter(later()), Entry::Full(1)));
        assert!(waiting.is_full() && matches!(waiting.enter(later()), Entry::Waits));
    }

    #[test]
    fn places_go_to_those_that_wait_in_order_and_only_while_some_are_free() {
        let mut places = places(2, WhenFull::Wait);
        let (one, two) = (places.enter(later()), places.enter(later()));
        for number in 0..5 {
            places.wait(Uuid::new_v4(), later(), number);
        }
        assert!(seated(&mut places).is_empty());
        drop((one, two));
        assert!(!places.is_full() && matches!(places.enter(later()), Entry::Waits), "others came before");
        let first = seated(&mut places);
        assert_eq!(first.iter().map(|(_, number)| *number).collect::<Vec<_>>(), [0, 1]);
        drop(first);
        // Each place that is given back at once, as that of a call that nobody wants, goes to the next.
        let mut order = Vec::new();
        while let Some((place, number)) = places.seat(Instant::now(), |_| later()) {
            drop(place);
            order.push(number);
        }
        assert_eq!(order, [2, 3, 4]);
        assert!(places.crowd.is_empty() && matches!(places.enter(later()), Entry::In(Some(_))));
    }
}
