//! The rate of a client: how many calls to a service leave in a second. What is over it waits for a moment, and then fails
//! without being sent.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError, RwLock};
use std::time::Duration;

use tokio::time::Instant;

/// The longest wait of a call.
const LONGEST_WAIT: Duration = Duration::from_millis(500);
/// As many calls as this time has room for may leave at once, and at least one.
const AT_ONCE: Duration = Duration::from_millis(100);

/// The rates of a client.
#[derive(Debug, Default)]
pub(crate) struct Rates {
    /// By service as `name.vMAJOR`, as the client was built.
    built: HashMap<String, Rate>,
    /// By service or by method as `name.vMAJOR.method`, as rules say.
    ruled: RwLock<HashMap<String, Rate>>,
    /// Whether rules say anything, which is cheaper to ask.
    has_ruled: AtomicBool,
}

/// The names by which a call may have a rate.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Paced<'a> {
    /// As `name.vMAJOR`.
    pub(crate) service: &'a str,
    /// As `name.vMAJOR.method`.
    pub(crate) method: &'a str,
}

/// The rate of one service.
#[derive(Debug)]
struct Rate {
    /// How many calls a second.
    calls: u32,
    /// When the next call would leave if all left evenly. `None` before the first.
    next: Mutex<Option<Instant>>,
}

impl Rates {
    /// Calls a second, by service as `name.vMAJOR`. None is 0.
    pub(crate) fn new(rates: &[(String, u32)]) -> Self {
        let built = rates.iter().map(|(service, calls)| (service.clone(), Rate::new(*calls))).collect();
        Self { built, ..Self::default() }
    }

    /// Rules say these rates, of services and methods. A rate that stays as it was goes on.
    pub(crate) fn rule(&self, rates: &HashMap<String, u32>) {
        let mut ruled = self.ruled.write().unwrap_or_else(PoisonError::into_inner);
        ruled.retain(|name, rate| rates.get(name) == Some(&rate.calls));
        for (name, calls) in rates {
            ruled.entry(name.clone()).or_insert_with(|| Rate::new(*calls));
        }
        self.has_ruled.store(!ruled.is_empty(), Ordering::Relaxed);
    }

    /// Whether a call has a rate.
    pub(crate) fn limit(&self, call: Paced<'_>) -> bool {
        self.with(call, |rate| rate.is_some())
    }

    /// Looks at the rate of a call: that of a rule for its method, that of a rule for its service, or that of the builder.
    fn with<T>(&self, call: Paced<'_>, look: impl FnOnce(Option<&Rate>) -> T) -> T {
        let built = || if self.built.is_empty() { None } else { self.built.get(call.service) };
        if !self.has_ruled.load(Ordering::Relaxed) {
            return look(built());
        }
        let ruled = self.ruled.read().unwrap_or_else(PoisonError::into_inner);
        look(ruled.get(call.method).or_else(|| ruled.get(call.service)).or_else(built))
    }

    /// Gives a call its turn. Returns how long it is to wait for it, which is less than `left`.
    ///
    /// # Errors
    /// The calls a second, if it would have to wait for too long. Then it has no turn.
    pub(crate) fn turn(&self, call: Paced<'_>, left: Duration) -> Result<Duration, u32> {
        self.with(call, |rate| rate.map_or(Ok(Duration::ZERO), |rate| rate.turn(left)))
    }
}

impl Rate {
    fn new(calls: u32) -> Self {
        Self { calls, next: Mutex::default() }
    }

    fn turn(&self, left: Duration) -> Result<Duration, u32> {
        let each = Duration::from_secs(1) / self.calls.max(1);
        let now = Instant::now();
        // What a quiet time has left over, as far as it may leave at once.
        let earliest = now.checked_sub(AT_ONCE.saturating_sub(each)).unwrap_or(now);
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let turn = next.map_or(earliest, |next| next.max(earliest));
        let wait = turn.saturating_duration_since(now);
        if wait > LONGEST_WAIT || (wait >= left && !wait.is_zero()) {
            return Err(self.calls);
        }
        *next = Some(turn + each);
        Ok(wait)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    /// The waits of calls that come at once, until one is refused.
    fn waits(rate: &Rate, left: Duration) -> Vec<u128> {
        std::iter::from_fn(|| rate.turn(left).ok()).map(|wait| wait.as_millis()).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn calls_leave_evenly_and_wait_for_half_a_second_at_most() {
        let rate = Rate::new(100);
        let evenly = |times: std::ops::RangeInclusive<u128>| times.map(|n| n * 10).collect::<Vec<_>>();
        let at_once = vec![0; 10];
        assert_eq!(waits(&rate, MINUTE), [at_once.clone(), evenly(1..=50)].concat());
        tokio::time::advance(Duration::from_millis(30)).await;
        assert_eq!(waits(&rate, MINUTE), evenly(48..=50));
        tokio::time::advance(MINUTE).await;
        assert_eq!(waits(&rate, Duration::from_millis(50)), [at_once, evenly(1..=4)].concat(), "within its time");
        let slow = Rate::new(2);
        assert_eq!(waits(&slow, MINUTE), [0, 500]);
        tokio::time::advance(Duration::from_millis(499)).await;
        assert_eq!(waits(&slow, MINUTE), []);
        tokio::time::advance(Duration::from_millis(1)).await;
        assert_eq!(waits(&slow, MINUTE), [500]);
    }
}
