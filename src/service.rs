//! A service as the server sees it: named methods and how to run them. The macro's output plugs in here.

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::codec::{Codec, CodecError};
use crate::context::Context;
use crate::error::{Code, Fault};
use crate::registry::MethodInfo;
use crate::topology::{CallsQueue, QueueKind, ServiceId, check_name};

/// A service to be served: its methods, and how an instance runs them.
///
/// [`#[hopline::service]`](crate::service) makes one from a trait; without a trait, methods are added one by one:
///
/// ```
/// use hopline::{Context, Fault, Method, Service};
///
/// let service = Service::new("calculator", 1)
///     .method(Method::new("add"), |_: Context, (a, b): (i64, i64)| async move { Ok::<_, Fault>(a + b) })
///     .prefetch(16);
/// # let _ = service;
/// ```
pub struct Service {
    pub(crate) id: Result<ServiceId, String>,
    pub(crate) methods: BTreeMap<String, (Method, Handler)>,
    pub(crate) problems: Vec<String>,
    /// As many as run at once, unless it is said otherwise.
    pub(crate) prefetch: Option<u16>,
    pub(crate) concurrency: usize,
    pub(crate) dispatch: Dispatch,
    pub(crate) calls: CallsQueue,
}

/// How handlers run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
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
    Result(Vec<u8>),
    /// The method's own error.
    ServiceError(Vec<u8>),
    /// A refusal or breakdown.
    Fault(Fault),
}

impl Service {
    /// A service without methods yet. A name that is not `[A-Za-z0-9_-]+` is reported when the server starts.
    #[must_use]
    pub fn new(name: &str, version: u32) -> Self {
        Self::with_id(ServiceId::new(name, version))
    }

    pub(crate) fn with_id(id: Result<ServiceId, String>) -> Self {
        Self {
            id,
            methods: BTreeMap::new(),
            problems: Vec::new(),
            prefetch: None,
            concurrency: 256,
            dispatch: Dispatch::default(),
            calls: CallsQueue {
                kind: QueueKind::Classic,
                grace: Duration::from_secs(60),
                max_length: None,
                priorities: false,
            },
        }
    }

    /// Adds a method. Its arguments are one tuple; `[(); 0]` when there are none.
    ///
    /// The error that the handler returns is the method's own, any serde type, or a [`Fault`] with a code to choose.
    #[must_use]
    pub fn method<A, R, E, F, Fut>(mut self, method: Method, handler: F) -> Self
    where
        F: Fn(Context, A) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<R, E>> + Send + 'static,
        A: DeserializeOwned + Send + 'static,
        R: Serialize + Send + 'static,
        E: Failure + Send + 'static,
    {
        if let Err(problem) = check_name("method", &method.name) {
            self.problems.push(problem);
        }
        let signature = method.signature.clone();
        let handler: Handler = Arc::new(move |context, codec, payload| match codec.decode::<A>(&payload) {
            Ok(arguments) => answer(codec, handler(context, arguments)).boxed(),
            Err(error) => {
                let fault = Fault::new(Code::InvalidArgument, format!("the arguments of `{signature}` {error}"));
                std::future::ready(Answer::Fault(fault)).boxed()
            }
        });
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
    /// of quick methods ([`Coalesce`](crate::Coalesce)). Default: no limit; every instance has to say the same.
    #[must_use]
    pub fn max_queue(mut self, messages: u32) -> Self {
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

/// A method's name and nature.
#[derive(Debug, Clone)]
pub struct Method {
    pub(crate) name: String,
    pub(crate) signature: String,
    pub(crate) idempotent: bool,
    pub(crate) dedup: Option<Duration>,
}

impl Method {
    /// A method that is called as `name`, `[A-Za-z0-9_-]+`.
    #[must_use]
    pub fn new(name: impl Into<String>) -> Self {
        let name = name.into();
        Self { signature: name.clone(), name, idempotent: false, dedup: None }
    }

    /// How it is written, for messages about arguments that do not fit. Default: the name.
    #[must_use]
    pub fn signature(mut self, signature: impl Into<String>) -> Self {
        self.signature = signature.into();
        self
    }

    /// Running it twice does no more than running it once: after a worker's death another instance runs it again.
    #[must_use]
    pub fn idempotent(mut self) -> Self {
        self.idempotent = true;
        self
    }

    /// Runs a call once though it is delivered again, as far as one instance can tell: for so long after a call has ended,
    /// another delivery with its request id gets the first reply without running, and while it still runs, waits for that.
    /// So does a redelivered call that would be refused as `ABORTED`. Default: nothing is remembered.
    ///
    /// Of an oneway call, another delivery is acked without running if the first ended well; one that failed is tried
    /// again as ever. Faults, such as of a panic, are replies too; a call whose caller gave up has none.
    ///
    /// Each instance remembers what it ran itself, in memory: at most 65 536 answers and 64 MiB of a service, and beyond
    /// those forgets first what it would forget first anyway. Another instance, and this one after a restart, knows
    /// nothing of it. What must not happen twice needs a record where it happens, such as a unique key in a database:
    /// [`Context::request_id`] is the same in every delivery.
    ///
    /// ```
    /// use std::time::Duration;
    ///
    /// use hopline::{Context, Fault, Method, Service};
    ///
    /// let charge = |_: Context, (cents,): (u64,)| async move { Ok::<_, Fault>(format!("charged {cents}")) };
    /// let service = Service::new("billing", 1).method(Method::new("charge").dedup(Duration::from_secs(600)), charge);
    /// # let _ = service;
    /// ```
    #[must_use]
    pub fn dedup(mut self, time: Duration) -> Self {
        self.dedup = Some(time);
        self
    }

    pub(crate) fn info(&self) -> MethodInfo {
        MethodInfo { name: self.name.clone(), signature: self.signature.clone(), idempotent: self.idempotent }
    }
}

/// What a handler may fail with: any serde type, which reaches the caller as [`Error::Service`](crate::Error::Service),
/// or a [`Fault`].
pub trait Failure {
    #[doc(hidden)]
    fn into_failure(self, codec: Codec) -> Result<Vec<u8>, Failed>;
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

impl<E: Serialize> Failure for E {
    fn into_failure(self, codec: Codec) -> Result<Vec<u8>, Failed> {
        codec.encode(&self).map_err(Failed::Codec)
    }
}

impl Failure for Fault {
    fn into_failure(self, _: Codec) -> Result<Vec<u8>, Failed> {
        Err(Failed::Fault(self))
    }
}

async fn answer<R: Serialize, E: Failure>(codec: Codec, running: impl Future<Output = Result<R, E>>) -> Answer {
    let unwritable = |what, error| Answer::Fault(Fault::new(Code::Internal, format!("the method's {what} {error}")));
    match running.await {
        Ok(result) => match codec.encode(&result) {
            Ok(payload) => Answer::Result(payload),
            Err(error) => unwritable("result", error),
        },
        Err(failure) => match failure.into_failure(codec) {
            Ok(payload) => Answer::ServiceError(payload),
            Err(Failed::Fault(fault)) => Answer::Fault(fault),
            Err(Failed::Codec(error)) => unwritable("error", error),
        },
    }
}
