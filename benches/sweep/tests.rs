//! The program `sweep` as a shell sees it: what it writes, and what it exits with.
//!
//! It runs the command `hopline` that cargo has built beside it, so these tests are ignored unless they are asked for, as
//! `scripts/test cli-4.3` does.

use std::path::PathBuf;
use std::process::{Command, Output};

/// The program, without settings from the environment of the test.
fn sweep(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sweep"));
    for (variable, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("HOPLINE_")) {
        command.env_remove(variable);
    }
    command.env_remove("RUST_LOG").env_remove("TOKIO_WORKER_THREADS");
    command.args(arguments).output().expect("it can be run")
}

/// A folder of this test run. Dropping it deletes the folder.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        Self(std::env::temp_dir().join(format!("hopline-sweep-{}-{name}", std::process::id())))
    }

    fn path(&self) -> &str {
        self.0.to_str().expect("a path of letters")
    }

    fn read(&self, file: &str) -> String {
        std::fs::read_to_string(self.0.join(file)).expect("it was written")
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // A test that failed before it wrote anything has none.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A table with a row for each load, and a chart.
fn assert_swept(output: &Output, folder: &Folder) {
    assert!(output.status.success(), "{output:?}");
    let told = String::from_utf8_lossy(&output.stdout);
    assert!(told.contains("sweep.md") && told.contains("sweep.svg"), "{told}");
    let table = folder.read("sweep.md");
    let rows: Vec<&str> = table.lines().filter(|line| line.starts_with('|')).collect();
    assert_eq!(rows.len(), 2 + 30, "{table}");
    let cells = rows[2..].iter().map(|row| row.trim_matches('|').split('|').map(str::trim).collect::<Vec<_>>());
    for row in cells {
        assert!(row[3].parse::<f64>().expect("calls/s is a number") >= 0.0, "{table}");
    }
    assert!(folder.read("sweep.svg").starts_with("<svg"));
}

#[test]
#[ignore = "needs the command hopline, built beside it"]
fn a_sweep_in_memory_writes_a_table_and_a_chart() {
    let folder = Folder::new("memory");
    let output = sweep(&["--url", "memory://", "--seconds", "0.05", "--out", folder.path()]);
    assert_swept(&output, &folder);
    assert!(folder.read("sweep.md").starts_with("# Calls through the broker in memory"));
}

#[test]
#[ignore = "needs the command hopline, built beside it, and a RabbitMQ: HOPLINE_TEST_URL"]
fn a_sweep_on_a_broker_starts_its_server_and_ends_it() {
    let url = std::env::var("HOPLINE_TEST_URL").expect("HOPLINE_TEST_URL names a RabbitMQ");
    let namespace = format!("sweep-{}", std::process::id());
    // The second finds nobody who serves: the server of the first has ended with it.
    for name in ["first", "second"] {
        let folder = Folder::new(name);
        let output = sweep(&["--url", &url, "--namespace", &namespace, "--seconds", "0.05", "--out", folder.path()]);
        assert_swept(&output, &folder);
        assert!(folder.read("sweep.md").starts_with("# Calls through RabbitMQ"));
    }
}

#[test]
fn a_sweep_that_cannot_write_says_so_before_it_measures() {
    // No folder can be made in a file.
    let out = format!("{}/sweep", env!("CARGO_BIN_EXE_sweep"));
    let output = sweep(&["--url", "memory://", "--out", &out]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.starts_with(&format!("sweep: cannot make `{out}`: ")), "{said}");
}

#[test]
fn a_command_that_is_not_there_is_named() {
    let folder = Folder::new("absent");
    let output = sweep(&["--url", "memory://", "--hopline", "/no/such/hopline", "--out", folder.path()]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.starts_with("sweep: cannot run `/no/such/hopline`: "), "{said}");
}
