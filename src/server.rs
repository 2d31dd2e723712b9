//! The serving side: connects, declares what it serves, runs it, and drains.

mod admit;
mod allow;
mod calls;
mod claims;
mod copies;
mod dead_letters;
mod dedup;
mod give_back;
mod handling;
mod health;
mod keeper;
mod letter;
mod message;
mod moving;
mod outcome;
mod reading;
mod repair;
mod replies;
mod running;
mod supervisor;
mod through;
mod worker;

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use serde::de::DeserializeOwned;
use tokio::sync::{Notify, RwLock, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::info;
use uuid::Uuid;

use self::allow::Allow;
pub use self::allow::Caller;
pub(crate) use self::allow::user_of;
use self::calls::Calls;
use self::health::Health;
pub(crate) use self::letter::history;
use self::reading::{Reading, Topology};
use self::replies::Replies;
pub use self::running::Running;
use self::supervisor::Supervisor;
use self::worker::EVENT;
use crate::client::{MAX_MESSAGE_SIZE, short_id};
use crate::compression::Compression;
use crate::context::Context;
use crate::error::Error;
use crate::middleware::{Chain, Middleware};
use crate::route::Exchanges;
use crate::service::{Dispatch, IntoService, Service};
use crate::topology::{Binding, Declaration, Namespace, ServiceId, check_event_pattern, is_presence_key};
#[cfg(feature = "tls")]
use crate::transport::Tls;
use crate::transport::{Dial, DialSettings, Role, Transport};

/// How many events an instance holds unsettled, of each subscription.
const EVENTS_PREFETCH: u16 = 64;

/// Serves any number of services over one connection for each direction.
///
/// ```
/// use hopline::{Context, Fault, Server, Service};
///
/// # async fn example() -> Result<(), hopline::Error> {
/// let add = |_: Context, (a, b): (i64, i64)| async move { Ok::<_, Fault>(a + b) };
/// let server = Server::connect("memory://").await?.serve(Service::new("calculator", 1).method("add", add));
/// server.run_until(std::future::ready(())).await?;
/// # Ok(()) }
/// ```
pub struct Server {
    dial: Dial,
    transport: Transport,
    settings: ServerBuilder,
    instance: Arc<str>,
    services: Vec<Service>,
    subscriptions: Vec<(String, Service)>,
    allow: Allow,
}

/// What a server may be told before it connects.
#[derive(Debug, Clone)]
pub struct ServerBuilder {
    namespace: Result<Namespace, String>,
    max_message_size: usize,
    compression: Option<Compression>,
    middleware: Chain,
    dial: DialSettings,
}

impl Default for ServerBuilder {
    fn default() -> Self {
        Self {
            namespace: Ok(Namespace::default()),
            max_message_size: MAX_MESSAGE_SIZE,
            compression: None,
            middleware: Chain::default(),
            dial: DialSettings::default(),
        }
    }
}

impl ServerBuilder {
    /// The prefix of every name on the broker, `[A-Za-z0-9_-]+`: clients of other namespaces do not see this server.
    /// Default `hopline`.
    #[must_use]
    pub fn namespace(mut self, name: &str) -> Self {
        self.namespace = Namespace::new(name);
        self
    }

    /// The largest message to accept or send, and what compressed arguments may come to, in bytes. Default 16 MiB.
    #[must_use]
    pub fn max_message_size(mut self, bytes: usize) -> Self {
        self.max_message_size = bytes;
        self
    }

    /// Has a [`Middleware`] go around every call of all services of this server, around its events, and around that of each
    /// [service](crate::Service::with). The first that is added is the outermost. Default: none, which costs nothing.
    ///
    /// ```
    /// use hopline::{Finished, Middleware, Server};
    ///
    /// struct Log;
    ///
    /// impl Middleware for Log {
    ///     fn finished(&self, done: &Finished<'_>) {
    ///         println!("{}.{} {} {:?}", done.call.service(), done.call.method(), done.code, done.took);
    ///     }
    /// }
    ///
    /// # async fn example() -> Result<(), hopline::Error> {
    /// let server = Server::builder().with(Log).connect("amqp://localhost").await?;
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn with(mut self, middleware: impl Middleware) -> Self {
        self.middleware.push(middleware);
        self
    }

    /// What people are to call this server, so that they find its connection: it is shown by the broker as
    /// `NAME server PROCESS INSTANCE`, and in the log. 1 to 64 bytes, no control characters. Default: the program's name.
    #[must_use]
    pub fn name(mut self, name: &str) -> Self {
        self.dial.name = Some(name.to_owned());
        self
    }

    /// How long each address of the broker may take until its connection can be used, from the first question to the name
    /// server on; an address may say otherwise (`?connection_timeout=`, in milliseconds). Default 10 s.
    #[must_use]
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.dial.timeout = timeout;
        self
    }

    /// How results are compressed, for callers that can read it. At least 1024 bytes of a result are, and only if that
    /// makes them smaller. Compressed arguments are read whatever is set here. Default: results are not compressed.
    #[must_use]
    pub fn compression(mut self, compression: Compression) -> Self {
        self.compression = Some(compression);
        self
    }

    /// Whom to trust and who to be on `amqps://`. Default: the system's roots, and no certificate.
    #[cfg(feature = "tls")]
    #[must_use]
    pub fn tls(mut self, tls: Tls) -> Self {
        self.dial.tls = Some(tls);
        self
    }

    /// Connects to the broker that `url` names: `memory://`, `amqp://` or `amqps://`; or to the first that answers of
    /// several, as [`ClientBuilder::connect`](crate::ClientBuilder::connect) reads them. A connection that is lost is made
    /// again, for as long as it takes, and everything is served again: see [`Running::state`]. A server that is connected to
    /// another than the first address in its own order tries that one every 2.5 to 7.5 minutes, and moves there when all can be served there: no call or event is missed meanwhile, and no call to it fails.
    ///
    /// # Errors
    /// `Invalid` for an address or a setting that cannot be used, `Connect` when no broker answers or it refuses.
    pub async fn connect(self, url: &str) -> Result<Server, Error> {
        self.namespace.clone().map_err(Error::Invalid)?;
        Compression::check(self.compression).map_err(Error::Invalid)?;
        let instance: Arc<str> = short_id().into();
        let dial = self.dial.dial(url)?.of(instance.clone());
        let transport = dial.connect(Role::Server).await?;
        info!(name = dial.label(Role::Server), broker = transport.broker().map(display), "connected");
        Ok(Server {
            dial,
            transport,
            settings: self,
            instance,
            services: Vec::new(),
            subscriptions: Vec::new(),
            allow: Allow::default(),
        })
    }
}

