//! A rule: what it can say, how that is written, and where it is set.

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::document::{RULE, RuleDocument, RuleInForce};
use crate::environment;
use crate::error::Error;
use crate::topology::ServiceId;

/// What is done about calls of a service or a method, whatever the code says: set by [`Rules::set`](crate::Rules::set).
///
/// Servers heed the settings whose names begin with `server_`, and clients all others. As text, it is a list of settings,
/// `timeout=2s retry=1 rate=100/s breaker=open server_rate=20/s server_concurrency=8`. What it does not name is left to the
/// code, or to the rule of the service if it is the rule of a method.
///
/// ```
/// # fn main() -> Result<(), hopline::Error> {
/// let rule: hopline::Rule = "timeout=2s retry=1".parse()?;
/// assert_eq!(rule.retry, Some(1));
/// assert_eq!(rule.to_string(), "timeout=2s retry=1");
/// assert!("retry=often".parse::<hopline::Rule>().is_err());
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Rule {
    /// How long a call may take, at least 1 ms. It replaces the client's [time-out](crate::ClientBuilder::timeout). A call
    /// or method with a time-out of its own gets the shorter of the two.
    pub timeout: Option<Duration>,
    /// How many more attempts a call has if it fails. It replaces what [`Call::retry`](crate::Call::retry) and
    /// [`ClientBuilder::retry`](crate::ClientBuilder::retry) say.
    pub retry: Option<u32>,
    /// How many calls a second a client sends, at least 1. It replaces [`ClientBuilder::rate`](crate::ClientBuilder::rate).
    /// The rule of a method counts its calls alone.
    pub rate: Option<u32>,
    /// Whether calls with an answer are let through.
    pub breaker: Option<BreakerRule>,
    /// How many calls of each method a second each server takes from each user, at least 1. It replaces
    /// [`RateLimit::per_user`](crate::RateLimit::per_user), and does the same: further requests are refused, and further
    /// oneway calls wait in the server. The rule of a service is for each of its methods.
    pub server_rate: Option<u32>,
    /// How many calls of the service each server runs at once, at least 1. It replaces
    /// [`Service::concurrency`](crate::Service::concurrency) and [`Adaptive`](crate::Adaptive). A server has no more
    /// calls to run than its [prefetch](crate::Service::prefetch) lets it hold. A method with
    /// [places of its own](crate::Method::concurrency) runs as many beside them, at most as many as the code says. It is no
    /// setting of a method.
    pub server_concurrency: Option<u32>,
}

/// What a [`Rule`] says of the breaker of a method. A client needs no [breakers](crate::ClientBuilder::breaker) for it.
///
/// ```
/// # fn main() -> Result<(), hopline::Error> {
/// let rule: hopline::Rule = "breaker=open".parse()?;
/// assert_eq!(rule.breaker, Some(hopline::BreakerRule::Open));
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum BreakerRule {
    /// Calls fail at once with [`Error::CircuitOpen`]. Nothing is sent.
    Open,
    /// Breakers do as they always do. For a method whose service has a rule that says `open`.
    Auto,
}

/// The names of the settings.
const SETTINGS: [&str; 6] = ["timeout", "retry", "rate", "breaker", "server_rate", "server_concurrency"];

impl Rule {
    /// Whether it says nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// This rule, with what `other` says where this one says nothing.
    pub(crate) fn or(self, other: Self) -> Self {
        Self {
            timeout: self.timeout.or(other.timeout),
            retry: self.retry.or(other.retry),
            rate: self.rate.or(other.rate),
            breaker: self.breaker.or(other.breaker),
            server_rate: self.server_rate.or(other.server_rate),
            server_concurrency: self.server_concurrency.or(other.server_concurrency),
        }
    }

    /// Takes away a setting, by its name.
    ///
    /// # Errors
    /// `Invalid` if there is no such setting.
    pub(crate) fn unset(&mut self, setting: &str) -> Result<(), Error> {
        match setting {
            "timeout" => self.timeout = None,
            "retry" => self.retry = None,
            "rate" => self.rate = None,
            "breaker" => self.breaker = None,
            "server_rate" => self.server_rate = None,
            "server_concurrency" => self.server_concurrency = None,
            _ => return Err(unknown(setting)),
        }
        Ok(())
    }
}

impl Rule {
    /// The service or the method that it is for, with the version.
    ///
    /// # Errors
    /// `Invalid` if `text` is neither, or the rule is of no use for it.
    pub(crate) fn target_of(&self, text: &str) -> Result<String, Error> {
        if let Ok(service) = ServiceId::parse(text) {
            return Ok(service.to_string());
        }
        let (service, method) = ServiceId::with_method(text).map_err(|_| {
            Error::Invalid(format!("`{text}`: write SERVICE or SERVICE.METHOD, such as demo or demo.v2.add"))
        })?;
        if self.server_concurrency.is_some() {
            return Err(Error::Invalid(format!(
                "`server_concurrency` is for all methods of a service together: set it for `{service}`"
            )));
        }
        Ok(format!("{service}.{method}"))
    }
}

