//! One invocation as a value: its options, and the styles in which it can be made.

mod callback;

use std::convert::Infallible;
use std::fmt;
use std::future::{Future, IntoFuture};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context as TaskContext, Poll};
use std::time::Duration;

use futures::{Stream, StreamExt};
use serde::Serialize;
use serde::de::DeserializeOwned;

use self::callback::Called;
use crate::client::{Absent, Client, Dispatched, Gathering, Target};
use crate::codec::{Codec, CodecError};
use crate::compression::Refusal;
use crate::error::{Code, Error, Fault};
use crate::frame::Frame;

/// One invocation of a method. It does nothing until it is awaited, [started](Call::start), given a
/// [callback](Call::then), [sent](Call::send) or [gathered](Call::all).
///
/// `T` is the result, `E` the method's own error. Options are set on the call, not on the client:
///
/// ```
/// # use std::time::Duration;
/// # async fn example(client: hopline::Client) -> Result<(), hopline::Error> {
/// let sum: i64 = client.call("calculator.v1", "add", (2, 3)).timeout(Duration::from_secs(1)).priority(5).await?;
/// # Ok(()) }
/// ```
#[must_use = "a call does nothing until it is awaited, started or sent"]
pub struct Call<T, E = Infallible>
where
    E: fmt::Debug,
{
    client: Client,
    request: Request,
    read_error: ReadError<E>,
    result: std::marker::PhantomData<fn() -> T>,
}

/// What is to be sent, once somebody asks for it.
pub(crate) struct Request {
    pub(crate) target: Result<Arc<Target>, String>,
    pub(crate) arguments: Arguments,
    pub(crate) codec: Option<Codec>,
    pub(crate) timeout: Option<Duration>,
    pub(crate) instance: Option<String>,
    pub(crate) priority: Option<u8>,
    pub(crate) metadata: Vec<(String, String)>,
    pub(crate) idempotent: bool,
    pub(crate) absent: Option<Absent>,
}

/// Appends the arguments to a frame, once the codec is known.
type Arguments = Box<dyn FnOnce(Codec, &mut Vec<u8>) -> Result<(), CodecError> + Send>;

type ReadError<E> = fn(Codec, &[u8]) -> Error<E>;
type ReadResult<T> = fn(Codec, &[u8]) -> Result<T, CodecError>;

/// In the place of a result: a call that has none, not even an empty one. It is [sent](Call::send), not awaited.
#[derive(Debug, Clone, Copy)]
pub enum Oneway {}

impl<T> Call<T> {
    pub(crate) fn new(
        client: Client,
        target: Result<Arc<Target>, String>,
        arguments: impl Serialize + Send + 'static,
    ) -> Self {
        let request = Request::new(target, Box::new(move |codec, payload| codec.write(&arguments, payload)));
        Self { client, request, read_error: unexpected_error, result: std::marker::PhantomData }
    }

    /// The type of the error that the method itself returns.
    pub fn fails_with<E: DeserializeOwned + fmt::Debug>(self) -> Call<T, E> {
        Call { client: self.client, request: self.request, read_error: typed_error::<E>, result: self.result }
    }
}

