//! What an instance announces of itself, without being asked.

use serde::{Deserialize, Serialize};

/// The method in the frame of an announcement. It has a dot, as no method of a service has.
pub(crate) const ANNOUNCED: &str = "hopline.announced";

/// What has become of an instance: the document `hopline.v1.announced`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename = "hopline.v1.announced", default)]
pub(crate) struct Announcement {
    pub(crate) state: LifeState,
    pub(crate) instance: String,
    /// What it serves, each written `name.vMAJOR`.
    pub(crate) services: Vec<String>,
}

/// How far an instance is in its life.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum LifeState {
    /// It has come, or is connected again.
    Up,
    /// It is still here. It says so every 30 s.
    Here,
    /// It takes no more calls, and ends when those that run have ended.
    Draining,
    /// It has ended.
    Down,
    /// What a later version says.
    #[default]
    #[serde(other)]
    Unknown,
}
