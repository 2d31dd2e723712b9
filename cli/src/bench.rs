//! `hopline bench`: measures how many calls go through a broker, and how long they take.

mod serve;
mod call;
mod measured;
mod load;
mod report;
mod process;

use std::io::{self, IsTerminal};
use std::time::Duration;

use clap::{Args, Subcommand};
use hopline::{Client, Coalesce, Error, Server};
use indicatif::{ProgressBar, ProgressStyle};

use crate::address::Address;
use crate::failed::Failed;

/// The largest payload, in bytes. It is the default limit of a message.
const MAX_SIZE: usize = 16 * 1024 * 1024;
/// The most calls in flight.
const MAX_CONCURRENCY: usize = 65_536;
/// The longest run.
const MAX_SECONDS: f64 = 86_400.0;

/// Measure calls through a broker.
#[derive(Subcommand)]
#[command(after_help = "Example:\n  hopline bench call --url memory:// --seconds 2")]
pub(crate) enum Bench {
    Serve(serve::Serve),
    Call(call::Call),
}

/// Where the broker is, and a place on it that real services do not use.
#[derive(Args)]
struct Broker {
    #[command(flatten)]
    address: Address,
    /// The prefix of every name on the broker
    #[arg(long, default_value = "hopline-bench")]
    namespace: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Broker {
    async fn client(&self, coalesce: Coalesce) -> Result<Client, Error> {
        let builder = self.address.client(Duration::MAX)?.namespace(&self.namespace).coalesce(coalesce);
        builder.connect(&self.address.url).await
    }

    async fn server(&self) -> Result<Server, Error> {
        self.address.server()?.namespace(&self.namespace).connect(&self.address.url).await
    }
}

impl Bench {
    pub(crate) fn run(self) -> Result<(), Failed> {
        // The runtime is as a service would have it: it uses all cores, or as many threads as TOKIO_WORKER_THREADS
        // says.
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
        let runtime = runtime.map_err(|error| Failed::at("cannot start the threads that make calls", error))?;
        match self {
            Self::Serve(serve) => runtime.block_on(serve.run()),
            Self::Call(call) => runtime.block_on(call.run()),
        }
    }
}

/// A progress bar for this much time. It is only shown on a terminal.
fn progress(length: Duration) -> ProgressBar {
    if !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{prefix}[{bar:30}] {eta} left, {msg}").expect("a template that parses");
    ProgressBar::new(millis(length)).with_style(style.progress_chars("=> "))
}

fn millis(length: Duration) -> u64 {
    u64::try_from(length.as_millis()).unwrap_or(u64::MAX)
}

/// A size in the words of the reports.
fn bytes(size: usize) -> String {
    match size {
        kib if kib >= 1024 && kib.is_multiple_of(1024) => format!("{} KiB", kib / 1024),
        bytes => format!("{bytes} B"),
    }
}

/// A way to coalesce, as it is written after `--coalesce`.
fn coalescing(coalesce: Coalesce) -> String {
    match coalesce {
        Coalesce::Fixed(calls) => calls.to_string(),
        other => format!("{other:?}").to_lowercase(),
    }
}

fn coalesce(text: &str) -> Result<Coalesce, String> {
    match (text, text.parse()) {
        ("auto", _) => Ok(Coalesce::Auto),
        ("off", _) => Ok(Coalesce::Off),
        (_, Ok(calls)) if calls > 0 => Ok(Coalesce::Fixed(calls)),
        _ => Err("write auto, off, or how many calls may share a message, such as 8".to_owned()),
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    match text.parse::<f64>() {
        Ok(seconds) if seconds > 0.0 && seconds <= MAX_SECONDS => Ok(Duration::from_secs_f64(seconds)),
        _ => Err(format!("write a number of seconds above 0 and up to {MAX_SECONDS}, such as 5 or 0.5")),
    }
}

fn size(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(size) if size <= MAX_SIZE => Ok(size),
        _ => Err(format!("write a number of bytes up to {MAX_SIZE}, which is 16 MiB: a message takes no more")),
    }
}

fn concurrency(text: &str) -> Result<usize, String> {
    at_least_one(text, MAX_CONCURRENCY)
}

fn methods(text: &str) -> Result<usize, String> {
    at_least_one(text, 1000)
}

fn instances(text: &str) -> Result<usize, String> {
    at_least_one(text, 100)
}

fn at_least_one(text: &str, most: usize) -> Result<usize, String> {
    match text.parse() {
        Ok(number) if (1..=most).contains(&number) => Ok(number),
        _ => Err(format!("write a number from 1 to {most}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_ways_to_coalesce_read_as_they_are_written() {
        assert_eq!([0, 64, 1024, 1500, 16 * 1024].map(bytes), ["0 B", "64 B", "1 KiB", "1500 B", "16 KiB"]);
        for text in ["auto", "off", "1", "8"] {
            assert_eq!(coalesce(text).map(coalescing), Ok(text.to_owned()));
        }
    }

    #[test]
    fn what_cannot_be_measured_is_refused() {
        for text in ["0", "-1", "NaN", "inf", "1e9", "", "5s"] {
            assert!(seconds(text).is_err(), "{text}");
        }
        assert_eq!(seconds("0.05"), Ok(Duration::from_millis(50)));
        assert!(size("16777216").is_ok() && size("16777217").is_err() && size("-1").is_err());
        assert!(concurrency("0").is_err() && concurrency("65536").is_ok() && concurrency("65537").is_err());
    }
}
