//! Calls while the broker accepts nothing, on a broker in memory. It tells everybody who publishes, and what was
//! published waits.

use std::future::IntoFuture;
use std::time::Duration;

use futures::FutureExt;
use futures::future::join_all;
use hopline::testing::Broker;
use hopline::topology::{Binding, Declaration, Queue, QueueKind};
use hopline::transport::Mode;
use hopline::{Client, ClientBuilder, Coalesce, Context, Error, Method, Service, State, WhenFull};
use tokio::sync::mpsc;

use crate::support::{Held, Scene, hold, run, soon};

const LONG: Duration = Duration::from_secs(3600);
const MEMORY: &str = "low on memory";
/// The frame type of a cancel.
const CANCEL: u8 = 7;

fn builder(scene: &Scene) -> ClientBuilder {
    Client::builder().namespace(&scene.namespace).timeout(LONG).blocked_wait(LONG)
}

/// Raises the alarm, and waits until the client knows of it.
async fn block(broker: &Broker, client: &Client) {
    broker.alarm(MEMORY);
    let publisher = client.clone();
    tokio::spawn(async move { publisher.publish("something.happened", &()).await });
    let mut state = client.state();
    soon(state.wait_for(|state| matches!(state, State::Blocked { .. }))).await.expect("it is told");
}

async fn unblock(broker: &Broker, client: &Client) {
    broker.restore();
    soon(client.state().wait_for(|state| *state == State::Ready)).await.expect("it is told");
}

/// Runs a test on a thread of its own. A client that never yields would otherwise hang the test for ever.
fn on_a_thread_of_its_own(test: impl Future<Output = ()> + Send + 'static) {
    let (done, ended) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
        runtime.expect("a runtime").block_on(test);
        done.send(()).expect("the test waits");
    });
    ended.recv_timeout(Duration::from_secs(60)).expect("it ends, and nothing in it has failed");
}

#[test]
fn a_call_that_waits_for_a_place_during_an_alarm_waits_in_peace() {
    on_a_thread_of_its_own(async {
        let (scene, broker) = Scene::alone();
        let Held { service, mut arrived } = Held::new();
        let _server = scene.serve(service).await;
        for is_given_up in [true, false] {
            let client =
                builder(&scene).max_in_flight(1, WhenFull::Wait).connect(&scene.url).await.expect("it is there");
            let first = hold(&client, 1).timeout(Duration::from_secs(60)).start().await.expect("on its way");
            let _runs = soon(arrived.recv()).await.expect("it runs");
            block(&broker, &client).await;
            let mut second = hold(&client, 2).start().await.expect("it waits for its place");
            if is_given_up {
                drop(first);
            } else {
                let late = tokio::time::timeout(Duration::from_secs(120), first).await.expect("its time is over");
                assert!(matches!(late, Err(Error::Timeout { .. })), "{late:?}");
            }
            // The time is virtual. It is longer than a call waits for a blocked broker.
            tokio::time::sleep(Duration::from_secs(10)).await;
            assert!((&mut second).now_or_never().is_none(), "it waits");
            unblock(&broker, &client).await;
            assert_eq!(run(second, &mut arrived).await, 2);
        }
    });
}

#[tokio::test(start_paused = true)]
async fn the_longest_wait_for_a_blocked_broker_ends_with_the_alarm_and_the_shortest_at_once() {
    let (scene, broker) = Scene::alone();
    let Held { service, mut arrived } = Held::new();
    let _server = scene.serve(service).await;
    let patient = builder(&scene).blocked_wait(Duration::MAX).connect(&scene.url).await.expect("it is there");
    block(&broker, &patient).await;
    let waiting = hold(&patient, 1).start().await.expect("it waits");
    let hasty = builder(&scene).blocked_wait(Duration::ZERO).connect(&scene.url).await.expect("it is there");
    block(&broker, &hasty).await;
    match soon(hold(&hasty, 2).into_future()).await {
        Err(Error::Blocked { method, may_have_run: false, .. }) => assert_eq!(method.as_deref(), Some("held.v1.hold")),
        other => panic!("{other:?}"),
    }
    unblock(&broker, &patient).await;
    assert_eq!(run(waiting, &mut arrived).await, 1);
}

