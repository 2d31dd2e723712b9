//! Strategies of a call: a second attempt when it is late, several at once, a value in place of an error, a quorum, and the
//! queue for oneway calls as its last way.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::future::IntoFuture as _;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::future::join_all;
use hopline::{
    Absent, Call, CallError, Client, Code, Context, Error, Fault, Invocation, Method, Middleware, Quorum, Route,
    Running, Service,
};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestRunner};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep};

use crate::support::{PATIENCE, Scene, soon};

/// What the instances of a service do with the next calls, and what they have done.
#[derive(Default)]
struct Orders {
    /// How many calls hang from now on, whoever gets them.
    hang: AtomicU64,
    /// The calls of these instances hang.
    hanging: Mutex<BTreeSet<String>>,
    /// How many calls fail from now on, and how.
    fail: AtomicU64,
    /// The calls of these instances fail.
    failing: Mutex<BTreeSet<String>>,
    fault: Mutex<Option<Fault>>,
    /// How long calls take, and those of one instance.
    takes: Mutex<(Duration, HashMap<String, Duration>)>,
    /// Which instance has begun to run which call.
    runs: Mutex<Vec<(u64, String)>>,
    /// How many handlers were dropped before their end.
    cancelled: AtomicU64,
    changed: Notify,
}

fn take_one(left: &AtomicU64) -> bool {
    left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok()
}

/// Counts a handler that is dropped before its end.
struct Unfinished(Option<Arc<Orders>>);

impl Drop for Unfinished {
    fn drop(&mut self) {
        if let Some(orders) = &self.0 {
            orders.cancelled.fetch_add(1, Ordering::Relaxed);
            orders.changed.notify_waiters();
        }
    }
}

impl Orders {
    async fn run(self: Arc<Self>, instance: String, number: u64) -> Result<String, Fault> {
        let mut unfinished = Unfinished(Some(self.clone()));
        self.runs.lock().expect("no panic").push((number, instance.clone()));
        self.changed.notify_waiters();
        if self.hanging.lock().expect("no panic").contains(&instance) || take_one(&self.hang) {
            std::future::pending::<()>().await;
        }
        let takes = {
            let takes = self.takes.lock().expect("no panic");
            takes.1.get(&instance).copied().unwrap_or(takes.0)
        };
        if !takes.is_zero() {
            sleep(takes).await;
        }
        unfinished.0 = None;
        let fails = self.failing.lock().expect("no panic").contains(&instance) || take_one(&self.fail);
        let fault = self.fault.lock().expect("no panic").clone();
        if fails { Err(fault.unwrap_or_else(|| Fault::new(Code::Aborted, "as ordered"))) } else { Ok(instance) }
    }

    /// On which instances a call has run.
    fn runs_of(&self, number: u64) -> Vec<String> {
        let runs = self.runs.lock().expect("no panic");
        runs.iter().filter(|(known, _)| *known == number).map(|(_, instance)| instance.clone()).collect()
    }

    fn fails(&self, calls: u64, fault: Fault) {
        *self.fault.lock().expect("no panic") = Some(fault);
        self.fail.store(calls, Ordering::Relaxed);
    }

    /// Waits until what the instances have done is as it has to become.
    async fn until(&self, is_so: impl Fn(&Self) -> bool) {
        soon(async {
            while !is_so(self) {
                let changed = self.changed.notified();
                tokio::select! {
                    () = changed => {}
                    () = tokio::task::yield_now() => {}
                }
            }
        })
        .await;
    }

    fn cancelled(&self) -> u64 {
        self.cancelled.load(Ordering::Relaxed)
    }
}

/// A service with several instances.
struct Fleet {
    servers: Vec<Running>,
    orders: Arc<Orders>,
}

impl Fleet {
    async fn serve(scene: &Scene, instances: usize) -> Self {
        let orders = Arc::<Orders>::default();
        let mut servers = Vec::new();
        for _ in 0..instances {
            servers.push(scene.serve(Self::service(&orders)).await);
        }
        Self { servers, orders }
    }

