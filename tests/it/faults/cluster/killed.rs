//! Nodes that are killed as by `kill -9`.

use std::time::Duration;

use super::ledger::{Lost, Tie};
use super::load::Load;
use crate::cluster::Cluster;
use crate::node::version;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn each_node_in_turn_is_killed_and_comes_back() {
    const AWAY: Duration = Duration::from_secs(10);
    let cluster = Cluster::start(&version()).await;
    let load = Load::start(&cluster, None).await;
    for node in 0..3 {
        load.loses(Lost::Node(node));
        cluster.nodes[node].kill().await;
        load.goes_on(AWAY).await;
        cluster.nodes[node].start_again().await;
        load.is_back().await;
    }
    let row = load.ends("each node in turn killed with -9, away for 10 s").await;
    row.holds(Tie::Elsewhere);
    cluster.nodes[0].nothing_left().await;
}
