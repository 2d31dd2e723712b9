//! The `hopline` command.

mod call;
mod dead;
mod bench;

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

/// Remote procedure calls over RabbitMQ, from a shell.
#[derive(Parser)]
#[command(name = "hopline", version, arg_required_else_help = true)]
struct Command {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    Call(call::Call),
    #[command(subcommand)]
    Dead(dead::Dead),
    #[command(subcommand)]
    Bench(bench::Bench),
}

fn main() -> ExitCode {
    // Bad usage ends here, with exit code 2.
    let command = Command::parse();
    // lapin logs returned messages, refusals and ends of connections: what became of the call is told once, below.
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn,lapin=off"));
    let ansi = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(ansi).with_writer(std::io::stderr).init();
    match command.what {
        What::Call(call) => call.run(),
        What::Dead(dead) => dead.run(),
        What::Bench(bench) => bench.run(),
    }
}
