//! A cluster of three RabbitMQ nodes, of which a test may break any, and the links between them.

// Each test program uses only a part of this module.
#![allow(dead_code)]

mod links;

use self::links::Links;
use crate::node::{Node, when};

/// With this setting, a node of RabbitMQ 3.10 that is cut off pauses until it sees the others again. Without it, the
/// two sides of a partition never become one cluster again. RabbitMQ 4.3 needs no setting for that.
const PAUSES: &str = "cluster_partition_handling = pause_minority\n";

/// Three nodes in a cluster.
#[derive(Debug)]
pub(crate) struct Cluster {
    pub(crate) nodes: [Node; 3],
    links: Links,
}

impl Cluster {
    pub(crate) async fn start(version: &str) -> Self {
        Self::with(version, "").await
    }

    /// A cluster in which a node that is cut off goes on alone, in all versions.
    pub(crate) async fn of_nodes_that_go_on_alone(version: &str) -> Self {
        Self::with_all_of(version, "").await
    }

    /// A cluster whose nodes have the settings in `conf`.
    pub(crate) async fn with(version: &str, conf: &str) -> Self {
        Self::with_all_of(version, &if version == "3.10" { [conf, PAUSES].concat() } else { conf.to_owned() }).await
    }

    async fn with_all_of(version: &str, conf: &str) -> Self {
        let links = Links::between(3);
        let first = Node::of_cluster(version, conf, links.epmd(0), None).await;
        let join = |node| Node::of_cluster(version, conf, links.epmd(node), Some(&first));
        let (second, third) = tokio::join!(join(1), join(2));
        let cluster = Self { nodes: [first, second, third], links };
        cluster.is_whole().await;
        cluster
    }

    /// Waits until all nodes see each other.
    pub(crate) async fn is_whole(&self) {
        for node in &self.nodes {
            when(async || node.running_nodes().await, |running| *running == 3).await;
        }
    }

    /// A URL with the addresses of all three nodes, that of `first` before the others.
    pub(crate) fn url(&self, first: usize) -> String {
        let [one, two, three] = [0, 1, 2].map(|next| self.nodes[(first + next) % 3].authority());
        format!("amqp://guest:guest@{one},{two},{three}?order=given")
    }

    /// Lets nothing pass between a node and the others, without closing connections, until [`heal`](Self::heal).
    pub(crate) fn cut_off(&self, node: usize) {
        self.links.cut(Some(node));
    }

    pub(crate) fn heal(&self) {
        self.links.cut(None);
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for node in &mut self.nodes {
            node.let_go();
        }
    }
}
