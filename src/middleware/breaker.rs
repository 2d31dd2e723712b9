//! Circuit breakers: when a method fails again and again, its calls fail at once for a while, and nothing is sent.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::outcomes::OutcomeWindow;
use super::policies::PolicyCounters;
use crate::error::{Code, Error};

/// For how long an outcome counts.
const WINDOW: Duration = Duration::from_secs(10);
/// When an attempt may be worth another try that was refused while a probe is on its way.
const PROBING: Duration = Duration::from_secs(1);
/// How many outcomes there must be before a breaker opens.
const LEAST: u64 = 20;
/// How long a breaker is open for the first time. Each time that it opens again without having closed, it is open for
/// twice as long.
const OPEN: Duration = Duration::from_secs(5);
/// The longest time that a breaker is open.
const LONGEST_OPEN: Duration = Duration::from_secs(60);
/// How many probes must go well before a breaker closes.
const PROBES: u32 = 3;
/// How many breakers a client keeps, beside those that are open.
const KEPT: usize = 10_000;

/// A circuit breaker for each method that a client calls: [`ClientBuilder::breaker`](crate::ClientBuilder::breaker).
///
/// It **opens** when half of at least 20 attempts within 10 s have failed. While it is open, calls fail at once with
/// [`Error::CircuitOpen`], and nothing is sent. After 5 s it lets three calls through, one after the other: the
/// *probes*. If all go well, it **closes**. If one fails, it is open again, for twice as long, up to 60 s. Other calls
/// fail while a probe is on its way.
///
/// As failures count [`Timeout`](Error::Timeout) and the faults `DEADLINE_EXCEEDED`, `RESOURCE_EXHAUSTED`, `ABORTED`,
/// `INTERNAL`, `UNAVAILABLE` and `DATA_LOSS`. A result, the method's own error and any other fault show that the method
/// works. What says nothing of the method does not count: `NoService`, `Overloaded`, `Blocked`, `Disconnected`, and calls
/// that were dropped.
///
/// A call to any instance passes the breaker of its method. A call to one instance, or along a
/// [`Route`](crate::Route), passes the breaker of its method at that instance; a route takes another instance then.
///
/// ```
/// use std::time::Duration;
///
/// use hopline::{Client, Error};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Error> {
/// let client = Client::builder().breaker().connect("memory://").await?;
/// // By hand, as when a database is taken down for an hour.
/// client.open_breaker("shop.v1", "order", Duration::from_secs(3600))?;
/// let refused = client.call::<u64>("shop.v1", "order", ("pen",)).await;
/// assert!(matches!(refused, Err(Error::CircuitOpen { .. })));
/// client.close_breaker("shop.v1", "order")?;
/// for breaker in client.breakers() {
///     println!("{breaker}");
/// }
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Breaker {
    /// The method, as `name.vMAJOR.method`.
    pub method: String,
    /// The instance, if it is the breaker for calls to this one.
    pub instance: Option<String>,
    /// Whether it lets calls through.
    pub state: BreakerState,
}

/// What a [`Breaker`] does with calls.
///
/// ```
/// # fn example(client: hopline::Client) {
/// use hopline::BreakerState;
///
/// let open = client.breakers().into_iter().filter(|breaker| breaker.state != BreakerState::Closed);
/// println!("{} breakers are open", open.count());
/// # }
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum BreakerState {
    /// All calls pass.
    Closed,
    /// No call passes for this time.
    Open(Duration),
    /// One call passes at a time, to see whether it goes well.
    HalfOpen,
}

impl fmt::Display for Breaker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.method)?;
        if let Some(instance) = &self.instance {
            write!(f, "@{instance}")?;
        }
        match self.state {
            BreakerState::Closed => f.write_str(" closed"),
            BreakerState::Open(left) => write!(f, " open for {left:.1?}"),
            BreakerState::HalfOpen => f.write_str(" half open"),
        }
    }
}

/// The method, as `name.vMAJOR.method`, and the instance if the call goes to a given one.
type Key = (Arc<str>, Option<Arc<str>>);

/// The breakers of a client.
#[derive(Debug, Default)]
pub(crate) struct Breakers {
    circuits: Mutex<HashMap<Key, Circuit>>,
}