impl Server {
    /// Connects with default settings.
    ///
    /// # Errors
    /// As [`ServerBuilder::connect`].
    pub async fn connect(url: &str) -> Result<Self, Error> {
        Self::builder().connect(url).await
    }

    /// Settings to change before connecting.
    #[must_use]
    pub fn builder() -> ServerBuilder {
        ServerBuilder::default()
    }

    /// The id of this server on the broker, the same for all its services: what [`Call::to`](crate::Call::to) takes.
    #[must_use]
    pub fn instance(&self) -> &str {
        &self.instance
    }

    /// Serves a service: `CalculatorServer::new(implementation)` of a service trait, or a [`Service`] put together by hand.
    /// A server may serve several services, and several versions of one.
    #[must_use]
    pub fn serve(mut self, service: impl IntoService) -> Self {
        self.services.push(service.into_service());
        self
    }

    /// Handles the events whose key matches `pattern`, words with single dots between them, where `*` is any one word and `#`
    /// any number of them. [`Context::method`] is the event's key. Events reach every subscribing server that is up when they are
    /// published; each subscription handles them one after the other, in the order of one publisher.
    #[must_use]
    pub fn subscribe<T, F, Fut>(mut self, pattern: &str, handler: F) -> Self
    where
        F: Fn(Context, T) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = ()> + Send + 'static,
        T: DeserializeOwned + Send + 'static,
    {
        let service = Service::new("events", 1).event(EVENT, handler);
        let service = service.prefetch(EVENTS_PREFETCH).dispatch(Dispatch::Inline).of_pattern(pattern);
        self.subscriptions.push((pattern.to_owned(), service));
        self
    }

