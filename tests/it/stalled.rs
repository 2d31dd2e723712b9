//! Calls while the broker, or one of its queues, takes and says nothing, though the connection stands: in memory, with virtual
//! time.

use std::future::IntoFuture as _;
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use hopline::testing::Broker;
use hopline::topology::{Declaration, Queue, QueueKind};
use hopline::transport::memory;
use hopline::{Client, ClientBuilder, Error, Server, State, Unanswered};
use tokio::time::Instant;

use crate::support::{Calculator, Held, MathClient, MathServer, Scene, hold, run, soon};

const LONG: Duration = Duration::from_secs(3600);

fn innards(broker: &Broker) -> Arc<memory::MemoryBroker> {
    memory::MemoryBroker::named(broker.url().trim_start_matches("memory://"))
}

async fn client(scene: &Scene) -> Client {
    Client::builder().namespace(&scene.namespace).timeout(LONG).connect(&scene.url).await.expect("the broker is there")
}

/// What the state says is wrong, once it does.
async fn degraded(mut state: tokio::sync::watch::Receiver<State>) -> String {
    let told = soon(state.wait_for(|state| matches!(state, State::Degraded { .. }))).await.expect("it is told");
    let State::Degraded { reason, .. } = told.clone() else { unreachable!("it was waited for") };
    reason.to_string()
}

async fn ready(mut state: tokio::sync::watch::Receiver<State>) {
    soon(state.wait_for(|state| *state == State::Ready)).await.expect("it is told");
}

#[tokio::test(start_paused = true)]
async fn a_stalled_broker_shows_in_the_state_and_calls_end_by_their_deadlines() {
    let (scene, broker) = Scene::alone();
    let Held { service, mut arrived } = Held::new();
    let _server = scene.serve(service).await;
    let client = client(&scene).await;
    let patient = hold(&client, 1).start().await.expect("on its way");
    assert_eq!(run(patient, &mut arrived).await, 1);
    broker.stall();
    let patient = hold(&client, 2).start().await.expect("on its way");
    let hasty = hold(&client, 3).timeout(Duration::from_secs(20)).start().await.expect("on its way");
    let reason = degraded(client.state()).await;
    assert!(reason.contains("confirmed nothing for more than 5s"), "{reason}");
    let late = hasty.await;
    assert!(matches!(late, Err(Error::Timeout { why: Unanswered::Unknown, .. })), "{late:?}");
    broker.restore();
    ready(client.state()).await;
    let mut release = Box::pin(async {
        while let Some(arrival) = arrived.recv().await {
            arrival.release();
        }
    });
    tokio::select! {
        answered = soon(patient) => assert_eq!(answered.expect("answered"), 2),
        () = &mut release => unreachable!("the server is there"),
    }
}

