//! The result cache: what an idempotent method has returned is kept for a while, and callers that ask for the same at the
//! same time share one call.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use bytes::Bytes;
use moka::policy::EvictionPolicy;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep_until};
use tracing::Instrument as _;

use super::policies::PolicyCounters;
use super::{Invocation, Middleware, Next, Reply, Style};
use crate::codec::Codec;
use crate::error::{Code, Error, Unanswered};
use crate::frame::Entries;

/// How many results a client keeps, and how many bytes they take with their arguments, unless it is set otherwise.
const ENTRIES: usize = 1_000;
const BYTES: usize = 16 * 1024 * 1024;
/// What an entry takes beside its bytes, about.
const OVERHEAD: usize = 200;

/// How much a [`ResultCache`] holds.
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
pub(crate) struct Caching(pub(crate) Arc<ResultCache>);

impl Middleware for Caching {
    async fn handle(&self, call: Invocation, next: Next) -> Result<Reply, Error> {
        if call.style == Style::Call && call.idempotent && call.asked.caches() {
            self.0.answer(call, &next).await
        } else {
            next.run(call).await
        }
    }
}

/// The results that a client keeps, and the calls that will bring some.
pub(crate) struct ResultCache {
    /// How old one may be is up to the call that wants it. So the time is kept with the result, and moka only bounds the
    /// size.
    kept: moka::sync::Cache<ResultKey, KeptResult>,
    shared: Mutex<SharedCalls>,
    counted: Arc<PolicyCounters>,
}

/// What a result depends on.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct ResultKey {
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
struct SharedCalls {
    under_way: HashMap<ResultKey, Weak<SharedCall>>,
    /// Counts how often everything was forgotten. What was asked before that is not kept.
    turn: u64,
}

/// A call that one or more callers wait for. It runs on a task of its own, since none of them is bound to go on polling.
#[derive(Debug)]
struct SharedCall {
    outcome: watch::Receiver<Option<Result<Reply, Error>>>,
    task: OnceLock<AbortHandle>,
}

impl Drop for SharedCall {
    /// Nobody waits any more.
    fn drop(&mut self) {
        if let Some(task) = self.task.get() {
            task.abort();
        }
    }
}

/// What is there for a caller.
enum Found {
    Fresh(Reply),
    /// An old result, and the call that will bring a new one, if this caller is to make it.
    Old(Reply, Option<Landing>),
    /// Somebody makes the call.
    Shared(Arc<SharedCall>),
    /// This caller is to make it.
    Nothing(Landing),
}

impl ResultCache {
    pub(crate) fn new(size: CacheSize, counted: Arc<PolicyCounters>) -> Self {
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
        Self { kept, shared: Mutex::default(), counted }
    }

    /// Forgets everything. Calls that are under way bring their results to those who wait for them, and to nobody else.
    pub(crate) fn forget(&self) {
        let mut shared = self.shared();
        shared.turn += 1;
        shared.under_way.clear();
        self.kept.invalidate_all();
    }

    async fn answer(self: &Arc<Self>, call: Invocation, next: &Next) -> Result<Reply, Error> {
        let (key, time) = (ResultKey::of(&call), call.remaining());
        loop {
            match self.find(&key, &call) {
                Found::Fresh(reply) => {
                    self.counted.cache_hits.one_more();
                    return Ok(reply);
                }
                Found::Old(reply, landing) => {
                    self.counted.cache_stale.one_more();
                    if let Some(landing) = landing {
                        let refreshing = landing.begin(next, call);
                        // Somebody has to wait for it, or it is cancelled.
                        tokio::spawn(async move { refreshing.ends().await });
                    }
                    return Ok(reply);
                }
                Found::Nothing(landing) => {
                    self.counted.cache_misses.one_more();
                    let method = format!("{}.{}", call.service, call.method);
                    let outcome = landing.begin(next, call).ends().await;
                    return outcome.unwrap_or_else(|| {
                        let reason = "the task that made the call has ended".to_owned();
                        Err(Error::Disconnected { method: Some(method), may_have_run: true, reason })
                    });
                }
                Found::Shared(shared) => {
                    self.counted.cache_shared.one_more();
                    let outcome = match call.deadline {
                        None => shared.ends().await,
                        Some(deadline) => tokio::select! {
                            biased;
                            outcome = shared.ends() => outcome,
                            () = sleep_until(deadline) => return Err(timed_out(&call, time)),
                        },
                    };
                    match outcome {
                        // Its time is over, but not this one's.
                        Some(Err(error)) if error.code() == Code::DeadlineExceeded => {}
                        Some(outcome) => return outcome,
                        None => {}
                    }
                }
            }
        }
    }