    fn service(orders: &Arc<Orders>) -> Service {
        let (run, store) = (orders.clone(), orders.clone());
        Service::new("fleet", 1)
            .method(Method::new("run").idempotent(), move |context: Context, (number,): (u64,)| {
                run.clone().run(context.instance().to_owned(), number)
            })
            .method(Method::new("once"), {
                let once = orders.clone();
                move |context: Context, (number,): (u64,)| once.clone().run(context.instance().to_owned(), number)
            })
            .method(
                Method::new("store").idempotent().oneway().pause(Duration::from_millis(20)),
                move |context: Context, (number,): (u64,)| {
                    let ran = store.clone().run(context.instance().to_owned(), number);
                    async move { ran.await.map(drop) }
                },
            )
            .method(Method::new("refuse"), |_: Context, (): ()| async move { Err::<(), _>("no".to_owned()) })
    }

    fn ids(&self) -> Vec<String> {
        self.servers.iter().map(|server| server.instance().to_owned()).collect()
    }
}

fn call(client: &Client, number: u64) -> Call<String> {
    client.call::<String>("fleet", "run", (number,)).idempotent().timeout(PATIENCE)
}

async fn ok(call: Call<String>) -> String {
    soon(call.into_future()).await.expect("answered")
}

/// Makes a client know how long calls take, and which instances there are.
async fn warm(client: &Client, calls: u64) {
    for _ in 0..calls {
        ok(call(client, 0).hedge()).await;
    }
}

#[tokio::test]
async fn a_late_call_gets_a_second_attempt_elsewhere_and_the_other_is_cancelled() {
    let scene = Scene::new();
    let fleet = Fleet::serve(&scene, 3).await;
    let client = scene.client().await;
    warm(&client, 50).await;
    let before = client.policies();
    fleet.orders.hang.store(1, Ordering::Relaxed);
    // Without a hedge it would hang for the whole minute of `soon`.
    let winner = ok(call(&client, 7).hedge()).await;
    let runs = fleet.orders.runs_of(7);
    assert!(runs.len() == 2 && runs[1] == winner, "{runs:?} {winner}");
    let counts = client.policies();
    assert_eq!((counts.hedges - before.hedges, counts.hedges_won - before.hedges_won), (1, 1));
    fleet.orders.until(|orders| orders.cancelled() == 1).await;
}

#[tokio::test(start_paused = true)]
async fn a_call_is_late_after_the_time_that_nineteen_of_twenty_take() {
    let scene = Scene::in_memory();
    let fleet = Fleet::serve(&scene, 3).await;
    let client = scene.client().await;
    for (takes, late) in [(1, 10), (100, 100)] {
        fleet.orders.takes.lock().expect("no panic").0 = Duration::from_millis(takes);
        warm(&client, 550).await;
        fleet.orders.hang.store(1, Ordering::Relaxed);
        let since = Instant::now();
        ok(call(&client, 7).hedge()).await;
        let took = since.elapsed().as_millis();
        assert!((late + takes..late + takes + 15).contains(&(took as u64)), "{took} ms, and not {late} + {takes}");
    }
    // Nothing is known of a method that was not called yet, so it waits.
    let other = client.call::<String>("fleet", "once", (8,)).idempotent().hedge().timeout(Duration::from_secs(5));
    fleet.orders.hang.store(1, Ordering::Relaxed);
    assert!(matches!(other.await, Err(Error::Timeout { .. })));
    assert_eq!(fleet.orders.runs_of(8).len(), 1);
}

