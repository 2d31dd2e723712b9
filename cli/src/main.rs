//! The command `hopline`: calls, who serves what, dead letters and benchmarks from a shell.

mod address;
mod arguments;
mod call;
mod repeat;
mod verbose;
mod publish;
mod subscribe;
mod serve;
mod ls;
mod info;
mod schema;
mod generate;
mod stats;
mod ping;
mod watch;
mod drain;
mod rules;
mod top;
mod tap;
mod asking;
mod dead;
mod groups;
mod doctor;
mod bench;
mod context;
mod generated;
mod defaults;
mod input;
mod signals;
mod failed;
mod printed;

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use hopline::blocking::wait;
use tracing_subscriber::EnvFilter;

use crate::failed::Failed;

/// Remote procedure calls over RabbitMQ, from a shell.
///
/// A setting is taken from the first of these that has it: an option, a HOPLINE_* variable, the context that `--context`
/// or HOPLINE_CONTEXT names, the context that is selected, the default. Where `--url` or HOPLINE_URL says the address,
/// no context is used.
#[derive(Parser)]
#[command(
    name = "hopline",
    version,
    arg_required_else_help = true,
    after_help = "Examples:\n  hopline ls --url amqp://broker.example.com\n  hopline call demo.add '[2, 3]'"
)]
struct Command {
    /// The context to use: see `hopline context`
    #[arg(long, global = true, value_name = "NAME", env = defaults::CONTEXT, hide_env_values = true)]
    context: Option<String>,
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    Call(call::Call),
    Publish(publish::Publish),
    Subscribe(subscribe::Subscribe),
    Serve(serve::Serve),
    Ls(ls::Ls),
    Info(info::Info),
    Schema(schema::Schema),
    Generate(generate::Generate),
    Stats(stats::Stats),
    Ping(ping::Ping),
    Watch(watch::Watch),
    Drain(drain::Drain),
    #[command(subcommand)]
    Rules(rules::Rules),
    Top(top::Top),
    Tap(tap::Tap),
    #[command(subcommand)]
    Dead(dead::Dead),
    #[command(subcommand)]
    Groups(groups::Group),
    Doctor(doctor::Doctor),
    #[command(subcommand)]
    Bench(bench::Bench),
    #[command(subcommand)]
    Context(context::Contextual),
    Completions(generated::Completions),
    Man(generated::Manual),
}

fn main() -> ExitCode {
    // Known even if the rest cannot be read.
    let json = std::env::args_os().any(|argument| argument == "--json");
    let command = match defaults::filled(Command::command()) {
        Ok(command) => command,
        Err(failed) => return failed::ended(Err(failed), json),
    };
    // Wrong usage ends here, with the exit code 2.
    let Command { context, what } =
        match command.try_get_matches().and_then(|matches| Command::from_arg_matches(&matches)) {
            Ok(command) => command,
            Err(error) => return told(&error, json),
        };
    // lapin would log returned messages, refusals and lost connections. The command prints the outcome of its call
    // below, so lapin is silent.
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn,lapin=off"));
    let ansi = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    // A line of the log would spoil a screen.
    if !(matches!(what, What::Top(_)) && std::io::stderr().is_terminal()) {
        let log = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(ansi).with_writer(std::io::stderr);
        // Whoever reads errors as JSON can then read all of it.
        if json { log.json().flatten_event(true).with_current_span(false).init() } else { log.init() }
    }
    let outcome = match what {
        What::Call(call) => wait(call.run()),
        What::Publish(publish) => wait(publish.run()),
        What::Subscribe(subscribe) => wait(subscribe.run()),
        What::Serve(serve) => wait(serve.run()),
        What::Ls(ls) => wait(ls.run()),
        What::Info(info) => wait(info.run()),
        What::Schema(schema) => wait(schema.run()),
        What::Generate(generate) => wait(generate.run()),
        What::Stats(stats) => wait(stats.run()),
        What::Ping(ping) => wait(ping.run()),
        What::Watch(watch) => wait(watch.run()),
        What::Drain(drain) => wait(drain.run()),
        What::Rules(rules) => wait(rules.run()),
        What::Top(top) => wait(top.run()),
        What::Tap(tap) => wait(tap.run()),
        What::Dead(dead) => wait(dead.run()),
        What::Groups(groups) => wait(groups.run()),
        What::Doctor(doctor) => wait(doctor.run()),
        What::Bench(bench) => bench.run(),
        What::Context(contextual) => contextual.run(context.as_deref()),
        What::Completions(completions) => completions.run(Command::command()),
        What::Man(manual) => manual.run(Command::command()),
    };
    failed::ended(outcome, json)
}

/// Prints the help, or what is wrong with the usage. The latter may quote an address with a password, so it is replaced
/// in that case.
fn told(error: &clap::Error, json: bool) -> ExitCode {
    let quoted = error.to_string();
    let is_quoted = std::env::args_os().any(|argument| {
        let argument = argument.to_string_lossy();
        let value = argument.strip_prefix("--").and_then(|option| option.split_once('=')).map(|(_, value)| value);
        let value = value.unwrap_or(&argument);
        // The arguments of a call are JSON, and may contain anything, or `@` and the name of a file.
        let is_json = value.starts_with(['[', '{', '"']);
        let is_file = value.rfind('@') == Some(0) && !value.contains("://");
        !is_json && !is_file && (value.contains('@') || value.contains("://")) && quoted.contains(value)
    });
    let misplaced = "an address stands where none is expected: it is given by `--url` or HOPLINE_URL (see `--help`)";
    if json && error.use_stderr() && error.kind() != ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        let lines = quoted.lines().take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more"));
        let line = lines.map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join(" ");
        let said = if is_quoted { misplaced } else { line.trim_start_matches("error: ") };
        return failed::ended(Err(Failed::usage(said.to_owned())), json);
    }
    if is_quoted {
        eprintln!("error: {misplaced}");
        return ExitCode::from(2);
    }
    // An error means that nobody reads this.
    let _ = error.print();
    ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Calls `see` for a command and all in it, each with its words.
    fn walk(command: &clap::Command, words: &str, see: &mut dyn FnMut(&clap::Command, &str)) {
        see(command, words);
        for inner in command.get_subcommands().filter(|command| command.get_name() != "help") {
            walk(inner, &format!("{words} {}", inner.get_name()), see);
        }
    }

    #[test]
    fn the_commands_fit_together() {
        Command::command().debug_assert();
    }

    #[test]
    fn the_help_of_each_command_has_an_example_of_it() {
        walk(&Command::command(), "hopline", &mut |command, words| {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            let has_one = help.starts_with("Example") && help.lines().any(|line| line.contains(words));
            assert!(has_one, "`{words}` has no example: {help}");
        });
    }
}
