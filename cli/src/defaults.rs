//! Where options that are not given get their values: from HOPLINE_* variables, from a context, or else by default.

use std::ffi::OsString;

use clap::builder::Resettable;
use clap::parser::ValueSource;
use clap::{Arg, ArgMatches, Command, value_parser};
use hopline::environment;

use crate::context::{Contexts, Settings};
use crate::failed::Failed;

/// The variable that names a context.
pub(crate) const CONTEXT: &str = "HOPLINE_CONTEXT";

/// The command with the values of the context that is in use as its defaults: an option and a variable go before them.
///
/// # Errors
/// When the context that is to be used cannot be read, or not be used with an address that is given, too.
pub(crate) fn filled(command: Command) -> Result<Command, Failed> {
    let Some(settings) = in_use(&command)? else { return Ok(without_empty_variables(command)) };
    let with_setting = |arg: Arg| match arg.get_env().and_then(|name| settings.value(name.to_str()?)) {
        // There may be a password in it.
        Some(value) => arg.default_value(value).hide_default_value(true),
        None => arg,
    };
    Ok(without_empty_variables(changed(command, &with_setting)))
}

/// The context that this run of the command uses.
fn in_use(command: &Command) -> Result<Option<Settings>, Failed> {
    // Values are only read as text here: what is behind `-` and `@FILE` is read once, later.
    let as_text = |arg: Arg| match arg.get_action().takes_values() {
        true => arg.value_parser(value_parser!(OsString)),
        false => arg,
    };
    // What is wrong with the usage is told later, too.
    let texts = changed(without_empty_variables(command.clone()), &as_text);
    let Ok(matches) = texts.try_get_matches() else { return Ok(None) };
    let (command, matches) = innermost(command, &matches);
    if !command.get_arguments().any(|arg| arg.get_env().is_some_and(|name| name == environment::URL)) {
        return Ok(None);
    }
    let named = matches.get_one::<OsString>("context").map(|name| name.to_string_lossy());
    let is_option = |id| matches.value_source(id) == Some(ValueSource::CommandLine);
    match matches.value_source("url") {
        Some(ValueSource::CommandLine) if is_option("context") => {
            Err(Failed::usage("a context has an address: say `--context` or `--url`".to_owned()))
        }
        Some(ValueSource::EnvVariable) if is_option("context") => Err(Failed::usage(format!(
            "{} goes before a context: unset it, or leave out `--context`",
            environment::URL
        ))),
        Some(ValueSource::CommandLine | ValueSource::EnvVariable) => Ok(None),
        _ => {
            let contexts = Contexts::read()?;
            Ok(contexts.in_use(named.as_deref())?.map(|(_, settings)| settings.clone()))
        }
    }
}

/// The command that was named last, and what was matched there.
fn innermost<'a>(command: &'a Command, matches: &'a ArgMatches) -> (&'a Command, &'a ArgMatches) {
    match matches.subcommand().and_then(|(name, matches)| Some((command.find_subcommand(name)?, matches))) {
        Some((command, matches)) => innermost(command, matches),
        None => (command, matches),
    }
}

/// Makes empty environment variables count as not set, as they do in the library.
fn without_empty_variables(command: Command) -> Command {
    let is_empty = |arg: &Arg| arg.get_env().and_then(std::env::var_os).is_some_and(|value| value.is_empty());
    changed(command, &|arg| if is_empty(&arg) { arg.env(Resettable::Reset) } else { arg })
}

/// Changes all arguments of a command and of the commands in it.
fn changed(command: Command, change: &dyn Fn(Arg) -> Arg) -> Command {
    let command = command.mut_args(change);
    let names: Vec<_> = command.get_subcommands().map(|command| command.get_name().to_owned()).collect();
    names.into_iter().fold(command, |command, name| command.mut_subcommand(name, |command| changed(command, change)))
}
