//! The document with calls that an instance has run. `server/tap.rs` fills it in.

use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::{Document, TAP, since_1970};

/// Calls that an instance of a service has run lately: the document `hopline.v1.tap`.
/// [`Registry::tap`](crate::Registry::tap) asks for it.
///
/// ```
/// # fn example(tapped: hopline::Tapped) {
/// for call in &tapped.calls {
///     println!("{}.{} took {:?}: {}", tapped.service, call.method, call.handler_time(), call.code);
/// }
/// # }
/// ```
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename = "hopline.v1.tap", default)]
#[non_exhaustive]
pub struct Tapped {
    /// The service, as `name.vMAJOR`.
    pub service: String,
    /// The instance's id.
    pub instance: String,
    /// The calls that have ended since the document before, in the order in which they ended.
    pub calls: Vec<TappedCall>,
    /// How many more have ended since then that are left out, since there were too many.
    pub left_out: u64,
    /// Whether this is the last document of the instance.
    pub last: bool,
}

impl Document for Tapped {
    const QUESTION: &str = TAP;
    const TYPE: &str = "hopline.v1.tap";

    fn source(&self) -> (&str, &str) {
        (&self.service, &self.instance)
    }
}

/// A call that an instance has run. What it said, and what it was answered, is not told.
///
/// ```
/// # fn example(call: hopline::TappedCall) {
/// if call.code != "OK" {
///     println!("{} failed with {} after {:?}, for {}", call.method, call.code, call.handler_time(), call.caller);
/// }
/// # }
/// ```
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct TappedCall {
    /// The method that was called, shortened to 256 bytes.
    pub method: String,
    /// The id of the calling instance, as it names itself, shortened to 256 bytes. Empty if it does not.
    pub caller: String,
    /// When the call ended, in milliseconds since 1970, by the clock of the instance's machine. See [`at`](Self::at).
    pub at_ms: u64,
    /// How long it waited between being sent and the start of its handler, in microseconds: the difference of two
    /// machines' clocks. `None` if the caller does not say when it was sent.
    pub queue_micros: Option<u64>,
    /// How long its handler ran, in microseconds.
    pub handler_micros: u64,
    /// The name of the code with which it ended, such as `OK` or `NOT_FOUND`. `CANCELLED` if its caller gave up, and
    /// `UNKNOWN` for the method's own error.
    pub code: String,
    /// Whether it ended with the method's own error.
    pub own_error: bool,
    /// Its arguments, in bytes, as they came.
    pub received_bytes: u64,
    /// What it returned, in bytes, before it is compressed. 0 after a fault.
    pub returned_bytes: u64,
}

impl TappedCall {
    /// When it ended, by the clock of the instance's machine. `None` if that is not known.
    #[must_use]
    pub fn at(&self) -> Option<SystemTime> {
        since_1970(self.at_ms)
    }

    /// How long it waited between being sent and the start of its handler. `None` if that is not known.
    #[must_use]
    pub fn queue_time(&self) -> Option<Duration> {
        self.queue_micros.map(Duration::from_micros)
    }

    /// How long its handler ran.
    #[must_use]
    pub fn handler_time(&self) -> Duration {
        Duration::from_micros(self.handler_micros)
    }
}