/// One breaker.
#[derive(Debug)]
struct Circuit {
    ended: OutcomeWindow,
    position: Position,
    /// For how long it was open the last time. 0 after it has closed.
    was_open: Duration,
    /// Counts how often it has changed its position. What began before the last change says nothing any more.
    turn: u64,
}

#[derive(Debug)]
enum Position {
    Closed,
    Open {
        until: Instant,
    },
    /// So many probes went well, and whether one is on its way.
    HalfOpen {
        good: u32,
        is_probing: bool,
    },
}

/// An attempt that has passed a breaker. Dropping it without an outcome says nothing.
pub(crate) struct Passed<'b> {
    breakers: &'b Breakers,
    counted: &'b PolicyCounters,
    key: Key,
    turn: u64,
    is_told: bool,
}

impl Breakers {
    /// Lets an attempt pass, and counts with its method what the breaker does.
    ///
    /// # Errors
    /// [`Error::CircuitOpen`].
    pub(crate) fn enter<'b>(
        &'b self,
        method: &Arc<str>,
        instance: Option<&Arc<str>>,
        counted: &'b PolicyCounters,
    ) -> Result<Passed<'b>, Error> {
        let key = (method.clone(), instance.cloned());
        let now = Instant::now();
        let passes = self.with(&key, now, |circuit| circuit.enter(now).map(|()| circuit.turn));
        match passes {
            Ok(turn) => Ok(Passed { breakers: self, counted, key, turn, is_told: false }),
            Err(retry_in) => {
                counted.refused_by_breaker.one_more();
                let instance = instance.map(ToString::to_string);
                Err(Error::CircuitOpen { method: method.to_string(), instance, retry_in, rule: None, set_by: None })
            }
        }
    }

    /// Whether the breaker of a method is closed, for calls to any instance.
    pub(crate) fn is_closed(&self, method: &str) -> bool {
        let circuits = self.circuits.lock().unwrap_or_else(PoisonError::into_inner);
        let circuit = circuits.get(&(Arc::from(method), None));
        circuit.is_none_or(|circuit| matches!(circuit.position, Position::Closed))
    }

    /// Opens the breaker of a method by hand.
    pub(crate) fn open(&self, method: Arc<str>, time: Duration) {
        let now = Instant::now();
        self.with(&(method, None), now, |circuit| circuit.go(Position::Open { until: crate::clock::later(now, time) }));
    }

    /// Closes the breakers of a method by hand.
    pub(crate) fn close(&self, method: &str) {
        let mut circuits = self.circuits.lock().unwrap_or_else(PoisonError::into_inner);
        circuits.retain(|(known, _), _| **known != *method);
    }

    /// All breakers that are not new, in the order of their names.
    pub(crate) fn all(&self) -> Vec<Breaker> {
        let now = Instant::now();
        let circuits = self.circuits.lock().unwrap_or_else(PoisonError::into_inner);
        let mut breakers: Vec<_> = circuits
            .iter()
            .map(|((method, instance), circuit)| Breaker {
                method: method.to_string(),
                instance: instance.as_deref().map(ToOwned::to_owned),
                state: circuit.state(now),
            })
            .collect();
        breakers.sort_unstable_by(|one, other| (&one.method, &one.instance).cmp(&(&other.method, &other.instance)));
        breakers
    }

    fn with<T>(&self, key: &Key, now: Instant, act: impl FnOnce(&mut Circuit) -> T) -> T {
        let mut circuits = self.circuits.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(circuit) = circuits.get_mut(key) {
            return act(circuit);
        }
        if circuits.len() >= KEPT {
            // A closed breaker without outcomes of late is as good as a new one.
            circuits.retain(|_, circuit| !circuit.is_as_new(now));
        }
        act(circuits.entry(key.clone()).or_insert_with(Circuit::new))
    }

    /// Notes how an attempt has ended. `None` if that says nothing.
    fn ended(&self, passed: &Passed<'_>, is_good: Option<bool>) {
        let now = Instant::now();
        let opens = self.with(&passed.key, now, |circuit| circuit.ended(passed.turn, is_good, now));
        if opens {
            passed.counted.opened.one_more();
        }
    }
}

impl Passed<'_> {
    /// The attempt has this outcome.
    pub(crate) fn ends<T>(mut self, outcome: &Result<T, Error>) {
        self.is_told = true;
        self.breakers.ended(&self, outcome.as_ref().map_or_else(counts, |_| Some(true)));
    }
}