#[tokio::test(start_paused = true)]
async fn only_idempotent_calls_whose_instance_is_free_to_choose_are_hedged_or_forked() {
    let scene = Scene::in_memory();
    let fleet = Fleet::serve(&scene, 3).await;
    let client = scene.client().await;
    warm(&client, 60).await;
    let hedges = client.policies().hedges;
    let second = Duration::from_secs(1);
    let plain = |number: u64| client.call::<String>("fleet", "run", (number,)).timeout(second).hedge();
    let one = fleet.ids().remove(0);
    let calls = [
        plain(1),
        plain(2).fork(3),
        plain(3).idempotent().to(&one),
        plain(4).idempotent().fork(2).to(&one),
        plain(5).idempotent().route(Route::Key("k".to_owned())),
        plain(6).idempotent().route(Route::One(one)),
    ];
    fleet.orders.hang.store(6, Ordering::Relaxed);
    for (number, outcome) in (1..).zip(join_all(calls).await) {
        assert!(matches!(outcome, Err(Error::Timeout { .. })), "{outcome:?}");
        assert_eq!(fleet.orders.runs_of(number).len(), 1, "call {number}");
    }
    assert_eq!((client.policies().hedges, client.policies().forks), (hedges, 0));
}

#[tokio::test]
async fn after_a_failure_the_second_attempt_is_made_at_once() {
    let scene = Scene::new();
    let fleet = Fleet::serve(&scene, 3).await;
    let client = scene.client().await;
    fleet.orders.fails(1, Fault::new(Code::Aborted, "in the middle"));
    ok(call(&client, 7).hedge()).await;
    let runs = fleet.orders.runs_of(7);
    assert!(runs.len() == 2 && client.policies().hedges_won == 1, "{runs:?}");
    // What another attempt cannot help is told at once.
    fleet.orders.fails(1, Fault::new(Code::NotFound, "no such thing"));
    let error = soon(call(&client, 8).hedge().into_future()).await.expect_err("no help");
    assert!(error.code() == Code::NotFound && fleet.orders.runs_of(8).len() == 1, "{error:?}");
}

#[tokio::test]
async fn where_there_is_no_other_instance_the_first_error_is_told() {
    let scene = Scene::new();
    let fleet = Fleet::serve(&scene, 1).await;
    let client = scene.client().await;
    fleet.orders.fails(1, Fault::new(Code::Aborted, "in the middle"));
    let error = soon(call(&client, 7).hedge().into_future()).await.expect_err("nobody else");
    assert!(error.to_string().contains("in the middle") && fleet.orders.runs_of(7).len() == 1, "{error:?}");
    assert_eq!(client.policies().hedges, 0);
}

#[tokio::test(start_paused = true)]
async fn nothing_is_hedged_after_an_overload_before_an_open_breaker_and_without_budget() {
    let scene = Scene::in_memory();
    let fleet = Fleet::serve(&scene, 3).await;
    let client =
        Client::builder().namespace(&scene.namespace).breaker().connect(&scene.url).await.expect("it is there");
    warm(&client, 60).await;
    let hangs = async |number| {
        fleet.orders.hang.store(1, Ordering::Relaxed);
        let outcome = call(&client, number).hedge().timeout(Duration::from_millis(200)).await;
        fleet.orders.hang.store(0, Ordering::Relaxed);
        outcome.is_err()
    };
    assert!(!hangs(1).await, "it is hedged");
    fleet.orders.fails(1, Fault::new(Code::ResourceExhausted, "too much"));
    call(&client, 2).hedge().await.expect_err("overloaded");
    assert!(hangs(3).await, "it was overloaded just now");
    sleep(Duration::from_secs(1)).await;
    assert!(!hangs(4).await, "a second is over");
    client.open_breaker("fleet", "run", Duration::from_millis(1)).expect("it has breakers");
    sleep(Duration::from_millis(5)).await;
    assert!(hangs(5).await, "the breaker lets probes through");
    client.close_breaker("fleet", "run").expect("good names");
    assert!(!hangs(6).await, "it is closed");
    let mut number = 10;
    while !hangs(number).await {
        number += 1;
        assert!(number < 200, "the budget has no end");
    }
    assert!(client.policies().refused_by_budget > 0);
}

