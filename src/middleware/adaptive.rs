//! Adaptive concurrency: how many calls an instance runs at once follows from how long they take.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::time::Instant;

use super::{Middleware, ServerPolicy};

/// How many calls have to end until the limit is judged, in which time at least, and in which at most.
const LEAST_CALLS: usize = 50;
const MOST_CALLS: usize = 1000;
const SHORTEST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(30);
/// How many times longer calls may take than without load.
const TOLERANCE: f64 = 1.5;
/// How much of a change is made at once.
const SMOOTHING: f64 = 0.5;
/// After how many judgements it is measured anew how long calls take with little load.
const MEASURED_EVERY: u32 = 60;

/// Sets how many calls an instance runs at once by how long they take, in place of
/// [`Service::concurrency`](crate::Service::concurrency). Calls over the limit wait, as they do with a fixed one. None is
/// refused.
///
/// After at least 50 calls in at least 1 s the limit is judged: as long as 90 % of the calls take at most 1.5 times what
/// they took at their best, it rises by up to half of its square root. When they take longer, it falls, by up to a quarter at once.
/// So it settles where more calls at once would only make each of them longer. It does not rise unless at least half of
/// it was used. Every 60th time it is halved for once, and what calls take then counts as their best from there on: so a
/// method that has become slower for other reasons does not keep the limit low, and a limit does not creep up with what it
/// causes itself. Calls that are cancelled by their callers are not counted.
///
/// The limit is that of one service of one instance, over all its methods: put slow and quick methods into services of
/// their own. An instance may hold as many messages as the greatest limit, also while the limit is lower: with
/// [`Service::prefetch`](crate::Service::prefetch) a program can set a smaller number, so that other instances get them.
///
/// ```
/// use std::sync::Arc;
///
/// use hopline::{Adaptive, Context, Fault, Service};
///
/// let adaptive = Arc::new(Adaptive::default());
/// let add = |_: Context, (a, b): (i64, i64)| async move { Ok::<_, Fault>(a + b) };
/// let service = Service::new("calculator", 1).with(adaptive.clone()).method("add", add);
/// # let _ = service;
/// assert_eq!(adaptive.counts().limit, 20);
/// ```
#[derive(Debug)]
pub struct Adaptive {
    pub(crate) range: AdaptiveRange,
    pub(crate) gauge: Arc<AdaptiveGauge>,
}

/// Between which limits it chooses, and with which it begins.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AdaptiveRange {
    pub(crate) min: usize,
    pub(crate) max: usize,
    pub(crate) start: usize,
}

/// What is counted of changes.
#[derive(Debug, Default)]
pub(crate) struct AdaptiveGauge {
    limit: AtomicUsize,
    raised: AtomicU64,
    lowered: AtomicU64,
}

/// What an [`Adaptive`] has done so far.
///
/// ```
/// let counts = hopline::Adaptive::default().start(8).counts();
/// assert_eq!((counts.limit, counts.raised, counts.lowered), (8, 0, 0));
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct AdaptiveCounts {
    /// How many calls may run at once now. Of several services, that of the one that has changed last.
    pub limit: usize,
    /// How many times it has risen.
    pub raised: u64,
    /// How many times it has fallen.
    pub lowered: u64,
}

impl Default for Adaptive {
    fn default() -> Self {
        Self::between(1, 256)
    }
}

impl Adaptive {
    /// At least `min` and at most `max` calls at once, at first 20. The default is 1 to 256. 0 counts as 1.
    #[must_use]
    pub fn between(min: usize, max: usize) -> Self {
        let min = min.max(1);
        let adaptive = Self { range: AdaptiveRange { min, max: max.max(min), start: min }, gauge: Arc::default() };
        adaptive.start(20)
    }

    /// With how many it begins. Default: 20. It is brought between the least and the most.
    #[must_use]
    pub fn start(mut self, calls: usize) -> Self {
        self.range.start = calls.clamp(self.range.min, self.range.max);
        self.gauge.limit.store(self.range.start, Ordering::Relaxed);
        self
    }

    /// What it has done so far.
    #[must_use]
    pub fn counts(&self) -> AdaptiveCounts {
        AdaptiveCounts {
            limit: self.gauge.limit.load(Ordering::Relaxed),
            raised: self.gauge.raised.load(Ordering::Relaxed),
            lowered: self.gauge.lowered.load(Ordering::Relaxed),
        }
    }
}

