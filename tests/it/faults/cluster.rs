//! A cluster whose nodes go one after the other, or one for good.

use std::future::IntoFuture as _;
use std::time::Duration;

use hopline::{Context, Error, Fault, Method, Service, State};
use tokio::sync::mpsc;

use super::LONG;
use super::node::Cluster;
use crate::node::version;
use crate::support::{Scene, soon};

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
    // The queue of dead letters is a classic one, on one of the nodes.
    let is_up = |state: &State, all_nodes: bool| match state {
        State::Ready => true,
        State::Degraded { reason, .. } => !all_nodes && reason.contains("the dead letters of `work.v1` have no queue"),
        _ => false,
    };
    let ready = async |all_nodes: bool| {
        for mut state in servers.iter().map(hopline::Running::state).chain([client.state()]) {
            let up = tokio::time::timeout(LONG, state.wait_for(|state| is_up(state, all_nodes))).await.map(drop);
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
        ready(true).await;
    }
    if goes_on {
        // The last one stays away.
        cluster.nodes[0].kill().await;
    }
    for number in 100..120 {
        answered(number).await;
    }
    ready(!goes_on).await;
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
