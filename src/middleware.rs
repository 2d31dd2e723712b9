//! Middleware: code that runs around calls, the same trait on clients and servers. It is for access logs,
//! authentication, retries and limits.

mod chain;

use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde::Serialize;
use tokio::time::Instant;
use uuid::Uuid;

pub(crate) use self::chain::Chain;
pub use self::chain::Next;
use crate::codec::Codec;
use crate::error::{Code, Error, Fault};
use crate::frame::Entries;

/// Code that runs around each call of a client, a service, or a whole server. Each of the three methods has a default
/// that changes nothing.
///
/// [`ClientBuilder::with`](crate::ClientBuilder::with) adds one to a client, [`Service::with`](crate::Service::with) to
/// a service, and [`ServerBuilder::with`](crate::ServerBuilder::with) to all services and subscriptions of a server. If
/// there are several, the first that was added is the outermost. Those of a server are around those of its services.
///
/// ```
/// use hopline::{Client, Error, Finished, Invocation, Middleware, Next, Reply};
///
/// /// Tells the servers which tenant a call is for, and prints how each call ended.
/// struct Tenant(String);
///
/// impl Middleware for Tenant {
///     async fn handle(&self, mut call: Invocation, next: Next) -> Result<Reply, Error> {
///         call.set_metadata("tenant", &self.0);
///         next.run(call).await
///     }
///
///     fn finished(&self, done: &Finished<'_>) {
///         println!("{} {}", done.call.method(), done.code);
///     }
/// }
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Error> {
/// let client = Client::builder().with(Tenant("acme".to_owned())).connect("memory://").await?;
/// # client.close().await;
/// # Ok(()) }
/// ```
pub trait Middleware: Send + Sync + 'static {
    /// Runs around a call. On a client, what is inside sends the call and waits for what comes back. On a server, it is
    /// the handler. The default only runs what is inside.
    ///
    /// `next.run(call).await` runs what is inside. It can be run several times, one after the other or at once, since
    /// an `Invocation` can be cloned. On a client, each run is an attempt with its own request id and the same
    /// [`call_id`](Invocation::call_id). Dropping the future of a run cancels that attempt: a client tells the server,
    /// and a server stops the handler at the point where it waits. If this never runs `next`, the handler does not run,
    /// and what this returns is the outcome.
    ///
    /// What comes back depends on the [style](Invocation::style). A call gives its reply. On a client, a oneway call, a
    /// broadcast and an event give an empty reply as soon as the broker has confirmed the message; the replies to a
    /// broadcast do not pass through the middleware. On a server all styles give a reply, and it is sent only if the
    /// style has one.
    ///
    /// The method's own error is `Ok(reply)` where [`Reply::is_own_error`] is true, since the method has run and
    /// returned it. Everything else is an `Err`. A server sends it as a [`Fault`]: the one in an [`Error::Fault`], or
    /// for any other error one with its [`code`](Error::code) and text. A panic is logged and becomes a fault with the
    /// code `INTERNAL`.
    ///
    /// On a server this runs within the [`Context`](crate::Context) of the call: `Context::current()` returns it, and
    /// calls that this makes inherit the deadline.
    fn handle(&self, call: Invocation, next: Next) -> impl Future<Output = Result<Reply, Error>> + Send {
        next.run(call)
    }

    /// Decides whether a server accepts a call. An `Err` refuses it. The default accepts every call. It is not called
    /// on a client.
    ///
    /// It is called as soon as the call arrives, before the call takes a place among the running calls and before its
    /// arguments are decompressed, so a refusal costs little. The [payload](Invocation::payload) is empty here. It must
    /// not block. It is also called for the questions of discovery, whose methods are `hopline.ping`, `hopline.info`
    /// and `hopline.stats`.
    ///
    /// The caller of a refused request gets the fault. A refused oneway call becomes a dead letter, and a refused event
    /// is dropped and logged. A panic is logged and refuses the call with the code `INTERNAL`.
    fn admit(&self, call: &Invocation) -> Result<(), Fault> {
        let _ = call;
        Ok(())
    }

    /// Is called once when a call has ended, also if it was refused, cancelled or timed out before it ran. The default
    /// does nothing. It must not block. A panic is logged.
    ///
    /// On a server this is called each time a handler ends, so it is called several times for a oneway call that fails
    /// and is retried. It is not called for calls that a server requeues while it drains. On a client it is called once
    /// for each call, however many attempts there were. If the caller dropped the call, the code is `CANCELLED`.
    fn finished(&self, done: &Finished<'_>) {
        let _ = done;
    }
}

/// The way in which a call was made.
///
/// ```
/// use hopline::{Invocation, Style};
///
/// fn has_an_answer(call: &Invocation) -> bool {
///     matches!(call.style(), Style::Call | Style::Broadcast)
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
/// fn name(call: &hopline::Invocation) -> String {
///     format!("{}.{}", call.service(), call.method())
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
}

impl Invocation {
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

    /// On a server, the id of this attempt. `None` on a client, where each run of [`Next`] gets a new one.
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

    /// The codec of the payload.
    #[must_use]
    pub fn codec(&self) -> Codec {
        self.codec
    }

    /// The arguments or the event, encoded with the [codec](Invocation::codec) and not compressed. Empty in
    /// [`Middleware::admit`], and in [`Middleware::finished`] on a server.
    #[must_use]
    pub fn payload(&self) -> &[u8] {
        &self.payload
    }

