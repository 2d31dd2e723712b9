//! A call as a value: its options, and the ways in which it can be made.

mod broadcast;
mod caching;
mod callback;
mod pending;
mod quorum;
mod strategies;

use std::convert::Infallible;
use std::fmt;
use std::future::Future;
use std::marker::PhantomData;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context as TaskContext, Poll, ready};
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use self::broadcast::{Broadcast, BroadcastReply};
pub use self::pending::Pending;
pub use self::quorum::Quorum;
use self::strategies::SafeValue;
use crate::client::{Absent, ArgumentWriter, Client, Request, Started, Target};
use crate::codec::{Codec, CodecError};
use crate::context::Context;
use crate::error::{Error, Fault};
use crate::exchanges::Recipients;
use crate::frame::set_entry;
use crate::middleware::Reply;
use crate::registry;
use crate::route::Route;
use crate::service::Failure;

/// One call of a method. It does nothing until it is awaited, [started](Call::start), given a [callback](Call::then),
/// [sent](Call::send) or [gathered](Call::all).
///
/// `T` is the result. `E` is the error that the method returns. If that is a type of its own, the call fails with
/// [`CallError<E>`](crate::CallError). If it is [`Fault`], the call fails with [`Error`] like any other. Options are
/// set on the call, before it is awaited:
///
/// ```
/// # use std::time::Duration;
/// # async fn example(client: hopline::Client) -> Result<(), hopline::Error> {
/// let sum: i64 = client.call("calculator.v1", "add", (2, 3)).timeout(Duration::from_secs(1)).priority(5).await?;
/// # Ok(()) }
/// ```
///
/// A call is a future, so `join!` and `join_all` make several at once, and `tokio::spawn` takes one. Dropping a call
/// that was sent cancels it, also on the server. A call that is made in a handler inherits the deadline and the trace
/// of the call being handled, wherever it is awaited.
#[must_use = "a call does nothing until it is awaited, started or sent"]
pub struct Call<T, E = Fault> {
    client: Client,
    stage: Stage,
    read: ReadResult<T>,
    /// The value that it returns in place of an error.
    safe: Option<SafeValue<T>>,
    fails_with: PhantomData<fn() -> E>,
}

/// How far a call is.
#[derive(Debug)]
enum Stage {
    /// It is sent when it is polled.
    Ready(Request<ArgumentWriter>),
    /// It waits for its reply.
    Sent(Started),
    /// It could not be sent, which is told to whoever waits for it.
    Unsent(Error),
    /// It has ended.
    Over,
}

/// Reads the payload of a reply as the result.
type ReadResult<T> = fn(Codec, &[u8]) -> Result<T, CodecError>;

/// Stands in place of a result for a call that has none, not even an empty one. Such a call is [sent](Call::send), and
/// not awaited.
///
/// ```
/// use hopline::{Call, Client, Error, Oneway};
///
/// fn note(client: &Client, line: &str) -> Call<Oneway> {
///     client.oneway("notes", "note", (line.to_owned(),))
/// }
///
/// # async fn example(client: Client) -> Result<(), Error> {
/// note(&client, "hello").send().await
/// # }
/// ```
#[derive(Debug)]
pub struct Oneway {
    _never: Infallible,
    /// Tells it from all results, which are `Send`.
    _not_send: PhantomData<*const ()>,
}

/// A result that a call can wait for: every type except [`Oneway`].
///
/// ```
/// use hopline::{Answered, Call, Error};
///
/// async fn logged<T: Answered>(call: Call<T>) -> Result<T, Error> {
///     let outcome = call.await;
///     if let Err(error) = &outcome {
///         eprintln!("{error}");
///     }
///     outcome
/// }
/// ```
#[diagnostic::on_unimplemented(
    message = "a oneway call has no answer to wait for",
    label = "only for a call that has an answer",
    note = "a oneway call is sent: `.send().await`, or `.all().send().await`, returns when the broker has it"
)]
pub trait Answered {}

#[diagnostic::do_not_recommend]
impl<T: Send> Answered for T {}

impl<T> Call<T> {
    pub(crate) fn new(
        client: Client,
        target: Result<Arc<Target>, String>,
        arguments: impl Serialize + Send + 'static,
        read: ReadResult<T>,
    ) -> Self {
        let arguments: ArgumentWriter = Box::new(move |codec, payload| codec.write(&arguments, payload));
        let (context, asked) = (Context::current(), client.asked());
        let request = Request { context, asked, ..Request::new(target, arguments) };
        Self { client, stage: Stage::Ready(request), read, safe: None, fails_with: PhantomData }
    }
}

impl<T, E> Call<T, E> {
    /// Sets how long the call may take until its result, or for a oneway call, until the broker's confirm. Default: the
    /// client's time-out, 30 s unless set. In a handler, it is never longer than what is left of the call being
    /// handled.
    pub fn timeout(self, timeout: Duration) -> Self {
        self.with(|request| request.timeout = Some(timeout))
    }

