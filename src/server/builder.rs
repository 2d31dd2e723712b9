//! The settings of a server, and how it connects.

use std::collections::BTreeMap;
use std::sync::Arc;

use tracing::info;

use super::rules::ServerRules;
use super::{Allow, Server};
use crate::compression::Compression;
use crate::environment;
use crate::error::Error;
use crate::limits::MAX_MESSAGE_SIZE;
use crate::middleware::{Chain, Middleware};
use crate::rules::RulesPlace;
use crate::settings::{Decided, Settings, common_settings};
use crate::topology::short_id;
use crate::transport::{Dial, Role, Transport};

/// The settings of a server. They are chosen before it connects.
///
/// ```
/// # async fn example() -> Result<(), hopline::Error> {
/// let server = hopline::Server::builder()
///     .name("billing")
///     .compression(hopline::Compression::Lz4)
///     .connect("amqp://user:password@broker.example.com")
///     .await?;
/// # Ok(()) }
/// ```
#[derive(Debug, Clone)]
pub struct ServerBuilder {
    settings: Settings,
    max_message_size: usize,
    compression: Option<Compression>,
    middleware: Chain,
    pub(super) has_rules: bool,
}

impl Default for ServerBuilder {
    fn default() -> Self {
        Self {
            settings: Settings::default(),
            max_message_size: MAX_MESSAGE_SIZE,
            compression: None,
            middleware: Chain::default(),
            has_rules: false,
        }
    }
}

impl ServerBuilder {
    common_settings!("server PROCESS INSTANCE");

    /// The largest message that the server accepts or sends, in bytes. It is also the limit for arguments after they
    /// are decompressed. Default: 16 MiB.
    #[must_use]
    pub fn max_message_size(mut self, bytes: usize) -> Self {
        self.max_message_size = bytes;
        self
    }

    /// Compresses results for callers that can read it. A result is compressed if it has at least 1024 bytes and
    /// becomes smaller. The server reads compressed arguments in any case. Default: results are not compressed.
    #[must_use]
    pub fn compression(mut self, compression: Compression) -> Self {
        self.compression = Some(compression);
        self
    }

    /// Puts a [`Middleware`] around every call of all services of this server and around its events. It is around the
    /// middleware of each [service](crate::Service::with) too. The first that is added is the outermost. Default: none.
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

    /// Connects to the broker that `HOPLINE_URL` names, [with](Self::with_env) what else the environment says: see
    /// [`environment`](crate::environment).
    ///
    /// # Errors
    /// As [`connect`](Self::connect), and `Invalid` for a variable that is missing or cannot be used.
    pub async fn connect_env(self) -> Result<Server, Error> {
        self.with_env().connect(environment::url()?).await
    }

    /// Connects to the broker at `url`, which begins with `memory://`, `amqp://` or `amqps://`. `url` may name several
    /// brokers, as for [`ClientBuilder::connect`](crate::ClientBuilder::connect); the server connects to the first that
    /// answers.
    ///
    /// A connection that is lost is made again, for as long as it takes, and everything is served again: see
    /// [`Running::state`](crate::Running::state). A server that is not connected to the first of its addresses tries
    /// that one every 2.5 to 7.5 minutes. It moves there as soon as everything can be served there. While it moves it
    /// misses no call or event, and no call to it fails.
    ///
    /// # Errors
    /// `Invalid` if the address or a setting cannot be used, `Connect` if no broker answers or it refuses the
    /// connection.
    pub async fn connect(self, url: impl AsRef<str>) -> Result<Server, Error> {
        let decided = self.settings.decide()?;
        let (dial, instance) = self.dial(&decided, url.as_ref())?;
        let transport = dial.connect(Role::Server).await?;
        info!(name = dial.label(Role::Server), broker = transport.broker().map(display), "connected");
        Ok(self.server(decided, dial, instance, Some(transport)))
    }

    /// Like [`connect`](Self::connect), but does not wait for the broker, which need not be running yet.
    ///
    /// [`Server::start`] then returns at once. The server connects and serves as soon as the broker is there, however
    /// long that takes. A problem that `start` would otherwise fail with, such as a queue that exists with other
    /// arguments, is reported as [`State::Degraded`](crate::State::Degraded), and everything else is served.
    ///
    /// ```
    /// # use hopline::{Error, Server, Service, State};
    /// # async fn example(calculator: Service) -> Result<(), Error> {
    /// let server = Server::builder().connect_lazy("amqp://broker.example.com")?.serve(calculator).start().await?;
    /// let _ = server.state().wait_for(|state| *state == State::Ready).await;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// `Invalid` if the address or a setting cannot be used.
    pub fn connect_lazy(self, url: impl AsRef<str>) -> Result<Server, Error> {
        let decided = self.settings.decide()?;
        let (dial, instance) = self.dial(&decided, url.as_ref())?;
        Ok(self.server(decided, dial, instance, None))
    }

    /// How to connect, and the new id of the instance.
    fn dial(&self, decided: &Decided, url: &str) -> Result<(Dial, Arc<str>), Error> {
        Compression::check(self.compression).map_err(Error::Invalid)?;
        let instance: Arc<str> = short_id().into();
        Ok((decided.dial.dial(url)?.of(instance.clone()), instance))
    }

    /// The server with these settings. It has no services yet.
    fn server(self, decided: Decided, dial: Dial, instance: Arc<str>, transport: Option<Transport>) -> Server {
        let Self { max_message_size, compression, mut middleware, has_rules, .. } = self;
        let namespace = decided.namespace;
        let place = || RulesPlace { dial: dial.clone(), role: Role::Server, namespace: namespace.clone() };
        let rules = has_rules.then(|| ServerRules::new(place()));
        if let Some(rules) = &rules {
            let mut ruled = Chain::default();
            ruled.push(rules.rates.clone());
            middleware = ruled.around(&middleware);
        }
        Server {
            dial,
            transport,
            namespace,
            rules,
            max_message_size,
            compression,
            middleware,
            instance,
            services: Vec::new(),
            subscriptions: Vec::new(),
            attributes: BTreeMap::new(),
            allow: Allow::default(),
            allow_drain: Allow::default(),
        }
    }
}
