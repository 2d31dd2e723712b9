//! Connections to RabbitMQ: opened through a pool, watched until they end, never restored.

use std::fmt;
use std::future::Future;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use deadpool_lapin::{Config, Hook, HookError, Object, Pool, PoolError, Runtime};
use futures::{FutureExt as _, Stream, StreamExt as _};
use lapin::{ConnectionProperties, ConnectionStatus, ErrorKind};
use tokio::runtime::Handle;
use tokio::sync::{broadcast, watch};
use tracing::{debug, info, warn};
use url::Url;

use crate::error::Error;
use crate::transport::{ANSWER_TIMEOUT, Dial, Event, Role, masked};

/// How often each side says that it is there, unless the address says otherwise, in seconds. After two of silence the
/// other side has gone: with RabbitMQ's own minute, a partition would go unnoticed for two.
const HEARTBEAT: &str = "10";
/// How many events a slow subscriber may be behind.
const EVENTS: usize = 64;
/// How often a connection is looked at besides the events it sends: not every end of one is an event.
const LOOK: Duration = Duration::from_secs(1);

/// How long closing may take, and what is left to be sent before it: under a broker's alarm that waits for its end.
pub(super) const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);
/// How many numbers of channels are tried.
const CHANNEL_TRIES: usize = 16;

/// One AMQP connection. Once it ends, whatever was under way on it fails, and it stays ended.
#[derive(Debug)]
pub(super) struct Link {
    connection: Arc<lapin::Connection>,
    end: Arc<End>,
    runtime: Handle,
}

impl Drop for Link {
    /// Closes what was not closed: lapin alone would keep the connection for the sake of a consumer that was being opened
    /// when nobody waited for it any more.
    fn drop(&mut self) {
        if self.connection.status().connected() {
            self.end.set("nobody needs the connection any more".into());
            let connection = self.connection.clone();
            self.runtime.spawn(async move {
                // Whether it could be closed or has ended, it is over.
                let _ = connection.close(200, "OK".into()).await;
            });
        }
    }
}

/// The end of a connection, told to whom it concerns.
#[derive(Debug)]
struct End {
    /// Why it ended, once it has.
    reason: watch::Sender<Option<Arc<str>>>,
    /// Whether this side ends it: it is not lost then.
    wanted: AtomicBool,
    news: Arc<News>,
}

impl End {
    fn lost(&self, reason: Arc<str>) {
        if self.set(reason.clone()) && !self.wanted.load(Ordering::SeqCst) {
            self.news.lost(reason);
        }
    }

    /// Whether this is the first end.
    fn set(&self, reason: Arc<str>) -> bool {
        self.reason.send_if_modified(|end| {
            let open = end.is_none();
            end.get_or_insert(reason);
            open
        })
    }
}

/// What happens to the connections of one transport.
#[derive(Debug)]
pub(super) struct News {
    events: broadcast::Sender<Event>,
    lost: AtomicBool,
    /// Why the broker takes no publications now.
    blocked: Mutex<Option<Arc<str>>>,
}

impl Default for News {
    fn default() -> Self {
        Self { events: broadcast::channel(EVENTS).0, lost: AtomicBool::new(false), blocked: Mutex::default() }
    }
}

impl News {
    pub(super) fn subscribe(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }

    /// Who listens first and asks then misses nothing.
    pub(super) fn blocked(&self) -> Option<Arc<str>> {
        self.blocked.lock().expect("no panic while holding the reason").clone()
    }

    fn tell(&self, event: Event) {
        let mut blocked = self.blocked.lock().expect("no panic while holding the reason");
        match &event {
            Event::Blocked(reason) => *blocked = Some(reason.clone()),
            Event::Unblocked => *blocked = None,
            Event::Lost(_) => {}
        }
        // Without a subscriber there is nobody to tell.
        let _ = self.events.send(event);
    }

    /// A transport is lost once, with the first of its connections.
    fn lost(&self, reason: Arc<str>) {
        if !self.lost.swap(true, Ordering::SeqCst) {
            warn!(%reason, "connection lost");
            self.tell(Event::Lost(reason));
        }
    }
}

