//! Clients that are lost in the middle of a call. Nothing of them is left behind, and the servers that they called go
//! on.

use std::process::Stdio;
use std::time::Duration;

use hopline::{Client, Context, Error, Fault, Server, Service, State};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::sync::{mpsc, oneshot};

use super::node::{Shared, shared};
use super::{LONG, ends, on_their_way, the_next_call_works, worker};
use crate::cluster::Cluster;
use crate::node::{Queue, version, when};
use crate::programs::{DEMO, example, signal};
use crate::proxy::{Direction, Flow, Proxy};
use crate::support::{Calculator, Held, MathClient, MathServer, Scene, after_polls, later, soon};

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn a_client_lost_with_a_thousand_calls_leaves_nothing_and_its_server_goes_on() {
    let node = shared().await;
    let scene = node.scene();
    let (running, mut arrivals) = worker(&scene, 10).await;
    let proxy = Proxy::to(node.address()).await;
    let lost = scene.by_way_of(proxy.url()).client().await;
    let pending = on_their_way(&lost, 0..1000).await;
    let calls = format!("{}.held.v1.calls", scene.namespace);
    let of_calls = |queues: &[Queue]| queues.iter().find(|queue| queue.name == calls).map(|queue| queue.messages);
    node.queues_when(|queues| of_calls(queues) == Some(1000)).await;
    proxy.refuse();
    proxy.reset().await;
    for outcome in ends(pending).await {
        let Err(Error::Disconnected { may_have_run, .. }) = outcome else { panic!("{outcome:?}") };
        assert!(may_have_run, "the broker had it");
    }
    // Each call is settled after it has run, although nobody can be answered.
    let client = scene.client().await;
    the_next_call_works(&client, &mut arrivals).await;
    node.queues_when(|queues| of_calls(queues) == Some(0)).await;
    drop((lost, client));
    soon(running.drain()).await;
    node.nothing_left().await;
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn a_client_cut_off_for_longer_than_its_heartbeat_ends_its_calls() {
    let node = shared().await;
    let scene = node.scene();
    let (running, mut arrivals) = worker(&scene, 10).await;
    let proxy = Proxy::to(node.address()).await;
    let cut_off = scene.by_way_of(format!("{}?heartbeat=2", proxy.url())).client().await;
    let mut pending = on_their_way(&cut_off, 0..10).await;
    let mut held = Vec::new();
    for _ in 0..10 {
        held.push(soon(arrivals.recv()).await.expect("it runs"));
    }
    pending.extend(on_their_way(&cut_off, 10..20).await);
    proxy.stall();
    // They are answered while nobody can receive the answers.
    for arrival in held {
        arrival.release();
    }
    for outcome in ends(pending).await {
        // An answer may have been faster than the cut.
        let is_true = matches!(outcome, Err(Error::Disconnected { may_have_run: true, .. } | Error::Fault(_)));
        assert!(is_true, "{outcome:?}");
    }
    proxy.resume();
    let client = scene.client().await;
    the_next_call_works(&client, &mut arrivals).await;
    drop((cut_off, client));
    soon(running.drain()).await;
    node.nothing_left().await;
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn a_connection_that_nobody_waits_for_any_more_is_closed() {
    let node = shared().await;
    let proxy = Proxy::to(node.address()).await;
    proxy.stall();
    let builder = Client::builder().connect_timeout(Duration::from_secs(5));
    let url = proxy.url();
    let mut connecting = Box::pin(builder.connect(&url));
    tokio::select! {
        outcome = &mut connecting => panic!("nothing passes: {outcome:?}"),
        _ = when(async || proxy.open(), |open| *open == 1) => {}
    }
    let error = later(Duration::from_secs(5), connecting).await.expect_err("nothing passes");
    assert!(error.to_string().contains("no answer within 5s"), "{error}");
    proxy.resume();
    when(async || proxy.open(), |open| *open == 0).await;
    node.nothing_left().await;
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn whoever_is_given_up_while_it_connects_leaves_nothing() {
    let node = shared().await;
    let scene = node.scene();
    for times in 0.. {
        let server = scene.serve(MathServer::new(Calculator));
        let Some(running) = after_polls(times, server).await else { continue };
        soon(running.drain()).await;
        assert!(times > 10, "connecting and declaring take several steps: {times}");
        break;
    }
    for times in 0.. {
        let Some(client) = after_polls(times, scene.client()).await else { continue };
        drop(client);
        assert!(times > 5, "connecting and declaring take several steps: {times}");
        break;
    }
    node.nothing_left().await;
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn a_client_that_is_not_told_of_its_connections_end_learns_it_by_the_heartbeat() {
    let node = shared().await;
    let scene = node.scene();
    let (running, mut arrivals) = worker(&scene, 1).await;
    let proxy = Proxy::to(node.address()).await;
    let deaf = scene.by_way_of(format!("{}?heartbeat=2", proxy.url())).client().await;
    let pending = on_their_way(&deaf, 0..1).await;
    let arrival = soon(arrivals.recv()).await.expect("it runs");
    proxy.refuse();
    proxy.half_open();
    for outcome in ends(pending).await {
        assert!(matches!(outcome, Err(Error::Disconnected { may_have_run: true, .. })), "{outcome:?}");
    }
    arrival.release();
    let client = scene.client().await;
    the_next_call_works(&client, &mut arrivals).await;
    drop((deaf, client));
    soon(running.drain()).await;
    node.nothing_left().await;
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn a_client_that_takes_no_replies_holds_up_nobody() {
    let node = shared().await;
    let scene = node.scene();
    let running = scene.serve(MathServer::new(Calculator)).await;
    let proxy = Proxy::to(node.address()).await;
    let stuck = scene.by_way_of(proxy.url()).client().await;
    let quick = scene.client().await;
    let bytes = serde_bytes::ByteBuf::from(vec![7; 256 * 1024]);
    let echo = MathClient::new(&stuck).echo(bytes.clone());
    assert_eq!(echo.await.expect("answered"), bytes);
    proxy.set(Direction::ToClient, Flow::Stall);
    let mut pending = Vec::new();
    for _ in 0..200 {
        let call = MathClient::new(&stuck).echo(bytes.clone()).timeout(LONG);
        pending.push(call.start().await.expect("on its way"));
    }
    let math = MathClient::new(&quick);
    for number in 0..200 {
        assert_eq!(soon(math.add(number, 1).into_future()).await.expect("answered"), number + 1);
    }
    proxy.resume();
    for outcome in soon(futures::future::join_all(pending)).await {
        assert_eq!(outcome.expect("late is not lost"), bytes);
    }
    drop((stuck, quick, math));
    soon(running.drain()).await;
    node.nothing_left().await;
}

/// Checks that a client that was suspended for longer than its heartbeats reads the reply that has arrived in the
/// meantime.
async fn reads_what_has_arrived_while_it_was_suspended(node: &Shared, proxy: Option<&Proxy>) {
    // The reply is larger than anything else that the client receives in the meantime.
    const ANSWER: usize = 20_000;
    // Building the program may take long, and the server could not run in that time.
    let mut client = example("client");
    let (announce, mut arrived) = mpsc::unbounded_channel();
    let whoami = move |_: Context, (): ()| {
        let (answer, told) = oneshot::channel::<String>();
        announce.send(answer).expect("the test listens");
        async move { Ok::<_, Fault>(told.await.expect("the test answers")) }
    };
    let server = Server::connect(node.url()).await.expect("the broker is there");
    let running = server.serve(Service::new("demo", 1).method("whoami", whoami)).start().await.expect("served");
    let url = proxy.map_or_else(|| node.url().to_owned(), Proxy::url);
    let mut client = client.arg(format!("{url}?heartbeat=1")).stdout(Stdio::piped()).spawn().expect("it can be run");
    let id = client.id().expect("it runs");
    let mut printed = BufReader::new(client.stdout.take().expect("it is piped")).lines();

    let call = soon(arrived.recv()).await.expect("it calls");
    signal(id, "STOP").await;
    call.send("x".repeat(ANSWER)).expect("it is waited for");
    // What comes next is a heartbeat, and the whole reply is there. Or the broker has ended the connection already, and the
    // table of sockets does not have it any more.
    let mut before = when(async || unread(id), |bytes| *bytes > ANSWER).await;
    loop {
        let now = when(async || unread(id), |bytes| *bytes != before).await;
        if now < before + 64 {
            break;
        }
        before = now;
    }
    if let Some(proxy) = proxy {
        // The proxy stalls, so the client does not learn that the broker ends the connection.
        proxy.set(Direction::ToClient, Flow::Stall);
    }
    // The broker's heartbeats are the client's.
    let is_there = |names: &Vec<String>| names.iter().any(|name| name.starts_with("client client "));
    when(async || node.connection_names().await, |names| !is_there(names)).await;
    signal(id, "CONT").await;
    tokio::select! {
        line = soon(printed.next_line()) => {
            let line = line.expect("it prints text").expect("it prints what it is told");
            assert_eq!(line.len(), "answered by ".len() + ANSWER);
        }
        // The method is idempotent: if the answer was lost, the call would be sent again.
        _ = arrived.recv() => panic!("it has not read the answer"),
    }
    client.kill().await.expect("it can be killed");
    soon(running.drain()).await;
}

/// How many bytes have arrived at a process that it has not read.
fn unread(process: u32) -> usize {
    let sockets = std::fs::read_dir(format!("/proc/{process}/fd")).expect("it runs on Linux");
    let sockets = sockets.filter_map(|file| std::fs::read_link(file.ok()?.path()).ok());
    let sockets: Vec<_> = sockets.map(|link| link.to_string_lossy().into_owned()).collect();
    let table = std::fs::read_to_string(format!("/proc/{process}/net/tcp")).expect("it runs on Linux");
    let of_a_line = |line: &str| {
        let columns: Vec<_> = line.split_whitespace().collect();
        let (_, unread) = columns.get(4)?.split_once(':')?;
        let socket = format!("socket:[{}]", columns.get(9)?);
        sockets.contains(&socket).then(|| usize::from_str_radix(unread, 16).expect("a number"))
    };
    table.lines().filter_map(of_a_line).sum()
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn a_client_suspended_until_its_broker_has_closed_the_connection_reads_the_reply_before_the_end() {
    let node = shared().await;
    let _demo = DEMO.lock().await;
    reads_what_has_arrived_while_it_was_suspended(&node, None).await;
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn a_client_says_in_its_state_that_nothing_is_confirmed_and_that_it_is_again() {
    let node = shared().await;
    let scene = node.scene();
    let (running, mut arrivals) = worker(&scene, 10).await;
    let proxy = Proxy::to(node.address()).await;
    let client = scene.by_way_of(proxy.url()).client().await;
    the_next_call_works(&client, &mut arrivals).await;
    proxy.set(Direction::ToBroker, Flow::Stall);
    let waiting = on_their_way(&client, 0..1).await;
    let State::Degraded { reason, .. } = state_is(&client, |state| *state != State::Ready).await else {
        panic!("the connection stands");
    };
    assert!(reason.starts_with("the broker has confirmed nothing for more than 5s"), "{reason}");
    proxy.resume();
    state_is(&client, |state| *state == State::Ready).await;
    soon(arrivals.recv()).await.expect("it runs").release();
    ends(waiting).await.pop().expect("there is one").expect("answered");
    drop(client);
    soon(running.drain()).await;
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn a_client_on_the_smaller_side_of_a_cluster_says_so_in_its_state() {
    let cluster = Cluster::start(&version()).await;
    let scene = Scene::at(cluster.url(2));
    let running = scene.serve(Held::new().service.quorum()).await;
    let client = scene.client().await;
    // One of three nodes is no majority.
    for node in &cluster.nodes[..2] {
        node.kill().await;
    }
    let waiting = on_their_way(&client, 0..1).await;
    let State::Degraded { reason, .. } = state_is(&client, |state| *state != State::Ready).await else {
        panic!("the connection stands");
    };
    assert!(reason.starts_with("the broker has"), "{reason}");
    for node in &cluster.nodes[..2] {
        node.start_again().await;
    }
    state_is(&client, |state| *state == State::Ready).await;
    drop((waiting, client));
    soon(running.drain()).await;
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn a_client_suspended_for_longer_than_its_heartbeats_reads_the_reply_before_it_judges_them() {
    let node = shared().await;
    let _demo = DEMO.lock().await;
    let proxy = Proxy::to(node.address()).await;
    reads_what_has_arrived_while_it_was_suspended(&node, Some(&proxy)).await;
}

/// Waits until the client has this state.
async fn state_is(client: &Client, is: impl Fn(&State) -> bool) -> State {
    let mut state = client.state();
    let told = tokio::time::timeout(LONG, state.wait_for(is)).await;
    told.expect("in time").expect("the client is there").clone()
}
