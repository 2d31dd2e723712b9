//! Many loads, each measured by `hopline bench call`, as a table and a chart: `scripts/bench-sweep` runs it.

mod load;
mod served;
mod chart;

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;

use load::{Coalesce, Figures, Load};
use served::Served;

/// How many calls are in flight.
const CONCURRENCY: [u32; 5] = [1, 8, 64, 256, 1024];
/// What each call sends and gets back, in bytes.
const SIZES: [u32; 3] = [64, 1024, 16 * 1024];

/// Measure 30 loads with the command `hopline`, and write a table and a chart of them.
///
/// 1, 8, 64, 256 and 1024 calls in flight, each with 64 B, 1 KiB and 16 KiB, each with calls that may share a message and
/// with calls that may not. Starts `hopline bench serve` for the time of the sweep, and `hopline bench call` for each
/// load. Writes `sweep.md` and `sweep.svg`, and prints each row of the table when it is measured.
///
/// Exits with 0 when both are written, with 1 and the error in one line on stderr when a call or a file failed, and with
/// 2 on bad usage.
#[derive(Parser)]
#[command(name = "sweep")]
struct Sweep {
    /// The command to measure; the one that cargo has built beside this program, if it is not given
    #[arg(long, value_name = "PATH")]
    hopline: Option<PathBuf>,
    /// The broker's address
    #[arg(long, env = "HOPLINE_URL", default_value = "amqp://localhost", hide_env_values = true)]
    url: String,
    /// The prefix of every name on the broker
    #[arg(long, default_value = "hopline-bench")]
    namespace: String,
    /// How long to measure each load, in seconds, such as 2 or 0.5; a warm-up of a fifth comes before it
    #[arg(long, default_value = "2")]
    seconds: String,
    /// The folder to write to
    #[arg(long, value_name = "DIR", default_value = "bench-sweep")]
    out: PathBuf,
}

/// The command `hopline`, and the broker that it goes to.
struct Hopline {
    program: PathBuf,
    url: String,
    namespace: String,
}

/// A load that was measured.
struct Point {
    load: Load,
    figures: Figures,
}

fn main() -> ExitCode {
    match Sweep::parse().run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(said) => {
            eprintln!("sweep: {said}");
            ExitCode::FAILURE
        }
    }
}

impl Sweep {
    fn run(self) -> Result<(), String> {
        let Self { hopline, url, namespace, seconds, out } = self;
        // Before the minute that the loads take.
        fs::create_dir_all(&out).map_err(|error| format!("cannot make `{}`: {error}", out.display()))?;
        let program = match hopline {
            Some(program) => program,
            None => beside("hopline").map_err(|error| format!("cannot find the command `hopline`: {error}"))?,
        };
        let hopline = Hopline { program, url, namespace };
        let served = Served::start(&hopline)?;
        println!("{HEAD}");
        let mut points = Vec::new();
        for load in loads() {
            let figures = load.measure(&hopline, &seconds)?;
            let point = Point { load, figures };
            println!("{}", row(&point));
            points.push(point);
        }
        served.end()?;
        write(&out.join("sweep.md"), &table(&points, &hopline, &seconds))?;
        write(&out.join("sweep.svg"), &chart::svg(&points, &CONCURRENCY, &SIZES)?)
    }
}

impl Hopline {
    /// Whether the broker ends with each process of the command, which therefore serves for itself.
    fn in_memory(&self) -> bool {
        self.url.trim_start().get(..7).is_some_and(|scheme| scheme.eq_ignore_ascii_case("memory:"))
    }
}

/// The path of another program in the folder of this one.
fn beside(name: &str) -> std::io::Result<PathBuf> {
    Ok(std::env::current_exe()?.with_file_name(format!("{name}{}", std::env::consts::EXE_SUFFIX)))
}

fn loads() -> Vec<Load> {
    let mut loads = Vec::new();
    for size in SIZES {
        for concurrency in CONCURRENCY {
            // Next to each other, so that what else the machine does meets both.
            for coalesce in Coalesce::BOTH {
                loads.push(Load { concurrency, size, coalesce });
            }
        }
    }
    loads
}

