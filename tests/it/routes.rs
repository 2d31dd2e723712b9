//! Routes: which instance gets a call, and what becomes of it when that one is gone.

use std::collections::{BTreeMap, BTreeSet};
use std::future::IntoFuture as _;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::future::join_all;
use hopline::{
    Call, Client, Code, Context, Error, Fault, Invocation, Method, Middleware, Next, Reply, Route, Running, Service,
    State, Unanswered, Weights,
};

use crate::support::{Held, PATIENCE, Scene, hold, later, soon};

/// A service whose instances say who they are.
fn who() -> Service {
    who_of(1)
}

fn who_of(version: u32) -> Service {
    Service::new("who", version).method(Method::new("am_i"), |context: Context, (): ()| async move {
        Ok::<_, Fault>(context.instance().to_owned())
    })
}

fn ask(client: &Client, route: Route) -> Call<String> {
    client.call("who", "am_i", ()).route(route)
}

fn round_robin(client: &Client) -> Call<String> {
    ask(client, Route::RoundRobin)
}

/// Waits until a client knows so many instances.
async fn knows(client: &Client, instances: usize) -> BTreeSet<String> {
    let known = async {
        loop {
            let asked = join_all((0..instances).map(|_| round_robin(client))).await;
            let answers: BTreeSet<String> = asked.into_iter().filter_map(Result::ok).collect();
            if answers.len() == instances {
                return answers;
            }
        }
    };
    soon(known).await
}

async fn counted(client: &Client, route: &Route, calls: usize) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for _ in 0..calls {
        *counts.entry(soon(ask(client, route.clone()).into_future()).await.expect("answered")).or_default() += 1;
    }
    counts
}

async fn serve_with(scene: &Scene, attribute: (&str, &str)) -> Running {
    let server = scene.server().await.attribute(attribute.0, attribute.1);
    server.serve(who()).start().await.expect("it can be served")
}

#[tokio::test]
async fn a_key_is_with_one_instance_for_every_client_while_that_lives() {
    let scene = Scene::new();
    let [leaves, _stays, _other] = [scene.serve(who()).await, scene.serve(who()).await, scene.serve(who()).await];
    let (one, two) = (scene.client().await, scene.client().await);
    knows(&one, 3).await;
    knows(&two, 3).await;
    let places = async |client: &Client| {
        let places = (0..40).map(|key| ask(client, Route::Key(format!("key {key}"))));
        soon(join_all(places)).await.into_iter().map(|place| place.expect("answered")).collect::<Vec<_>>()
    };
    let before = places(&one).await;
    assert_eq!(before, places(&two).await);
    let gone = leaves.instance().to_owned();
    soon(leaves.drain()).await;
    for (before, after) in before.into_iter().zip(places(&one).await) {
        assert!(if before == gone { after != gone } else { after == before }, "{before} {after}");
    }
}

#[tokio::test]
async fn turns_and_weights_share_calls_out() {
    let scene = Scene::new();
    let light = serve_with(&scene, ("weight", "1")).await;
    let heavy = serve_with(&scene, ("weight", "3")).await;
    let client = scene.client().await;
    let [light, heavy] = [light, heavy].map(|server| (server.instance().to_owned(), server));
    assert_eq!(knows(&client, 2).await, BTreeSet::from([light.0.clone(), heavy.0.clone()]));
    let both = |of_light, of_heavy| BTreeMap::from([(light.0.clone(), of_light), (heavy.0.clone(), of_heavy)]);
    assert_eq!(counted(&client, &Route::RoundRobin, 40).await, both(20, 20));
    let weighted = Route::Weighted(Weights::Attribute("weight".into()));
    assert_eq!(counted(&client, &weighted, 40).await, both(10, 30));
    let one = counted(&client, &Route::One(light.0.clone()), 3).await;
    assert_eq!(one, BTreeMap::from([(light.0.clone(), 3)]));
}

#[tokio::test]
async fn a_zone_is_left_only_if_nobody_is_in_it() {
    let scene = Scene::new();
    let near = serve_with(&scene, ("zone", "eu1")).await;
    let far = serve_with(&scene, ("zone", "us1")).await;
    let client = scene.client().await;
    knows(&client, 2).await;
    let zone = Route::Zone { attribute: "zone".into(), value: "eu1".into() };
    assert_eq!(counted(&client, &zone, 10).await, BTreeMap::from([(near.instance().to_owned(), 10)]));
    soon(near.drain()).await;
    assert_eq!(counted(&client, &zone, 10).await, BTreeMap::from([(far.instance().to_owned(), 10)]));
}

