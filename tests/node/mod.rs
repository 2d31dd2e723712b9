//! RabbitMQ nodes that a test may break. `scripts/broker` starts them, and removes them when the test process ends in
//! any way.

// Each test program uses only a part of this module.
#![allow(dead_code)]

use std::fmt;
use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};

/// `scripts/broker`, from whichever package of this repository the tests are.
fn script() -> PathBuf {
    let folders = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors();
    let mut scripts = folders.map(|folder| folder.join("scripts/broker"));
    scripts.find(|script| script.exists()).expect("it is in the repository")
}

/// How long a broker's listings may take to show what has happened. On a busy machine each look takes long, so a
/// minimum number of looks is made as well.
const PATIENCE: Duration = Duration::from_secs(60);
const LOOKS: u32 = 20;

/// The version of RabbitMQ to start.
pub(crate) fn version() -> String {
    std::env::var("HOPLINE_TEST_NODE").expect("HOPLINE_TEST_NODE names the version of RabbitMQ to start, 3.10 or 4.3")
}

/// A RabbitMQ node. It is stopped and removed when this is dropped.
#[derive(Debug)]
pub(crate) struct Node {
    version: String,
    name: String,
    url: String,
    /// `scripts/broker hold`. It removes the node when the pipe to it is closed, at the latest when this process ends.
    holder: Child,
}

impl Node {
    pub(crate) async fn start(version: &str) -> Self {
        Self::hold(version, &[]).await
    }

    /// Starts a node with the settings in `conf`, with `files` and with plugins. In `conf`, `@conf@` stands for the
    /// folder of the files.
    pub(crate) async fn with(version: &str, conf: &str, files: &[(&str, &str)], plugins: &[&str]) -> Self {
        Self::configured(version, conf, files, plugins, &[]).await
    }

    /// Starts a node that finds others by the epmd at this port. It joins the cluster of `member`, if there is one.
    pub(crate) async fn of_cluster(version: &str, conf: &str, epmd: u16, member: Option<&Self>) -> Self {
        let epmd = epmd.to_string();
        let mut options = vec!["--epmd", &epmd];
        if let Some(member) = member {
            options.extend(["--join", &member.name]);
        }
        Self::configured(version, conf, &[], &[], &options).await
    }

    async fn configured(version: &str, conf: &str, files: &[(&str, &str)], plugins: &[&str], more: &[&str]) -> Self {
        let folder = std::env::temp_dir().join(format!("conf-{}", uuid::Uuid::new_v4().simple()));
        std::fs::create_dir(&folder).expect("there is room for it");
        for (file, text) in files.iter().chain(&[("node.conf", conf)]) {
            std::fs::write(folder.join(file), text).expect("there is room for it");
        }
        let conf = folder.join("node.conf");
        let plugins = plugins.join(",");
        let mut options = vec!["--conf", conf.to_str().expect("it is text")];
        options.extend(more);
        if !plugins.is_empty() {
            options.extend(["--plugins", &plugins]);
        }
        let node = Self::hold(version, &options).await;
        // The node has a copy.
        std::fs::remove_dir_all(folder).expect("it is ours");
        node
    }

