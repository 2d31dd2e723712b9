//! The command `hopline`, as the tests run it.

use std::time::Duration;

use assert_cmd::Command;

/// How long a test waits for what has to come, before it fails.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// The command, without what the tester's own environment says.
pub(crate) fn hopline(arguments: &[&str]) -> Command {
    let mut command = assert_cmd::cargo::cargo_bin_cmd!("hopline");
    for (variable, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("HOPLINE_")) {
        command.env_remove(variable);
    }
    command.env_remove("RUST_LOG").timeout(PATIENCE).args(arguments);
    command
}