#[tokio::test(start_paused = true)]
async fn a_client_that_is_dropped_with_a_call_that_nobody_confirms_closes() {
    let (scene, broker) = Scene::alone();
    let Held { service, mut arrived } = Held::new();
    let _server = scene.serve(service).await;
    let client = builder(&scene).connect(&scene.url).await.expect("it is there");
    broker.alarm(MEMORY);
    let unconfirmed = hold(&client, 1).start().await.expect("the broker has it, and says nothing");
    let mut state = client.state();
    soon(state.wait_for(|state| matches!(state, State::Blocked { .. }))).await.expect("it is told");
    drop(unconfirmed);
    drop(client);
    soon(state.wait_for(|state| *state == State::Closed)).await.expect("it is told");
    broker.restore();
    arrived.try_recv().expect_err("it ended with its client's connection");
}

#[tokio::test(start_paused = true)]
async fn a_client_that_is_dropped_just_after_its_call_still_cancels_it() {
    let (scene, broker) = Scene::alone();
    let _server = scene.serve(Held::new().service).await;
    let (exchange, key) = (format!("{}.rpc", scene.namespace), "held.v1@*".to_owned());
    let listening = [
        Declaration::Queue(Queue::new("ear", QueueKind::Exclusive)),
        Declaration::Binding(Binding { exchange, key, queue: "ear".to_owned() }),
    ];
    let transport = scene.transport().await;
    transport.declare(&listening).await.expect("a new queue");
    let mut heard = transport.consume("ear", Mode::NoAck).await.expect("it is there");
    let client = builder(&scene).connect(&scene.url).await.expect("it is there");
    broker.alarm(MEMORY);
    let unconfirmed = hold(&client, 1).start().await.expect("the broker has it, and says nothing");
    let mut state = client.state();
    soon(state.wait_for(|state| matches!(state, State::Blocked { .. }))).await.expect("it is told");
    drop(unconfirmed);
    drop(client);
    // The alarm ends well before the client would give up.
    broker.restore();
    assert_eq!(soon(heard.next()).await.expect("it is sent").body[4], CANCEL);
}

#[tokio::test(start_paused = true)]
async fn oneway_calls_that_leave_together_after_an_alarm_all_run_however_many_may_share_a_message() {
    const CALLS: usize = 3000;
    let (scene, broker) = Scene::alone();
    let (note, mut noted) = mpsc::unbounded_channel();
    let service = Service::new("n", 1).method(Method::new("n").oneway(), move |_: Context, (number,): (u16,)| {
        note.send(number).expect("the test listens");
        async { Ok::<_, ()>(()) }
    });
    let _server = scene.serve(service).await;
    let client = builder(&scene).coalesce(Coalesce::Fixed(CALLS)).connect(&scene.url).await.expect("it is there");
    block(&broker, &client).await;
    let sending = join_all((0..CALLS as u16).map(|number| client.oneway("n", "n", (number,)).send()));
    let (sent, ()) = soon(futures::future::join(sending, async {
        while client.in_flight() < CALLS {
            tokio::task::yield_now().await;
        }
        broker.restore();
    }))
    .await;
    assert!(sent.iter().all(Result::is_ok));
    for _ in 0..CALLS {
        soon(noted.recv()).await.expect("it runs");
    }
}

#[tokio::test(start_paused = true)]
async fn many_unconfirmed_oneway_calls_end_when_their_time_is_over() {
    const CALLS: usize = 20_000;
    let (scene, broker) = Scene::alone();
    let _server = scene.serve(Held::new().service).await;
    let client = builder(&scene).connect(&scene.url).await.expect("it is there");
    broker.alarm(MEMORY);
    let send = |number| client.oneway("held", "hold", (number,)).timeout(Duration::from_secs(1)).send();
    for ended in soon(join_all((0..CALLS).map(send))).await {
        assert!(matches!(ended, Err(Error::Timeout { .. } | Error::Blocked { .. })), "{ended:?}");
    }
    broker.restore();
}
