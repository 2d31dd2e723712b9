//! The settings of a client, and connecting.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tracing::info;

use super::canary::Canaries;
use super::line::{Line, LineSettings};
use super::request::check_metadata;
use super::routing::Router;
use super::rules::Ruling;
use super::session::{Session, Sessions};
use super::target::{Target, Targets};
use super::{Client, Inner};
use crate::codec::Codec;
use crate::compression::Compression;
use crate::environment;
use crate::error::Error;
use crate::exchanges::Exchanges;
use crate::frame::set_entry;
use crate::limits::{BLOCKED_WAIT, MAX_MESSAGE_SIZE, TIMEOUT};
use crate::middleware::{Chain, Middleware, Policies, PolicySettings};
use crate::outgoing::Share;
use crate::route::Route;
use crate::settings::{Decided, Settings, common_settings};
use crate::topology::{ServiceId, short_id};
use crate::transport::Role;

/// Which calls may share a message. A broker's work is per message, so sharing gives about ten times the throughput.
/// What a call means and how it ends does not depend on it.
///
/// ```
/// use hopline::{Client, Coalesce};
///
/// # async fn example() -> Result<(), hopline::Error> {
/// // To look at each call by itself, as with a tool that shows messages.
/// let client = Client::builder().coalesce(Coalesce::Off).connect("amqp://localhost").await?;
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Coalesce {
    /// Calls that wait to be sent at the same moment share a message if their methods are quick. A message holds at
    /// most 64 calls, 64 KiB, and 1 ms of work, by the times of handlers in earlier replies. Calls of slow methods, and
    /// of methods that have not replied yet, are sent alone, so that the work is still shared evenly between instances.
    #[default]
    Auto,
    /// Up to this many calls share a message, however long their methods take. 0 counts as 1. More than 1024 count as
    /// 1024, since receivers refuse more.
    Fixed(usize),
    /// Each call has its own message.
    Off,
}

impl Coalesce {
    /// How much of a message a call of `target` takes up.
    pub(super) fn share_of(self, target: &Target) -> Share {
        match self {
            Self::Auto => target.pace.average().map_or(Share::ALL, Share::of_work),
            Self::Fixed(_) | Self::Off => self.share(),
        }
    }

    /// How much of a message anything else takes up: oneway calls and events, which are quick to hand out.
    pub(super) fn share(self) -> Share {
        match self {
            Self::Auto => Share::LEAST,
            Self::Fixed(calls) => Share::one_of(calls),
            Self::Off => Share::ALL,
        }
    }
}

/// The settings of a [`Client`], to change before connecting.
///
/// ```
/// use std::time::Duration;
///
/// use hopline::{Client, WhenFull};
///
/// # async fn example() -> Result<(), hopline::Error> {
/// let client = Client::builder()
///     .name("billing-web")
///     .timeout(Duration::from_secs(2))
///     .max_in_flight(1000, WhenFull::Refuse)
///     .connect("amqp://user:password@broker.example.com")
///     .await?;
/// # Ok(()) }
/// ```
#[derive(Debug, Clone)]
pub struct ClientBuilder {
    settings: Settings,
    calls: CallSettings,
    /// The routes of services, as they are named.
    routes: Vec<(String, Route)>,
    blocked_wait: Duration,
    max_in_flight: Option<(usize, WhenFull)>,
    pub(super) policies: PolicySettings,
}

/// The settings for calls that do not set their own.
#[derive(Debug, Clone)]
pub(super) struct CallSettings {
    pub(super) codec: Codec,
    pub(super) timeout: Duration,
    pub(super) max_message_size: usize,
    pub(super) coalesce: Coalesce,
    pub(super) compression: Option<Compression>,
    pub(super) absent: Absent,
    pub(super) metadata: Vec<(String, String)>,
    pub(super) middleware: Chain,
    pub(super) routes: HashMap<ServiceId, Arc<Route>>,
}

/// What to do with a call when [`max_in_flight`](ClientBuilder::max_in_flight) calls are in flight.
///
/// ```
/// use hopline::{Client, WhenFull};
///
/// # async fn example() -> Result<(), hopline::Error> {
/// let client = Client::builder().max_in_flight(1000, WhenFull::Wait).connect("amqp://localhost").await?;
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WhenFull {
    /// It waits for another call to end. If none does, it fails with [`Error::Overloaded`] shortly before its deadline.
    Wait,
    /// It fails at once with [`Error::Overloaded`].
    Refuse,
}

/// What to do with a call while its service has no instance, but had one within its [grace
/// period](crate::Service::grace), 60 s unless set.
///
/// ```
/// use hopline::{Absent, Client};
///
/// # async fn example(client: Client) -> Result<(), hopline::Error> {
/// // Somebody is looking at the page: better an error now than an answer after a restart.
/// let total: u64 = client.call("shop", "total", ()).absent(Absent::Fail).await?;
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Absent {
    /// It waits until its deadline for an instance, for example during a restart. Then it fails with
    /// [`Error::Timeout`], which says whether the broker was seen to have nobody for it.
    #[default]
    Wait,
    /// It fails at once with [`Error::NoService`], and has not run. The broker is asked before the call is sent, which
    /// takes a round trip, unless something was heard of the service within the last second. If the last instance
    /// leaves at that moment, the call waits all the same.
    Fail,
}

