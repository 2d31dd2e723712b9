//! RabbitMQ nodes that a test may break: started by `scripts/broker`, and gone when the test process is, however it ends.

use std::fmt;
use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::ops::Deref;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};
use tokio::sync::{Mutex, MutexGuard};

use crate::support::Scene;

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/broker");

/// How long a broker's listings may take to show what has happened.
const PATIENCE: Duration = Duration::from_secs(60);

/// The version of RabbitMQ whose faults are tested, if they are.
pub(crate) fn version() -> Option<String> {
    let version = std::env::var("HOPLINE_TEST_FAULTS").ok();
    if version.is_none() {
        eprintln!("not tested: faults need the version of RabbitMQ that HOPLINE_TEST_FAULTS names, 3.10 or 4.3");
    }
    version
}

/// A node of its own, which is stopped and removed when this is dropped.
#[derive(Debug)]
pub(crate) struct Node {
    version: String,
    name: String,
    url: String,
    /// `scripts/broker hold`: it removes the node when the pipe to it ends, which it does with this process at the latest.
    holder: Child,
}

impl Node {
    pub(crate) async fn start(version: &str) -> Self {
        Self::hold(version, &[]).await
    }

    /// A node in one cluster with `member`.
    async fn join(member: &Self) -> Self {
        Self::hold(&member.version, &["--join", &member.name]).await
    }

    async fn hold(version: &str, options: &[&str]) -> Self {
        let name = format!("it-{}", uuid::Uuid::new_v4().simple());
        let mut command = Command::new(SCRIPT);
        command.args(["hold", "--version", version, "--name", &name]).args(options);
        // In a group of its own, so that a Ctrl-C for the tests leaves it to see their end, and to do its part.
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).process_group(0);
        let mut holder = command.spawn().expect("scripts/broker can be run");
        let printed = holder.stdout.take().expect("it is piped");
        let mut node = Self { version: version.to_owned(), name, url: String::new(), holder };
        let line = tokio::task::spawn_blocking(|| BufReader::new(printed).lines().next()).await.expect("no panic");
        node.url = line.expect("a node starts: scripts/broker says above why not").expect("a URL is text");
        node
    }

    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.authority().parse().expect("it listens at an address, not a name")
    }

    /// The URL's host and port.
    fn authority(&self) -> &str {
        self.url.rsplit('@').next().expect("a part at least")
    }

    /// Kills it as `kill -9` does.
    pub(crate) async fn kill(&self) {
        self.script("kill", &[]).await;
    }

    /// Starts it again after [`kill`](Self::kill), with the data it had, and waits until it accepts AMQP.
    pub(crate) async fn start_again(&self) {
        self.script("start", &[]).await;
    }

    /// What `rabbitmqctl` prints.
    pub(crate) async fn ctl(&self, arguments: &[&str]) -> String {
        self.script("ctl", &[&["--"], arguments].concat()).await
    }

    async fn script(&self, command: &str, arguments: &[&str]) -> String {
        self.try_script(command, arguments).await.unwrap_or_else(|said| panic!("{command} {arguments:?}: {said}"))
    }

    async fn try_script(&self, command: &str, arguments: &[&str]) -> Result<String, String> {
        let mut script = tokio::process::Command::new(SCRIPT);
        script.args([command, "--version", &self.version, "--name", &self.name]).args(arguments);
        let output = script.output().await.expect("scripts/broker can be run");
        let [printed, said] = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        if output.status.success() { Ok(printed) } else { Err(printed + &said) }
    }

    /// Deletes a queue, an exclusive one too.
    pub(crate) async fn delete_queue(&self, name: &str) {
        let found = format!("{{ok, Q}} = rabbit_amqqueue:lookup(rabbit_misc:r(<<\"/\">>, queue, <<\"{name}\">>))");
        let done = self.ctl(&["eval", &format!("{found}, rabbit_amqqueue:delete(Q, false, false, <<\"it\">>).")]).await;
        assert!(done.starts_with("{ok,"), "{name} is not deleted: {done}");
    }

    /// Kills the process of a classic queue in the broker, which then cancels its consumers and starts it again.
    pub(crate) async fn crash_queue(&self, name: &str) {
        let found = format!("{{ok, Q}} = rabbit_amqqueue:lookup(rabbit_misc:r(<<\"/\">>, queue, <<\"{name}\">>))");
        let done = self.ctl(&["eval", &format!("{found}, exit(amqqueue:get_pid(Q), kill).")]).await;
        assert_eq!(done.trim(), "true", "{name}");
    }

    /// Sets off the memory alarm, which blocks whoever publishes, or ends it.
    pub(crate) async fn memory_alarm(&self, alarm: Alarm) {
        let limit = match alarm {
            Alarm::On => "0.0000001",
            Alarm::Off => "0.4",
        };
        self.ctl(&["set_vm_memory_high_watermark", limit]).await;
    }

    async fn list<T: DeserializeOwned>(&self, arguments: &[&str]) -> Vec<T> {
        let arguments = [&["--"], arguments, &["--formatter", "json"]].concat();
        // A channel that waits for the leader of a queue keeps the broker from listing any, until it is gone.
        let listed = when(async || self.try_script("ctl", &arguments).await, Result::is_ok).await;
        let printed = listed.expect("it is waited for");
        serde_json::from_str(&printed).unwrap_or_else(|error| panic!("{arguments:?}: {error}: {printed}"))
    }

    pub(crate) async fn queues(&self) -> Vec<Queue> {
        self.list(&["list_queues", "name", "messages", "messages_unacknowledged", "consumers", "exclusive"]).await
    }

    pub(crate) async fn connections(&self) -> Vec<Connection> {
        self.list(&["list_connections", "name", "state"]).await
    }

    pub(crate) async fn channels(&self) -> Vec<Channel> {
        self.list(&["list_channels", "name", "messages_unacknowledged"]).await
    }

    /// Its queues, once they are as they have to become.
    pub(crate) async fn queues_when(&self, are_so: impl Fn(&[Queue]) -> bool) -> Vec<Queue> {
        when(async || self.queues().await, |queues| are_so(queues)).await
    }

    /// Its connections, once they are as they have to become.
    pub(crate) async fn connections_when(&self, are_so: impl Fn(&[Connection]) -> bool) -> Vec<Connection> {
        when(async || self.connections().await, |connections| are_so(connections)).await
    }

    /// Waits until nothing is left of the clients and servers that there were: only queues that outlive them, and nothing
    /// in these, dead letters aside.
    pub(crate) async fn nothing_left(&self) {
        self.connections_when(<[_]>::is_empty).await;
        when(async || self.channels().await, Vec::is_empty).await;
        let is_at_rest = |queue: &Queue| {
            let is_empty = queue.messages == 0 || queue.name.ends_with(".dead");
            !queue.exclusive && queue.consumers == 0 && is_empty
        };
        self.queues_when(|queues| queues.iter().all(is_at_rest)).await;
    }

    /// Begins to remove it; dropping it waits for the end of that.
    fn let_go(&mut self) {
        drop(self.holder.stdin.take());
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.let_go();
        if let Err(error) = self.holder.wait() {
            eprintln!("the node {} may be left: {error}", self.name);
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Alarm {
    On,
    Off,
}

/// A queue, as its broker lists it.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub(crate) struct Queue {
    pub(crate) name: String,
    pub(crate) messages: u64,
    #[serde(rename = "messages_unacknowledged")]
    pub(crate) unacked: u64,
    pub(crate) consumers: u64,
    #[serde(deserialize_with = "is_true")]
    pub(crate) exclusive: bool,
}

/// Of a quorum queue, which never is, the listing says "".
fn is_true<'de, D: Deserializer<'de>>(said: D) -> Result<bool, D::Error> {
    Ok(serde_json::Value::deserialize(said)? == true)
}

/// A connection, as its broker lists it.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub(crate) struct Connection {
    pub(crate) name: String,
    pub(crate) state: String,
}

