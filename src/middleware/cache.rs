//! The result cache: what an idempotent method has returned is kept for a while, and callers that ask for the same at the
//! same time share one run. Here is what the cache of a client has in common with that of a
//! [server](super::ResultCache), and the policy of the client.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt as _;
use futures::future::{BoxFuture, Shared, WeakShared};
use moka::policy::EvictionPolicy;
use tokio::time::{Instant, sleep_until};
use tokio_util::task::AbortOnDropHandle;
use tracing::Instrument as _;

use super::policies::Counter;
use super::{Invocation, Middleware, Next, Reply, Style};
use crate::codec::Codec;
use crate::error::{Code, Error, Unanswered};
use crate::frame::Entries;

/// How many results are kept, and how many bytes they take with their arguments, unless it is set otherwise.
const ENTRIES: usize = 1_000;
const BYTES: usize = 16 * 1024 * 1024;
/// What an entry takes beside its bytes, about.
const OVERHEAD: usize = 200;

/// How much [`KeptResults`] hold.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CacheSize {
    pub(crate) entries: usize,
    pub(crate) bytes: usize,
}

impl Default for CacheSize {
    fn default() -> Self {
        Self { entries: ENTRIES, bytes: BYTES }
    }
}

/// The policy behind [`Call::cache`](crate::Call::cache).
pub(crate) struct Caching(pub(crate) Arc<KeptResults>);

impl Middleware for Caching {
    async fn handle(&self, call: Invocation, next: Next) -> Result<Reply, Error> {
        let is_asked = call.style == Style::Call && call.idempotent && call.asked.caches();
        let Some(counted) = call.counted.clone().filter(|_| is_asked) else { return next.run(call).await };
        let age = MaxAge { fresh: call.asked.cache, stale: call.asked.stale };
        let run = || {
            let (next, call) = (next.clone(), call.clone());
            async move { next.run(call).await }.boxed()
        };
        self.0.answer(&call, age, &counted.method.cache, &run).await
    }
}

/// How old a result may be, and how much older while a new one is on its way.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct MaxAge {
    pub(crate) fresh: Duration,
    pub(crate) stale: Duration,
}

/// Who polls a run that is shared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Driver {
    /// A task of its own: nobody is bound to go on polling a call that a program has made. So a run that brings a new
    /// result in place of an old one needs nobody who waits.
    Task,
    /// Those who wait for it. The tasks of a server poll their calls to the end, and on the threads of their method.
    Waiters,
}

/// What a cache has done.
#[derive(Debug, Default)]
pub(crate) struct CacheCounters {
    pub(crate) hits: Counter,
    pub(crate) misses: Counter,
    pub(crate) shared: Counter,
    pub(crate) stale: Counter,
}

/// The results that are kept, and the runs that will bring some.
pub(crate) struct KeptResults {
    /// How old one may be is up to the call that wants it. So the time is kept with the result, and moka only bounds the
    /// size.
    kept: moka::sync::Cache<ResultKey, KeptResult>,
    runs: Mutex<SharedRuns>,
    driver: Driver,
}

type Outcome = Result<Reply, Error>;

/// A run that one or more callers wait for. `None` if its task has ended without an outcome. It ends when nobody holds it.
type SharedRun = Shared<BoxFuture<'static, Option<Outcome>>>;

/// What a result depends on.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct ResultKey {
    /// The user of the caller, as the broker has verified. A client does not know it, but has only one.
    user: Option<Arc<str>>,
    service: Arc<str>,
    method: Arc<str>,
    codec: Codec,
    payload: Bytes,
    /// It may say who asks.
    metadata: Entries,
}

#[derive(Debug, Clone)]
struct KeptResult {
    reply: Reply,
    made: Instant,
}

#[derive(Debug, Default)]
struct SharedRuns {
    under_way: HashMap<ResultKey, BegunRun>,
    /// Counts how often everything was forgotten. What was asked before that is not kept.
    turn: u64,
    /// How many runs were begun.
    begun: u64,
}

#[derive(Debug)]
struct BegunRun {
    number: u64,
    /// When the time of the call is over that has begun it.
    deadline: Option<Instant>,
    run: WeakShared<BoxFuture<'static, Option<Outcome>>>,
}

