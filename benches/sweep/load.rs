//! One load, measured by `hopline bench call`.

use std::process::{Command, Stdio};

use serde::Deserialize;

use super::{Hopline, bytes};

/// What is measured.
#[derive(Debug, Clone, Copy)]
pub(super) struct Load {
    pub(super) concurrency: u32,
    pub(super) size: u32,
    pub(super) coalesce: Coalesce,
}

/// Which calls may share a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Coalesce {
    Auto,
    Off,
}

/// What `hopline bench call --json` prints of a load, as far as it is shown.
#[derive(Debug, Deserialize)]
pub(super) struct Figures {
    pub(super) calls_per_s: f64,
    pub(super) p50_us: Option<f64>,
    pub(super) p99_us: Option<f64>,
    pub(super) calls_per_message: Option<f64>,
    pub(super) cpu_us_per_call: Option<f64>,
    pub(super) errors: u64,
}

impl Coalesce {
    pub(super) const BOTH: [Self; 2] = [Self::Auto, Self::Off];

    /// As it is written after `--coalesce`.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Off => "off",
        }
    }
}

impl Load {
    /// Runs the load, in a process of its own.
    ///
    /// # Errors
    /// When a call failed, or the load cannot be run.
    pub(super) fn measure(&self, hopline: &Hopline, seconds: &str) -> Result<Figures, String> {
        let Self { concurrency, size, coalesce } = *self;
        let named = format!("{concurrency} in flight, {}, coalesce {}", bytes(size), coalesce.name());
        let mut call = Command::new(&hopline.program);
        call.args(["bench", "call", "--json", "--seconds", seconds, "--namespace", &hopline.namespace]);
        call.args(["--concurrency", &concurrency.to_string(), "--size", &size.to_string()]);
        call.args(["--coalesce", coalesce.name()]);
        // Not as an argument: those of a process are for all to see, and there may be a password in it.
        call.env("HOPLINE_URL", &hopline.url).stdin(Stdio::null());
        let output = call.output().map_err(|error| format!("cannot run `{}`: {error}", hopline.program.display()))?;
        // A load of which no call ended in its time fails as a command, and still is a row of the table.
        match serde_json::from_slice::<Figures>(&output.stdout) {
            Ok(figures) if figures.errors == 0 => Ok(figures),
            _ => Err(format!("{named}: {}", String::from_utf8_lossy(&output.stderr).trim())),
        }
    }
}