    async fn hold(version: &str, options: &[&str]) -> Self {
        let name = format!("node-{}", uuid::Uuid::new_v4().simple());
        let mut command = Command::new(script());
        command.args(["hold", "--version", version, "--name", &name]).args(options);
        // It has a process group of its own, so that a Ctrl-C for the tests does not end it too: it has to see their
        // end, and remove the node.
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

    /// The host and port in the URL.
    pub(crate) fn authority(&self) -> &str {
        self.url.rsplit('@').next().expect("a part at least")
    }

    /// Waits until all declarations are on the disk. RabbitMQ 3.10 confirms them a moment before it has written them.
    pub(crate) async fn remembers(&self) {
        // RabbitMQ 4.3 writes first, and knows no such function.
        self.eval("catch mnesia:sync_log().").await;
    }

    /// Kills the node as `kill -9` does.
    pub(crate) async fn kill(&self) {
        self.script("kill", &[]).await;
    }

    /// Starts the node again after [`kill`](Self::kill), with its data, and waits until it accepts AMQP.
    pub(crate) async fn start_again(&self) {
        self.script("start", &[]).await;
    }

    /// Starts the node again without its data.
    pub(crate) async fn start_empty(&self) {
        self.script("start", &["--empty"]).await;
    }

    /// Suspends the process with SIGSTOP, until [`resume`](Self::resume). Its sockets stay open.
    pub(crate) async fn suspend(&self) {
        self.script("suspend", &[]).await;
    }

    pub(crate) async fn resume(&self) {
        self.script("resume", &[]).await;
    }

    /// Stops the node as an operator does, and waits for its end.
    pub(crate) async fn stop(&self) {
        self.ctl(&["shutdown"]).await;
    }

    /// Makes the node close its connections and hand over the leaders of quorum queues, as `rabbitmq-upgrade drain`
    /// does.
    pub(crate) async fn drain(&self) {
        let done = self.eval("rabbit_maintenance:drain().").await;
        assert_eq!(done.trim(), "ok");
    }

    /// Removes another node from the cluster for good.
    pub(crate) async fn forget(&self, other: &Self) {
        self.ctl(&["forget_cluster_node", &other.erlang_name()]).await;
    }

    /// The name that Erlang knows the node by.
    pub(crate) fn erlang_name(&self) -> String {
        format!("hopline-{}@localhost", self.address().port())
    }

    /// Runs `rabbitmqctl` and returns what it prints.
    pub(crate) async fn ctl(&self, arguments: &[&str]) -> String {
        self.script("ctl", &[&["--"], arguments].concat()).await
    }

    /// Evaluates an Erlang expression in the node and returns what is printed.
    pub(crate) async fn eval(&self, expression: &str) -> String {
        self.ctl(&["eval", expression]).await
    }

    async fn script(&self, command: &str, arguments: &[&str]) -> String {
        self.try_script(command, arguments).await.unwrap_or_else(|said| panic!("{command} {arguments:?}: {said}"))
    }

    async fn try_script(&self, command: &str, arguments: &[&str]) -> Result<String, String> {
        let mut script = tokio::process::Command::new(script());
        script.args([command, "--version", &self.version, "--name", &self.name]).args(arguments);
        // The node that it starts has to survive a Ctrl-C for the tests.
        let output = script.stdin(Stdio::null()).process_group(0).output().await.expect("scripts/broker can be run");
        let [printed, said] = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        if output.status.success() { Ok(printed) } else { Err(printed + &said) }
    }

    /// The folder with the files that the node was given.
    pub(crate) async fn folder(&self) -> String {
        let home = self.eval("io:format(os:getenv(\"HOME\")).").await;
        format!("{}/conf", home.lines().next().expect("it has a home").trim_end_matches("ok"))
    }

    /// Raises the memory alarm, which blocks everybody who publishes, or ends it.
    pub(crate) async fn memory_alarm(&self, alarm: Alarm) {
        let (limit, raised) = match alarm {
            Alarm::On => ("0.0000001", true),
            Alarm::Off => ("0.4", false),
        };
        self.ctl(&["set_vm_memory_high_watermark", limit]).await;
        // The node looks at its memory a moment later.
        self.eval(&format!(
            "Wait = fun Wait() -> {raised} == lists:any(fun({{{{_, memory, _}}, _}}) -> true; (_) -> false end, \
             rabbit_alarm:get_alarms()) orelse begin timer:sleep(20), Wait() end end, Wait()."
        ))
        .await;
    }

    /// Deletes an exchange and its bindings.
    pub(crate) async fn delete_exchange(&self, name: &str) {
        let resource = format!("rabbit_misc:r(<<\"/\">>, exchange, <<\"{name}\">>)");
        let done = self.eval(&format!("rabbit_exchange:delete({resource}, false, <<\"it\">>).")).await;
        assert!(is_gone(&done), "{name} is not deleted: {done}");
    }

    /// Deletes a binding, also one to another connection's exclusive queue.
    pub(crate) async fn unbind(&self, exchange: &str, key: &str, queue: &str) {
        let resource = |kind: &str, name: &str| format!("rabbit_misc:r(<<\"/\">>, {kind}, <<\"{name}\">>)");
        let (source, destination) = (resource("exchange", exchange), resource("queue", queue));
        let binding = format!("{{binding, {source}, <<\"{key}\">>, {destination}, []}}");
        let done = self.eval(&format!("rabbit_binding:remove({binding}, <<\"it\">>).")).await;
        assert!(is_gone(&done), "{queue} is not unbound from {exchange}: {done}");
    }

    async fn list<T: DeserializeOwned>(&self, what: &str, columns: &[&str]) -> Vec<T> {
        let arguments = [&["--", what], columns, &["--formatter", "json"]].concat();
        // The broker lists no queues while a channel waits for the leader of one.
        let listed = when(async || self.try_script("ctl", &arguments).await, Result::is_ok).await;
        let printed = listed.expect("it is waited for");
        serde_json::from_str(&printed).unwrap_or_else(|error| panic!("{what}: {error}: {printed}"))
    }

    pub(crate) async fn queues(&self) -> Vec<Queue> {
        self.list("list_queues", &["name", "messages", "messages_unacknowledged", "consumers", "exclusive"]).await
    }

    pub(crate) async fn connections(&self) -> Vec<Connection> {
        self.list("list_connections", &["name", "state"]).await
    }

    /// How many connections this node of the cluster has.
    pub(crate) async fn own_connections(&self) -> usize {
        let said = self.eval("length(rabbit_networking:local_connections()).").await;
        said.trim().parse().unwrap_or_else(|error| panic!("{error}: {said}"))
    }

    /// The names that clients gave to their connections.
    pub(crate) async fn connection_names(&self) -> Vec<String> {
        #[derive(Deserialize)]
        struct Named {
            client_properties: Vec<(String, String, serde_json::Value)>,
        }
        let connections: Vec<Named> = self.list("list_connections", &["client_properties"]).await;
        let names = connections.into_iter().flat_map(|connection| connection.client_properties);
        let names = names.filter(|(property, ..)| property == "connection_name");
        names.filter_map(|(.., name)| name.as_str().map(str::to_owned)).collect()
    }

    pub(crate) async fn channels(&self) -> Vec<Channel> {
        self.list("list_channels", &["name", "messages_unacknowledged"]).await
    }

    /// How many nodes of the cluster run, as far as this node knows. 0 while it pauses, since it is in a minority.
    pub(crate) async fn running_nodes(&self) -> usize {
        let asked = self.try_script("ctl", &["--", "cluster_status", "--formatter", "json"]).await;
        let Ok(printed) = asked else { return 0 };
        let status: serde_json::Value = serde_json::from_str(&printed).expect("it is JSON");
        status["running_nodes"].as_array().map_or(0, Vec::len)
    }

    /// Begins to remove the node. Dropping it waits until that is done.
    pub(crate) fn let_go(&mut self) {
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

/// Whether a deletion had the result that the thing does not exist, whoever deleted it.
fn is_gone(done: &str) -> bool {
    done.trim() == "ok" || done.contains("not_found") || done.contains("missing")
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

/// Reads a boolean. For a quorum queue, the listing says "" where `false` is meant.
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

/// Looks again and again until `is_so` is true of what it sees, and returns that.
pub(crate) async fn when<T: fmt::Debug>(look: impl AsyncFn() -> T, is_so: impl Fn(&T) -> bool) -> T {
    let deadline = Instant::now() + PATIENCE;
    for looks in 1.. {
        let seen = look().await;
        if is_so(&seen) {
            return seen;
        }
        assert!(looks < LOOKS || Instant::now() < deadline, "after {PATIENCE:?} it still is {seen:#?}");
        tokio::task::yield_now().await;
    }
    unreachable!("it returns, or gives up")
}
