//! The command `hopline`, as the tests run it, and what it prints.

// Each test program uses only a part of this module.
#![allow(dead_code)]

use std::process::{Command, Output};
use std::time::Duration;

use hopline::{Client, Server};

/// How long a test waits for what has to come, before it fails.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// The command, without what the tester's own environment says.
pub(crate) fn cleaned() -> Command {
    let mut command = Command::new(assert_cmd::cargo::cargo_bin!("hopline"));
    for (variable, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("HOPLINE_")) {
        command.env_remove(variable);
    }
    command.env_remove("RUST_LOG");
    command
}

/// The same with arguments. It is ended when it takes too long.
pub(crate) fn hopline(arguments: &[&str]) -> assert_cmd::Command {
    let mut command = assert_cmd::Command::from_std(cleaned());
    command.timeout(PATIENCE).args(arguments);
    command
}

/// A place of its own on the RabbitMQ under test.
pub(crate) struct Place {
    pub(crate) url: String,
    pub(crate) namespace: String,
}

impl Place {
    pub(crate) fn new(name: &str) -> Self {
        let url = std::env::var("HOPLINE_TEST_URL").expect("HOPLINE_TEST_URL names a RabbitMQ");
        Self { url, namespace: format!("cli-{}-{name}", std::process::id()) }
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
