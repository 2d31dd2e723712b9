//! A service as the server sees it: named methods and how to run them. The macro's output plugs in here.

mod method;

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use self::method::MAX_PAUSE;
pub use self::method::Method;
use crate::codec::{Arguments, Codec, CodecError, Misfit};
use crate::context::Context;
use crate::error::{CallError, Code, Error, Fault};
use crate::frame::Entries;
use crate::middleware::{Chain, Middleware};
use crate::topology::{CallsQueue, QueueKind, ServiceId, check_name};

/// A service to be served: its methods, and how an instance runs them.
///
/// [`#[hopline::service]`](crate::service) makes one from a trait; without a trait, methods are added one by one:
///
/// ```
/// use hopline::{Context, Fault, Service};
///
/// let service = Service::new("calculator", 1)
///     .method("add", |_: Context, (a, b): (i64, i64)| async move { Ok::<_, Fault>(a + b) })
///     .prefetch(16);
/// # let _ = service;
/// ```
pub struct Service {
    pub(crate) id: Result<ServiceId, String>,
    pub(crate) methods: BTreeMap<String, (Method, Handler)>,
    pub(crate) problems: Vec<String>,
    /// Of a subscription, the keys of its events.
    pub(crate) pattern: Option<String>,
    /// As many as run at once, unless it is said otherwise.
    pub(crate) prefetch: Option<u16>,
    pub(crate) concurrency: usize,
    pub(crate) dispatch: Dispatch,
    pub(crate) calls: CallsQueue,
    pub(crate) middleware: Chain,
}

/// How handlers run.
///
/// ```
/// use hopline::{Context, Dispatch, Fault, Service};
///
/// let hash = |_: Context, (text,): (String,)| async move { Ok::<_, Fault>(text.len()) };
/// // Its handlers keep a processor busy: they get two threads of their own.
/// let service = Service::new("hashes", 1).dispatch(Dispatch::Pool(2)).method("hash", hash);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Dispatch {
    /// On the task that reads the queue, one after the other: for handlers of a few microseconds.
    Inline,
    /// On a task each, from where it first has to wait (a handler that blocks holds up others, and keeps back the signs of
    /// life of all calls that run); until then one after the other with the calls that came in the same
    /// message, which are quick.
    #[default]
    Spawn,
    /// On tokio's blocking threads, a thread each: for handlers that block.
    Blocking,
    /// On a runtime of the service's own with this many threads, at least 1: other services keep theirs.
    Pool(usize),
}

/// What runs a method: arguments in, answer out.
pub(crate) type Handler = Arc<dyn Fn(Context, Codec, Bytes) -> BoxFuture<'static, Answer> + Send + Sync>;

/// What a handler ended with.
#[derive(Debug, Clone)]
pub(crate) enum Answer {
    /// The result.
    Result(Body),
    /// The method's own error.
    ServiceError(Body),
    /// A refusal or breakdown.
    Fault(Fault),
}

/// What a handler answers with, and what the reply says beside it.
#[derive(Debug, Clone)]
pub(crate) struct Body {
    pub(crate) bytes: Vec<u8>,
    pub(crate) metadata: Entries,
}

impl From<Vec<u8>> for Body {
    fn from(bytes: Vec<u8>) -> Self {
        Self { bytes, metadata: Entries::default() }
    }
}

impl Service {
    /// A service without methods yet. A name that is not `[A-Za-z0-9_-]+` is reported when the server starts.
    #[must_use]
    pub fn new(name: &str, version: u32) -> Self {
        Self {
            id: ServiceId::new(name, version),
            methods: BTreeMap::new(),
            pattern: None,
            problems: Vec::new(),
            prefetch: None,
            concurrency: 256,
            middleware: Chain::default(),
            dispatch: Dispatch::default(),
            calls: CallsQueue {
                kind: QueueKind::Classic,
                grace: Duration::from_secs(60),
                max_length: None,
                priorities: false,
            },
        }
    }

