//! Quarantine: an instance whose calls fail stops taking calls for a while.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use super::{Middleware, ServerPolicy};

/// Takes an instance out of the queue of its service for a while, when too many of its calls fail.
///
/// All instances of a service read one queue, and whoever is done first gets the next call. So an instance that fails at
/// once, for example since its database does not let it in, attracts the calls that others would answer. Callers cannot
/// avoid it: they do not choose who reads the queue.
///
/// If at least half of the calls of a service have ended as `INTERNAL` (a panic, or a fault of that code), of at least 20
/// within 10 s, this instance stops reading the service's queues of calls and oneway calls. What has been delivered and
/// has not begun is given back, as in a drain, and what runs goes on. After 30 s it reads the queues again. If that
/// happens again within ten times that time, it takes twice, three times and at last ten times as long, 300 s. Calls to
/// this instance by its id and broadcasts still run.
///
/// The only instance of a service is never taken out: the broker is asked how many consumers the queue of calls has. When
/// all others leave in the meantime, it is over at once, or within 5 s. [`Running::health`](crate::Running::health) says
/// `degraded`, with the reason, and [`Instance::quarantined`](crate::Instance::quarantined) tells it to whoever asks the
/// registry.
///
/// Each service and each server has a count of its own, also if they share one of these.
///
/// ```
/// use std::sync::Arc;
///
/// use hopline::{Context, Fault, Quarantine, Service};
///
/// let quarantine = Arc::new(Quarantine::default());
/// let add = |_: Context, (a, b): (i64, i64)| async move { Ok::<_, Fault>(a + b) };
/// let service = Service::new("calculator", 1).with(quarantine.clone()).method("add", add);
/// # let _ = service;
/// println!("taken out {} times", quarantine.counts().begun);
/// ```
#[derive(Debug)]
pub struct Quarantine {
    pub(crate) rule: QuarantineRule,
    pub(crate) tally: Arc<QuarantineTally>,
}

/// When a quarantine begins, and how long it takes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct QuarantineRule {
    /// The share of failed calls from which on it begins.
    pub(crate) share: f64,
    /// Of at least so many calls.
    pub(crate) least: u64,
    pub(crate) within: Duration,
    /// How long the first one takes.
    pub(crate) time: Duration,
}

/// What all services with one [`Quarantine`] count together.
#[derive(Debug, Default)]
pub(crate) struct QuarantineTally {
    begun: AtomicU64,
    spared: AtomicU64,
    now: AtomicUsize,
}

/// What a [`Quarantine`] has done so far.
///
/// ```
/// let counts = hopline::Quarantine::default().counts();
/// assert_eq!((counts.begun, counts.spared, counts.now), (0, 0, 0));
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct QuarantineCounts {
    /// How many times a service stopped taking calls.
    pub begun: u64,
    /// How many times it did not, since nobody else was there or could be asked about.
    pub spared: u64,
    /// How many services take no calls now.
    pub now: usize,
}

impl Default for Quarantine {
    fn default() -> Self {
        let (within, time) = (Duration::from_secs(10), Duration::from_secs(30));
        Self { rule: QuarantineRule { share: 0.5, least: 20, within, time }, tally: Arc::default() }
    }
}

impl Quarantine {
    /// Which share of the calls has to fail. Default: 0.5. At most 1.
    #[must_use]
    pub fn share(mut self, share: f64) -> Self {
        self.rule.share = share.clamp(0.0, 1.0);
        self
    }

    /// How many calls have to end `within` a time. Default: 20 within 10 s. 0 counts as 1, and a time as at least 1 s.
    #[must_use]
    pub fn least(mut self, calls: u64, within: Duration) -> Self {
        (self.rule.least, self.rule.within) = (calls.max(1), within.max(Duration::from_secs(1)));
        self
    }

    /// How long the first one takes. The longest takes ten times as long. Default: 30 s; at least 1 s.
    #[must_use]
    pub fn time(mut self, time: Duration) -> Self {
        self.rule.time = time.max(Duration::from_secs(1));
        self
    }

    /// What it has done so far.
    #[must_use]
    pub fn counts(&self) -> QuarantineCounts {
        QuarantineCounts {
            begun: self.tally.begun.load(Ordering::Relaxed),
            spared: self.tally.spared.load(Ordering::Relaxed),
            now: self.tally.now.load(Ordering::Relaxed),
        }
    }
}

impl QuarantineTally {
    pub(crate) fn begins(&self) {
        self.begun.fetch_add(1, Ordering::Relaxed);
        self.now.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn ends(&self) {
        self.now.fetch_sub(1, Ordering::Relaxed);
    }

    pub(crate) fn spares(&self) {
        self.spared.fetch_add(1, Ordering::Relaxed);
    }
}

impl Middleware for Quarantine {
    fn policy(&self) -> Option<&dyn ServerPolicy> {
        Some(self)
    }
}

impl ServerPolicy for Quarantine {
    fn quarantine(&self) -> Option<&Quarantine> {
        Some(self)
    }
}
