//! Nodes of a cluster that are stopped for maintenance and come back.

use std::future::IntoFuture as _;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::future::join_all;
use hopline::{Client, Context, Error, Fault, Method, Service, State};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::LONG;
use crate::cluster::Cluster;
use crate::node::{version, when};
use crate::support::{Scene, soon};

/// How long each call may take.
const DEADLINE: Duration = Duration::from_secs(10);

fn echo(name: &str) -> Service {
    let answer = |_: Context, (n,): (u64,)| async move { Ok::<_, Fault>(n) };
    Service::new(name, 1).method(Method::new("echo").idempotent(), answer)
}

/// Makes one call after the other until it is dropped. Counts those that were answered, and keeps the errors of the
/// others.
struct Load {
    answered: watch::Receiver<u64>,
    failed: Arc<Mutex<Vec<Error>>>,
    calling: JoinHandle<()>,
}

impl Load {
    fn of(client: &Client, service: &'static str) -> Self {
        let ((count, answered), failed) = (watch::channel(0), Arc::<Mutex<Vec<Error>>>::default());
        let (client, failures) = (client.clone(), failed.clone());
        let calling = tokio::spawn(async move {
            let mut pace = tokio::time::interval(Duration::from_millis(10));
            loop {
                pace.tick().await;
                match client.call::<u64>(service, "echo", (1_u64,)).idempotent().timeout(DEADLINE).await {
                    Ok(_) => count.send_modify(|count| *count += 1),
                    Err(error) => failures.lock().expect("no panic").push(error),
                }
            }
        });
        Self { answered, failed, calling }
    }

    /// Waits until calls are answered again.
    async fn goes_on(&self) {
        let mut answered = self.answered.clone();
        let more = *answered.borrow() + 50;
        let more = tokio::time::timeout(LONG, answered.wait_for(|answered| *answered >= more)).await;
        drop(more.expect("calls are answered").expect("it runs"));
    }