/// Why the broker did not do what was asked of it.
#[derive(Debug)]
pub(super) enum Refusal {
    /// It said no, and closed the channel.
    Refused {
        /// AMQP's reply code, such as 404.
        code: u16,
        /// The broker's words.
        text: String,
    },
    /// The connection ended.
    Ended(Arc<str>),
    /// It did not answer in time.
    Silent,
}

impl Refusal {
    /// The error of an `operation`, such as "consume the queue `x`".
    pub(super) fn during(self, operation: impl Into<String>) -> Error {
        let reason = match self {
            Self::Refused { text, .. } => text,
            Self::Ended(reason) => {
                return Error::Disconnected { method: None, may_have_run: false, reason: reason.to_string() };
            }
            Self::Silent => format!("it gave no answer within {ANSWER_TIMEOUT:?}"),
        };
        Error::Broker { operation: operation.into(), reason }
    }
}

/// The address `url` with what it leaves open, as lapin reads it.
pub(super) fn complete(url: &Url, dial: &Dial) -> String {
    let mut address = url.clone();
    let says = |name: &str| url.query_pairs().any(|(key, _)| key == name);
    if !says("heartbeat") {
        address.query_pairs_mut().append_pair("heartbeat", HEARTBEAT);
    }
    // Without a user, who has a certificate logs in with that.
    if dial.has_identity() && url.username().is_empty() && !says("auth_mechanism") {
        address.query_pairs_mut().append_pair("auth_mechanism", "external");
    }
    address.into()
}

fn properties(role: Role) -> ConnectionProperties {
    let program = match role {
        Role::Client => "client",
        Role::Server => "server",
    };
    ConnectionProperties::default().with_connection_name(format!("hopline {program} {}", std::process::id()).into())
}

/// Where the connections of one transport come from.
pub(super) enum Source {
    Pool(Pool),
    /// The pool cannot be told of settings for TLS.
    #[cfg(feature = "tls")]
    Tls {
        connector: super::tls::Connector,
        address: String,
        role: Role,
    },
}

impl Source {
    /// Connections to the address `url`.
    pub(super) fn of(url: &Url, dial: &Dial, role: Role) -> Result<Self, Error> {
        let address = complete(url, dial);
        #[cfg(feature = "tls")]
        if let Some(connector) = dial.tls.clone() {
            return Ok(Self::Tls { connector, address, role });
        }
        let size = match role {
            Role::Client => 1,
            Role::Server => 2,
        };
        Config { url: Some(address), pool: None }
            .builder(move || properties(role), Runtime::Tokio1)
            .map_err(|error| failed(url, error))?
            .max_size(size)
            .create_timeout(Some(dial.connect_timeout))
            .pre_recycle(Hook::sync_fn(|connection, _| match connection.status() {
                status if !status.connected() => Err(HookError::message("the connection has ended")),
                status if status.blocked() => Err(HookError::message("the broker takes no publications")),
                _ => Ok(()),
            }))
            .build()
            .map(Self::Pool)
            .map_err(|error| failed(url, error))
    }

    async fn connect(&self, url: &Url, dial: &Dial) -> Result<lapin::Connection, Error> {
        let silent = || failed(url, format_args!("no answer within {:?}", dial.connect_timeout));
        match self {
            // Each is taken once, and for good.
            Self::Pool(pool) => pool.get().await.map(Object::take).map_err(|error| match error {
                PoolError::Timeout(_) => silent(),
                PoolError::Backend(error) => failed(url, refusal(&error, &complete(url, dial))),
                other => failed(url, other),
            }),
            #[cfg(feature = "tls")]
            Self::Tls { connector, address, role } => {
                let connecting = connector.connect(address, properties(*role));
                let connected = tokio::time::timeout(dial.connect_timeout, connecting).await;
                connected.map_err(|_| silent())?.map_err(|error| failed(url, refusal(&error, &complete(url, dial))))
            }
        }
    }
}