impl Drop for Passed<'_> {
    fn drop(&mut self) {
        if !self.is_told {
            self.breakers.ended(self, None);
        }
    }
}

/// Whether an error shows that the method works, `true`, or fails, `false`. `None` if it shows neither.
fn counts(error: &Error) -> Option<bool> {
    use Code::{Aborted, DataLoss, DeadlineExceeded, Internal, ResourceExhausted, Unavailable};
    match error {
        Error::Timeout { .. } => Some(false),
        Error::Fault(fault) => {
            let fails = [DeadlineExceeded, ResourceExhausted, Aborted, Internal, Unavailable, DataLoss];
            Some(!fails.contains(&fault.code))
        }
        Error::UnreadableReply(_) => Some(true),
        _ => None,
    }
}

impl Circuit {
    fn new() -> Self {
        Self { ended: OutcomeWindow::new(WINDOW), position: Position::Closed, was_open: Duration::ZERO, turn: 0 }
    }

    /// Lets an attempt pass, or says how long to wait.
    fn enter(&mut self, now: Instant) -> Result<(), Duration> {
        if let Position::Open { until } = self.position {
            if now < until {
                return Err(until - now);
            }
            self.go(Position::HalfOpen { good: 0, is_probing: false });
        }
        match &mut self.position {
            Position::HalfOpen { is_probing: true, .. } => Err(PROBING),
            Position::HalfOpen { is_probing, .. } => {
                *is_probing = true;
                Ok(())
            }
            Position::Open { .. } | Position::Closed => Ok(()),
        }
    }

    /// An attempt of this turn has ended. Returns whether the breaker opens.
    fn ended(&mut self, turn: u64, is_good: Option<bool>, now: Instant) -> bool {
        if turn != self.turn {
            return false;
        }
        match (&mut self.position, is_good) {
            (Position::HalfOpen { is_probing, .. }, None) => *is_probing = false,
            (Position::HalfOpen { good, is_probing }, Some(true)) => {
                (*good, *is_probing) = (*good + 1, false);
                if *good == PROBES {
                    self.was_open = Duration::ZERO;
                    self.go(Position::Closed);
                }
            }
            (Position::HalfOpen { .. }, Some(false)) => return self.opens(now),
            (Position::Closed, Some(is_good)) => {
                let (ended, failed) = self.ended.count(!is_good, now);
                if ended >= LEAST && 2 * failed >= ended {
                    return self.opens(now);
                }
            }
            (Position::Closed, None) | (Position::Open { .. }, _) => {}
        }
        false
    }

    fn opens(&mut self, now: Instant) -> bool {
        self.was_open = (self.was_open * 2).clamp(OPEN, LONGEST_OPEN);
        self.go(Position::Open { until: now + self.was_open });
        true
    }

    fn go(&mut self, position: Position) {
        self.position = position;
        self.turn += 1;
        self.ended.clear();
    }

    fn is_as_new(&self, now: Instant) -> bool {
        matches!(self.position, Position::Closed) && self.ended.is_empty(now)
    }

