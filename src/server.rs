//! The server: it connects, declares the queues of its services, runs their calls, and drains when it is told to stop.

mod about;
mod admit;
mod allow;
mod announce;
mod builder;
mod bulkhead;
mod calls;
mod claims;
mod copies;
mod dead_letters;
mod dedup;
mod dispatch;
mod ending;
mod give_back;
mod handling;
mod health;
mod keeper;
mod letter;
mod locate;
#[cfg(feature = "metrics")]
mod measured;
mod message;
mod moving;
mod outcome;
mod places;
mod process;
mod readiness;
mod reading;
mod reason;
mod repair;
mod replay;
mod replies;
mod reply;
mod rules;
mod running;
#[cfg(feature = "metrics")]
mod sender_clocks;
mod served_method;
mod served_queue;
mod signals;
mod site;
mod supervisor;
mod tap;
mod through;
mod turns;
mod unsubscribing;
mod ward;
mod worker;

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use serde::de::DeserializeOwned;
use tokio::sync::{Notify, OnceCell, RwLock, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::info;

use self::allow::Allow;
pub use self::allow::Caller;
pub use self::builder::ServerBuilder;
use self::health::Health;
#[cfg(feature = "metrics")]
pub(crate) use self::measured::{MeasuredServer, ServiceTold};
use self::process::ProcessFacts;
pub use self::readiness::{Readiness, ServerHealth};
use self::replies::Replier;
use self::rules::ServerRules;
pub use self::running::Running;
use self::signals::Signals;
use self::site::Site;
use self::supervisor::Supervisor;
use crate::compression::Compression;
use crate::context::Context;
use crate::error::Error;
use crate::exchanges::Exchanges;
use crate::frame::{Excess, check_entries};
use crate::middleware::Chain;
use crate::service::{EventResult, IntoService, Service};
use crate::subscription::Subscription;
use crate::topology::{Namespace, ServiceId};
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
    /// `Some` if it heeds rules.
    rules: Option<ServerRules>,
    max_message_size: usize,
    compression: Option<Compression>,
    middleware: Chain,
    instance: Arc<str>,
    /// With the groups of which it handles events.
    services: Vec<Service>,
    /// The subscriptions without a group.
    subscriptions: Vec<Service>,
    attributes: BTreeMap<String, String>,
    allow: Allow,
    allow_drain: Allow,
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

    /// Calls `handler` for each event that a [`Subscription`] is for, or whose key matches a pattern. A pattern is words
    /// with single dots between them, where `*` stands for any one word and `#` for any number of words.
    /// [`Context::method`] is the key of the event. The handler returns nothing, or a `Result`: see [`EventResult`].
    ///
    /// Without a [group](Subscription::shared), an event reaches every server with a matching subscription that is up when
    /// the event is published. A subscription handles its events one after the other; those of one publisher come in the
    /// order in which they were published.
    ///
    /// ```
    /// use hopline::{Context, Subscription};
    ///
    /// # async fn example() -> Result<(), hopline::Error> {
    /// let tell = |ctx: Context, order: u64| async move { println!("{}: {order}", ctx.method()) };
    /// let server = hopline::Server::connect("memory://")
    ///     .await?
    ///     .subscribe("order.*", tell)
    ///     .subscribe(Subscription::to("order.created").shared("billing"), tell);
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn subscribe<T, F, Fut>(mut self, subscription: impl Into<Subscription<T>>, handler: F) -> Self
    where
        F: Fn(Context, T) -> Fut + Send + Sync + 'static,
        Fut: Future + Send + 'static,
        Fut::Output: EventResult,
        T: DeserializeOwned + Send + 'static,
    {
        let service = subscription.into().into_service(handler);
        let is_group = service.id.as_ref().is_ok_and(ServiceId::is_group);
        if is_group {
            self.services.push(service)
        } else {
            self.subscriptions.push(service)
        }
        self
    }

    /// Says something about this server that whoever asks the [registry](crate::Client::registry) can read: the zone that it
    /// is in, its weight, its build. Setting a name again replaces its value. A server may have 128 attributes. Together
    /// they may take 60 KiB, where each counts 10 bytes more than its text. Default: none.
    ///
    /// ```
    /// # async fn example(calculator: hopline::Service) -> Result<(), hopline::Error> {
    /// let server = hopline::Server::connect("memory://").await?.attribute("zone", "eu1").serve(calculator);
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn attribute(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.attributes.insert(name.into(), value.into());
        self
    }

    /// Starts to serve. When this returns, the services can be called. A server that [connects
    /// lazily](ServerBuilder::connect_lazy) returns at once; its [state](Running::state) tells when its services can be
    /// called.
    ///
    /// # Errors
    /// - `Invalid` if a name, pattern or setting is wrong, if a service or method was added twice, or if the attributes
    ///   are too many or too large,
    /// - `Mismatch` if a queue exists with other arguments,
    /// - `Broker` if the broker refuses something else,
    /// - `Disconnected` if the connection is lost meanwhile,
    /// - as [`Rules::get`](crate::Rules::get) if the server is to [heed rules](ServerBuilder::rules).
    pub async fn start(self) -> Result<Running, Error> {
        let Self { dial, transport, namespace, rules, max_message_size, compression, instance, .. } = self;
        let Self { services, subscriptions, attributes, allow, allow_drain, middleware, .. } = self;
        check_entries(attributes.iter().map(|(name, value)| (&**name, &**value)))
            .map_err(|excess| Error::Invalid(too_many(excess)))?;
        let mut served = BTreeMap::new();
        for service in services {
            let id = service.checked()?;
            if served.insert(id.clone(), service).is_some() {
                return Err(Error::Invalid(match id.is_group() {
                    true => format!("this server subscribes twice as the group `{}`: name another one", id.name()),
                    false => format!("the service `{id}` is served twice"),
                }));
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
            rules,
            instance,
            name,
            muted: AtomicBool::new(false),
            process: ProcessFacts::now(),
            attributes,
            services: served.keys().map(|id| id.to_string().into()).collect(),
            max_size: max_message_size,
            allow,
            allow_drain,
            compression,
            middleware,
            draining,
            end: OnceCell::new(),
            shared: TaskTracker::new(),
            addressed: TaskTracker::new(),
            drained: CancellationToken::new(),
            own: TaskTracker::new(),
            calls: Mutex::default(),
            given_back: Mutex::default(),
            topology: Mutex::default(),
            unentered: Notify::new(),
            declaring: RwLock::default(),
            workers: Mutex::default(),
            #[cfg(feature = "metrics")]
            clocks: sender_clocks::SenderClocks::default(),
            health,
        });
        // From here on whatever has begun ends with it.
        let running = Running::new(site.clone());
        let patterns: Vec<_> = subscriptions.iter().filter_map(|service| service.pattern.clone()).collect();
        let mut supervisor = Supervisor::new(site, dial);
        for (id, service) in served {
            supervisor.serve(id, service)?;
        }
        for service in subscriptions {
            supervisor.subscribe(service.checked()?, service)?;
        }
        tokio::spawn(running.site.clone().announce());
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

    /// Serves until `stop` resolves, or until it is [drained from afar](Self::allow_drain), and then drains: running calls finish and reply, calls that have not started go
    /// back to their queue, and the connection is closed. A connection that is lost meanwhile is made again.
    ///
    /// # Errors
    /// As [`Server::start`].
    pub async fn run_until<S: Future>(self, stop: S) -> Result<(), Error> {
        let running = self.start().await?;
        tokio::select! {
            _ = stop => {}
            () = running.site.draining.cancelled() => {}
        }
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

fn too_many(attributes: Excess) -> String {
    match attributes {
        Excess::Size(size, cap) => format!("the server's attributes take {size} bytes, and {cap} are allowed"),
        Excess::Count(count, cap) => format!("the server has {count} attributes, and {cap} are allowed"),
    }
}