impl Link {
    /// Opens a connection; what happens to it is `news`.
    pub(super) async fn open(source: &Source, url: &Url, dial: &Dial, news: Arc<News>) -> Result<Arc<Self>, Error> {
        let connection = Arc::new(source.connect(url, dial).await?);
        let end = Arc::new(End { reason: watch::channel(None).0, wanted: AtomicBool::new(false), news });
        tokio::spawn(watch_until_end(connection.events_listener(), connection.status().clone(), end.clone()));
        info!(broker = %masked(url.as_str()), "connected");
        Ok(Arc::new(Self { connection, end, runtime: Handle::current() }))
    }

    /// Opens a channel.
    ///
    /// To lapin, a number on which the broker has closed a channel is spoilt for ever. The next may be good; when none
    /// is, some two thousand were spoilt, and only a new connection has new ones.
    pub(super) async fn channel(&self) -> Result<lapin::Channel, Refusal> {
        for _ in 0..CHANNEL_TRIES {
            match self.ask(self.connection.create_channel()).await {
                Err(Refusal::Refused { code, .. }) if code != 0 => {}
                opened => return opened,
            }
        }
        let reason: Arc<str> = "the broker has closed so many channels that the connection has none left".into();
        self.end.lost(reason.clone());
        Err(Refusal::Ended(reason))
    }

    /// Waits for the broker's answer, but not for ever.
    pub(super) async fn ask<T>(&self, answer: impl Future<Output = lapin::Result<T>>) -> Result<T, Refusal> {
        tokio::time::timeout(ANSWER_TIMEOUT, self.hear(answer)).await.unwrap_or(Err(Refusal::Silent))
    }

    /// Waits for the broker's answer until the connection ends.
    pub(super) async fn hear<T>(&self, answer: impl Future<Output = lapin::Result<T>>) -> Result<T, Refusal> {
        if let Some(reason) = self.ended() {
            return Err(Refusal::Ended(reason));
        }
        match answer.await {
            Ok(answer) => Ok(answer),
            Err(error) if error.is_amqp_soft_error() || self.connection.status().connected() => {
                Err(Refusal::Refused { code: code(&error), text: words(&error) })
            }
            Err(error) => Err(Refusal::Ended(self.ended().unwrap_or_else(|| words(&error).into()))),
        }
    }

    /// Counts the connection as lost.
    pub(super) fn give_up(&self, reason: Arc<str>) {
        self.end.lost(reason);
    }

    /// Why the connection ended, if it has.
    pub(super) fn ended(&self) -> Option<Arc<str>> {
        self.end.reason.borrow().clone()
    }

    /// Waits until the connection ends, and tells why.
    pub(super) async fn end(&self) -> Arc<str> {
        let mut end = self.end.reason.subscribe();
        let reason = end.wait_for(Option::is_some).await.ok().and_then(|reason| reason.clone());
        reason.unwrap_or_else(|| "the connection was closed".into())
    }

    /// How many channels the broker allows.
    pub(super) fn channel_max(&self) -> u16 {
        self.connection.configuration().channel_max()
    }

    /// Whether the broker reads nothing of this connection now. lapin does not write to it either.
    pub(super) fn is_blocked(&self) -> bool {
        self.connection.status().blocked()
    }

    /// Closes the connection, which is then not reported as lost.
    ///
    /// Its end is told after that, not before: a channel that somebody drops while lapin closes the connection makes lapin
    /// break it off.
    pub(super) async fn close(&self) {
        self.end.wanted.store(true, Ordering::SeqCst);
        let mut closing = std::pin::pin!(self.connection.close(200, "OK".into()));
        if self.is_blocked() {
            // Polling once sends it, at the alarm's end.
            let _ = closing.as_mut().now_or_never();
        } else {
            let closed = async {
                tokio::select! {
                    biased;
                    // lapin refuses when the connection has ended or is being closed, and may not answer when it ends.
                    Ok(()) = closing => {}
                    _ = self.end() => {}
                }
            };
            if tokio::time::timeout(CLOSE_TIMEOUT, closed).await.is_err() {
                warn!("the broker did not confirm within {CLOSE_TIMEOUT:?} that the connection is closed");
            }
        }
        self.end.set("this program closed the connection".into());
    }
}