    /// Adds a method, by its name or as a [`Method`] that says more. Its [arguments](Arguments) are one tuple; `[(); 0]` when
    /// there are none.
    ///
    /// The error that the handler returns is the method's own, any serde type, or a [`Fault`] with a code to choose.
    ///
    /// When its caller gives up or the deadline passes, the handler's future is dropped wherever it waits, and what comes
    /// after that is not run: right for what only looks, wrong for work that must not stay half done. For that there is
    /// [`Method::finishes`]. Handlers of oneway calls and events always run to their end.
    #[must_use]
    pub fn method<A, R, E, F, Fut>(self, method: impl Into<Method>, handler: F) -> Self
    where
        F: Fn(Context, A) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<R, E>> + Send + 'static,
        A: Arguments + Send + 'static,
        R: Serialize + Send + 'static,
        E: Failure + Send + 'static,
    {
        let method = method.into();
        let read = arguments_of(&method);
        self.add(method, running(read, handler))
    }

    /// Adds what handles events, each a value by itself.
    pub(crate) fn event<T, F, Fut>(self, name: &str, handler: F) -> Self
    where
        F: Fn(Context, T) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = ()> + Send + 'static,
        T: DeserializeOwned + Send + 'static,
    {
        let read = |codec: Codec, payload: &[u8]| codec.decode(payload).map_err(|error| format!("the event {error}"));
        let handler = running(read, move |context, event| {
            let handling = handler(context, event);
            async move {
                handling.await;
                Ok::<(), ()>(())
            }
        });
        self.add(Method::new(name), handler)
    }

    pub(crate) fn of_pattern(self, pattern: &str) -> Self {
        Self { pattern: Some(pattern.to_owned()), ..self }
    }

    /// Adds a method, and what runs it.
    pub(crate) fn add(mut self, method: Method, handler: Handler) -> Self {
        if let Err(problem) = check_name("method", &method.name) {
            self.problems.push(problem);
        }
        if method.retry.pause > MAX_PAUSE {
            self.problems.push(format!(
                "`{}` pauses for {:?}, and the broker counts no more than {MAX_PAUSE:?}",
                method.name, method.retry.pause
            ));
        }
        let name = method.name.clone();
        if self.methods.insert(name.clone(), (method, handler)).is_some() {
            self.problems.push(format!("the method `{name}` is there twice"));
        }
        self
    }

    /// How many messages an instance may hold unsettled, of each queue. Default: as many as
    /// [`concurrency`](Self::concurrency) says, so that none waits in one instance while another is free; more keep quick
    /// methods busy where `concurrency` is small, and with fewer it is never reached. 0 counts as 1. A message is one call,
    /// or up to 64 of quick methods.
    ///
    /// A handler that calls a method of its own service takes a second place, of this as well as of `concurrency`, until
    /// that call is answered: where such calls can take all places of all instances, they wait for each other until their
    /// deadlines. Give those methods a service of their own, or call the function instead.
    #[must_use]
    pub fn prefetch(mut self, messages: u16) -> Self {
        self.prefetch = Some(messages.max(1));
        self
    }

    /// How many messages of each queue an instance holds, unless it learns that it is to hold fewer.
    pub(crate) fn prefetched(&self) -> u16 {
        self.prefetch.unwrap_or_else(|| u16::try_from(self.concurrency).unwrap_or(u16::MAX))
    }

    /// How many calls an instance runs at once. Default 256; 0 counts as 1.
    #[must_use]
    pub fn concurrency(mut self, calls: usize) -> Self {
        self.concurrency = calls.max(1);
        self
    }

    /// How handlers run. Default [`Dispatch::Spawn`].
    #[must_use]
    pub fn dispatch(mut self, dispatch: Dispatch) -> Self {
        self.dispatch = dispatch;
        self
    }

    /// How long calls are still taken, and wait for an instance to come back, after the last one left, be it by
    /// [`Running::drain`](crate::Running::drain): so a restart costs no call. After that they are
    /// [`Error::NoService`](crate::Error::NoService) at once, and before it with [`Absent::Fail`](crate::Absent::Fail).
    /// Default 60 s, at least 1 s; every instance has to say the same.
    #[must_use]
    pub fn grace(mut self, grace: Duration) -> Self {
        // A shorter one could be over between declaring the queue and consuming it.
        self.calls.grace = grace.max(Duration::from_secs(1));
        self
    }