    /// Calls one instance, and not any. Its id is in [`Context::instance`](crate::Context::instance) and in a
    /// [reply](BroadcastReply::instance).
    pub fn to(self, instance: impl Into<String>) -> Self {
        self.with(|request| (request.recipients, request.route) = (Recipients::One(instance.into()), None))
    }

    /// Sets the priority, 0 to 9. Waiting calls of a higher priority are delivered first. Default: 0. More than 9
    /// counts as 9.
    ///
    /// This changes something only for a service with [`Service::priorities`](crate::Service::priorities) or
    /// [`Service::quorum`](crate::Service::quorum). Quorum queues, such as those for oneway calls, have two priorities
    /// on RabbitMQ 4 and later: 0 to 4, and 5 to 9.
    pub fn priority(self, priority: u8) -> Self {
        self.with(|request| request.priority = Some(priority))
    }

    /// Adds text for the handler, which reads it with [`Context::metadata`](crate::Context::metadata). Setting a name
    /// again replaces its value. A call may have 128 entries. Together they may take 60 KiB, where each counts 10 bytes
    /// more than its text.
    pub fn metadata(self, name: impl Into<String>, value: impl Into<String>) -> Self {
        let (name, value) = (name.into(), value.into());
        self.with(|request| set_entry(&mut request.metadata, name, value))
    }

    /// Sets how arguments and result are written. Default: the client's codec, CBOR unless set.
    pub fn codec(self, codec: Codec) -> Self {
        self.with(|request| request.codec = Some(codec))
    }

    /// Calls every instance of the service. Each runs the method: a oneway call once, as soon as it can; another call
    /// is answered by each.
    pub fn all(self) -> Broadcast<T, E> {
        Broadcast::new(self)
    }

    /// Sets an option. A call that was sent cannot be changed any more.
    fn with(mut self, set: impl FnOnce(&mut Request<ArgumentWriter>)) -> Self {
        if let Stage::Ready(request) = &mut self.stage {
            set(request);
        }
        self
    }

    /// The request of a call that was not sent yet.
    fn unsent(stage: Stage) -> Result<Request<ArgumentWriter>, Error> {
        match stage {
            Stage::Ready(request) => Ok(request),
            Stage::Sent(_) | Stage::Unsent(_) | Stage::Over => Err(is_on_its_way()),
        }
    }

    /// The method of a call that was not sent yet.
    fn target(&self) -> Result<Arc<Target>, Error> {
        match &self.stage {
            Stage::Ready(request) => request.target.clone().map_err(Error::Invalid),
            Stage::Sent(_) | Stage::Unsent(_) | Stage::Over => Err(is_on_its_way()),
        }
    }

    /// Sends the call, unless it was sent.
    fn dispatch(&mut self) -> Result<(), Error> {
        self.stage = match std::mem::replace(&mut self.stage, Stage::Over) {
            Stage::Ready(request) => {
                let mut request = self.client.ruled(self.client.with_canary(request), true)?;
                request.asked = self.client.granted(&request);
                let may_choose = self.client.route_of(&request).is_some_and(|route| !matches!(*route, Route::One(_)));
                if may_choose || request.asked.needs_instances() {
                    registry::follow(&self.client);
                    self.client.expects(&request);
                }
                Stage::Sent(self.client.begin(request)?)
            }
            stage => stage,
        };
        Ok(())
    }
}

/// What only a call with an answer has.
impl<T, E> Call<T, E> {
    /// Sets the type of the error that the method returns. From here on the call fails with
    /// [`CallError<F>`](crate::CallError). The default is [`Fault`], with which it fails with [`Error`].
    ///
    /// ```
    /// use hopline::{CallError, Client};
    ///
    /// # async fn example(client: Client) {
    /// let outcome = client.call::<i64>("calculator.v1", "div", (2, 0)).fails_with::<String>().await;
    /// if let Err(CallError::Service(refusal)) = outcome {
    ///     println!("the method says: {refusal}");
    /// }
    /// # }
    /// ```
    pub fn fails_with<F: Failure>(self) -> Call<T, F>
    where
        T: Answered,
    {
        Call { client: self.client, stage: self.stage, read: self.read, safe: self.safe, fails_with: PhantomData }
    }

    /// Says that the method may run twice without harm. The client then sends the call again if its connection or its
    /// instance is lost. Whether another instance runs a call that the broker redelivers is up to
    /// [`Method::idempotent`](crate::Method::idempotent) on the server. `#[rpc(idempotent)]` sets both.
    pub fn idempotent(self) -> Self
    where
        T: Answered,
    {
        self.with(|request| request.idempotent = true)
    }

    /// Sets whether the call waits while its service has no instance. This is for calls to any instance; others fail at
    /// once. Default: the client's setting, [`Absent::Wait`] unless set.
    ///
    /// ```
    /// # async fn example(client: hopline::Client) -> Result<(), hopline::Error> {
    /// let sum: i64 = client.call("calculator.v1", "add", (2, 3)).absent(hopline::Absent::Fail).await?;
    /// # Ok(()) }
    /// ```
    pub fn absent(self, absent: Absent) -> Self
    where
        T: Answered,
    {
        self.with(|request| request.absent = Some(absent))
    }

