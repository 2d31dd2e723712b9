//! What a client may be told before it connects, and connecting.

use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tracing::info;

use super::line::{Line, Rules};
use super::request::check_metadata;
use super::session::{Session, Sessions};
use super::target::{Target, Targets};
use super::{Client, Inner, MAX_MESSAGE_SIZE, short_id};
use crate::codec::Codec;
use crate::compression::Compression;
use crate::environment;
use crate::error::Error;
use crate::frame::set_entry;
use crate::middleware::{Chain, Middleware};
use crate::outbox::Share;
use crate::route::Exchanges;
use crate::settings::{Decided, Settings, common_settings};
use crate::transport::Role;

/// Which calls may share a message. A broker's cost is per message, so sharing is worth about ten times the throughput;
/// what a call means and how it ends is the same either way.
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
    /// Calls that wait to leave at the same moment share a message when their methods are quick: at most 64 calls,
    /// 64 KiB, and 1 ms of work going by the handler times that replies report. Calls of slow methods, and of those that
    /// have not replied yet, go alone, so that prefetch keeps sharing work evenly.
    #[default]
    Auto,
    /// Up to this many calls share a message, whatever their methods take; 0 counts as 1, and more than 1024 as 1024, which
    /// is what receivers take.
    Fixed(usize),
    /// Each call has a message of its own.
    Off,
}

impl Coalesce {
    /// What a call takes up of a message.
    pub(super) fn share_of(self, target: &Target) -> Share {
        match self {
            Self::Auto => target.pace.average().map_or(Share::ALL, Share::of_work),
            Self::Fixed(_) | Self::Off => self.share(),
        }
    }

    /// What anything takes up of a message for which nobody can work while the rest of it waits.
    pub(super) fn share(self) -> Share {
        match self {
            Self::Auto => Share::LEAST,
            Self::Fixed(calls) => Share::one_of(calls),
            Self::Off => Share::ALL,
        }
    }
}

/// How long a call may take, unless it is said otherwise.
const TIMEOUT: Duration = Duration::from_secs(30);
/// How long a broker that takes nothing is waited for, unless it is said otherwise.
pub(crate) const BLOCKED_WAIT: Duration = Duration::from_secs(5);

/// What a client may be told before it connects.
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
    blocked_wait: Duration,
    max_in_flight: Option<(usize, WhenFull)>,
}

/// What holds for calls that do not say otherwise themselves.
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
}

/// What becomes of a call when as many are in flight as may be.
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
    /// It waits for a place, and ends as [`Error::Overloaded`] shortly before its deadline if it gets none.
    Wait,
    /// It ends at once.
    Refuse,
}

/// What becomes of a call while no instance of its service is there, but was within its
/// [grace period](crate::Service::grace), 60 s unless set.
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
    /// It waits for one to come back, as after a restart, until its deadline; then it ends as [`Error::Timeout`], which says
    /// whether the broker was seen to have nobody for it.
    #[default]
    Wait,
    /// It ends at once, as [`Error::NoService`], and has not run. The broker is asked before a call leaves, which takes a
    /// round trip, unless something was heard of the service within the last second: a call whose last instance leaves
    /// just then waits after all.
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
            },
            blocked_wait: BLOCKED_WAIT,
            max_in_flight: None,
        }
    }
}

impl ClientBuilder {
    common_settings!("client PROCESS INSTANCE");

