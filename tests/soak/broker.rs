//! The RabbitMQ that is broken: `scripts/broker hold` starts it, and removes it when this process is gone, however it ends.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command};

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/broker");

#[derive(Debug)]
pub(crate) struct Broker {
    version: String,
    state: PathBuf,
    url: String,
    holder: Child,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Queue {
    pub(crate) name: String,
    pub(crate) messages: u64,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Connection {
    pub(crate) name: String,
}

impl Broker {
    pub(crate) async fn start(version: &str, folder: &Path) -> Self {
        let state = folder.join("broker");
        let mut holding = command(&state);
        holding.args(["hold", "--version", version]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut holder = holding.spawn().expect("scripts/broker can be run");
        let mut printed = BufReader::new(holder.stdout.take().expect("it is piped")).lines();
        let url = printed.next_line().await.expect("a URL is text");
        let url = url.expect("a node starts: scripts/broker says above why not");
        Self { version: version.to_owned(), state, url, holder }
    }

    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    pub(crate) fn address(&self) -> SocketAddr {
        let authority = self.url.rsplit('@').next().expect("a part at least");
        authority.trim_end_matches('/').parse().expect("it listens at an address, not a name")
    }

    /// Ends it, and removes what it had.
    pub(crate) async fn stop(mut self) {
        drop(self.holder.stdin.take());
        // Whatever it says of its end, it is over.
        let _ = self.holder.wait().await;
    }

    /// As `kill -9` does.
    pub(crate) async fn kill(&self) {
        self.script("kill", &[]).await;
    }

    /// After [`kill`](Self::kill): with the data it had, and until it accepts AMQP.
    pub(crate) async fn start_again(&self) {
        self.script("start", &[]).await;
    }

    /// What `rabbitmqctl` prints.
    pub(crate) async fn ctl(&self, arguments: &[&str]) -> String {
        self.script("ctl", &[&["--"], arguments].concat()).await
    }

    /// What an Erlang expression comes to in the node.
    pub(crate) async fn eval(&self, expression: &str) -> String {
        self.ctl(&["eval", expression]).await
    }

    pub(crate) async fn queues(&self) -> Vec<Queue> {
        self.list(&["list_queues", "name", "messages"]).await
    }

    pub(crate) async fn connections(&self) -> Vec<Connection> {
        self.list(&["list_connections", "name"]).await
    }

    async fn list<T: DeserializeOwned>(&self, arguments: &[&str]) -> Vec<T> {
        let printed = self.ctl(&[arguments, &["--formatter", "json"]].concat()).await;
        serde_json::from_str(&printed).unwrap_or_else(|error| panic!("{arguments:?}: {error}: {printed}"))
    }

    async fn script(&self, verb: &str, arguments: &[&str]) -> String {
        let mut script = command(&self.state);
        script.args([verb, "--version", &self.version]).args(arguments).stdin(Stdio::null());
        let output = script.output().await.expect("scripts/broker can be run");
        let [printed, said] = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        assert!(output.status.success(), "{verb} {arguments:?}: {printed}{said}");
        printed
    }
}

/// The script, in a group of its own, so that a Ctrl-C for the soak leaves it to see the soak's end.
fn command(state: &Path) -> Command {
    let mut command = Command::new(SCRIPT);
    command.env("HOPLINE_BROKER_STATE", state).env_remove("AMQP_URL").process_group(0);
    command
}
