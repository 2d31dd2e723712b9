//! What a handler may know of the call it handles; calls made inside it inherit its deadline and its trace.

use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

tokio::task_local! {
    static CURRENT: Context;
}

/// The call being handled. Cloning is cheap; a clone may outlive the handler.
///
/// A method of a service trait may take `ctx: &Context` as its first argument; it is not part of the call's arguments.
#[derive(Clone)]
pub struct Context(Arc<Inner>);

pub(crate) struct Inner {
    pub(crate) service: Arc<str>,
    pub(crate) method: String,
    pub(crate) instance: Arc<str>,
    pub(crate) id: Uuid,
    pub(crate) caller: Option<String>,
    pub(crate) deadline: Option<Instant>,
    pub(crate) redelivered: bool,
    pub(crate) metadata: Vec<(String, String)>,
    pub(crate) trace: Trace,
    pub(crate) cancelled: CancellationToken,
}

impl Context {
    pub(crate) fn new(inner: Inner) -> Self {
        Self(Arc::new(inner))
    }

    /// The context of the handler that runs this task, if one does. A task that the handler spawned has none.
    #[must_use]
    pub fn current() -> Option<Self> {
        CURRENT.try_with(Self::clone).ok()
    }

    /// Runs `future` as a part of the handling of this call.
    pub(crate) fn scope<F: Future>(self, future: F) -> impl Future<Output = F::Output> {
        CURRENT.scope(self, future)
    }

    /// The service, as `name.vMAJOR`; `events` for an event.
    #[must_use]
    pub fn service(&self) -> &str {
        &self.0.service
    }

    /// The method, or the key of an event.
    #[must_use]
    pub fn method(&self) -> &str {
        &self.0.method
    }

    /// The id of the server instance that handles the call: what [`Call::to`](crate::Call::to) takes.
    #[must_use]
    pub fn instance(&self) -> &str {
        &self.0.instance
    }

    /// The request's id, the same in every attempt.
    #[must_use]
    pub fn request_id(&self) -> Uuid {
        self.0.id
    }

    /// The id that the calling client gave itself, if it did. It is what the client says, not proof of who it is.
    #[must_use]
    pub fn caller(&self) -> Option<&str> {
        self.0.caller.as_deref()
    }

    /// Time left until nobody waits for the reply; `None` when the call has no deadline, as oneway calls and events.
    #[must_use]
    pub fn remaining(&self) -> Option<Duration> {
        self.deadline().map(|deadline| deadline.saturating_duration_since(Instant::now()))
    }

    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.0.deadline
    }

    /// Whether the broker delivered the call before: it may have run, in whole or in part.
    #[must_use]
    pub fn redelivered(&self) -> bool {
        self.0.redelivered
    }

    /// What the caller set with [`Call::metadata`](crate::Call::metadata) under `name`.
    #[must_use]
    pub fn metadata(&self, name: &str) -> Option<&str> {
        self.0.metadata.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// The W3C `traceparent` of this call's span.
    #[must_use]
    pub fn traceparent(&self) -> String {
        self.0.trace.to_string()
    }

    pub(crate) fn trace(&self) -> Trace {
        self.0.trace
    }

    /// Resolves when the caller gave up or the deadline passed. The handler's own future is dropped then;
    /// this is for work that it handed to other tasks or threads.
    pub async fn cancelled(&self) {
        self.0.cancelled.cancelled().await;
    }

    /// Whether the caller gave up or the deadline passed: for code that runs without awaiting.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.0.cancelled.is_cancelled()
    }
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context")
            .field("service", &self.service())
            .field("method", &self.method())
            .field("request_id", &self.request_id())
            .field("remaining", &self.remaining())
            .finish_non_exhaustive()
    }
}

/// Where a call stands in its trace: [W3C Trace Context](https://www.w3.org/TR/trace-context/), version 00.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Trace {
    trace_id: u128,
    span_id: u64,
    flags: u8,
}

impl Trace {
    /// The first span of a new trace.
    fn root() -> Self {
        Self { trace_id: Uuid::new_v4().as_u128(), span_id: span_id(), flags: 1 }
    }

    /// A new span under `parent`, or in a trace of its own.
    pub(crate) fn under(parent: Option<Self>) -> Self {
        match parent {
            Some(parent) => Self { span_id: span_id(), ..parent },
            None => Self::root(),
        }
    }

    /// Reads a `traceparent`; a malformed one starts a new trace, as the specification asks.
    pub(crate) fn parse(traceparent: &str) -> Option<Self> {
        let mut parts = traceparent.split('-');
        let (version, trace_id, span_id, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        let hex =
            |text: &str, length| text.len() == length && text.bytes().all(|c| matches!(c, b'0'..=b'9' | b'a'..=b'f'));
        let well_formed = hex(version, 2) && hex(trace_id, 32) && hex(span_id, 16) && hex(flags, 2);
        let known = version != "ff" && (version != "00" || parts.next().is_none());
        if !(well_formed && known) {
            return None;
        }
        let trace = Self {
            trace_id: u128::from_str_radix(trace_id, 16).ok()?,
            span_id: u64::from_str_radix(span_id, 16).ok()?,
            flags: u8::from_str_radix(flags, 16).ok()?,
        };
        (trace.trace_id != 0 && trace.span_id != 0).then_some(trace)
    }
}

/// Half of a random UUID, the half without its version bits; never 0, which is invalid.
fn span_id() -> u64 {
    Uuid::new_v4().as_u64_pair().1 | 1
}

impl fmt::Display for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00-{:032x}-{:016x}-{:02x}", self.trace_id, self.span_id, self.flags)
    }
}

/// This machine's clock, in milliseconds since 1970.
pub(crate) fn unix_millis() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_traceparent_is_read_and_written_alike() {
        let text = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let trace = Trace::parse(text).expect("the specification's own example");
        assert_eq!(trace.to_string(), text);
        let child = Trace::under(Some(trace));
        assert_eq!((child.trace_id, child.flags), (trace.trace_id, trace.flags));
        assert_ne!(child.span_id, trace.span_id);
    }

    #[test]
    fn a_malformed_traceparent_is_not_read() {
        for text in [
            "",
            "00",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331",
            "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-x",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
        ] {
            assert_eq!(Trace::parse(text), None, "{text}");
        }
    }
}
