//! The command `hopline`, as the tests run it, and what it prints.

// Each test program uses only a part of this module.
#![allow(dead_code)]

use std::process::{Command, Output, Stdio};
use std::time::Duration;

use hopline::{Client, Server};
use tokio::io::{AsyncBufReadExt as _, BufReader, Lines};
use tokio::process::{ChildStderr, ChildStdout};

/// How long a test waits for what has to come, before it fails.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// The command, without what the tester's own environment says.
pub(crate) fn cleaned() -> Command {
    let mut command = Command::new(assert_cmd::cargo::cargo_bin!("hopline"));
    for (variable, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("HOPLINE_")) {
        command.env_remove(variable);
    }
    command.env_remove("RUST_LOG");
    // Nor the contexts of the tester.
    command.env("XDG_CONFIG_HOME", concat!(env!("CARGO_TARGET_TMPDIR"), "/no-contexts"));
    command
}

/// The same with arguments. It is ended when it takes too long.
pub(crate) fn hopline(arguments: &[&str]) -> assert_cmd::Command {
    let mut command = assert_cmd::Command::from_std(cleaned());
    command.timeout(PATIENCE).args(arguments);
    command
}

/// A command that goes on, with a line at a time of what it prints. It is killed when this is dropped.
pub(crate) struct Going {
    process: tokio::process::Child,
    lines: Lines<BufReader<ChildStdout>>,
    notes: Lines<BufReader<ChildStderr>>,
}

impl Going {
    pub(crate) fn start(command: Command) -> Self {
        let mut command = tokio::process::Command::from(command);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        let mut process = command.spawn().expect("it can be run");
        let lines = BufReader::new(process.stdout.take().expect("it is piped")).lines();
        let notes = BufReader::new(process.stderr.take().expect("it is piped")).lines();
        Self { process, lines, notes }
    }

    /// The next line that it prints. `None` if there are no more.
    pub(crate) async fn line(&mut self) -> Option<String> {
        soon(self.lines.next_line()).await.expect("it prints text")
    }

    /// The next line on stdout, however long it takes.
    pub(crate) async fn line_whenever(&mut self) -> Option<String> {
        self.lines.next_line().await.expect("it prints text")
    }

    /// The next line on stderr.
    pub(crate) async fn note(&mut self) -> String {
        soon(self.notes.next_line()).await.expect("it prints text").expect("it says something")
    }

    /// Sends a signal, such as `TERM`.
    pub(crate) async fn signal(&self, signal: &str) {
        let id = self.process.id().expect("it has not ended").to_string();
        // A shell has `kill` built in.
        let told = tokio::process::Command::new("sh").args(["-c", "kill -s \"$0\" \"$1\"", signal, &id]).status().await;
        assert!(told.expect("there is a shell").success());
    }

    /// Its exit code, once it has ended.
    pub(crate) async fn code(&mut self) -> Option<i32> {
        soon(self.process.wait()).await.expect("it can be waited for").code()
    }
}

/// Checks that the command refuses these arguments as wrong usage, and says this.
#[track_caller]
pub(crate) fn is_refused(arguments: &[&str], told: &str) {
    let output = hopline(arguments).output().expect("it can be run");
    assert_eq!(output.status.code(), Some(2), "{arguments:?}: {output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains(told), "{arguments:?}: {output:?}");
}

/// Waits for what has to come.
pub(crate) async fn soon<F: Future>(event: F) -> F::Output {
    tokio::time::timeout(PATIENCE, event).await.expect("what has to happen happens within a minute")
}

/// A place of its own on the RabbitMQ under test.
pub(crate) struct Place {
    pub(crate) url: String,
    pub(crate) namespace: String,
}

impl Place {
    pub(crate) fn new(name: &str) -> Self {
        Self::at(&std::env::var("HOPLINE_TEST_URL").expect("HOPLINE_TEST_URL names a RabbitMQ"), name)
    }

    /// The same on another RabbitMQ.
    pub(crate) fn at(url: &str, name: &str) -> Self {
        Self { url: url.to_owned(), namespace: format!("cli-{}-{name}", std::process::id()) }
    }

    /// The command with these arguments, in this place.
    pub(crate) fn here(&self, arguments: &[&str]) -> Command {
        let mut command = cleaned();
        command.args(arguments).args(["--url", &self.url, "--namespace", &self.namespace]);
        command
    }

    /// What becomes of the command with these arguments, in this place.
    pub(crate) async fn run_here(&self, arguments: &[&str]) -> Output {
        let mut command = tokio::process::Command::from(self.here(arguments));
        soon(command.kill_on_drop(true).output()).await.expect("it can be run")
    }

    pub(crate) async fn client(&self) -> Client {
        Client::builder().namespace(&self.namespace).connect(&self.url).await.expect("the broker is there")
    }

    /// A server that serves nothing yet.
    pub(crate) async fn server(&self) -> Server {
        Server::builder().namespace(&self.namespace).connect(&self.url).await.expect("the broker is there")
    }
}

/// The line that the command prints when all is well.
#[track_caller]
pub(crate) fn printed(output: Output) -> String {
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(output.stderr.is_empty(), "{output:?}");
    let printed = String::from_utf8(output.stdout).expect("it prints text");
    printed.strip_suffix('\n').expect("it prints a line").to_owned()
}

/// The one line on stderr, without the name of the command.
#[track_caller]
pub(crate) fn said(output: &Output) -> String {
    let said = str::from_utf8(&output.stderr).expect("it prints text");
    let line = said.strip_suffix('\n').expect("it prints a line");
    assert!(!line.contains('\n'), "more than a line: {said}");
    line.strip_prefix("hopline: ").expect("it tells who says so").to_owned()
}
