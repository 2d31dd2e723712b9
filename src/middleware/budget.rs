//! The budget of attempts: when many calls fail, more attempts would only add to the load. So a client makes, for each
//! service, ten further attempts a second, and beyond that no more than a fifth as many as it makes calls.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// For how long calls and attempts count.
const WINDOW: Duration = Duration::from_secs(10);
/// A second: what is counted together.
const SLOT: Duration = Duration::from_secs(1);
/// For how many calls of the window there is one further attempt.
const CALLS: u64 = 5;
/// How many further attempts there are in each second, however few the calls are. Those of one second are not there in
/// the next: a service that fails for the first time would get all at once.
const EACH_SECOND: u64 = 10;

/// The budgets of a client, by service.
#[derive(Debug, Default)]
pub(crate) struct Budgets(Mutex<HashMap<Arc<str>, Budget>>);

/// The calls and the further attempts of the last seconds.
#[derive(Debug, Default)]
struct Budget {
    slots: VecDeque<Slot>,
    /// All calls.
    calls: u64,
    /// The further attempts, without ten of each second.
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
            let slot = budget.slot(now);
            if slot.spent >= EACH_SECOND {
                if budget.spent >= budget.calls / CALLS {
                    return false;
                }
                budget.spent += 1;
            }
            budget.slot(now).spent += 1;
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
        let is_over = |slot: &&Slot| now.saturating_duration_since(slot.since) >= WINDOW;
        for slot in self.slots.drain(..self.slots.iter().take_while(is_over).count()) {
            self.calls -= slot.calls;
            self.spent -= slot.spent.saturating_sub(EACH_SECOND);
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
        assert_eq!(spend_all(&service), 10);
        (0..50).for_each(|_| budgets.call(&service));
        assert_eq!(spend_all(&service), 10, "a fifth");
        assert_eq!(spend_all(&other), 10, "each service has its own");
        tokio::time::advance(WINDOW / 2).await;
        assert_eq!(spend_all(&service), 10, "ten in each second");
        (0..100).for_each(|_| budgets.call(&service));
        assert_eq!(spend_all(&service), 20);
        tokio::time::advance(WINDOW / 2).await;
        // The 50 calls are too long ago, and their 10 attempts. The 100 are not, and nor are their 20.
        assert_eq!(spend_all(&service), 10);
        (0..5).for_each(|_| budgets.call(&service));
        assert_eq!(spend_all(&service), 1);
        tokio::time::advance(2 * WINDOW).await;
        assert_eq!(spend_all(&service), 10, "what was not used is not kept");
    }
}
