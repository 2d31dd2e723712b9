//! A node that does not come back, or comes back without its data. The cluster is told to forget it.

use std::time::Duration;

use super::ledger::{Lost, Tie};
use super::load::Load;
use crate::cluster::Cluster;
use crate::node::version;

const LOST: usize = 2;
const AWAY: Duration = Duration::from_secs(20);

/// Loses a node under a load, and makes the others forget it.
async fn under_load_forgets_a_node(cluster: &Cluster) -> Load {
    let load = Load::start(cluster, None).await;
    load.loses(Lost::Node(LOST));
    cluster.nodes[LOST].kill().await;
    load.goes_on(AWAY).await;
    cluster.nodes[0].forget(&cluster.nodes[LOST]).await;
    load
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn a_node_is_lost_and_forgotten() {
    let cluster = Cluster::start(&version()).await;
    let load = under_load_forgets_a_node(&cluster).await;
    // The queues of that node are declared again on the others, although the servers stay connected.
    load.is_back().await;
    let row = load.ends("a node killed, and after 20 s forgotten").await;
    row.holds(Tie::Elsewhere);
    cluster.nodes[0].nothing_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn a_node_is_lost_and_forgotten_and_comes_back_empty() {
    let cluster = Cluster::start(&version()).await;
    let load = under_load_forgets_a_node(&cluster).await;
    cluster.nodes[LOST].start_empty().await;
    cluster.is_whole().await;
    load.is_back().await;
    let row = load.ends("a node killed, after 20 s forgotten, and started empty").await;
    row.holds(Tie::Elsewhere);
    cluster.nodes[LOST].nothing_left().await;
}