#[tokio::test(start_paused = true)]
async fn the_slow_instance_is_hardly_ever_the_one_that_helps_out() {
    let scene = Scene::in_memory();
    let fleet = Fleet::serve(&scene, 4).await;
    let client = scene.client().await;
    let slow = fleet.ids().remove(0);
    *fleet.orders.takes.lock().expect("no panic") =
        (Duration::from_millis(5), HashMap::from([(slow.clone(), Duration::from_millis(100))]));
    // The broker gives the slow one its share, so what is late is set by the others' calls.
    warm(&client, 40).await;
    let quick: Vec<_> = fleet.ids().into_iter().filter(|instance| *instance != slow).collect();
    let mut helped = BTreeMap::<String, u64>::new();
    for number in 100..400 {
        fleet.orders.fails(1, Fault::new(Code::Aborted, "so that another one helps"));
        ok(call(&client, number).hedge()).await;
        let helper = fleet.orders.runs_of(number).remove(1);
        *helped.entry(helper).or_default() += 1;
        sleep(Duration::from_millis(100)).await;
    }
    assert!(quick.iter().all(|instance| helped.contains_key(instance)), "{helped:?}");
    // By chance it would be a quarter of them.
    assert!(helped.get(&slow).is_none_or(|times| *times <= 3), "{helped:?}");
}

#[tokio::test]
async fn a_fork_runs_on_several_instances_and_the_first_good_reply_wins() {
    let scene = Scene::new();
    let fleet = Fleet::serve(&scene, 3).await;
    let client = scene.client().await;
    let [hangs, fails, answers] = fleet.ids().try_into().expect("three");
    fleet.orders.hanging.lock().expect("no panic").insert(hangs);
    fleet.orders.failing.lock().expect("no panic").insert(fails);
    // The client may know fewer at first.
    let mut number = 0;
    soon(async {
        while fleet.orders.runs_of(number).len() < 3 {
            number += 1;
            let outcome = call(&client, number).fork(3).timeout(Duration::from_secs(3)).await;
            assert!(outcome.is_err() || outcome.is_ok_and(|winner| winner == answers));
        }
    })
    .await;
    let runs: BTreeSet<_> = fleet.orders.runs_of(number).into_iter().collect();
    assert_eq!(runs, fleet.ids().into_iter().collect());
    fleet.orders.until(|orders| orders.cancelled() > 0).await;
    assert!(client.policies().forks >= 2);
    // All fail.
    fleet.orders.hanging.lock().expect("no panic").clear();
    fleet.orders.failing.lock().expect("no panic").extend(fleet.ids());
    let error = soon(call(&client, 99).fork(3).into_future()).await.expect_err("all fail");
    assert!(error.code() == Code::Aborted && fleet.orders.runs_of(99).len() == 3, "{error:?}");
}

#[tokio::test]
async fn a_fork_goes_on_when_one_of_its_instances_is_killed() {
    let scene = Scene::new();
    let mut fleet = Fleet::serve(&scene, 2).await;
    let client = scene.client().await;
    fleet.orders.hanging.lock().expect("no panic").extend(fleet.ids());
    // Both have it.
    let mut number = 0;
    let pending = loop {
        number += 1;
        let mut pending = Box::pin(call(&client, number).fork(2).start().await.expect("sent"));
        let both = fleet.orders.until(|orders| orders.runs_of(number).len() == 2);
        tokio::select! {
            () = both => break pending,
            outcome = &mut pending => panic!("{outcome:?}"),
            () = sleep(Duration::from_secs(1)) => assert!(number < 60, "one has both"),
        }
    };
    drop(fleet.servers.remove(0));
    fleet.orders.hanging.lock().expect("no panic").clear();
    // The copy of the killed one goes to nobody else, since the other has one. A new instance gets it.
    fleet.servers.push(scene.serve(Fleet::service(&fleet.orders)).await);
    drop(pending);
    ok(call(&client, 1000).fork(2)).await;
}