    /// How many messages may wait in the queue before calls are refused as `Overloaded`. A message is one call, or up to 64
    /// of quick methods ([`Coalesce`](crate::Coalesce)). Default: no limit; at least 1; every instance has to say the same.
    #[must_use]
    pub fn max_queue(mut self, messages: u32) -> Self {
        if messages == 0 {
            self.problems.push("`max_queue(0)` refuses every call: allow 1, or leave it out for no limit".to_owned());
        }
        self.calls.max_length = Some(messages);
        self
    }

    /// Lets waiting calls of a higher [priority](crate::Call::priority) overtake those of a lower. Default: none does, since
    /// it costs the broker a queue for each: a quarter of its throughput where each call is a message. Every instance has
    /// to say the same.
    #[must_use]
    pub fn priorities(mut self) -> Self {
        self.calls.priorities = true;
        self
    }

    /// Has a [`Middleware`] go around every call, oneway call and broadcast of this service. The first that is added is the
    /// outermost; those of the [server](crate::ServerBuilder::with) are around them. Default: none, which costs nothing.
    ///
    /// ```
    /// use hopline::{Code, Fault, Invocation, Middleware, Service};
    ///
    /// /// Takes calls only from whom the broker knows as this user.
    /// struct Only(&'static str);
    ///
    /// impl Middleware for Only {
    ///     fn admit(&self, call: &Invocation) -> Result<(), Fault> {
    ///         match call.user() == Some(self.0) {
    ///             true => Ok(()),
    ///             false => Err(Fault::new(Code::PermissionDenied, "you may not call this")),
    ///         }
    ///     }
    /// }
    ///
    /// let service = Service::new("ledger", 1).with(Only("billing"));
    /// # let _ = service;
    /// ```
    #[must_use]
    pub fn with(mut self, middleware: impl Middleware) -> Self {
        self.middleware.push(middleware);
        self
    }

    /// Keeps waiting calls on several nodes of a cluster, so that they outlive the loss of one; there may be a pause. Default:
    /// on one, which is faster. Every instance has to say the same. From RabbitMQ 4.0 on, priorities are there then without
    /// more, but only two: 0 to 4, and 5 to 9.
    #[must_use]
    pub fn quorum(mut self) -> Self {
        self.calls.kind = QueueKind::Quorum;
        self
    }
}

impl fmt::Debug for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Service")
            .field("id", &self.id)
            .field("methods", &self.methods.keys())
            .field("prefetch", &self.prefetch)
            .field("concurrency", &self.concurrency)
            .field("dispatch", &self.dispatch)
            .finish_non_exhaustive()
    }
}

/// What [`Server::serve`](crate::Server::serve) takes: a [`Service`].
///
/// ```
/// use hopline::{Error, IntoService, Running, Server};
///
/// async fn serve(service: impl IntoService) -> Result<Running, Error> {
///     Server::connect_env().await?.serve(service).start().await
/// }
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a service",
    label = "an implementation is served by the server of its trait",
    note = "`#[hopline::service]` makes `XServer` of `trait X`: write `.serve(XServer::new(implementation))`"
)]
pub trait IntoService {
    #[doc(hidden)]
    fn into_service(self) -> Service;
}

impl IntoService for Service {
    fn into_service(self) -> Service {
        self
    }
}

/// What a method may fail with: an error type of its own, or a [`Fault`].
///
/// Any type with serde's `Serialize` and `Deserialize` and with `Debug` is an error type of a method's own: it reaches the
/// caller as [`CallError::Service`]. A [`Fault`] reaches the caller as [`Error::Fault`]. Which one a type is goes by the
/// type, not by its name. The trait cannot be implemented by hand.
///
/// ```
/// use hopline::{Call, CallError, Error, Failure, Fault};
///
/// # async fn example(plain: Call<u8>, own: Call<u8, String>) {
/// let _: Result<u8, Error> = plain.await;
/// let _: Result<u8, CallError<String>> = own.await;
/// # }
/// /// Works for calls of methods with and without an error of their own.
/// async fn or_zero<E: Failure>(call: Call<u8, E>) -> u8 {
///     match call.await.map_err(Into::<CallError<E>>::into) {
///         Ok(number) => number,
///         Err(error) => {
///             println!("{}", error.code());
///             0
///         }
///     }
/// }
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not an error that a method can return",
    label = "not a `Fault`, and not `Serialize`, `Deserialize` and `Debug`",
    note = "derive `Debug`, `serde::Serialize` and `serde::Deserialize` for an error type of your own, or return `hopline::Fault`"
)]
pub trait Failure: Sized {
    /// How a call of the method fails: as [`CallError<Self>`](CallError), or of a [`Fault`] as plain [`Error`].
    type Error: From<Error> + Into<CallError<Self>> + fmt::Debug;