impl<T, E: fmt::Debug> Call<T, E> {
    /// How long the call may take, from now to its result, or an oneway call until the broker has it. Default: the
    /// client's, 30 s unless set. Inside a handler, no longer than what is left of the call being handled.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.request.timeout = Some(timeout);
        self
    }

    /// To one instance, by the id that [`Context::instance`](crate::Context::instance) or a
    /// [reply](BroadcastReply::instance) told, instead of any.
    pub fn to(mut self, instance: impl Into<String>) -> Self {
        self.request.instance = Some(instance.into());
        self
    }

    /// 0 to 9; calls of a higher priority overtake waiting ones of a lower, in a service with
    /// [`Service::priorities`](crate::Service::priorities) or [`Service::quorum`](crate::Service::quorum): in others it
    /// changes nothing. Default 0; more than 9 counts as 9.
    pub fn priority(mut self, priority: u8) -> Self {
        self.request.priority = Some(priority);
        self
    }

    /// Text for the handler, which reads it with [`Context::metadata`](crate::Context::metadata); setting a name again
    /// replaces its value. All metadata of a call may have 128 entries, and take 60 KiB
    /// with 10 bytes for each of them.
    pub fn metadata(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        let name = name.into();
        self.request.metadata.retain(|(other, _)| *other != name);
        self.request.metadata.push((name, value.into()));
        self
    }

    /// How arguments and result are written. Default: the client's, CBOR unless set.
    pub fn codec(mut self, codec: Codec) -> Self {
        self.request.codec = Some(codec);
        self
    }

    /// Says that the method may run twice without harm: the client sends the call again when its connection, or the instance
    /// that runs it, is lost. Whether another instance runs what a dead one held is up to
    /// [`Method::idempotent`](crate::Method::idempotent) on the server. `#[rpc(idempotent)]` says both.
    pub fn idempotent(mut self) -> Self {
        self.request.idempotent = true;
        self
    }
}

impl<T: DeserializeOwned + Send + 'static, E: fmt::Debug + Send + 'static> Call<T, E> {
    /// Whether the call waits for an instance to come back while there is none. For calls to any instance; those to one or
    /// to all end at once. Default: the client's, [`Absent::Wait`] unless set.
    ///
    /// ```
    /// # async fn example(client: hopline::Client) -> Result<(), hopline::Error> {
    /// let sum: i64 = client.call("calculator.v1", "add", (2, 3)).absent(hopline::Absent::Fail).await?;
    /// # Ok(()) }
    /// ```
    pub fn absent(mut self, absent: Absent) -> Self {
        self.request.absent = Some(absent);
        self
    }

    /// Future style: the call is on its way when this returns; what it returned is collected later.
    ///
    /// # Errors
    /// What can be said at once: a bad name, arguments that cannot be written or are too large, a client that was closed.
    pub async fn start(self) -> Result<Pending<T, E>, Error<E>> {
        self.dispatch()
    }

    fn dispatch(self) -> Result<Pending<T, E>, Error<E>> {
        let mut pending = self.into_future();
        pending.dispatch()?;
        Ok(pending)
    }

    /// Callback style: the call is on its way, and `callback` gets its outcome, once, on a task of the runtime in which the
    /// client connected. If that has ended, or ends before, the outcome is [`Error::Disconnected`], and `callback` gets it
    /// on the thread that makes the call or ends the runtime.
    pub fn then(self, callback: impl FnOnce(Result<T, Error<E>>) + Send + 'static) {
        let runtime = self.client.runtime().clone();
        let method = self.request.target.as_ref().ok().map(|target| target.text.clone());
        // Here, and not on the task, since a call inherits from the handler that makes it.
        let (pending, outcome) = match self.dispatch() {
            Ok(pending) => (Some(pending), None),
            Err(error) => (None, Some(Err(error))),
        };
        let called = Called::new(callback, method, outcome);
        runtime.spawn(async move {
            match pending {
                Some(pending) => called.with(pending.await),
                None => drop(called),
            }
        });
    }

    /// Broadcast style: every instance of the service runs the method and answers.
    pub fn all(self) -> Broadcast<T, E> {
        Broadcast(self)
    }
}

impl Call<Oneway> {
    /// Oneway style: returns when the broker has the call safe. Some instance runs it, now or after a restart, at least
    /// once; with [`Call::to`] it goes to that instance alone and dies with it.
    ///
    /// # Errors
    /// `NoService` when the service has never been served or the instance is gone, `Overloaded` when its queue is full,
    /// `Blocked`, `Timeout` when the broker did not confirm in time, and `Disconnected` when there was no connection until
    /// then or the client was closed. While connections are lost the call is sent again, with the same id: after `Timeout`,
    /// or with `may_have_run: true`, it may run nevertheless.
    pub async fn send(self) -> Result<(), Error> {
        self.client.send(self.request, false).await
    }

