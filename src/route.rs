//! Routes: how a client chooses the instance that runs a call. `client/routing.rs` sends calls along them, and
//! `registry/follow.rs` knows which instances there are.

use std::collections::{BTreeMap, HashMap};
use std::hash::Hasher as _;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use siphasher::sip::SipHasher13;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::document::Instance;

/// How long an instance is passed over that the broker did not know, unless no other is left.
const PASSED_OVER: Duration = Duration::from_secs(1);
/// How long it counts what an instance says of its running calls.
const SAID: Duration = Duration::from_millis(100);
/// After this time half is forgotten of how long its replies took. So a slow one that gets no calls for that is tried again
/// after a while.
const HALF_FORGOTTEN: Duration = Duration::from_secs(10);
/// How many times as long a call may take with one of two for them to count as alike.
const ALIKE: f64 = 2.0;

/// How the instance is chosen that runs a call.
///
/// By [`Any`](Self::Any), the default, the broker hands a call to an instance that has room, and calls wait in a queue
/// that all instances share. With each other route the client chooses one of the instances that it knows, and the call
/// waits in the queue of that one. So take another only for what `Any` cannot do. The client learns of the instances by
/// a [watch](crate::Registry::watch), which it begins with its first such call.
///
/// An instance that drains is not chosen. If the chosen one turns out to be gone, the call has not run, and goes to the
/// next choice, at most three times. If the chosen one dies while it runs an
/// [idempotent](crate::Call::idempotent) call, that call goes to the next choice as well.
///
/// ```
/// use hopline::Route;
///
/// # async fn example(client: hopline::Client) -> Result<(), hopline::Error> {
/// // The same cart is always with the same instance, which has it in its cache.
/// let cart = client.call::<u32>("carts", "items", ("c-17",)).route(Route::Key("c-17".into())).await?;
/// // An instance in the same zone if there is one.
/// let near = Route::Zone { attribute: "zone".into(), value: "eu1".into() };
/// let price = client.call::<u32>("prices", "of", ("pen",)).route(near).await?;
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Route {
    /// Any instance that has room: the broker chooses. Whoever is busy gets fewer calls.
    #[default]
    Any,
    /// The instance with this id, as with [`Call::to`](crate::Call::to).
    One(String),
    /// One after the other.
    RoundRobin,
    /// In proportion to their weights, spread evenly in time.
    Weighted(Weights),
    /// Of two that are drawn, the one with fewer calls; but the quicker one, if the call will take more than twice as long
    /// with the other.
    ///
    /// The calls are those of this client that are not answered yet, or all that run there, as its reply of the last 100
    /// ms says. A call will take as long as the last ones did with that instance, and longer as more calls are there than
    /// there were then. So a slow instance gets calls only while the others have so many that it is as quick. It is
    /// tried again from time to time, since half is forgotten every 10 s of how long its replies took: one that is ten
    /// times slower, after about 20 s.
    LeastInFlight,
    /// The same instance for the same key, in every client, for as long as it lives. If one leaves, only its own keys
    /// move to others; if one of `n` joins, it gets a share of about `1/n` of the keys, and no other key moves.
    Key(String),
    /// One after the other of the instances with this [attribute](crate::Server::attribute). If there is none, any, as
    /// by [`Any`](Self::Any).
    Zone {
        /// The attribute's name.
        attribute: String,
        /// Its value.
        value: String,
    },
}

/// The weights of instances for [`Route::Weighted`]. An instance with the weight 0 gets no calls.
///
/// ```
/// use hopline::{Route, Weights};
///
/// // What each instance says of itself, by `Server::attribute("weight", "3")`.
/// let own = Route::Weighted(Weights::Attribute("weight".into()));
/// // What is known here.
/// let given = Route::Weighted(Weights::Given([("a1".into(), 3), ("b2".into(), 1)].into()));
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Weights {
    /// A whole number in this [attribute](crate::Server::attribute) of each instance. An instance without it, or with
    /// something else in it, has the weight 1.
    Attribute(String),
    /// The weight of each instance by its id. Others have the weight 0.
    Given(BTreeMap<String, u32>),
}

/// An instance that calls can be sent to.
#[derive(Debug, Clone)]
pub(crate) struct Candidate {
    pub(crate) instance: Arc<str>,
    pub(crate) attributes: BTreeMap<String, String>,
    pub(crate) is_draining: bool,
    load: Arc<Load>,
}

