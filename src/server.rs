//! The server: it connects, declares the queues of its services, runs their calls, and drains when it is told to stop.

mod about;
mod admit;
mod allow;
mod builder;
mod calls;
mod claims;
mod copies;
mod dead_letters;
mod dedup;
mod dispatch;
mod give_back;
mod handling;
mod health;
mod keeper;
mod letter;
mod locate;
mod message;
mod moving;
mod outcome;
mod reading;
mod reason;
mod repair;
mod replies;
mod reply;
mod running;
mod served_method;
mod served_queue;
mod signals;
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
pub use self::builder::ServerBuilder;
use self::calls::Calls;
use self::health::Health;
use self::reading::{Reading, Topology};
use self::replies::Replier;
pub use self::running::Running;
use self::signals::Signals;
use self::supervisor::Supervisor;
use self::worker::EVENT;
use crate::compression::Compression;
use crate::context::Context;
use crate::error::Error;
use crate::limits::EVENTS_PREFETCH;
use crate::middleware::Chain;
use crate::route::Exchanges;
use crate::service::{Dispatch, IntoService, Service};
use crate::topology::{Binding, Namespace, ServiceId, check_event_pattern, is_presence_key};
use crate::transport::{Dial, Role, Transport};

/// Serves any number of services, and handles events, over one connection for each direction.
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
    /// `None` if the server connects only when it starts.
    transport: Option<Transport>,
    namespace: Namespace,
    max_message_size: usize,
    compression: Option<Compression>,
    middleware: Chain,
    instance: Arc<str>,
    services: Vec<Service>,
    subscriptions: Vec<(String, Service)>,
    allow: Allow,
}

impl Server {
    /// Connects with default settings.
    ///
    /// # Errors
    /// As [`ServerBuilder::connect`].
    pub async fn connect(url: impl AsRef<str>) -> Result<Self, Error> {
        Self::builder().connect(url).await
    }

