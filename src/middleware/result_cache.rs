//! The result cache of a server: callers that ask for the same get one result.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt as _;
use tracing::error;

use super::cache::{CacheCounters, CacheSize, Driver, KeptResults, MaxAge};
use super::{Invocation, Middleware, Next, Reply, Style};
use crate::clock::at;
use crate::context::Context;
use crate::error::{Code, Error, Fault};
use crate::panics::words;

/// Keeps the results of a service's idempotent methods in the instance, and answers calls for the same with them. Calls
/// that are made at the same time share one run of the handler.
///
/// Two calls are the same if they have the same service and version, method, bytes of the arguments, codec, metadata, and
/// user that the broker has verified ([`Context::user`](crate::Context::user)). So nobody gets a result that was made for
/// another user; callers without a verified user count as one. What else a handler can learn of a call, such as
/// [`Context::caller`](crate::Context::caller), is not compared: a handler that answers by it must not be cached.
///
/// It concerns calls with an answer to the methods that the *server* declares as
/// [idempotent](crate::Method::idempotent), and of these to the ones that [`methods`](Self::methods) names, if it is set.
/// Oneway calls, events and broadcasts always run. Only results are kept: no fault, and not the method's own error.
///
/// **Who may call.** The server's rule ([`Server::allow`](crate::Server::allow)) and the `admit` of all middleware decide
/// about each call before it is looked for here. Middleware that decides in its `handle` has to be added before this one,
/// so that it is outside. A call that is answered from the cache has waited for a place as any other
/// ([`Service::concurrency`](crate::Service::concurrency)), and counts in the statistics.
///
/// **A shared run** has the context of the call that began it. It goes on as long as anybody waits for it, though that
/// caller has gone, and is cancelled when nobody does. It ends at the deadline of that call: who has more time begins
/// another. Its outcome is that of all, also a fault; a handler that panics is `INTERNAL` for all of them.
///
/// On a client this does nothing: [`Call::cache`](crate::Call::cache) is for clients.
///
/// ```
/// use std::sync::Arc;
/// use std::time::Duration;
///
/// use hopline::{Context, Fault, Method, ResultCache, Service};
///
/// let cache = Arc::new(ResultCache::for_time(Duration::from_secs(5)).stale(Duration::from_secs(30)));
/// let price = |_: Context, (article,): (String,)| async move { Ok::<_, Fault>(article.len()) };
/// let service = Service::new("shop", 1).with(cache.clone()).method(Method::new("price").idempotent(), price);
/// # let _ = service;
/// println!("{} from the cache, {} runs", cache.counts().hits, cache.counts().misses);
/// ```
#[derive(Debug)]
pub struct ResultCache {
    age: MaxAge,
    /// `None`: all.
    methods: Option<Vec<String>>,
    results: Arc<KeptResults>,
    counted: CacheCounters,
}

/// What a [`ResultCache`] has done so far.
///
/// ```
/// let counts = hopline::ResultCache::for_time(std::time::Duration::from_secs(5)).counts();
/// assert_eq!((counts.hits, counts.misses, counts.shared, counts.stale), (0, 0, 0, 0));
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct CacheCounts {
    /// Calls that were answered with a result that was kept.
    pub hits: u64,
    /// Calls for which there was no such result, and that began a run.
    pub misses: u64,
    /// Calls that waited for a run that another call had begun, and got its outcome.
    pub shared: u64,
    /// Calls that were answered with an old result while another call brought a new one.
    pub stale: u64,
}

impl ResultCache {
    /// Keeps each result for this long after it was made. A time of zero keeps nothing, but calls at the same time still
    /// share a run.
    #[must_use]
    pub fn for_time(time: Duration) -> Self {
        let results = Arc::new(KeptResults::new(CacheSize::default(), Driver::Waiters));
        let age = MaxAge { fresh: time, stale: Duration::ZERO };
        Self { age, methods: None, results, counted: CacheCounters::default() }
    }

    /// For how long after its time a result is still taken, while one call brings a new one. That call waits for its run,
    /// in a place like any other, and gets its outcome; all others get the old result. If the run fails, the next call
    /// begins another. Default: zero.
    #[must_use]
    pub fn stale(mut self, time: Duration) -> Self {
        self.age.stale = time;
        self
    }

    /// The methods whose results are kept. Default: all that are idempotent. Methods that need different times have caches
    /// of their own: add one for each.
    #[must_use]
    pub fn methods<M: Into<String>>(mut self, methods: impl IntoIterator<Item = M>) -> Self {
        self.methods = Some(methods.into_iter().map(Into::into).collect());
        self
    }

    /// How many results are kept, and how many bytes they take with their arguments and metadata. Default: 1 000, and 16
    /// MiB. Those that were not asked for the longest go first. What was kept before is forgotten.
    #[must_use]
    pub fn size(mut self, entries: usize, bytes: usize) -> Self {
        let size = CacheSize { entries, bytes };
        self.results = Arc::new(KeptResults::new(size, Driver::Waiters));
        self
    }

    /// Forgets all results, as after a change that must be seen. Runs that are under way bring their results only to those
    /// who wait for them already. Other instances have their own caches.
    pub fn forget(&self) {
        self.results.forget();
    }

    /// What it has done so far.
    #[must_use]
    pub fn counts(&self) -> CacheCounts {
        let CacheCounters { hits, misses, shared, stale } = &self.counted;
        CacheCounts { hits: hits.get(), misses: misses.get(), shared: shared.get(), stale: stale.get() }
    }

    fn keeps(&self, call: &Invocation) -> bool {
        let is_named = || self.methods.as_ref().is_none_or(|methods| methods.iter().any(|name| **name == *call.method));
        call.style == Style::Call && call.repeatable && is_named()
    }
}

impl Middleware for ResultCache {
    async fn handle(&self, call: Invocation, next: Next) -> Result<Reply, Error> {
        match Context::current() {
            Some(context) if self.keeps(&call) => {
                // The outermost cache keeps the results: one that is inside of its own run would wait for itself.
                let inner = || Invocation { repeatable: false, ..call.clone() };
                let run = || run_apart(context.clone(), inner(), next.clone()).boxed();
                self.results.answer(&call, self.age, &self.counted, &run).await
            }
            _ => next.run(call).await,
        }
    }
}

/// Runs what is inside for a call and for others that wait for the same, in a context that does not end with the call.
async fn run_apart(context: Context, call: Invocation, next: Next) -> Result<Reply, Error> {
    let (apart, _cancels) = context.apart();
    let deadline = call.deadline.filter(|_| !apart.finishes());
    let (service, method) = (call.service.clone(), call.method.clone());
    let running = AssertUnwindSafe(apart.scope(async move { next.run(call).await })).catch_unwind();
    let outcome = tokio::select! {
        biased;
        () = at(deadline) => {
            return Err(Error::Fault(Fault::new(Code::DeadlineExceeded, "the deadline of the call that began the run passed")));
        }
        outcome = running => outcome,
    };
    outcome.unwrap_or_else(|panic| {
        let id = apart.request_id();
        error!(%service, %method, %id, panic = words(&*panic), "a handler panicked whose result several calls may share");
        let instance = apart.instance();
        let why = format!("`{service}.{method}`, or a middleware around it, panicked: the log of instance {instance} says why");
        Err(Error::Fault(Fault::new(Code::Internal, why)))
    })
}
