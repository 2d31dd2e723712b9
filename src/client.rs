//! The client: connects, makes calls, and publishes events.

mod attempt;
mod builder;
mod called;
mod canary;
#[cfg(feature = "metrics")]
mod counted;
mod events;
mod line;
mod pending;
mod policies;
pub(crate) mod presence;
pub(crate) mod in_flight;
mod request;
mod routing;
mod rules;
mod sending;
mod session;
mod span;
mod started;
mod target;
mod through;
mod traffic;

use std::fmt;
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};

use self::attempt::Attempt;
use self::builder::CallSettings;
pub use self::builder::{Absent, ClientBuilder, Coalesce, WhenFull};
use self::canary::Canaries;
#[cfg(feature = "metrics")]
pub(crate) use self::counted::{CalledMethodTold, ClientCounts};
pub use self::events::Publish;
pub(crate) use self::line::InstanceNews;
use self::line::Line;
pub(crate) use self::request::{ArgumentWriter, Request};
use self::routing::Router;
pub(crate) use self::routing::{RoutedService, Wanted};
pub use self::rules::Rules;
use self::rules::Ruling;
pub(crate) use self::started::Started;
pub(crate) use self::target::Target;
use self::target::Targets;
pub(crate) use self::through::Answers;
pub use self::traffic::Traffic;
use crate::error::Error;
use crate::exchanges::Exchanges;
use crate::middleware::Policies;
use crate::state::State;
use crate::topology::{Namespace, ServiceId};
use crate::transport::QueueCount;

/// Makes calls and publishes events. Cloning is cheap, and all clones share one connection. It is closed when the last
/// of them is dropped.
///
/// ```
/// # async fn example() -> Result<(), hopline::Error> {
/// let client = hopline::Client::connect("amqp://localhost").await?;
/// let sum: i64 = client.call("calculator.v1", "add", (2, 3)).await?;
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct Client(Arc<Inner>);

/// What the clones of a [`Client`] share.
struct Inner {
    settings: CallSettings,
    line: Line,
    instance: Arc<str>,
    /// How the client names itself to servers: its name, if people gave it one, and its id.
    caller: Arc<str>,
    namespace: Namespace,
    exchanges: Exchanges,
    targets: Targets,
    router: Router,
    canaries: Canaries,
    policies: Policies,
    rules: Ruling,
    runtime: Handle,
}

/// A client that does not keep its connection open.
#[derive(Debug)]
pub(crate) struct WeakClient(Weak<Inner>);

impl WeakClient {
    /// The client, unless all its clones were dropped.
    pub(crate) fn upgrade(&self) -> Option<Client> {
        self.0.upgrade().map(Client)
    }
}

/// The reason of errors after the client's runtime has ended.
pub(crate) const RUNTIME_ENDED: &str = "the runtime in which the client connected has ended";

/// How long after its call's deadline a cancel may still be sent. Servers count a call's time from when it was
/// delivered, so it may still run.
const CANCEL_LATE: Duration = Duration::from_secs(30);

impl Client {
    /// Connects with default settings.
    ///
    /// # Errors
    /// As [`ClientBuilder::connect`].
    pub async fn connect(url: impl AsRef<str>) -> Result<Self, Error> {
        Self::builder().connect(url).await
    }

    /// Connects as the environment says: `HOPLINE_URL`, and the other variables of [`environment`](crate::environment).
    ///
    /// ```no_run
    /// # async fn example() -> Result<(), hopline::Error> {
    /// // HOPLINE_URL=amqp://user:password@broker.example.com HOPLINE_TIMEOUT=2s
    /// let client = hopline::Client::connect_env().await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// As [`ClientBuilder::connect_env`].
    pub async fn connect_env() -> Result<Self, Error> {
        Self::builder().connect_env().await
    }

    /// Settings to change before connecting.
    #[must_use]
    pub fn builder() -> ClientBuilder {
        ClientBuilder::default()
    }

    /// The id of this client on the broker. It is the same for all clones and all connections of this client. The
    /// server sees it at the end of [`Context::caller`](crate::Context::caller), and the broker shows it with the
    /// connection.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), hopline::Error> {
    /// let client = hopline::Client::connect("memory://").await?;
    /// println!("called by {}", client.instance());
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn instance(&self) -> &str {
        &self.0.instance
    }

    /// The state of the connection, now and from now on.
    ///
    /// ```
    /// # async fn example(client: hopline::Client) {
    /// let mut state = client.state();
    /// while state.changed().await.is_ok() {
    ///     println!("{:?}", *state.borrow_and_update());
    /// }
    /// # }
    /// ```
    #[must_use]
    pub fn state(&self) -> watch::Receiver<State> {
        self.0.line.state()
    }

    /// Closes the connection. Calls in flight end with `Disconnected`. Dropping the last clone closes it as well, a
    /// little later.
    pub async fn close(&self) {
        self.0.line.close().await;
    }

    /// What was sent and received since the client connected.
    #[must_use]
    pub fn traffic(&self) -> Traffic {
        self.0.line.traffic()
    }

    /// How many calls and broadcasts wait now, for replies or for being sent. While there is no connection or the
    /// broker is blocked, oneway calls, events and cancels that wait to be sent count as well.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.0.line.in_flight()
    }

    /// What calls of a method have in common, by the names that a call gives; a sentence if one of these is wrong.
    pub(crate) fn target(&self, service: &str, method: &str) -> Result<Arc<Target>, String> {
        self.0.targets.find(service, method)
    }

    /// The largest payload that is decompressed, in bytes.
    fn max_payload(&self) -> usize {
        self.0.settings.max_message_size
    }

    pub(crate) fn downgrade(&self) -> WeakClient {
        WeakClient(Arc::downgrade(&self.0))
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.0.line.is_closed()
    }

    /// How much is in the queues of a service: of calls, and unless it has no oneway methods, of oneway calls and of dead
    /// letters.
    pub(crate) async fn queues(&self, service: &ServiceId, has_oneway: bool) -> Result<[Option<QueueCount>; 3], Error> {
        let namespace = &self.0.namespace;
        let [calls, work, dead] =
            [namespace.calls_queue(service), namespace.work_queue(service), namespace.dead_queue(service)];
        let line = &self.0.line;
        if !has_oneway {
            return Ok([line.count(calls).await?, None, None]);
        }
        let (calls, work, dead) = tokio::try_join!(line.count(calls), line.count(work), line.count(dead))?;
        Ok([calls, work, dead])
    }

    /// What instances announce, from now on.
    pub(crate) fn watch(&self) -> mpsc::Receiver<InstanceNews> {
        self.0.line.watch()
    }

    pub(crate) fn runtime(&self) -> &Handle {
        &self.0.runtime
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("caller", &self.0.caller)
            .field("settings", &self.0.settings)
            .finish_non_exhaustive()
    }
}
