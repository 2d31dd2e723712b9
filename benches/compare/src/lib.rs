//! What all contenders have in common: the command line, the load, and the report of how it went.

pub mod plain_client;

use std::io::Write;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, ensure};
use bytes::Bytes;
use clap::{Args, Subcommand, ValueEnum};
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::timeout;

/// What one process of a contender does.
#[derive(Subcommand)]
pub enum Role {
    /// Answers calls until SIGTERM; prints `serving` when it can be called.
    Serve {
        /// Where to serve: a broker's address, or the server's own.
        #[arg(long)]
        url: String,
    },
    /// Makes calls and prints one JSON object about them.
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
    /// Median latency in microseconds.
    pub p50_us: f64,
    /// What 99 % of the calls stay within.
    pub p99_us: f64,
    /// What 99.9 % of the calls stay within.
    pub p999_us: f64,
    /// Answered calls.
    pub calls: u64,
    /// Calls that failed, or whose reply was not what was sent.
    pub errors: u64,
    /// Calls in flight.
    pub concurrency: usize,
    /// Bytes of a payload.
    pub size: usize,
}

/// Calls before these are made are not measured: connections grow their buffers, threads start.
const WARM_UP: Duration = Duration::from_secs(1);

/// A contender whose first call takes longer does not work.
const FIRST_CALL_WITHIN: Duration = Duration::from_secs(10);

/// Makes calls as `load` says, and prints the report.
///
/// `call` makes one call and gives back its reply, which is compared with what was sent.
pub async fn run<C, F, R>(load: Load, call: C) -> anyhow::Result<()>
where
    C: Fn(Bytes) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = anyhow::Result<R>> + Send + 'static,
    R: AsRef<[u8]> + Send + 'static,
{
    ensure!(load.concurrency > 0, "--concurrency is 0: nothing would be called");
    let probe = payload(0, load.size);
    let reply = timeout(FIRST_CALL_WITHIN, call(probe.clone())).await.context("the first call was not answered")?;
    ensure!(reply?.as_ref() == probe, "the first reply is not what was sent");

    let begin = Instant::now() + WARM_UP;
    let end = begin + Duration::from_secs_f64(load.seconds);
    let tasks: Vec<_> = (0..load.concurrency)
        .map(|task| tokio::spawn(caller(call.clone(), payload(task, load.size), begin, end)))
        .collect();

    let mut latencies = Histogram::<u64>::new(3)?;
    let (mut errors, mut first_error) = (0, None);
    for task in tasks {
        let outcome = task.await??;
        for value in outcome.latencies.iter_recorded() {
            latencies.record_n(value.value_iterated_to(), value.count_at_value().into())?;
        }
        errors += outcome.errors;
        first_error = first_error.or(outcome.first_error);
    }
    // The last calls end a little late, and count: so does their time.
    let elapsed = begin.elapsed().as_secs_f64();
    if let Some(error) = first_error {
        eprintln!("{errors} calls failed, the first one: {error:#}");
    }
    let report = Report {
        calls_per_s: latencies.len() as f64 / elapsed,
        p50_us: microseconds(&latencies, 0.5),
        p99_us: microseconds(&latencies, 0.99),
        p999_us: microseconds(&latencies, 0.999),
        calls: latencies.len(),
        errors,
        concurrency: load.concurrency,
        size: load.size,
    };
    println!("{}", serde_json::to_string(&report)?);
    Ok(())
}

/// How it went for one of the tasks.
struct Outcome {
    latencies: Histogram<u32>,
    errors: u64,
    first_error: Option<anyhow::Error>,
}

/// Makes one call after the other until `end`, and counts those made since `begin`.
async fn caller<C, F, R>(call: C, payload: Bytes, begin: Instant, end: Instant) -> anyhow::Result<Outcome>
where
    C: Fn(Bytes) -> F,
    F: Future<Output = anyhow::Result<R>>,
    R: AsRef<[u8]>,
{
    let mut outcome = Outcome { latencies: Histogram::new(3)?, errors: 0, first_error: None };
    loop {
        let sent = Instant::now();
        if sent >= end {
            return Ok(outcome);
        }
        let reply = call(payload.clone()).await;
        let latency = sent.elapsed();
        if sent < begin {
            continue;
        }
        match reply {
            Ok(reply) if reply.as_ref() == payload => outcome.latencies.record(latency.as_micros() as u64)?,
            Ok(_) => outcome.failed(anyhow!("the reply is not what was sent")),
            Err(error) => outcome.failed(error),
        }
    }
}

impl Outcome {
    fn failed(&mut self, error: anyhow::Error) {
        self.errors += 1;
        self.first_error.get_or_insert(error);
    }
}

/// Different for each task, so that a reply that went to another one is seen.
fn payload(task: usize, size: usize) -> Bytes {
    (0..size).map(|position| (position * 31 + task * 17) as u8).collect()
}

fn microseconds(latencies: &Histogram<u64>, quantile: f64) -> f64 {
    latencies.value_at_quantile(quantile) as f64
}

/// Tells whoever started this server that it can be called.
pub fn announce() -> anyhow::Result<()> {
    let mut stdout = std::io::stdout();
    writeln!(stdout, "serving")?;
    stdout.flush()?;
    Ok(())
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
