//! One invocation as a value: its options, and the styles in which it can be made.

mod callback;

use std::convert::Infallible;
use std::fmt;
use std::future::Future;
use std::marker::PhantomData;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context as TaskContext, Poll};
use std::time::Duration;

use futures::{Stream, StreamExt};
use serde::Serialize;

use self::callback::Called;
use crate::client::{Absent, Arguments, Client, Dispatched, Gathering, Request, Target};
use crate::codec::{Codec, CodecError};
use crate::compression::Refusal;
use crate::context::Context;
use crate::error::{Code, Error, Fault};
use crate::frame::Frame;
use crate::route::Route;
use crate::service::Failure;

/// One invocation of a method. It does nothing until it is awaited, [started](Call::start), given a
/// [callback](Call::then), [sent](Call::send) or [gathered](Call::all).
///
/// `T` is the result, `E` the method's own error. Options are set on the call, not on the client, and before it is
/// awaited:
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
pub struct Call<T, E = Infallible>
where
    E: fmt::Debug,
{
    client: Client,
    stage: Stage,
    read: ReadResult<T>,
    read_error: ReadError<E>,
}

#[derive(Debug)]
enum Stage {
    /// To be sent when it is polled.
    Ready(Box<Request<Arguments>>),
    Sent(Dispatched),
    Over,
}

type ReadError<E> = fn(Codec, &[u8]) -> Error<E>;
type ReadResult<T> = fn(Codec, &[u8]) -> Result<T, CodecError>;

/// In the place of a result: a call that has none, not even an empty one. It is [sent](Call::send), not awaited.
#[derive(Debug)]
pub struct Oneway {
    _never: Infallible,
    /// What tells it from all results, which are `Send`.
    _not_send: PhantomData<*const ()>,
}

/// A result that a call can wait for: any, but for a [`Oneway`] call's, which has none.
#[diagnostic::on_unimplemented(
    message = "a oneway call has no answer to wait for",
    label = "not to be awaited, started or gathered",
    note = "write `.send().await` instead: it returns when the broker has the call"
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
        Self { client, stage: Stage::Ready(Box::new(request)), read, read_error: Fault::read }
    }

    /// The type of the error that the method itself returns. With [`Fault`], which has a place of its own among the errors
    /// of every call, it changes nothing.
    pub fn fails_with<E: Failure>(self) -> Call<T, E::Own> {
        Call { client: self.client, stage: self.stage, read: self.read, read_error: E::read }
    }
}

impl<T, E: fmt::Debug> Call<T, E> {
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
    /// changes nothing. Default 0; more than 9 counts as 9.
    pub fn priority(self, priority: u8) -> Self {
        self.with(|request| request.priority = Some(priority))
    }

    /// Text for the handler, which reads it with [`Context::metadata`](crate::Context::metadata); setting a name again
    /// replaces its value. All metadata of a call may have 128 entries, and take 60 KiB
    /// with 10 bytes for each of them.
    pub fn metadata(self, name: impl Into<String>, value: impl Into<String>) -> Self {
        let (name, value) = (name.into(), value.into());
        self.with(|request| {
            request.metadata.retain(|(other, _)| *other != name);
            request.metadata.push((name, value));
        })
    }

    /// How arguments and result are written. Default: the client's, CBOR unless set.
    pub fn codec(self, codec: Codec) -> Self {
        self.with(|request| request.codec = Some(codec))
    }

    /// Says that the method may run twice without harm: the client sends the call again when its connection, or the instance
    /// that runs it, is lost. Whether another instance runs what a dead one held is up to
    /// [`Method::idempotent`](crate::Method::idempotent) on the server. `#[rpc(idempotent)]` says both.
    pub fn idempotent(self) -> Self {
        self.with(|request| request.idempotent = true)
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
    fn dispatch(&mut self) -> Result<(), Error<E>> {
        self.stage = match std::mem::replace(&mut self.stage, Stage::Over) {
            Stage::Ready(request) => Stage::Sent(self.client.dispatch(*request).map_err(Error::widen)?),
            stage => stage,
        };
        Ok(())
    }
}

impl<T, E: fmt::Debug> Call<T, E> {
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
    pub async fn start(mut self) -> Result<Pending<T, E>, Error<E>>
    where
        T: Answered,
    {
        self.dispatch()?;
        Ok(Pending(self))
    }

