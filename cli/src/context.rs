//! `hopline context`: named settings for brokers.

mod kept;

use clap::{Args, Subcommand};
use serde_json::{Value, json};

pub(crate) use self::kept::{Contexts, Settings};
use crate::address::Address;
use crate::failed::Failed;
use crate::printed::{json, one_line, print, table};

/// Keep settings for brokers under names.
///
/// A setting is taken from the first of these that has it: an option, a HOPLINE_* variable, the context that `--context`
/// or HOPLINE_CONTEXT names, the context that is selected, the default. Where `--url` or HOPLINE_URL says the address,
/// no context is used at all, so that no broker gets the certificates or the namespace that are meant for another.
#[derive(Subcommand)]
#[command(
    after_help = "Examples:\n  hopline context add prod --url amqps://me:secret@broker.example.com --ca ca.pem\n  hopline context select prod\n  hopline ls --context staging"
)]
pub(crate) enum Contextual {
    Add(Add),
    Ls(List),
    Select(Select),
    Show(ShowOne),
    Rm(Remove),
}

/// Keep a context.
///
/// The file is $XDG_CONFIG_HOME/hopline/contexts.json, or ~/.config/hopline/contexts.json. Only its owner may read it,
/// since there may be passwords in it.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  hopline context add local --url amqp://localhost\n  hopline context add prod --url amqps://broker.example.com --namespace shop --cert me.pem --key me.key"
)]
pub(crate) struct Add {
    /// Its name
    #[arg(value_name = "NAME", value_parser = name)]
    added: String,
    #[command(flatten)]
    settings: Settings,
    /// Replace the context that has this name
    #[arg(long)]
    replace: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// List the contexts. A * stands before the one that is selected
#[derive(Args)]
#[command(after_help = "Example:\n  hopline context ls")]
pub(crate) struct List {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Use a context wherever no other is named. Without a name: none
#[derive(Args)]
#[command(after_help = "Examples:\n  hopline context select prod\n  hopline context select")]
pub(crate) struct Select {
    /// Its name
    #[arg(value_name = "NAME")]
    selected: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Show a context, without its password. Without a name: the one that is in use
#[derive(Args)]
#[command(after_help = "Examples:\n  hopline context show prod\n  hopline context show --json")]
pub(crate) struct ShowOne {
    /// Its name
    #[arg(value_name = "NAME")]
    shown: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Remove a context
#[derive(Args)]
#[command(after_help = "Example:\n  hopline context rm prod")]
pub(crate) struct Remove {
    /// Its name
    #[arg(value_name = "NAME")]
    removed: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Contextual {
    /// Runs the command. `named` is the context that `--context` or HOPLINE_CONTEXT names.
    pub(crate) fn run(self, named: Option<&str>) -> Result<(), Failed> {
        let contexts = Contexts::read()?;
        match self {
            Self::Add(add) => add.run(contexts),
            Self::Ls(List { json }) => listed(&contexts, json),
            Self::Select(Select { selected, json }) => select(contexts, selected, json),
            Self::Show(ShowOne { shown, json }) => show(&contexts, shown.as_deref().or(named), json),
            Self::Rm(Remove { removed, json }) => remove(contexts, &removed, json),
        }
    }
}

impl Add {
    fn run(self, mut contexts: Contexts) -> Result<(), Failed> {
        let Self { added, settings, replace, json } = self;
        if contexts.contexts.contains_key(&added) && !replace {
            return Err(Failed::run(format!("the context `{added}` is there: `--replace` replaces it")));
        }
        let settings = settings.anywhere().map_err(|error| Failed::at("this folder has no path", error))?;
        Address::check(&settings)?;
        contexts.contexts.insert(added.clone(), settings);
        contexts.write()?;
        said(json, "added", &added)
    }
}

fn listed(contexts: &Contexts, as_json: bool) -> Result<(), Failed> {
    let all = contexts.contexts.iter().map(|(name, settings)| (name, settings.shown()));
    let is_selected = |name: &String| contexts.selected.as_ref() == Some(name);
    if as_json {
        let all = all.map(|(name, shown)| with_name(name, is_selected(name), &shown));
        return Ok(print(&json(&all.collect::<Vec<_>>()))?);
    }
    let row = |(name, shown): (&String, Settings)| {
        let mark = if is_selected(name) { "*" } else { "" };
        [mark.to_owned(), name.clone(), shown.url, shown.namespace.unwrap_or_else(|| "-".to_owned())]
    };
    let head = ["", "NAME", "URL", "NAMESPACE"].map(str::to_owned);
    Ok(print(&table(std::iter::once(head).chain(all.map(row)).collect()))?)
}

fn select(mut contexts: Contexts, name: Option<String>, json: bool) -> Result<(), Failed> {
    if let Some(name) = &name {
        contexts.named(name)?;
    }
    contexts.selected = name.clone();
    contexts.write()?;
    said(json, "selected", name.as_deref().unwrap_or("none"))
}

fn show(contexts: &Contexts, name: Option<&str>, as_json: bool) -> Result<(), Failed> {
    let Some((name, settings)) = contexts.in_use(name)? else {
        return Err(Failed::run("no context is selected: `hopline context select NAME` selects one".to_owned()));
    };
    let told = with_name(name, contexts.selected.as_deref() == Some(name), &settings.shown());
    if as_json {
        return Ok(print(&json(&told))?);
    }
    let line = |(name, value): (&String, &Value)| {
        let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        one_line(&format!("{name:<15}  {value}"))
    };
    let lines: Vec<_> = told.as_object().into_iter().flatten().map(line).collect();
    Ok(print(&lines.join("\n"))?)
}

fn remove(mut contexts: Contexts, name: &str, json: bool) -> Result<(), Failed> {
    contexts.named(name)?;
    contexts.contexts.remove(name);
    contexts.selected = contexts.selected.filter(|selected| selected != name);
    contexts.write()?;
    said(json, "removed", name)
}

fn with_name(name: &str, is_selected: bool, settings: &Settings) -> Value {
    let mut told = json!({ "context": name, "selected": is_selected });
    let settings = json!(settings);
    if let (Some(told), Value::Object(settings)) = (told.as_object_mut(), settings) {
        told.extend(settings);
    }
    told
}

/// Prints what was done.
fn said(as_json: bool, done: &str, name: &str) -> Result<(), Failed> {
    Ok(print(&if as_json { json(&json!({ done: name })) } else { format!("{done} {}", one_line(name)) })?)
}

fn name(text: &str) -> Result<String, String> {
    let is_word = |c: char| c.is_ascii_alphanumeric() || ['_', '-', '.'].contains(&c);
    match !text.is_empty() && text.chars().all(is_word) {
        true => Ok(text.to_owned()),
        false => Err("write letters, digits, `_`, `-` and `.`".to_owned()),
    }
}
