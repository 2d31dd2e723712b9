//! The budget of attempts: when many calls fail, more attempts would only add to the load. So a client makes, for each
//! service, no more than a fifth as many further attempts as it makes calls, and ten a second.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// For how long calls and attempts count.
const WINDOW: Duration = Duration::from_secs(10);
/// A second: what is counted together.
const SLOT: Duration = Duration::from_secs(1);
/// For how many calls there is one further attempt.
const CALLS: u64 = 5;
/// How many further attempts there are in a second, however few the calls are.
const EACH_SECOND: u64 = 10;

/// The budgets of a client, by service.
#[derive(Debug, Default)]
pub(crate) struct Budgets(Mutex<HashMap<Arc<str>, Budget>>);

/// The calls and the further attempts of the last seconds.
#[derive(Debug, Default)]
struct Budget {
    slots: VecDeque<Slot>,
    calls: u64,
    spent: u64,
}

#[derive(Debug)]
struct Slot {
    since: Instant,
    calls: u64,
    spent: u64,
}

impl Budgets {
    /// Notes that a call of a service begins, with its first attempt.
    pub(crate) fn call(&self, service: &Arc<str>) {
        self.with(service, |budget, now| {
            budget.slot(now).calls += 1;
            budget.calls += 1;
        });
    }

    /// Takes a further attempt from the budget of a service. Returns `false` if there is none left.
    #[must_use]
    pub(crate) fn spend(&self, service: &Arc<str>) -> bool {
        self.with(service, |budget, now| {
            budget.forget(now);
            if budget.spent >= budget.calls / CALLS + EACH_SECOND * WINDOW.as_secs() {
                return false;
            }
            budget.slot(now).spent += 1;
            budget.spent += 1;
            true
        })
    }

    fn with<T>(&self, service: &Arc<str>, act: impl FnOnce(&mut Budget, Instant) -> T) -> T {
        let now = Instant::now();
        let mut budgets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match budgets.get_mut(service) {
            Some(budget) => act(budget, now),
            None => act(budgets.entry(service.clone()).or_default(), now),
        }
    }
}

impl Budget {
    /// Forgets what is too long ago.
    fn forget(&mut self, now: Instant) {
        while let Some(slot) = self.slots.pop_front_if(|slot| now.saturating_duration_since(slot.since) >= WINDOW) {
            self.calls -= slot.calls;
            self.spent -= slot.spent;
        }
    }

    /// The slot of this second.
    fn slot(&mut self, now: Instant) -> &mut Slot {
        self.forget(now);
        if self.slots.back().is_none_or(|slot| now.saturating_duration_since(slot.since) >= SLOT) {
            self.slots.push_back(Slot { since: now, calls: 0, spent: 0 });
        }
        self.slots.back_mut().expect("there is one now")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_fifth_of_the_calls_and_ten_a_second_may_be_tried_again() {
        let (budgets, service, other) = (Budgets::default(), Arc::from("demo.v1"), Arc::from("other.v1"));
        let spend_all = |service| (0..).take_while(|_| budgets.spend(service)).count();
        assert_eq!(spend_all(&service), 100, "ten a second for ten seconds");
        (0..50).for_each(|_| budgets.call(&service));
        assert_eq!(spend_all(&service), 10);
        assert_eq!(spend_all(&other), 100, "each service has its own");
        tokio::time::advance(WINDOW / 2).await;
        (0..50).for_each(|_| budgets.call(&service));
        assert_eq!(spend_all(&service), 10);
        tokio::time::advance(WINDOW / 2).await;
        // What was spent ten seconds ago is there again; 50 calls and 10 attempts are of later.
        assert_eq!(spend_all(&service), 100);
        tokio::time::advance(WINDOW).await;
        assert_eq!(spend_all(&service), 100);
    }
}