#[tokio::test]
async fn the_route_of_a_service_is_for_every_call_that_sets_none_and_passes_middleware() {
    /// Changes nothing.
    struct Passes;
    impl Middleware for Passes {
        async fn handle(&self, call: Invocation, next: Next) -> Result<Reply, Error> {
            next.run(call).await
        }
    }
    let scene = Scene::new();
    let servers = [scene.serve(who()).await, scene.serve(who()).await];
    let first = servers[0].instance();
    let builder = || Client::builder().namespace(&scene.namespace).timeout(PATIENCE);
    for builder in [builder(), builder().with(Passes)] {
        let client = builder.route("who.v1", Route::One(first.into())).connect(&scene.url).await.expect("it is there");
        for _ in 0..5 {
            let answer: String = client.call("who", "am_i", ()).await.expect("answered");
            assert_eq!(answer, first);
        }
        assert_eq!(knows(&client, 2).await.len(), 2, "a call's own route is stronger");
    }
    let refused = builder().route("who.1", Route::RoundRobin).connect(&scene.url).await;
    assert!(matches!(refused, Err(Error::Invalid(_))), "{refused:?}");
}

#[tokio::test]
async fn nobody_is_known_soon_and_somebody_who_comes_is_found() {
    let scene = Scene::new();
    let client = scene.client().await;
    match soon(round_robin(&client).into_future()).await {
        Err(error @ Error::NoService { .. }) => assert!(!error.may_have_run()),
        other => panic!("{other:?}"),
    }
    let server = scene.serve(who()).await;
    assert_eq!(knows(&client, 1).await, BTreeSet::from([server.instance().to_owned()]));
    let nobody = Route::Weighted(Weights::Given(BTreeMap::new()));
    assert!(matches!(soon(ask(&client, nobody).into_future()).await, Err(Error::NoService { .. })));
}

#[tokio::test]
async fn no_call_is_lost_when_instances_drain_and_die() {
    let scene = Scene::new();
    let stays = scene.serve(who()).await;
    let (drains, dies) = (scene.serve(who()).await, scene.serve(who()).await);
    let client = scene.client().await;
    knows(&client, 3).await;
    let (drains, dies) = (tokio::spawn(drains.drain()), tokio::spawn(async move { drop(dies) }));
    // Of each call it is known that it has not run, or it is answered.
    let mut of_last = 0;
    while of_last < 10 {
        let answers = soon(join_all((0..10).map(|_| round_robin(&client).idempotent()))).await;
        let answers: Vec<_> = answers.into_iter().map(|answer| answer.expect("answered")).collect();
        of_last = answers.iter().filter(|answer| **answer == stays.instance()).count();
    }
    soon(drains).await.expect("no panic");
    soon(dies).await.expect("no panic");
}

#[tokio::test]
async fn of_the_calls_of_an_instance_that_dies_the_idempotent_ones_run_on_another() {
    let scene = Scene::new();
    let (mut first, mut second) = (Held::new(), Held::new());
    let servers = [scene.serve(first.service).await, scene.serve(second.service).await];
    let client = scene.client().await;
    // Both are known, whichever has the key. `absent` is no method.
    let asked = async || {
        let asked = client.call::<()>("held", "absent", ()).route(Route::RoundRobin);
        matches!(soon(asked.into_future()).await, Err(Error::Fault(_)))
    };
    soon(async { while !(asked().await && asked().await) {} }).await;
    let call = |number: u64| hold(&client, number).route(Route::Key("a key".into()));
    let idempotent = call(1).idempotent().start().await.expect("on its way");
    let other = call(2).start().await.expect("on its way");
    let mut at = BTreeSet::new();
    let mut arrivals = Vec::new();
    while arrivals.len() < 2 {
        let (index, arrival) = soon(async {
            tokio::select! { first = first.arrived.recv() => (0, first), second = second.arrived.recv() => (1, second) }
        })
        .await;
        at.insert(index);
        arrivals.push(arrival.expect("it runs"));
    }
    assert_eq!(at.len(), 1, "one key is with one instance");
    let [one, two] = servers;
    let (dies, stays, mut heard) = if at.contains(&0) { (one, two, second.arrived) } else { (two, one, first.arrived) };
    drop(dies);
    let again = soon(heard.recv()).await.expect("it runs again");
    assert_eq!((again.number, again.context.instance()), (1, stays.instance()));
    again.release();
    assert_eq!(soon(idempotent).await.expect("answered"), 1);
    match soon(other).await {
        Err(error @ Error::Fault(_)) => assert!(error.code() == Code::Aborted && error.may_have_run()),
        outcome => panic!("{outcome:?}"),
    }
    assert!(heard.try_recv().is_err(), "the other call may have run, and does not run again");
}

