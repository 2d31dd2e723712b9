//! The document with a rule for calls. A client publishes it, and all that heed rules read it. And what a server tells of
//! the rules that it heeds.

use serde::{Deserialize, Serialize};

/// The `type` of the document.
pub(crate) const RULE: &str = "hopline.v1.rule";

/// What a rule says of a service or a method, and who has set it: the document `hopline.v1.rule`. A rule without
/// settings is as good as none.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct RuleDocument {
    /// [`RULE`].
    #[serde(rename = "type")]
    pub(crate) kind: String,
    /// `name.vMAJOR` or `name.vMAJOR.method`. Empty in a message that only shows where the stream ends.
    pub(crate) target: String,
    pub(crate) timeout_ms: Option<u64>,
    pub(crate) retry: Option<u32>,
    pub(crate) rate: Option<u32>,
    /// `open` or `auto`.
    pub(crate) breaker: Option<String>,
    /// Servers heed this and the next one, and clients the others.
    pub(crate) server_rate: Option<u32>,
    pub(crate) server_concurrency: Option<u32>,
    /// How the client names itself that has set it.
    pub(crate) client: String,
    /// When, in milliseconds since 1970, by the clock of its machine.
    pub(crate) at_ms: u64,
}

/// What a [rule](crate::Rule) says to the servers of a service, as a server tells it that goes by it: a part of
/// [`Instance`](crate::Instance).
///
/// ```
/// # fn example(instance: hopline::Instance) {
/// for rule in instance.rules.iter().flatten() {
///     println!("{}: {}, set by {}", rule.target, rule.settings, rule.user.as_deref().unwrap_or(&rule.client));
/// }
/// # }
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct RuleInForce {
    /// The service, as `name.vMAJOR`, or the method, as `name.vMAJOR.method`. The rule of a method is before that of its
    /// service, setting by setting.
    pub target: String,
    /// The settings that the server goes by, as text that is a [`Rule`](crate::Rule), such as `server_rate=100/s`.
    pub settings: String,
    /// The user who has set it, verified by the broker. `None` if the broker has no users.
    pub user: Option<String>,
    /// How the client names itself that has set it.
    pub client: String,
    /// When it was set, in milliseconds since 1970, by the clock of that client's machine.
    pub at_ms: u64,
}
