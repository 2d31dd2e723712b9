//! One invocation as a value: its options, and the styles in which it can be made.

mod broadcast;
mod callback;

use std::convert::Infallible;
use std::fmt;
use std::future::Future;
use std::marker::PhantomData;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context as TaskContext, Poll};
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use self::broadcast::{Broadcast, BroadcastReply};
use self::callback::Called;
use crate::client::{Absent, Arguments, Client, Request, Started, Target};
use crate::codec::{Codec, CodecError};
use crate::context::Context;
use crate::error::{Error, Fault};
use crate::frame::set_entry;
use crate::middleware::Reply;
use crate::route::Route;
use crate::service::Failure;

/// One invocation of a method. It does nothing until it is awaited, [started](Call::start), given a
/// [callback](Call::then), [sent](Call::send) or [gathered](Call::all).
///
/// `T` is the result. `E` is the error that the method returns: its own type, with which the call fails as
/// [`CallError<E>`](crate::CallError), or [`Fault`], with which it fails as [`Error`] like any call. Options are set on the
/// call, not on the client, and before it is awaited:
///
/// ```
/// # use std::time::Duration;
/// # async fn example(client: hopline::Client) -> Result<(), hopline::Error> {
/// let sum: i64 = client.call("calculator.v1", "add", (2, 3)).timeout(Duration::from_secs(1)).priority(5).await?;
/// # Ok(()) }
/// ```
///
/// A call is a future: several are made at once by `join!` or `join_all`, and `tokio::spawn` takes one. Dropping it once it
/// is on its way cancels it, on the server too. One that is made in a handler inherits that call's deadline and trace,
/// wherever it is awaited.
#[must_use = "a call does nothing until it is awaited, started or sent"]
pub struct Call<T, E = Fault> {
    client: Client,
    stage: Stage,
    read: ReadResult<T>,
    fails_with: PhantomData<fn() -> E>,
}

#[derive(Debug)]
enum Stage {
    /// To be sent when it is polled.
    Ready(Box<Request<Arguments>>),
    Sent(Started),
    Over,
}

type ReadResult<T> = fn(Codec, &[u8]) -> Result<T, CodecError>;

/// In the place of a result: a call that has none, not even an empty one. It is [sent](Call::send), not awaited.
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
    /// What tells it from all results, which are `Send`.
    _not_send: PhantomData<*const ()>,
}

/// A result that a call can wait for: any, but for a [`Oneway`] call's, which has none.
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
        let arguments: Arguments = Box::new(move |codec, payload| codec.write(&arguments, payload));
        let request = Request { context: Context::current(), ..Request::new(target, arguments) };
        Self { client, stage: Stage::Ready(Box::new(request)), read, fails_with: PhantomData }
    }
}

impl<T, E> Call<T, E> {
    /// How long the call may take, from now to its result, or a oneway call until the broker has it. Default: the
    /// client's, 30 s unless set. Inside a handler, no longer than what is left of the call being handled.
    pub fn timeout(self, timeout: Duration) -> Self {
        self.with(|request| request.timeout = Some(timeout))
    }

    /// To one instance, by the id that [`Context::instance`](crate::Context::instance) or a
    /// [reply](BroadcastReply::instance) told, instead of any.
    pub fn to(self, instance: impl Into<String>) -> Self {
        self.with(|request| request.route = Route::One(instance.into()))
    }

    /// 0 to 9; calls of a higher priority overtake waiting ones of a lower, in a service with
    /// [`Service::priorities`](crate::Service::priorities) or [`Service::quorum`](crate::Service::quorum): in others it
    /// changes nothing. Default 0; more than 9 counts as 9. The queue of oneway calls is a quorum queue: RabbitMQ 4 and later
    /// tell two priorities apart there, 0 to 4 and 5 to 9.
    pub fn priority(self, priority: u8) -> Self {
        self.with(|request| request.priority = Some(priority))
    }