#[tokio::test]
async fn a_canary_gets_its_share() {
    let scene = Scene::new();
    let (old, new) = (scene.serve(who_of(1)).await, scene.serve(who_of(2)).await);
    let client = scene.client().await;
    let shares = async || {
        let calls = (0..400).map(|_| client.call::<String>("who", "am_i", ()));
        let answers = soon(join_all(calls)).await.into_iter().map(|answer| answer.expect("answered"));
        answers.fold((0, 0), |(of_old, of_new), answer| {
            if answer == old.instance() {
                (of_old + 1, of_new)
            } else {
                (of_old, of_new + usize::from(answer == new.instance()))
            }
        })
    };
    client.canary("who", 2, 5.0).expect("it can be");
    assert_eq!(shares().await, (380, 20));
    let routed = Client::builder().namespace(&scene.namespace).route("who.v2", Route::RoundRobin);
    let routed = routed.connect(&scene.url).await.expect("it is there");
    routed.canary("who", 2, 100.0).expect("it can be");
    let answer: String = soon(routed.call("who", "am_i", ()).into_future()).await.expect("its route is followed");
    assert_eq!(answer, new.instance());
    client.canary("who", 2, 0.0).expect("it can be");
    assert_eq!(shares().await, (400, 0));
    for (service, version, percent) in [("who", 1, 5.0), ("who", 2, 101.0), ("who", 2, f64::NAN), ("who.2", 3, 1.0)] {
        let refused = client.canary(service, version, percent);
        assert!(matches!(refused, Err(Error::Invalid(_))), "{service} {version} {percent}: {refused:?}");
    }
}

#[tokio::test]
async fn whoever_follows_the_instances_keeps_no_connection_open() {
    let scene = Scene::new();
    let server = scene.serve(who()).await;
    let client = scene.client().await;
    knows(&client, 1).await;
    let mut state = client.state();
    drop(client);
    soon(state.wait_for(|state| *state == State::Closed)).await.expect("it tells");
    soon(server.drain()).await;
}

#[tokio::test]
async fn a_call_along_a_route_waits_for_a_connection_no_longer_than_it_may() {
    let nobody = crate::support::Nobody::new();
    let client = Client::builder().connect_lazy(nobody.url()).expect("good settings");
    let call = round_robin(&client).timeout(Duration::from_secs(3600)).start().await.expect("it waits");
    let failed = later(Duration::from_secs(3600), call).await;
    assert!(matches!(failed, Err(Error::Timeout { why: Unanswered::Unsent, .. })), "{failed:?}");
    client.close().await;
    let closed = soon(round_robin(&client).into_future()).await;
    assert!(matches!(closed, Err(Error::Disconnected { may_have_run: false, .. })), "{closed:?}");
}

/// The times of calls that so many callers make one after the other along a route, until there are enough of them.
async fn times(client: &Client, route: &Route, callers: usize, calls: usize) -> Vec<Duration> {
    let caller = || async {
        let mut times = Vec::new();
        for _ in 0..calls / callers {
            let since = tokio::time::Instant::now();
            ask(client, route.clone()).await.expect("answered");
            times.push(since.elapsed());
        }
        times
    };
    let mut times = join_all((0..callers).map(|_| caller())).await.concat();
    times.sort();
    times
}

#[tokio::test(start_paused = true)]
async fn one_that_is_ten_times_slower_gets_few_calls_until_it_is_quick_again() {
    /// So many that each of the quick ones has more than ten at a time.
    const CALLERS: usize = 48;
    let scene = Scene::in_memory();
    let (slow, quick) = (Duration::from_secs(1), Duration::from_millis(100));
    let of_slow = Arc::new(Mutex::new((slow, 0)));
    let taking = |time: Arc<Mutex<(Duration, usize)>>| {
        Service::new("who", 1).method(Method::new("am_i"), move |context: Context, (): ()| {
            let takes = {
                let mut time = time.lock().expect("no panic");
                time.1 += 1;
                time.0
            };
            async move {
                tokio::time::sleep(takes).await;
                Ok::<_, Fault>(context.instance().to_owned())
            }
        })
    };
    let of_quick = Arc::new(Mutex::new((quick, 0)));
    let mut servers = vec![scene.serve(taking(of_slow.clone())).await];
    for _ in 0..2 {
        servers.push(scene.serve(taking(of_quick.clone())).await);
    }
    let client = scene.client().await;
    knows(&client, servers.len()).await;
    let gets = |calls| {
        of_slow.lock().expect("no panic").1 = 0;
        let (client, of_slow) = (&client, &of_slow);
        async move {
            let times = times(client, &Route::LeastInFlight, CALLERS, calls).await;
            (times[calls * 99 / 100], of_slow.lock().expect("no panic").1)
        }
    };
    let in_turn = times(&client, &Route::RoundRobin, CALLERS, 4_800).await[4_800 * 99 / 100];
    let (first, of_first) = gets(4_800).await;
    let (second, of_second) = gets(14_400).await;
    assert!(first * 5 < in_turn && second * 5 < in_turn, "{in_turn:?} {first:?} {second:?}");
    assert!(of_first < 48 && of_second < 144, "{of_first} {of_second}");
    // It was tried again, and is so from now on: then it is like the others.
    of_slow.lock().expect("no panic").0 = quick;
    let (_, of_quick_again) = gets(14_400).await;
    assert!(of_second > 0 && of_quick_again > 200, "{of_second} {of_quick_again}");
    let (_, of_quick_again) = gets(4_800).await;
    assert!((1_200..2_000).contains(&of_quick_again), "{of_quick_again}");
}
