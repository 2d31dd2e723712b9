//! `hopline dead`: shows an operator what services could not run, and replays or drops it.

use std::io::{self, IsTerminal};
use std::time::Duration;

use clap::{Args, Subcommand};
use hopline::{
    DeadLetter, DeadLetters, DeadLettersBuilder, Error, Fate, Handled, LetterKind, Listed, WhichLetters, environment,
};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use crate::address::{Address, Namespace, closed, said, within};
use crate::asking::service;
use crate::failed::{Failed, tell};
use crate::printed::{age, json, one_line, print, table};

/// List, replay and drop dead letters.
///
/// A service's dead letters are oneway calls that have failed in every attempt, and messages that no attempt could
/// help. Exits with 0 when everything was done, with 1 and an error on stderr when something was not, for example when
/// a queue cannot be reached, and with 2 on wrong usage.
#[derive(Subcommand)]
#[command(after_help = "Examples:\n  hopline dead ls\n  hopline dead replay mail --all")]
pub(crate) enum Dead {
    /// List the dead letters of a service, the oldest first. Without a service: how many each service has, whether it
    /// runs or not
    Ls(Ls),
    /// Show everything that is known of one dead letter
    Show(Show),
    /// Run oneway calls again, with the ids that they had
    ///
    /// Each call is sent to the service's queue, and removed from the dead letters after the broker has confirmed it.
    /// If the command is interrupted between the two, the call may run twice. Calls with a reply are kept, since nobody
    /// waits for their replies any more.
    Replay(Replay),
    /// Remove dead letters for good
    #[command(name = "drop")]
    Discard(Discard),
}

/// How long connecting may take by default.
const CONNECTING: Duration = Duration::from_secs(30);

/// Where the dead letters are, and how long to wait for them.
#[derive(Args)]
struct Broker {
    #[command(flatten)]
    address: Address,
    #[command(flatten)]
    namespace: Namespace,
    /// How long connecting may take, and then each answer of a queue, such as 500ms or 5s [default: 30s to connect, 8s
    /// for an answer]
    #[arg(long, env = environment::TIMEOUT, value_parser = environment::duration, hide_env_values = true)]
    timeout: Option<Duration>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Broker {
    fn builder(&self) -> Result<DeadLettersBuilder, Failed> {
        let Self { address, namespace: Namespace { namespace }, timeout, .. } = self;
        let builder = address.dead_letters(timeout.unwrap_or(CONNECTING))?.namespace(namespace);
        Ok(match *timeout {
            Some(timeout) => builder.timeout(timeout),
            None => builder,
        })
    }

    async fn dead_letters(&self, service: &str) -> Result<DeadLetters, Failed> {
        let timeout = self.timeout.unwrap_or(CONNECTING);
        let connecting = self.builder()?.connect(&self.address.url, service);
        // What has failed is told in words of its own, and that the time is over in others.
        match within(timeout, async { Ok(connecting.await) }, Failed::run).await? {
            Ok(dead) => Ok(dead),
            Err(error) => Err(failed(error)),
        }
    }
}

#[derive(Args)]
#[command(after_help = "Examples:\n  hopline dead ls\n  hopline dead ls mail --json")]
pub(crate) struct Ls {
    /// SERVICE, or SERVICE.vMAJOR for a version other than 1
    #[arg(value_parser = service)]
    service: Option<String>,
    #[command(flatten)]
    broker: Broker,
    /// How many to list
    #[arg(long, default_value_t = 1000)]
    limit: usize,
}

#[derive(Args)]
#[command(after_help = "Example:\n  hopline dead show mail 3f2a")]
pub(crate) struct Show {
    /// SERVICE, or SERVICE.vMAJOR for a version other than 1
    #[arg(value_parser = service)]
    service: String,
    /// The id, as `hopline dead ls` shows it, or its beginning
    id: String,
    #[command(flatten)]
    broker: Broker,
}

#[derive(Args)]
#[command(after_help = "Examples:\n  hopline dead replay mail 3f2a\n  hopline dead replay mail --all --yes")]
pub(crate) struct Replay {
    #[command(flatten)]
    meant: Meant,
    /// Also send messages that cannot be read to where they came from
    #[arg(long)]
    unread: bool,
}

#[derive(Args)]
#[command(after_help = "Example:\n  hopline dead drop mail 3f2a")]
pub(crate) struct Discard {
    #[command(flatten)]
    meant: Meant,
}

#[derive(Args)]
struct Meant {
    /// SERVICE, or SERVICE.vMAJOR for a version other than 1
    #[arg(value_parser = service)]
    service: String,
    /// The ids, as `hopline dead ls` shows them, or their beginnings
    #[arg(value_name = "ID", required_unless_present = "all", conflicts_with = "all")]
    ids: Vec<String>,
    /// All of them
    #[arg(long)]
    all: bool,
    #[command(flatten)]
    broker: Broker,
    /// Do not ask before doing it
    #[arg(long)]
    yes: bool,
}

impl Dead {
    pub(crate) async fn run(self) -> Result<(), Failed> {
        match self {
            Self::Ls(ls) => ls.run().await,
            Self::Show(show) => show.run().await,
            Self::Replay(Replay { meant, unread }) => meant.replay(unread).await,
            Self::Discard(Discard { meant }) => meant.discard().await,
        }
    }
}

fn failed(error: Error) -> Failed {
    match error {
        Error::NoService { service, .. } => Failed::run(format!(
            "`{service}` has no dead letters here: it was never served in this namespace, or has no oneway methods"
        )),
        error => error.into(),
    }
}

impl Ls {
    async fn run(self) -> Result<(), Failed> {
        let Some(service) = &self.service else { return self.counts().await };
        let dead = self.broker.dead_letters(service).await?;
        let count = dead.count().await.map_err(failed)?;
        let Listed { letters, broken_off, .. } = dead.list(self.limit).await.map_err(failed)?;
        closed(dead.close()).await;
        if self.broker.json {
            print(&json(&letters))?;
        } else {
            let rows = letters.iter().map(row);
            let head = ["ID", "METHOD", "ATTEMPTS", "AGE", "REASON"].map(str::to_owned);
            print(&table(std::iter::once(head).chain(rows).collect()))?;
        }
        match broken_off {
            Some(error) => {
                Err(Failed::run(format!("{} of {count}, and no more could be read: {}", letters.len(), said(&error))))
            }
            None => {
                if count > letters.len() as u64 && !self.broker.json {
                    tell(&format!("{} of {count}: `--limit` lists more", letters.len()));
                }
                Ok(())
            }
        }
    }

