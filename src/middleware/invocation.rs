//! A call as middleware sees it.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;
use uuid::Uuid;

use super::apart::Apart;
use super::policies::{Asked, TalliedCall};
use super::retry::RetryOn;
use crate::codec::Codec;
use crate::frame::{Entries, Trace, Traceparent};

/// The way in which a call was made.
///
/// ```
/// use hopline::{Code, Fault, Invocation, Middleware, Style};
///
/// /// Refuses calls to all instances.
/// struct NoBroadcasts;
///
/// impl Middleware for NoBroadcasts {
///     fn admit(&self, call: &Invocation) -> Result<(), Fault> {
///         match call.style() {
///             Style::Broadcast => Err(Fault::new(Code::PermissionDenied, "ask one instance")),
///             _ => Ok(()),
///         }
///     }
/// }
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Style {
    /// One instance answers: any, or a given one.
    Call,
    /// Every instance answers.
    Broadcast,
    /// No instance answers. It goes to any instance, a given one, or all.
    Oneway,
    /// It is an event for all subscribers.
    Event,
}

/// A call on its way through middleware. Cloning is cheap.
///
/// ```
/// use hopline::{Error, Invocation, Middleware, Next, Reply};
///
/// /// Tells the server in which region its caller is, unless the call says it.
/// struct Region(String);
///
/// impl Middleware for Region {
///     async fn handle(&self, mut call: Invocation, next: Next) -> Result<Reply, Error> {
///         if call.metadata("region").is_none() {
///             call.set_metadata("region", &self.0);
///         }
///         next.run(call).await
///     }
/// }
/// ```
#[derive(Clone)]
pub struct Invocation {
    pub(crate) style: Style,
    pub(crate) service: Arc<str>,
    pub(crate) method: Arc<str>,
    pub(crate) caller: Option<Arc<str>>,
    pub(crate) user: Option<Arc<str>>,
    pub(crate) call_id: Uuid,
    pub(crate) request_id: Option<Uuid>,
    pub(crate) deadline: Option<Instant>,
    pub(crate) metadata: Entries,
    pub(crate) codec: Codec,
    pub(crate) payload: Bytes,
    pub(crate) idempotent: bool,
    /// What the call asks of the client's policies.
    pub(crate) asked: Asked,
    /// Which of the method's own errors are worth another attempt.
    pub(crate) retry_on: Option<RetryOn>,
    /// Instances that it is not to go to, unless there is no other.
    pub(crate) avoid: Vec<Arc<str>>,
    /// Set if other attempts are on their way at the same time.
    pub(crate) apart: Option<Apart>,
    /// On a client, what is counted of it. `None` for an event.
    pub(crate) counted: Option<Arc<TalliedCall>>,
    /// The span of the caller. On a client, the one that a middleware has set.
    pub(crate) traceparent: Option<Traceparent>,
    /// On a server, whether the service has the method.
    pub(crate) served: bool,
    /// On a server, whether the method is declared as idempotent, so that several calls may share one run of it.
    pub(crate) repeatable: bool,
}

impl Invocation {
    /// A call of which nothing else is known yet.
    pub(crate) fn new(style: Style, service: Arc<str>, method: Arc<str>, call_id: Uuid) -> Self {
        Self {
            style,
            service,
            method,
            caller: None,
            user: None,
            call_id,
            request_id: None,
            deadline: None,
            metadata: Entries::default(),
            codec: Codec::default(),
            payload: Bytes::new(),
            idempotent: false,
            asked: Asked::default(),
            retry_on: None,
            avoid: Vec::new(),
            apart: None,
            counted: None,
            traceparent: None,
            served: true,
            repeatable: false,
        }
    }

    /// The way in which the call was made.
    #[must_use]
    pub fn style(&self) -> Style {
        self.style
    }

    /// The service, written `name.vMAJOR`, or `events` for an event.
    #[must_use]
    pub fn service(&self) -> &str {
        &self.service
    }

    /// The method, or the key of an event.
    #[must_use]
    pub fn method(&self) -> &str {
        &self.method
    }

    /// The client that calls, as in [`Context::caller`](crate::Context::caller). It is what the client says about
    /// itself, and is no proof.
    #[must_use]
    pub fn caller(&self) -> Option<&str> {
        self.caller.as_deref()
    }