#[tokio::test]
async fn a_value_stands_in_place_of_an_error_and_is_counted() {
    let scene = Scene::new();
    let mut fleet = Fleet::serve(&scene, 1).await;
    let client = scene.client().await;
    let safe = |number| call(&client, number).fail_safe("none".to_owned());
    assert_ne!(ok(safe(1)).await, "none");
    fleet.orders.fails(1, Fault::new(Code::Internal, "broken"));
    assert_eq!(ok(safe(2)).await, "none");
    let count = || client.call::<u64>("fleet", "run", (3,));
    assert!(matches!(soon(count().into_future()).await, Err(Error::UnreadableReply(_))));
    assert_eq!(soon(count().fail_safe(5).into_future()).await.ok(), Some(5));
    // What is no failure of the service remains.
    let refused = client.call::<()>("fleet", "refuse", ()).fails_with::<String>().fail_safe(());
    assert!(matches!(soon(refused.into_future()).await, Err(CallError::Service(why)) if why == "no"));
    let wrong = client.call::<u64>("no such name!", "run", (3,)).fail_safe(5);
    assert!(matches!(soon(wrong.into_future()).await, Err(Error::Invalid(_))));
    assert_eq!(client.policies().values_for_errors, 2);
    // An instance that is killed, and a client that is closed.
    fleet.orders.hang.store(1, Ordering::Relaxed);
    let pending = safe(4).start().await.expect("sent");
    fleet.orders.until(|orders| orders.runs_of(4).len() == 1).await;
    fleet.servers.clear();
    client.close().await;
    assert_eq!(soon(pending).await.ok().as_deref(), Some("none"));
    let pending = safe(5).start().await.expect("kept for whoever waits");
    assert_eq!(soon(pending).await.ok().as_deref(), Some("none"));
    let (told, hears) = tokio::sync::oneshot::channel();
    safe(6).then(|outcome| drop(told.send(outcome)));
    assert_eq!(soon(hears).await.expect("called").ok().as_deref(), Some("none"));
    assert_eq!(client.policies().values_for_errors, 5);
}

#[tokio::test]
async fn a_quorum_is_decided_as_soon_as_it_can_be_and_names_who_has_failed() {
    let scene = Scene::new();
    let mut fleet = Fleet::serve(&scene, 3).await;
    let client = scene.client().await;
    let ask = |quorum| client.call::<String>("fleet", "run", (1,)).all().require(quorum);
    // Until the client knows all three.
    soon(async { while ask(Quorum::All).gather(PATIENCE).await.expect("all are well").len() < 3 {} }).await;
    let [hangs, fails, answers] = fleet.ids().try_into().expect("three");
    fleet.orders.hanging.lock().expect("no panic").insert(hangs.clone());
    // One hangs: two of three, and any, are decided long before the window ends.
    let hour = Duration::from_secs(3600);
    assert_eq!(soon(ask(Quorum::Percent(60)).gather(hour)).await.expect("two").len(), 2);
    assert_eq!(soon(ask(Quorum::Any).gather(hour)).await.expect("one").len(), 1);
    let error = soon(ask(Quorum::All).gather(Duration::from_secs(1))).await.expect_err("one hangs");
    let Error::NoQuorum { good: 2, needed: 3, asked: 3, failed, .. } = &error else { panic!("{error:?}") };
    assert_eq!(*failed, [format!("{hangs} has not replied")]);
    fleet.orders.failing.lock().expect("no panic").insert(fails.clone());
    let error = soon(ask(Quorum::Percent(60)).gather(Duration::from_secs(1))).await.expect_err("one is well");
    let Error::NoQuorum { good: 1, needed: 2, asked: 3, failed, .. } = &error else { panic!("{error:?}") };
    assert!(failed.iter().any(|why| why.starts_with(&fails) && why.contains("as ordered")), "{failed:?}");
    let error = soon(ask(Quorum::All).gather(hour)).await.expect_err("decided by the one that fails");
    assert!(matches!(error, Error::NoQuorum { needed: 3, .. }), "{error:?}");
    // Those that are gone are not asked.
    fleet.servers.retain(|server| server.instance() == answers);
    soon(async { while ask(Quorum::All).gather(Duration::from_millis(300)).await.is_err() {} }).await;
}