    /// Text for the handler, which reads it with [`Context::metadata`](crate::Context::metadata); setting a name again
    /// replaces its value. All metadata of a call may have 128 entries, and take 60 KiB
    /// with 10 bytes for each of them.
    pub fn metadata(self, name: impl Into<String>, value: impl Into<String>) -> Self {
        let (name, value) = (name.into(), value.into());
        self.with(|request| set_entry(&mut request.metadata, name, value))
    }

    /// How arguments and result are written. Default: the client's, CBOR unless set.
    pub fn codec(self, codec: Codec) -> Self {
        self.with(|request| request.codec = Some(codec))
    }

    /// Broadcast style: every instance of the service that is up runs the method. Of a oneway call each runs it once, as soon
    /// as it can; of others each answers.
    pub fn all(self) -> Broadcast<T, E> {
        Broadcast::new(self)
    }

    /// Sets an option. Of a call that is on its way, none can be set any more.
    fn with(mut self, set: impl FnOnce(&mut Request<Arguments>)) -> Self {
        if let Stage::Ready(request) = &mut self.stage {
            set(request);
        }
        self
    }

    fn unsent(stage: Stage) -> Result<Request<Arguments>, Error> {
        match stage {
            Stage::Ready(request) => Ok(*request),
            Stage::Sent(_) | Stage::Over => {
                Err(Error::Invalid("the call is on its way already: make another one for all instances".to_owned()))
            }
        }
    }

    /// Puts the call on its way, if it is not.
    fn dispatch(&mut self) -> Result<(), Error> {
        self.stage = match std::mem::replace(&mut self.stage, Stage::Over) {
            Stage::Ready(request) => Stage::Sent(self.client.begin(*request)?),
            stage => stage,
        };
        Ok(())
    }
}

/// What only a call with an answer has.
impl<T, E> Call<T, E> {
    /// The type of the error that the method returns: from here on the call fails as
    /// [`CallError<F>`](crate::CallError). With [`Fault`], which is the default, it fails as [`Error`].
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
        Call { client: self.client, stage: self.stage, read: self.read, fails_with: PhantomData }
    }

    /// Says that the method may run twice without harm: the client sends the call again when its connection, or the instance
    /// that runs it, is lost. Whether another instance runs what a dead one held is up to
    /// [`Method::idempotent`](crate::Method::idempotent) on the server. `#[rpc(idempotent)]` says both.
    pub fn idempotent(self) -> Self
    where
        T: Answered,
    {
        self.with(|request| request.idempotent = true)
    }

    /// Whether the call waits for an instance to come back while there is none. For calls to any instance; those to one or
    /// to all end at once. Default: the client's, [`Absent::Wait`] unless set.
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

    /// Future style: the call is on its way when this returns; what it returned is collected later.
    ///
    /// # Errors
    /// What can be said at once: a bad name, arguments that cannot be written or are too large, a client that was closed.
    pub async fn start(mut self) -> Result<Pending<T, E>, Error>
    where
        T: Answered,
    {
        self.dispatch()?;
        if let Stage::Sent(started) = &mut self.stage {
            started.go_on()?;
        }
        Ok(Pending(self))
    }

    /// Callback style: the call is on its way, and `callback` gets its outcome, once, on a task of the runtime in which the
    /// client connected. If that has ended, or ends before, the outcome is [`Error::Disconnected`], and `callback` gets it
    /// on the thread that makes the call or ends the runtime.
    pub fn then(mut self, callback: impl FnOnce(Result<T, E::Error>) + Send + 'static)
    where
        T: Answered + 'static,
        E: Failure + 'static,
    {
        let runtime = self.client.runtime().clone();
        let method = match &self.stage {
            Stage::Ready(request) => request.target.as_ref().ok().map(|target| target.text.clone()),
            Stage::Sent(_) | Stage::Over => None,
        };
        // The caller's thread may have no runtime.
        let entered = runtime.enter();
        let refused = self.dispatch().err();
        drop(entered);
        let called = Called::new(callback, method, refused);
        runtime.spawn(async move {
            if !called.is_refused() {
                called.with(self.await);
            }
        });
    }
}

