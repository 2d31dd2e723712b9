//! The places of a client's calls in flight, for clients that limit them, and the calls that wait for a place.
//!
//! A call takes a place before it is sent and returns it when it ends. The setting is
//! [`max_in_flight`](crate::ClientBuilder::max_in_flight).

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;
use uuid::Uuid;

use super::super::builder::WhenFull;
use super::super::in_flight::Place;
use crate::outgoing::{Waiting, Weight};

/// The places of a client's calls, and the calls that wait for one.
#[derive(Debug)]
pub(super) struct Places<T> {
    /// `None` if calls are not limited. They need no place then.
    limit: Option<Limit>,
    /// The calls that wait for a place.
    pub(super) crowd: Waiting<T>,
}

/// How many calls may be in flight.
#[derive(Debug)]
struct Limit {
    /// The free places.
    free: Arc<Semaphore>,
    /// How many places there are.
    places: usize,
    /// What is done with a call when no place is free.
    when_full: WhenFull,
}

/// What is done with a call that arrives.
#[derive(Debug)]
pub(super) enum Entrance {
    /// It is sent. It gets a place, which is returned when this is dropped, or none if calls are not limited.
    In(Option<Place>),
    /// It waits for a place.
    Waits,
    /// It is refused, since this many calls are in flight.
    Full(usize),
}

impl<T> Places<T> {
    /// Places for the setting `max_in_flight`.
    pub(super) fn new(max_in_flight: Option<(usize, WhenFull)>) -> Self {
        let limit = |(places, when_full)| Limit { free: Arc::new(Semaphore::new(places)), places, when_full };
        Self { limit: max_in_flight.map(limit), crowd: Waiting::default() }
    }

    /// Whether no place is free.
    pub(super) fn is_full(&self) -> bool {
        self.limit.as_ref().is_some_and(|limit| limit.free.available_permits() == 0)
    }

    /// How many calls may be in flight.
    pub(super) fn limit(&self) -> usize {
        self.limit.as_ref().map_or(usize::MAX, |limit| limit.places)
    }

    /// Decides about a call that arrives now. Its place may be returned at `until`, its deadline, even if its caller
    /// has not collected the result.
    pub(super) fn enter(&self, until: Instant) -> Entrance {
        let Some(limit) = &self.limit else { return Entrance::In(None) };
        // Calls that came earlier are first.
        match self.crowd.is_empty().then(|| self.take()).flatten() {
            Some(permit) => Entrance::In(Some(Place::new(permit, until))),
            None if limit.when_full == WhenFull::Wait => Entrance::Waits,
            None => Entrance::Full(limit.places),
        }
    }

    /// Lets a call wait for a place until `until`.
    pub(super) fn wait(&mut self, id: Uuid, until: Instant, entry: T) {
        self.crowd.push(id, until, Weight::default(), entry);
    }

    /// Gives a free place to the next call that waits, and returns both. `None` if no call waits or no place is free.
    pub(super) fn seat(&mut self, now: Instant, until: impl FnOnce(&T) -> Instant) -> Option<(Place, T)> {
        let permit = if self.crowd.is_empty() { None } else { self.take() }?;
        let entry = self.crowd.pop(now)?;
        Some((Place::new(permit, until(&entry)), entry))
    }

    /// Takes a free place, if there is one.
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
        assert!(matches!(places.enter(later()), Entrance::In(None)));
        assert!(!places.is_full());
    }

    #[test]
    fn a_call_too_many_is_refused_or_waits_as_chosen() {
        let (refusing, waiting) = (places(1, WhenFull::Refuse), places(1, WhenFull::Wait));
        let Entrance::In(Some(_one)) = refusing.enter(later()) else { panic!("there is room") };
        let Entrance::In(Some(_two)) = waiting.enter(later()) else { panic!("there is room") };
        assert!(refusing.is_full() && matches!(refusing.enter(later()), Entrance::Full(1)));
        assert!(waiting.is_full() && matches!(waiting.enter(later()), Entrance::Waits));
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
        assert!(!places.is_full() && matches!(places.enter(later()), Entrance::Waits), "others came before");
        let first = seated(&mut places);
        assert_eq!(first.iter().map(|(_, number)| *number).collect::<Vec<_>>(), [0, 1]);
        drop(first);
        // A place that is returned at once, as that of a call that nobody wants, goes to the next call.
        let mut order = Vec::new();
        while let Some((place, number)) = places.seat(Instant::now(), |_| later()) {
            drop(place);
            order.push(number);
        }
        assert_eq!(order, [2, 3, 4]);
        assert!(places.crowd.is_empty() && matches!(places.enter(later()), Entrance::In(Some(_))));
    }
}
