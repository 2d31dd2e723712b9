//! A node that the other nodes cannot reach: while its clients can reach it, and while nobody can.

use std::time::Duration;

use super::ledger::{Lost, Place, Tie};
use super::load::Load;
use crate::cluster::Cluster;
use crate::node::version;
use crate::proxy::Proxy;

const CUT: Duration = Duration::from_secs(90);
const APART: Place = Place::Apart { from: 0 };

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn a_node_is_cut_off_from_the_others_with_clients_on_both_sides() {
    let cluster = Cluster::start(&version()).await;
    let load = Load::start(&cluster, Some(APART)).await;
    load.loses(Lost::Node(0));
    cluster.cut_off(0);
    load.goes_on(CUT).await;
    cluster.heal();
    cluster.is_whole().await;
    load.is_back().await;
    let row = load.ends("a node cut off from the others for 90 s").await;
    row.holds(Tie::Apart);
    cluster.nodes[0].nothing_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn a_node_is_cut_off_from_everybody() {
    let cluster = Cluster::start(&version()).await;
    let (node, proxy) = (&cluster.nodes[0], Proxy::to(cluster.nodes[0].address()).await);
    let by_proxy = |url: String| url.replace(node.authority(), &proxy.address().to_string());
    let load = Load::by_way_of([0, 1, 2].map(|first| by_proxy(cluster.url(first))), Some(APART)).await;
    load.loses(Lost::Node(0));
    cluster.cut_off(0);
    proxy.stall();
    load.goes_on(CUT).await;
    proxy.resume();
    cluster.heal();
    cluster.is_whole().await;
    load.is_back().await;
    let row = load.ends("a node cut off from the others and its clients for 90 s").await;
    row.holds(Tie::Apart);
    node.nothing_left().await;
}
