//! The document with a rule for calls. A client publishes it, and all that heed rules read it.

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
    /// How the client names itself that has set it.
    pub(crate) client: String,
    /// When, in milliseconds since 1970, by the clock of its machine.
    pub(crate) at_ms: u64,
}