    fn state(&self, now: Instant) -> BreakerState {
        match self.position {
            Position::Closed => BreakerState::Closed,
            Position::Open { until } if now < until => BreakerState::Open(until - now),
            Position::Open { .. } | Position::HalfOpen { .. } => BreakerState::HalfOpen,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Fault;

    /// Breakers, and what they count.
    #[derive(Default)]
    struct Counting {
        breakers: Breakers,
        counted: PolicyCounters,
    }

    impl Counting {
        fn enter(&self, method: &Arc<str>, instance: Option<&Arc<str>>) -> Result<Passed<'_>, Error> {
            self.breakers.enter(method, instance, &self.counted)
        }

        fn state(&self) -> BreakerState {
            self.breakers.all()[0].state
        }
    }

    fn breakers() -> (Counting, Arc<str>) {
        (Counting::default(), "demo.v1.add".into())
    }

    fn failed() -> Result<(), Error> {
        Err(Error::Fault(Fault::new(Code::Internal, "")))
    }

    /// How many attempts pass that have this outcome, of `count`.
    fn passing(breakers: &Counting, method: &Arc<str>, outcome: &Result<(), Error>, count: usize) -> usize {
        let passes = |_: &usize| breakers.enter(method, None).map(|passed| passed.ends(outcome)).is_ok();
        (0..count).filter(passes).count()
    }

    #[tokio::test(start_paused = true)]
    async fn it_opens_at_half_of_twenty_and_closes_after_three_probes() {
        let (breakers, method) = breakers();
        assert_eq!(passing(&breakers, &method, &Ok(()), 10), 10);
        assert_eq!(passing(&breakers, &method, &failed(), 100), 10);
        assert_eq!(breakers.state(), BreakerState::Open(OPEN));
        tokio::time::advance(OPEN).await;
        assert_eq!(breakers.state(), BreakerState::HalfOpen);
        let probe = breakers.enter(&method, None).expect("a probe");
        assert_eq!(passing(&breakers, &method, &Ok(()), 100), 0, "one after the other");
        probe.ends(&Ok(()));
        assert_eq!(passing(&breakers, &method, &Ok(()), 100), 100);
        assert_eq!(breakers.state(), BreakerState::Closed);
        let counts = breakers.counted.now();
        assert_eq!((counts.opened, counts.refused_by_breaker), (1, 190));
    }

    #[tokio::test(start_paused = true)]
    async fn each_failed_probe_doubles_the_time() {
        let (breakers, method) = breakers();
        passing(&breakers, &method, &failed(), 20);
        for seconds in [5, 10, 20, 40, 60, 60] {
            assert_eq!(breakers.state(), BreakerState::Open(Duration::from_secs(seconds)));
            tokio::time::advance(Duration::from_secs(seconds)).await;
            assert_eq!(passing(&breakers, &method, &failed(), 10), 1);
        }
        tokio::time::advance(LONGEST_OPEN).await;
        assert_eq!(passing(&breakers, &method, &Ok(()), 10), 10);
        passing(&breakers, &method, &failed(), 20);
        assert_eq!(breakers.state(), BreakerState::Open(OPEN), "it was closed in between");
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_long_ago_or_says_nothing_does_not_count() {
        let (breakers, method) = breakers();
        passing(&breakers, &method, &failed(), 19);
        tokio::time::advance(WINDOW).await;
        assert_eq!(passing(&breakers, &method, &failed(), 19), 19);
        let silent = Err(Error::NoService { service: "demo.v1".to_owned(), method: None });
        assert_eq!(passing(&breakers, &method, &silent, 100), 100);
        drop(breakers.enter(&method, None));
        assert_eq!(passing(&breakers, &method, &failed(), 10), 1);
        // A probe that is dropped makes room for another.
        tokio::time::advance(OPEN).await;
        drop(breakers.enter(&method, None).expect("a probe"));
        assert!(breakers.enter(&method, None).is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn what_began_before_it_opened_says_nothing_of_later() {
        let (breakers, method) = breakers();
        let early: Vec<_> = (0..50).map(|_| breakers.enter(&method, None).expect("closed")).collect();
        passing(&breakers, &method, &failed(), 20);
        tokio::time::advance(OPEN).await;
        let probe = breakers.enter(&method, None).expect("a probe");
        early.into_iter().for_each(|passed| passed.ends(&failed()));
        assert!(breakers.enter(&method, None).is_err(), "the probe is still on its way");
        probe.ends(&Ok(()));
        assert_eq!(passing(&breakers, &method, &Ok(()), 10), 10);
    }

    #[tokio::test(start_paused = true)]
    async fn instances_have_breakers_of_their_own_and_hands_open_and_close_them() {
        let (breakers, method) = breakers();
        let instance: Arc<str> = "a1".into();
        for _ in 0..20 {
            breakers.enter(&method, Some(&instance)).expect("closed").ends(&failed());
        }
        assert!(breakers.enter(&method, Some(&instance)).is_err() && breakers.enter(&method, None).is_ok());
        breakers.breakers.open(method.clone(), Duration::from_secs(3600));
        let error = breakers.enter(&method, None).err().expect("open");
        assert_eq!(error.retry_after(), Some(Duration::from_secs(3600)));
        assert!(!error.may_have_run() && error.is_transient());
        breakers.breakers.close(&method);
        assert!(breakers.enter(&method, Some(&instance)).is_ok() && breakers.enter(&method, None).is_ok());
    }
}
