//! The examples as programs: where they are, and the example `server` as a process of its own.

// Each test program uses only a part of this module.
#![allow(dead_code)]

use std::collections::BTreeMap;
use std::future::Future;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::sync::LazyLock;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};
use tokio::sync::Mutex;

/// How long a test waits for an event before it fails.
const PATIENCE: Duration = Duration::from_secs(60);

/// A test that serves or calls `demo` holds this. Otherwise the examples of two tests would meet.
pub(crate) static DEMO: Mutex<()> = Mutex::const_new(());

/// Where the program of each example is, after cargo has built it.
static PROGRAMS: LazyLock<BTreeMap<String, PathBuf>> = LazyLock::new(|| {
    let mut build = std::process::Command::new(env!("CARGO"));
    build.current_dir(env!("CARGO_MANIFEST_DIR"));
    // Of the packages that `cargo test` builds by default, with the same features: nothing is built twice.
    build.args(["build", "--quiet", "--examples", "--message-format=json", "--features", "hopline-examples/outbox"]);
    // Cargo sets these variables for tests. Some dependencies look at them, and would be built again.
    for (variable, _) in std::env::vars_os() {
        if ["CARGO_PKG_", "CARGO_MANIFEST_"].iter().any(|own| variable.to_string_lossy().starts_with(own)) {
            build.env_remove(variable);
        }
    }
    if cfg!(feature = "zstd") {
        build.args(["--features", "hopline/zstd"]);
    }
    if cfg!(feature = "metrics") {
        build.args(["--features", "hopline-examples/metrics,hopline-examples/opentelemetry"]);
    }
    let built = build.stderr(Stdio::inherit()).output().expect("cargo can be run");
    assert!(built.status.success(), "the examples are built");
    let told = built.stdout.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    let program = |line: &[u8]| {
        let told: serde_json::Value = serde_json::from_slice(line).expect("cargo tells it in JSON");
        let program = told["executable"].as_str()?;
        Some((told["target"]["name"].as_str()?.to_owned(), PathBuf::from(program)))
    };
    told.filter_map(program).collect()
});

pub(crate) async fn soon<F: Future>(event: F) -> F::Output {
    tokio::time::timeout(PATIENCE, event).await.expect("what has to happen happens within a minute")
}

/// The program of an example, to be run without the settings in the tester's environment.
pub(crate) fn example(name: &str) -> Command {
    let program = PROGRAMS.get(name).unwrap_or_else(|| panic!("there is no example `{name}`"));
    let mut command = Command::new(program);
    for (variable, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("HOPLINE_")) {
        command.env_remove(variable);
    }
    command.env_remove("PREFETCH").env_remove("RUST_LOG").env("RUST_BACKTRACE", "0");
    command.stdin(Stdio::null()).kill_on_drop(true);
    command
}

/// Sends a signal, such as `TERM`, to a process that the test has started.
pub(crate) async fn signal(process: u32, name: &str) {
    // `kill` is built into the shell.
    let told = Command::new("sh").args(["-c", "kill -s \"$0\" \"$1\"", name, &process.to_string()]).status().await;
    assert!(told.expect("there is a shell").success());
}

/// The example `server` as a process. It is killed if the test ends before it.
pub(crate) struct Server {
    pub(crate) process: Child,
    printed: Lines<BufReader<ChildStdout>>,
    pub(crate) instance: String,
}

impl Server {
    pub(crate) async fn start(url: &str) -> Self {
        Self::run(example("server").arg(url)).await
    }

    pub(crate) async fn run(command: &mut Command) -> Self {
        let mut process = command.stdout(Stdio::piped()).spawn().expect("it can be run");
        let printed = BufReader::new(process.stdout.take().expect("it is piped")).lines();
        let mut server = Self { process, printed, instance: String::new() };
        let ready = server.line().await;
        server.instance = ready.strip_prefix("ready ").expect("it tells its instance").to_owned();
        server
    }

    /// The next line that it prints.
    pub(crate) async fn line(&mut self) -> String {
        soon(self.printed.next_line()).await.expect("it prints text").expect("it prints a line before it ends")
    }

    pub(crate) fn id(&self) -> u32 {
        self.process.id().expect("it has not ended")
    }

    pub(crate) async fn signal(&self, name: &str) {
        signal(self.id(), name).await;
    }

    pub(crate) async fn ended(mut self) -> ExitStatus {
        soon(self.process.wait()).await.expect("it can be waited for")
    }
}
