//! The places of the calls that run at once: as many as the service says, as an [`Adaptive`] finds right, or as a rule of
//! an operator says.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::error::Code;
use crate::middleware::{Adaptive, AdaptiveGauge, AdaptiveLimit};

/// The places of one worker, or of one of its methods.
#[derive(Clone)]
pub(super) struct RunPlaces {
    permits: Arc<Semaphore>,
    /// `None`: their number does not change.
    changing: Option<Arc<ChangingPlaces>>,
}

/// RunPlaces whose number changes.
pub(super) struct ChangingPlaces {
    permits: Arc<Semaphore>,
    numbers: Mutex<Numbers>,
}

struct Numbers {
    /// How many places the service says. An `Adaptive` is before that.
    fixed: usize,
    adaptive: Option<(AdaptiveLimit, Arc<AdaptiveGauge>)>,
    /// How many a rule says, which is before both.
    ruled: Option<usize>,
    /// How many permits there are: taken ones, and free ones. While the limit falls there are more than that.
    issued: usize,
}

/// A place that is taken. Dropping it frees the place, unless there are too many.
pub(super) struct RunPlace {
    permit: Option<OwnedSemaphorePermit>,
    changing: Option<Arc<ChangingPlaces>>,
}

impl RunPlaces {
    /// So many places. `are_ruled`: rules may change their number.
    pub(super) fn new(concurrency: usize, adaptive: Option<&Adaptive>, are_ruled: bool) -> Self {
        let number = adaptive.map_or(concurrency, |adaptive| adaptive.range.start).min(Semaphore::MAX_PERMITS);
        let permits = Arc::new(Semaphore::new(number));
        let changing = (adaptive.is_some() || are_ruled).then(|| {
            let adaptive = adaptive.map(|adaptive| (AdaptiveLimit::new(adaptive.range), adaptive.gauge.clone()));
            let numbers = Numbers { fixed: number, adaptive, ruled: None, issued: number };
            Arc::new(ChangingPlaces { permits: permits.clone(), numbers: Mutex::new(numbers) })
        });
        Self { permits, changing }
    }

    /// For those who change their number. `None` if it does not change.
    pub(super) fn changing(&self) -> Option<&Arc<ChangingPlaces>> {
        self.changing.as_ref()
    }

    /// Waits for a place.
    pub(super) async fn take(&self) -> Option<RunPlace> {
        let permit = self.permits.clone().acquire_owned().await.ok()?;
        Some(RunPlace { permit: Some(permit), changing: self.changing.clone() })
    }

    /// A place, if one is free now.
    pub(super) fn try_take(&self) -> Option<RunPlace> {
        let permit = self.permits.clone().try_acquire_owned().ok()?;
        Some(RunPlace { permit: Some(permit), changing: self.changing.clone() })
    }

    /// Counts a call whose handler has ended, and ran for this time.
    pub(super) fn ended(&self, code: Code, time: Duration) {
        // Of one that was given up early it is not known how long it would have taken.
        if let Some(changing) = self.changing.as_ref().filter(|_| code != Code::Cancelled) {
            changing.ended(time);
        }
    }
}

impl Numbers {
    fn limit(&self) -> usize {
        let built = || self.adaptive.as_ref().map_or(self.fixed, |(limit, _)| limit.limit());
        self.ruled.unwrap_or_else(built)
    }
}

impl ChangingPlaces {
    fn numbers(&self) -> MutexGuard<'_, Numbers> {
        self.numbers.lock().expect("no panic while holding the numbers")
    }

    /// A rule says how many places there are. `None`: there is no rule any more.
    pub(super) fn rule(&self, places: Option<usize>) {
        let mut numbers = self.numbers();
        numbers.ruled = places.map(|places| places.min(Semaphore::MAX_PERMITS));
        self.issue(&mut numbers);
    }

    /// What an `Adaptive` learns of a call that has ended. It learns nothing while a rule says how many run at once.
    fn ended(&self, time: Duration) {
        let mut numbers = self.numbers();
        let Numbers { adaptive: Some((limit, gauge)), ruled: None, issued, .. } = &mut *numbers else { return };
        let before = limit.limit();
        limit.ended(time, issued.saturating_sub(self.permits.available_permits()));
        let now = limit.limit();
        if now != before {
            gauge.changes(before, now);
            self.issue(&mut numbers);
        }
    }

    /// Makes as many permits as the limit says. Of those that are too many, the taken ones end as they are dropped.
    fn issue(&self, numbers: &mut Numbers) {
        let limit = numbers.limit();
        if limit > numbers.issued {
            self.permits.add_permits(limit - numbers.issued);
            numbers.issued = limit;
        } else {
            numbers.issued -= self.permits.forget_permits(numbers.issued - limit);
        }
    }

    /// Whether a place that becomes free is one too many.
    fn is_too_many(&self) -> bool {
        let mut numbers = self.numbers();
        let is_too_many = numbers.issued > numbers.limit();
        numbers.issued -= usize::from(is_too_many);
        is_too_many
    }
}

impl Drop for RunPlace {
    fn drop(&mut self) {
        let Some(changing) = &self.changing else { return };
        if let Some(permit) = self.permit.take_if(|_| changing.is_too_many()) {
            permit.forget();
        }
    }
}