#[tokio::test]
async fn a_call_that_has_failed_is_left_to_the_broker_and_runs_later() {
    let scene = Scene::new();
    let mut fleet = Fleet::serve(&scene, 1).await;
    let client = scene.client().await;
    let store = |number: u64| client.call::<()>("fleet", "store", (number,)).timeout(PATIENCE);
    fleet.orders.fails(1, Fault::new(Code::Unavailable, "not now"));
    soon(store(1).idempotent().fail_back().into_future()).await.expect("the broker has it");
    fleet.orders.until(|orders| orders.runs_of(1).len() == 2).await;
    // Nobody is there; the one that comes later runs it.
    fleet.servers.clear();
    let absent = || client.call::<()>("fleet", "refuse", ()).absent(Absent::Fail).timeout(Duration::from_secs(1));
    soon(async { while !matches!(absent().await, Err(Error::NoService { .. })) {} }).await;
    let outcome = store(2).idempotent().absent(Absent::Fail).retry(1).fail_back().into_future();
    soon(outcome).await.expect("the broker has it");
    assert_eq!(client.policies().failed_back, 2);
    fleet.servers.push(scene.serve(Fleet::service(&fleet.orders)).await);
    fleet.orders.until(|orders| orders.runs_of(2).len() == 1).await;
    // What another attempt cannot help, what may run only once, and what has no queue for oneway calls, fails.
    fleet.orders.fails(1, Fault::new(Code::NotFound, "no such thing"));
    soon(store(3).idempotent().fail_back().into_future()).await.expect_err("no help");
    fleet.orders.fails(1, Fault::new(Code::Unavailable, "not now"));
    soon(store(4).fail_back().into_future()).await.expect_err("not idempotent");
    // What goes to one instance stays with it.
    soon(store(6).to("nobody").idempotent().fail_back().into_future()).await.expect_err("it is not there");
    fleet.orders.fails(1, Fault::new(Code::Unavailable, "not now"));
    let once = client.call::<()>("fleet", "once", (5_u64,)).idempotent().fail_back();
    let error = soon(once.into_future()).await.expect_err("no queue");
    assert!(error.code() == Code::Unavailable && client.policies().failed_back == 2, "{error:?}");
}

#[hopline::service]
trait Desk {
    #[rpc(idempotent, hedge)]
    async fn hedged(&self, hangs: bool) -> u64;
    #[rpc(idempotent, fork = 2)]
    async fn forked(&self);
    #[rpc(idempotent, fail_back, attempts = 2)]
    async fn noted(&self);
}

/// One of its runs hangs.
#[derive(Clone, Default)]
struct OneHangs {
    hangs: Arc<AtomicU64>,
    noted: Arc<Notify>,
}

impl Desk for OneHangs {
    async fn hedged(&self, hangs: bool) -> u64 {
        if hangs && self.hangs.fetch_add(1, Ordering::Relaxed) == 0 {
            std::future::pending::<()>().await;
        }
        7
    }
    async fn forked(&self) {}
    async fn noted(&self) {
        self.noted.notify_one();
    }
}