    /// What is there for a call. The lock is held for all of it, so of the callers that find nothing, one makes the call.
    fn find(self: &Arc<Self>, key: &ResultKey, call: &Invocation) -> Found {
        // It is dropped after the lock is given back.
        let under_way;
        let mut shared = self.shared();
        let kept = self.kept.get(key).map(|kept| (kept.made.elapsed(), kept.reply));
        let (fresh, stale) = (call.asked.cache, call.asked.stale);
        let old = match kept {
            Some((age, reply)) if age < fresh => return Found::Fresh(reply),
            Some((age, reply)) if age < fresh.saturating_add(stale) => Some(reply),
            _ => None,
        };
        under_way = shared.under_way.get(key).and_then(Weak::upgrade);
        match (old, &under_way) {
            (Some(reply), Some(_)) => Found::Old(reply, None),
            (None, Some(under_way)) => Found::Shared(under_way.clone()),
            (Some(reply), None) => Found::Old(reply, Some(self.promise(&mut shared, key))),
            (None, None) => Found::Nothing(self.promise(&mut shared, key)),
        }
    }

    /// From now on others wait for the call that is about to be made.
    fn promise(self: &Arc<Self>, shared: &mut SharedCalls, key: &ResultKey) -> Landing {
        let (tell, outcome) = watch::channel(None);
        let call = Arc::new(SharedCall { outcome, task: OnceLock::new() });
        let key = ResultKey { payload: Bytes::copy_from_slice(&key.payload), ..key.clone() };
        shared.under_way.insert(key.clone(), Arc::downgrade(&call));
        Landing { cache: self.clone(), key, turn: shared.turn, call: Promised::Mine(call), tell }
    }

    fn shared(&self) -> MutexGuard<'_, SharedCalls> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for ResultCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResultCache").field("entries", &self.kept.entry_count()).finish_non_exhaustive()
    }
}

impl ResultKey {
    fn of(call: &Invocation) -> Self {
        Self {
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

impl SharedCall {
    /// Its outcome. `None` if its task has ended without one.
    async fn ends(self: Arc<Self>) -> Option<Result<Reply, Error>> {
        let mut outcome = self.outcome.clone();
        let ended = outcome.wait_for(Option::is_some).await;
        ended.ok().and_then(|outcome| outcome.clone())
    }
}

/// The duty to make a call, and to tell its outcome. If it is dropped before, whoever waits looks again.
struct Landing {
    cache: Arc<ResultCache>,
    key: ResultKey,
    turn: u64,
    call: Promised,
    tell: watch::Sender<Option<Result<Reply, Error>>>,
}

/// A [`SharedCall`], as whoever makes it knows it.
enum Promised {
    /// It was not begun.
    Mine(Arc<SharedCall>),
    /// It belongs to those who wait for it.
    Theirs(Weak<SharedCall>),
}

impl Landing {
    /// Makes the call. It is cancelled when nobody holds what this returns.
    fn begin(mut self, next: &Next, call: Invocation) -> Arc<SharedCall> {
        let Promised::Mine(shared) = &self.call else { unreachable!("it is begun once") };
        let shared = shared.clone();
        self.call = Promised::Theirs(Arc::downgrade(&shared));
        let running = next.run(call);
        let task = tokio::spawn(async move { self.lands(running.await) }.in_current_span());
        // It was not set before.
        let _ = shared.task.set(task.abort_handle());
        shared
    }

    fn lands(self, outcome: Result<Reply, Error>) {
        if let Ok(reply) = &outcome
            && !reply.own_error
            && self.cache.shared().turn == self.turn
        {
            // The payload may be a part of a larger message. Nobody's handler runs when it is read again.
            let payload = Bytes::copy_from_slice(&reply.payload);
            let reply = Reply { payload, handler_time: None, ..reply.clone() };
            self.cache.kept.insert(self.key.clone(), KeptResult { reply, made: Instant::now() });
            // Otherwise it holds more than it may until later.
            self.cache.kept.run_pending_tasks();
        }
        self.is_over();
        self.tell.send_replace(Some(outcome));
    }

    /// Whoever comes from now on finds what was kept, or nothing.
    fn is_over(&self) {
        let own = match &self.call {
            Promised::Mine(call) => Arc::downgrade(call),
            Promised::Theirs(call) => call.clone(),
        };
        let mut shared = self.cache.shared();
        if shared.under_way.get(&self.key).is_some_and(|call| call.ptr_eq(&own)) {
            shared.under_way.remove(&self.key);
        }
    }
}

impl Drop for Landing {
    fn drop(&mut self) {
        self.is_over();
    }
}

/// The error of a call whose time is over before that of the call that it waits for. `time` is what it had.
fn timed_out(call: &Invocation, time: Option<Duration>) -> Error {
    // Since the call was made, less than a millisecond has passed.
    let millis = time.unwrap_or_default().as_micros().div_ceil(1_000);
    let after = Duration::from_millis(u64::try_from(millis).unwrap_or(u64::MAX));
    Error::Timeout { method: format!("{}.{}", call.service, call.method), after, why: Unanswered::Unknown }
}
