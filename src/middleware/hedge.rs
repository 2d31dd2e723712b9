//! Hedging: a call that takes longer than nearly all others gets a second attempt, at another instance.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use super::apart::Apart;
use super::breaker::Breakers;
use super::budget::Budgets;
use super::retry::{is_good, may_try_again};
use super::{Invocation, Middleware, Next, Reply};
use crate::error::{Code, Error};

/// How many of the last replies of a method count.
const REPLIES: usize = 500;
/// How many replies there must be before it is known what is late.
const LEAST: usize = 50;
/// After how many replies it is found out anew.
const AGAIN: usize = 25;
/// One reply in so many is late.
const LATE: usize = 20;
/// The shortest time after which a second attempt is made.
const SHORTEST: Duration = Duration::from_millis(10);
/// For how long after an overload a service gets no second attempts.
const OVERLOADED: Duration = Duration::from_secs(1);
/// How many methods a client keeps the times of.
const KEPT: usize = 10_000;
/// How long it keeps those of a method that is not called, if there are so many.
const UNUSED: Duration = Duration::from_secs(60);

/// The policy behind [`Call::hedge`](crate::Call::hedge).
pub(crate) struct Hedge {
    pub(crate) hedges: Arc<Hedges>,
    pub(crate) budgets: Arc<Budgets>,
    pub(crate) breakers: Option<Arc<Breakers>>,
}

/// What a client knows of the methods whose calls it hedges.
#[derive(Debug, Default)]
pub(crate) struct Hedges {
    replies: Mutex<HashMap<MethodName, ReplyTimes>>,
    /// When a service was overloaded.
    overloaded: Mutex<HashMap<Arc<str>, Instant>>,
}

/// A service and its method.
type MethodName = (Arc<str>, Arc<str>);

/// How long the last replies of a method took.
#[derive(Debug)]
struct ReplyTimes {
    times: VecDeque<Duration>,
    /// The time that one in twenty exceeds, once it is known.
    late: Option<Duration>,
    since: usize,
    used: Instant,
}

impl Middleware for Hedge {
    async fn handle(&self, call: Invocation, next: Next) -> Result<Reply, Error> {
        if call.asked.retries == 0 {
            self.budgets.call(&call.service);
        }
        let (since, apart) = (Instant::now(), Apart::default());
        let mut first = next.run(Invocation { apart: Some(apart.clone()), ..call.clone() });
        let late = self.hedges.late_after(&call);
        let is_late = async {
            match late {
                Some(late) => sleep_until(since + late).await,
                None => std::future::pending().await,
            }
        };
        let outcome = tokio::select! {
            biased;
            outcome = &mut first => Some(outcome),
            () = is_late => None,
        };
        if let Some(outcome) = &outcome {
            self.notes(&call, since, outcome);
        }
        let may_help = match &outcome {
            Some(Err(error)) => may_try_again(error, &call) && error.retry_after().is_none(),
            Some(outcome) => !is_good(outcome, &call),
            None => true,
        };
        if !may_help || !self.may_hedge(&call) {
            let outcome = match outcome {
                Some(outcome) => return outcome,
                None => first.await,
            };
            self.notes(&call, since, &outcome);
            return outcome;
        }
        let (quickly, places) = (apart.elsewhere_quickly(), apart.places());
        let mut other = Invocation { apart: Some(quickly), ..call.clone() };
        other.avoid.extend(outcome.as_ref().and_then(answered_by));
        let mut second = next.run(other);
        if let Some(failed) = outcome {
            let outcome = second.await;
            won(&call, &outcome);
            // There was no other instance.
            return if apart.places() == places { failed } else { outcome };
        }
        // Whichever loses is dropped, which cancels it.
        let (outcome, is_second) = tokio::select! {
            outcome = &mut first => match is_good(&outcome, &call) {
                true => (outcome, false),
                false => {
                    self.notes_failure(&call, &outcome);
                    (second.await, true)
                }
            },
            outcome = &mut second => match is_good(&outcome, &call) {
                true => (outcome, true),
                false => {
                    self.notes_failure(&call, &outcome);
                    (first.await, false)
                }
            },
        };
        // That the first has not replied until now is known of it, too. Otherwise fewer and fewer would seem to be late.
        self.notes(&call, since, &outcome);
        if is_second {
            won(&call, &outcome);
        }
        outcome
    }
}

