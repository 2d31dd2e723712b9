//! `hopline rules`: settings of services and methods that are changed while clients and servers run.

use std::time::{Duration, UNIX_EPOCH};

use clap::{Args, Subcommand};
use hopline::{Client, Rule, RuleChange, environment};
use serde_json::{Value, json};

use crate::address::{Address, Namespace, closed, within};
use crate::failed::{Failed, tell};
use crate::printed::{age, json, print, table};

/// Set and look at rules: settings that running clients and servers heed.
///
/// A rule is for a service or one of its methods. What it says wins over what the code says, at once and when a program
/// starts, in every client that was built with `ClientBuilder::rules` and every server that was built with
/// `ServerBuilder::rules`. Servers heed the settings that begin with `server_`, and clients the others. Exits with 0 when it
/// is done, with 1 when it cannot be, with 71 when the broker does not allow it, and with 2 on wrong usage.
#[derive(Subcommand)]
#[command(after_help = "Examples:\n  hopline rules set demo.add timeout=2s retry=1\n  hopline rules get")]
pub(crate) enum Rules {
    /// Set a rule. Settings that an earlier rule has and this one does not name stay
    ///
    /// Clients heed these: timeout=TIME is how long a call may take, such as 500ms or 2s; a call with a time-out of its own
    /// gets the shorter one. retry=NUMBER is how many more attempts it has. rate=NUMBER/s is how many calls a second each
    /// client sends. breaker=open lets no call through that is answered, and breaker=auto is for a method whose service has
    /// breaker=open.
    ///
    /// Servers heed these: server_rate=NUMBER/s is how many calls of each method a second each server takes from each user.
    /// server_concurrency=NUMBER is how many calls of the service each server runs at once.
    Set(Set),
    /// Print the rules that are set, and who has set them
    Get(Get),
    /// Take away a rule, or some settings of it
    Unset(Unset),
    /// Print all changes of rules, the oldest first
    History(History),
}

#[derive(Args)]
struct Broker {
    #[command(flatten)]
    address: Address,
    #[command(flatten)]
    namespace: Namespace,
    /// How long all of it may take, such as 500ms or 5s
    #[arg(
        long, env = environment::TIMEOUT, default_value = "30s", value_parser = environment::duration,
        hide_env_values = true
    )]
    timeout: Duration,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
#[command(
    after_help = "Examples:\n  hopline rules set demo.add timeout=2s retry=1\n  hopline rules set demo breaker=open\n  hopline rules set demo server_concurrency=8"
)]
pub(crate) struct Set {
    /// SERVICE or SERVICE.METHOD, with .vMAJOR after the service for a version other than 1
    target: String,
    /// For clients timeout=TIME, retry=NUMBER, rate=NUMBER/s, breaker=open|auto; for servers server_rate=NUMBER/s,
    /// server_concurrency=NUMBER
    #[arg(required = true, value_name = "SETTING=VALUE")]
    settings: Vec<String>,
    #[command(flatten)]
    broker: Broker,
}

#[derive(Args)]
#[command(after_help = "Examples:\n  hopline rules get\n  hopline rules get demo.add --json")]
pub(crate) struct Get {
    /// Only the rules of this service or method
    target: Option<String>,
    #[command(flatten)]
    broker: Broker,
}

#[derive(Args)]
#[command(after_help = "Examples:\n  hopline rules unset demo.add\n  hopline rules unset demo.add timeout")]
pub(crate) struct Unset {
    /// SERVICE or SERVICE.METHOD
    target: String,
    /// timeout, retry, rate, breaker, server_rate, server_concurrency [default: all of them]
    #[arg(value_name = "SETTING")]
    settings: Vec<String>,
    #[command(flatten)]
    broker: Broker,
}

#[derive(Args)]
#[command(after_help = "Example:\n  hopline rules history demo.add")]
pub(crate) struct History {
    /// Only the changes of this service or method
    target: Option<String>,
    #[command(flatten)]
    broker: Broker,
}

impl Rules {
    pub(crate) async fn run(self) -> Result<(), Failed> {
        match self {
            Self::Set(Set { target, settings, broker }) => {
                let rule: Rule = settings.join(" ").parse()?;
                broker.with(async |client| Ok(vec![client.rules().set(&target, &rule).await?])).await
            }
            Self::Unset(Unset { target, settings, broker }) => {
                let settings: Vec<_> = settings.iter().map(String::as_str).collect();
                broker.with(async |client| Ok(vec![client.rules().unset(&target, &settings).await?])).await
            }
            Self::Get(Get { target, broker }) => {
                broker.with(async |client| Ok(of(target.as_deref(), client.rules().get().await?))).await
            }
            Self::History(History { target, broker }) => {
                broker.with(async |client| Ok(of(target.as_deref(), client.rules().history().await?))).await
            }
        }
    }
}

/// Those of a service and its methods, or of a method.
fn of(target: Option<&str>, changes: Vec<RuleChange>) -> Vec<RuleChange> {
    let Some(target) = target else { return changes };
    let service = |text: &str| text.parse::<hopline::ServiceId>().map(|id| id.to_string());
    let method = || hopline::ServiceId::with_method(target).map(|(id, method)| format!("{id}.{method}"));
    let target = service(target).or_else(|_| method()).unwrap_or_else(|_| target.to_owned());
    let inner = format!("{target}.");
    changes.into_iter().filter(|change| change.target == target || change.target.starts_with(&inner)).collect()
}

impl Broker {
    /// Connects, asks for changes, and prints them.
    async fn with(&self, ask: impl AsyncFnOnce(Client) -> Result<Vec<RuleChange>, Failed>) -> Result<(), Failed> {
        let builder = self.address.client(self.timeout)?.namespace(&self.namespace.namespace);
        let client = within(self.timeout, builder.connect(&self.address.url), Failed::run).await?;
        let outcome = ask(client.clone()).await;
        closed(client.close()).await;
        let changes = outcome?;
        if self.json {
            return Ok(print(&json(&changes.iter().map(told).collect::<Vec<_>>()))?);
        }
        if changes.is_empty() {
            tell(&format!("no rule is set in the namespace `{}`", self.namespace.namespace));
            return Ok(());
        }
        let row = |change: &RuleChange| {
            let rule = if change.rule.is_empty() { "-".to_owned() } else { change.rule.to_string() };
            let user = change.user.clone().unwrap_or_else(|| "-".to_owned());
            [change.target.clone(), rule, user, age(at(change)), change.client.clone()]
        };
        let head = ["TARGET", "RULE", "USER", "AGE", "CLIENT"].map(str::to_owned);
        Ok(print(&table(std::iter::once(head).chain(changes.iter().map(row)).collect()))?)
    }
}

fn told(change: &RuleChange) -> Value {
    let RuleChange { target, rule, user, client, .. } = change;
    json!({
        "target": target,
        "timeout_ms": rule.timeout.map(|time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX)),
        "retry": rule.retry,
        "rate": rule.rate,
        "breaker": rule.breaker.map(|breaker| breaker.to_string()),
        "server_rate": rule.server_rate,
        "server_concurrency": rule.server_concurrency,
        "user": user,
        "client": client,
        "at_ms": at(change),
    })
}

/// When it was set, in milliseconds since 1970.
fn at(change: &RuleChange) -> u64 {
    let since = change.at.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