    fn failures(&self) -> Vec<Error> {
        std::mem::take(&mut self.failed.lock().expect("no panic"))
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.calling.abort();
    }
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn a_node_that_is_drained_stopped_and_started_fails_calls_of_its_classic_queues_alone_and_only_while_it_is_away()
{
    let cluster = Cluster::start(&version()).await;
    let scene = Scene::at(cluster.url(0));
    let [there, second, third] = [0, 1, 2].map(|node| scene.by_way_of(cluster.url(node)));
    let mut servers = Vec::new();
    // The queues are on the first node.
    for scene in [&there, &second] {
        let server = scene.server().await.serve(echo("classic")).serve(echo("quorum").quorum());
        servers.push(server.start().await.expect("it serves"));
    }
    let clients = [there.client().await, third.client().await];
    let load = |service| clients.each_ref().map(|client| Load::of(client, service));
    let (quorum, classic) = (load("quorum"), load("classic"));
    let all_go_on = async || join_all(quorum.iter().chain(&classic).map(Load::goes_on)).await;
    let failures = |load: &[Load]| load.iter().flat_map(Load::failures).collect::<Vec<_>>();
    all_go_on().await;
    let first = &cluster.nodes[0];
    assert_eq!(first.eval("rabbit_maintenance:drain().").await.trim(), "ok");
    when(async || first.own_connections().await, |own| *own == 0).await;
    all_go_on().await;
    assert!(failures(&classic).is_empty(), "the queue is still there");
    first.kill().await;
    join_all(quorum.iter().map(Load::goes_on)).await;
    first.start_again().await;
    all_go_on().await;
    let failed = failures(&quorum);
    assert!(failed.is_empty(), "{failed:?}");
    for failure in failures(&classic) {
        assert!(matches!(failure, Error::Unreachable { .. } | Error::Timeout { .. }), "{failure:?}");
    }
    for server in &servers {
        let mut state = server.state();
        soon(state.wait_for(|state| *state == State::Ready)).await.expect("it serves");
    }
    all_go_on().await;
    assert!(failures(&classic).is_empty() && failures(&quorum).is_empty());
}

/// Longer than a server waits until it tries its first address again.
const A_LOOK: Duration = Duration::from_secs(500);

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn a_server_and_a_client_leave_a_node_in_maintenance_and_are_back_there_after_it_without_a_call_that_fails() {
    let cluster = Cluster::start(&version()).await;
    let [first, second, _] = &cluster.nodes;
    // With a heartbeat, advancing the clock would look like silence.
    let [scene, elsewhere] = [0, 1].map(|node| Scene::at(format!("{}&heartbeat=0", cluster.url(node))));
    let elsewhere = scene.by_way_of(elsewhere.url);
    let (runs, events) = (Arc::<AtomicU64>::default(), Arc::<Mutex<Vec<u64>>>::default());
    let (counted, noted) = (runs.clone(), events.clone());
    let count = move |_: Context, (n,): (u64,)| {
        counted.fetch_add(1, Ordering::SeqCst);
        async move { Ok::<_, Fault>(n) }
    };
    let server =
        scene.server().await.serve(Service::new("count", 1).method(Method::new("count").oneway(), count).quorum());
    let running = server.subscribe("tick", move |_: Context, number: u64| {
        let noted = noted.clone();
        async move { noted.lock().expect("no panic").push(number) }
    });
    let running = running.start().await.expect("all is new");
    let client = elsewhere.client().await;
    let leaving = scene.client().await;
    let call = async |client: &Client, number: u64, to: Option<&str>| {
        let call = client.call::<u64>("count", "count", (number,)).timeout(DEADLINE);
        let call = to.into_iter().fold(call, hopline::Call::to);
        assert_eq!(soon(call.into_future()).await.expect("answered"), number);
    };
    call(&leaving, 0, None).await;
    let connections = first.own_connections().await;
    assert_eq!(connections, 3, "two of the server and one of its client");

    assert_eq!(first.eval("rabbit_maintenance:drain().").await.trim(), "ok");
    when(async || first.own_connections().await, |own| *own == 0).await;
    let mut state = running.state();
    soon(state.wait_for(|state| *state == State::Ready)).await.expect("it serves elsewhere");
    call(&leaving, 1, None).await;
    assert_eq!(first.eval("rabbit_maintenance:revive().").await.trim(), "ok");

    // The servers look for their first address and move back while calls and events arrive.
    tokio::time::pause();
    tokio::time::advance(A_LOOK).await;
    tokio::time::resume();
    let (moved, mut number) = (AtomicBool::new(false), 1);
    let load = async {
        while !moved.load(Ordering::SeqCst) {
            number += 1;
            client.publish("tick", &number).await.expect("it is subscribed to");
            tokio::join!(call(&client, number, None), call(&leaving, number, None));
            call(&client, number, Some(running.instance())).await;
            let to_all = client.oneway("count", "count", (number,)).timeout(DEADLINE).all().send();
            soon(to_all).await.expect("there is one");
        }
        number
    };
    let moving = async {
        when(async || second.own_connections().await, |own| *own == 1).await;
        assert_eq!(first.own_connections().await, connections);
        moved.store(true, Ordering::SeqCst);
    };
    let (last, ()) = tokio::join!(load, moving);
    assert_eq!(*running.state().borrow(), State::Ready);
    call(&leaving, last + 1, Some(running.instance())).await;
    // Two events before, four in each round, and the last one.
    let all = 4 * (last - 1) + 3;
    let noted = || events.lock().expect("no panic").clone();
    soon(async {
        while noted().last() != Some(&last) || runs.load(Ordering::SeqCst) < all {
            tokio::task::yield_now().await
        }
    })
    .await;
    soon(running.drain()).await;
    assert_eq!(noted(), (2..=last).collect::<Vec<_>>());
    assert_eq!(runs.load(Ordering::SeqCst), all);
}