#[tokio::test(start_paused = true)]
async fn a_queue_that_confirms_nothing_holds_up_no_other_and_gets_no_more_than_it_can_take() {
    let (scene, broker) = Scene::alone();
    let Held { service, mut arrived } = Held::new();
    let _server = scene.serve(service).await;
    let _other = scene.serve(MathServer::new(Calculator)).await;
    let client = client(&scene).await;
    innards(&broker).stall_queue(&format!("{}.held.v1.calls", scene.namespace));
    let mut pending = Vec::new();
    for number in 0..50 {
        pending.push(hold(&client, number).timeout(Duration::from_secs(60)).start().await.expect("on its way"));
        let added = soon(MathClient::new(&client).add(1, 1).into_future()).await;
        assert_eq!(added.expect("nothing keeps it"), 2);
        // The time is virtual. The queue has enough of it to confirm something.
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let reason = degraded(client.state()).await;
    assert!(reason.contains("held.v1"), "{reason}");
    let mut whys = Vec::new();
    for outcome in join_all(pending).await {
        match outcome {
            Err(Error::Timeout { why, .. }) => whys.push(why),
            other => panic!("{other:?}"),
        }
    }
    // The first left, and may run; the last have never left.
    assert_eq!((whys.first(), whys.last()), (Some(&Unanswered::Unknown), Some(&Unanswered::Congested)));
    assert_eq!(whys.iter().filter(|why| **why == Unanswered::Unknown).count(), 30, "{whys:?}");
    let waiting = hold(&client, 99).start().await.expect("it waits");
    broker.restore();
    ready(client.state()).await;
    let release = async {
        while let Some(arrival) = arrived.recv().await {
            arrival.release();
        }
    };
    tokio::select! {
        answered = soon(waiting) => assert_eq!(answered.expect("answered"), 99),
        () = release => unreachable!("the server is there"),
    }
}

#[tokio::test(start_paused = true)]
async fn whoever_connects_to_a_stalled_broker_waits_for_its_time() {
    let (scene, broker) = Scene::alone();
    broker.stall();
    let began = Instant::now();
    let late = Client::builder().connect_timeout(Duration::from_secs(7)).connect(&broker).await;
    assert!(matches!(&late, Err(Error::Connect { reason, .. }) if reason.contains("no answer within 7s")), "{late:?}");
    assert_eq!(began.elapsed().as_secs(), 7);
    let connecting = Server::builder().namespace(&scene.namespace).connect(&broker);
    let restoring = async {
        // The time is virtual, as in all of these tests. The server would wait for longer.
        tokio::time::sleep(Duration::from_secs(5)).await;
        broker.restore();
    };
    let (server, ()) = tokio::join!(connecting, restoring);
    server.expect("it answers in time");
}

#[tokio::test(start_paused = true)]
async fn what_a_stalled_broker_was_asked_may_have_been_done_and_what_it_refuses_has_not() {
    let (scene, broker) = Scene::alone();
    let transport = scene.transport().await;
    let declare = async |kind| transport.declare(&[Declaration::Queue(Queue::new("one", kind))]).await;
    declare(QueueKind::Classic).await.expect("it is new");
    let refused = declare(QueueKind::Exclusive).await.expect_err("there is another one");
    assert!(matches!(refused, Error::Broker { .. }) && !refused.may_have_run(), "{refused:?}");
    broker.stall();
    let silent = declare(QueueKind::Classic).await.expect_err("it says nothing");
    assert!(silent.to_string().ends_with("it gave no answer within 30s"), "{silent}");
    assert!(matches!(silent, Error::Broker { .. }) && silent.may_have_run(), "{silent:?}");
}

#[tokio::test(start_paused = true)]
async fn a_server_waits_for_an_answer_about_a_queue_however_long_that_takes_and_says_so() {
    let (scene, broker) = Scene::alone();
    let Held { service, mut arrived } = Held::new();
    let server = scene.serve(service).await;
    let client = client(&scene).await;
    let queue = format!("{}.held.v1.calls", scene.namespace);
    innards(&broker).stall_queue(&queue);
    innards(&broker).delete_queue(&queue);
    let reason = degraded(server.state()).await;
    assert!(reason.contains("has not answered for 3s about the queue") && reason.contains(&queue), "{reason}");
    // The time is virtual: it is how long the answer takes.
    tokio::time::sleep(LONG).await;
    broker.restore();
    ready(server.state()).await;
    let call = hold(&client, 1).start().await.expect("on its way");
    assert_eq!(run(call, &mut arrived).await, 1);
}

#[tokio::test(start_paused = true)]
async fn a_server_that_starts_on_a_stalled_queue_starts_all_the_same() {
    let (scene, broker) = Scene::alone();
    innards(&broker).stall_queue(&format!("{}.held.v1.calls", scene.namespace));
    let Held { service, mut arrived } = Held::new();
    let server = scene.server().await.serve(service).serve(MathServer::new(Calculator)).start();
    let server = tokio::time::timeout(LONG, server).await.expect("it does not wait for ever").expect("it serves");
    let client = client(&scene).await;
    assert_eq!(soon(MathClient::new(&client).add(1, 2).into_future()).await.expect("the other one serves"), 3);
    degraded(server.state()).await;
    broker.restore();
    ready(server.state()).await;
    let call = hold(&client, 1).start().await.expect("on its way");
    assert_eq!(run(call, &mut arrived).await, 1);
}

#[tokio::test(start_paused = true)]
async fn replies_wait_for_the_end_of_an_alarm_and_are_dropped_when_nobody_waits_any_more() {
    let (scene, broker) = Scene::alone();
    let Held { service, mut arrived } = Held::new();
    let server = scene.serve(service).await;
    let client = client(&scene).await;
    let patient = hold(&client, 1).start().await.expect("on its way");
    let hasty = hold(&client, 2).timeout(Duration::from_secs(30)).start().await.expect("on its way");
    let running = [soon(arrived.recv()).await.expect("it runs"), soon(arrived.recv()).await.expect("it runs")];
    broker.alarm("low on disk");
    running.into_iter().for_each(|arrival| arrival.release());
    let mut state = server.state();
    let blocked = state.wait_for(|state| matches!(state, State::Blocked { .. }));
    soon(blocked).await.expect("it is told");
    let late = hasty.await;
    assert!(matches!(late, Err(Error::Timeout { .. })), "{late:?}");
    broker.restore();
    assert_eq!(soon(patient).await.expect("answered"), 1);
    ready(server.state()).await;
    assert!(arrived.try_recv().is_err(), "nothing has run twice");
}

#[tokio::test(start_paused = true)]
async fn who_gives_an_alarm_less_time_than_the_client_would_hears_of_it_all_the_same() {
    let (scene, broker) = Scene::alone();
    let Held { service, .. } = Held::new();
    let _server = scene.serve(service).await;
    let client = builder_of(&scene).connect(&broker).await.expect("the broker is there");
    broker.alarm("low on disk");
    let mut ends = vec![client.publish("order.created", &7).await.map(drop)];
    // The client knows of the alarm by now, and keeps what follows.
    ends.push(hold(&client, 1).await.map(drop));
    ends.push(client.oneway("held", "hold", (2,)).send().await);
    let other = builder_of(&scene).connect(&broker).await.expect("the broker is there");
    ends.push(hold(&other, 3).await.map(drop));
    for (end, left) in ends.into_iter().zip([true, false, false, true]) {
        match end {
            Err(error @ Error::Blocked { may_have_run, .. }) => {
                assert_eq!(may_have_run, left);
                let said = error.to_string();
                assert!(said.contains("blocked by an alarm (low on disk): `rabbitmq-diagnostics alarms`"), "{said}");
            }
            other => panic!("{other:?}"),
        }
    }
}

fn builder_of(scene: &Scene) -> ClientBuilder {
    Client::builder().namespace(&scene.namespace).timeout(Duration::from_secs(2)).blocked_wait(LONG)
}

#[tokio::test(start_paused = true)]
async fn under_an_alarm_calls_end_as_blocked_after_their_wait_and_say_whether_they_may_run() {
    let (scene, broker) = Scene::alone();
    let Held { service, mut arrived } = Held::new();
    let _server = scene.serve(service).await;
    let builder = Client::builder().namespace(&scene.namespace).timeout(LONG).blocked_wait(Duration::from_secs(8));
    let client = builder.connect(&broker).await.expect("the broker is there");
    broker.alarm("low on memory");
    // The first is how the client hears of the alarm: the broker has it, and has not taken it.
    let handed_over = hold(&client, 1).start().await.expect("on its way");
    let mut state = client.state();
    soon(state.wait_for(|state| matches!(state, State::Blocked { .. }))).await.expect("it is told");
    let waiting = hold(&client, 2).start().await.expect("it waits");
    let began = Instant::now();
    for (pending, expected) in [(handed_over, true), (waiting, false)] {
        match pending.await {
            Err(Error::Blocked { reason, after, may_have_run, .. }) => {
                assert_eq!((&*reason, may_have_run), ("low on memory", expected));
                assert_eq!(after, Duration::from_secs(8));
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(began.elapsed().as_secs(), 8);
    // What the broker had is cancelled where it runs.
    broker.restore();
    let cancelled = async {
        match arrived.recv().await {
            Some(arrival) => arrival.context.cancelled().await,
            None => unreachable!("the server is there"),
        }
    };
    let _ = tokio::time::timeout(Duration::from_secs(60), cancelled).await;
    assert!(arrived.try_recv().is_err(), "what waited has run");
}
