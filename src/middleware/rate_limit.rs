//! The rate limit of a server: how many calls of a method a second it takes from each user.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::time::Instant;

use super::{Invocation, Middleware, PacedBy, ServerPolicy, Style};
use crate::error::{Code, Fault, RefusedBy};

/// How many users and methods are told apart at once, unless a program sets another number.
const MAX_BUCKETS: usize = 10_000;
/// How often room is made among the buckets if there is none.
const CLEARED_EVERY: Duration = Duration::from_secs(1);

/// Limits how many calls a second an instance takes. A request over the limit is answered with `RESOURCE_EXHAUSTED`
/// without being run, and its fault says after which time there is room again ([`Fault::retry_after`]). A oneway call over
/// the limit is held in the instance until there is room: it is not refused, and no attempt is counted. Events and the
/// questions of discovery are not limited.
///
/// There is a bucket for each method and each user that the broker has verified ([`Invocation::user`]). Callers without
/// a verified user share one bucket. The limit is that of one instance: a fleet of five takes five times as much. Each
/// call counts, however many share a message.
///
/// While oneway calls are held they take up the prefetch of their queue, so the others wait at the broker, in order. One
/// that is held while the server drains goes back to its queue. Other middleware is asked about a held call each time it
/// is tried.
///
/// ```
/// use std::sync::Arc;
///
/// use hopline::{Context, Fault, RateLimit, Service};
///
/// // 100 calls a second from each user, and 20 at once after a pause.
/// let limit = Arc::new(RateLimit::per_user(100.0).burst(20));
/// let add = |_: Context, (a, b): (i64, i64)| async move { Ok::<_, Fault>(a + b) };
/// let service = Service::new("calculator", 1).with(limit.clone()).method("add", add);
/// # let _ = service;
/// println!("refused: {}", limit.counts().refused);
/// ```
#[derive(Debug)]
pub struct RateLimit {
    /// The time between two calls at the limit.
    interval: Duration,
    /// How much may come at once after a pause, as the time in which it becomes free again.
    burst: Duration,
    /// Whether users have buckets of their own.
    by_user: bool,
    max_buckets: usize,
    buckets: Mutex<Buckets>,
    admitted: AtomicU64,
    refused: AtomicU64,
    held: AtomicU64,
}

/// A method, and the user who calls it. `None` without a method: all for whom there is no bucket.
type Bucket = (Option<Arc<str>>, Option<Arc<str>>);

#[derive(Debug, Default)]
struct Buckets {
    /// When each bucket will be empty, if nothing more is let through.
    empty_at: HashMap<Bucket, Instant>,
    cleared: Option<Instant>,
}

/// What a [`RateLimit`] has done so far.
///
/// ```
/// let counts = hopline::RateLimit::per_user(10.0).counts();
/// assert_eq!((counts.admitted, counts.refused, counts.held), (0, 0, 0));
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RateCounts {
    /// Requests and oneway calls that were let through.
    pub admitted: u64,
    /// Requests that were refused.
    pub refused: u64,
    /// How many times a oneway call was held. One that has to wait several times counts as often.
    pub held: u64,
    /// For how many methods and users there is a bucket now.
    pub buckets: usize,
}

impl RateLimit {
    /// So many calls a second of each method from each verified user. A rate that is not above 0 lets one call through in
    /// a day.
    #[must_use]
    pub fn per_user(calls_per_second: f64) -> Self {
        let seconds = if calls_per_second > 0.0 { 1.0 / calls_per_second } else { f64::INFINITY };
        let day = Duration::from_secs(24 * 3600);
        let interval = Duration::try_from_secs_f64(seconds).unwrap_or(day).clamp(Duration::from_nanos(1), day);
        Self {
            interval,
            burst: interval.max(Duration::from_secs(1)),
            by_user: true,
            max_buckets: MAX_BUCKETS,
            buckets: Mutex::default(),
            admitted: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            held: AtomicU64::new(0),
        }
    }

    /// So many calls a second of each method, from all users together.
    #[must_use]
    pub fn per_method(calls_per_second: f64) -> Self {
        Self { by_user: false, ..Self::per_user(calls_per_second) }
    }

    /// How many calls may come at once after a pause. Default: as many as in a second, but at least 1. 0 counts as 1.
    #[must_use]
    pub fn burst(mut self, calls: u32) -> Self {
        self.burst = self.interval.saturating_mul(calls.max(1));
        self
    }

    /// How many methods and users are told apart at once. Those over this share one bucket, until others have not called
    /// for a while. Default: 10 000, of about 100 bytes each. 0 counts as 1.
    #[must_use]
    pub fn max_buckets(mut self, buckets: usize) -> Self {
        self.max_buckets = buckets.max(1);
        self
    }

    /// What it has done so far.
    #[must_use]
    pub fn counts(&self) -> RateCounts {
        RateCounts {
            admitted: self.admitted.load(Ordering::Relaxed),
            refused: self.refused.load(Ordering::Relaxed),
            held: self.held.load(Ordering::Relaxed),
            buckets: self.buckets.lock().expect("no panic while holding the buckets").empty_at.len(),
        }
    }

