//! The node that all tests share which do not stop it, and what tests do to a node.

use std::collections::BTreeSet;
use std::ops::Deref;

use tokio::sync::{Mutex, MutexGuard};

use crate::cluster::Cluster;
use crate::node::{Connection, Node, Queue, version, when};
use crate::support::Scene;

/// Erlang that finds the queue with this name, as `Q`.
fn found(name: &str) -> String {
    format!("{{ok, Q}} = {}", looked_up(name))
}

fn looked_up(name: &str) -> String {
    format!("rabbit_amqqueue:lookup(rabbit_misc:r(<<\"/\">>, queue, <<\"{name}\">>))")
}

/// Erlang that deletes the queue with this name. If it is already gone, that counts as deleted.
fn deleted(name: &str) -> String {
    let delete = "{ok, _} = rabbit_amqqueue:delete(Q, false, false, <<\"it\">>)";
    format!("case {} of {{ok, Q}} -> {delete}; {{error, not_found}} -> gone end", looked_up(name))
}

impl Node {
    /// Deletes a queue, also another connection's exclusive one.
    pub(crate) async fn delete_queue(&self, name: &str) {
        self.eval(&format!("{}, ok.", deleted(name))).await;
    }

    /// Deletes all queues in one step. A queue that nobody consumes could otherwise expire between listing and deleting
    /// it.
    pub(crate) async fn delete_queues(&self) {
        let all = "rabbit_amqqueue:list(<<\"/\">>)";
        let delete = "catch rabbit_amqqueue:delete(Q, false, false, <<\"it\">>)";
        let left = format!("[{delete} || Q <- {all}], length({all}).");
        when(async || self.eval(&left).await, |left| left.trim() == "0").await;
    }

    /// Deletes a queue and declares it again without arguments. Returns `false` if somebody else has declared it first.
    pub(crate) async fn replace_queue(&self, name: &str) -> bool {
        let resource = format!("R = rabbit_misc:r(<<\"/\">>, queue, <<\"{name}\">>)");
        let deleted = deleted(name);
        let made = "{Made, _} = rabbit_amqqueue:declare(R, true, false, [], none, <<\"it\">>)";
        let done = self.eval(&format!("{resource}, {deleted}, {made}, Made.")).await;
        assert!(["new", "existing"].contains(&done.trim()), "{name} is not made again: {done}");
        done.trim() == "new"
    }

    /// Kills the process of a classic queue in the broker. The broker cancels its consumers and starts it again. Waits
    /// for the queue if it is being declared at this moment.
    pub(crate) async fn crash_queue(&self, name: &str) {
        let crash = "{ok, Q} -> exit(amqqueue:get_pid(Q), kill); {error, not_found} -> gone";
        let crash = format!("case {} of {crash} end.", looked_up(name));
        when(async || self.eval(&crash).await, |done| done.trim() == "true").await;
    }

    /// Makes a queue answer nobody, as a quorum queue without its majority does, or answer again.
    pub(crate) async fn answers(&self, name: &str, answers: bool) {
        self.all_answer(&[name.to_owned()], answers).await;
    }

    /// The same for several queues.
    pub(crate) async fn all_answer(&self, names: &[String], answers: bool) {
        let act = if answers { "resume" } else { "suspend" };
        let names: Vec<_> = names.iter().map(|name| format!("<<\"{name}\">>")).collect();
        let found = "{ok, Q} = rabbit_amqqueue:lookup(rabbit_misc:r(<<\"/\">>, queue, N))";
        let act =
            format!("[begin {found}, ok = sys:{act}(amqqueue:get_pid(Q)) end || N <- [{}]], ok.", names.join(","));
        assert_eq!(self.eval(&act).await.trim(), "ok", "{names:?}");
    }

    /// How many of the messages that wait for a queue's process contain this text.
    pub(crate) async fn untold(&self, name: &str, text: &str) -> u64 {
        let found = found(name);
        let process = "P = case amqqueue:get_pid(Q) of {Name, _} -> whereis(Name); Pid -> Pid end";
        let told = "{messages, Told} = erlang:process_info(P, messages)";
        let contains = format!("binary:match(term_to_binary(One), <<\"{text}\">>) =/= nomatch");
        let said = self.eval(&format!("{found}, {process}, {told}, length([One || One <- Told, {contains}]).")).await;
        said.trim().parse().unwrap_or_else(|error| panic!("{name}: {error}: {said}"))
    }