/// What is there for a caller.
enum Found {
    Fresh(Reply),
    /// An old result, and the run that will bring a new one, if this caller is to begin it.
    Old(Reply, Option<SharedRun>),
    /// Somebody has begun the run, whose time is over at this moment.
    Shared(SharedRun, Option<Instant>),
    /// This caller is to begin it.
    Nothing(SharedRun),
}

impl KeptResults {
    pub(crate) fn new(size: CacheSize, driver: Driver) -> Self {
        // Nothing weighs less than its share of all entries. So one sum bounds both their number and their bytes.
        let least = size.bytes.div_ceil(size.entries.max(1)).max(1);
        let kept = moka::sync::Cache::builder()
            .max_capacity(size.bytes as u64)
            .weigher(move |key: &ResultKey, kept: &KeptResult| {
                u32::try_from((key.size() + kept.size() + OVERHEAD).max(least)).unwrap_or(u32::MAX)
            })
            // What was asked for often is not worth more: it may be too old by now.
            .eviction_policy(EvictionPolicy::lru())
            .build();
        Self { kept, runs: Mutex::default(), driver }
    }

    /// Forgets everything. Runs that are under way bring their results to those who wait for them, and to nobody else.
    pub(crate) fn forget(&self) {
        let mut runs = self.runs();
        runs.turn += 1;
        runs.under_way.clear();
        self.kept.invalidate_all();
    }

    /// Answers a call with what is kept, with the outcome of a run for the same that is under way, or by `run`. That must
    /// do nothing until what it returns is polled.
    pub(crate) async fn answer(
        self: &Arc<Self>,
        call: &Invocation,
        age: MaxAge,
        counted: &CacheCounters,
        run: &(dyn Fn() -> BoxFuture<'static, Outcome> + Sync),
    ) -> Outcome {
        let (key, time, mut has_shared) = (ResultKey::of(call), call.remaining(), false);
        loop {
            match self.find(&key, call.deadline, age, run) {
                Found::Fresh(reply) => {
                    counted.hits.one_more();
                    return Ok(reply);
                }
                Found::Old(reply, refreshing) => {
                    counted.stale.one_more();
                    // Somebody has to wait for it, or it is cancelled.
                    refreshing.map(tokio::spawn);
                    return Ok(reply);
                }
                Found::Nothing(run) => {
                    counted.misses.one_more();
                    return run.await.unwrap_or_else(|| {
                        let method = Some(format!("{}.{}", call.service, call.method));
                        let reason = "the task that made the call has ended".to_owned();
                        Err(Error::Disconnected { method, may_have_run: true, reason })
                    });
                }
                Found::Shared(run, until) => {
                    if !std::mem::replace(&mut has_shared, true) {
                        counted.shared.one_more();
                    }
                    let outcome = match call.deadline {
                        None => run.await,
                        Some(deadline) => tokio::select! {
                            biased;
                            outcome = run => outcome,
                            () = sleep_until(deadline) => Some(Err(timed_out(call, time))),
                        },
                    };
                    let now = Instant::now();
                    let is_over = |deadline: Option<Instant>| deadline.is_some_and(|deadline| now >= deadline);
                    match outcome {
                        // Its time is over, but not this one's.
                        Some(Err(error))
                            if error.code() == Code::DeadlineExceeded && is_over(until) && !is_over(call.deadline) => {}
                        Some(outcome) => return outcome,
                        None => {}
                    }
                }
            }
        }
    }

    /// What is there for a call. The lock is held for all of it, so of the callers that find nothing, one begins the run.
    fn find(
        self: &Arc<Self>,
        key: &ResultKey,
        deadline: Option<Instant>,
        age: MaxAge,
        run: &(dyn Fn() -> BoxFuture<'static, Outcome> + Sync),
    ) -> Found {
        // It is dropped after the lock is given back.
        let under_way;
        let mut runs = self.runs();
        let kept = self.kept.get(key).map(|kept| (kept.made.elapsed(), kept.reply));
        let old = match kept {
            Some((past, reply)) if past < age.fresh => return Found::Fresh(reply),
            Some((past, reply)) if past < age.fresh.saturating_add(age.stale) => Some(reply),
            _ => None,
        };
        let upgraded = |under_way: &BegunRun| Some((under_way.run.upgrade()?, under_way.deadline));
        under_way = runs.under_way.get(key).and_then(upgraded);
        match (old, &under_way) {
            (Some(reply), Some(_)) => Found::Old(reply, None),
            (None, Some((under_way, until))) => Found::Shared(under_way.clone(), *until),
            (Some(reply), None) if self.driver == Driver::Task => {
                Found::Old(reply, Some(self.promise(&mut runs, key, deadline, run())))
            }
            (_, None) => Found::Nothing(self.promise(&mut runs, key, deadline, run())),
        }
    }

    /// From now on others wait for the run that is about to begin.
    fn promise(
        self: &Arc<Self>,
        runs: &mut SharedRuns,
        key: &ResultKey,
        deadline: Option<Instant>,
        run: BoxFuture<'static, Outcome>,
    ) -> SharedRun {
        let key = ResultKey { payload: Bytes::copy_from_slice(&key.payload), ..key.clone() };
        runs.begun += 1;
        let number = runs.begun;
        let landing = Landing { results: self.clone(), key: key.clone(), turn: runs.turn, number };
        let landing = async move {
            let outcome = run.await;
            landing.lands(&outcome);
            outcome
        }
        .in_current_span();
        let run = match self.driver {
            // The task begins with the first poll, when nobody holds the lock.
            Driver::Task => async { AbortOnDropHandle::new(tokio::spawn(landing)).await.ok() }.boxed(),
            Driver::Waiters => landing.map(Some).boxed(),
        };
        let run = run.shared();
        let weak = run.downgrade().expect("it has not ended, since it has not begun");
        runs.under_way.insert(key, BegunRun { number, deadline, run: weak });
        run
    }

    fn runs(&self) -> MutexGuard<'_, SharedRuns> {
        self.runs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for KeptResults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeptResults").field("entries", &self.kept.entry_count()).finish_non_exhaustive()
    }
}

impl ResultKey {
    fn of(call: &Invocation) -> Self {
        Self {
            user: call.user.clone(),
            service: call.service.clone(),
            method: call.method.clone(),
            codec: call.codec,
            payload: call.payload.clone(),
            metadata: call.metadata.clone(),
        }
    }

