//! A bulkhead: the threads and the places of a service's calls, or of the calls of a method that has its own.

use std::sync::Arc;

use tokio::runtime::{Builder, Handle, Runtime};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::places::RunPlaces;
use crate::error::{Code, Error, Fault, RefusedBy};
use crate::limits::RETRY_AFTER;
use crate::middleware::Adaptive;
use crate::service::{Dispatch, Method, QueueFull, Service};
use crate::topology::ServiceId;

/// Where calls run, how many at once, and what becomes of others.
pub(super) struct Bulkhead {
    dispatch: Dispatch,
    pool: Option<Arc<PoolThreads>>,
    pub(super) places: RunPlaces,
    /// How many places it has that are not the service's.
    own_places: usize,
    /// Without one, the queue at the broker is not read on until there is a place.
    pub(super) queue: Option<PlaceQueue>,
}

/// The threads for [`Dispatch::Pool`].
struct PoolThreads(Option<Runtime>);

impl Drop for PoolThreads {
    fn drop(&mut self) {
        // A runtime that waits for its tasks may not be dropped where others run.
        if let Some(pool) = self.0.take() {
            pool.shutdown_background();
        }
    }
}

/// What waits for a place, as far as that is bounded.
#[derive(Clone)]
pub(super) struct PlaceQueue {
    room: Arc<Semaphore>,
    length: usize,
    pub(super) when_full: QueueFull,
}

/// Room in a [`PlaceQueue`] that a call has. Dropping it gives it to another.
pub(super) type QueueRoom = OwnedSemaphorePermit;

impl Bulkhead {
    /// The bulkhead of a service. `are_ruled`: rules may change the number of its places.
    pub(super) fn of_service(
        id: &ServiceId,
        service: &Service,
        adaptive: Option<&Adaptive>,
        are_ruled: bool,
    ) -> Result<Self, Error> {
        Ok(Self {
            dispatch: service.dispatch,
            pool: pool(service.dispatch, &id.to_string())?,
            places: RunPlaces::new(service.concurrency, adaptive, are_ruled),
            own_places: 0,
            queue: service.dispatch.queue().map(PlaceQueue::of),
        })
    }

    /// That of a method, if it has one beside this, which is that of its service.
    pub(super) fn of_method(
        &self,
        id: &ServiceId,
        service: &Service,
        method: &Method,
        are_ruled: bool,
    ) -> Result<Option<Self>, Error> {
        if method.dispatch.is_none() && method.concurrency.is_none() {
            return Ok(None);
        }
        let (dispatch, pool) = match method.dispatch {
            None => (self.dispatch, self.pool.clone()),
            Some(dispatch) => (dispatch, pool(dispatch, &format!("{id}.{}", method.name))?),
        };
        let own = method.dispatch.and_then(Dispatch::threads).map(|_| service.concurrency);
        Ok(Some(match method.concurrency.or(own) {
            None => Self { dispatch, pool, places: self.places.clone(), own_places: 0, queue: self.queue.clone() },
            Some(own_places) => {
                let queue = method.dispatch.and_then(Dispatch::queue).unwrap_or((0, QueueFull::Refuse));
                let places = RunPlaces::new(own_places, None, are_ruled);
                Self { dispatch, pool, places, own_places, queue: Some(PlaceQueue::of(queue)) }
            }
        }))
    }

    /// Whether handlers run on the task that reads the queue.
    pub(super) fn is_inline(&self) -> bool {
        self.dispatch == Dispatch::Inline
    }

    /// How many calls run here at once that take no place of the service.
    pub(super) fn runs_beside(&self) -> usize {
        self.own_places
    }

    /// How many calls are here at once, running or waiting, that take no place of the service.
    pub(super) fn holds_beside(&self) -> usize {
        let waiting = self.queue.as_ref().map_or(0, |queue| queue.length);
        if self.own_places == 0 { 0 } else { self.own_places.saturating_add(waiting) }
    }

    /// Whether each handler has a thread that it may block.
    pub(super) fn is_blocking(&self) -> bool {
        self.dispatch == Dispatch::Blocking
    }

    /// The runtime on whose threads handlers run, if it is not that of the program.
    pub(super) fn pool(&self) -> Option<Handle> {
        let PoolThreads(pool) = &**self.pool.as_ref()?;
        pool.as_ref().map(|pool| pool.handle().clone())
    }
}

impl PlaceQueue {
    fn of((length, when_full): (usize, QueueFull)) -> Self {
        Self { room: Arc::new(Semaphore::new(length.min(Semaphore::MAX_PERMITS))), length, when_full }
    }

    /// Why a call is refused that has found no room.
    pub(super) fn refusal(&self, method: &str) -> Fault {
        let waiting = if self.length == 0 { "" } else { ", and the queue in front of them is full" };
        let why = format!("no room for `{method}` here: its places are taken{waiting}");
        Fault::new(Code::ResourceExhausted, why).retry_after(RETRY_AFTER).refused_by(RefusedBy::NoRoom)
    }

    /// Room for a call, if there is some.
    pub(super) fn room(&self) -> Option<QueueRoom> {
        self.room.clone().try_acquire_owned().ok()
    }
}

/// The threads that a [`Dispatch`] asks for.
fn pool(dispatch: Dispatch, whose: &str) -> Result<Option<Arc<PoolThreads>>, Error> {
    let Some(threads) = dispatch.threads() else { return Ok(None) };
    let mut builder = Builder::new_multi_thread();
    builder.worker_threads(threads).thread_name(format!("hopline-{whose}")).enable_all();
    match builder.build() {
        Ok(pool) => Ok(Some(Arc::new(PoolThreads(Some(pool))))),
        Err(error) => Err(Error::Invalid(format!("no threads for the pool of `{whose}`: {error}"))),
    }
}
