//! What a client's limits do to its calls; and clients that connect later.

use std::future::IntoFuture as _;
use std::time::Duration;

use futures::future::join3;
use futures::stream::FuturesUnordered;
use futures::{FutureExt as _, StreamExt as _};
use hopline::{Client, Error, State, WhenFull};

use crate::support::{Held, Nobody, Scene, everybody, hold, later, soon, told};

const LONG: Duration = Duration::from_secs(60);
/// A time-out that the test reaches by advancing the clock.
const BRIEF: Duration = Duration::from_secs(5);

async fn limited(scene: &Scene, calls: usize, when_full: WhenFull) -> Client {
    let builder = Client::builder().namespace(&scene.namespace).timeout(LONG).max_in_flight(calls, when_full);
    builder.connect(&scene.url).await.expect("the broker is there")
}

#[tokio::test]
async fn one_call_too_many_in_flight_is_refused_at_once_and_runs_once_there_is_room() {
    let scene = Scene::new();
    let Held { service, mut arrived } = Held::new();
    let _server = scene.serve(service).await;
    let client = limited(&scene, 2, WhenFull::Refuse).await;
    let first = hold(&client, 1).start().await.expect("on its way");
    let second = hold(&client, 2).start().await.expect("on its way");
    let (one, two) = (soon(arrived.recv()).await.expect("runs"), soon(arrived.recv()).await.expect("runs"));
    match soon(hold(&client, 3).into_future()).await {
        Err(Error::Overloaded { what, .. }) => assert!(what.contains("2 calls in flight"), "{what}"),
        other => panic!("expected to be refused, not {other:?}"),
    }
    one.release();
    first.await.expect("answered");
    drop(second);
    soon(two.context.cancelled()).await;
    let pending = hold(&client, 4).start().await.expect("on its way");
    soon(arrived.recv()).await.expect("runs").release();
    assert_eq!(pending.await.expect("answered"), 4);
}

#[tokio::test]
async fn calls_beyond_the_limit_wait_for_their_place_in_order() {
    let scene = Scene::new();
    let Held { service, mut arrived } = Held::new();
    let _server = scene.serve(service).await;
    let client = limited(&scene, 3, WhenFull::Wait).await;
    let mut pending = FuturesUnordered::new();
    for number in 0..30 {
        pending.push(hold(&client, number).start().await.expect("on its way"));
    }
    for round in 0..10 {
        let mut running = Vec::new();
        for _ in 0..3 {
            running.push(soon(arrived.recv()).await.expect("runs"));
        }
        let mut numbers: Vec<u64> = running.iter().map(|call| call.number).collect();
        numbers.sort_unstable();
        assert_eq!(numbers, [round * 3, round * 3 + 1, round * 3 + 2]);
        assert!(arrived.recv().now_or_never().is_none(), "a fourth one runs");
        running.into_iter().for_each(|call| call.release());
        for _ in 0..3 {
            soon(pending.next()).await.expect("one more").expect("answered");
        }
    }
}

#[tokio::test]
async fn a_call_that_gets_no_place_by_its_deadline_is_told_so_and_never_sent() {
    let scene = Scene::new();
    let Held { service, mut arrived } = Held::new();
    let _server = scene.serve(service).await;
    let client = limited(&scene, 1, WhenFull::Wait).await;
    let first = hold(&client, 1).start().await.expect("on its way");
    let one = soon(arrived.recv()).await.expect("runs");
    let second = hold(&client, 2).timeout(BRIEF).start().await.expect("it waits");
    let second = later(BRIEF, second).await;
    assert!(matches!(second, Err(Error::Overloaded { .. })), "{second:?}");
    one.release();
    first.await.expect("answered");
    let third = hold(&client, 3).start().await.expect("on its way");
    let next = soon(arrived.recv()).await.expect("runs");
    assert_eq!(next.number, 3);
    next.release();
    third.await.expect("answered");
}

#[tokio::test]
async fn a_call_that_nobody_collects_keeps_its_place_until_its_deadline_only() {
    let scene = Scene::new();
    // Only the queue of the service is left, so nobody answers.
    soon(scene.serve(Held::new().service).await.drain()).await;
    for when_full in [WhenFull::Refuse, WhenFull::Wait] {
        let client = limited(&scene, 1, when_full).await;
        let kept = hold(&client, 1).timeout(BRIEF).start().await.expect("on its way");
        let early = hold(&client, 2).timeout(BRIEF / 2).start().await.expect("it waits at most");
        let early = later(BRIEF / 2, early).await;
        assert!(matches!(early, Err(Error::Overloaded { .. })), "{early:?}");
        later(BRIEF / 2, async {}).await;
        let next = hold(&client, 3).timeout(BRIEF).start().await.expect("it waits at most");
        let next = later(BRIEF, next).await;
        assert!(!matches!(next, Ok(_) | Err(Error::Overloaded { .. })), "it has the place: {next:?}");
        assert!(matches!(kept.await, Err(Error::Timeout { .. })));
    }
}

