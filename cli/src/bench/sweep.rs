//! `hopline bench sweep`: many loads, as a table and a chart.

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use clap::Args;
use hopline::{Coalesce, Error};
use indicatif::ProgressBar;
use serde_bytes::ByteBuf;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

use super::load::{Load, Style};
use super::report::{Measured, some};
use super::serve::{Offer, READY, SERVICE, Serving, echo};
use super::{Broker, Failed, bytes, chart, coalescing, print, progress, seconds};

/// How many calls are in flight.
pub(super) const CONCURRENCY: [usize; 5] = [1, 8, 64, 256, 1024];
/// What each sends and gets back, in bytes.
pub(super) const SIZES: [usize; 3] = [64, 1024, 16 * 1024];
/// Which may share a message.
pub(super) const COALESCE: [Coalesce; 2] = [Coalesce::Auto, Coalesce::Off];

/// Measure 30 loads, and write a table and a chart of them.
///
/// 1, 8, 64, 256 and 1024 calls in flight, each with 64 B, 1 KiB and 16 KiB, each with calls that may share a message and
/// with calls that may not. The server side is a process of its own, started and ended by this one; with
/// `--url memory://` it is in this process. Writes `sweep.md` and `sweep.svg`.
///
/// Exits with 0 when both are written, with 1 and the error in one line on stderr when a call or a file failed, and with
/// 2 on bad usage.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  hopline bench sweep --url amqp://localhost\n  hopline bench sweep --url memory:// --seconds 0.5 --out memory"
)]
pub(crate) struct Sweep {
    #[command(flatten)]
    broker: Broker,
    /// How long to measure each load, in seconds, such as 2 or 0.5; a warm-up of a fifth comes before it
    #[arg(long, default_value = "2", value_parser = seconds)]
    seconds: Duration,
    /// The folder to write to
    #[arg(long, value_name = "DIR", default_value = "bench-sweep")]
    out: PathBuf,
}

/// A load that was measured.
pub(super) struct Point {
    pub(super) load: Load,
    pub(super) measured: Measured,
}

impl Sweep {
    pub(super) async fn run(self) -> Result<(), Failed> {
        let Self { broker, seconds, out } = self;
        // Before the minute that the loads take.
        fs::create_dir_all(&out).map_err(|error| Failed::at(format!("cannot make `{}`", out.display()), error))?;
        let loads = loads(seconds);
        let other = Other::start(&broker).await?;
        let bar = progress(loads.iter().map(Load::length).sum());
        let points = points(&loads, &broker, &bar).await;
        bar.finish_and_clear();
        other.end().await?;

        let points = points?;
        write(&out.join("sweep.md"), &table(&points, &broker, seconds))?;
        write(&out.join("sweep.svg"), &chart::svg(&points)?)
    }
}

fn loads(measured: Duration) -> Vec<Load> {
    let mut loads = Vec::new();
    for size in SIZES {
        for concurrency in CONCURRENCY {
            // Next to each other, so that what else the machine does meets both.
            for coalesce in COALESCE {
                loads.push(Load { concurrency, size, coalesce, style: Style::Call, methods: 1, measured });
            }
        }
    }
    loads
}

async fn points(loads: &[Load], broker: &Broker, bar: &ProgressBar) -> Result<Vec<Point>, Failed> {
    let mut points = Vec::new();
    for load in loads {
        let Load { concurrency, size, coalesce, .. } = *load;
        let named = format!("{concurrency} in flight, {}, coalesce {}", bytes(size), coalescing(coalesce));
        bar.set_prefix(format!("{named} "));
        let measured = load.run(broker, bar).await?;
        if let Some(first) = measured.first_error {
            let errors = measured.errors;
            return Err(Failed::Run(format!("{named}: {errors} calls failed, the first one with: {first}")));
        }
        points.push(Point { load: *load, measured });
    }
    Ok(points)
}

