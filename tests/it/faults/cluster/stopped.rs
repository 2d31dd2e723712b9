//! Nodes that are stopped properly one after the other, as in an upgrade.

use super::ledger::{Lost, Tie};
use super::load::Load;
use crate::cluster::Cluster;
use crate::node::version;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn each_node_in_turn_is_drained_stopped_and_started() {
    let cluster = Cluster::start(&version()).await;
    let load = Load::start(&cluster, None).await;
    for (at, node) in cluster.nodes.iter().enumerate() {
        load.loses(Lost::Node(at));
        node.drain().await;
        node.stop().await;
        node.start_again().await;
        load.is_back().await;
    }
    let row = load.ends("each node in turn drained, stopped and started").await;
    row.holds(Tie::Elsewhere);
    cluster.nodes[0].nothing_left().await;
}
