//! Runs every contender in every scenario, in turns, and writes the results to `performance.md` and `performance.svg`.

mod chart;
mod document;
mod machine;
mod process;
mod results;
mod scenario;

use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::Parser;
use hopline_compare::Report;

use crate::process::{Nats, Servers};
use crate::results::{Row, Table};
use crate::scenario::{Contender, SCENARIOS, Scenario};

/// Measures Hopline against other ways to make the same call.
#[derive(Parser)]
struct Command {
    /// The RabbitMQ to use; all of its queues are this run's.
    #[arg(long)]
    url: String,
    /// What to call that RabbitMQ in the results.
    #[arg(long)]
    rabbitmq_version: String,
    /// The `hopline` command.
    #[arg(long)]
    hopline: PathBuf,
    /// The NATS server to start; NATS is left out without it.
    #[arg(long)]
    nats_server: Option<PathBuf>,
    /// Seconds that a run measures.
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    /// How often each run is made; the results have the medians.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Folder of `performance.md` and `performance.svg`.
    #[arg(long)]
    output: PathBuf,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let command = Command::parse();
    // Dropping what is under way ends the processes it started.
    tokio::select! {
        outcome = compare(&command) => outcome,
        told = hopline_compare::told_to_stop() => { told?; bail!("interrupted: nothing was written") }
    }
}

async fn compare(command: &Command) -> anyhow::Result<()> {
    // What cannot be written is better known before minutes of measuring.
    let document = document::open(&command.output)?;
    let machine = machine::describe(command)?;
    let nats = match &command.nats_server {
        Some(program) => Some(Nats::start(program).await?),
        None => None,
    };
    let servers = Servers { rabbitmq: &command.url, nats: nats.as_ref(), hopline: &command.hopline };

    let mut tables = Vec::new();
    for scenario in SCENARIOS {
        let table = measure(command, &servers, scenario).await;
        println!("\n{table}");
        tables.push(table);
    }
    if let Some(nats) = nats {
        nats.stop().await?;
    }
    let complete = tables.iter().all(Table::is_complete);
    document::write(document, &command.output, &machine, &tables)?;
    chart::write(&command.output, &tables)?;
    println!("\nwritten to {0}/performance.md and {0}/performance.svg", command.output.display());
    if complete { Ok(()) } else { bail!("some runs failed: see above") }
}

/// All contenders one after the other, and all again: what else the machine does meanwhile hits all alike.
async fn measure(command: &Command, servers: &Servers<'_>, scenario: &'static Scenario) -> Table {
    println!("\n{scenario}");
    let contenders = scenario.contenders.iter().filter(|it| **it != Contender::Nats || servers.nats.is_some());
    let mut rows: Vec<_> = contenders.map(|contender| Row::new(*contender)).collect();
    for round in 1..=command.rounds {
        for row in &mut rows {
            match run(servers, row.contender, scenario, command.seconds).await {
                Ok(report) => {
                    println!("  round {round}  {}", results::line(row.contender, &report));
                    row.add(report);
                }
                Err(error) => {
                    eprintln!("  round {round}  {} failed: {error:#}", row.contender);
                    row.failures += 1;
                }
            }
        }
    }
    Table { scenario, rows }
}

/// One contender once, with a server of its own.
async fn run(servers: &Servers<'_>, contender: Contender, scenario: &Scenario, seconds: f64) -> anyhow::Result<Report> {
    let server = servers.start(contender).await.context("its server did not start")?;
    let report = server.call(scenario, seconds).await;
    server.stop().await?;
    report
}
