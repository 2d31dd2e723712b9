//! The node of all tests that leave it running, and what is done to a node here.

use std::collections::BTreeSet;
use std::ops::Deref;

use tokio::sync::{Mutex, MutexGuard};

use crate::cluster::Cluster;
use crate::node::{Connection, Node, Queue, version, when};
use crate::support::Scene;

/// Erlang for the queue of this name, as `Q`.
fn found(name: &str) -> String {
    format!("{{ok, Q}} = {}", looked_up(name))
}

fn looked_up(name: &str) -> String {
    format!("rabbit_amqqueue:lookup(rabbit_misc:r(<<\"/\">>, queue, <<\"{name}\">>))")
}

/// Erlang that deletes the queue of this name; one that has gone by itself counts as deleted.
fn deleted(name: &str) -> String {
    let delete = "{ok, _} = rabbit_amqqueue:delete(Q, false, false, <<\"it\">>)";
    format!("case {} of {{ok, Q}} -> {delete}; {{error, not_found}} -> gone end", looked_up(name))
}

impl Node {
    /// Deletes a queue, an exclusive one too.
    pub(crate) async fn delete_queue(&self, name: &str) {
        self.eval(&format!("{}, ok.", deleted(name))).await;
    }

    /// Deletes all queues that there are.
    ///
    /// All at once: a queue that nobody consumes may expire after it was listed, and before it is its turn.
    pub(crate) async fn delete_queues(&self) {
        let all = "rabbit_amqqueue:list(<<\"/\">>)";
        let delete = "catch rabbit_amqqueue:delete(Q, false, false, <<\"it\">>)";
        let left = format!("[{delete} || Q <- {all}], length({all}).");
        when(async || self.eval(&left).await, |left| left.trim() == "0").await;
    }

    /// Deletes a queue and makes it again without arguments, unless somebody else has made it first: tells who was it.
    pub(crate) async fn replace_queue(&self, name: &str) -> bool {
        let resource = format!("R = rabbit_misc:r(<<\"/\">>, queue, <<\"{name}\">>)");
        let deleted = deleted(name);
        let made = "{Made, _} = rabbit_amqqueue:declare(R, true, false, [], none, <<\"it\">>)";
        let done = self.eval(&format!("{resource}, {deleted}, {made}, Made.")).await;
        assert!(["new", "existing"].contains(&done.trim()), "{name} is not made again: {done}");
        done.trim() == "new"
    }

    /// Kills the process of a classic queue in the broker, which then cancels its consumers and starts it again. Waits for
    /// one that is declared again just now.
    pub(crate) async fn crash_queue(&self, name: &str) {
        let crash = "{ok, Q} -> exit(amqqueue:get_pid(Q), kill); {error, not_found} -> gone";
        let crash = format!("case {} of {crash} end.", looked_up(name));
        when(async || self.eval(&crash).await, |done| done.trim() == "true").await;
    }

    /// Has a queue answer nobody, as a quorum queue without its majority does, or everybody again.
    pub(crate) async fn answers(&self, name: &str, answers: bool) {
        self.all_answer(&[name.to_owned()], answers).await;
    }

    /// The same of several.
    pub(crate) async fn all_answer(&self, names: &[String], answers: bool) {
        let act = if answers { "resume" } else { "suspend" };
        let names: Vec<_> = names.iter().map(|name| format!("<<\"{name}\">>")).collect();
        let found = "{ok, Q} = rabbit_amqqueue:lookup(rabbit_misc:r(<<\"/\">>, queue, N))";
        let act =
            format!("[begin {found}, ok = sys:{act}(amqqueue:get_pid(Q)) end || N <- [{}]], ok.", names.join(","));
        assert_eq!(self.eval(&act).await.trim(), "ok", "{names:?}");
    }

    /// How much of what a queue has been told, and does not answer, contains this text.
    pub(crate) async fn untold(&self, name: &str, text: &str) -> u64 {
        let found = found(name);
        let process = "P = case amqqueue:get_pid(Q) of {Name, _} -> whereis(Name); Pid -> Pid end";
        let told = "{messages, Told} = erlang:process_info(P, messages)";
        let contains = format!("binary:match(term_to_binary(One), <<\"{text}\">>) =/= nomatch");
        let said = self.eval(&format!("{found}, {process}, {told}, length([One || One <- Told, {contains}]).")).await;
        said.trim().parse().unwrap_or_else(|error| panic!("{name}: {error}: {said}"))
    }

    /// Its queues, once they are as they have to become.
    pub(crate) async fn queues_when(&self, are_so: impl Fn(&[Queue]) -> bool) -> Vec<Queue> {
        when(async || self.queues().await, |queues| are_so(queues)).await
    }

    /// Its connections, once they are as they have to become.
    pub(crate) async fn connections_when(&self, are_so: impl Fn(&[Connection]) -> bool) -> Vec<Connection> {
        when(async || self.connections().await, |connections| are_so(connections)).await
    }

    /// What tells its connections from those that there were before.
    pub(crate) async fn connection_ids(&self) -> BTreeSet<String> {
        self.connections().await.into_iter().map(|connection| connection.name).collect()
    }

    /// Waits until nothing is left of the clients and servers that there were: only queues that outlive them, and nothing
    /// in these, dead letters aside.
    pub(crate) async fn nothing_left(&self) {
        self.connections_when(<[_]>::is_empty).await;
        when(async || self.channels().await, Vec::is_empty).await;
        let is_at_rest = |queue: &Queue| {
            // These keep what is in them.
            let is_empty = queue.messages == 0 || queue.name.ends_with(".dead") || queue.name.ends_with(".services");
            !queue.exclusive && queue.consumers == 0 && is_empty
        };
        self.queues_when(|queues| queues.iter().all(is_at_rest)).await;
    }
}

/// The node of all tests that leave it running, one after the other: it costs seconds. Nobody drops it; see
/// [`Node::holder`].
static SHARED: Mutex<Option<Node>> = Mutex::const_new(None);

/// The shared node, which belongs to one test until that drops this.
#[derive(Debug)]
pub(crate) struct Shared(MutexGuard<'static, Option<Node>>);

/// The shared node, running, with no queue.
pub(crate) async fn shared() -> Shared {
    let mut node = SHARED.lock().await;
    match &*node {
        Some(node) => node.delete_queues().await,
        None => *node = Some(Node::start(&version()).await),
    }
    Shared(node)
}

impl Shared {
    /// A namespace of its own on it.
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
        // Nobody knows in which state a failed test leaves it.
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
        // At the one that is killed nobody answers, and the next address is tried.
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
    // While they are read, none of them expires.
    for queue in node.queues_when(|queues| queues.iter().any(|queue| queue.exclusive)).await {
        node.delete_queue(&queue.name).await;
    }
    // The server has those again that it reads.
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