    /// On a server, the user with which the caller has logged in to the broker, as in
    /// [`Context::user`](crate::Context::user). `None` on a client.
    #[must_use]
    pub fn user(&self) -> Option<&str> {
        self.user.as_deref()
    }

    /// The id of the call. It is the same for all its attempts.
    #[must_use]
    pub fn call_id(&self) -> Uuid {
        self.call_id
    }

    /// On a server, the id of this attempt. `None` on a client, where each run of [`Next`](crate::Next) gets a new one.
    #[must_use]
    pub fn request_id(&self) -> Option<Uuid> {
        self.request_id
    }

    /// How much time is left until the deadline. `None` if there is no deadline, as for oneway calls and events on a
    /// server.
    #[must_use]
    pub fn remaining(&self) -> Option<Duration> {
        self.deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()))
    }

    /// Whether the caller has marked the call as idempotent: it may run twice without harm.
    #[must_use]
    pub fn idempotent(&self) -> bool {
        self.idempotent
    }

    /// The metadata of the call under `name`.
    #[must_use]
    pub fn metadata(&self, name: &str) -> Option<&str> {
        self.metadata.get(name)
    }

    /// All metadata of the call, as names and texts in the order in which they were set.
    pub fn metadata_entries(&self) -> impl Iterator<Item = (&str, &str)> {
        self.metadata.iter()
    }

    /// Sets metadata of the call, in place of an earlier value under `name`. On a client it is sent to the server. On a
    /// server the handler reads it with [`Context::metadata`](crate::Context::metadata).
    pub fn set_metadata(&mut self, name: impl Into<String>, value: impl Into<String>) {
        self.metadata.set(name.into(), value.into());
    }

    /// The W3C `traceparent` of the caller's span. On a server, as it came with the call: `None` if the caller has none. On a
    /// client, as a middleware has [set](Invocation::set_traceparent) it.
    #[must_use]
    pub fn traceparent(&self) -> Option<&str> {
        self.traceparent.as_ref().map(Traceparent::as_str)
    }

    /// On a client, sets the span that the call belongs to, as a W3C `traceparent` of version 00. It goes with all attempts of
    /// the call in place of the one that Hopline makes, so that the traces of another system, such as OpenTelemetry, go
    /// on at the server. A text that cannot be read is not sent. On a server this changes nothing.
    ///
    /// ```
    /// use hopline::{Error, Invocation, Middleware, Next, Reply};
    ///
    /// /// Sends the span that another system is in.
    /// struct Traced(fn() -> String);
    ///
    /// impl Middleware for Traced {
    ///     async fn handle(&self, mut call: Invocation, next: Next) -> Result<Reply, Error> {
    ///         call.set_traceparent(&(self.0)());
    ///         next.run(call).await
    ///     }
    /// }
    /// ```
    pub fn set_traceparent(&mut self, traceparent: &str) {
        self.traceparent = Trace::parse(traceparent).map(|trace| trace.text());
    }

    /// The codec of the payload.
    #[must_use]
    pub fn codec(&self) -> Codec {
        self.codec
    }

    /// The arguments or the event, encoded with the [codec](Invocation::codec) and not compressed. Empty in
    /// [`Middleware::admit`](crate::Middleware::admit), and in [`Middleware::finished`](crate::Middleware::finished) on a server.
    #[must_use]
    pub fn payload(&self) -> &[u8] {
        &self.payload
    }

    /// Replaces the payload. The new one must be encoded with the same codec.
    pub fn set_payload(&mut self, payload: impl Into<Vec<u8>>) {
        self.payload = payload.into().into();
    }
}

impl Invocation {
    /// The span that a middleware has set.
    pub(crate) fn set_trace(&self) -> Option<Trace> {
        self.traceparent().and_then(Trace::parse)
    }

    /// Counts what a policy does with it.
    pub(crate) fn count(&self, count: impl FnOnce(&TalliedCall)) {
        if let Some(counted) = &self.counted {
            count(counted);
        }
    }
}

impl fmt::Debug for Invocation {
    /// Without what may be secret: payload and texts of metadata.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Invocation")
            .field("style", &self.style)
            .field("service", &self.service)
            .field("method", &self.method)
            .field("call_id", &self.call_id)
            .field("caller", &self.caller)
            .field("user", &self.user)
            .finish_non_exhaustive()
    }
}
