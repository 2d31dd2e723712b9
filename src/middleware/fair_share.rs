//! Fair shares: a caller that sends more than an instance can take is refused, and the others are served.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::time::Instant;

use super::{Invocation, Middleware, ServerPolicy};
use crate::error::{Code, Fault, RefusedBy};
use crate::limits::RETRY_AFTER;

/// A caller counts as long as it has called within this time.
const REMEMBERED: Duration = Duration::from_secs(10);
/// How often callers are forgotten that have not called for that long.
const CLEARED_EVERY: Duration = Duration::from_secs(1);
/// How many callers are told apart. All others count as one.
const MAX_CALLERS: usize = 10_000;

/// Shares the places of an instance among its callers: while all are taken, a caller that has more calls here than its
/// share is refused. So a flood by one caller costs the others little: each of their calls finds a place as soon as one is
/// free, since the flood does not wait before them.
///
/// The share of a caller is the number of places, divided by the callers that have called within the last 10 s. A call
/// counts from its delivery to its end. As long as places are free, anybody may take more than a share. A caller that has
/// the instance for itself is never refused: its calls wait in the queue. So the first call of another one waits behind
/// these. After that there are two, and what waits over a share is refused as fast as it is read. A refused request gets
/// `RESOURCE_EXHAUSTED` with [`retry_after`](Fault::retry_after) 100 ms, and has not run.
///
/// Give it as many places as [`Service::concurrency`](crate::Service::concurrency) has, and set that to what the instance
/// can do at once: calls that do not have to wait for a place cannot be told to be too many. A service with this policy has
/// a [prefetch](crate::Service::prefetch) of twice its concurrency unless the program sets another, since only what was
/// delivered can be refused. Oneway calls, events and the questions of discovery are not counted and not refused. Use one
/// for each service.
///
/// ```
/// use std::sync::Arc;
///
/// use hopline::{Context, FairShare, Fault, Service};
///
/// let share = Arc::new(FairShare::by_caller(64));
/// let find = |_: Context, (word,): (String,)| async move { Ok::<_, Fault>(word.len()) };
/// let service = Service::new("search", 1).concurrency(64).with(share.clone()).method("find", find);
/// # let _ = service;
/// println!("{} callers, refused: {}", share.counts().callers, share.counts().refused);
/// ```
#[derive(Debug)]
pub struct FairShare {
    places: usize,
    by_user: bool,
    held: Mutex<SharesTaken>,
    admitted: AtomicU64,
    refused: AtomicU64,
}

#[derive(Debug, Default)]
struct SharesTaken {
    /// How many calls are here.
    calls: usize,
    callers: HashMap<Option<Arc<str>>, CallerShare>,
    cleared: Option<Instant>,
}

/// What is known of a caller.
#[derive(Debug)]
struct CallerShare {
    calls: usize,
    last_call: Instant,
}

/// What a [`FairShare`] has done so far.
///
/// ```
/// let counts = hopline::FairShare::by_caller(16).counts();
/// assert_eq!((counts.admitted, counts.refused, counts.callers), (0, 0, 0));
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct FairShareCounts {
    /// Requests that were let through.
    pub admitted: u64,
    /// Requests that were refused.
    pub refused: u64,
    /// How many callers have called within the last seconds.
    pub callers: usize,
    /// How many calls run or wait in the instance now.
    pub calls: usize,
}

impl FairShare {
    /// Each client has a share of so many places. A client says itself who it is: one that means harm can have many
    /// shares. 0 counts as 1.
    #[must_use]
    pub fn by_caller(places: usize) -> Self {
        let (held, admitted, refused) = Default::default();
        Self { places: places.max(1), by_user: false, held, admitted, refused }
    }

    /// Each user whom the broker has verified has a share of so many places. All callers without a verified user share
    /// one. 0 counts as 1.
    #[must_use]
    pub fn by_user(places: usize) -> Self {
        Self { by_user: true, ..Self::by_caller(places) }
    }

    /// What it has done so far.
    #[must_use]
    pub fn counts(&self) -> FairShareCounts {
        let held = self.held();
        FairShareCounts {
            admitted: self.admitted.load(Ordering::Relaxed),
            refused: self.refused.load(Ordering::Relaxed),
            callers: held.callers.len(),
            calls: held.calls,
        }
    }

    fn held(&self) -> MutexGuard<'_, SharesTaken> {
        self.held.lock().expect("no panic while holding the shares")
    }

    fn whose(&self, call: &Invocation) -> Option<Arc<str>> {
        if self.by_user { call.user.clone() } else { call.caller.clone() }
    }

    /// Takes a call, or says how large the share of its caller is.
    fn take(&self, call: &Invocation) -> Result<(), usize> {
        let now = Instant::now();
        let mut held = self.held();
        held.clear(now);
        let (here, callers) = (held.calls, held.callers.len());
        let is_new = |held: &SharesTaken, whose: &Option<Arc<str>>| !held.callers.contains_key(whose);
        let mut whose = self.whose(call);
        let mut among = callers;
        if is_new(&held, &whose) {
            if callers >= MAX_CALLERS {
                whose = None;
            }
            among += usize::from(is_new(&held, &whose));
        }
        let caller = held.callers.entry(whose).or_insert(CallerShare { calls: 0, last_call: now });
        caller.last_call = now;
        let share = self.places.div_ceil(among.max(1));
        if among > 1 && here >= self.places && caller.calls >= share {
            return Err(share);
        }
        caller.calls += 1;
        held.calls += 1;
        Ok(())
    }
}

impl SharesTaken {
    /// Forgets callers that have not called for a while.
    fn clear(&mut self, now: Instant) {
        if self.cleared.is_none_or(|cleared| now - cleared >= CLEARED_EVERY) {
            self.callers.retain(|_, caller| caller.calls > 0 || now - caller.last_call < REMEMBERED);
            self.cleared = Some(now);
        }
    }
}

impl Middleware for FairShare {
    fn admit(&self, call: &Invocation) -> Result<(), Fault> {
        if !call.is_governed() {
            return Ok(());
        }
        let Err(share) = self.take(call) else {
            self.admitted.fetch_add(1, Ordering::Relaxed);
            return Ok(());
        };
        self.refused.fetch_add(1, Ordering::Relaxed);
        let why = format!("this caller has more calls here than its share, which is {share} of {}", self.places);
        Err(Fault::new(Code::ResourceExhausted, why).retry_after(RETRY_AFTER).refused_by(RefusedBy::FairShare))
    }

    fn policy(&self) -> Option<&dyn ServerPolicy> {
        Some(self)
    }
}

impl ServerPolicy for FairShare {
    fn looks_ahead(&self) -> bool {
        true
    }

    fn leaves(&self, call: &Invocation) {
        if !call.is_governed() {
            return;
        }
        let mut held = self.held();
        held.calls = held.calls.saturating_sub(1);
        let mut whose = self.whose(call);
        if !held.callers.contains_key(&whose) {
            whose = None;
        }
        if let Some(caller) = held.callers.get_mut(&whose) {
            caller.calls = caller.calls.saturating_sub(1);
        }
    }
}