/// What the calls of this client have to do with an instance.
#[derive(Debug, Default)]
struct Load {
    in_flight: AtomicUsize,
    /// How many calls of all clients run there, by its last reply, and when that came.
    running: Mutex<Option<(usize, Instant)>>,
    took: Mutex<Option<Took>>,
    /// Until when it is passed over.
    missed_until: Mutex<Option<Instant>>,
    /// Cancelled when it has lost its connection, and what waited for it there.
    lost: CancellationToken,
    /// Cancelled when it is not there any more.
    gone: CancellationToken,
}

impl Load {
    /// A call that was one of so many has taken this time, and if it was given up, it would have taken longer.
    fn add(&self, time: Duration, calls: f64, has_ended: bool) {
        let seconds = time.as_secs_f64();
        let mut took = self.took.lock().unwrap_or_else(PoisonError::into_inner);
        let (before, weight) = took.map_or((0.0, 1.0), |took| {
            let kept = took.kept();
            (took.seconds * kept, (1.0 - kept).max(0.25))
        });
        if has_ended || took.is_some() && seconds > before {
            let mean = |before: f64, this: f64| before + (this - before) * weight;
            let calls = mean(took.map_or(0.0, |took| took.calls), calls);
            *took = Some(Took { seconds: mean(before, seconds), calls, at: Instant::now() });
        }
    }
}

/// What the last replies of an instance tell of how long the next call takes.
#[derive(Debug, Clone, Copy)]
struct Took {
    /// How many seconds they took, with more weight on later ones.
    seconds: f64,
    /// How many calls were there when theirs came, those included, with the same weights.
    calls: f64,
    /// When the last came.
    at: Instant,
}

impl Took {
    /// How much of it counts now: less and less without replies.
    fn kept(&self) -> f64 {
        0.5_f64.powf(self.at.elapsed().as_secs_f64() / HALF_FORGOTTEN.as_secs_f64())
    }

    /// How many seconds a call takes that comes as one of so many. If there are twice as many as there were, each waits
    /// twice as long. But a call to an instance with little to do takes no less than itself.
    fn for_one_of(&self, calls: f64) -> f64 {
        self.seconds * self.kept() * (calls / self.calls).max(1.0)
    }
}

/// Counts a call as unanswered for as long as it lives.
#[derive(Debug)]
pub(crate) struct CountedCall {
    load: Arc<Load>,
    since: Instant,
    /// How many calls are there, this one included.
    calls: f64,
    has_ended: bool,
}

impl CountedCall {
    /// It is answered, or has timed out: it has taken until now.
    pub(crate) fn has_ended(mut self) {
        self.has_ended = true;
    }
}

impl Drop for CountedCall {
    fn drop(&mut self) {
        self.load.in_flight.fetch_sub(1, Ordering::Relaxed);
        self.load.add(self.since.elapsed(), self.calls, self.has_ended);
    }
}

impl Candidate {
    /// An instance as it describes itself. What was known of it `before` goes on.
    pub(crate) fn new(info: &Instance, before: Option<&Self>) -> Self {
        Self {
            instance: info.instance.as_str().into(),
            attributes: info.attributes.clone(),
            is_draining: info.draining,
            load: before.map(|before| before.load.clone()).unwrap_or_default(),
        }
    }

    /// A call begins to wait for it.
    pub(crate) fn count(&self) -> CountedCall {
        let calls = (self.busy() + 1) as f64;
        self.load.in_flight.fetch_add(1, Ordering::Relaxed);
        CountedCall { load: self.load.clone(), since: Instant::now(), calls, has_ended: false }
    }

    /// The broker does not know it.
    pub(crate) fn missed(&self) {
        *self.load.missed_until.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now() + PASSED_OVER);
    }

    fn is_missed(&self) -> bool {
        self.load
            .missed_until
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .is_some_and(|until| Instant::now() < until)
    }

    /// It is not there any more.
    pub(crate) fn leaves(&self) {
        self.load.lost.cancel();
        self.load.gone.cancel();
    }

    /// It has lost its connection and is back: the same instance for calls from now on.
    pub(crate) fn anew(&self) -> Self {
        self.load.lost.cancel();
        let load = Load { gone: self.load.gone.clone(), ..Load::default() };
        Self { load: Arc::new(load), ..self.clone() }
    }

    /// Resolves when it has lost its connection, or is not there any more.
    pub(crate) async fn lost(&self) {
        self.load.lost.cancelled().await;
    }

    /// Resolves when it is not there any more.
    pub(crate) async fn gone(&self) {
        self.load.gone.cancelled().await;
    }

    /// Its last reply says that so many calls run there.
    pub(crate) fn says_running(&self, calls: u64) {
        let calls = usize::try_from(calls).unwrap_or(usize::MAX);
        *self.load.running.lock().unwrap_or_else(PoisonError::into_inner) = Some((calls, Instant::now()));
    }

    /// It has taken so long for a call that was not sent to it alone.
    pub(crate) fn has_taken(&self, time: Duration) {
        self.load.add(time, 1.0, true);
    }

    /// Whether it is known how long its replies take.
    pub(crate) fn is_known(&self) -> bool {
        self.load.took.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// How many seconds another call will take with so many there before it, if it has replied to one.
    fn will_take(&self, busy: usize) -> Option<f64> {
        let took = *self.load.took.lock().unwrap_or_else(PoisonError::into_inner);
        Some(took?.for_one_of((busy + 1) as f64))
    }

    /// How many calls it has: those of this client that are not answered, or all that run, if it has said so just now and
    /// they are more.
    fn busy(&self) -> usize {
        let said = *self.load.running.lock().unwrap_or_else(PoisonError::into_inner);
        let said = said.filter(|(_, at)| at.elapsed() < SAID).map_or(0, |(calls, _)| calls);
        self.load.in_flight.load(Ordering::Relaxed).max(said)
    }
}