    /// Lets a call through, or says how long it has to wait.
    fn take(&self, call: &Invocation) -> Result<(), Duration> {
        // Anybody can make up names of methods, and they must not fill the table.
        let method = if call.served { call.method.clone() } else { Arc::default() };
        let user = if self.by_user { call.user.clone() } else { None };
        let now = Instant::now();
        let mut buckets = self.buckets.lock().expect("no panic while holding the buckets");
        let mut bucket = (Some(method), user);
        if buckets.empty_at.len() >= self.max_buckets && !buckets.empty_at.contains_key(&bucket) {
            buckets.clear(now);
            if buckets.empty_at.len() >= self.max_buckets {
                bucket = (None, None);
            }
        }
        let empty_at = buckets.empty_at.entry(bucket).or_insert(now);
        let next = (*empty_at).max(now) + self.interval;
        match (next - now).checked_sub(self.burst).filter(|wait| !wait.is_zero()) {
            None => {
                *empty_at = next;
                Ok(())
            }
            Some(wait) => Err(whole_millis(wait)),
        }
    }
}

impl Buckets {
    /// Forgets the buckets that are empty: a new one is no different.
    fn clear(&mut self, now: Instant) {
        if self.cleared.is_none_or(|cleared| now - cleared >= CLEARED_EVERY) {
            self.empty_at.retain(|_, empty_at| *empty_at > now);
            self.cleared = Some(now);
        }
    }
}

/// At least this time, in whole milliseconds, as the wire has it.
fn whole_millis(time: Duration) -> Duration {
    Duration::from_millis(u64::try_from(time.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX))
}

impl Middleware for RateLimit {
    fn admit(&self, call: &Invocation) -> Result<(), Fault> {
        let is_oneway = call.style() == Style::Oneway;
        if !is_oneway && !call.is_governed() {
            return Ok(());
        }
        let Err(wait) = self.take(call) else {
            self.admitted.fetch_add(1, Ordering::Relaxed);
            return Ok(());
        };
        let counter = if is_oneway { &self.held } else { &self.refused };
        counter.fetch_add(1, Ordering::Relaxed);
        let (method, whose) = (call.method(), if self.by_user { " of this user" } else { "" });
        let why = format!("too many calls{whose} of `{method}` a second: there is room again in {wait:?}");
        Err(Fault::new(Code::ResourceExhausted, why).retry_after(wait).refused_by(RefusedBy::Rate))
    }

    fn policy(&self) -> Option<&dyn ServerPolicy> {
        Some(self)
    }
}

impl ServerPolicy for RateLimit {
    fn holds(&self) -> bool {
        true
    }

    fn paces(&self, _: &Invocation) -> Option<PacedBy> {
        self.by_user.then_some(PacedBy::Code)
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    fn call(user: Option<&str>, method: &str, served: bool) -> Invocation {
        Invocation {
            user: user.map(Into::into),
            served,
            ..Invocation::new(Style::Call, "books.v1".into(), method.into(), Uuid::nil())
        }
    }

    fn admits(limit: &RateLimit, user: Option<&str>, method: &str) -> bool {
        limit.admit(&call(user, method, true)).is_ok()
    }

    #[tokio::test(start_paused = true)]
    async fn each_user_has_a_bucket_for_each_method_and_those_who_are_not_known_share_one() {
        let limit = RateLimit::per_user(1.0);
        assert!(admits(&limit, Some("a"), "add") && !admits(&limit, Some("a"), "add"));
        assert!(admits(&limit, Some("a"), "sub") && admits(&limit, Some("b"), "add") && admits(&limit, None, "add"));
        assert!(!admits(&limit, None, "add"));
        let together = RateLimit::per_method(1.0);
        assert!(admits(&together, Some("a"), "add") && !admits(&together, Some("b"), "add"));
        assert!(limit.admit(&call(None, "hopline.ping", false)).is_ok(), "discovery is free");
        let wait = |fault: Result<(), Fault>| fault.expect_err("refused").retry_after.expect("it is told");
        assert_eq!(wait(limit.admit(&call(None, "add", true))), Duration::from_secs(1));
        tokio::time::advance(Duration::from_millis(999)).await;
        assert_eq!(wait(limit.admit(&call(None, "add", true))), Duration::from_millis(1));
        tokio::time::advance(Duration::from_millis(1)).await;
        assert!(admits(&limit, None, "add"));
    }

    #[tokio::test(start_paused = true)]
    async fn no_more_is_kept_than_was_allowed_and_made_up_methods_fill_nothing() {
        let limit = RateLimit::per_user(1.0).max_buckets(3);
        for number in 0..100 {
            let _ = limit.admit(&call(None, &format!("made-up-{number}"), false));
        }
        assert_eq!(limit.counts().buckets, 1);
        assert!(admits(&limit, Some("a"), "add") && admits(&limit, Some("b"), "add"));
        assert!(admits(&limit, Some("c"), "add"), "the first of those for whom there is no room");
        assert!(!admits(&limit, Some("d"), "add"), "it shares the bucket of all others");
        assert_eq!(limit.counts().buckets, 4);
        tokio::time::advance(Duration::from_secs(2)).await;
        assert!(admits(&limit, Some("c"), "add") && admits(&limit, Some("d"), "add"), "there is room again");
        assert!(limit.counts().buckets <= 4, "{:?}", limit.counts());
    }
}
