//! A cluster whose nodes go one after the other, or one for good.

use std::time::{Duration, Instant};

use hopline::{Context, Error, Fault, Method, Service, State};

use super::LONG;
use super::node::Cluster;
use crate::node::version;
use crate::support::{Scene, soon};

/// Of the calls, any of which may meet a node's loss.
const DEADLINE: Duration = Duration::from_secs(10);

#[tokio::test]
async fn a_cluster_that_loses_any_of_its_nodes_goes_on() {
    let Some(version) = version() else { return };
    // RabbitMQ 3.10 refuses calls over channels that knew the lost leader of their queue, until its node is back.
    let goes_on = version != "3.10";
    let cluster = Cluster::start(&version).await;
    let scene = Scene::at(cluster.url(0));
    let service = || {
        let service = Service::new("work", 1)
            .method(Method::new("do").idempotent(), |_: Context, (n,): (u64,)| async move { Ok::<_, Fault>(n) });
        service.quorum()
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
        soon(async {
            loop {
                let begun = Instant::now();
                match client.call::<u64>("work", "do", (number,)).idempotent().timeout(DEADLINE).await {
                    Ok(answer) => break assert_eq!(answer, number),
                    Err(Error::Timeout { .. } | Error::Overloaded { .. }) => {
                        assert!(begun.elapsed() < 2 * DEADLINE, "{number} hangs");
                    }
                    Err(error) => panic!("{number}: {error}"),
                }
            }
        })
        .await;
    };
    let ready = async || {
        for mut state in servers.iter().map(hopline::Running::state).chain([client.state()]) {
            soon(state.wait_for(|state| *state == State::Ready)).await.expect("it is told");
        }
    };
    for (round, node) in (1..).zip(&cluster.nodes) {
        answered(round * 10).await;
        node.kill().await;
        if goes_on {
            answered(round * 10 + 1).await;
        } else {
            // However it ends, it does.
            let ended = client.call::<u64>("work", "do", (round,)).idempotent().timeout(DEADLINE).into_future();
            assert!(tokio::time::timeout(2 * DEADLINE, ended).await.is_ok(), "a call hangs");
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