fn write(path: &Path, text: &str) -> Result<(), Failed> {
    fs::write(path, text).map_err(|error| Failed::at(format!("cannot write `{}`", path.display()), error))?;
    print(&format!("wrote {}", path.display()))
}

fn table(points: &[Point], broker: &Broker, seconds: Duration) -> String {
    let (place, whose) = match broker.in_memory() {
        true => ("the broker in memory, client and server in one process", "the process"),
        false => ("RabbitMQ, client and server in a process each", "the client"),
    };
    let mut text = format!(
        "# Calls through {place}\n\n\
         `hopline bench sweep` {version}: each load was measured for {seconds:?} after a warm-up. Sizes are those of what a \
         call sends and of what it gets back. CPU time is that of {whose}, user and system. [The chart](sweep.svg) shows \
         calls/s.\n\n\
         | in flight | size | coalesce | calls/s | p50, µs | p99, µs | calls a message | CPU, µs a call |\n\
         | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |\n",
        version = env!("CARGO_PKG_VERSION"),
    );
    for Point { load, measured } in points {
        writeln!(
            text,
            "| {} | {} | {} | {:.0} | {} | {} | {} | {} |",
            load.concurrency,
            bytes(load.size),
            coalescing(load.coalesce),
            measured.calls_per_second(),
            some(measured.latency(0.5), 0),
            some(measured.latency(0.99), 0),
            some(measured.calls_per_message(), 2),
            some(measured.cpu_per_call(), 1),
        )
        .expect("a string takes all");
    }
    text
}

/// The server side of a sweep.
enum Other {
    Here(Serving),
    Process(Child),
}

impl Other {
    async fn start(broker: &Broker) -> Result<Self, Failed> {
        if broker.in_memory() {
            let offer = Offer { instances: 1, work_us: 0, methods: 1, quorum: false };
            return Ok(Self::Here(Serving::start(broker, &offer).await?));
        }
        nobody_serves_yet(broker).await?;
        let failed = |error| Failed::at("cannot start the server side, `hopline bench serve`", error);
        let program = std::env::current_exe().map_err(failed)?;
        let mut serve = Command::new(program);
        serve.args(["bench", "serve", "--until-input-ends", "--namespace", &broker.namespace]);
        broker.address.give_to(&mut serve);
        serve.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
        let mut process = serve.spawn().map_err(failed)?;
        let printed = process.stdout.take().expect("it is piped");
        match BufReader::new(printed).lines().next_line().await.map_err(failed)? {
            Some(line) if line == READY => Ok(Self::Process(process)),
            _ => Err(Failed::Run("the server side, `hopline bench serve`, ended before it served".to_owned())),
        }
    }

    async fn end(self) -> Result<(), Failed> {
        let mut process = match self {
            Self::Here(serving) => {
                serving.drain().await;
                return Ok(());
            }
            Self::Process(process) => process,
        };
        // It ends with its input, which is how it ends when this process is killed, too.
        drop(process.stdin.take());
        match process.wait().await {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => Err(Failed::Run(format!("the server side, `hopline bench serve`, failed: {status}"))),
            Err(error) => Err(Failed::at("cannot wait for the server side, `hopline bench serve`", error)),
        }
    }
}

/// A server of somebody else's would take a part of the calls.
async fn nobody_serves_yet(broker: &Broker) -> Result<(), Failed> {
    let client = broker.client(Coalesce::default()).await?;
    // The broker knows at once whether there is anybody to ask.
    let asked = client
        .call::<ByteBuf>(SERVICE, &echo(0), (ByteBuf::new(),))
        .all()
        .replies(Duration::from_secs(30))
        .await
        .map(drop);
    client.close().await;
    match asked {
        Err(Error::NoService { .. }) => Ok(()),
        Err(error) => Err(error.into()),
        Ok(()) => Err(Failed::Run(format!(
            "somebody already serves `{SERVICE}` in the namespace `{}`: end that, or name another by `--namespace`",
            broker.namespace
        ))),
    }
}
