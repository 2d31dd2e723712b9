//! A cluster whose nodes go one after the other, or one for good.

use std::future::IntoFuture as _;
use std::time::Duration;

use hopline::{Context, Error, Fault, Method, Service, State};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::LONG;
use crate::node::{Cluster, version};
use crate::support::{Calculator, Held, MathClient, MathServer, Scene, soon};

/// Of the calls, any of which may meet a node's loss.
const DEADLINE: Duration = Duration::from_secs(10);
/// How often one is made anew.
const TRIES: usize = 20;

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn a_cluster_that_loses_any_of_its_nodes_goes_on() {
    let version = version();
    // RabbitMQ 3.10 refuses calls over channels that knew the lost leader of their queue, until its node is back.
    let goes_on = version != "3.10";
    let cluster = Cluster::start(&version).await;
    let scene = Scene::at(cluster.url(0));
    let (run, mut runs) = mpsc::unbounded_channel();
    let service = || {
        let run = run.clone();
        let work = move |_: Context, (n,): (u64,)| {
            run.send(n).expect("the test listens");
            async move { Ok::<_, Fault>(n) }
        };
        Service::new("work", 1).method(Method::new("do").idempotent().oneway(), work).quorum()
    };
    // One at each node.
    let mut servers = Vec::new();
    for at in 0..3 {
        servers.push(scene.by_way_of(cluster.url(at)).serve(service()).await);
    }
    let client = scene.client().await;
    // What a dead node's consumer held is kept for it for a minute by RabbitMQ 4.3, and 3.10 refuses what comes while there
    // is no leader: a call may end by that, at its deadline at the latest, and a next one is answered.
    let answered = async |number: u64| {
        for _ in 0..TRIES {
            let call = client.call::<u64>("work", "do", (number,)).idempotent().timeout(DEADLINE);
            match soon(call.into_future()).await {
                Ok(answer) => return assert_eq!(answer, number),
                Err(Error::Timeout { .. } | Error::Overloaded { .. }) => tokio::task::yield_now().await,
                Err(error) => panic!("{number}: {error}"),
            }
        }
        panic!("{number} is not answered in {TRIES} tries");
    };
    let ready = async || {
        for mut state in servers.iter().map(hopline::Running::state).chain([client.state()]) {
            let up = tokio::time::timeout(LONG, state.wait_for(|state| *state == State::Ready)).await.map(drop);
            assert!(up.is_ok(), "it stays {:?}", *state.borrow());
        }
    };
    for (round, node) in (1..).zip(&cluster.nodes) {
        answered(round * 10).await;
        node.kill().await;
        if goes_on {
            answered(round * 10 + 1).await;
        } else {
            // However it ends, it does.
            let call = client.call::<u64>("work", "do", (round,)).idempotent().timeout(DEADLINE);
            let _ = soon(call.into_future()).await;
        }
        node.start_again().await;
        answered(round * 10 + 2).await;
        ready().await;
    }
    if goes_on {
        // The last one stays away.
        cluster.nodes[0].kill().await;
    }
    for number in 100..120 {
        answered(number).await;
    }
    ready().await;
    let sent = client.oneway("work", "do", (7_u64,)).timeout(LONG).send();
    soon(sent).await.expect("a majority has it safe");
    // A consumer that went with a node may have had it, and is waited for by the broker.
    let is_run = async { while runs.recv().await.expect("it runs") != 7 {} };
    tokio::time::timeout(LONG, is_run).await.expect("it runs in the end");
    drop(client);
    for server in servers {
        soon(server.drain()).await;
    }
    // RabbitMQ lists nothing while a channel waits for a queue of the lost node: it comes back to be looked at.
    if goes_on {
        cluster.nodes[0].start_again().await;
    }
    cluster.nodes[1].nothing_left().await;
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn a_server_starts_though_the_node_with_one_of_its_queues_is_away() {
    let cluster = Cluster::start(&version()).await;
    let scene = Scene::at(cluster.url(0));
    // Its classic queues are on the first node, and stay there for a minute.
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
    // That a queue is out of reach is not taken for a full one, however often.
    for _ in 0..3 {
        match soon(client.call::<u64>("held", "hold", (1_u64,)).timeout(DEADLINE).into_future()).await {
            Err(Error::Unreachable { method, queue }) => assert_eq!((&*method, queue), ("held.v1.hold", calls.clone())),
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
    // RabbitMQ 4.3 says nothing for 76 s of a classic queue whose node is away.
    const AWAY: Duration = Duration::from_secs(100);
    let cluster = Cluster::start(&version()).await;
    let scene = Scene::at(cluster.url(0));
    let [first, second, third] = [0, 1, 2].map(|node| scene.by_way_of(cluster.url(node)));
    let echo = || Service::new("far", 1).method("echo", |_: Context, (n,): (u64,)| async move { Ok::<_, Fault>(n) });
    // The calls of `far` lie on the first node, those of `math` on the second, where the server is that stays.
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
