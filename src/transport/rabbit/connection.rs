//! Connections to RabbitMQ: watched until they end, never restored.

use std::future::Future;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::{FutureExt as _, Stream, StreamExt as _};
use lapin::{ConnectionStatus, ErrorKind};
use tokio::runtime::Handle;
use tokio::sync::{broadcast, watch};
use tracing::{debug, info, warn};

use crate::error::Error;
use crate::transport::{ANSWER_TIMEOUT, Event};

/// How many events a slow subscriber may be behind.
const EVENTS: usize = 64;
/// How often a connection is looked at besides the events it sends: not every end of one is an event.
const LOOK: Duration = Duration::from_secs(1);

/// How long closing may take, and what is left to be sent before it: under a broker's alarm that waits for its end.
pub(super) const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

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
    /// What the connections are called.
    name: String,
    events: broadcast::Sender<Event>,
    lost: AtomicBool,
    /// Why the broker takes no publications now.
    blocked: Mutex<Option<Arc<str>>>,
}

impl News {
    /// Of connections of this `name`.
    pub(super) fn of(name: String) -> Self {
        Self { name, events: broadcast::channel(EVENTS).0, lost: AtomicBool::new(false), blocked: Mutex::default() }
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

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
            warn!(name = self.name, %reason, "connection lost");
            self.tell(Event::Lost(reason));
        }
    }
}

/// What the broker says in numbers.
pub(super) const ACCESS_REFUSED: u16 = 403;
pub(super) const NOT_FOUND: u16 = 404;

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

impl Link {
    /// Watches over a connection that was opened; what happens to it is `news`.
    pub(super) fn new(connection: lapin::Connection, news: Arc<News>) -> Arc<Self> {
        let connection = Arc::new(connection);
        let end = Arc::new(End { reason: watch::channel(None).0, wanted: AtomicBool::new(false), news });
        tokio::spawn(watch_until_end(connection.events_listener(), connection.status().clone(), end.clone()));
        Arc::new(Self { connection, end, runtime: Handle::current() })
    }

    /// Opens a channel.
    ///
    /// To lapin, a number on which the broker has closed a channel is spoilt for ever. It says so without asking the broker,
    /// and the next may be good, however many were spoilt one after the other. When none is, only a new connection has new
    /// ones.
    pub(super) async fn channel(&self) -> Result<lapin::Channel, Refusal> {
        for _ in 0..self.channel_max() {
            match self.ask(self.connection.create_channel()).await {
                Err(Refusal::Refused { code, .. }) if code != 0 => {}
                // One that reads nothing during an alarm answers after it.
                Err(Refusal::Silent) if !self.is_blocked() => {
                    return Err(self.lost_over(format!(
                        "the broker has opened no channel within {ANSWER_TIMEOUT:?}: the connection is stuck"
                    )));
                }
                opened => return opened,
            }
        }
        Err(self.lost_over("the broker has closed so many channels that the connection has none left"))
    }

    /// Counts the connection as lost, and what was asked as ended with it.
    fn lost_over(&self, reason: impl Into<Arc<str>>) -> Refusal {
        let reason = reason.into();
        self.give_up(reason.clone());
        Refusal::Ended(reason)
    }

    /// Waits for the broker's answer, but not for ever. What is given up so has to be done with: an answer that comes later, on
    /// a channel that was dropped meanwhile, is the end of the whole connection in lapin.
    pub(super) async fn ask<T>(&self, answer: impl Future<Output = lapin::Result<T>>) -> Result<T, Refusal> {
        tokio::time::timeout(ANSWER_TIMEOUT, self.hear(answer)).await.unwrap_or(Err(Refusal::Silent))
    }

    /// Waits for the broker's answer until the connection ends. About a queue whose node is away, it may take more than a
    /// minute.
    pub(super) async fn hear<T>(&self, answer: impl Future<Output = lapin::Result<T>>) -> Result<T, Refusal> {
        if let Some(reason) = self.ended() {
            return Err(Refusal::Ended(reason));
        }
        let answer = tokio::select! {
            biased;
            answer = answer => answer,
            // lapin may not say it of what is asked as the connection ends.
            reason = self.end() => return Err(Refusal::Ended(reason)),
        };
        match answer {
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

    /// What the connection is called.
    pub(super) fn name(&self) -> &str {
        self.end.news.name()
    }

    /// How many channels the broker allows.
    pub(super) fn channel_max(&self) -> u16 {
        self.connection.configuration().channel_max()
    }

    /// Whether the broker reads nothing of this connection now. lapin does not write to it either.
    pub(super) fn is_blocked(&self) -> bool {
        self.connection.status().blocked()
    }

    /// Closes the connection, which is then not reported as lost. The broker may confirm it `within` that time.
    ///
    /// Its end is told after that, not before: a channel that somebody drops while lapin closes the connection makes lapin
    /// break it off.
    pub(super) async fn close(&self, within: Duration) {
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
            if tokio::time::timeout(within, closed).await.is_err() {
                let name = &self.end.news.name;
                debug!(name, "the broker did not confirm within {within:?} that the connection is closed");
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
                warn!(name = end.news.name(), reason, "the broker takes no publications for now");
                end.news.tell(Event::Blocked(reason.into()));
            }
            Some(lapin::Event::ConnectionUnblocked) => {
                info!(name = end.news.name(), "the broker takes publications again");
                end.news.tell(Event::Unblocked);
            }
            Some(lapin::Event::Error(error)) if !error.is_amqp_soft_error() => {
                break words(&error).into();
            }
            Some(other) => debug!(name = end.news.name(), event = ?other, "told by the broker's connection"),
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

pub(super) fn code(error: &lapin::Error) -> u16 {
    match error.kind() {
        ErrorKind::ProtocolError(error) => error.get_id(),
        _ => 0,
    }
}

/// Whether the socket ended in one of these ways.
pub(super) fn ended_by(error: &lapin::Error, ways: &[io::ErrorKind]) -> bool {
    matches!(error.kind(), ErrorKind::IOError(error) if ways.contains(&error.kind()))
}