    /// Callback style: the call is on its way, and `callback` gets its outcome, once, on a task of the runtime in which the
    /// client connected. If that has ended, or ends before, the outcome is [`Error::Disconnected`], and `callback` gets it
    /// on the thread that makes the call or ends the runtime.
    pub fn then(mut self, callback: impl FnOnce(Result<T, Error<E>>) + Send + 'static)
    where
        T: Answered + 'static,
        E: Send + 'static,
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

    /// Broadcast style: every instance of the service runs the method and answers.
    pub fn all(self) -> Broadcast<T, E>
    where
        T: Answered,
    {
        Broadcast(self)
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

    /// Oneway broadcast: every instance that is up runs the method once, as soon as it can.
    ///
    /// # Errors
    /// As [`Call::send`].
    pub async fn send_to_all(self) -> Result<(), Error> {
        self.client.send(Request { route: Route::All, ..Self::unsent(self.stage)? }).await
    }
}

impl<T: Answered, E: fmt::Debug> Future for Call<T, E> {
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

impl<T, E: fmt::Debug> fmt::Debug for Call<T, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Call").field(&self.stage).finish()
    }
}

/// A call on its way. Awaiting it gives the outcome; dropping it cancels the call, on the server too.
#[must_use = "dropping a pending call cancels it"]
pub struct Pending<T, E = Infallible>(Call<T, E>)
where
    E: fmt::Debug;

impl<T: Answered, E: fmt::Debug> Future for Pending<T, E> {
    type Output = Result<T, Error<E>>;

    fn poll(mut self: Pin<&mut Self>, context: &mut TaskContext<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(context)
    }
}

impl<T, E: fmt::Debug> fmt::Debug for Pending<T, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Pending").field(&self.0.stage).finish()
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

impl<T: Answered, E: fmt::Debug> Broadcast<T, E> {
    /// The replies that arrive within `window`, in the order they arrive.
    ///
    /// # Errors
    /// `NoService` when no instance is there, `Disconnected` when the connection is lost meanwhile, and what can be said
    /// at once, as for [`Call::start`].
    pub async fn gather(self, window: Duration) -> Result<Vec<BroadcastReply<T, E>>, Error<E>> {
        let mut stream = Self(self.0.timeout(window)).replies().await.map_err(Error::widen)?;
        let mut replies = Vec::new();
        while let Some(reply) = stream.next().await {
            replies.push(reply.map_err(Error::widen)?);
        }
        Ok(replies)
    }

    /// The replies as they arrive, until the call's timeout. Dropping the stream cancels the call on instances that
    /// still run it. When the connection is lost, the last item says so, and its instance is empty.
    ///
    /// # Errors
    /// As [`Broadcast::gather`].
    pub async fn stream(self) -> Result<impl Stream<Item = BroadcastReply<T, E>> + Send + Unpin, Error<E>> {
        let replies = self.replies().await.map_err(Error::widen)?;
        Ok(replies.map(|reply| {
            reply.unwrap_or_else(|lost| BroadcastReply { instance: String::new(), outcome: Err(lost.widen()) })
        }))
    }

    /// The replies; a lost connection is the last item.
    async fn replies(self) -> Result<impl Stream<Item = Result<BroadcastReply<T, E>, Error>> + Send + Unpin, Error> {
        let Call { client, stage, read, read_error } = self.0;
        let max_payload = client.max_payload();
        let gathering: Gathering = client.broadcast(Call::<T, E>::unsent(stage)?).await?;
        Ok(gathering.map(move |reply| {
            let reply = reply?;
            let instance = reply.metadata.instance.as_deref().unwrap_or_default().to_owned();
            Ok(BroadcastReply { instance, outcome: outcome(&reply, max_payload, read, read_error) })
        }))
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
        Code::Ok if reply.metadata.more().error.is_none() => {
            read(reply.codec, &payload()?).map_err(|error| Error::Codec(CodecError(format!("the reply {}", error.0))))
        }
        _ => Err(Error::Fault(fault(reply))),
    }
}

fn fault(reply: &Frame) -> Fault {
    let reason = reply.metadata.more().error.clone().filter(|reason| !reason.is_empty());
    Fault {
        // What tells of an error is none, whatever its status says.
        code: if reply.status == Code::Ok { Code::Unknown } else { reply.status },
        message: reason.unwrap_or_else(|| "the server gave no reason".to_owned()),
        retry_after: reply.metadata.more().retry_after,
    }
}