/// A channel, as its broker lists it.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub(crate) struct Channel {
    pub(crate) name: String,
    #[serde(rename = "messages_unacknowledged")]
    pub(crate) unacked: u64,
}

/// What is seen, once it is as it has to become.
pub(crate) async fn when<T: fmt::Debug>(look: impl AsyncFn() -> T, is_so: impl Fn(&T) -> bool) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let seen = look().await;
        if is_so(&seen) {
            return seen;
        }
        assert!(Instant::now() < deadline, "after {PATIENCE:?} it still is {seen:#?}");
        tokio::task::yield_now().await;
    }
}

/// The node of all tests that leave it running, one after the other: it costs seconds. Nobody drops it; see
/// [`Node::holder`].
static SHARED: Mutex<Option<Node>> = Mutex::const_new(None);

/// The shared node, which belongs to one test until that drops this.
#[derive(Debug)]
pub(crate) struct Shared(MutexGuard<'static, Option<Node>>);

/// The shared node, running, with no queue; none if faults are not tested.
pub(crate) async fn shared() -> Option<Shared> {
    let version = version()?;
    let mut node = SHARED.lock().await;
    if node.is_none() {
        *node = Some(Node::start(&version).await);
    }
    Some(Shared(node))
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

/// Three nodes in a cluster.
#[derive(Debug)]
pub(crate) struct Cluster {
    pub(crate) nodes: [Node; 3],
}

impl Cluster {
    pub(crate) async fn start(version: &str) -> Self {
        let first = Node::start(version).await;
        let (second, third) = tokio::join!(Node::join(&first), Node::join(&first));
        let cluster = Self { nodes: [first, second, third] };
        for node in &cluster.nodes {
            when(async || node.running_nodes().await, |running| *running == 3).await;
        }
        cluster
    }

    /// One URL with the addresses of all three, the one of `first` before the others.
    pub(crate) fn url(&self, first: usize) -> String {
        let [one, two, three] = [0, 1, 2].map(|next| self.nodes[(first + next) % 3].authority());
        format!("amqp://guest:guest@{one},{two},{three}")
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for node in &mut self.nodes {
            node.let_go();
        }
    }
}

impl Node {
    /// How many nodes of its cluster run, as far as it knows.
    pub(crate) async fn running_nodes(&self) -> usize {
        let printed = self.ctl(&["cluster_status", "--formatter", "json"]).await;
        let status: serde_json::Value = serde_json::from_str(&printed).expect("it is JSON");
        status["running_nodes"].as_array().map_or(0, Vec::len)
    }
}

#[tokio::test]
async fn a_killed_node_comes_back_with_its_address_and_what_is_durable() {
    let Some(node) = shared().await else { return };
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
async fn nodes_of_a_cluster_are_killed_and_started_each_alone() {
    let Some(version) = version() else { return };
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
async fn any_queue_can_be_deleted_or_crash() {
    let Some(node) = shared().await else { return };
    let scene = node.scene();
    let running = scene.serve(crate::support::Held::new().service).await;
    let queues = node.queues_when(|queues| queues.iter().any(|queue| queue.exclusive)).await;
    for queue in queues.iter().filter(|queue| queue.name.starts_with(&scene.namespace)) {
        if queue.name.contains('@') || queue.name.ends_with(".calls") {
            node.crash_queue(&queue.name).await;
        }
    }
    drop(running);
    node.nothing_left().await;
    for queue in node.queues().await {
        node.delete_queue(&queue.name).await;
    }
    assert_eq!(node.queues().await, []);
}