    /// Asks `rule` about everybody who wants something of this server, before arguments are read: requests, oneway calls
    /// and broadcasts of `service.vMAJOR.method`, questions of discovery, which are `service.vMAJOR.hopline.ping`, `.info`
    /// and `.stats`, and events, which are `event:KEY`. Without a rule everything is allowed. A second rule takes the
    /// first one's place.
    ///
    /// A refused request is answered `PERMISSION_DENIED`, a oneway call is kept with the dead letters, and an event is
    /// dropped and logged. Cancels are not asked about: they need the id of the call, which nobody else knows. The rule is
    /// asked often and is not to wait; one that panics refuses.
    ///
    /// ```
    /// # async fn example() -> Result<(), hopline::Error> {
    /// # let url = "memory://";
    /// let server = hopline::Server::connect(url).await?.allow(|caller, method| match method {
    ///     "ledger.v1.book" => caller.user == Some("billing"),
    ///     _ => caller.user.is_some(),
    /// });
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn allow<F>(mut self, rule: F) -> Self
    where
        F: Fn(&Caller<'_>, &str) -> bool + Send + Sync + 'static,
    {
        self.allow = Allow::by(rule);
        self
    }

    /// Starts to serve: when this returns, the services can be called.
    ///
    /// # Errors
    /// `Invalid` for bad names, patterns and settings, and for services or methods that are there twice, `Mismatch` where a
    /// queue exists with other arguments, `Broker` for what the broker refuses, `Disconnected`.
    pub async fn start(self) -> Result<Running, Error> {
        let Self { dial, transport, settings, instance, services, subscriptions, allow } = self;
        let namespace = settings.namespace.map_err(Error::Invalid)?;
        for (pattern, _) in &subscriptions {
            check_event_pattern(pattern).map_err(Error::Invalid)?;
        }
        let mut served = BTreeMap::new();
        for service in services {
            let id = checked(&service)?;
            if served.insert(id.clone(), service).is_some() {
                return Err(Error::Invalid(format!("the service `{id}` is served twice")));
            }
        }

        let transports = Arc::new(watch::channel(transport).0);
        let draining = CancellationToken::new();
        let name: Arc<str> = dial.label(Role::Server).into();
        let health = Arc::new(Health::new(name.clone()));
        let site = Arc::new(Site {
            replies: Replies::start(
                &transports,
                draining.clone(),
                instance.clone(),
                settings.max_message_size,
                health.clone(),
            ),
            transports,
            exchanges: Exchanges::of(&namespace),
            namespace,
            instance,
            name,
            services: served.keys().map(|id| id.to_string().into()).collect(),
            max_size: settings.max_message_size,
            allow,
            compression: settings.compression,
            middleware: settings.middleware,
            draining,
            shared: TaskTracker::new(),
            addressed: TaskTracker::new(),
            drained: CancellationToken::new(),
            own: TaskTracker::new(),
            calls: Mutex::default(),
            given_back: Mutex::default(),
            topology: Mutex::default(),
            unentered: Notify::new(),
            declaring: RwLock::default(),
            health,
        });
        // From here on whatever has begun ends with it.
        let running = Running::new(site.clone());
        let patterns: Vec<String> = subscriptions.iter().map(|(pattern, _)| pattern.clone()).collect();
        let mut supervisor = Supervisor::new(site, dial);
        for (id, service) in served {
            supervisor.serve(id, service)?;
        }
        for (pattern, service) in subscriptions {
            supervisor.subscribe(pattern, checked(&service)?, service)?;
        }
        supervisor.start().await?;
        tokio::spawn(supervisor.run());
        info!(name = &*running.site.name, services = ?running.site.services, subscriptions = ?patterns, "serving");
        Ok(running)
    }

    /// Serves until `stop` resolves, then drains: running calls finish and reply, what has not started goes back to the
    /// queue, and the connection closes. A lost connection is made again meanwhile.
    ///
    /// # Errors
    /// As [`Server::start`].
    pub async fn run_until<S: Future>(self, stop: S) -> Result<(), Error> {
        let running = self.start().await?;
        stop.await;
        running.drain().await;
        Ok(())
    }
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server")
            .field("instance", &self.instance)
            .field("services", &self.services)
            .finish_non_exhaustive()
    }
}

