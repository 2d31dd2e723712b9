//! A cluster whose nodes go one after the other, or one for good.

use hopline::{Context, Fault, Method, Service, State};

use super::LONG;
use super::node::{Cluster, version};
use crate::support::{Scene, soon};

#[tokio::test]
async fn a_cluster_that_loses_any_of_its_nodes_goes_on() {
    let Some(version) = version() else { return };
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
    let answered = async |number: u64| {
        let call = client.call::<u64>("work", "do", (number,)).idempotent().timeout(LONG);
        match soon(call.into_future()).await {
            Ok(answer) => assert_eq!(answer, number),
            Err(error) => panic!("{number}: {error}"),
        }
    };
    let ready = async || {
        for mut state in servers.iter().map(hopline::Running::state).chain([client.state()]) {
            soon(state.wait_for(|state| *state == State::Ready)).await.expect("it is told");
        }
    };
    for (round, node) in (1..).zip(&cluster.nodes) {
        answered(round * 10).await;
        node.kill().await;
        answered(round * 10 + 1).await;
        node.start_again().await;
        answered(round * 10 + 2).await;
        ready().await;
    }
    // The last one stays away.
    cluster.nodes[0].kill().await;
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
    cluster.nodes[1].nothing_left().await;
}