    #[doc(hidden)]
    fn into_failure(self, codec: Codec) -> Result<Vec<u8>, Failed>;

    #[doc(hidden)]
    fn read(codec: Codec, payload: &[u8]) -> Self::Error;
}

/// Why a failure does not travel as the method's own error.
#[doc(hidden)]
#[derive(Debug)]
pub enum Failed {
    /// It is a fault.
    Fault(Fault),
    /// It cannot be written.
    Codec(CodecError),
}

#[diagnostic::do_not_recommend]
impl<E: Serialize + for<'de> Deserialize<'de> + fmt::Debug> Failure for E {
    type Error = CallError<E>;

    fn into_failure(self, codec: Codec) -> Result<Vec<u8>, Failed> {
        codec.encode(&self).map_err(Failed::Codec)
    }

    fn read(codec: Codec, payload: &[u8]) -> CallError<E> {
        match codec.decode(payload) {
            Ok(error) => CallError::Service(error),
            Err(error) => Error::UnreadableReply(CodecError(format!("the service's error {}", error.0))).into(),
        }
    }
}

impl Failure for Fault {
    type Error = Error;

    fn into_failure(mut self, _: Codec) -> Result<Vec<u8>, Failed> {
        if self.code == Code::Ok {
            self.code = Code::Internal;
            self.message = format!("the method failed with a fault of code OK, which says nothing: {}", self.message);
        }
        Err(Failed::Fault(self))
    }

    fn read(_: Codec, _: &[u8]) -> Error {
        Error::Fault(Self::new(
            Code::Unknown,
            "the method returned an error of its own: name its type with `.fails_with()` to read it",
        ))
    }
}

/// How the arguments of a method are read.
pub(crate) fn arguments_of<A: Arguments>(
    method: &Method,
) -> impl Fn(Codec, &[u8]) -> Result<A, String> + Send + Sync + use<A> {
    let signature = method.signature.clone();
    move |codec, payload| {
        codec.arguments(payload).map_err(|misfit| match misfit {
            Misfit::Count { takes, got } => {
                let s = if takes == 1 { "" } else { "s" };
                format!("`{signature}` takes {takes} argument{s}, got {got}")
            }
            Misfit::Other(why) => format!("the arguments of `{signature}` {why}"),
        })
    }
}

/// What runs a method: reads its arguments, and writes what its handler returns.
pub(crate) fn running<A, R, E, F, Fut>(
    read: impl Fn(Codec, &[u8]) -> Result<A, String> + Send + Sync + 'static,
    handler: F,
) -> Handler
where
    F: Fn(Context, A) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<R, E>> + Send + 'static,
    A: Send + 'static,
    R: Serialize + Send + 'static,
    E: Failure + Send + 'static,
{
    Arc::new(move |context, codec, payload| match read(codec, &payload) {
        Ok(arguments) => answer(codec, handler(context, arguments)).boxed(),
        Err(why) => std::future::ready(Answer::Fault(Fault::new(Code::InvalidArgument, why))).boxed(),
    })
}

async fn answer<R: Serialize, E: Failure>(codec: Codec, running: impl Future<Output = Result<R, E>>) -> Answer {
    let unwritable = |what, error| Answer::Fault(Fault::new(Code::Internal, format!("the method's {what} {error}")));
    match running.await {
        Ok(result) => match codec.encode(&result) {
            Ok(payload) => Answer::Result(payload.into()),
            Err(error) => unwritable("result", error),
        },
        Err(failure) => match failure.into_failure(codec) {
            Ok(payload) => Answer::ServiceError(payload.into()),
            Err(Failed::Fault(fault)) => Answer::Fault(fault),
            Err(Failed::Codec(error)) => unwritable("error", error),
        },
    }
}