    /// Oneway broadcast: every instance that is up runs the method once, as soon as it can.
    ///
    /// # Errors
    /// As [`Call::send`].
    pub async fn send_to_all(self) -> Result<(), Error> {
        self.client.send(self.request, true).await
    }
}

impl<T: DeserializeOwned + Send + 'static, E: fmt::Debug + Send + 'static> IntoFuture for Call<T, E> {
    type Output = Result<T, Error<E>>;
    type IntoFuture = Pending<T, E>;

    fn into_future(self) -> Self::IntoFuture {
        let Self { client, request, read_error, .. } = self;
        Pending { stage: Stage::Ready(Box::new((client, request))), read: read_result, read_error }
    }
}

impl Request {
    pub(crate) fn new(target: Result<Arc<Target>, String>, arguments: Arguments) -> Self {
        Self {
            target,
            arguments,
            codec: None,
            timeout: None,
            instance: None,
            priority: None,
            metadata: Vec::new(),
            idempotent: false,
            absent: None,
        }
    }
}

impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Request").field("target", &self.target).finish_non_exhaustive()
    }
}

impl<T, E: fmt::Debug> fmt::Debug for Call<T, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Call").field("target", &self.request.target).finish_non_exhaustive()
    }
}

/// A call on its way, or one that will be once it is awaited for the first time. Awaiting it gives the outcome; dropping
/// it cancels the call, on the server too.
#[must_use = "dropping a pending call cancels it"]
pub struct Pending<T, E = Infallible>
where
    E: fmt::Debug,
{
    stage: Stage,
    read: ReadResult<T>,
    read_error: ReadError<E>,
}

#[derive(Debug)]
enum Stage {
    /// To be sent when it is polled.
    Ready(Box<(Client, Request)>),
    Sent(Dispatched),
    Over,
}

impl<T, E: fmt::Debug> Pending<T, E> {
    /// Puts the call on its way, if it is not.
    fn dispatch(&mut self) -> Result<(), Error<E>> {
        self.stage = match std::mem::replace(&mut self.stage, Stage::Over) {
            Stage::Ready(unsent) => {
                let (client, request) = *unsent;
                Stage::Sent(client.dispatch(request).map_err(Error::widen)?)
            }
            stage => stage,
        };
        Ok(())
    }
}

impl<T, E: fmt::Debug> Future for Pending<T, E> {
    type Output = Result<T, Error<E>>;

    fn poll(mut self: Pin<&mut Self>, context: &mut TaskContext<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        if matches!(this.stage, Stage::Ready(_)) {
            this.dispatch()?;
        }
        let Stage::Sent(dispatched) = &mut this.stage else { panic!("a call was polled after its end") };
        Pin::new(&mut *dispatched).poll(context).map(|reply| {
            let reply = reply.map_err(Error::widen)?;
            if reply.status == Code::DeadlineExceeded
                && let Some(error) = dispatched.timed_out()
            {
                return Err(error.widen());
            }
            outcome(&reply, dispatched.max_payload(), this.read, this.read_error)
        })
    }
}

impl<T, E: fmt::Debug> fmt::Debug for Pending<T, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pending").field("call", &self.stage).finish()
    }
}

/// A call to every instance of a service.
#[must_use = "a broadcast does nothing until its replies are gathered"]
pub struct Broadcast<T, E = Infallible>(Call<T, E>)
where
    E: fmt::Debug;

/// One instance's answer to a broadcast.
#[derive(Debug)]
pub struct BroadcastReply<T, E = Infallible>
where
    E: fmt::Debug,
{
    /// The instance that answered.
    pub instance: String,
    /// What it answered.
    pub outcome: Result<T, Error<E>>,
}