/// Passes on what lapin tells of a connection, to as many as listen: lapin itself tells each thing to one listener only.
async fn watch_until_end(listener: impl Stream<Item = lapin::Event>, status: ConnectionStatus, end: Arc<End>) {
    let mut listener = std::pin::pin!(listener.chain(futures::stream::pending()));
    let mut ended = end.reason.subscribe();
    let reason: Arc<str> = loop {
        let event = tokio::select! {
            event = listener.next() => event,
            _ = ended.wait_for(Option::is_some) => return,
            () = tokio::time::sleep(LOOK) => None,
        };
        match event {
            Some(lapin::Event::ConnectionBlocked(reason)) => {
                warn!(reason, "the broker takes no publications for now");
                end.news.tell(Event::Blocked(reason.into()));
            }
            Some(lapin::Event::ConnectionUnblocked) => {
                info!("the broker takes publications again");
                end.news.tell(Event::Unblocked);
            }
            Some(lapin::Event::Error(error)) if !error.is_amqp_soft_error() => {
                break words(&error).into();
            }
            Some(other) => debug!(event = ?other, "told by the broker's connection"),
            None if status.connected() || status.closing() => {}
            None => break "the broker closed the connection".into(),
        }
    };
    end.lost(reason);
}

/// The broker's own words where it sent any, lapin's otherwise.
pub(super) fn words(error: &lapin::Error) -> String {
    match error.kind() {
        ErrorKind::ProtocolError(error) => error.get_message().to_string(),
        ErrorKind::IOError(error) => error.to_string(),
        _ => error.to_string(),
    }
}

fn code(error: &lapin::Error) -> u16 {
    match error.kind() {
        ErrorKind::ProtocolError(error) => error.get_id(),
        _ => 0,
    }
}

/// Whether the socket ended in one of these ways.
fn ended_by(error: &lapin::Error, ways: &[io::ErrorKind]) -> bool {
    matches!(error.kind(), ErrorKind::IOError(error) if ways.contains(&error.kind()))
}

/// Why there is no connection, in a sentence that says what to look at.
fn refusal(error: &lapin::Error, address: &str) -> String {
    #[cfg(feature = "tls")]
    if let Some(why) = super::tls::refusal(error) {
        return why;
    }
    let words = words(error);
    let is_closed = ended_by(error, &[io::ErrorKind::ConnectionAborted, io::ErrorKind::UnexpectedEof]);
    let is_reset = ended_by(error, &[io::ErrorKind::ConnectionReset, io::ErrorKind::BrokenPipe]);
    let external = address.to_lowercase().contains("auth_mechanism=external");
    match code(error) {
        // It says nothing then.
        0 if external && is_closed => format!(
            "the broker ended the connection at the login, which means that it does not offer EXTERNAL: enable its plugin \
             rabbitmq_auth_mechanism_ssl, and EXTERNAL in its auth_mechanisms ({words})"
        ),
        // What it says of a certificate is lost when it ends the connection before it has read the login.
        0 if address.starts_with("amqps:") && is_reset => format!(
            "the broker broke TLS off: it may ask for a client certificate, given with `Tls::identity`, or not accept \
             the one that it got ({words})"
        ),
        403 if external => {
            format!("access refused: the name in the client certificate has to be a user's ({words})")
        }
        403 => format!("access refused: check user and password ({words})"),
        530 => format!(
            "the virtual host does not exist or is closed to this user; the usual one is written `/%2f` ({words})"
        ),
        _ => words,
    }
}

fn failed(url: &Url, reason: impl fmt::Display) -> Error {
    Error::Connect { url: masked(url.as_str()).to_string(), reason: reason.to_string() }
}
