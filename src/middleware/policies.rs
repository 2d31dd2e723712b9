//! The policies of a client: what it does about calls that fail. Each is a file beside this one. Here is what they share:
//! what a call asks for, and what they have done.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::breaker::Breakers;
use super::budget::Budgets;
use super::chain::Chain;
use super::retry::Retry;

/// Which policies a call passes, and what the client keeps for them.
///
/// The order is: the user's own middleware, retry, the choice of an instance, breaker, the way to the broker. So each
/// attempt passes the breaker, and a middleware of the user sees a call once, however many attempts it has.
#[derive(Debug)]
pub(crate) struct Policies {
    pub(crate) settings: PolicySettings,
    pub(crate) budgets: Arc<Budgets>,
    /// `None` unless they are switched on.
    pub(crate) breakers: Option<Breakers>,
    pub(crate) counted: Arc<Counted>,
}

/// What the user of a client has asked for.
#[derive(Debug, Clone, Default)]
pub(crate) struct PolicySettings {
    /// What a call asks for that asks for nothing itself.
    pub(crate) asked: Asked,
    pub(crate) has_breakers: bool,
}

impl Policies {
    pub(crate) fn new(settings: PolicySettings) -> Self {
        let counted = Arc::<Counted>::default();
        let breakers = settings.has_breakers.then(|| Breakers::new(counted.clone()));
        Self { settings, budgets: Arc::default(), breakers, counted }
    }

    /// The user's middleware, with the policies inside of it that a call has asked for.
    pub(crate) fn around(&self, middleware: &Chain, asked: Asked) -> Chain {
        let mut chain = middleware.clone();
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
}

impl Asked {
    /// Whether a call passes no policy but those that need nothing of it.
    pub(crate) fn is_nothing(self) -> bool {
        self == Self::default()
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
}

/// The numbers of [`PolicyCounts`] as they grow.
#[derive(Debug, Default)]
pub(crate) struct Counted {
    pub(crate) retries: Counter,
    pub(crate) refused_by_budget: Counter,
    pub(crate) refused_by_breaker: Counter,
    pub(crate) opened: Counter,
}

impl Counted {
    pub(crate) fn now(&self) -> PolicyCounts {
        PolicyCounts {
            retries: self.retries.get(),
            refused_by_budget: self.refused_by_budget.get(),
            refused_by_breaker: self.refused_by_breaker.get(),
            opened: self.opened.get(),
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