impl Hedge {
    /// Whether a call may have a second attempt. Takes it from the budget.
    fn may_hedge(&self, call: &Invocation) -> bool {
        let is_closed = |breakers: &Arc<Breakers>| breakers.is_closed(&format!("{}.{}", call.service, call.method));
        if self.hedges.is_overloaded(&call.service) || !self.breakers.as_ref().is_none_or(is_closed) {
            return false;
        }
        let may = self.budgets.spend(&call.service);
        if !may {
            call.count(|counted| counted.method.refused_by_budget.one_more());
        }
        may
    }

    fn notes(&self, call: &Invocation, since: Instant, outcome: &Result<Reply, Error>) {
        match outcome {
            Ok(_) => self.hedges.took(call, since.elapsed()),
            Err(_) => self.notes_failure(call, outcome),
        }
    }

    fn notes_failure(&self, call: &Invocation, outcome: &Result<Reply, Error>) {
        if let Err(error) = outcome {
            self.hedges.failed(call, error);
        }
    }
}

/// The instance that an outcome comes from, if that is known.
fn answered_by(outcome: &Result<Reply, Error>) -> Option<Arc<str>> {
    match outcome {
        Ok(reply) => reply.instance.clone(),
        Err(Error::Fault(fault)) => fault.instance.clone(),
        Err(_) => None,
    }
}

fn won(call: &Invocation, outcome: &Result<Reply, Error>) {
    if is_good(outcome, call) {
        call.count(|counted| counted.method.hedges_won.one_more());
    }
}

impl Hedges {
    /// After how long a call is late. `None` if that is not known.
    fn late_after(&self, call: &Invocation) -> Option<Duration> {
        let replies = self.replies.lock().unwrap_or_else(PoisonError::into_inner);
        let times = replies.get(&(call.service.clone(), call.method.clone()))?;
        times.late.map(|late| late.max(SHORTEST))
    }

    /// A call took this long until its first good reply.
    fn took(&self, call: &Invocation, time: Duration) {
        let (key, now) = ((call.service.clone(), call.method.clone()), Instant::now());
        let mut replies = self.replies.lock().unwrap_or_else(PoisonError::into_inner);
        if replies.len() >= KEPT && !replies.contains_key(&key) {
            replies.retain(|_, times| now.saturating_duration_since(times.used) < UNUSED);
        }
        let new = || ReplyTimes { times: VecDeque::new(), late: None, since: 0, used: now };
        replies.entry(key).or_insert_with(new).add(time, now);
    }

    /// A call has failed.
    fn failed(&self, call: &Invocation, error: &Error) {
        if error.code() == Code::ResourceExhausted {
            let mut overloaded = self.overloaded.lock().unwrap_or_else(PoisonError::into_inner);
            overloaded.insert(call.service.clone(), Instant::now());
        }
    }

    fn is_overloaded(&self, service: &Arc<str>) -> bool {
        let mut overloaded = self.overloaded.lock().unwrap_or_else(PoisonError::into_inner);
        let is_over = overloaded.get(service).is_some_and(|at| at.elapsed() >= OVERLOADED);
        if is_over {
            overloaded.remove(service);
        }
        overloaded.contains_key(service)
    }
}

impl ReplyTimes {
    fn add(&mut self, time: Duration, now: Instant) {
        if self.times.len() == REPLIES {
            self.times.pop_front();
        }
        self.times.push_back(time);
        (self.since, self.used) = (self.since + 1, now);
        let is_due = self.late.is_none() || self.since >= AGAIN;
        if is_due && self.times.len() >= LEAST {
            let mut times: Vec<_> = self.times.iter().copied().collect();
            let at = times.len() - 1 - times.len() / LATE;
            let (_, late, _) = times.select_nth_unstable(at);
            (self.late, self.since) = (Some(*late), 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_is_late_is_known_after_fifty_replies_and_follows_the_last_five_hundred() {
        let now = Instant::now();
        let mut times = ReplyTimes { times: VecDeque::new(), late: None, since: 0, used: now };
        let mut add = |from: u64, to: u64| {
            (from..to).for_each(|number| times.add(Duration::from_millis(number), now));
            times.late
        };
        assert_eq!(add(0, 49), None);
        assert_eq!(add(49, 50), Some(Duration::from_millis(47)));
        assert_eq!(add(50, 100), Some(Duration::from_millis(94)));
        assert_eq!(add(1000, 1500), Some(Duration::from_millis(1474)));
    }
}
