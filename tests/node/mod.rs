//! A RabbitMQ of its own, with settings, plugins and users of its own.

use std::io::{BufRead as _, BufReader};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/broker");

/// The version of RabbitMQ to start, if one is asked for.
pub(crate) fn version() -> Option<String> {
    let version = std::env::var("HOPLINE_TEST_NODE").ok();
    if version.is_none() {
        eprintln!("not tested: this needs the version of RabbitMQ that HOPLINE_TEST_NODE names, 3.10 or 4.3");
    }
    version
}

/// A node that is stopped and removed when this is dropped.
pub(crate) struct Node {
    selection: [String; 4],
    pub(crate) url: String,
    /// `scripts/broker hold`: it removes the node when the pipe to it ends, which it does with this process at the latest.
    holder: Child,
}

impl Node {
    /// Starts a node with what `conf` says, where `@conf@` is the folder in which it has these files, and with plugins.
    pub(crate) fn start(version: &str, conf: &str, files: &[(&str, &str)], plugins: &[&str]) -> Self {
        let name = format!("node-{}", uuid::Uuid::new_v4().simple());
        let folder = std::env::temp_dir().join(&name);
        std::fs::create_dir(&folder).expect("there is room for it");
        for (file, text) in files.iter().chain(&[("node.conf", conf)]) {
            std::fs::write(folder.join(file), text).expect("there is room for it");
        }
        let selection = ["--version", version, "--name", &name].map(str::to_owned);
        let mut command = Command::new(SCRIPT);
        command.arg("hold").args(&selection).arg("--conf").arg(folder.join("node.conf"));
        if !plugins.is_empty() {
            command.args(["--plugins", &plugins.join(",")]);
        }
        // In a group of its own, so that a Ctrl-C for the tests leaves it to see their end, and to do its part.
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).process_group(0);
        let mut holder = command.spawn().expect("scripts/broker can be run");
        let printed = BufReader::new(holder.stdout.take().expect("it is piped")).lines().next();
        let url = printed.expect("a node starts: scripts/broker says above why not").expect("a URL is text");
        // The node has a copy.
        std::fs::remove_dir_all(folder).expect("it is ours");
        Self { selection, url, holder }
    }

    /// Runs `rabbitmqctl`, and gives what it prints.
    pub(crate) fn ctl(&self, arguments: &[&str]) -> String {
        let mut command = Command::new(SCRIPT);
        let output = command.arg("ctl").args(&self.selection).arg("--").args(arguments).output();
        let output = output.expect("scripts/broker can be run");
        let [printed, said] = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        assert!(output.status.success(), "{arguments:?}: {printed}{said}");
        printed
    }

    /// Where the node has a file that it was given.
    pub(crate) fn path_of(&self, file: &str) -> String {
        let home = self.ctl(&["eval", "io:format(os:getenv(\"HOME\"))."]);
        format!("{}/conf/{file}", home.lines().next().expect("it has a home").trim_end_matches("ok"))
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        drop(self.holder.stdin.take());
        if let Err(error) = self.holder.wait() {
            eprintln!("a node may be left: {error}");
        }
    }
}
