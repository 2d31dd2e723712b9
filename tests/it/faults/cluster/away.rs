//! A node that is down: what was on it, and what was not.

use std::future::IntoFuture as _;
use std::time::Duration;

use hopline::{Context, Error, Fault, Service, State};
use tokio::time::Instant;

use super::super::LONG;
use crate::cluster::Cluster;
use crate::node::version;
use crate::support::{Calculator, Held, MathClient, MathServer, Scene, soon};

/// How long each call may take. Any of them may meet the loss of the node.
const DEADLINE: Duration = Duration::from_secs(10);

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn a_server_starts_though_the_node_with_one_of_its_queues_is_away() {
    let cluster = Cluster::start(&version()).await;
    let scene = Scene::at(cluster.url(0));
    // The service's classic queues are on the first node, and stay there for a minute after the server has gone.
    let held = |grace| Held::new().service.grace(grace);
    soon(scene.serve(held(LONG)).await.drain()).await;
    let calls = format!("{}.held.v1.calls", scene.namespace);
    cluster.nodes[0].queues_when(|queues| queues.iter().any(|queue| queue.name == calls && queue.consumers == 0)).await;
    cluster.nodes[0].kill().await;
    let elsewhere = scene.by_way_of(cluster.url(1));
    let server = elsewhere.server().await.serve(held(LONG)).serve(MathServer::new(Calculator).quorum());
    let running = tokio::time::timeout(LONG, server.start()).await.expect("in time").expect("the rest is there");
    match &*running.state().borrow() {
        State::Degraded { reason, .. } => assert!(reason.contains(&calls), "{reason}"),
        other => panic!("{other:?}"),
    }
    let client = elsewhere.client().await;
    assert_eq!(soon(MathClient::new(&client).add(1, 2).into_future()).await.expect("answered"), 3);
    // An unreachable queue is not taken for a full one, however often a call is made.
    for _ in 0..3 {
        match soon(client.call::<u64>("held", "hold", (1_u64,)).timeout(DEADLINE).into_future()).await {
            Err(Error::Unreachable { method, queue, .. }) => {
                assert_eq!((&*method, queue), ("held.v1.hold", calls.clone()))
            }
            other => panic!("{other:?}"),
        }
    }
    cluster.nodes[0].start_again().await;
    let mut state = running.state();
    tokio::time::timeout(LONG, state.wait_for(|state| *state == State::Ready))
        .await
        .expect("in time")
        .expect("it serves");
    soon(running.drain()).await;
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn a_node_that_is_away_takes_down_only_what_lies_on_it() {
    // RabbitMQ 4.3 does not answer for 76 s about a classic queue whose node is down.
    const AWAY: Duration = Duration::from_secs(100);
    let cluster = Cluster::start(&version()).await;
    let scene = Scene::at(cluster.url(0));
    let [first, second, third] = [0, 1, 2].map(|node| scene.by_way_of(cluster.url(node)));
    let echo = || Service::new("far", 1).method("echo", |_: Context, (n,): (u64,)| async move { Ok::<_, Fault>(n) });
    // The queue of `far` is on the first node, that of `math` on the second, where the remaining server is.
    let _on_first = first.serve(echo()).await;
    let on_second = second.server().await.serve(echo()).serve(MathServer::new(Calculator)).start().await;
    let on_second = on_second.expect("both are served");
    let client = third.client().await;
    let math = MathClient::new(&client);
    let far = || client.call::<u64>("far", "echo", (1_u64,)).timeout(DEADLINE).into_future();
    assert_eq!(soon(math.add(1, 2).into_future()).await.expect("answered"), 3);
    assert_eq!(soon(far()).await.expect("answered"), 1);
    let (mut state, mut own) = (on_second.state(), client.state());
    let lost = tokio::spawn(async move {
        let reconnects = |state: &State| matches!(state, State::Reconnecting { .. });
        tokio::select! {
            _ = state.wait_for(reconnects) => "the server",
            _ = own.wait_for(reconnects) => "the client",
        }
    });
    cluster.nodes[0].kill().await;
    let (until, mut longest, mut calls) = (Instant::now() + AWAY, Duration::ZERO, 0);
    let mut pace = tokio::time::interval(Duration::from_millis(10));
    while Instant::now() < until {
        pace.tick().await;
        let since = Instant::now();
        let answer = math.add(1, 2).idempotent().timeout(DEADLINE).into_future().await;
        assert_eq!(answer.expect("it has nothing on that node"), 3, "call {calls}");
        longest = longest.max(since.elapsed());
        calls += 1;
    }
    println!("{calls} calls while the node was away, the longest took {longest:?}");
    assert!(matches!(far().await, Err(Error::Unreachable { .. } | Error::Timeout { .. })), "its queue is away");
    cluster.nodes[0].start_again().await;
    let mut state = on_second.state();
    let ready = tokio::time::timeout(LONG, state.wait_for(|state| *state == State::Ready)).await;
    ready.expect("in time").expect("it serves");
    assert_eq!(soon(far()).await.expect("answered"), 1);
    if lost.is_finished() {
        panic!("{} has lost its connection", lost.await.expect("no panic"));
    }
    lost.abort();
}
