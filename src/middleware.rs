//! What goes around calls, the same on both sides: access logs, authentication, retries, limits.

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

/// What goes around each call of a client, a service, or a whole server. All three methods have a default that changes nothing.
///
/// One is given to a client by [`ClientBuilder::with`](crate::ClientBuilder::with), to a service by
/// [`Service::with`](crate::Service::with), and to all services and subscriptions of a server by
/// [`ServerBuilder::with`](crate::ServerBuilder::with). Of several, the first that was added is the outermost; those of a
/// server are around those of its services.
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
    /// Goes around a call: on the client around sending it and waiting for what comes back, on the server around its handler.
    /// By default it runs what is inside, and nothing else.
    ///
    /// `next.run(call).await` runs what is inside. It may be run several times, one after the other or at once, since an
    /// `Invocation` can be cloned: on a client each run is an attempt with a request id of its own, and with the same
    /// [`call_id`](Invocation::call_id). Dropping the future of a run cancels that attempt: on a client its server hears of
    /// it, on a server the handler is dropped where it waits. Without a run the handler does not run, and what this
    /// returns is the outcome.
    ///
    /// What comes back depends on the [style](Invocation::style). Of a call it is the reply. Of a oneway call, a broadcast and
    /// an event a client has an empty reply as soon as the broker has the message; the replies to a broadcast go past the
    /// middleware to whoever gathers them. On a server all have a reply, which is sent only if the style has one.
    ///
    /// An error of the method's own is an `Ok(Reply)`, of which [`Reply::is_own_error`] is true: the method has run and said so.
    /// `Err` is everything else. A server sends it as a [`Fault`]: the one of an [`Error::Fault`], or one with the
    /// [`code`](Error::code) and the text of any other. A panic is a fault with the code `INTERNAL`, and logged.
    ///
    /// On a server this runs in the [`Context`](crate::Context) of the call: `Context::current()` is there, and calls that it
    /// makes inherit the deadline.
    fn handle(&self, call: Invocation, next: Next) -> impl Future<Output = Result<Reply, Error>> + Send {
        next.run(call)
    }

    /// Says whether a server takes a call: `Err` refuses it. By default it takes all. A client does not ask this.
    ///
    /// It is asked as soon as the call has come, before it takes up a place among the calls that run and before its arguments
    /// are decompressed, so refusing costs little: the [payload](Invocation::payload) is empty here. It must not wait.
    /// Questions of discovery are asked about too: their methods are `hopline.ping`, `hopline.info` and `hopline.stats`.
    ///
    /// The caller of a refused request gets the fault. A refused oneway call is kept with the dead letters, a refused event is
    /// dropped and logged. A panic refuses with the code `INTERNAL`, and is logged.
    fn admit(&self, call: &Invocation) -> Result<(), Fault> {
        let _ = call;
        Ok(())
    }

    /// Is told how a call ended, once, when all is over: of those that ran, and of those that were refused, cancelled or
    /// timed out before. By default it does nothing. It must not wait; a panic is logged.
    ///
    /// On a server it is told at each end of a handler, so a oneway call that fails and is tried again ends several times. What
    /// a server gives back to its queue as it drains has not ended. On a client it is told once a call, however many attempts
    /// that took; a call that its caller dropped has ended as `CANCELLED`.
    fn finished(&self, done: &Finished<'_>) {
        let _ = done;
    }
}

/// In which way a call was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Style {
    /// Any one instance, or a given one, answers.
    Call,
    /// Each instance answers.
    Broadcast,
    /// Nobody answers: to any instance, a given one, or all.
    Oneway,
    /// Published to whoever subscribes.
    Event,
}

/// A call on its way through the middleware of a client or a server. Cloning is cheap.
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
    /// In which way the call was made.
    #[must_use]
    pub fn style(&self) -> Style {
        self.style
    }

    /// The service, as `name.vMAJOR`; `events` for an event.
    #[must_use]
    pub fn service(&self) -> &str {
        &self.service
    }

    /// The method, or the key of an event.
    #[must_use]
    pub fn method(&self) -> &str {
        &self.method
    }

    /// The calling client, as [`Context::caller`](crate::Context::caller): what it says of itself, not proof.
    #[must_use]
    pub fn caller(&self) -> Option<&str> {
        self.caller.as_deref()
    }

    /// On a server, the user that the caller is to the broker, as [`Context::user`](crate::Context::user). `None` on a client.
    #[must_use]
    pub fn user(&self) -> Option<&str> {
        self.user.as_deref()
    }

    /// The id of the call, the same in all its attempts.
    #[must_use]
    pub fn call_id(&self) -> Uuid {
        self.call_id
    }

    /// On a server, the id of this request, which is that of one attempt. `None` on a client, where each run of [`Next`] draws one.
    #[must_use]
    pub fn request_id(&self) -> Option<Uuid> {
        self.request_id
    }

    /// Time left. `None` for what has no deadline, as oneway calls and events on a server.
    #[must_use]
    pub fn remaining(&self) -> Option<Duration> {
        self.deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()))
    }

    /// Whether the caller says that the method may run twice without harm.
    #[must_use]
    pub fn idempotent(&self) -> bool {
        self.idempotent
    }

    /// What the call says under `name`.
    #[must_use]
    pub fn metadata(&self, name: &str) -> Option<&str> {
        self.metadata.get(name)
    }

    /// All that the call says, names and texts in the order in which they were set.
    pub fn metadata_entries(&self) -> impl Iterator<Item = (&str, &str)> {
        self.metadata.iter()
    }

    /// Lets the call say this under `name`, instead of what it said there. On a client it goes to the server; on a server the
    /// handler reads it with [`Context::metadata`](crate::Context::metadata).
    pub fn set_metadata(&mut self, name: impl Into<String>, value: impl Into<String>) {
        self.metadata.set(name.into(), value.into());
    }

    /// How the payload is written.
    #[must_use]
    pub fn codec(&self) -> Codec {
        self.codec
    }

    /// The arguments, or the event, as the [codec](Invocation::codec) writes them, never compressed. Empty in
    /// [`Middleware::admit`] and [`Middleware::finished`] on a server.
    #[must_use]
    pub fn payload(&self) -> &[u8] {
        &self.payload
    }

    /// Replaces the payload, by what the same codec has written.
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

