//! The calling side: connects, addresses calls, and waits for what comes back.

mod builder;
mod events;
mod line;
mod pending;
pub(crate) mod presence;
pub(crate) mod replies;
mod request;
mod sending;
mod session;
mod target;
mod through;
mod traffic;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::watch;
use uuid::Uuid;

pub(crate) use self::builder::BLOCKED_WAIT;
use self::builder::CallSettings;
pub use self::builder::{Absent, ClientBuilder, Coalesce, WhenFull};
pub use self::events::Published;
use self::line::Line;
pub(crate) use self::request::{Arguments, Request};
pub(crate) use self::target::Target;
use self::target::Targets;
pub(crate) use self::through::Started;
pub use self::traffic::Traffic;
use crate::error::Error;
use crate::route::Exchanges;
use crate::state::State;

/// The largest message that is sent or accepted unless set otherwise: what RabbitMQ 4 takes by default.
pub(crate) const MAX_MESSAGE_SIZE: usize = 16 * 1024 * 1024;
/// The broker counts a message's time in 32 bits of milliseconds, which is a little more than this.
pub(crate) const MAX_TIMEOUT: Duration = Duration::from_secs(40 * 24 * 3600);

/// Makes calls. Cloning is cheap, and the clones share one connection; it closes with the last of them.
///
/// ```
/// # async fn example() -> Result<(), hopline::Error> {
/// let client = hopline::Client::connect("amqp://localhost").await?;
/// let sum: i64 = client.call("calculator.v1", "add", (2, 3)).await?;
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct Client(Arc<Inner>);

struct Inner {
    settings: CallSettings,
    line: Line,
    instance: Arc<str>,
    /// How it says who it is: the name that people chose for it, if they did, and its id.
    caller: Arc<str>,
    exchanges: Exchanges,
    targets: Targets,
    runtime: Handle,
}

/// Why there is no connection any more to a client whose runtime has gone.
pub(crate) const RUNTIME_ENDED: &str = "the runtime in which the client connected has ended";

/// How long after its call's deadline a cancel may still be sent: servers count from when the call came to them.
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

    /// The id of this client: the same for all its clones, and for all its connections. The broker shows it with the
    /// connection, and [`Context::caller`](crate::Context::caller) ends in it.
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

    /// Whether there is a connection to the broker, now and from now on.
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

    /// Closes the connection; calls in flight end as `Disconnected`. Dropping the last clone does the same, later.
    pub async fn close(&self) {
        self.0.line.close().await;
    }

    /// What has been sent and received so far.
    #[must_use]
    pub fn traffic(&self) -> Traffic {
        self.0.line.traffic()
    }

    /// How many calls and broadcasts wait at this moment, for replies or to leave at all; and, while there is no connection or
    /// the broker is blocked, oneway calls, events and cancels that wait to leave.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.0.line.in_flight()
    }

    /// What calls of a method have in common, by the names that a call gives; a sentence if one of these is wrong.
    pub(crate) fn target(&self, service: &str, method: &str) -> Result<Arc<Target>, String> {
        self.0.targets.find(service, method)
    }

    /// The largest payload that is read, in bytes, if it comes compressed.
    fn max_payload(&self) -> usize {
        self.0.settings.max_message_size
    }

    pub(crate) fn runtime(&self) -> &Handle {
        &self.0.runtime
    }
}

/// 48 random bits as text: enough to tell the instances of one namespace apart, short enough to read aloud.
pub(crate) fn short_id() -> String {
    let mut id = Uuid::new_v4().simple().to_string();
    id.truncate(12);
    id
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("caller", &self.0.caller)
            .field("settings", &self.0.settings)
            .finish_non_exhaustive()
    }
}
