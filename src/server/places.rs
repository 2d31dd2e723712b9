//! The places of the calls that run at once: as many as the service says, or as an [`Adaptive`] finds right.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::error::Code;
use crate::middleware::{Adaptive, AdaptiveGauge, AdaptiveLimit};

/// The places of one worker.
pub(super) struct RunPlaces {
    permits: Arc<Semaphore>,
    /// `None`: their number does not change.
    adaptive: Option<Arc<AdaptivePlaces>>,
}

/// RunPlaces whose number changes.
struct AdaptivePlaces {
    permits: Arc<Semaphore>,
    numbers: Mutex<Numbers>,
    gauge: Arc<AdaptiveGauge>,
}

struct Numbers {
    limit: AdaptiveLimit,
    /// How many permits there are: taken ones, and free ones. While the limit falls there are more than that.
    issued: usize,
}

/// A place that is taken. Dropping it frees the place, unless there are too many.
pub(super) struct RunPlace {
    permit: Option<OwnedSemaphorePermit>,
    adaptive: Option<Arc<AdaptivePlaces>>,
}

impl RunPlaces {
    pub(super) fn new(concurrency: usize, adaptive: Option<&Adaptive>) -> Self {
        let number = adaptive.map_or(concurrency, |adaptive| adaptive.range.start).min(Semaphore::MAX_PERMITS);
        let permits = Arc::new(Semaphore::new(number));
        let adaptive = adaptive.map(|adaptive| {
            let numbers = Mutex::new(Numbers { limit: AdaptiveLimit::new(adaptive.range), issued: number });
            Arc::new(AdaptivePlaces { permits: permits.clone(), numbers, gauge: adaptive.gauge.clone() })
        });
        Self { permits, adaptive }
    }

    /// Waits for a place.
    pub(super) async fn take(&self) -> Option<RunPlace> {
        let permit = self.permits.clone().acquire_owned().await.ok()?;
        Some(RunPlace { permit: Some(permit), adaptive: self.adaptive.clone() })
    }

    /// A place, if one is free now.
    pub(super) fn try_take(&self) -> Option<RunPlace> {
        let permit = self.permits.clone().try_acquire_owned().ok()?;
        Some(RunPlace { permit: Some(permit), adaptive: self.adaptive.clone() })
    }

    /// Counts a call whose handler has ended, and ran for this time.
    pub(super) fn ended(&self, code: Code, time: Duration) {
        // Of one that was given up early it is not known how long it would have taken.
        if let Some(adaptive) = self.adaptive.as_ref().filter(|_| code != Code::Cancelled) {
            adaptive.ended(time);
        }
    }
}

impl AdaptivePlaces {
    fn ended(&self, time: Duration) {
        let mut numbers = self.numbers.lock().expect("no panic while holding the numbers");
        let Numbers { limit, issued } = &mut *numbers;
        let before = limit.limit();
        limit.ended(time, issued.saturating_sub(self.permits.available_permits()));
        let now = limit.limit();
        if now == before {
            return;
        }
        self.gauge.changes(before, now);
        if now > *issued {
            self.permits.add_permits(now - *issued);
            *issued = now;
        } else {
            *issued -= self.permits.forget_permits(*issued - now);
        }
    }

    /// Whether a place that becomes free is one too many.
    fn is_too_many(&self) -> bool {
        let mut numbers = self.numbers.lock().expect("no panic while holding the numbers");
        let is_too_many = numbers.issued > numbers.limit.limit();
        numbers.issued -= usize::from(is_too_many);
        is_too_many
    }
}

impl Drop for RunPlace {
    fn drop(&mut self) {
        let Some(adaptive) = &self.adaptive else { return };
        if let Some(permit) = self.permit.take_if(|_| adaptive.is_too_many()) {
            permit.forget();
        }
    }
}