    /// Connects with the settings in the environment: `HOPLINE_URL`, and the other variables of
    /// [`environment`](crate::environment).
    ///
    /// ```no_run
    /// # use hopline::{Server, Service};
    /// # async fn example(calculator: Service) -> Result<(), hopline::Error> {
    /// // HOPLINE_URL=amqp://user:password@broker.example.com HOPLINE_NAME=calculator
    /// Server::connect_env().await?.serve(calculator).run_until_signal().await
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`ServerBuilder::connect_env`].
    pub async fn connect_env() -> Result<Self, Error> {
        Self::builder().connect_env().await
    }

    /// A builder, for settings that must be chosen before the server connects.
    #[must_use]
    pub fn builder() -> ServerBuilder {
        ServerBuilder::default()
    }

    /// The id of this server, the same for all its services. [`Call::to`](crate::Call::to) takes it to call this server
    /// alone.
    #[must_use]
    pub fn instance(&self) -> &str {
        &self.instance
    }

    /// Adds a service: `CalculatorServer::new(implementation)` of a service trait, or a [`Service`] that is built by
    /// hand. A server may serve several services, and several versions of one service.
    #[must_use]
    pub fn serve(mut self, service: impl IntoService) -> Self {
        self.services.push(service.into_service());
        self
    }

    /// Calls `handler` for each event whose key matches `pattern`. A pattern is words with single dots between them,
    /// where `*` stands for any one word and `#` for any number of words. [`Context::method`] is the key of the event.
    ///
    /// An event reaches every server with a matching subscription that is up when the event is published. A
    /// subscription handles its events one after the other; those of one publisher come in the order in which they were
    /// published.
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

    /// Sets the rule that says who may do what. `rule` gets the caller and what it wants to do, before arguments are
    /// read. It returns whether that is allowed. Default: everything is allowed. A second rule replaces the first.
    ///
    /// What the caller wants is written as follows:
    ///
    /// - a request, oneway call or broadcast is `service.vMAJOR.method`,
    /// - a question of discovery is `service.vMAJOR.hopline.ping`, `.info` or `.stats`,
    /// - an event is `event:KEY`.
    ///
    /// A request that is refused is answered with `PERMISSION_DENIED`, a oneway call becomes a dead letter, and an
    /// event is dropped and logged. The rule is not asked about cancels: who cancels must know the id of the call, and
    /// only the caller does. The rule is called for every frame and must not block. If it panics, the frame is refused.
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

    /// Starts to serve. When this returns, the services can be called. A server that [connects
    /// lazily](ServerBuilder::connect_lazy) returns at once; its [state](Running::state) tells when its services can be
    /// called.
    ///
    /// # Errors
    /// - `Invalid` if a name, pattern or setting is wrong, or if a service or method was added twice,
    /// - `Mismatch` if a queue exists with other arguments,
    /// - `Broker` if the broker refuses something else,
    /// - `Disconnected` if the connection is lost meanwhile.
    pub async fn start(self) -> Result<Running, Error> {
        let Self { dial, transport, namespace, max_message_size, compression, instance, .. } = self;
        let Self { services, subscriptions, allow, middleware, .. } = self;
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

        let is_connected = transport.is_some();
        let transports = Arc::new(watch::channel(transport.unwrap_or_else(Transport::absent)).0);
        let draining = CancellationToken::new();
        let name: Arc<str> = dial.label(Role::Server).into();
        let health = Arc::new(Health::new(name.clone()));
        let site = Arc::new(Site {
            replies: Replier::start(&transports, draining.clone(), instance.clone(), max_message_size, health.clone()),
            transports,
            exchanges: Exchanges::of(&namespace),
            namespace,
            instance,
            name,
            services: served.keys().map(|id| id.to_string().into()).collect(),
            max_size: max_message_size,
            allow,
            compression,
            middleware,
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
        let (name, services) = (running.site.name.clone(), running.site.services.clone());
        if is_connected {
            supervisor.start().await?;
            tokio::spawn(supervisor.run());
            info!(name = &*name, ?services, subscriptions = ?patterns, "serving");
        } else {
            info!(name = &*name, ?services, subscriptions = ?patterns, "serving once there is a connection");
            tokio::spawn(supervisor.start_lazily());
        }
        Ok(running)
    }

    /// Serves until `stop` resolves, and then drains: running calls finish and reply, calls that have not started go
    /// back to their queue, and the connection is closed. A connection that is lost meanwhile is made again.
    ///
    /// # Errors
    /// As [`Server::start`].
    pub async fn run_until<S: Future>(self, stop: S) -> Result<(), Error> {
        let running = self.start().await?;
        stop.await;
        running.drain().await;
        Ok(())
    }

    /// Serves until the process gets a signal to end, and then drains: see [`Running::run_until_signal`]. A signal that
    /// arrives while the server [starts](Self::start) ends it at once.
    ///
    /// ```no_run
    /// # use hopline::{Server, Service};
    /// # async fn example(calculator: Service) -> Result<(), hopline::Error> {
    /// Server::connect("amqp://localhost").await?.serve(calculator).run_until_signal().await
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`Server::start`].
    pub async fn run_until_signal(self) -> Result<(), Error> {
        let mut signals = Signals::listen();
        let running = tokio::select! {
            running = self.start() => running?,
            () = signals.next() => return Ok(()),
        };
        running.run_until(signals).await;
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

/// The id of a service that has no problems. All problems are reported at once.
fn checked(service: &Service) -> Result<ServiceId, Error> {
    let id = service.id.clone().map_err(Error::Invalid)?;
    if service.problems.is_empty() {
        return Ok(id);
    }
    Err(Error::Invalid(format!("`{id}` cannot be served: {}", service.problems.join("; "))))
}

/// What all workers of a server share.
struct Site {
    /// The current connection. While there is none, the last one.
    transports: Arc<watch::Sender<Transport>>,
    replies: Replier,
    namespace: Namespace,
    instance: Arc<str>,
    /// The name of the server's connections, which the log uses too.
    name: Arc<str>,
    /// The services it serves, each written `name.vMAJOR`.
    services: Arc<[Arc<str>]>,
    max_size: usize,
    /// How results are compressed.
    compression: Option<Compression>,
    middleware: Chain,
    exchanges: Exchanges,
    allow: Allow,
    /// Cancelled when the server begins to drain: it starts no more calls.
    draining: CancellationToken,
    /// The tasks that read the queues of services. Each waits for the calls that it started.
    shared: TaskTracker,
    /// The running calls that came through this instance's own queues. While there are any, these queues are read,
    /// since a cancel may come.
    addressed: TaskTracker,
    /// Cancelled when all those calls have ended.
    drained: CancellationToken,
    /// The tasks that read this instance's own queues. They run until the end, to tell callers that the instance is
    /// leaving.
    own: TaskTracker,
    /// The running calls of each service and subscription.
    calls: Mutex<Vec<Arc<Mutex<Calls>>>>,
    /// The calls that had not started when the server began to drain, and were requeued. The broker may deliver one of
    /// them to this server again until it knows that the server takes no more.
    given_back: Mutex<HashSet<Uuid>>,
    /// What is declared over the current connection.
    topology: Mutex<Topology>,
    /// Notified when the catalogue has no entry for a service that has dead letters.
    unentered: Notify,
    /// Held for reading while bindings of an instance's queues are declared. A drain waits for that before it removes
    /// bindings.
    declaring: RwLock<()>,
    health: Arc<Health>,
}

impl Site {
    /// Whether this binding makes clients' questions whether the service takes calls reach this server.
    fn is_presence(&self, binding: &Binding) -> bool {
        binding.exchange == self.namespace.rpc() && is_presence_key(&binding.key)
    }

    /// Resolves when the server has been draining for `time`.
    async fn has_drained_for(&self, time: Duration) {
        self.draining.cancelled().await;
        tokio::time::sleep(time).await;
    }

    fn transport(&self) -> Transport {
        self.transports.borrow().clone()
    }

    /// How many calls are running now, and how many have finished, in all services and subscriptions.
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

    /// Makes the connection of `reading` the current one.
    fn serves_over(&self, reading: &Reading) {
        *self.topology.lock().expect("no panic while holding the topology") = reading.topology.clone();
        self.transports.send_replace(reading.transport.clone());
    }
}
