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
use crate::error::Error;
use crate::frame::set_entry;
use crate::middleware::{Chain, Middleware};
use crate::outbox::Share;
use crate::route::Exchanges;
use crate::topology::Namespace;
#[cfg(feature = "tls")]
use crate::transport::Tls;
use crate::transport::{DialSettings, Role};

/// Which calls may share a message. A broker's cost is per message, so sharing is worth about ten times the throughput;
/// what a call means and how it ends is the same either way.
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

/// How long a broker that takes nothing is waited for, unless it is said otherwise.
pub(crate) const BLOCKED_WAIT: Duration = Duration::from_secs(5);

/// What a client may be told before it connects.
#[derive(Debug, Clone)]
pub struct ClientBuilder {
    pub(super) namespace: Result<Namespace, String>,
    pub(super) codec: Codec,
    pub(super) timeout: Duration,
    pub(super) max_message_size: usize,
    pub(super) coalesce: Coalesce,
    pub(super) compression: Option<Compression>,
    pub(super) blocked_wait: Duration,
    pub(super) max_in_flight: Option<(usize, WhenFull)>,
    pub(super) absent: Absent,
    pub(super) metadata: Vec<(String, String)>,
    pub(super) middleware: Chain,
    pub(super) dial: DialSettings,
}

/// What becomes of a call when as many are in flight as may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WhenFull {
    /// It waits for a place, and ends as [`Error::Overloaded`] shortly before its deadline if it gets none.
    Wait,
    /// It ends at once.
    Refuse,
}

/// What becomes of a call while no instance of its service is there, but was within its
/// [grace period](crate::Service::grace), 60 s unless set.
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
            namespace: Ok(Namespace::default()),
            codec: Codec::default(),
            timeout: Duration::from_secs(30),
            max_message_size: MAX_MESSAGE_SIZE,
            coalesce: Coalesce::default(),
            blocked_wait: BLOCKED_WAIT,
            max_in_flight: None,
            absent: Absent::default(),
            compression: None,
            metadata: Vec::new(),
            middleware: Chain::default(),
            dial: DialSettings::default(),
        }
    }
}

impl ClientBuilder {
    /// The prefix of every name on the broker, `[A-Za-z0-9_-]+`: services of other namespaces are not seen. Default
    /// `hopline`.
    #[must_use]
    pub fn namespace(mut self, name: &str) -> Self {
        self.namespace = Namespace::new(name);
        self
    }

    /// How payloads are written. Default [`Codec::Cbor`].
    #[must_use]
    pub fn codec(mut self, codec: Codec) -> Self {
        self.codec = codec;
        self
    }

    /// How long a call may take that does not say so itself. Default 30 s.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// The largest message to send, and the largest result to read from a compressed reply, in bytes. Default 16 MiB,
    /// which is also what RabbitMQ 4 takes unless told otherwise. Compressed arguments count as they are sent; those that come
    /// to more than the server's own cap are refused by it, as a fault RESOURCE_EXHAUSTED.
    #[must_use]
    pub fn max_message_size(mut self, bytes: usize) -> Self {
        self.max_message_size = bytes;
        self
    }

    /// Which calls may share a message. Default [`Coalesce::Auto`].
    #[must_use]
    pub fn coalesce(mut self, coalesce: Coalesce) -> Self {
        self.coalesce = coalesce;
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
        self.absent = absent;
        self
    }

    /// Text that every call, event and question of this client carries, as if [`Call::metadata`](crate::Call::metadata) had set
    /// it; a call that sets the name itself has its own text. Setting a name again replaces its text. Default: none.
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
        set_entry(&mut self.metadata, name.into(), value.into());
        self
    }

    /// Has a [`Middleware`] go around every call, oneway call, broadcast and event of this client, and around its questions of
    /// discovery, which are broadcasts to `hopline.v1`. The first that is added is the outermost. Default: none, which costs
    /// nothing.
    #[must_use]
    pub fn with(mut self, middleware: impl Middleware) -> Self {
        self.middleware.push(middleware);
        self
    }

    /// What people are to call this client, so that they find its connection: it is shown by the broker as
    /// `NAME client PROCESS INSTANCE`, in the log, and as [`Context::caller`](crate::Context::caller). 1 to 64 bytes, no
    /// control characters. Default: the program's name.
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
    pub async fn connect(self, url: &str) -> Result<Client, Error> {
        let sessions = self.sessions(url)?;
        let session = sessions.open().await?;
        info!(name = sessions.dial.label(Role::Client), broker = session.transport.broker().map(display), "connected");
        Ok(self.client(sessions, Some(session)))
    }

    /// The same without waiting for the broker, which need not be there yet: calls wait for it until their deadline.
    ///
    /// # Errors
    /// `Invalid` for an address or a setting that cannot be used.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn connect_lazy(self, url: &str) -> Result<Client, Error> {
        let sessions = self.sessions(url)?;
        Ok(self.client(sessions, None))
    }

    fn sessions(&self, url: &str) -> Result<Sessions, Error> {
        let namespace = self.namespace.clone().map_err(Error::Invalid)?;
        Compression::check(self.compression).map_err(Error::Invalid)?;
        check_metadata(&self.metadata)?;
        let instance: Arc<str> = short_id().into();
        let dial = self.dial.dial(url)?.of(instance.clone());
        Ok(Sessions { dial, namespace, instance })
    }

    fn client(self, sessions: Sessions, session: Option<Session>) -> Client {
        let Self { max_message_size, blocked_wait, max_in_flight, .. } = self;
        let rules = Rules { max_message_size, blocked_wait, max_in_flight };
        Client(Arc::new(Inner {
            exchanges: Exchanges::of(&sessions.namespace),
            caller: match &self.dial.name {
                Some(name) => format!("{name} {}", sessions.instance).into(),
                None => sessions.instance.clone(),
            },
            line: Line::start(sessions, session, rules),
            settings: self,
            targets: Targets::default(),
            runtime: Handle::current(),
        }))
    }
}
