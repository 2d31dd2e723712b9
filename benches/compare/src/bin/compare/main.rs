//! Runs every contender in every scenario, in turns, and writes the results to `performance.md` and `performance.svg`.

mod chart;
mod cpu;
mod document;
mod figures;
mod machine;
mod nats;
mod process;
mod promises;
mod results;
mod scenario;
mod wrap;

use std::path::PathBuf;

use anyhow::{Context, bail, ensure};
use clap::Parser;

use crate::nats::Nats;
use crate::process::Servers;
use crate::results::{Row, Run, Table};
use crate::scenario::{Contender, SCENARIOS, Scenario};

/// Measures Hopline against other ways to make the same call.
#[derive(Parser)]
struct Command {
    /// The RabbitMQ to use; all of its queues are this run's.
    #[arg(long)]
    url: String,
    /// The process of that RabbitMQ, whose CPU time is read.
    #[arg(long)]
    rabbitmq_pid: u32,
    /// What to call that RabbitMQ in the results.
    #[arg(long)]
    rabbitmq_version: String,
    /// The `hopline` command.
    #[arg(long)]
    hopline: PathBuf,
    /// The NATS server to start; NATS is left out without it.
    #[arg(long)]
    nats_server: Option<PathBuf>,
    /// A Python that has aio-pika, which is left out without it.
    #[arg(long)]
    python: Option<PathBuf>,
    /// A folder that has amqplib, which is left out without it.
    #[arg(long)]
    node_modules: Option<PathBuf>,
    /// Only the scenarios with so many calls in flight, such as 64,1000.
    #[arg(long, value_delimiter = ',')]
    in_flight: Vec<usize>,
    /// Only these.
    #[arg(long, value_enum, value_delimiter = ',')]
    contenders: Vec<Contender>,
    /// Seconds that a run measures.
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    /// How often each run is made; the results have the medians and the quartiles.
    #[arg(long, default_value_t = 7)]
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
    let scenarios: Vec<_> = SCENARIOS.iter().filter(|it| command.wants(it)).collect();
    ensure!(!scenarios.is_empty(), "nobody is measured with that --in-flight and those --contenders");
    // What cannot be written is better known before minutes of measuring.
    let document = document::open(&command.output)?;
    let nats = match &command.nats_server {
        Some(program) => Some(Nats::start(program).await?),
        None => None,
    };
    let servers = Servers {
        rabbitmq: &command.url,
        rabbitmq_pid: command.rabbitmq_pid,
        nats: nats.as_ref(),
        hopline: &command.hopline,
        python: command.python.as_deref(),
        node_modules: command.node_modules.as_deref(),
    };
    let machine = machine::describe(command)?;

    let mut tables = Vec::new();
    for scenario in scenarios {
        for table in measure(command, &servers, scenario).await {
            println!("\n{table}");
            tables.push(table);
        }
    }
    if let Some(nats) = nats {
        nats.stop().await?;
    }
    println!("\ncalls/s of hopline ÷ those of the others, as medians of the rounds:");
    for (title, ratios) in tables.iter().filter_map(|it| Some((&it.title, it.ratios()?))) {
        println!("  {title}: {ratios}");
    }
    let complete = tables.iter().all(Table::is_complete);
    document::write(document, &command.output, &machine, &tables)?;
    chart::write(&command.output, &tables)?;
    println!("\nwritten to {0}/performance.md and {0}/performance.svg", command.output.display());
    if complete { Ok(()) } else { bail!("some runs failed: see above") }
}

impl Command {
    fn wants(&self, scenario: &Scenario) -> bool {
        (self.in_flight.is_empty() || self.in_flight.contains(&scenario.concurrency))
            && scenario.contenders.iter().any(|it| self.compares(*it))
    }

    fn compares(&self, contender: Contender) -> bool {
        self.contenders.is_empty() || self.contenders.contains(&contender)
    }
}

/// All contenders one after the other, then all again the other way round, and so on: what else the machine does
/// meanwhile hits all alike.
async fn measure(command: &Command, servers: &Servers<'_>, scenario: &Scenario) -> Vec<Table> {
    println!("\n{scenario}");
    let contenders = scenario.contenders.iter().filter(|it| command.compares(**it) && servers.can_start(**it));
    let mut rows: Vec<_> = contenders.map(|contender| Row::new(*contender)).collect();
    for round in 1..=command.rounds {
        for row in &mut rows {
            let run = run(servers, row.contender, scenario, command.seconds).await;
            match &run {
                Ok(run) => println!("  round {round}  {}", results::line(row.contender, run)),
                Err(error) => eprintln!("  round {round}  {} failed: {error:#}", row.contender),
            }
            row.add(run.ok());
        }
        rows.reverse();
    }
    if command.rounds % 2 == 1 {
        rows.reverse();
    }
    Table::of(*scenario, rows)
}

/// One contender once, with a server of its own.
async fn run(servers: &Servers<'_>, contender: Contender, scenario: &Scenario, seconds: f64) -> anyhow::Result<Run> {
    let server = servers.start(contender).await.context("its server did not start")?;
    let run = server.call(scenario, seconds).await;
    server.stop().await?;
    run
}