    async fn counts(&self) -> Result<(), Failed> {
        let counts = self.broker.builder()?.counts(&self.broker.address.url).await.map_err(|error| match error {
            error @ Error::Broker { .. } => Failed::run(format!(
                "{}; the services stand in that queue, and `hopline dead ls SERVICE` needs none",
                said(&error)
            )),
            error => failed(error),
        })?;
        if self.broker.json {
            let count = |(service, count): &(String, Result<u64, Error>)| match count {
                Ok(count) => json!({ "service": service, "count": count }),
                Err(error) => json!({ "service": service, "error": said(error) }),
            };
            print(&json(&counts.iter().map(count).collect::<Vec<_>>()))?;
        } else {
            let number =
                |count: &Result<u64, Error>| count.as_ref().map_or_else(|_| "?".to_owned(), ToString::to_string);
            let rows = counts.iter().map(|(service, count)| [service.clone(), number(count)]);
            print(&table(std::iter::once(["SERVICE", "DEAD"].map(str::to_owned)).chain(rows).collect()))?;
        }
        let unknown = counts.into_iter().filter_map(|(service, count)| Some((service, count.err()?)));
        let unknown = unknown.map(|(service, error)| format!("`{service}` cannot be counted: {}", said(&error)));
        told(unknown.collect(), self.broker.json)
    }
}

impl Show {
    async fn run(self) -> Result<(), Failed> {
        let dead = self.broker.dead_letters(&self.service).await?;
        let letter = dead.find(&self.id).await.map_err(failed)?;
        closed(dead.close()).await;
        let Some(letter) = letter else {
            return Err(Failed::run(absent(&self.service, &self.id)));
        };
        Ok(print(&if self.broker.json { json(&letter) } else { shown(&letter) })?)
    }
}

impl Meant {
    async fn replay(self, unread: bool) -> Result<(), Failed> {
        let (dead, which, bar) = self.open("replay", self.all).await?;
        let each = |_: &Handled| bar.inc(1);
        let handled = if unread { dead.replay_unread(&which, each).await } else { dead.replay(&which, each).await };
        self.conclude(&dead, &bar, "replayed", handled).await
    }

    async fn discard(self) -> Result<(), Failed> {
        let (dead, which, bar) = self.open("drop", true).await?;
        let handled = dead.discard(&which, |_| bar.inc(1)).await;
        self.conclude(&dead, &bar, "dropped", handled).await
    }

    /// Connects, and asks for a confirmation if one is needed.
    async fn open(&self, what: &str, asked: bool) -> Result<(DeadLetters, WhichLetters, ProgressBar), Failed> {
        let asked = asked && !self.yes;
        if asked && !(io::stdin().is_terminal() && io::stderr().is_terminal()) {
            return Err(Failed::usage(format!("there is no terminal to ask whether to {what} them: say `--yes`")));
        }
        let dead = self.broker.dead_letters(&self.service).await?;
        let (which, count) = match self.all {
            true => (WhichLetters::All, dead.count().await.map_err(failed)?),
            false => (WhichLetters::Ids(self.ids.clone()), self.ids.len() as u64),
        };
        if asked && !confirmed(&format!("{what} {count} dead letters of `{}`?", self.service)) {
            return Err(Failed::run("nothing was done".to_owned()));
        }
        Ok((dead, which, progress(count)))
    }