    fn size(&self) -> usize {
        self.payload.len() + size_of(&self.metadata)
    }
}

impl KeptResult {
    fn size(&self) -> usize {
        self.reply.payload.len() + size_of(&self.reply.metadata)
    }
}

fn size_of(entries: &Entries) -> usize {
    entries.iter().map(|(name, value)| name.len() + value.len()).sum()
}

/// The duty to tell the outcome of a run. If it is dropped before, whoever comes next begins another.
struct Landing {
    results: Arc<KeptResults>,
    key: ResultKey,
    turn: u64,
    number: u64,
}

impl Landing {
    fn lands(self, outcome: &Outcome) {
        if let Ok(reply) = outcome
            && !reply.own_error
            && self.results.runs().turn == self.turn
        {
            // The payload may be a part of a larger message. Nobody's handler runs when it is read again.
            let payload = Bytes::copy_from_slice(&reply.payload);
            let reply = Reply { payload, handler_time: None, ..reply.clone() };
            self.results.kept.insert(self.key.clone(), KeptResult { reply, made: Instant::now() });
            // Otherwise it holds more than it may until later.
            self.results.kept.run_pending_tasks();
        }
    }
}

impl Drop for Landing {
    /// Whoever comes from now on finds what was kept, or nothing.
    fn drop(&mut self) {
        let mut runs = self.results.runs();
        if runs.under_way.get(&self.key).is_some_and(|run| run.number == self.number) {
            runs.under_way.remove(&self.key);
        }
    }
}

/// The error of a call whose time is over before that of the run that it waits for. `time` is what it had.
fn timed_out(call: &Invocation, time: Option<Duration>) -> Error {
    // Since the call was made, less than a millisecond has passed.
    let millis = time.unwrap_or_default().as_micros().div_ceil(1_000);
    let after = Duration::from_millis(u64::try_from(millis).unwrap_or(u64::MAX));
    Error::Timeout { method: format!("{}.{}", call.service, call.method), after, why: Unanswered::Unknown }
}