fn checked(service: &Service) -> Result<ServiceId, Error> {
    let id = service.id.clone().map_err(Error::Invalid)?;
    if service.problems.is_empty() {
        return Ok(id);
    }
    Err(Error::Invalid(format!("`{id}` cannot be served: {}", service.problems.join("; "))))
}

/// What all services of a server share.
struct Site {
    /// The connection; while there is none, the last one.
    transports: Arc<watch::Sender<Transport>>,
    replies: Replies,
    namespace: Namespace,
    instance: Arc<str>,
    /// What its connections are called, and it in the log.
    name: Arc<str>,
    /// What is served, each as `name.vMAJOR`.
    services: Arc<[Arc<str>]>,
    max_size: usize,
    /// How results are compressed.
    compression: Option<Compression>,
    middleware: Chain,
    exchanges: Exchanges,
    allow: Allow,
    /// No more calls are taken.
    draining: CancellationToken,
    /// The tasks that read the shared queues; each waits for the calls it started.
    shared: TaskTracker,
    /// The calls that came by this instance's own queues and run: while they do, these are read for their cancels.
    addressed: TaskTracker,
    /// All those calls are done.
    drained: CancellationToken,
    /// The tasks that read this instance's own queues, which tell callers until the end that it is leaving.
    own: TaskTracker,
    /// The calls of each service and subscription.
    calls: Mutex<Vec<Arc<Mutex<Calls>>>>,
    /// The calls that had not started when the server began to drain, and were given back. It may be given one of them again,
    /// until the broker has heard that it takes no more.
    given_back: Mutex<HashSet<Uuid>>,
    /// What is declared over the connection.
    topology: Mutex<Topology>,
    /// Tells that the catalogue lacks a service that has dead letters.
    unentered: Notify,
    /// Read while bindings of an instance's queues are declared: a drain waits for that before it unbinds.
    declaring: RwLock<()>,
    health: Arc<Health>,
}

/// A queue, what leads to it, and whether it is read now.
#[derive(Debug)]
struct Declared {
    parts: Vec<Declaration>,
    is_read: bool,
}

impl Site {
    /// Whether a binding has this server asked whether it takes calls.
    fn is_presence(&self, binding: &Binding) -> bool {
        binding.exchange == self.namespace.rpc() && is_presence_key(&binding.key)
    }

    /// Resolves when the server has drained for so long.
    async fn has_drained_for(&self, time: Duration) {
        self.draining.cancelled().await;
        tokio::time::sleep(time).await;
    }

    fn transport(&self) -> Transport {
        self.transports.borrow().clone()
    }

    /// How many calls run now, and how many have run, of all services and subscriptions.
    fn tally(&self) -> (usize, u64) {
        let calls = self.calls.lock().expect("no panic while holding what is served");
        let tallies = calls.iter().map(|calls| calls.lock().expect("no panic while holding the calls").tally());
        tallies.fold((0, 0), |(running, finished), (r, f)| (running + r, finished + f))
    }

    fn given_back(&self) -> MutexGuard<'_, HashSet<Uuid>> {
        self.given_back.lock().expect("no panic while holding what was given back")
    }

    fn topology(&self) -> Topology {
        self.topology.lock().expect("no panic while holding the topology").clone()
    }

    /// From now on this is the connection.
    fn serves_over(&self, reading: &Reading) {
        *self.topology.lock().expect("no panic while holding the topology") = reading.topology.clone();
        self.transports.send_replace(reading.transport.clone());
    }
}
