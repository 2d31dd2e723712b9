//! What all contenders have in common: the command line, the load, and the report of how it went.

mod load;
pub mod plain_client;

use clap::{Args, Subcommand, ValueEnum};
use serde::{Deserialize, Serialize};
use tokio::signal::unix::{SignalKind, signal};

pub use load::run;

/// The line that a client prints when the measured time begins.
pub const MEASURING: &str = "measuring";
/// The line that a client prints when the measured time ends.
pub const MEASURED: &str = "measured";
/// The line that a server prints when it can be called.
pub const SERVING: &str = "serving";

/// What one process of a contender does.
#[derive(Subcommand)]
pub enum Role {
    /// Answers calls until SIGTERM; prints `serving` when it can be called.
    Serve {
        /// Where to serve: a broker's address, or the server's own.
        #[arg(long)]
        url: String,
    },
    /// Makes calls, prints `measuring` and `measured` around what it measures, and one JSON object about it.
    Call {
        /// Where to call.
        #[arg(long)]
        url: String,
        /// What a call is.
        #[arg(long, value_enum, default_value_t)]
        style: Style,
        /// How many, how long, how large.
        #[command(flatten)]
        load: Load,
    },
}

/// What a call is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Style {
    /// The server sends the payload back.
    #[default]
    Call,
    /// The broker confirms that the payload is safe in a durable queue; the server takes it from there.
    Oneway,
}

/// How many calls are made, for how long and how large.
#[derive(Args, Clone, Copy, Debug)]
pub struct Load {
    /// Calls in flight: so many tasks each make one call after the other.
    #[arg(long, default_value_t = 64)]
    pub concurrency: usize,
    /// Time that is measured, after a warm-up of 1 s.
    #[arg(long, default_value_t = 5.0)]
    pub seconds: f64,
    /// Bytes of a payload.
    #[arg(long, default_value_t = 64)]
    pub size: usize,
}

/// How a load went.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    /// Answered calls in a second.
    pub calls_per_s: f64,
    /// Median latency in microseconds, if calls were answered.
    pub p50_us: Option<f64>,
    /// What 99 % of the calls stay within.
    pub p99_us: Option<f64>,
    /// What 99.9 % of the calls stay within.
    pub p999_us: Option<f64>,
    /// Answered calls.
    pub calls: u64,
    /// Calls that failed, or whose reply was not what was sent, at any time.
    pub errors: u64,
    /// Calls in flight.
    pub concurrency: usize,
    /// Bytes of a payload.
    pub size: usize,
    /// CPU time of the client's process in the measured time, for each answered call.
    pub cpu_us_per_call: Option<f64>,
}

/// Tells whoever started this server that it can be called.
pub fn announce() -> anyhow::Result<()> {
    load::say(SERVING)
}

/// Waits for SIGTERM or SIGINT.
pub async fn told_to_stop() -> anyhow::Result<()> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}