fn write(path: &Path, text: &str) -> Result<(), String> {
    fs::write(path, text).map_err(|error| format!("cannot write `{}`: {error}", path.display()))?;
    println!("wrote {}", path.display());
    Ok(())
}

const HEAD: &str = "\
| in flight | size | coalesce | calls/s | p50, µs | p99, µs | calls a message | CPU, µs a call |
| ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |";

fn row(Point { load, figures }: &Point) -> String {
    format!(
        "| {} | {} | {} | {:.0} | {} | {} | {} | {} |",
        load.concurrency,
        bytes(load.size),
        load.coalesce.name(),
        figures.calls_per_s,
        some(figures.p50_us, 0),
        some(figures.p99_us, 0),
        some(figures.calls_per_message, 2),
        some(figures.cpu_us_per_call, 1),
    )
}

/// A figure with so many digits after the point, or a dash where there is none.
fn some(figure: Option<f64>, digits: usize) -> String {
    figure.map_or_else(|| "-".to_owned(), |figure| format!("{figure:.digits$}"))
}

/// How table and chart name a size.
fn bytes(size: u32) -> String {
    match size {
        kib if kib >= 1024 && kib.is_multiple_of(1024) => format!("{} KiB", kib / 1024),
        bytes => format!("{bytes} B"),
    }
}

fn table(points: &[Point], hopline: &Hopline, seconds: &str) -> String {
    let (place, whose) = match hopline.in_memory() {
        true => ("the broker in memory, client and server in one process", "the process"),
        false => ("RabbitMQ, client and server in a process each", "the client"),
    };
    let mut text = format!(
        "# Calls through {place}\n\n\
         `scripts/bench-sweep`, Hopline {version}: each load was measured for {seconds} s after a warm-up. Sizes are those \
         of what a call sends and of what it gets back. CPU time is that of {whose}, user and system. [The \
         chart](sweep.svg) shows calls/s.\n\n{HEAD}\n",
        version = env!("CARGO_PKG_VERSION"),
    );
    for point in points {
        writeln!(text, "{}", row(point)).expect("a string takes all");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn points() -> Vec<Point> {
        let figures = |load: &Load| Figures {
            calls_per_s: f64::from(load.concurrency) * 1000.0,
            p50_us: Some(1234.0),
            p99_us: None,
            calls_per_message: Some(1.5),
            cpu_us_per_call: None,
            errors: 0,
        };
        loads().into_iter().map(|load| Point { figures: figures(&load), load }).collect()
    }

    #[test]
    fn the_table_has_a_row_for_each_load() {
        let hopline =
            Hopline { program: PathBuf::new(), url: "amqp://localhost".to_owned(), namespace: "bench".to_owned() };
        let table = table(&points(), &hopline, "2");
        assert!(table.starts_with("# Calls through RabbitMQ, client and server in a process each\n"), "{table}");
        let rows: Vec<&str> = table.lines().filter(|line| line.starts_with('|')).collect();
        assert_eq!(rows.len(), 2 + 30, "{table}");
        assert_eq!(rows[2], "| 1 | 64 B | auto | 1000 | 1234 | - | 1.50 | - |");
        assert_eq!(rows[31], "| 1024 | 16 KiB | off | 1024000 | 1234 | - | 1.50 | - |");
    }

    #[test]
    fn the_chart_has_a_line_for_each_size_and_way_to_coalesce() {
        let chart = chart::svg(&points(), &CONCURRENCY, &SIZES).expect("it can be drawn");
        assert!(chart.starts_with("<svg") && chart.trim_end().ends_with("</svg>"), "{chart}");
        for size in ["64 B", "1 KiB", "16 KiB"] {
            for coalesce in ["auto", "off"] {
                assert!(chart.contains(&format!("{size}, coalesce {coalesce}")), "{chart}");
            }
        }
    }
}