fn unknown(setting: &str) -> Error {
    Error::Invalid(format!(
        "`{setting}` is no setting of a rule: there are {}",
        SETTINGS.map(|name| format!("`{name}`")).join(", ")
    ))
}

impl FromStr for Rule {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let mut rule = Self::default();
        for part in text.split_whitespace() {
            let wrong = |why: &str| Error::Invalid(format!("`{part}`: {why}"));
            let (name, value) = part.split_once('=').ok_or_else(|| wrong("write SETTING=VALUE, such as timeout=2s"))?;
            match name {
                "timeout" => rule.timeout = Some(environment::duration(value).map_err(|why| wrong(&why))?),
                "retry" => rule.retry = Some(value.parse().map_err(|_| wrong("write a whole number, such as 2"))?),
                "rate" | "server_rate" => {
                    let calls = rate(value).ok_or_else(|| wrong("write a whole number above 0, such as 100/s"))?;
                    *(if name == "rate" { &mut rule.rate } else { &mut rule.server_rate }) = Some(calls);
                }
                "server_concurrency" => {
                    let calls = above_0(value).ok_or_else(|| wrong("write a whole number above 0, such as 8"))?;
                    rule.server_concurrency = Some(calls);
                }
                "breaker" => rule.breaker = Some(breaker(value).ok_or_else(|| wrong("write `open` or `auto`"))?),
                _ => return Err(unknown(name)),
            }
        }
        Ok(rule)
    }
}

fn rate(text: &str) -> Option<u32> {
    above_0(text.strip_suffix("/s").unwrap_or(text))
}

fn above_0(text: &str) -> Option<u32> {
    text.parse().ok().filter(|calls| *calls > 0)
}

fn breaker(text: &str) -> Option<BreakerRule> {
    match text {
        "open" => Some(BreakerRule::Open),
        "auto" => Some(BreakerRule::Auto),
        _ => None,
    }
}

impl fmt::Display for BreakerRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Open => "open",
            Self::Auto => "auto",
        })
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let timeout = self.timeout.map(millis).map(|millis| match millis % 1000 {
            0 => format!("timeout={}s", millis / 1000),
            _ => format!("timeout={millis}ms"),
        });
        let others = [
            self.retry.map(|retry| format!("retry={retry}")),
            self.rate.map(|calls| format!("rate={calls}/s")),
            self.breaker.map(|breaker| format!("breaker={breaker}")),
            self.server_rate.map(|calls| format!("server_rate={calls}/s")),
            self.server_concurrency.map(|calls| format!("server_concurrency={calls}")),
        ];
        let parts: Vec<_> = timeout.into_iter().chain(others.into_iter().flatten()).collect();
        f.write_str(&parts.join(" "))
    }
}

/// A time as a rule can say it.
fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX).max(1)
}

/// A rule that was set, or unset: then it [says nothing](Rule::is_empty).
///
/// ```
/// # async fn example(client: hopline::Client) -> Result<(), hopline::Error> {
/// for change in client.rules().history().await? {
///     println!("{}: {} (by {})", change.target, change.rule, change.user.as_deref().unwrap_or("nobody known"));
/// }
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct RuleChange {
    /// The service, as `name.vMAJOR`, or the method, as `name.vMAJOR.method`.
    pub target: String,
    /// What the rule says since then.
    pub rule: Rule,
    /// The user who has set it, verified by the broker. `None` if the broker has no users.
    pub user: Option<String>,
    /// How the client names itself that has set it.
    pub client: String,
    /// When it was set, by the clock of that client's machine.
    pub at: SystemTime,
}

impl RuleChange {
    /// Reads a document. `None` if it says nothing of any target.
    ///
    /// # Errors
    /// A sentence that says why it cannot be read.
    pub(super) fn read(body: &[u8], user: Option<String>) -> Result<Option<Self>, String> {
        let document: RuleDocument = serde_json::from_slice(body).map_err(|error| error.to_string())?;
        let RuleDocument { kind, target, timeout_ms, retry, rate, breaker: said, client, at_ms, .. } = document;
        let RuleDocument { server_rate, server_concurrency, .. } = document;
        if kind != RULE {
            return Err(format!("its type is `{kind}`"));
        }
        let numbers = [("rate", rate), ("server_rate", server_rate), ("server_concurrency", server_concurrency)];
        if let Some((name, _)) = numbers.iter().find(|(_, number)| *number == Some(0)) {
            return Err(format!("`{name}` is 0"));
        }
        if target.is_empty() {
            return Ok(None);
        }
        let breaker = said.map(|said| breaker(&said).ok_or_else(|| format!("`breaker` is `{said}`"))).transpose()?;
        let timeout = timeout_ms.map(|millis| Duration::from_millis(millis.max(1)));
        let at = UNIX_EPOCH.checked_add(Duration::from_millis(at_ms)).unwrap_or(UNIX_EPOCH);
        let rule = Rule { timeout, retry, rate, breaker, server_rate, server_concurrency };
        let target = rule.target_of(&target).map_err(|error| error.to_string())?;
        Ok(Some(Self { target, rule, user, client, at }))
    }

