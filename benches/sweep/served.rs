//! `hopline bench serve`, for as long as a sweep takes.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

use super::Hopline;

/// What `hopline bench serve` prints when all can be called.
const READY: &str = "serving\n";

/// The server side of a sweep. It ends with this process, too, however that ends.
pub(super) struct Served(Option<Child>);

impl Served {
    /// Starts it, and waits until it can be called. In memory there is none, since each load serves for itself.
    ///
    /// # Errors
    /// When somebody else serves there already, or it cannot be started.
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

    /// Has it drain and end.
    ///
    /// # Errors
    /// When it fails.
    pub(super) fn end(self) -> Result<(), String> {
        let Some(mut process) = self.0 else { return Ok(()) };
        // It ends with its input.
        drop(process.stdin.take());
        match process.wait() {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => Err(format!("the server side, `hopline bench serve`, failed: {status}")),
            Err(error) => Err(format!("cannot wait for the server side, `hopline bench serve`: {error}")),
        }
    }
}

/// A server of somebody else's would take a part of the calls.
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