impl Default for ClientBuilder {
    fn default() -> Self {
        Self {
            settings: Settings::default(),
            calls: CallSettings {
                codec: Codec::default(),
                timeout: TIMEOUT,
                max_message_size: MAX_MESSAGE_SIZE,
                coalesce: Coalesce::default(),
                compression: None,
                absent: Absent::default(),
                metadata: Vec::new(),
                middleware: Chain::default(),
                routes: HashMap::new(),
            },
            routes: Vec::new(),
            blocked_wait: BLOCKED_WAIT,
            max_in_flight: None,
            policies: PolicySettings::default(),
        }
    }
}

impl ClientBuilder {
    common_settings!("client PROCESS INSTANCE");

    /// How long a call may take that does not set its own time-out. Default: 30 s.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.settings.timeout = Some(timeout);
        self
    }

    /// How payloads are written. Default: [`Codec::Cbor`].
    #[must_use]
    pub fn codec(mut self, codec: Codec) -> Self {
        self.calls.codec = codec;
        self
    }

    /// The largest message to send, and the largest result to read from a compressed reply, in bytes. Default: 16 MiB,
    /// which RabbitMQ 4 accepts by default.
    ///
    /// Compressed arguments count with their compressed size. If they decompress to more than the server's own limit,
    /// the server refuses them with the fault `RESOURCE_EXHAUSTED`.
    #[must_use]
    pub fn max_message_size(mut self, bytes: usize) -> Self {
        self.calls.max_message_size = bytes;
        self
    }

    /// Which calls may share a message. Default: [`Coalesce::Auto`].
    #[must_use]
    pub fn coalesce(mut self, coalesce: Coalesce) -> Self {
        self.calls.coalesce = coalesce;
        self
    }

    /// How long a call waits for a broker that accepts no messages, being short of memory or disk. Then it fails with
    /// [`Error::Blocked`]. Default: 5 s.
    #[must_use]
    pub fn blocked_wait(mut self, wait: Duration) -> Self {
        self.blocked_wait = wait;
        self
    }

    /// How many calls may be in flight at once, at least 1. Further calls wait, or fail with [`Error::Overloaded`].
    /// Oneway calls, broadcasts and events do not count. Default: no limit.
    #[must_use]
    pub fn max_in_flight(mut self, calls: usize, when_full: WhenFull) -> Self {
        self.max_in_flight = Some((calls.clamp(1, Semaphore::MAX_PERMITS), when_full));
        self
    }

    /// Whether calls wait while their service has no instance. A call can set its own with
    /// [`Call::absent`](crate::Call::absent). Default: [`Absent::Wait`].
    #[must_use]
    pub fn absent(mut self, absent: Absent) -> Self {
        self.calls.absent = absent;
        self
    }

    /// How the instance is chosen for calls of `service`, which is `name` or `name.vMAJOR`. A call can set its own with
    /// [`Call::route`](crate::Call::route). This concerns calls that are answered: oneway calls and broadcasts go as always.
    /// Default: [`Route::Any`].
    ///
    /// ```
    /// # async fn example() -> Result<(), hopline::Error> {
    /// use hopline::{Client, Route};
    ///
    /// let client = Client::builder().route("search", Route::LeastInFlight).connect("amqp://localhost").await?;
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn route(mut self, service: impl Into<String>, route: Route) -> Self {
        self.routes.push((service.into(), route));
        self
    }

    /// Adds text to every call, event and question of discovery of this client, as if
    /// [`Call::metadata`](crate::Call::metadata) had set it. A call that sets the same name uses its own text. Setting
    /// a name again replaces its text. Default: none. The limits are those of `Call::metadata`.
    ///
    /// Use a [`Middleware`] for text that changes, such as a token that is renewed.
    ///
    /// ```
    /// # async fn example() -> Result<(), hopline::Error> {
    /// let client = hopline::Client::builder().metadata("tenant", "acme").connect("amqp://localhost").await?;
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn metadata(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        set_entry(&mut self.calls.metadata, name.into(), value.into());
        self
    }

    /// Puts a [`Middleware`] around every call, oneway call, broadcast and event of this client. It is also around the
    /// questions of discovery, which are broadcasts to `hopline.v1`. The first that is added is the outermost. Default:
    /// none.
    #[must_use]
    pub fn with(mut self, middleware: impl Middleware) -> Self {
        self.calls.middleware.push(middleware);
        self
    }

    /// How arguments are compressed. They are compressed only for services that can read it: every instance that has
    /// replied so far has to have said so, so it takes a first reply. Arguments are sent as they are if they have less
    /// than 1024 bytes or would not become smaller. Events are never compressed. Compressed replies can be read
    /// whatever is set here. Default: no compression.
    ///
    /// ```
    /// # async fn example() -> Result<(), hopline::Error> {
    /// let client = hopline::Client::builder().compression(hopline::Compression::Lz4).connect("amqp://localhost").await?;
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn compression(mut self, compression: Compression) -> Self {
        self.calls.compression = Some(compression);
        self
    }

    /// Connects to the broker in the variable `HOPLINE_URL`, with all other settings from the environment that the code
    /// does not set: see [`environment`](crate::environment).
    ///
    /// # Errors
    /// As [`connect`](Self::connect), and `Invalid` for a variable that is missing or cannot be used.
    pub async fn connect_env(self) -> Result<Client, Error> {
        self.with_env().connect(environment::url()?).await
    }

    /// Connects to the broker at `url`. If the connection is lost, it is opened again, however long that takes: see
    /// [`Client::state`].
    ///
    /// `url` begins with `memory://`, `amqp://` or `amqps://`. It may name several brokers of a cluster, as in
    /// `amqp://user:password@a,b:5673,c/vhost`, or as whole addresses with commas between them. The client connects to
    /// the first that answers.
    ///
    /// - A host is a name, an IPv4 address, or an IPv6 address in brackets. If a name has several IP addresses, the
    ///   first that answers is used.
    /// - In a user, a password or a virtual host, everything that is not a letter or a digit is percent-encoded.
    /// - Options come after a `?`, with `&` between them: `heartbeat` (seconds, default 10), `frame_max` (bytes,
    ///   default 131072), `channel_max`, `auth_mechanism` (`plain`, `amqplain`, `external`, `anonymous`),
    ///   `connection_timeout` (milliseconds) and `order` (`random`, `given`).
    /// - Several addresses are tried in a random order, which each client and server chooses for itself. So
    ///   connections, and the queues that belong to them, spread over the nodes of a cluster. With `order=given` they
    ///   are tried as they are written. If one does not answer for 2 s, the next is tried at the same time.
    ///
    /// # Errors
    /// `Invalid` for an address or a setting that cannot be used. `Connect` if no broker answers, or the broker
    /// refuses. `Mismatch` or `Broker` if it refuses what a client needs.
    pub async fn connect(mut self, url: impl AsRef<str>) -> Result<Client, Error> {
        let decided = self.settings.decide()?;
        let sessions = self.sessions(&decided, url.as_ref())?;
        let session = sessions.open().await?;
        info!(name = sessions.dial.label(Role::Client), broker = session.transport.broker().map(display), "connected");
        let client = self.client(decided, sessions, Some(session));
        client.heed().await?;
        Ok(client)
    }

    /// The same, but does not wait for the broker, which may be down. Calls wait until their deadlines for a
    /// connection.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), hopline::Error> {
    /// use hopline::{Client, State};
    ///
    /// let client = Client::builder().connect_lazy("amqp://localhost")?;
    /// println!("{:?}", *client.state().borrow()); // Connecting { reason: None }
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// `Invalid` for an address or a setting that cannot be used.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn connect_lazy(mut self, url: impl AsRef<str>) -> Result<Client, Error> {
        let decided = self.settings.decide()?;
        let sessions = self.sessions(&decided, url.as_ref())?;
        let client = self.client(decided, sessions, None);
        client.heed_later();
        Ok(client)
    }

    fn sessions(&mut self, decided: &Decided, url: &str) -> Result<Sessions, Error> {
        for (service, route) in self.routes.drain(..) {
            self.calls.routes.insert(ServiceId::parse(&service).map_err(Error::Invalid)?, Arc::new(route));
        }
        self.check_rates()?;
        Compression::check(self.calls.compression).map_err(Error::Invalid)?;
        check_metadata(&self.calls.metadata)?;
        let instance: Arc<str> = short_id().into();
        let dial = decided.dial.dial(url)?.of(instance.clone());
        Ok(Sessions { dial, namespace: decided.namespace.clone(), instance })
    }

    fn client(self, decided: Decided, sessions: Sessions, session: Option<Session>) -> Client {
        let Self { mut calls, blocked_wait, max_in_flight, policies, .. } = self;
        let (instance, policies) = (sessions.instance.clone(), Policies::new(policies));
        calls.timeout = decided.timeout.unwrap_or(calls.timeout);
        let line = LineSettings { max_message_size: calls.max_message_size, blocked_wait, max_in_flight };
        Client(Arc::new(Inner {
            exchanges: Exchanges::of(&sessions.namespace),
            rules: Ruling::of(&sessions, &policies),
            namespace: sessions.namespace.clone(),
            caller: match &decided.dial.name {
                Some(name) => format!("{name} {instance}").into(),
                None => instance.clone(),
            },
            instance,
            line: Line::start(sessions, session, line),
            settings: calls,
            targets: Targets::default(),
            router: Router::default(),
            canaries: Canaries::default(),
            policies,
            runtime: Handle::current(),
        }))
    }
}
