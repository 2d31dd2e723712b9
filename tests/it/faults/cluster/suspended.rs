//! A node whose process is suspended, as on a machine that does not run it.

use std::time::Duration;

use super::ledger::{Lost, Place, Tie};
use super::load::Load;
use crate::cluster::Cluster;
use crate::node::version;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn a_node_is_suspended_and_goes_on() {
    const SUSPENDED: Duration = Duration::from_secs(30);
    let cluster = Cluster::start(&version()).await;
    let load = Load::start(&cluster, Some(Place::Apart { from: 0 })).await;
    load.loses(Lost::Node(0));
    cluster.nodes[0].suspend().await;
    load.goes_on(SUSPENDED).await;
    cluster.nodes[0].resume().await;
    load.is_back().await;
    let row = load.ends("a node suspended for 30 s").await;
    row.holds(Tie::Apart);
    cluster.nodes[0].nothing_left().await;
}