#[tokio::test]
async fn a_trait_says_which_strategies_the_calls_of_a_method_have() {
    let scene = Scene::new();
    let desk = OneHangs::default();
    let mut servers = vec![scene.serve(DeskServer::new(desk.clone())).await];
    servers.push(scene.serve(DeskServer::new(desk.clone())).await);
    let client = scene.client().await;
    let calls = DeskClient::new(&client);
    soon(calls.forked().timeout(PATIENCE).into_future()).await.expect("answered");
    assert_eq!(client.policies().forks, 1);
    for _ in 0..50 {
        soon(calls.hedged(false).timeout(PATIENCE).into_future()).await.expect("answered");
    }
    // Without a hedge it would hang for the whole minute of `soon`.
    soon(calls.hedged(true).timeout(PATIENCE).into_future()).await.expect("answered by the other instance");
    servers.clear();
    let absent = || client.call::<u64>("desk", "hedged", (false,)).absent(Absent::Fail).timeout(Duration::from_secs(1));
    soon(async { while !matches!(absent().await, Err(Error::NoService { .. })) {} }).await;
    soon(calls.noted().absent(Absent::Fail).into_future()).await.expect("the broker has it");
    assert_eq!(client.policies().failed_back, 1);
    let _server = scene.serve(DeskServer::new(desk.clone())).await;
    soon(desk.noted.notified()).await;
}

#[tokio::test(start_paused = true)]
async fn an_own_error_that_passes_is_no_good_reply_while_another_instance_may_have_one() {
    let scene = Scene::in_memory();
    let (busy, mut servers) = (Arc::new(AtomicUsize::new(usize::MAX)), Vec::new());
    for number in 0..2 {
        let busy = busy.clone();
        let ask = move |_: Context, (): ()| {
            let is_busy = busy.load(Ordering::Relaxed) == number;
            async move {
                if is_busy {
                    return Err("busy".to_owned());
                }
                sleep(Duration::from_millis(30)).await;
                Ok(number)
            }
        };
        servers.push(scene.serve(Service::new("two", 1).method(Method::new("ask").idempotent(), ask)).await);
    }
    let client = scene.client().await;
    let ask = || client.call::<usize>("two", "ask", ()).fails_with::<String>().idempotent();
    for busier in [0, 1] {
        busy.store(busier, Ordering::Relaxed);
        // An answer is an answer, unless the call says that it passes.
        let answer = ask().fork(2).await;
        assert!(matches!(&answer, Err(CallError::Service(error)) if error == "busy"), "{answer:?}");
        assert_eq!(ask().fork(2).retry_on(|error| error == "busy").await.expect("the other"), 1 - busier);
    }
    // More than there are instances, or than one could count.
    assert_eq!(ask().fork(u32::MAX).retry_on(|_| true).await.expect("the other"), 0);
    // With a hedge the other is asked at once.
    let hedged = || ask().retry_on(|error| error == "busy").hedge();
    for _ in 0..10 {
        assert_eq!(hedged().await.expect("the other"), 0);
    }
}

/// What becomes of one arrival of a call at a server.
#[derive(Debug, Clone, Copy)]
enum Fate {
    Runs,
    Fails(Code),
    Hangs,
    Refused(Code),
}

fn fate() -> impl Strategy<Value = Fate> {
    let code = || prop::sample::select(vec![Code::Unavailable, Code::ResourceExhausted, Code::Aborted, Code::Internal]);
    prop_oneof![
        2 => Just(Fate::Runs),
        3 => code().prop_map(Fate::Fails),
        1 => Just(Fate::Hangs),
        3 => code().prop_map(Fate::Refused),
    ]
}

/// What a call asks for.
#[derive(Debug, Clone)]
struct Wishes {
    retries: u32,
    hedges: bool,
    forks: u32,
    has_value: bool,
    route: usize,
}

fn wishes() -> impl Strategy<Value = Wishes> {
    (0..4_u32, any::<bool>(), 0..4_u32, any::<bool>(), 0..4_usize)
        .prop_map(|(retries, hedges, forks, has_value, route)| Wishes { retries, hedges, forks, has_value, route })
}