    /// What it says to servers. `None` if that is nothing.
    pub(crate) fn for_servers(&self) -> Option<RuleInForce> {
        let Rule { server_rate, server_concurrency, .. } = self.rule;
        let rule = Rule { server_rate, server_concurrency, ..Rule::default() };
        let (target, user, client) = (self.target.clone(), self.user.clone(), self.client.clone());
        let told = || RuleInForce { target, settings: rule.to_string(), user, client, at_ms: self.at_ms() };
        (!rule.is_empty()).then(told)
    }

    fn at_ms(&self) -> u64 {
        millis(self.at.duration_since(UNIX_EPOCH).unwrap_or_default())
    }

    /// The document that says it.
    pub(crate) fn document(&self) -> RuleDocument {
        RuleDocument {
            kind: RULE.to_owned(),
            target: self.target.clone(),
            timeout_ms: self.rule.timeout.map(millis),
            retry: self.rule.retry,
            rate: self.rule.rate,
            breaker: self.rule.breaker.map(|breaker| breaker.to_string()),
            server_rate: self.rule.server_rate,
            server_concurrency: self.rule.server_concurrency,
            client: self.client.clone(),
            at_ms: self.at_ms(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_with_a_rule_is_told_with_its_place() {
        for (text, told) in [
            ("timeout=2", "`timeout=2`: write a whole number above 0 and a unit"),
            ("timeout=2s retry=-1", "`retry=-1`: write a whole number"),
            ("rate=0/s", "`rate=0/s`: write a whole number above 0"),
            ("breaker=shut", "`breaker=shut`: write `open` or `auto`"),
            ("retry", "`retry`: write SETTING=VALUE"),
            (
                "speed=3",
                "`speed` is no setting of a rule: there are `timeout`, `retry`, `rate`, `breaker`, `server_rate`",
            ),
            ("server_rate=x", "`server_rate=x`: write a whole number above 0, such as 100/s"),
            ("server_concurrency=0", "`server_concurrency=0`: write a whole number above 0, such as 8"),
        ] {
            let error = text.parse::<Rule>().expect_err("a bad rule").to_string();
            assert!(error.starts_with(told), "{error}");
        }
    }

    #[test]
    fn rules_are_read_as_they_are_written() {
        for text in [
            "",
            "timeout=1500ms",
            "timeout=2s retry=0 rate=100/s breaker=auto",
            "breaker=open server_rate=7/s server_concurrency=8",
        ] {
            assert_eq!(text.parse::<Rule>().expect("a rule").to_string(), text);
        }
        let at = UNIX_EPOCH + Duration::from_secs(1);
        let rule = "timeout=2s retry=1 rate=5/s breaker=open server_rate=6/s".parse().expect("a rule");
        let change = RuleChange { target: "demo.v1.add".into(), rule, user: None, client: "me".into(), at };
        let written = serde_json::to_vec(&change.document()).expect("it can be JSON");
        assert_eq!(RuleChange::read(&written, None), Ok(Some(change)));
        assert_eq!(RuleChange::read(br#"{"type":"hopline.v1.rule"}"#, None), Ok(None));
        for other in [
            &b"{"[..],
            br#"{"type":"hopline.v2.rule","target":"demo"}"#,
            br#"{"type":"hopline.v1.rule","target":"a b"}"#,
            br#"{"type":"hopline.v1.rule","target":"demo","server_rate":0}"#,
            br#"{"type":"hopline.v1.rule","target":"demo.add","server_concurrency":8}"#,
        ] {
            assert!(RuleChange::read(other, None).is_err());
        }
    }

    #[test]
    fn targets_have_versions() {
        for (text, target) in
            [("demo", "demo.v1"), ("demo.v2", "demo.v2"), ("demo.add", "demo.v1.add"), ("demo.v2.add", "demo.v2.add")]
        {
            assert_eq!(Rule::default().target_of(text).expect("a target"), target);
        }
        assert!(Rule::default().target_of("a b").is_err() && Rule::default().target_of("demo.v1.add.more").is_err());
    }
}