#[tokio::test]
async fn a_broadcast_takes_no_place() {
    let scene = Scene::new();
    let Held { service, mut arrived } = Held::new();
    let _server = scene.serve(service).await;
    let client = limited(&scene, 1, WhenFull::Refuse).await;
    let held = hold(&client, 1).start().await.expect("on its way");
    let one = soon(arrived.recv()).await.expect("runs");
    told(1, async |window| everybody(&client, window).await).await;
    one.release();
    held.await.expect("answered");
}

#[tokio::test]
async fn a_call_that_is_given_up_before_it_leaves_gives_its_place_to_the_next() {
    let scene = Scene::new();
    let Held { service, mut arrived } = Held::new();
    let _server = scene.serve(service).await;
    let client = limited(&scene, 1, WhenFull::Wait).await;
    // Without a pause in between, the client's task sees all three at once.
    let first = hold(&client, 1).start().await.expect("on its way");
    let second = hold(&client, 2).start().await.expect("on its way");
    drop(first);
    let release_all = async {
        while let Some(arrival) = arrived.recv().await {
            arrival.release();
        }
    };
    let answered = soon(async {
        tokio::select! {
            answered = second => answered,
            () = release_all => panic!("the server has gone"),
        }
    });
    assert_eq!(answered.await.expect("answered"), 2);
}

#[tokio::test]
async fn what_is_given_up_while_there_is_no_connection_leaves_nothing_behind() {
    let nobody = Nobody::new();
    let builder = Client::builder().timeout(LONG).max_in_flight(1, WhenFull::Refuse);
    let client = builder.connect_lazy(nobody.url()).expect("a good address");
    drop(hold(&client, 1).start().await.expect("it waits"));
    let next = hold(&client, 2).timeout(BRIEF).start().await.expect("it waits");
    let next = later(BRIEF, next).await;
    assert!(matches!(next, Err(Error::Disconnected { may_have_run: false, .. })), "{next:?}");
    let nothing_left = async {
        while client.in_flight() > 0 {
            tokio::task::yield_now().await;
        }
    };
    soon(nothing_left).await;
}

#[tokio::test]
async fn a_broadcast_that_waits_for_a_connection_ends_with_its_client() {
    let nobody = Nobody::new();
    let client = Client::builder().connect_lazy(nobody.url()).expect("a good address");
    let gathering = client.call::<u64>("held", "hold", (1,)).all().gather(Duration::from_secs(3600));
    let (gathered, ()) = soon(futures::future::join(gathering, client.close())).await;
    assert!(matches!(gathered, Err(Error::Disconnected { may_have_run: false, .. })), "{gathered:?}");
}

#[tokio::test]
async fn what_was_just_sent_ends_with_its_client() {
    let scene = Scene::new();
    let _server = scene.serve(Held::new().service).await;
    let client = scene.client().await;
    let call = hold(&client, 1).start().await.expect("on its way");
    client.close().await;
    let ended = soon(call).await;
    assert!(matches!(ended, Err(Error::Disconnected { .. })), "{ended:?}");
}

#[tokio::test]
async fn a_client_that_connects_later_makes_its_calls_once_it_has() {
    let scene = Scene::new();
    let Held { service, mut arrived } = Held::new();
    let _server = scene.serve(service).await;
    let client = Client::builder().namespace(&scene.namespace).connect_lazy(&scene.url).expect("a good address");
    let pending = hold(&client, 1).start().await.expect("on its way");
    soon(arrived.recv()).await.expect("runs").release();
    assert_eq!(pending.await.expect("answered"), 1);
    assert_eq!(*client.state().borrow(), State::Ready);
    client.close().await;
    assert_eq!(*client.state().borrow(), State::Closed);
}

#[tokio::test]
async fn a_call_without_a_connection_says_why_at_its_deadline() {
    let nobody = Nobody::new();
    let client = Client::builder().connect_lazy(nobody.url()).expect("a good address");
    let mut state = client.state();
    let refused = state.wait_for(|state| matches!(state, State::Connecting { reason: Some(_) }));
    soon(refused).await.expect("it is told");
    let call = || client.call::<u64>("held", "hold", (1,));
    let answered = call().timeout(BRIEF).into_future();
    let sent = client.oneway("held", "hold", (1,)).timeout(BRIEF).send();
    let gathered = call().all().gather(BRIEF);
    // All three wait before the clock is advanced.
    let mut calls = Box::pin(join3(answered, sent, gathered));
    assert!(calls.as_mut().now_or_never().is_none(), "there is no connection");
    let (answered, sent, gathered) = later(BRIEF, calls).await;
    let calls = [answered.map(|_| ()), sent, gathered.map(|_| ())];
    for outcome in calls {
        match outcome {
            Err(Error::Disconnected { may_have_run: false, reason, .. }) => {
                assert!(reason.contains("cannot connect"), "{reason}");
            }
            other => panic!("expected no connection, not {other:?}"),
        }
    }
}