/// Lets calls run, fail, hang or be refused as it was drawn, and counts which have run.
#[derive(Default)]
struct Dice {
    fates: Vec<Fate>,
    next: AtomicUsize,
    /// The fates of calls that were admitted, by request id.
    admitted: Mutex<HashMap<uuid::Uuid, Fate>>,
    runs: Mutex<HashMap<u64, u32>>,
}

struct Thrown(Arc<Dice>);

impl Middleware for Thrown {
    fn admit(&self, call: &Invocation) -> Result<(), Fault> {
        let Some(id) = call.request_id().filter(|_| call.method() == "run") else { return Ok(()) };
        let dice = &self.0;
        let fate = dice.fates[dice.next.fetch_add(1, Ordering::Relaxed) % dice.fates.len()];
        if let Fate::Refused(code) = fate {
            return Err(Fault::new(code, "refused"));
        }
        dice.admitted.lock().expect("no panic").insert(id, fate);
        Ok(())
    }
}

impl Dice {
    async fn run(self: Arc<Self>, id: uuid::Uuid, number: u64) -> Result<u64, Fault> {
        *self.runs.lock().expect("no panic").entry(number).or_default() += 1;
        let fate = self.admitted.lock().expect("no panic").get(&id).copied();
        match fate {
            Some(Fate::Fails(code)) => Err(Fault::new(code, "thrown")),
            Some(Fate::Hangs) => std::future::pending().await,
            Some(Fate::Runs | Fate::Refused(_)) | None => Ok(number),
        }
    }
}

async fn calls_that_may_run_once(fates: Vec<Fate>, wishes: Vec<Wishes>, has_breakers: bool) -> HashMap<u64, u32> {
    let scene = Scene::in_memory();
    let dice = Arc::new(Dice { fates, ..Dice::default() });
    let mut servers = Vec::new();
    for _ in 0..3 {
        let run = dice.clone();
        let service = Service::new("dice", 1)
            .with(Thrown(dice.clone()))
            .method(Method::new("run"), move |context: Context, (number,): (u64,)| {
                run.clone().run(context.request_id(), number)
            });
        servers.push(scene.serve(service).await);
    }
    let builder = Client::builder().namespace(&scene.namespace);
    let builder = if has_breakers { builder.breaker() } else { builder };
    let client = builder.connect(&scene.url).await.expect("it is there");
    // So that it is known what is late.
    for _ in 0..60 {
        let known = client.call::<u64>("dice", "run", (u64::MAX,)).idempotent().hedge();
        drop(known.timeout(Duration::from_millis(50)).await);
    }
    let calls = wishes.iter().zip(0_u64..).map(|(wishes, number)| {
        let routes = [Route::Any, Route::RoundRobin, Route::LeastInFlight, Route::Key(number.to_string())];
        let call = client.call::<u64>("dice", "run", (number,)).timeout(Duration::from_secs(3));
        let call = call.retry(wishes.retries).fork(wishes.forks).route(routes[wishes.route].clone());
        let call = if wishes.hedges { call.hedge() } else { call };
        if wishes.has_value { call.fail_safe(0) } else { call }
    });
    join_all(calls).await;
    let runs = dice.runs.lock().expect("no panic");
    runs.clone()
}

#[test]
fn what_is_not_idempotent_never_runs_twice_whatever_the_policies_are() {
    let mut runner = TestRunner::new(Config { cases: 40, failure_persistence: None, ..Config::default() });
    let input = (prop::collection::vec(fate(), 1..40), prop::collection::vec(wishes(), 1..12), any::<bool>());
    let outcome = runner.run(&input, |(fates, wishes, has_breakers)| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
        let runtime = runtime.map_err(|error| TestCaseError::fail(error.to_string()))?;
        let mut runs = runtime.block_on(calls_that_may_run_once(fates, wishes, has_breakers));
        runs.remove(&u64::MAX);
        prop_assert!(runs.values().all(|runs| *runs == 1), "{:?}", runs);
        Ok(())
    });
    if let Err(error) = outcome {
        panic!("{error}");
    }
}
