//! The policies of a client: what it does about calls that fail. Each is a file beside this one. Here is what they share:
//! what a call asks for, and what they have done.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use super::Style;
use super::breaker::Breakers;
use super::budget::Budgets;
use super::cache::{CacheCounters, CacheSize, Caching, Driver, KeptResults};
use super::chain::Chain;
use super::fork::Fork;
use super::hedge::{Hedge, Hedges};
use super::rate::Rates;
use super::retry::Retrying;
#[cfg(feature = "metrics")]
use crate::counting::{CallTimes, Spread};

/// Which policies a call passes, and what the client keeps for them.
///
/// The order is: the user's own middleware, cache, retry, forks or hedging, the choice of an instance, breaker, rate, the
/// way to the broker. So each attempt passes the breaker, and a middleware of the user sees a call once, however many
/// attempts it has.
#[derive(Debug)]
pub(crate) struct Policies {
    pub(crate) settings: PolicySettings,
    pub(crate) budgets: Arc<Budgets>,
    /// `None` unless they are switched on.
    pub(crate) breakers: Option<Arc<Breakers>>,
    pub(crate) rates: Arc<Rates>,
    /// Made for the first call that asks for it.
    cache: OnceLock<Arc<KeptResults>>,
    hedges: Arc<Hedges>,
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
    /// Whether rules change what calls ask for.
    pub(crate) has_rules: bool,
}