    /// The queues, once `are_so` is true of them.
    pub(crate) async fn queues_when(&self, are_so: impl Fn(&[Queue]) -> bool) -> Vec<Queue> {
        when(async || self.queues().await, |queues| are_so(queues)).await
    }

    /// The connections, once `are_so` is true of them.
    pub(crate) async fn connections_when(&self, are_so: impl Fn(&[Connection]) -> bool) -> Vec<Connection> {
        when(async || self.connections().await, |connections| are_so(connections)).await
    }

    /// The ids of the connections. A new connection has a new id.
    pub(crate) async fn connection_ids(&self) -> BTreeSet<String> {
        self.connections().await.into_iter().map(|connection| connection.name).collect()
    }

    /// Waits until nothing is left of the clients and servers: no connections, and only queues that outlive them, which
    /// are empty except for dead letters.
    pub(crate) async fn nothing_left(&self) {
        self.connections_when(<[_]>::is_empty).await;
        when(async || self.channels().await, Vec::is_empty).await;
        let is_at_rest = |queue: &Queue| {
            // These queues keep their messages.
            let is_empty = queue.messages == 0 || queue.name.ends_with(".dead") || queue.name.ends_with(".services");
            !queue.exclusive && queue.consumers == 0 && is_empty
        };
        self.queues_when(|queues| queues.iter().all(is_at_rest)).await;
    }
}

/// The node that all tests share which leave it running. Starting one takes seconds. It is never dropped: see
/// [`Node::holder`].
static SHARED: Mutex<Option<Node>> = Mutex::const_new(None);

/// The shared node. It belongs to one test until the test drops this.
#[derive(Debug)]
pub(crate) struct Shared(MutexGuard<'static, Option<Node>>);

/// The shared node, running and without queues.
pub(crate) async fn shared() -> Shared {
    let mut node = SHARED.lock().await;
    match &*node {
        Some(node) => node.delete_queues().await,
        None => *node = Some(Node::start(&version()).await),
    }
    Shared(node)
}

impl Shared {
    /// A namespace of its own on the node.
    pub(crate) fn scene(&self) -> Scene {
        Scene::at(self.url())
    }
}

impl Deref for Shared {
    type Target = Node;

    fn deref(&self) -> &Node {
        self.0.as_ref().expect("it is there until this is dropped")
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // A failed test may leave the node in any state.
        if std::thread::panicking() {
            self.0.take();
        }
    }
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn a_killed_node_comes_back_with_its_address_and_what_is_durable() {
    let node = shared().await;
    let scene = node.scene();
    let running = scene.serve(crate::support::Held::new().service.quorum()).await;
    let calls = format!("{}.held.v1.calls", scene.namespace);
    assert!(!node.connections().await.is_empty());
    node.kill().await;
    drop(running);
    node.start_again().await;
    let is_it = |queue: &Queue| queue.name == calls && queue.consumers == 0;
    node.queues_when(|queues| queues.iter().any(is_it)).await;
    node.nothing_left().await;
    scene.client().await;
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn nodes_of_a_cluster_are_killed_and_started_each_alone() {
    let version = version();
    let cluster = Cluster::start(&version).await;
    for at in 0..3 {
        let [node, other] = [at, (at + 1) % 3].map(|at| &cluster.nodes[at]);
        node.kill().await;
        when(async || other.running_nodes().await, |running| *running == 2).await;
        // The killed node does not answer, so the client tries its next address.
        Scene::at(cluster.url(at)).client().await;
        node.start_again().await;
        when(async || other.running_nodes().await, |running| *running == 3).await;
    }
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn any_queue_can_be_deleted_or_crash() {
    let node = shared().await;
    let scene = node.scene();
    let running = scene.serve(crate::support::Held::new().service).await;
    let before = node.connection_ids().await;
    // While the queues are consumed, none of them expires.
    for queue in node.queues_when(|queues| queues.iter().any(|queue| queue.exclusive)).await {
        node.delete_queue(&queue.name).await;
    }
    // The server consumes its own queues again.
    let is_read = |queue: &&Queue| queue.consumers == 1;
    let queues = node.queues_when(|queues| queues.iter().filter(is_read).count() == 3).await;
    for queue in queues.iter().filter(|queue| is_read(queue) && !queue.name.ends_with(".work")) {
        node.crash_queue(&queue.name).await;
    }
    node.queues_when(|queues| queues.iter().filter(is_read).count() == 3).await;
    assert_eq!(node.connection_ids().await, before, "only queues were lost");
    drop(running);
    node.nothing_left().await;
    node.delete_queues().await;
}