    /// Replaces the payload. The new one must be encoded with the same codec.
    pub fn set_payload(&mut self, payload: impl Into<Vec<u8>>) {
        self.payload = payload.into().into();
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

/// What came back from a call: the method's result, or the method's own error. Cloning is cheap.
///
/// ```
/// fn size(reply: &hopline::Reply) -> usize {
///     reply.payload().len()
/// }
/// ```
#[derive(Clone)]
pub struct Reply {
    pub(crate) codec: Codec,
    pub(crate) payload: Bytes,
    pub(crate) own_error: bool,
    pub(crate) instance: Option<Arc<str>>,
    pub(crate) handler_time: Option<Duration>,
    pub(crate) metadata: Entries,
    /// For an event: whether a subscriber did not get it.
    pub(crate) missed: bool,
}

impl Reply {
    /// A result, for middleware that answers in place of the method. `codec` must be the codec of the call.
    ///
    /// ```
    /// use hopline::{Error, Invocation, Middleware, Next, Reply};
    ///
    /// /// Answers `ping` itself, wherever it is added.
    /// struct Pong;
    ///
    /// impl Middleware for Pong {
    ///     async fn handle(&self, call: Invocation, next: Next) -> Result<Reply, Error> {
    ///         match call.method() {
    ///             "ping" => Reply::result(call.codec(), &"pong"),
    ///             _ => next.run(call).await,
    ///         }
    ///     }
    /// }
    /// ```
    ///
    /// # Errors
    /// [`Error::Codec`] if the result cannot be encoded.
    pub fn result<T: Serialize + ?Sized>(codec: Codec, result: &T) -> Result<Self, Error> {
        Ok(Self { payload: codec.encode(&result)?.into(), ..Self::empty(codec) })
    }

    /// An error of the method's own type, for middleware that answers in place of the method. `codec` must be the codec
    /// of the call.
    ///
    /// # Errors
    /// [`Error::Codec`] if the error cannot be encoded.
    pub fn own_error<E: Serialize + ?Sized>(codec: Codec, error: &E) -> Result<Self, Error> {
        Ok(Self { own_error: true, ..Self::result(codec, error)? })
    }

    /// The reply of something that has no result, such as a oneway call.
    pub(crate) fn empty(codec: Codec) -> Self {
        Self {
            codec,
            payload: Bytes::new(),
            own_error: false,
            instance: None,
            handler_time: None,
            metadata: Entries::default(),
            missed: false,
        }
    }

    /// Whether the method returned its own error. The payload is then that error.
    #[must_use]
    pub fn is_own_error(&self) -> bool {
        self.own_error
    }

    /// The codec of the payload.
    #[must_use]
    pub fn codec(&self) -> Codec {
        self.codec
    }

    /// The result or the method's own error, encoded with the codec and not compressed. Empty after a oneway call, a
    /// broadcast or an event on a client.
    #[must_use]
    pub fn payload(&self) -> &[u8] {
        &self.payload
    }

    /// On a client, the instance that replied, if one did.
    #[must_use]
    pub fn instance(&self) -> Option<&str> {
        self.instance.as_deref()
    }

    /// On a client, how long the handler ran, as the server measured it.
    #[must_use]
    pub fn handler_time(&self) -> Option<Duration> {
        self.handler_time
    }

    /// The metadata of the reply under `name`. Middleware on the server has set it.
    #[must_use]
    pub fn metadata(&self, name: &str) -> Option<&str> {
        self.metadata.get(name)
    }

    /// All metadata of the reply, as names and texts in the order in which they were set.
    pub fn metadata_entries(&self) -> impl Iterator<Item = (&str, &str)> {
        self.metadata.iter()
    }

    /// Sets metadata of the reply, in place of an earlier value under `name`. On a server it is sent to the client. It
    /// has the same limits as [`Call::metadata`](crate::Call::metadata).
    pub fn set_metadata(&mut self, name: impl Into<String>, value: impl Into<String>) {
        self.metadata.set(name.into(), value.into());
    }
}

impl fmt::Debug for Reply {
    /// Without what may be secret: payload and metadata.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reply")
            .field("codec", &self.codec)
            .field("own_error", &self.own_error)
            .field("size", &self.payload.len())
            .field("instance", &self.instance)
            .field("handler_time", &self.handler_time)
            .finish_non_exhaustive()
    }
}

/// How a call ended, for [`Middleware::finished`].
///
/// ```
/// fn log(done: &hopline::Finished<'_>) {
///     println!("{done:?}");
/// }
/// ```
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct Finished<'a> {
    /// The call, as it was before any middleware changed it.
    pub call: &'a Invocation,
    /// `OK` for a result, `UNKNOWN` for the method's own error, and otherwise the code of the fault or of the
    /// [error](Error::code). `CANCELLED` and `DEADLINE_EXCEEDED` mean that nobody waited for the outcome any more.
    pub code: Code,
    /// Whether the method returned its own error.
    pub own_error: bool,
    /// On a server, whether the handler started. On a client, whether it may have started.
    pub ran: bool,
    /// On a server, how long the call waited before its handler started, as
    /// [`Context::queue_time`](crate::Context::queue_time) tells. `None` if the handler did not start, if the caller
    /// does not say when it sent the call, and on a client.
    pub queue_time: Option<Duration>,
    /// How long the handler ran. On a server this includes the middleware around it, and on a client it is what the
    /// reply says. `None` if the handler did not start, or if a client does not know.
    pub handler_time: Option<Duration>,
    /// How long the call took altogether: on a client since it was made, on a server since it was delivered.
    pub took: Duration,
}
