//! `hopline bench serve`, for as long as a sweep takes.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

use super::Hopline;

/// What `hopline bench serve` prints when its services can be called.
const READY: &str = "serving\n";

/// The server of a sweep. It ends when this process ends, even if that crashes.
pub(super) struct Served(Option<Child>);

impl Served {
    /// Starts the server and waits until it can be called. Loads in memory need no server, since each serves itself.
    ///
    /// # Errors
    /// If another server runs there already, or this one cannot be started.
    pub(super) fn start(hopline: &Hopline) -> Result<Self, String> {
        if hopline.in_memory() {
            return Ok(Self(None));
        }
        nobody_serves_yet(hopline)?;
        let failed = |error| format!("cannot start the server side, `hopline bench serve`: {error}");
        let mut serve = Command::new(&hopline.program);
        serve.args(["bench", "serve", "--until-input-ends", "--namespace", &hopline.namespace]);
        serve.env("HOPLINE_URL", &hopline.url).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = serve.spawn().map_err(failed)?;
        let printed = process.stdout.take().expect("it is piped");
        let mut line = String::new();
        BufReader::new(printed).read_line(&mut line).map_err(failed)?;
        match line.as_str() {
            READY => Ok(Self(Some(process))),
            _ => Err("the server side, `hopline bench serve`, ended before it served".to_owned()),
        }
    }

    /// Makes the server drain and end.
    ///
    /// # Errors
    /// If the server fails.
    pub(super) fn end(self) -> Result<(), String> {
        let Some(mut process) = self.0 else { return Ok(()) };
        // It ends when its input is closed.
        drop(process.stdin.take());
        match process.wait() {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => Err(format!("the server side, `hopline bench serve`, failed: {status}")),
            Err(error) => Err(format!("cannot wait for the server side, `hopline bench serve`: {error}")),
        }
    }
}

/// Checks that no other server runs there, since it would take some of the calls.
fn nobody_serves_yet(hopline: &Hopline) -> Result<(), String> {
    let mut call = Command::new(&hopline.program);
    call.args(["bench", "call", "--json", "--seconds", "0.05", "--concurrency", "1"]);
    call.args(["--namespace", &hopline.namespace]);
    call.env("HOPLINE_URL", &hopline.url).stdin(Stdio::null());
    let output = call.output().map_err(|error| format!("cannot run `{}`: {error}", hopline.program.display()))?;
    let said = String::from_utf8_lossy(&output.stderr);
    if said.contains("nobody serves") {
        return Ok(());
    }
    if output.status.success() {
        return Err(format!(
            "somebody already serves `bench.v1` in the namespace `{}`: end that, or name another by `--namespace`",
            hopline.namespace
        ));
    }
    Err(said.trim().trim_start_matches("hopline: ").to_owned())
}
