//! A service whose classic queue becomes a quorum queue while the cluster runs.

use super::ledger::{Lost, Place, Tie};
use super::load::{Load, name};
use crate::cluster::Cluster;
use crate::node::version;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn a_classic_service_becomes_a_quorum_service() {
    const CHANGING: Place = Place::Changing;
    let cluster = Cluster::start(&version()).await;
    let mut load = Load::start(&cluster, Some(CHANGING)).await;
    let node = &cluster.nodes[0];
    let queue = format!("{}.{}.v1.calls", load.scene.namespace, name(CHANGING));
    load.loses(Lost::Instances(CHANGING));
    // New calls fail at once and say that they have not run. The waiting calls are answered.
    let pattern = format!("^{}$", queue.replace('.', "\\."));
    let nothing = r#"{"max-length": 0, "overflow": "reject-publish"}"#;
    node.ctl(&["set_policy", "change", &pattern, nothing, "--apply-to", "queues"]).await;
    node.queues_when(|queues| queues.iter().any(|found| found.name == queue && found.messages == 0)).await;
    load.drains(CHANGING).await;
    node.ctl(&["delete_queue", &queue, "--if-empty", "--if-unused"]).await;
    node.ctl(&["clear_policy", "change"]).await;
    load.serves_as_quorum(&cluster, CHANGING).await;
    load.is_back().await;
    // It is still a quorum queue after a node is lost.
    load.loses(Lost::Node(0));
    node.kill().await;
    load.goes_on(std::time::Duration::from_secs(10)).await;
    node.start_again().await;
    load.is_back().await;
    let row = load.ends("a service changed from classic to quorum").await;
    row.holds(Tie::Elsewhere);
    node.nothing_left().await;
}