/// Whose turn it is among the instances of a service.
#[derive(Debug)]
pub(crate) struct Turns {
    next: AtomicUsize,
    /// What each instance has saved up of its weight.
    saved: Mutex<HashMap<Arc<str>, i64>>,
}

impl Default for Turns {
    /// It begins anywhere. Otherwise the same instance would have the first turn of every client.
    fn default() -> Self {
        let (_, random) = Uuid::new_v4().as_u64_pair();
        Self { next: AtomicUsize::new((random & 0xffff) as usize), saved: Mutex::default() }
    }
}

impl Route {
    /// The next instance by this route, without those that were `tried`. `None` if there is none.
    pub(crate) fn choose<'c>(
        &self,
        candidates: &'c [Candidate],
        tried: &[Arc<str>],
        turns: &Turns,
    ) -> Option<&'c Candidate> {
        let mut open: Vec<_> = candidates
            .iter()
            .filter(|candidate| !candidate.is_draining && !tried.contains(&candidate.instance))
            .filter(|candidate| self.allows(candidate))
            .collect();
        if open.iter().any(|candidate| !candidate.is_missed()) {
            open.retain(|candidate| !candidate.is_missed());
        }
        if open.len() < 2 {
            return open.pop();
        }
        Some(match self {
            Self::Weighted(weights) => turns.by_weight(&open, weights),
            Self::LeastInFlight => better_of_two(&open),
            Self::Key(key) => open.into_iter().max_by_key(|candidate| score(key, &candidate.instance)).expect("two"),
            Self::Any | Self::One(_) | Self::RoundRobin | Self::Zone { .. } => {
                open[turns.next.fetch_add(1, Ordering::Relaxed) % open.len()]
            }
        })
    }

    /// Whether an instance may get calls by this route at all.
    fn allows(&self, candidate: &Candidate) -> bool {
        match self {
            Self::One(instance) => *candidate.instance == **instance,
            Self::Weighted(weights) => weights.of(candidate) > 0,
            Self::Zone { attribute, value } => candidate.attributes.get(attribute) == Some(value),
            Self::Any | Self::RoundRobin | Self::LeastInFlight | Self::Key(_) => true,
        }
    }
}

impl Weights {
    fn of(&self, candidate: &Candidate) -> u32 {
        match self {
            Self::Attribute(name) => {
                candidate.attributes.get(name).and_then(|weight| weight.trim().parse().ok()).unwrap_or(1)
            }
            Self::Given(weights) => weights.get(&*candidate.instance).copied().unwrap_or(0),
        }
    }
}

impl Turns {
    /// Each saves its weight. Whoever has saved most gets the call, and pays what all have saved for it. So the turns of
    /// a heavy one are not in a row.
    fn by_weight<'c>(&self, open: &[&'c Candidate], weights: &Weights) -> &'c Candidate {
        let mut saved = self.saved.lock().unwrap_or_else(PoisonError::into_inner);
        saved.retain(|instance, _| open.iter().any(|candidate| candidate.instance == *instance));
        let (mut total, mut chosen) = (0, None);
        for candidate in open {
            let weight = i64::from(weights.of(candidate));
            total += weight;
            let has = saved.entry(candidate.instance.clone()).or_default();
            *has += weight;
            if chosen.is_none_or(|(most, _)| *has > most) {
                chosen = Some((*has, *candidate));
            }
        }
        let (_, chosen) = chosen.expect("two");
        *saved.entry(chosen.instance.clone()).or_default() -= total;
        chosen
    }
}

