//! `hopline groups`: shows an operator what waits for groups of subscribers, and ends those that nobody needs any more.

use std::time::Duration;

use clap::{Args, Subcommand};
use hopline::{Error, Groups, environment};
use serde_json::{Value, json};

use crate::address::{Address, Namespace, closed, said, within};
use crate::failed::{Failed, tell};
use crate::printed::{json, print, table};

/// Look at groups of subscribers, and remove them.
///
/// The broker keeps events for a group whether a server of it is up or not, until the group is removed. Exits with 0 when
/// everything was done, with 1 when something could not be, for example when a queue cannot be reached, and with 2 on wrong
/// usage, as when there is no such group or it is still needed.
#[derive(Subcommand)]
#[command(after_help = "Examples:\n  hopline groups ls\n  hopline groups rm billing")]
pub(crate) enum Group {
    /// List all groups: their patterns, how many servers subscribe, how much waits, and how far behind a replay is
    Ls(Ls),
    /// Print how far behind a group is
    Lag(Lag),
    /// Remove a group that no server subscribes as any more, with its queues
    Rm(Rm),
    /// End a pattern by which a group gets events: that of an older release
    Unbind(Unbind),
}

/// How long connecting may take by default.
const CONNECTING: Duration = Duration::from_secs(30);

/// Where the groups are, and how long to wait for them.
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

#[derive(Args)]
#[command(after_help = "Examples:\n  hopline groups ls\n  hopline groups ls --json")]
pub(crate) struct Ls {
    #[command(flatten)]
    broker: Broker,
}

#[derive(Args)]
#[command(after_help = "Example:\n  hopline groups lag billing")]
pub(crate) struct Lag {
    /// The group
    group: String,
    #[command(flatten)]
    broker: Broker,
}

#[derive(Args)]
#[command(after_help = "Examples:\n  hopline groups rm billing\n  hopline groups rm billing --force")]
pub(crate) struct Rm {
    /// The group
    group: String,
    /// Remove it with the events that wait for it and its dead letters
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    broker: Broker,
}

#[derive(Args)]
#[command(after_help = "Example:\n  hopline groups unbind billing 'order.*'")]
pub(crate) struct Unbind {
    /// The group
    group: String,
    /// The pattern
    pattern: String,
    #[command(flatten)]
    broker: Broker,
}

impl Group {
    pub(crate) async fn run(self) -> Result<(), Failed> {
        match self {
            Self::Ls(Ls { broker }) => broker.ls().await,
            Self::Lag(Lag { group, broker }) => {
                let group = broker.with(async |groups| groups.get(&group).await).await?;
                if let Err(error) = &group.counts {
                    return Err(Failed::run(said(error)));
                }
                Ok(print(&if broker.json { json(&told(&group)) } else { shown(&group) })?)
            }
            Self::Rm(Rm { group, force, broker }) => {
                let deleted = broker.with(async |groups| groups.remove(&group, force).await).await?;
                let told = json!({ "removed": group, "deleted": deleted });
                Ok(print(&if broker.json { json(&told) } else { format!("removed {group}, and {deleted} messages") })?)
            }
            Self::Unbind(Unbind { group, pattern, broker }) => {
                broker.with(async |groups| groups.unbind(&group, &pattern).await).await?;
                let told = json!({ "group": group, "unbound": pattern });
                Ok(print(&if broker.json { json(&told) } else { format!("unbound {pattern} from {group}") })?)
            }
        }
    }
}

impl Broker {
    /// Connects, and does something with the groups.
    async fn with<T>(&self, act: impl AsyncFnOnce(&Groups) -> Result<T, Error>) -> Result<T, Failed> {
        let timeout = self.timeout.unwrap_or(CONNECTING);
        let builder = self.address.groups(timeout)?.namespace(&self.namespace.namespace);
        let builder = match self.timeout {
            Some(timeout) => builder.timeout(timeout),
            None => builder,
        };
        let groups = within(timeout, builder.connect(&self.address.url), Failed::run).await?;
        let outcome = act(&groups).await;
        closed(groups.close()).await;
        Ok(outcome?)
    }

    async fn ls(&self) -> Result<(), Failed> {
        let groups = self.with(async |groups| groups.list().await).await?;
        if self.json {
            print(&json(&groups.iter().map(told).collect::<Vec<_>>()))?;
        } else if groups.is_empty() {
            tell(&format!("there is no group in the namespace `{}`", self.namespace.namespace));
        } else {
            let head = ["GROUP", "SERVERS", "WAITING", "RETRYING", "DEAD", "LAG", "PATTERNS"].map(str::to_owned);
            print(&table(std::iter::once(head).chain(groups.iter().map(row)).collect()))?;
        }
        let unknown = groups.iter().filter_map(|group| Some((&group.name, group.counts.as_ref().err()?)));
        let unknown: Vec<_> =
            unknown.map(|(group, error)| format!("the group `{group}` cannot be counted: {}", said(error))).collect();
        if unknown.is_empty() { Ok(()) } else { Err(Failed::run(unknown.join("; "))) }
    }
}

fn row(group: &hopline::Group) -> [String; 7] {
    let counts = match &group.counts {
        Ok(counts) => [
            counts.consumers.to_string(),
            counts.waiting.to_string(),
            counts.retrying.to_string(),
            counts.dead.to_string(),
            counts.replay.map_or_else(|| "-".to_owned(), |replay| replay.lag().to_string()),
        ],
        Err(_) => std::array::from_fn(|_| "?".to_owned()),
    };
    let [consumers, waiting, retrying, dead, lag] = counts;
    [group.name.clone(), consumers, waiting, retrying, dead, lag, group.patterns.join(" ")]
}

fn shown(group: &hopline::Group) -> String {
    let number = |number: Option<u64>| number.map_or_else(|| "-".to_owned(), |number| number.to_string());
    let mut lines = vec![("group", group.name.clone()), ("patterns", group.patterns.join(" "))];
    if let Ok(counts) = &group.counts {
        lines.push(("servers", counts.consumers.to_string()));
        lines.push(("waiting", counts.waiting.to_string()));
        lines.push(("retrying", counts.retrying.to_string()));
        lines.push(("dead", counts.dead.to_string()));
        if let Some(replay) = counts.replay {
            lines.push(("next", number(replay.next)));
            lines.push(("last", number(replay.last)));
            lines.push(("lag", replay.lag().to_string()));
        }
    }
    table(lines.into_iter().map(|(name, value)| [name.to_owned(), value]).collect())
}

fn told(group: &hopline::Group) -> Value {
    let (name, patterns) = (&group.name, &group.patterns);
    match &group.counts {
        Ok(counts) => json!({
            "group": name, "patterns": patterns, "servers": counts.consumers, "waiting": counts.waiting,
            "retrying": counts.retrying, "dead": counts.dead,
            "replay": counts.replay.map(|replay| {
                json!({ "next": replay.next, "last": replay.last, "lag": replay.lag() })
            }),
        }),
        Err(error) => json!({ "group": name, "patterns": patterns, "error": said(error) }),
    }
}
