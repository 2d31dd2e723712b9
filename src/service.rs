//! A service as a server serves it: its methods, their handlers, and how an instance runs them. The code that
//! `#[hopline::service]` generates builds one of these.

mod body;
mod dispatch;
mod failure;
mod handler;
mod method;
mod replay;
mod schema;

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

pub(crate) use self::body::Body;
pub use self::dispatch::{Dispatch, QueueFull};
pub use self::failure::{EventResult, Failure};
pub(crate) use self::handler::{Answer, Handler, arguments_of, running};
use self::method::MAX_PAUSE;
pub use self::method::Method;
pub use self::replay::Replay;
pub(crate) use self::replay::ReplaySettings;
#[cfg(feature = "schema")]
pub(crate) use self::schema::schema_of;
pub use self::schema::{Probe, Undescribed};
use crate::codec::{Arguments, Codec};
use crate::context::Context;
use crate::error::Error;
use crate::event::read_event;
use crate::middleware::{Chain, Middleware};
use crate::topology::{CallsQueue, QueueKind, ServiceId, check_name};

/// The name of the only method of a subscription.
pub(crate) const EVENT: &str = "event";
/// The number of the line in which an event waits for those of the same key. `None` if the event cannot be read.
pub(crate) type EventOrder = Arc<dyn Fn(Codec, &[u8]) -> Option<u64> + Send + Sync>;

/// The name under which the registry shows what answers the calls of all other methods. No method can have it.
const FALLBACK: &str = "*";

/// A service that a [`Server`](crate::Server) can serve: its methods, and how an instance runs them.
///
/// [`#[hopline::service]`](crate::service) makes one from a trait. Without a trait, methods are added one by one:
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
    /// Its name and version, or what is wrong with the name.
    pub(crate) id: Result<ServiceId, String>,
    /// Its methods and their handlers, by name.
    pub(crate) methods: BTreeMap<String, (Method, Handler)>,
    /// What answers the calls of all other methods.
    pub(crate) fallback: Option<(Method, Handler)>,
    /// What is wrong with the methods and settings. [`Server::start`](crate::Server::start) fails with all of them.
    pub(crate) problems: Vec<String>,
    /// The pattern of event keys, if this is a subscription.
    pub(crate) pattern: Option<String>,
    /// In which order its events are handled, if they have one.
    pub(crate) order: Option<EventOrder>,
    /// `Some` if its events come from a stream.
    pub(crate) replay: Option<ReplaySettings>,
    /// How many messages of each queue may be unacknowledged. `None`: as many as run at once.
    pub(crate) prefetch: Option<u16>,
    /// How many calls run at once.
    pub(crate) concurrency: usize,
    pub(crate) dispatch: Dispatch,
    /// How the queue of its requests is declared.
    pub(crate) calls: CallsQueue,
    /// The middleware around its calls.
    pub(crate) middleware: Chain,
}

impl Service {
    /// A service without methods. The name may have `A-Z`, `a-z`, `0-9`, `_` and `-` in it; another name makes
    /// [`Server::start`](crate::Server::start) fail.
    #[must_use]
    pub fn new(name: &str, version: u32) -> Self {
        Self::of(ServiceId::new(name, version))
    }

