//! The policies of a client: what it does about calls that fail. Each is a file beside this one. Here is what they share:
//! what a call asks for, and what they have done.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use super::breaker::Breakers;
use super::budget::Budgets;
use super::cache::{CacheSize, Caching, ResultCache};
use super::chain::Chain;
use super::rate::Rates;
use super::retry::Retry;

/// Which policies a call passes, and what the client keeps for them.
///
/// The order is: the user's own middleware, cache, retry, the choice of an instance, breaker, rate, the way to the broker.
/// So each attempt passes the breaker, and a middleware of the user sees a call once, however many attempts it has.
#[derive(Debug)]
pub(crate) struct Policies {
    pub(crate) settings: PolicySettings,
    pub(crate) budgets: Arc<Budgets>,
    /// `None` unless they are switched on.
    pub(crate) breakers: Option<Breakers>,
    pub(crate) rates: Rates,
    /// Made for the first call that asks for it.
    cache: OnceLock<Arc<ResultCache>>,
    pub(crate) counted: Arc<Counted>,
}

/// What the user of a client has asked for.
#[derive(Debug, Clone, Default)]
pub(crate) struct PolicySettings {
    /// What a call asks for that asks for nothing itself.
    pub(crate) asked: Asked,
    pub(crate) has_breakers: bool,
    /// Calls a second, by service.
    pub(crate) rates: Vec<(String, u32)>,
    pub(crate) cache_size: CacheSize,
}

impl Policies {
    pub(crate) fn new(settings: PolicySettings) -> Self {
        let counted = Arc::<Counted>::default();
        let breakers = settings.has_breakers.then(|| Breakers::new(counted.clone()));
        let rates = Rates::new(&settings.rates);
        Self { settings, budgets: Arc::default(), breakers, rates, cache: OnceLock::new(), counted }
    }

    /// Forgets the results that are kept.
    pub(crate) fn forget_results(&self) {
        if let Some(cache) = self.cache.get() {
            cache.forget();
        }
    }

    /// The user's middleware, with the policies inside of it that a call has asked for.
    pub(crate) fn around(&self, middleware: &Chain, asked: Asked) -> Chain {
        let mut chain = middleware.clone();
        if asked.caches() {
            let new = || Arc::new(ResultCache::new(self.settings.cache_size, self.counted.clone()));
            chain.push(Caching(self.cache.get_or_init(new).clone()));
        }
        if asked.retries > 0 {
            chain.push(Retry { budgets: self.budgets.clone(), counted: self.counted.clone() });
        }
        chain
    }
}

/// What a call asks of the policies.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Asked {
    /// How many more attempts it may have.
    pub(crate) retries: u32,
    /// How old a result may be that was kept. Zero for no cache.
    pub(crate) cache: Duration,
    /// How much older it may be if a new one is on its way.
    pub(crate) stale: Duration,
}

impl Asked {
    /// Whether a call passes no policy but those that need nothing of it.
    pub(crate) fn is_nothing(self) -> bool {
        self == Self { stale: self.stale, ..Self::default() }
    }

    /// Whether its result may be one that was kept.
    pub(crate) fn caches(self) -> bool {
        !self.cache.is_zero()
    }

    /// The same without the cache.
    pub(crate) fn uncached(self) -> Self {
        Self { cache: Duration::ZERO, ..self }
    }
}

/// What the policies of a client have done, counted since it was made. [`Client::policies`](crate::Client::policies)
/// returns it.
///
/// ```
/// # async fn example(client: hopline::Client) {
/// let counts = client.policies();
/// println!("{} attempts were not the first, {} were not allowed", counts.retries, counts.refused_by_budget);
/// # }
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PolicyCounts {
    /// Attempts after the first, by [`Call::retry`](crate::Call::retry).
    pub retries: u64,
    /// Attempts that the [budget](crate::Call::retry) did not allow. The call failed with its last error.
    pub refused_by_budget: u64,
    /// Attempts that a [breaker](crate::Breaker) did not let pass.
    pub refused_by_breaker: u64,
    /// How often a breaker has opened.
    pub opened: u64,
    /// Calls that were answered from the [cache](crate::Call::cache).
    pub cache_hits: u64,
    /// Calls that the cache had no result for, and that were made.
    pub cache_misses: u64,
    /// Calls that waited for another call of the same, and got its outcome.
    pub cache_shared: u64,
    /// Calls that were answered with an [old](crate::Call::stale) result.
    pub cache_stale: u64,
    /// Attempts that waited since the [rate](crate::ClientBuilder::rate) of their service was reached.
    pub waited_for_rate: u64,
    /// Attempts that would have had to wait for too long, and were not sent.
    pub refused_by_rate: u64,
}

/// The numbers of [`PolicyCounts`] as they grow.
#[derive(Debug, Default)]
pub(crate) struct Counted {
    pub(crate) retries: Counter,
    pub(crate) refused_by_budget: Counter,
    pub(crate) refused_by_breaker: Counter,
    pub(crate) opened: Counter,
    pub(crate) cache_hits: Counter,
    pub(crate) cache_misses: Counter,
    pub(crate) cache_shared: Counter,
    pub(crate) cache_stale: Counter,
    pub(crate) waited_for_rate: Counter,
    pub(crate) refused_by_rate: Counter,
}

impl Counted {
    pub(crate) fn now(&self) -> PolicyCounts {
        PolicyCounts {
            retries: self.retries.get(),
            refused_by_budget: self.refused_by_budget.get(),
            refused_by_breaker: self.refused_by_breaker.get(),
            opened: self.opened.get(),
            cache_hits: self.cache_hits.get(),
            cache_misses: self.cache_misses.get(),
            cache_shared: self.cache_shared.get(),
            cache_stale: self.cache_stale.get(),
            waited_for_rate: self.waited_for_rate.get(),
            refused_by_rate: self.refused_by_rate.get(),
        }
    }
}

/// A number that only grows.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn one_more(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