/// What came back: the method's result, or the error that the method itself returned. Cloning is cheap.
#[derive(Clone)]
pub struct Reply {
    pub(crate) codec: Codec,
    pub(crate) payload: Bytes,
    pub(crate) own_error: bool,
    pub(crate) instance: Option<Arc<str>>,
    pub(crate) handler_time: Option<Duration>,
    pub(crate) metadata: Entries,
    /// Of an event, whether a subscriber has missed it.
    pub(crate) missed: bool,
}

impl Reply {
    /// A result that a middleware answers with, in place of the method. The codec is that of the call.
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
    /// [`Error::Codec`] for what cannot be written.
    pub fn result<T: Serialize + ?Sized>(codec: Codec, result: &T) -> Result<Self, Error> {
        Ok(Self { payload: codec.encode(&result)?.into(), ..Self::empty(codec) })
    }

    /// An error of the method's own type that a middleware answers with, in place of the method.
    ///
    /// # Errors
    /// [`Error::Codec`] for what cannot be written.
    pub fn own_error<E: Serialize + ?Sized>(codec: Codec, error: &E) -> Result<Self, Error> {
        Ok(Self { own_error: true, ..Self::result(codec, error)? })
    }

    /// That something was done which has no result.
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

    /// Whether the method returned its own error, which is then the payload.
    #[must_use]
    pub fn is_own_error(&self) -> bool {
        self.own_error
    }

    /// How the payload is written.
    #[must_use]
    pub fn codec(&self) -> Codec {
        self.codec
    }

    /// The result, or the method's own error, as the codec writes it, never compressed. Empty where there is none: after a oneway
    /// call, a broadcast or an event on a client.
    #[must_use]
    pub fn payload(&self) -> &[u8] {
        &self.payload
    }

    /// On a client, the instance that answered, if one did.
    #[must_use]
    pub fn instance(&self) -> Option<&str> {
        self.instance.as_deref()
    }

    /// On a client, how long the handler ran, as the server says.
    #[must_use]
    pub fn handler_time(&self) -> Option<Duration> {
        self.handler_time
    }

    /// What the reply says under `name`, set by a middleware of the server.
    #[must_use]
    pub fn metadata(&self, name: &str) -> Option<&str> {
        self.metadata.get(name)
    }

    /// All that the reply says, names and texts in the order in which they were set.
    pub fn metadata_entries(&self) -> impl Iterator<Item = (&str, &str)> {
        self.metadata.iter()
    }

    /// Lets the reply say this under `name`, instead of what it said there. On a server it goes to the client, within the
    /// bounds of [`Call::metadata`](crate::Call::metadata).
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

/// How a call ended.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct Finished<'a> {
    /// The call, as it was before any middleware changed it.
    pub call: &'a Invocation,
    /// What it came to: `OK` for a result, `UNKNOWN` for the method's own error, otherwise the code of the fault or the
    /// [error](Error::code). `CANCELLED` and `DEADLINE_EXCEEDED` say that nobody waited for the outcome any more.
    pub code: Code,
    /// Whether the method returned its own error.
    pub own_error: bool,
    /// On a server, whether the handler was started; on a client, whether it may have been.
    pub ran: bool,
    /// On a server, how long the call waited before it was started, as [`Context::queue_time`](crate::Context::queue_time).
    /// `None` if it was not started, and on a client.
    pub queue_time: Option<Duration>,
    /// How long the handler ran: on a server with the middleware around it, on a client as the reply says. `None` if it was not
    /// started, or if a client does not know.
    pub handler_time: Option<Duration>,
    /// From beginning to end: on a client since the call was made, on a server since it was delivered.
    pub took: Duration,
}
