//! The command `hopline`: calls, who serves what, dead letters and benchmarks from a shell.

mod address;
mod call;
mod ls;
mod info;
mod stats;
mod ping;
mod watch;
mod asking;
mod dead;
mod bench;
mod failed;
mod printed;

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::builder::Resettable;
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
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
    Ls(ls::Ls),
    Info(info::Info),
    Stats(stats::Stats),
    Ping(ping::Ping),
    Watch(watch::Watch),
    #[command(subcommand)]
    Dead(dead::Dead),
    #[command(subcommand)]
    Bench(bench::Bench),
}

fn main() -> ExitCode {
    // Wrong usage ends here, with the exit code 2.
    let command = without_empty_variables(Command::command());
    let command = match command.try_get_matches().and_then(|matches| Command::from_arg_matches(&matches)) {
        Ok(command) => command,
        Err(error) => return told(&error),
    };
    // lapin would log returned messages, refusals and lost connections. The command prints the outcome of its call
    // below, so lapin is silent.
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn,lapin=off"));
    let ansi = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(ansi).with_writer(std::io::stderr).init();
    match command.what {
        What::Call(call) => call.run(),
        What::Ls(ls) => failed::ended(hopline::blocking::wait(ls.run())),
        What::Info(info) => failed::ended(hopline::blocking::wait(info.run())),
        What::Stats(stats) => failed::ended(hopline::blocking::wait(stats.run())),
        What::Ping(ping) => failed::ended(hopline::blocking::wait(ping.run())),
        What::Watch(watch) => failed::ended(hopline::blocking::wait(watch.run())),
        What::Dead(dead) => dead.run(),
        What::Bench(bench) => bench.run(),
    }
}

/// Makes empty environment variables count as not set, as they do in the library.
fn without_empty_variables(command: clap::Command) -> clap::Command {
    let is_empty =
        |argument: &clap::Arg| argument.get_env().and_then(std::env::var_os).is_some_and(|value| value.is_empty());
    let command = command.mut_args(|argument| match is_empty(&argument) {
        true => argument.env(Resettable::Reset),
        false => argument,
    });
    let names: Vec<_> = command.get_subcommands().map(|command| command.get_name().to_owned()).collect();
    names.into_iter().fold(command, |command, name| command.mut_subcommand(name, without_empty_variables))
}

/// Prints the help, or what is wrong with the usage. The latter may quote an address with a password, so it is replaced
/// in that case.
fn told(error: &clap::Error) -> ExitCode {
    let quoted = error.to_string();
    let is_quoted = std::env::args().any(|argument| {
        let value = argument.strip_prefix("--").and_then(|option| option.split_once('=')).map(|(_, value)| value);
        let value = value.unwrap_or(&argument);
        // The arguments of a call are JSON, and may contain anything, or `@` and the name of a file.
        let is_json = value.starts_with(['[', '{', '"']);
        let is_file = value.rfind('@') == Some(0) && !value.contains("://");
        !is_json && !is_file && (value.contains('@') || value.contains("://")) && quoted.contains(value)
    });
    if is_quoted {
        eprintln!(
            "error: an address stands where none is expected: it is given by `--url` or HOPLINE_URL (see `--help`)"
        );
        return ExitCode::from(2);
    }
    // An error means that nobody reads this.
    let _ = error.print();
    ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2))
}