    /// How long a call may take that does not say so itself. Default 30 s.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.settings.timeout = Some(timeout);
        self
    }

    /// How payloads are written. Default [`Codec::Cbor`].
    #[must_use]
    pub fn codec(mut self, codec: Codec) -> Self {
        self.calls.codec = codec;
        self
    }

    /// The largest message to send, and the largest result to read from a compressed reply, in bytes. Default 16 MiB,
    /// which is also what RabbitMQ 4 takes unless told otherwise. Compressed arguments count as they are sent; those that come
    /// to more than the server's own cap are refused by it, as a fault RESOURCE_EXHAUSTED.
    #[must_use]
    pub fn max_message_size(mut self, bytes: usize) -> Self {
        self.calls.max_message_size = bytes;
        self
    }

    /// Which calls may share a message. Default [`Coalesce::Auto`].
    #[must_use]
    pub fn coalesce(mut self, coalesce: Coalesce) -> Self {
        self.calls.coalesce = coalesce;
        self
    }

    /// How long a call waits for a broker that takes nothing, being short of memory or disk, before it ends as
    /// [`Error::Blocked`]. Default 5 s.
    #[must_use]
    pub fn blocked_wait(mut self, wait: Duration) -> Self {
        self.blocked_wait = wait;
        self
    }

    /// How many calls may be in flight at once, at least 1; those beyond wait, or end as [`Error::Overloaded`]. Oneway calls,
    /// broadcasts and events do not count. Default: no limit.
    #[must_use]
    pub fn max_in_flight(mut self, calls: usize, when_full: WhenFull) -> Self {
        self.max_in_flight = Some((calls.clamp(1, Semaphore::MAX_PERMITS), when_full));
        self
    }

    /// Whether calls wait for an instance to come back while there is none. A call can say otherwise, by
    /// [`Call::absent`](crate::Call::absent). Default [`Absent::Wait`].
    #[must_use]
    pub fn absent(mut self, absent: Absent) -> Self {
        self.calls.absent = absent;
        self
    }

    /// Text that every call, event and question of this client carries, as if [`Call::metadata`](crate::Call::metadata) had set
    /// it. A call that sets the same name has its own text. Setting a name again replaces its text. Default: none. Bounds are
    /// those of `Call::metadata`.
    ///
    /// What changes over time, such as a token that is renewed, is set by a [`Middleware`] instead.
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

    /// Puts a [`Middleware`] around every call, oneway call, broadcast and event of this client, and around its questions of
    /// discovery, which are broadcasts to `hopline.v1`. The first that is added is the outermost. Default: none, which costs
    /// nothing.
    #[must_use]
    pub fn with(mut self, middleware: impl Middleware) -> Self {
        self.calls.middleware.push(middleware);
        self
    }

    /// How arguments are compressed, for services that can read it: those of which every instance that has replied so
    /// far has said so, which takes a first reply. At least 1024 bytes of arguments are, and only if that makes them
    /// smaller; events never are. Compressed replies are read whatever is set here. Default: arguments are not compressed.
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

    /// Connects to the broker that `HOPLINE_URL` names, [with](Self::with_env) what else the environment says: see
    /// [`environment`](crate::environment).
    ///
    /// # Errors
    /// As [`connect`](Self::connect), and `Invalid` for a variable that is missing or cannot be used.
    pub async fn connect_env(self) -> Result<Client, Error> {
        self.with_env().connect(environment::url()?).await
    }

    /// Connects to the broker that `url` names: `memory://`, `amqp://` or `amqps://`; or to the first that answers of
    /// several, `amqp://user:password@a,b:5673,c/vhost` or whole addresses with a comma between them. A connection that is
    /// lost is made again, for as long as it takes: see [`Client::state`].
    ///
    /// A host is a name, of whose addresses the first that answers is taken, or an IPv4 address, or an IPv6 address in
    /// brackets. What is not a letter or a digit in a user, a password or a virtual host is percent-encoded. After a `?`
    /// come options with `&` between them: `heartbeat` (seconds, 10 unless set), `frame_max` (bytes, 131072), `channel_max`,
    /// `auth_mechanism` (`plain`, `amqplain`, `external`, `anonymous`), `connection_timeout` (milliseconds),
    /// `order` (`random`, `given`). Each client and server tries several addresses in a random order of its own, so that
    /// connections, and the queues that they make, spread over the nodes of a cluster; with `order=given`, as they are
    /// written. While one does not answer for 2 s, the next is tried beside it.
    ///
    /// # Errors
    /// `Invalid` for an address or a setting that cannot be used, `Connect` when no broker answers or it refuses,
    /// `Mismatch` or `Broker` when it refuses what a client needs.
    pub async fn connect(self, url: impl AsRef<str>) -> Result<Client, Error> {
        let decided = self.settings.decide()?;
        let sessions = self.sessions(&decided, url.as_ref())?;
        let session = sessions.open().await?;
        info!(name = sessions.dial.label(Role::Client), broker = session.transport.broker().map(display), "connected");
        Ok(self.client(decided, sessions, Some(session)))
    }

    /// The same without waiting for the broker, which need not be there yet: calls wait for it until their deadline.
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
    /// Outside a tokio runtime.
    pub fn connect_lazy(self, url: impl AsRef<str>) -> Result<Client, Error> {
        let decided = self.settings.decide()?;
        let sessions = self.sessions(&decided, url.as_ref())?;
        Ok(self.client(decided, sessions, None))
    }

    fn sessions(&self, decided: &Decided, url: &str) -> Result<Sessions, Error> {
        Compression::check(self.calls.compression).map_err(Error::Invalid)?;
        check_metadata(&self.calls.metadata)?;
        let instance: Arc<str> = short_id().into();
        let dial = decided.dial.dial(url)?.of(instance.clone());
        Ok(Sessions { dial, namespace: decided.namespace.clone(), instance })
    }

    fn client(self, decided: Decided, sessions: Sessions, session: Option<Session>) -> Client {
        let instance = sessions.instance.clone();
        let Self { mut calls, blocked_wait, max_in_flight, .. } = self;
        calls.timeout = decided.timeout.unwrap_or(calls.timeout);
        let rules = Rules { max_message_size: calls.max_message_size, blocked_wait, max_in_flight };
        Client(Arc::new(Inner {
            exchanges: Exchanges::of(&sessions.namespace),
            caller: match &decided.dial.name {
                Some(name) => format!("{name} {instance}").into(),
                None => instance.clone(),
            },
            instance,
            line: Line::start(sessions, session, rules),
            settings: calls,
            targets: Targets::default(),
            runtime: Handle::current(),
        }))
    }
}
