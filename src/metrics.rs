//! What clients and servers count, as text that Prometheus reads. Only with the cargo feature `metrics`.
//!
//! ```
//! use hopline::metrics::Metrics;
//! use hopline::{Client, Context, Fault, Server, Service};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let url = hopline::testing::broker();
//! let ping = Service::new("ping", 1).method("ping", |_: Context, (): ()| async { Ok::<_, Fault>("pong") });
//! let running = Server::connect(&url).await?.serve(ping).start().await?;
//! let client = Client::connect(&url).await?;
//!
//! let metrics = Metrics::new().server(&running).client(&client);
//! // Port 0 is any free one. A real program has a port that Prometheus knows.
//! let endpoint = metrics.serve("127.0.0.1:0").await?;
//! println!("curl http://{}/metrics", endpoint.address());
//!
//! let _: String = client.call("ping", "ping", ()).await?;
//! assert!(metrics.render().contains("rpc_client_call_duration_seconds_count"));
//! # running.drain().await;
//! # Ok(()) }
//! ```
//!
//! The guide's chapter on metrics lists all of them, and what to ask Prometheus.

mod endpoint;
mod families;
mod queues;
mod rendered;

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

pub use self::endpoint::MetricsEndpoint;
use self::families::Families;
use self::queues::Queues;
use crate::client::{Client, ClientCounts};
use crate::server::{MeasuredServer, Running};

/// The content type of [`Metrics::render`].
///
/// ```
/// assert!(hopline::metrics::CONTENT_TYPE.starts_with("application/openmetrics-text"));
/// ```
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The content type of [`Metrics::render_plain`].
///
/// ```
/// assert!(hopline::metrics::PLAIN_CONTENT_TYPE.starts_with("text/plain"));
/// ```
pub const PLAIN_CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// The clients and servers whose metrics are read together. Cloning is cheap, and clones have the same clients and servers,
/// also those that are added later. None of them is kept alive.
///
/// What several have counted of the same method is summed up. What a server has counted is there as long as it runs. What
/// a client has counted stays, so that no counter goes down.
///
/// ```
/// # async fn example(client: hopline::Client, running: &hopline::Running) {
/// let metrics = hopline::metrics::Metrics::new().client(&client).server(running);
/// println!("{}", metrics.render());
/// # }
/// ```
#[derive(Clone, Default)]
pub struct Metrics(Arc<Mutex<MetricsSources>>);

#[derive(Default)]
struct MetricsSources {
    clients: Vec<ClientCounts>,
    servers: Vec<MeasuredServer>,
    queues: Option<Queues>,
}

impl Metrics {
    /// Of no client and no server yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a client. Its clones count together with it.
    ///
    /// ```
    /// # fn example(client: &hopline::Client) {
    /// let metrics = hopline::metrics::Metrics::new().client(client);
    /// # }
    /// ```
    #[must_use = "to add to what is there, call it on a clone, and drop what it returns"]
    pub fn client(self, client: &Client) -> Self {
        let counts = client.counts();
        let mut sources = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !sources.clients.iter().any(|known| Arc::ptr_eq(&known.methods, &counts.methods)) {
            sources.clients.push(counts);
        }
        drop(sources);
        self
    }

    /// Adds a running server, with all its services.
    ///
    /// ```
    /// # fn example(running: &hopline::Running) {
    /// let metrics = hopline::metrics::Metrics::new().server(running);
    /// # }
    /// ```
    #[must_use = "to add to what is there, call it on a clone, and drop what it returns"]
    pub fn server(self, running: &Running) -> Self {
        let server = running.measured();
        let mut sources = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !sources.servers.iter().any(|known| known.is(&server)) {
            sources.servers.push(server);
        }
        drop(sources);
        self
    }

    /// Adds how much waits in the queues of the services that these servers serve, and how many consumers the queues have:
    /// `hopline_queue_messages` and `hopline_queue_consumers`. Default: off.
    ///
    /// The broker is asked through `client`, which has to be in the namespace of the servers, by up to three questions for each
    /// service. That is done in the background when metrics are read, once in 5 s at most. So the first reading has nothing
    /// of it, and each further one the answer to one before. The user of `client` has to be allowed to *configure* the queues, as
    /// that of a server is. The client is not kept alive.
    ///
    /// ```
    /// # async fn example(client: hopline::Client, running: &hopline::Running) {
    /// let metrics = hopline::metrics::Metrics::new().server(running).queues(&client);
    /// # }
    /// ```
    #[must_use = "to add to what is there, call it on a clone, and drop what it returns"]
    pub fn queues(self, client: &Client) -> Self {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).queues = Some(Queues::of(client));
        self
    }

    /// All metrics as they are now, as [OpenMetrics](https://prometheus.io/docs/specs/om/open_metrics_spec/) text, with
    /// exemplars. Its content type is [`CONTENT_TYPE`].
    ///
    /// ```
    /// # fn example(metrics: hopline::metrics::Metrics) {
    /// let text = metrics.render();
    /// assert!(text.ends_with("# EOF\n"));
    /// # }
    /// ```
    #[must_use]
    pub fn render(&self) -> String {
        rendered::open_metrics(self.families())
    }

    /// The same in Prometheus' older text format, which `promtool check metrics` and others read. It has no exemplars. Its
    /// content type is [`PLAIN_CONTENT_TYPE`].
    ///
    /// ```
    /// # fn example(metrics: hopline::metrics::Metrics) {
    /// let text = metrics.render_plain();
    /// assert!(!text.contains("# EOF"));
    /// # }
    /// ```
    #[must_use]
    pub fn render_plain(&self) -> String {
        rendered::plain(self.families())
    }

    /// Serves them over HTTP, without TLS, at `/metrics`, until what this returns is closed or dropped: as OpenMetrics to whoever
    /// asks for that, as Prometheus does, and as the older text to all others.
    ///
    /// `address` is `HOST:PORT`, or a port alone: then only programs on this machine can read them. They tell which methods
    /// there are and how often they are called, and who can read them is not asked for a password.
    ///
    /// ```no_run
    /// # async fn example(metrics: hopline::metrics::Metrics) -> std::io::Result<()> {
    /// let endpoint = metrics.serve("9464").await?;          // for this machine
    /// let for_all = metrics.serve("0.0.0.0:9465").await?;   // for whoever can reach it
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// If nothing can listen there: the port is taken, for example.
    pub async fn serve(&self, address: impl AsRef<str>) -> io::Result<MetricsEndpoint> {
        MetricsEndpoint::open(self.clone(), address.as_ref()).await
    }

    fn families(&self) -> Families {
        let mut families = Families::default();
        let mut sources = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        sources.clients.iter().for_each(|client| families.add_client(client));
        sources.servers.retain(|server| families.add_server(server));
        if let Some(queues) = &sources.queues {
            let services: BTreeMap<_, _> = sources.servers.iter().flat_map(MeasuredServer::services).collect();
            queues.told(services).into_iter().for_each(|queue| families.add_queue(&queue));
        }
        families
    }
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sources = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (clients, servers) = (sources.clients.len(), sources.servers.len());
        f.debug_struct("Metrics").field("clients", &clients).field("servers", &servers).finish()
    }
}