/// Draws two. Of all of them, the least busy would be chosen by many clients at the same moment.
fn better_of_two<'c>(open: &[&'c Candidate]) -> &'c Candidate {
    let (high, low) = Uuid::new_v4().as_u64_pair();
    let below = |random: u64, count: usize| (random % count as u64) as usize;
    // The first two bits of the lower half are not random.
    let first = below(high >> 32, open.len());
    let second = (first + 1 + below(low & 0xffff_ffff, open.len() - 1)) % open.len();
    let [first, second] = [open[first], open[second]];
    let (of_first, of_second) = (first.busy(), second.busy());
    if let (Some(with_first), Some(with_second)) = (first.will_take(of_first), second.will_take(of_second)) {
        if with_first > ALIKE * with_second {
            return second;
        }
        if with_second > ALIKE * with_first {
            return first;
        }
    }
    if of_second < of_first { second } else { first }
}

/// How much a key wants to be with an instance. It is the same in every process, whatever its version: the function is
/// a part of `docs/discovery.md`.
fn score(key: &str, instance: &str) -> u64 {
    let mut hasher = SipHasher13::new();
    hasher.write(instance.as_bytes());
    hasher.write(&[0xff]);
    hasher.write(key.as_bytes());
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(instance: &str, attributes: &[(&str, &str)]) -> Candidate {
        let attributes = attributes.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        Candidate::new(&Instance { instance: instance.to_owned(), attributes, ..Instance::default() }, None)
    }

    fn five() -> Vec<Candidate> {
        ["a", "b", "c", "d", "e"].map(|instance| candidate(instance, &[])).to_vec()
    }

    fn chosen(route: &Route, candidates: &[Candidate], turns: &Turns) -> String {
        route.choose(candidates, &[], turns).expect("one is there").instance.to_string()
    }

    fn counted(route: &Route, candidates: &[Candidate], calls: usize) -> BTreeMap<String, usize> {
        let (turns, mut counts) = (Turns::default(), BTreeMap::new());
        (0..calls).for_each(|_| *counts.entry(chosen(route, candidates, &turns)).or_default() += 1);
        counts
    }

    #[test]
    fn keys_are_shared_evenly_and_only_those_of_an_instance_that_leaves_move() {
        let (five, turns) = (five(), Turns::default());
        let places: Vec<_> = (0..10_000)
            .map(|key| Route::Key(format!("key-{key}")))
            .map(|key| (chosen(&key, &five, &turns), key))
            .collect();
        for candidate in &five {
            let share = places.iter().filter(|(place, _)| **place == *candidate.instance).count();
            assert!((1_400..=2_600).contains(&share), "{}: {share}", candidate.instance);
        }
        let four: Vec<_> = five.iter().filter(|candidate| &*candidate.instance != "c").cloned().collect();
        let moved = places.iter().filter(|(place, key)| chosen(key, &four, &turns) != *place);
        assert!(moved.clone().all(|(place, _)| place == "c"));
        assert!((1_400..=2_300).contains(&moved.count()));
    }

    #[test]
    fn the_place_of_a_key_is_the_same_in_every_version() {
        assert_eq!(score("c-17", "a1"), 0x8612_2102_bd7c_4871);
    }

    #[test]
    fn each_has_its_turn() {
        let (five, turns) = (five(), Turns::default());
        let twice: Vec<_> = (0..10).map(|_| chosen(&Route::RoundRobin, &five, &turns)).collect();
        assert!("abcdeabcdeabcde".contains(&twice.concat()), "{twice:?}");
    }

    #[test]
    fn weights_are_kept_exactly_and_evenly_in_time() {
        let two = [candidate("a", &[("weight", "1")]), candidate("b", &[("weight", "3")])];
        let own = Route::Weighted(Weights::Attribute("weight".into()));
        assert_eq!(counted(&own, &two, 4_000), BTreeMap::from([("a".into(), 1_000), ("b".into(), 3_000)]));
        let turns = Turns::default();
        let in_time: Vec<_> = (0..8).map(|_| chosen(&own, &two, &turns)).collect();
        assert_eq!(in_time.concat(), "babbbabb");
        let given = Route::Weighted(Weights::Given([("b".into(), 2), ("a".into(), 0)].into()));
        assert_eq!(counted(&given, &two, 10), BTreeMap::from([("b".into(), 10)]));
        let nobody = Route::Weighted(Weights::Given(BTreeMap::new()));
        assert!(nobody.choose(&two, &[], &turns).is_none());
    }

    #[test]
    fn the_busier_of_two_gets_no_calls() {
        let two = [candidate("a", &[]), candidate("b", &[])];
        let busy = two[0].count();
        assert_eq!(counted(&Route::LeastInFlight, &two, 100), BTreeMap::from([("b".into(), 100)]));
        drop(busy);
        assert_eq!(counted(&Route::LeastInFlight, &five(), 1_000).len(), 5);
    }

    /// Calls that begin together and are answered after this time.
    async fn answered_after(candidate: &Candidate, calls: usize, millis: u64) {
        let calls: Vec<_> = (0..calls).map(|_| candidate.count()).collect();
        tokio::time::advance(Duration::from_millis(millis)).await;
        calls.into_iter().for_each(CountedCall::has_ended);
    }

    fn better(two: &[Candidate]) -> String {
        let counts = counted(&Route::LeastInFlight, two, 100);
        assert_eq!(counts.len(), 1, "{counts:?}");
        counts.into_keys().next().expect("one")
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_one_gets_calls_once_the_other_is_as_slow_by_its_calls() {
        let two = [candidate("slow", &[]), candidate("quick", &[])];
        answered_after(&two[0], 1, 50).await;
        answered_after(&two[1], 1, 5).await;
        let calls: Vec<_> = (0..3).map(|_| two[1].count()).collect();
        assert_eq!(better(&two), "quick", "about 20 ms beside 50");
        let more: Vec<_> = (0..7).map(|_| two[1].count()).collect();
        assert_eq!(better(&two), "slow");
        // They take no longer when they are that many. So many are no reason any more.
        tokio::time::advance(Duration::from_millis(5)).await;
        calls.into_iter().chain(more).for_each(CountedCall::has_ended);
        let calls: Vec<_> = (0..10).map(|_| two[1].count()).collect();
        assert_eq!(better(&two), "quick");
        drop(calls);
    }

    #[tokio::test(start_paused = true)]
    async fn of_two_that_are_alike_the_one_with_fewer_calls_gets_the_next() {
        let two = [candidate("a", &[]), candidate("b", &[])];
        answered_after(&two[0], 1, 9).await;
        answered_after(&two[1], 1, 5).await;
        let _one = two[1].count();
        assert_eq!(better(&two), "a");
        let _two = (two[0].count(), two[0].count());
        assert_eq!(better(&two), "b");
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_one_is_tried_again_after_a_while_with_one_call() {
        let two = [candidate("slow", &[]), candidate("quick", &[])];
        answered_after(&two[0], 1, 50).await;
        let mut tried = Vec::new();
        for second in 1..=120 {
            tokio::time::advance(Duration::from_secs(1)).await;
            answered_after(&two[1], 8, 5).await;
            let _eight: Vec<_> = (0..7).map(|_| two[1].count()).collect();
            if better(&two) == "slow" {
                tried.push(second);
                let tries = two[0].count();
                assert_eq!(better(&two), "quick");
                tokio::time::advance(Duration::from_millis(50)).await;
                tries.has_ended();
            }
        }
        assert!((5..=8).contains(&tried.len()) && tried[0] > 15, "{tried:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_that_is_given_up_tells_that_its_instance_is_slow() {
        let two = [candidate("slow", &[]), candidate("quick", &[])];
        answered_after(&two[0], 1, 5).await;
        answered_after(&two[1], 1, 5).await;
        let given_up = two[0].count();
        tokio::time::advance(Duration::from_secs(1)).await;
        drop(given_up);
        assert_eq!(better(&two), "quick");
        // This one ends too soon to tell anything.
        drop(two[1].count());
        assert_eq!(better(&two), "quick");
    }

    #[test]
    fn a_zone_has_its_own_instances_and_is_empty_without_them() {
        let three = [candidate("a", &[("zone", "eu")]), candidate("b", &[]), candidate("c", &[("zone", "us")])];
        let zone = |value: &str| Route::Zone { attribute: "zone".into(), value: value.into() };
        assert_eq!(counted(&zone("eu"), &three, 3), BTreeMap::from([("a".into(), 3)]));
        assert!(zone("asia").choose(&three, &[], &Turns::default()).is_none());
    }

    #[test]
    fn who_drains_was_tried_or_is_missed_is_passed_over() {
        let mut two = [candidate("a", &[]), candidate("b", &[])];
        let turns = Turns::default();
        two[0].missed();
        assert_eq!(counted(&Route::RoundRobin, &two, 4), BTreeMap::from([("b".into(), 4)]));
        let tried = [two[1].instance.clone()];
        let left = Route::RoundRobin.choose(&two, &tried, &turns).expect("better than nobody");
        assert_eq!(&*left.instance, "a");
        two[0].is_draining = true;
        assert!(Route::RoundRobin.choose(&two, &tried, &turns).is_none());
    }
}