impl Call<Oneway> {
    /// Oneway style: returns when the broker has the call safe. Some instance runs it, now or after a restart, at least
    /// once; with [`Call::to`] it goes to that instance alone and dies with it.
    ///
    /// # Errors
    /// `NoService` when the service has never been served or the instance is gone, `Unreachable` when its queue refuses the
    /// call, as while most of its nodes are away, `Blocked`, `Timeout` when the broker did not confirm in time, and `Disconnected` when there was no connection until
    /// then or the client was closed. While connections are lost the call is sent again, with the same id: after `Timeout`,
    /// or with `may_have_run: true`, it may run nevertheless.
    pub async fn send(self) -> Result<(), Error> {
        self.client.send(Self::unsent(self.stage)?).await
    }
}

impl<T: Answered, E: Failure> Future for Call<T, E> {
    type Output = Result<T, E::Error>;

    fn poll(mut self: Pin<&mut Self>, context: &mut TaskContext<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        if matches!(this.stage, Stage::Ready(_)) {
            this.dispatch()?;
        }
        let Stage::Sent(started) = &mut this.stage else { panic!("a call was polled after its end") };
        Pin::new(started).poll(context).map(|reply| outcome::<T, E>(&reply?, this.read))
    }
}

impl<T, E> fmt::Debug for Call<T, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Call").field(&self.stage).finish()
    }
}

/// A call on its way. Awaiting it gives the outcome; dropping it cancels the call, on the server too.
///
/// ```
/// use hopline::{Client, Error, Pending};
///
/// # async fn example(client: Client) -> Result<(), Error> {
/// // Both are on their way before the first is waited for.
/// let one: Pending<u64> = client.call("shop", "price", (1,)).start().await?;
/// let two: Pending<u64> = client.call("shop", "price", (2,)).start().await?;
/// println!("{}", one.await? + two.await?);
/// # Ok(()) }
/// ```
#[must_use = "dropping a pending call cancels it"]
pub struct Pending<T, E = Fault>(Call<T, E>);

impl<T: Answered, E: Failure> Future for Pending<T, E> {
    type Output = Result<T, E::Error>;

    fn poll(mut self: Pin<&mut Self>, context: &mut TaskContext<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(context)
    }
}

impl<T, E> fmt::Debug for Pending<T, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Pending").field(&self.0.stage).finish()
    }
}

/// What a reply says.
fn outcome<T, E: Failure>(reply: &Reply, read: ReadResult<T>) -> Result<T, E::Error> {
    if reply.is_own_error() {
        return Err(E::read(reply.codec(), reply.payload()));
    }
    read(reply.codec(), reply.payload())
        .map_err(|error| Error::UnreadableReply(CodecError(format!("the reply {}", error.0))).into())
}

impl Client {
    /// A call without a service trait: `service` is `name` or `name.vMAJOR`, `args` whatever serializes as an array: a
    /// tuple, an array, a `Vec`.
    pub fn call<R>(&self, service: &str, method: &str, args: impl Serialize + Send + 'static) -> Call<R>
    where
        // `DeserializeOwned` spelled out: of this, rustc tells what to derive.
        R: for<'de> Deserialize<'de> + Send + 'static,
    {
        Call::new(self.clone(), self.target(service, method), args, Codec::decode)
    }

    /// A oneway call without a service trait, to be [sent](Call::send).
    pub fn oneway(&self, service: &str, method: &str, args: impl Serialize + Send + 'static) -> Call<Oneway> {
        let no_result = |_: Codec, _: &[u8]| Err(CodecError("a oneway call has no result".to_owned()));
        Call::new(self.clone(), self.target(service, method), args, no_result)
    }
}