impl Policies {
    pub(crate) fn new(settings: PolicySettings) -> Self {
        let breakers = settings.has_breakers.then(Arc::default);
        let rates = Arc::new(Rates::new(&settings.rates));
        let (budgets, cache, hedges) = Default::default();
        Self { settings, budgets, breakers, rates, cache, hedges }
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
            let new = || Arc::new(KeptResults::new(self.settings.cache_size, Driver::Task));
            chain.push(Caching(self.cache.get_or_init(new).clone()));
        }
        if asked.retries > 0 {
            chain.push(Retrying { budgets: self.budgets.clone() });
        }
        if asked.forks > 1 {
            chain.push(Fork);
        } else if asked.hedges {
            let (hedges, budgets) = (self.hedges.clone(), self.budgets.clone());
            chain.push(Hedge { hedges, budgets, breakers: self.breakers.clone() });
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
    /// Whether it gets another attempt if it is late.
    pub(crate) hedges: bool,
    /// How many instances are to run it at once, if they are more than one.
    pub(crate) forks: u32,
    /// Whether it is to become a oneway call if it fails.
    pub(crate) fails_back: bool,
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

    /// Whether it may have to go to an instance that the client chooses.
    pub(crate) fn needs_instances(self) -> bool {
        self.retries > 0 || self.hedges || self.forks > 1
    }

    /// What of it a call of this style can have.
    pub(crate) fn for_style(self, style: Style) -> Self {
        match style {
            Style::Call => self,
            Style::Broadcast | Style::Oneway | Style::Event => Self { retries: self.retries, ..Self::default() },
        }
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
    /// Second attempts of calls that were late, by [`Call::hedge`](crate::Call::hedge).
    pub hedges: u64,
    /// How many of these have replied first.
    pub hedges_won: u64,
    /// Attempts at the same time as another, by [`Call::fork`](crate::Call::fork): of a call to three instances, two.
    pub forks: u64,
    /// Values in place of errors, by [`Call::fail_safe`](crate::Call::fail_safe).
    pub values_for_errors: u64,
    /// Calls that have become oneway calls, by [`Call::fail_back`](crate::Call::fail_back).
    pub failed_back: u64,
}

/// The numbers of [`PolicyCounts`] as they grow, for the calls of one method.
#[derive(Debug, Default)]
pub(crate) struct PolicyCounters {
    pub(crate) retries: Counter,
    pub(crate) refused_by_budget: Counter,
    pub(crate) refused_by_breaker: Counter,
    pub(crate) opened: Counter,
    pub(crate) cache: CacheCounters,
    pub(crate) waited_for_rate: Counter,
    pub(crate) refused_by_rate: Counter,
    pub(crate) hedges: Counter,
    pub(crate) hedges_won: Counter,
    pub(crate) forks: Counter,
    pub(crate) values_for_errors: Counter,
    pub(crate) failed_back: Counter,
    /// How many retries and hedges the calls had that had any, and for how long they waited between attempts.
    #[cfg(feature = "metrics")]
    pub(crate) of_calls: CallSpreads,
}

/// How often and how long something happened to each call that it happened to.
#[cfg(feature = "metrics")]
#[derive(Debug, Default)]
pub(crate) struct CallSpreads {
    pub(crate) retries: Spread,
    pub(crate) hedges: Spread,
    pub(crate) retry_delay: CallTimes,
}

impl PolicyCounters {
    pub(crate) fn now(&self) -> PolicyCounts {
        PolicyCounts {
            retries: self.retries.get(),
            refused_by_budget: self.refused_by_budget.get(),
            refused_by_breaker: self.refused_by_breaker.get(),
            opened: self.opened.get(),
            cache_hits: self.cache.hits.get(),
            cache_misses: self.cache.misses.get(),
            cache_shared: self.cache.shared.get(),
            cache_stale: self.cache.stale.get(),
            waited_for_rate: self.waited_for_rate.get(),
            refused_by_rate: self.refused_by_rate.get(),
            hedges: self.hedges.get(),
            hedges_won: self.hedges_won.get(),
            forks: self.forks.get(),
            values_for_errors: self.values_for_errors.get(),
            failed_back: self.failed_back.get(),
        }
    }
}

impl PolicyCounts {
    /// Adds the counts of another method.
    pub(crate) fn add(&mut self, other: Self) {
        self.retries += other.retries;
        self.refused_by_budget += other.refused_by_budget;
        self.refused_by_breaker += other.refused_by_breaker;
        self.opened += other.opened;
        self.cache_hits += other.cache_hits;
        self.cache_misses += other.cache_misses;
        self.cache_shared += other.cache_shared;
        self.cache_stale += other.cache_stale;
        self.waited_for_rate += other.waited_for_rate;
        self.refused_by_rate += other.refused_by_rate;
        self.hedges += other.hedges;
        self.hedges_won += other.hedges_won;
        self.forks += other.forks;
        self.values_for_errors += other.values_for_errors;
        self.failed_back += other.failed_back;
    }
}

/// A call that passes policies, with the counters of its method. When it is over, it is counted how many attempts it had.
#[derive(Debug)]
pub(crate) struct TalliedCall {
    pub(crate) method: Arc<PolicyCounters>,
    #[cfg(feature = "metrics")]
    retries: Counter,
    #[cfg(feature = "metrics")]
    hedges: Counter,
    /// In nanoseconds.
    #[cfg(feature = "metrics")]
    retry_delay: Counter,
}

impl TalliedCall {
    pub(crate) fn new(method: Arc<PolicyCounters>) -> Self {
        Self {
            method,
            #[cfg(feature = "metrics")]
            retries: Counter::default(),
            #[cfg(feature = "metrics")]
            hedges: Counter::default(),
            #[cfg(feature = "metrics")]
            retry_delay: Counter::default(),
        }
    }

    /// It is tried again, after this pause.
    pub(crate) fn retries(&self, pause: Duration) {
        self.method.retries.one_more();
        #[cfg(feature = "metrics")]
        {
            self.retries.one_more();
            self.retry_delay.add(u64::try_from(pause.as_nanos()).unwrap_or(u64::MAX));
        }
        #[cfg(not(feature = "metrics"))]
        let _ = pause;
    }

    /// A second attempt of it was sent, since it is late.
    pub(crate) fn hedges(&self) {
        self.method.hedges.one_more();
        #[cfg(feature = "metrics")]
        self.hedges.one_more();
    }
}

#[cfg(feature = "metrics")]
impl Drop for TalliedCall {
    fn drop(&mut self) {
        let of_calls = &self.method.of_calls;
        let number = |counter: &Counter| usize::try_from(counter.get()).unwrap_or(usize::MAX);
        let (retries, hedges) = (number(&self.retries), number(&self.hedges));
        if retries > 0 {
            of_calls.retries.add(retries);
            of_calls.retry_delay.add(Duration::from_nanos(self.retry_delay.get()), None);
        }
        if hedges > 0 {
            of_calls.hedges.add(hedges);
        }
    }
}

/// A number that only grows.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn one_more(&self) {
        self.add(1);
    }

    pub(crate) fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