    /// The same, of this id.
    pub(crate) fn of(id: Result<ServiceId, String>) -> Self {
        Self {
            id,
            methods: BTreeMap::new(),
            fallback: None,
            pattern: None,
            order: None,
            replay: None,
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

    /// Adds a method, by its name or as a [`Method`] with settings. The handler takes its [arguments](Arguments) as one
    /// tuple, or as `[(); 0]` if there are none.
    ///
    /// The handler's error is any serde type, or a [`Fault`](crate::Fault) with a code of your choice.
    ///
    /// When the caller gives up or the deadline passes, the handler's future is dropped at the point where it waits.
    /// The rest of it does not run. That is right for a method that only reads, and wrong for work that must not stay
    /// half done: set [`Method::finishes`] for that. Handlers of oneway calls and events always run to their end.
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

    /// Changes the settings of a method that is there: of a trait, whose methods are served as its options say, or by what
    /// the program reads when it starts. A name that the service does not have makes
    /// [`Server::start`](crate::Server::start) fail.
    ///
    /// ```
    /// use hopline::{Dispatch, Service};
    ///
    /// #[hopline::service]
    /// trait Hashes {
    ///     async fn hash(&self, text: String) -> u64;
    /// }
    /// # struct Sums;
    /// # impl Hashes for Sums {
    /// #     async fn hash(&self, text: String) -> u64 { text.bytes().map(u64::from).sum() }
    /// # }
    /// let service: Service = HashesServer::new(Sums);
    /// let service = service.configure("hash", |method| method.dispatch(Dispatch::Pool(2)));
    /// # let _ = service;
    /// ```
    #[must_use]
    pub fn configure(mut self, method: &str, change: impl FnOnce(Method) -> Method) -> Self {
        match self.methods.remove(method) {
            Some((before, handler)) => {
                let changed = change(before);
                if changed.name != method {
                    self.problems
                        .push(format!("`{method}` cannot become `{}`: configure it, and keep its name", changed.name));
                }
                self.add(changed, handler)
            }
            None => {
                self.problems.push(format!("there is no method `{method}` to configure"));
                self
            }
        }
    }

    /// Answers the calls of all methods that the service does not have: a stand-in for another service, or a bridge to
    /// one. [`Context::method`] is the method that was called. Without this, such a call is refused as `UNIMPLEMENTED`.
    ///
    /// The registry shows it as the method `*`. It gets no oneway calls for any instance: the broker has to know the
    /// names of oneway methods.
    ///
    /// ```
    /// use hopline::{Context, Fault, Service};
    ///
    /// let named = |ctx: Context, _: Vec<u64>| async move { Ok::<_, Fault>(ctx.method().to_owned()) };
    /// let service = Service::new("stand-in", 1).fallback(named);
    /// # let _ = service;
    /// ```
    #[must_use]
    pub fn fallback<A, R, E, F, Fut>(mut self, handler: F) -> Self
    where
        F: Fn(Context, A) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<R, E>> + Send + 'static,
        A: Arguments + Send + 'static,
        R: Serialize + Send + 'static,
        E: Failure + Send + 'static,
    {
        let method = Method::new(FALLBACK);
        let read = arguments_of(&method);
        self.fallback = Some((method, running(read, handler)));
        self
    }

    /// Adds the handler of a subscription's events. An event is one value, not a tuple of arguments. `version` is the one
    /// that the handler takes; `None`: any.
    pub(crate) fn event<T, F, Fut>(self, method: Method, version: Option<u32>, handler: F) -> Self
    where
        F: Fn(Context, T) -> Fut + Send + Sync + 'static,
        Fut: Future + Send + 'static,
        Fut::Output: EventResult,
        T: DeserializeOwned + Send + 'static,
    {
        let read = move |context: &Context, codec, payload: &[u8]| read_event(context, version, codec, payload);
        let handler = running(read, move |context, event| {
            let handling = handler(context, event);
            async move { handling.await.into_result() }
        });
        self.add(method, handler)
    }

    /// Adds a method and its handler, and checks the method's settings.
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
        #[cfg(feature = "schema")]
        self.problems.extend(method.problem.clone());
        let name = method.name.clone();
        if self.methods.insert(name.clone(), (method, handler)).is_some() {
            self.problems.push(format!("the method `{name}` is there twice"));
        }
        self
    }

    /// How many messages of each queue an instance may hold unacknowledged. A message is one call, or up to 64 calls of
    /// quick methods. Default: the same as [`concurrency`](Self::concurrency), so that no call waits in one instance
    /// while another is idle; with a [bounded queue](Dispatch::BoundedPool) as much more as fills it. What methods with
    /// [places of their own](Method::concurrency) hold comes on top, whatever is set. A larger number keeps quick methods busy if `concurrency` is small; with a smaller one
    /// `concurrency` is never reached. 0 counts as 1.
    ///
    /// A handler that calls a method of its own service needs a second place, of `prefetch` and of `concurrency`, until
    /// that call is answered. If such calls take all places of all instances, they wait for each other until their
    /// deadlines. Put those methods into a service of their own, or call the function directly.
    #[must_use]
    pub fn prefetch(mut self, messages: u16) -> Self {
        self.prefetch = Some(messages.max(1));
        self
    }

    /// How many messages of each queue an instance holds for the calls that share the service's places. With `looks_ahead`
    /// as many as run at once wait here, so that a policy can decide about them. So do those that a full queue refuses.
    pub(crate) fn prefetched(&self, looks_ahead: bool) -> usize {
        let ahead = if looks_ahead { self.concurrency } else { 0 };
        let ahead = match self.dispatch.queue() {
            None => ahead,
            Some((queue, QueueFull::CallerRuns)) => queue.saturating_add(ahead.max(1)),
            Some((queue, QueueFull::Refuse)) => queue.saturating_add(self.concurrency),
        };
        self.prefetch.map_or(self.concurrency.saturating_add(ahead), usize::from)
    }

    /// How many calls an instance runs at once, of all methods without [places of their own](Method::concurrency).
    /// Default: 256. 0 counts as 1.
    #[must_use]
    pub fn concurrency(mut self, calls: usize) -> Self {
        self.concurrency = calls.max(1);
        self
    }

    /// Where handlers run, unless their [method](Method::dispatch) says it. Default: [`Dispatch::Spawn`].
    #[must_use]
    pub fn dispatch(mut self, dispatch: Dispatch) -> Self {
        self.dispatch = dispatch;
        self
    }

    /// How long the queue of calls stays after the last instance has left, also after
    /// [`Running::drain`](crate::Running::drain). Default: 60 s; at least 1 s. Every instance must set the same.
    ///
    /// Calls that are made in this time wait for an instance to come back, so a restart costs no call. After it they
    /// fail with [`Error::NoService`](crate::Error::NoService) at once. Calls with
    /// [`Absent::Fail`](crate::Absent::Fail) do not wait.
    #[must_use]
    pub fn grace(mut self, grace: Duration) -> Self {
        // A shorter one could be over between declaring the queue and consuming it.
        self.calls.grace = grace.max(Duration::from_secs(1));
        self
    }

    /// How many messages may wait in the queue of calls before further calls fail with `Overloaded`. A message is one
    /// call, or up to 64 calls of quick methods ([`Coalesce`](crate::Coalesce)). Default: no limit; at least 1. Every
    /// instance must set the same.
    #[must_use]
    pub fn max_queue(mut self, messages: u32) -> Self {
        if messages == 0 {
            self.problems.push("`max_queue(0)` refuses every call: allow 1, or leave it out for no limit".to_owned());
        }
        self.calls.max_length = Some(messages);
        self
    }

    /// Lets waiting calls of a higher [priority](crate::Call::priority) overtake others. Default: off, because it makes
    /// the broker slower: by a quarter if each call is a message of its own. Every instance must set the same.
    #[must_use]
    pub fn priorities(mut self) -> Self {
        self.calls.priorities = true;
        self
    }

    /// Puts a [`Middleware`] around every call, oneway call and broadcast of this service. The first that is added is
    /// the outermost. The middleware of the [server](crate::ServerBuilder::with) is around them all. Default: none.
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

    /// Keeps waiting calls on several nodes of a cluster, so that the loss of one node loses no call. Calls may have to
    /// pause then. Default: one node, which is faster. Every instance must set the same. From RabbitMQ 4.0 on such a
    /// queue always has priorities, but only two: 0 to 4, and 5 to 9.
    #[must_use]
    pub fn quorum(mut self) -> Self {
        self.calls.kind = QueueKind::Quorum;
        self
    }

    /// The id, if there are no problems. All of them are reported at once.
    pub(crate) fn checked(&self) -> Result<ServiceId, Error> {
        let id = self.id.clone().map_err(Error::Invalid)?;
        if self.problems.is_empty() {
            return Ok(id);
        }
        Err(Error::Invalid(format!("`{id}` cannot be served: {}", self.problems.join("; "))))
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

/// What [`Server::serve`](crate::Server::serve) takes: a [`Service`], or a type that can be made into one.
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
