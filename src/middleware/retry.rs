//! Retry: a call that failed is tried again, if that is safe and there is hope.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::sleep;
use uuid::Uuid;

use super::budget::Budgets;
use super::{Invocation, Middleware, Next, Reply, Style};
use crate::error::{Code, Error};

/// The longest pause before the second attempt. Each further pause may be twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// The longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// The same for the pauses after an overload, which need more time to be of use.
const FIRST_OVERLOADED_PAUSE: Duration = Duration::from_secs(1);
/// The longest pause after an overload.
const LONGEST_OVERLOADED_PAUSE: Duration = Duration::from_secs(5);

/// Which of the method's own errors are worth another attempt: see [`Call::retry_on`](crate::Call::retry_on).
#[derive(Clone)]
pub(crate) struct RetryOn(pub(crate) Arc<dyn Fn(&Reply) -> bool + Send + Sync>);

/// The policy behind [`Call::retry`](crate::Call::retry).
pub(crate) struct Retrying {
    pub(crate) budgets: Arc<Budgets>,
}

impl Middleware for Retrying {
    async fn handle(&self, mut call: Invocation, next: Next) -> Result<Reply, Error> {
        self.budgets.call(&call.service);
        for attempt in 1.. {
            let outcome = next.run(call.clone()).await;
            let may = match &outcome {
                Err(error) => may_try_again(error, &call),
                Ok(reply) => passes(reply, &call),
            };
            if !may || attempt > call.asked.retries {
                return outcome;
            }
            let pause = pause(outcome.as_ref().err(), attempt);
            if call.remaining().is_some_and(|left| left <= pause) {
                return outcome;
            }
            if !self.budgets.spend(&call.service) {
                call.count(|counted| counted.method.refused_by_budget.one_more());
                return outcome;
            }
            if let Err(Error::Fault(fault)) = &outcome {
                call.avoid.extend(fault.instance.clone());
            }
            sleep(pause).await;
            call.count(|counted| counted.retries(pause));
        }
        unreachable!("an attempt ends it")
    }
}

/// Whether another attempt of a call may help, and does no harm.
pub(super) fn may_try_again(error: &Error, call: &Invocation) -> bool {
    // After its deadline nobody waits for a call, and a server that says so has no more time either.
    let is_late = error.code() == Code::DeadlineExceeded;
    let is_safe = !error.may_have_run() || call.idempotent && call.style == Style::Call;
    error.is_transient() && !is_late && is_safe
}

/// Whether the outcome of an attempt is one that ends the call: not an error, and not an own error that passes.
pub(super) fn is_good(outcome: &Result<Reply, Error>, call: &Invocation) -> bool {
    outcome.as_ref().is_ok_and(|reply| !passes(reply, call))
}

/// Whether a reply is the method's own error, and one that the call says is worth another attempt. The method has run.
fn passes(reply: &Reply, call: &Invocation) -> bool {
    let may_run_again = call.idempotent && call.style == Style::Call;
    reply.is_own_error() && may_run_again && call.retry_on.as_ref().is_some_and(|RetryOn(passes)| passes(reply))
}

/// How long to wait before another attempt, after `attempts` of them: what the server says, or a random part of a time
/// that doubles, so that the calls that failed together are not tried again together. There is no error if the method
/// has returned one of its own.
fn pause(error: Option<&Error>, attempts: u32) -> Duration {
    if let Some(asked) = error.and_then(Error::retry_after) {
        return asked;
    }
    let (first, longest) = match error.map(Error::code) {
        Some(Code::ResourceExhausted) => (FIRST_OVERLOADED_PAUSE, LONGEST_OVERLOADED_PAUSE),
        _ => (FIRST_PAUSE, LONGEST_PAUSE),
    };
    let most = first.saturating_mul(2_u32.saturating_pow(attempts - 1)).min(longest);
    let (random, _) = Uuid::new_v4().as_u64_pair();
    most.mul_f64((random >> 16) as f64 / (1_u64 << 48) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Fault;

    #[test]
    fn pauses_are_random_parts_of_times_that_double() {
        let [busy, gone] = [Code::ResourceExhausted, Code::Unavailable].map(|code| Error::Fault(Fault::new(code, "")));
        for (attempts, most) in [(1, 50), (2, 100), (3, 200), (5, 800), (6, 1000), (60, 1000)] {
            let pauses: Vec<_> = (0..1000).map(|_| pause(Some(&gone), attempts).as_secs_f64() * 1e3).collect();
            let (longest, mean) = (pauses.iter().copied().fold(0.0, f64::max), pauses.iter().sum::<f64>() / 1e3);
            let most = f64::from(most);
            assert!(longest <= most && longest > most * 0.9 && (0.4..0.6).contains(&(mean / most)), "{longest} {mean}");
        }
        let longest = (0..1000).map(|_| pause(Some(&busy), 1)).max().expect("some");
        assert!(longest > FIRST_OVERLOADED_PAUSE.mul_f64(0.9) && longest <= FIRST_OVERLOADED_PAUSE);
        let asked = Error::Fault(Fault::new(Code::Unavailable, "").retry_after(Duration::from_secs(7)));
        assert_eq!(pause(Some(&asked), 1), Duration::from_secs(7));
    }
}