    /// Sets how the instance is chosen that runs the call. Default: the client's setting for the
    /// [service](crate::ClientBuilder::route), [`Route::Any`] unless set. This replaces [`to`](Self::to).
    ///
    /// If no instance is known that it could go to, the call waits 200 ms for one and fails with
    /// [`NoService`](Error::NoService); it has not run.
    ///
    /// ```
    /// # async fn example(client: hopline::Client) -> Result<(), hopline::Error> {
    /// let items: u32 = client.call("carts", "items", ("c-17",)).route(hopline::Route::Key("c-17".into())).await?;
    /// # Ok(()) }
    /// ```
    pub fn route(self, route: Route) -> Self
    where
        T: Answered,
    {
        self.with(|request| {
            (request.recipients, request.route) = match route {
                Route::One(instance) => (Recipients::One(instance), None),
                route => (Recipients::Any, Some(Arc::new(route))),
            }
        })
    }

    /// Sends the call at once. The result is collected later, by awaiting what this returns.
    ///
    /// # Errors
    /// What is known at once: an invalid name, arguments that cannot be written or are too large, a client that was
    /// closed.
    pub async fn start(mut self) -> Result<Pending<T, E>, Error>
    where
        T: Answered,
    {
        self.set_off()?;
        Ok(Pending::new(self))
    }
}

impl Call<Oneway> {
    /// Sends a oneway call. Returns after the broker has confirmed it. Some instance runs it at least once, now or
    /// after a restart. With [`Call::to`] only that instance gets it, and the call is lost with it.
    ///
    /// If the connection is lost, the call is sent again with the same id. So after `Timeout`, or an error with
    /// `may_have_run: true`, it may run all the same.
    ///
    /// # Errors
    /// - `NoService` if the service was never served, or the instance is gone.
    /// - `Unreachable` if its queue refuses the call, for example since most of its nodes are down.
    /// - `Blocked` while the broker accepts no messages.
    /// - `Timeout` if the broker has not confirmed in time.
    /// - `Disconnected` if there was no connection until then, or the client was closed.
    pub async fn send(self) -> Result<(), Error> {
        self.client.send(Self::unsent(self.stage)?).await
    }
}

impl<T: Answered, E: Failure> Future for Call<T, E> {
    type Output = Result<T, E::Error>;

    fn poll(mut self: Pin<&mut Self>, context: &mut TaskContext<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        if matches!(this.stage, Stage::Ready(_)) {
            this.dispatch().or_else(|error| this.keep(error))?;
        }
        let reply = match &mut this.stage {
            Stage::Sent(started) => ready!(Pin::new(started).poll(context)),
            Stage::Unsent(_) => this.unsent_error(),
            Stage::Ready(_) | Stage::Over => panic!("a call was polled after its end"),
        };
        Poll::Ready(match this.safe.take() {
            None => reply.map_err(E::Error::from).and_then(|reply| outcome::<T, E>(&reply, this.read)),
            Some(safe) => this.safely(reply, safe),
        })
    }
}

impl<T, E> fmt::Debug for Call<T, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Call").field(&self.stage).finish()
    }
}

/// The error of a call that was sent already, and cannot be sent to all.
fn is_on_its_way() -> Error {
    Error::Invalid("the call is on its way already: make another one for all instances".to_owned())
}

/// The outcome that a reply tells. A compressed payload may decompress to at most `max_payload` bytes.
fn outcome<T, E: Failure>(reply: &Reply, read: ReadResult<T>) -> Result<T, E::Error> {
    if reply.is_own_error() {
        return Err(E::read(reply.codec(), reply.payload()));
    }
    read(reply.codec(), reply.payload())
        .map_err(|error| Error::UnreadableReply(CodecError(format!("the reply {}", error.0))).into())
}

impl Client {
    /// Makes a call without a service trait. `service` is `name` or `name.vMAJOR`. `args` is anything that serde writes
    /// as an array: a tuple, an array, or a `Vec`.
    pub fn call<R>(&self, service: &str, method: &str, args: impl Serialize + Send + 'static) -> Call<R>
    where
        // `DeserializeOwned` spelled out: of this, rustc tells what to derive.
        R: for<'de> Deserialize<'de> + Send + 'static,
    {
        Call::new(self.clone(), self.target(service, method), args, Codec::decode)
    }

    /// Makes a oneway call without a service trait. [`send`](Call::send) publishes it.
    pub fn oneway(&self, service: &str, method: &str, args: impl Serialize + Send + 'static) -> Call<Oneway> {
        let no_result = |_: Codec, _: &[u8]| Err(CodecError("a oneway call has no result".to_owned()));
        Call::new(self.clone(), self.target(service, method), args, no_result)
    }
}