    /// Prints what was done, and what was not.
    async fn conclude(
        &self,
        dead: &DeadLetters,
        bar: &ProgressBar,
        done: &str,
        handled: Result<Vec<Handled>, Error>,
    ) -> Result<(), Failed> {
        // Ending the bar would move it to its end, so its position is read first.
        let position = bar.position();
        bar.finish_and_clear();
        let handled = match handled {
            Ok(handled) => handled,
            Err(error) => {
                return Err(Failed::run(format!("broken off after {position} of them: {}", failed(error))));
            }
        };
        closed(dead.close()).await;
        let mut left = Vec::new();
        for Handled { id, fate, .. } in &handled {
            match fate {
                Fate::Kept(why) => left.push((id, format!("{id} is kept: {why}"))),
                Fate::Absent => left.push((id, absent(&self.service, id))),
                _ => {}
            }
        }
        let count = handled.len() - left.len();
        let not_done = left.iter().map(|(id, why)| json!({ "id": id, "why": why })).collect::<Vec<_>>();
        let told = json!({ done: count, "left": not_done });
        print(&if self.broker.json { json(&told) } else { format!("{done} {count}") })?;
        self::told(left.into_iter().map(|(_, why)| why).collect(), self.broker.json)
    }
}

/// Prints what was not done, a line for each. The last line becomes the error of the command. In JSON all are one error.
fn told(mut left: Vec<String>, json: bool) -> Result<(), Failed> {
    if json && !left.is_empty() {
        return Err(Failed::run(left.join("; ")));
    }
    let last = left.pop();
    left.iter().for_each(|said| tell(said));
    last.map_or(Ok(()), |last| Err(Failed::run(last)))
}

fn absent(service: &str, id: &str) -> String {
    format!("no dead letter of `{service}` has the id {id} (`hopline dead ls {service}` lists them)")
}

/// Asks on the terminal. Only `y` and `yes` count as yes.
fn confirmed(question: &str) -> bool {
    eprint!("{question} [y/N] ");
    let mut answer = String::new();
    io::stdin().read_line(&mut answer).is_ok() && matches!(answer.trim(), "y" | "Y" | "yes")
}

/// A progress bar for this many letters. It is only shown on a terminal.
fn progress(count: u64) -> ProgressBar {
    if !io::stderr().is_terminal() {
        // A hidden bar still counts.
        return ProgressBar::with_draw_target(Some(count), indicatif::ProgressDrawTarget::hidden());
    }
    let style = ProgressStyle::with_template("[{bar:30}] {pos} of {len}").expect("a template that parses");
    ProgressBar::new(count).with_style(style.progress_chars("=> "))
}

fn row(letter: &DeadLetter) -> [String; 5] {
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    [
        letter.id.clone(),
        or_dash(letter.method.clone()),
        or_dash(letter.attempts.map(|attempts| attempts.to_string())),
        or_dash(letter.failed_at.map(age)),
        letter.reason.clone(),
    ]
}

fn shown(letter: &DeadLetter) -> String {
    let kind = match letter.kind {
        LetterKind::Oneway => "a oneway call",
        LetterKind::Call => "a call: it cannot be replayed, since nobody waits for its reply any more",
        LetterKind::Other => "not a call of a service: it cannot be replayed",
        _ => "a message that cannot be read: `replay --unread` sends it to where it came from",
    };
    let number = |number: Option<u64>| number.map(|number| number.to_string());
    let lines = [
        ("id", Some(letter.id.clone())),
        ("service", Some(letter.service.clone())),
        ("kind", Some(kind.to_owned())),
        ("method", letter.method.as_deref().map(one_line)),
        ("reason", Some(one_line(&letter.reason))),
        ("attempts", number(letter.attempts)),
        ("age", letter.failed_at.map(age)),
        ("instance", letter.instance.as_deref().map(one_line)),
        ("caller", letter.caller.as_deref().map(one_line)),
        ("user", letter.user.as_deref().map(one_line)),
        ("size", Some(format!("{} bytes", letter.size))),
        ("calls", (letter.calls > 1).then(|| letter.calls.to_string())),
        ("codec", letter.codec.clone()),
        ("metadata", (!letter.metadata.is_empty()).then(|| json(&letter.metadata))),
        ("arguments", letter.arguments.as_ref().map(json)),
    ];
    let past = letter.history.iter().rev().map(|death| {
        let ago = death.failed_at.map_or_else(|| "-".to_owned(), age);
        let by = death.instance.as_deref().map_or_else(|| "the broker".to_owned(), one_line);
        let attempts = number(death.attempts).unwrap_or_else(|| "-".to_owned());
        ("before", Some(format!("{ago} ago, by {by}, after {attempts} attempts: {}", one_line(&death.reason))))
    });
    let lines = lines.into_iter().chain(past);
    let lines = lines.filter_map(|(name, value)| Some(format!("{name:<10} {}", value?)));
    lines.collect::<Vec<_>>().join("\n")
}