impl<T: DeserializeOwned + Send + 'static, E: fmt::Debug + Send + 'static> Broadcast<T, E> {
    /// The replies that arrive within `window`, in the order they arrive.
    ///
    /// # Errors
    /// `NoService` when no instance is there, `Disconnected` when the connection is lost meanwhile, and what can be said
    /// at once, as for [`Call::start`].
    pub async fn gather(mut self, window: Duration) -> Result<Vec<BroadcastReply<T, E>>, Error<E>> {
        self.0.request.timeout = Some(window);
        let Call { client, request, read_error, .. } = self.0;
        let max_payload = client.max_payload();
        let mut gathering = client.broadcast(request).await.map_err(Error::widen)?;
        let mut replies = Vec::new();
        while let Some(reply) = gathering.next().await {
            replies.push(broadcast_reply(&reply.map_err(Error::widen)?, max_payload, read_error));
        }
        Ok(replies)
    }

    /// The replies as they arrive, until the call's timeout. Dropping the stream cancels the call on instances that
    /// still run it. When the connection is lost, the last item says so, and its instance is empty.
    ///
    /// # Errors
    /// As [`Broadcast::gather`].
    pub async fn stream(self) -> Result<impl Stream<Item = BroadcastReply<T, E>> + Send + Unpin, Error<E>> {
        let Call { client, request, read_error, .. } = self.0;
        let max_payload = client.max_payload();
        let gathering: Gathering = client.broadcast(request).await.map_err(Error::widen)?;
        Ok(gathering.map(move |reply| match reply {
            Ok(reply) => broadcast_reply(&reply, max_payload, read_error),
            Err(lost) => BroadcastReply { instance: String::new(), outcome: Err(lost.widen()) },
        }))
    }
}

fn broadcast_reply<T, E>(reply: &Frame, max_payload: usize, read_error: ReadError<E>) -> BroadcastReply<T, E>
where
    T: DeserializeOwned,
    E: fmt::Debug,
{
    BroadcastReply {
        instance: reply.metadata.instance.as_deref().unwrap_or_default().to_owned(),
        outcome: outcome(reply, max_payload, read_result, read_error),
    }
}

impl<T, E: fmt::Debug> fmt::Debug for Broadcast<T, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Broadcast").field(&self.0).finish()
    }
}

/// What a reply says; a compressed one may have a payload of so many bytes.
fn outcome<T, E: fmt::Debug>(
    reply: &Frame,
    max_payload: usize,
    read: ReadResult<T>,
    read_error: ReadError<E>,
) -> Result<T, Error<E>> {
    let payload = || {
        reply.plain_payload(max_payload).map_err(|refusal| match refusal {
            Refusal::TooLarge { size, cap } => Error::TooLarge { what: "reply", size, limit: cap },
            refusal => Error::Codec(CodecError(format!("the reply cannot be read: {refusal}"))),
        })
    };
    if reply.service_error {
        return Err(read_error(reply.codec, &payload()?));
    }
    if let Some((size, limit)) = reply.metadata.more().too_large {
        let bytes = |number| usize::try_from(number).unwrap_or(usize::MAX);
        return Err(Error::TooLarge { what: "reply", size: bytes(size), limit: bytes(limit) });
    }
    match reply.status {
        Code::Ok => {
            read(reply.codec, &payload()?).map_err(|error| Error::Codec(CodecError(format!("the reply {}", error.0))))
        }
        _ => Err(Error::Fault(fault(reply))),
    }
}

fn fault(reply: &Frame) -> Fault {
    Fault {
        code: reply.status,
        message: reply.metadata.more().error.clone().unwrap_or_else(|| "the server gave no reason".to_owned()),
        retry_after: reply.metadata.more().retry_after,
    }
}

fn read_result<T: DeserializeOwned>(codec: Codec, payload: &[u8]) -> Result<T, CodecError> {
    codec.decode(payload)
}

fn typed_error<E: DeserializeOwned + fmt::Debug>(codec: Codec, payload: &[u8]) -> Error<E> {
    match codec.decode(payload) {
        Ok(error) => Error::Service(error),
        Err(error) => Error::Codec(CodecError(format!("the service's error {}", error.0))),
    }
}

fn unexpected_error(_: Codec, _: &[u8]) -> Error {
    Error::Fault(Fault::new(
        Code::Unknown,
        "the method returned an error of its own: name its type with `.fails_with()` to read it",
    ))
}