impl AdaptiveGauge {
    /// Notes a change of the limit.
    pub(crate) fn changes(&self, from: usize, to: usize) {
        self.limit.store(to, Ordering::Relaxed);
        let counter = if to > from { &self.raised } else { &self.lowered };
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

impl Middleware for Adaptive {
    fn policy(&self) -> Option<&dyn ServerPolicy> {
        Some(self)
    }
}

impl ServerPolicy for Adaptive {
    fn adaptive(&self) -> Option<&Adaptive> {
        Some(self)
    }
}

/// The rule by which the limit of one worker changes.
#[derive(Debug)]
pub(crate) struct AdaptiveLimit {
    range: AdaptiveRange,
    limit: f64,
    /// How long calls took at their best, in seconds.
    best: Option<f64>,
    /// How long those took that have ended since `since`, in seconds.
    times: Vec<f64>,
    since: Instant,
    /// The most calls that ran at once since then.
    busiest: usize,
    judged: u32,
    /// The limit to return to, while the best time is measured anew.
    before: Option<f64>,
}

impl AdaptiveLimit {
    #[expect(clippy::cast_precision_loss, reason = "a number of calls at once")]
    pub(crate) fn new(range: AdaptiveRange) -> Self {
        let (limit, since) = (range.start as f64, Instant::now());
        Self { range, limit, best: None, times: Vec::new(), since, busiest: 0, judged: 0, before: None }
    }

    /// How many calls may run at once.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "it is between the limits of its range"
    )]
    pub(crate) fn limit(&self) -> usize {
        self.limit as usize
    }

    /// Counts a call that has ended, while so many ran. The limit may be another one after that.
    pub(crate) fn ended(&mut self, time: Duration, running: usize) {
        let passed = self.since.elapsed();
        if passed > LONGEST && self.times.len() < LEAST_CALLS {
            self.begin();
        }
        self.busiest = self.busiest.max(running);
        if self.times.len() < MOST_CALLS {
            self.times.push(time.as_secs_f64());
        }
        if self.times.len() >= LEAST_CALLS && passed >= SHORTEST {
            let at = self.times.len() * 9 / 10;
            let slow = *self.times.select_nth_unstable_by(at, f64::total_cmp).1;
            self.judge(slow.max(1e-6));
            self.begin();
        }
    }

    fn begin(&mut self) {
        self.times.clear();
        (self.since, self.busiest) = (Instant::now(), 0);
    }

    /// Changes the limit after 90 % of the calls have taken at most this long.
    #[expect(clippy::cast_precision_loss, reason = "a number of calls at once")]
    fn judge(&mut self, slow: f64) {
        let (min, max) = (self.range.min as f64, self.range.max as f64);
        if let Some(before) = self.before.take() {
            (self.best, self.limit) = (Some(slow), before);
            return;
        }
        let best = self.best.map_or(slow, |best| best.min(slow));
        self.best = Some(best);
        let gradient = (TOLERANCE * best / slow).clamp(0.5, 1.0);
        let next = self.limit * gradient + self.limit.sqrt();
        if next <= self.limit || self.busiest as f64 * 2.0 >= self.limit {
            self.limit = (self.limit + SMOOTHING * (next - self.limit)).clamp(min, max);
        }
        self.judged += 1;
        if self.judged.is_multiple_of(MEASURED_EVERY) && self.limit > min {
            self.before = Some(self.limit);
            self.limit = (self.limit / 2.0).max(min);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine that runs 16 calls at once in 10 ms each, and more of them in as many times that time.
    async fn judged(limit: &mut AdaptiveLimit, times: u32, wanted: usize) {
        for _ in 0..times {
            tokio::time::advance(SHORTEST).await;
            let running = limit.limit().min(wanted);
            let time =
                Duration::from_millis(10).mul_f64((f64::from(u32::try_from(running).expect("few")) / 16.0).max(1.0));
            (0..LEAST_CALLS).for_each(|_| limit.ended(time, running));
        }
    }

    fn limit() -> AdaptiveLimit {
        AdaptiveLimit::new(Adaptive::default().range)
    }

    #[tokio::test(start_paused = true)]
    async fn the_limit_settles_where_more_calls_would_only_take_longer_and_does_not_creep_up() {
        let mut limit = limit();
        let mut highest = 0;
        for _ in 0..40 {
            judged(&mut limit, 20, 1000).await;
            highest = highest.max(limit.limit());
        }
        assert!((12..=48).contains(&limit.limit()), "{}", limit.limit());
        assert!(highest <= 64, "{highest}");
    }

    #[tokio::test(start_paused = true)]
    async fn the_limit_rises_only_as_far_as_it_is_used_and_within_its_range() {
        let mut idle = limit();
        judged(&mut idle, 50, 4).await;
        assert_eq!(idle.limit(), 20, "four calls at once show nothing of more");
        let mut quick = AdaptiveLimit::new(Adaptive::between(2, 30).range);
        judged(&mut quick, 50, 16).await;
        assert_eq!(quick.limit(), 30);
        // The best time is measured anew after these.
        for _ in 50..MEASURED_EVERY {
            tokio::time::advance(SHORTEST).await;
            (0..LEAST_CALLS).for_each(|_| quick.ended(Duration::from_secs(9), 30));
        }
        assert!((2..20).contains(&quick.limit()), "{}", quick.limit());
    }
}
