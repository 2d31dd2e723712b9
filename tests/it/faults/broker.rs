//! A broker that ends, is suspended, closes all connections, loses queues, or accepts no more messages.

use std::future::IntoFuture as _;
use std::time::{Duration, Instant};

use futures::future::{join, join_all};
use hopline::{
    Coalesce, Code, Context, DeadLetters, Error, Fate, Fault, Method, Service, State, WhenFull, WhichLetters,
};
use tokio::sync::mpsc;

use super::node::shared;
use super::{LONG, NEXT, ends, is_answered, on_their_way, the_next_call_works, worker};
use crate::node::{Alarm, Node, Queue, when};
use crate::support::{Calculator, Held, MathClient, MathServer, Scene, hold, soon};

const CALLS: u64 = 500;
const LETTERS: u64 = 3;

/// Breaks all connections while calls are in flight. Each call has a true outcome, and client and server recover by
/// themselves.
async fn everybody_comes_back(node: &Node, fault: impl AsyncFnOnce(&Node)) {
    let scene = Scene::at(node.url());
    let (start, mut started) = mpsc::unbounded_channel();
    let service = Service::new("work", 1).method(Method::new("do"), move |_: Context, (number,): (u64,)| {
        start.send(number).expect("the test listens");
        async move {
            // The time is the work itself.
            tokio::time::sleep(Duration::from_millis(5)).await;
            Ok::<_, Fault>(number)
        }
    });
    let running = scene.serve(service.concurrency(10)).await;
    node.remembers().await;
    let client = scene.client().await;
    let mut pending = Vec::new();
    for number in 0..CALLS {
        let call = client.call::<u64>("work", "do", (number,)).timeout(LONG);
        pending.push(call.start().await.expect("on its way"));
    }
    soon(started.recv()).await.expect("it runs");
    let mut state = client.state();
    let reconnecting = async {
        state.wait_for(|state| matches!(state, State::Reconnecting { .. })).await.expect("it is told");
    };
    let fault = async {
        fault(node).await;
        Instant::now()
    };
    let (healed, ()) = soon(join(fault, reconnecting)).await;
    for (number, outcome) in (0..).zip(soon(join_all(pending)).await) {
        match outcome {
            Ok(answer) => assert_eq!(answer, number),
            Err(Error::Disconnected { may_have_run, .. }) => assert!(may_have_run, "otherwise it is sent again"),
            Err(error) => panic!("{number}: {error}"),
        }
    }
    let next = client.call::<u64>("work", "do", (CALLS,)).timeout(LONG);
    assert_eq!(soon(next.into_future()).await.expect("answered"), CALLS);
    println!("a new call was answered {:?} after the broker was back", healed.elapsed());
    for mut state in [client.state(), running.state()] {
        soon(state.wait_for(|state| *state == State::Ready)).await.expect("it is told");
    }
    drop(client);
    soon(running.drain()).await;
    node.nothing_left().await;
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn client_and_server_come_back_when_their_broker_was_killed() {
    let node = shared().await;
    everybody_comes_back(&node, async |node| {
        node.kill().await;
        node.start_again().await;
    })
    .await;
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn client_and_server_come_back_when_their_broker_was_stopped() {
    let node = shared().await;
    everybody_comes_back(&node, async |node| {
        node.ctl(&["stop_app"]).await;
        node.ctl(&["start_app"]).await;
    })
    .await;
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn client_and_server_come_back_when_their_broker_closed_all_connections() {
    let node = shared().await;
    everybody_comes_back(&node, async |node| {
        node.ctl(&["close_all_connections", "as the test asks"]).await;
    })
    .await;
}

/// Deletes a queue that belongs to a client or a server, which then has to declare it again.
async fn the_queue_comes_back(is_it: impl Fn(&Queue) -> bool, fault: impl AsyncFnOnce(&Node, &str)) {
    let node = shared().await;
    let scene = node.scene();
    let (running, mut arrivals) = worker(&scene, 10).await;
    let client = scene.client().await;
    let mut pending = on_their_way(&client, 0..1).await;
    let arrival = soon(arrivals.recv()).await.expect("it runs");
    for number in 1..20 {
        pending.push(hold(&client, number).timeout(Duration::from_secs(5)).start().await.expect("on its way"));
    }
    let is_it = |queue: &Queue| queue.name.starts_with(&scene.namespace) && is_it(queue);
    let queues = node.queues_when(|queues| queues.iter().any(|queue| is_it(queue) && queue.consumers == 1)).await;
    let queue = queues.into_iter().find(is_it).expect("it is there").name;
    fault(&node, &queue).await;
    arrival.release();
    // Calls that ran are answered or fail at once. The others time out at the latest.
    ends(pending).await;
    // In the meantime nobody serves, and callers are told so.
    node.queues_when(|queues| queues.iter().any(|queue| is_it(queue) && queue.consumers == 1)).await;
    the_next_call_works(&client, &mut arrivals).await;
    is_answered(hold(&client, NEXT).to(running.instance()), &mut arrivals).await;
    drop(client);
    soon(running.drain()).await;
    node.nothing_left().await;
}

fn is_reply_queue(queue: &Queue) -> bool {
    queue.name.contains(".reply@")
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn a_client_whose_reply_queue_is_deleted_has_a_new_one() {
    the_queue_comes_back(is_reply_queue, async |node, name| node.delete_queue(name).await).await;
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn a_client_whose_reply_queue_crashes_has_a_new_one() {
    the_queue_comes_back(is_reply_queue, async |node, name| node.crash_queue(name).await).await;
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn a_service_whose_queue_of_calls_is_deleted_has_a_new_one() {
    let is_it = |queue: &Queue| queue.name.ends_with(".held.v1.calls");
    the_queue_comes_back(is_it, async |node, name| node.delete_queue(name).await).await;
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn a_service_whose_consumers_of_calls_are_cancelled_consumes_again() {
    let is_it = |queue: &Queue| queue.name.ends_with(".held.v1.calls");
    the_queue_comes_back(is_it, async |node, name| node.crash_queue(name).await).await;
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn an_instance_whose_own_queue_is_deleted_has_a_new_one() {
    let is_it = |queue: &Queue| queue.name.contains(".held.v1@");
    the_queue_comes_back(is_it, async |node, name| node.delete_queue(name).await).await;
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn a_service_whose_queue_of_oneway_calls_is_deleted_has_a_new_one() {
    let is_it = |queue: &Queue| queue.name.ends_with(".held.v1.work");
    the_queue_comes_back(is_it, async |node, name| node.delete_queue(name).await).await;
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn a_queue_of_oneway_calls_that_is_deleted_takes_nothing_else_with_it() {
    let node = shared().await;
    let scene = node.scene();
    let (running, _arrivals) = worker(&scene, 10).await;
    let work = format!("{}.held.v1.work", scene.namespace);
    let is_read = |queue: &Queue| queue.name == work && queue.consumers == 1;
    let (before, mut state) = (node.connection_ids().await, running.state());
    assert_eq!(*state.borrow_and_update(), State::Ready);
    // The server is told while the broker is still at it.
    for _ in 0..6 {
        node.queues_when(|queues| queues.iter().any(is_read)).await;
        node.delete_queue(&work).await;
    }
    node.queues_when(|queues| queues.iter().any(is_read)).await;
    assert_eq!(node.connection_ids().await, before);
    assert!(!state.has_changed().expect("it serves"), "{:?}", state.borrow());
    soon(running.drain()).await;
    node.nothing_left().await;
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn a_queue_that_is_made_again_with_other_arguments_is_told_until_it_is_gone() {
    let node = shared().await;
    let scene = node.scene();
    let (running, mut arrivals) = worker(&scene, 10).await;
    let client = scene.client().await;
    let calls = format!("{}.held.v1.calls", scene.namespace);
    let mut state = running.state();
    let is_degraded = || matches!(*running.state().borrow(), State::Degraded { .. });
    let is_read = |queues: &[Queue]| queues.iter().any(|queue| queue.name == calls && queue.consumers > 0);
    while !is_degraded() {
        // The server declares the queue again as well, and may be the first.
        while !node.replace_queue(&calls).await {}
        // Or the server was first, and now consumes the queue that replaced its own.
        node.queues_when(|queues| is_degraded() || is_read(queues)).await;
    }
    let told = state.borrow().clone();
    assert!(matches!(&told, State::Degraded { reason, .. } if reason.contains(&calls)), "{told:?}");
    is_answered(hold(&client, NEXT).to(running.instance()), &mut arrivals).await;
    node.delete_queue(&calls).await;
    soon(state.wait_for(|state| *state == State::Ready)).await.expect("it is told");
    the_next_call_works(&client, &mut arrivals).await;
    drop(client);
    soon(running.drain()).await;
    node.nothing_left().await;
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn a_call_that_is_refused_when_it_is_sent_again_may_have_run_before() {
    let node = shared().await;
    let scene = node.scene();
    let Held { service, mut arrived } = Held::of(Method::new("hold").idempotent());
    let running = scene.serve(service.concurrency(1).prefetch(1).max_queue(1)).await;
    let client = scene.client().await;
    let queues = node.queues_when(|queues| queues.iter().any(is_reply_queue)).await;
    let reply_queue = queues.into_iter().find(is_reply_queue).expect("it is there").name;
    let first = hold(&client, 0).idempotent().timeout(LONG).start().await.expect("on its way");
    let runs = soon(arrived.recv()).await.expect("it runs");
    let other = scene.client().await;
    let waits = on_their_way(&other, 1..2).await;
    let calls = format!("{}.held.v1.calls", scene.namespace);
    node.queues_when(|queues| queues.iter().any(|queue| queue.name == calls && queue.messages == 2)).await;
    node.delete_queue(&reply_queue).await;
    match soon(first).await {
        Err(Error::Disconnected { may_have_run: true, reason, .. }) => {
            assert!(reason.contains("queue was full or out of reach"), "{reason}")
        }
        other => panic!("it runs: {other:?}"),
    }
    runs.release();
    soon(arrived.recv()).await.expect("it runs").release();
    for outcome in ends(waits).await {
        assert_eq!(outcome.expect("answered"), 1);
    }
    drop((client, other));
    soon(running.drain()).await;
    node.nothing_left().await;
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn calls_are_blocked_while_the_broker_is_short_of_memory_and_work_again_after() {
    let node = shared().await;
    let scene = node.scene();
    let (running, mut arrivals) = worker(&scene, 10).await;
    let builder = hopline::Client::builder().namespace(&scene.namespace).blocked_wait(Duration::from_secs(1));
    let client = builder.clone().connect(&scene.url).await.expect("the broker is there");
    the_next_call_works(&client, &mut arrivals).await;
    node.memory_alarm(Alarm::On).await;
    // The broker tells everybody who publishes about its alarm.
    let told = hold(&client, 1).timeout(LONG).start().await.expect("on its way");
    let mut state = client.state();
    soon(state.wait_for(|state| matches!(state, State::Blocked { .. }))).await.expect("it is told");
    match soon(hold(&client, 2).timeout(LONG).into_future()).await {
        Err(Error::Blocked { .. }) => {}
        other => panic!("{other:?}"),
    }
    // Calls that wait for a place wait for the broker as well.
    let limited = builder.max_in_flight(1, WhenFull::Wait).connect(&scene.url).await.expect("the broker is there");
    for outcome in ends(on_their_way(&limited, 2..12).await).await {
        assert!(matches!(outcome, Err(Error::Blocked { .. })), "{outcome:?}");
    }
    // The client closes without waiting for the broker. Its connection is gone once the broker reads again.
    soon(limited.close()).await;
    node.memory_alarm(Alarm::Off).await;
    soon(state.wait_for(|state| *state == State::Ready)).await.expect("it is told");
    the_next_call_works(&client, &mut arrivals).await;
    match soon(told).await {
        Ok(1) | Err(Error::Blocked { may_have_run: true, .. }) => {}
        other => panic!("{other:?}"),
    }
    drop(client);
    soon(running.drain()).await;
    node.nothing_left().await;
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn a_replay_is_blocked_while_the_broker_is_short_of_memory_and_keeps_every_letter() {
    let node = shared().await;
    let scene = node.scene();
    let service = Service::new("mail", 1).method(Method::new("send").oneway(), |_: Context, (_,): (u64,)| async {
        Err::<(), _>(Fault::new(Code::InvalidArgument, "no address"))
    });
    let running = scene.serve(service).await;
    let client = scene.client().await;
    for number in 0..LETTERS {
        client.oneway("mail", "send", (number,)).send().await.expect("the broker has it");
    }
    let [dead, other] = {
        let open = async || {
            DeadLetters::builder().namespace(&scene.namespace).connect(&scene.url, "mail").await.expect("it is there")
        };
        [open().await, open().await]
    };
    let number_is = async |number| while other.count().await.expect("it is there") != number {};
    soon(number_is(LETTERS)).await;
    // Without a server, the replayed calls stay in their queue.
    soon(running.drain()).await;
    node.memory_alarm(Alarm::On).await;
    let mut replayed = 0;
    // The broker accepts the first message, and then tells its connection that it accepts no more.
    let outcome = soon(dead.replay(&WhichLetters::All, |letter| replayed += u64::from(letter.fate == Fate::Replayed)));
    match outcome.await {
        Err(Error::Blocked { after, .. }) => assert_eq!(after, Duration::from_secs(5)),
        other => panic!("{other:?}"),
    }
    soon(number_is(LETTERS - replayed)).await;
    // Now the alarm is known before anything is sent.
    match soon(dead.replay(&WhichLetters::All, |_| panic!("none is sent"))).await {
        Err(Error::Blocked { may_have_run: false, .. }) => {}
        other => panic!("{other:?}"),
    }
    soon(number_is(LETTERS - replayed)).await;
    node.memory_alarm(Alarm::Off).await;
    let handled = soon(dead.replay(&WhichLetters::All, |_| {})).await.expect("it goes");
    assert!(handled.iter().all(|letter| letter.fate == Fate::Replayed), "{handled:?}");
    assert_eq!(handled.len() as u64, LETTERS - replayed);
    soon(number_is(0)).await;
    for dead in [dead, other] {
        dead.close().await;
    }
    drop(client);
    node.delete_queues().await;
    node.nothing_left().await;
}

/// Advances the clock by the 30 s that the broker has for each answer.
async fn the_broker_has_had_its_time() {
    tokio::time::pause();
    tokio::time::advance(Duration::from_secs(31)).await;
    tokio::time::resume();
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn a_replay_into_a_queue_that_does_not_answer_ends_and_keeps_the_letters() {
    let node = shared().await;
    let scene = node.scene();
    let service = Service::new("mail", 1).method(Method::new("send").oneway(), |_: Context, (): ()| async {
        Err::<(), _>(Fault::new(Code::InvalidArgument, "no address"))
    });
    let running = scene.serve(service).await;
    let client = scene.client().await;
    for _ in 0..2 {
        client.oneway("mail", "send", ()).send().await.expect("the broker has it");
    }
    let dead =
        DeadLetters::builder().namespace(&scene.namespace).connect(&scene.url, "mail").await.expect("it is there");
    let is_kept = async || while dead.count().await.expect("it is there") != 2 {};
    soon(is_kept()).await;
    soon(running.drain()).await;
    let work = format!("{}.mail.v1.work", scene.namespace);
    let dead_queue = format!("{}.mail.v1.dead", scene.namespace);
    node.answers(&work, false).await;
    let mut replaying = std::pin::pin!(dead.replay(&WhichLetters::All, |_| {}));
    // One letter has been taken out of the queue.
    let taken = |queues: &[Queue]| queues.iter().any(|queue| queue.name == dead_queue && queue.unacked == 1);
    tokio::select! {
        outcome = &mut replaying => panic!("{outcome:?}"),
        _ = node.queues_when(taken) => {}
    }
    the_broker_has_had_its_time().await;
    // Only the first is sent, and may have arrived.
    let fates: Vec<_> = soon(replaying).await.expect("it ends").into_iter().map(|handled| handled.fate).collect();
    let kept = |why: &str| Fate::Kept(why.to_owned());
    let unsent = kept("it was not sent, since the queue that it was for does not answer");
    assert_eq!(fates, [kept("the queue that it was for gave no answer within 8s: it may run as well"), unsent]);
    node.answers(&work, true).await;
    soon(is_kept()).await;
    dead.close().await;
    drop(client);
    node.delete_queues().await;
    node.nothing_left().await;
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn a_drain_that_gives_calls_back_to_a_queue_that_does_not_answer_ends() {
    let node = shared().await;
    let scene = node.scene();
    let (running, mut arrivals) = worker(&scene, 1).await;
    let builder = hopline::Client::builder().namespace(&scene.namespace).coalesce(Coalesce::Off);
    let client = builder.connect(&scene.url).await.expect("the broker is there");
    let mut pending = on_their_way(&client, 0..3).await;
    let first = soon(arrivals.recv()).await.expect("it runs");
    let calls = format!("{}.held.v1.calls", scene.namespace);
    let delivered = |queues: &[Queue]| queues.iter().any(|queue| queue.name == calls && queue.unacked == 3);
    node.queues_when(delivered).await;
    node.answers(&calls, false).await;
    let draining = tokio::spawn(running.drain());
    when(async || node.untold(&calls, "hold").await, |calls| *calls == 2).await;
    first.release();
    assert_eq!(soon(pending.remove(0)).await.expect("answered"), 0);
    the_broker_has_had_its_time().await;
    for outcome in ends(pending).await {
        let Err(Error::Fault(fault)) = outcome else { panic!("{outcome:?}") };
        assert_eq!(fault.code, Code::Aborted, "they are in the queue: {fault}");
    }
    soon(draining).await.expect("no panic");
    node.answers(&calls, true).await;
    drop(client);
    node.delete_queues().await;
    node.nothing_left().await;
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn a_drain_whose_quorum_queue_does_not_answer_keeps_back_no_reply_of_another_service() {
    let node = shared().await;
    let scene = node.scene();
    let Held { service, mut arrived } = Held::new();
    let quiet = Service::new("quiet", 1).method("do", |_: Context, (): ()| async { Ok::<_, Fault>(()) }).quorum();
    let running = soon(scene.server().await.serve(service).serve(quiet).start()).await.expect("all is new");
    let client = scene.client().await;
    let pending = hold(&client, 1).start().await.expect("on its way");
    let arrival = soon(arrived.recv()).await.expect("it runs");
    let calls = format!("{}.quiet.v1.calls", scene.namespace);
    node.answers(&calls, false).await;
    let draining = tokio::spawn(running.drain());
    // The drain fills the consumer of a quorum queue first. This question is the beginning of that.
    when(async || node.untold(&calls, "register_enqueuer").await, |questions| *questions == 1).await;
    arrival.release();
    assert_eq!(soon(pending).await.expect("answered"), 1);
    soon(draining).await.expect("no panic");
    node.answers(&calls, true).await;
    drop(client);
    node.delete_queues().await;
    node.nothing_left().await;
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn a_drain_does_not_wait_for_a_consumer_of_a_queue_that_does_not_answer() {
    // RabbitMQ takes a minute to tell that the queue cannot be consumed.
    const LESS: Duration = Duration::from_secs(30);
    let node = shared().await;
    let scene = node.scene();
    soon(scene.serve(Held::new().service).await.drain()).await;
    let work = format!("{}.held.v1.work", scene.namespace);
    node.answers(&work, false).await;
    let running = soon(scene.server().await.serve(Held::new().service).start()).await.expect("the rest is there");
    let attaches = |state: &State| match state {
        State::Degraded { reason, .. } => reason.contains("has not answered") && reason.contains(&work),
        _ => false,
    };
    soon(running.state().wait_for(attaches)).await.expect("it serves");
    tokio::time::timeout(LESS, running.drain()).await.expect("it ends");
    node.answers(&work, true).await;
    node.delete_queues().await;
    node.nothing_left().await;
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn a_server_starts_without_a_queue_that_does_not_answer_and_has_it_once_it_does() {
    let node = shared().await;
    let scene = node.scene();
    // After the server has drained, its queue stays for a minute.
    soon(scene.serve(Held::new().service).await.drain()).await;
    let calls = format!("{}.held.v1.calls", scene.namespace);
    node.answers(&calls, false).await;
    let Held { service, mut arrived } = Held::new();
    let server = scene.server().await.serve(service).serve(MathServer::new(Calculator));
    let running = soon(server.start()).await.expect("the rest is there");
    match &*running.state().borrow() {
        State::Degraded { reason, .. } => assert!(reason.contains(&calls), "{reason}"),
        other => panic!("{other:?}"),
    }
    let client = scene.client().await;
    assert_eq!(soon(MathClient::new(&client).add(1, 2).into_future()).await.expect("answered"), 3);
    node.answers(&calls, true).await;
    soon(running.state().wait_for(|state| *state == State::Ready)).await.expect("it serves");
    let pending = hold(&client, 1).timeout(LONG).start().await.expect("on its way");
    soon(arrived.recv()).await.expect("it runs").release();
    assert_eq!(soon(pending).await.expect("answered"), 1);
    soon(running.drain()).await;
    drop(client);
    node.delete_queues().await;
    node.nothing_left().await;
}
