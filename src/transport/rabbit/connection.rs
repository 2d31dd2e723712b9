//! An AMQP connection to RabbitMQ: it is watched until it ends, and never reconnected.
//!
//! Above the transport, a client's session and a server's supervisor reconnect. They alone know what to do about the
//! calls that were in flight.

use std::future::Future;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::{FutureExt as _, Stream, StreamExt as _};
use lapin::{ConnectionStatus, ErrorKind};
use tokio::runtime::Handle;
use tokio::sync::{broadcast, oneshot, watch};
use tracing::{debug, info, warn};

use super::wire::{ChannelClosed, Wire};
use super::words;
use crate::error::Error;
use crate::limits::ANSWER_TIMEOUT;
use crate::transport::ConnectionEvent;

/// How many events a slow subscriber may be behind before it misses some.
const EVENTS: usize = 64;
/// How often the state of a connection is checked. Not every end of a connection causes an event of lapin's.
const LOOK: Duration = Duration::from_secs(1);

/// How long closing a connection may take, and before that, sending what is left. During an alarm of the broker this
/// time passes.
pub(super) const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// One AMQP connection. Once it ends, everything in flight on it fails, and it stays ended.
#[derive(Debug)]
pub(super) struct Link {
    connection: Arc<lapin::Connection>,
    end: Arc<ConnectionEnd>,
    runtime: Handle,
    wire: Arc<Wire>,
}

impl Drop for Link {
    /// Closes the connection if nobody has. lapin would keep it if a consumer was being opened when everybody stopped
    /// waiting.
    fn drop(&mut self) {
        if self.connection.status().connected() {
            self.end.set("nobody needs the connection any more".into());
            let connection = self.connection.clone();
            self.runtime.spawn(async move {
                // An error means that the connection has ended already.
                let _ = connection.close(200, "OK".into()).await;
            });
        }
    }
}

/// The end of a connection, and everybody who has to know of it.
#[derive(Debug)]
struct ConnectionEnd {
    /// Why the connection has ended; `None` before that.
    reason: watch::Sender<Option<Arc<str>>>,
    /// Whether this side has closed it. Then it does not count as lost.
    wanted: AtomicBool,
    news: Arc<News>,
}

impl ConnectionEnd {
    fn lost(&self, reason: Arc<str>) {
        if self.set(reason.clone()) && !self.wanted.load(Ordering::SeqCst) {
            self.news.lost(reason);
        }
    }

    /// Notes the reason of the end, unless there is one. Returns whether this was the first.
    fn set(&self, reason: Arc<str>) -> bool {
        self.reason.send_if_modified(|end| {
            let open = end.is_none();
            end.get_or_insert(reason);
            open
        })
    }
}

/// Tells what happens to the connections of one transport.
#[derive(Debug)]
pub(super) struct News {
    /// The name of the connections in the log and on the broker.
    name: String,
    /// Where subscribers hear of it.
    events: broadcast::Sender<ConnectionEvent>,
    /// Whether the loss of the transport was told.
    lost: AtomicBool,
    /// The broker's reason, while it accepts no messages.
    blocked: Mutex<Option<Arc<str>>>,
}

impl News {
    /// For connections with this name.
    pub(super) fn of(name: String) -> Self {
        Self { name, events: broadcast::channel(EVENTS).0, lost: AtomicBool::new(false), blocked: Mutex::default() }
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn subscribe(&self) -> broadcast::Receiver<ConnectionEvent> {
        self.events.subscribe()
    }

    /// The broker's reason, while it accepts no messages. To miss nothing, subscribe first and ask then.
    pub(super) fn blocked(&self) -> Option<Arc<str>> {
        self.blocked.lock().expect("no panic while holding the reason").clone()
    }

    /// Tells an event to all subscribers.
    fn tell(&self, event: ConnectionEvent) {
        let mut blocked = self.blocked.lock().expect("no panic while holding the reason");
        match &event {
            ConnectionEvent::Blocked(reason) => *blocked = Some(reason.clone()),
            ConnectionEvent::Unblocked => *blocked = None,
            ConnectionEvent::Lost(_) => {}
        }
        // An error means that nobody has subscribed.
        let _ = self.events.send(event);
    }

    /// Tells that the transport is lost, with the first of its connections.
    fn lost(&self, reason: Arc<str>) {
        if !self.lost.swap(true, Ordering::SeqCst) {
            warn!(name = self.name, %reason, "connection lost");
            self.tell(ConnectionEvent::Lost(reason));
        }
    }
}

/// AMQP's reply code for a missing permission.
pub(super) const ACCESS_REFUSED: u16 = 403;
/// AMQP's reply code for a queue or exchange that does not exist, or whose node is down.
pub(super) const NOT_FOUND: u16 = 404;
/// AMQP's reply code for what exists with other arguments, and for a property that is wrong.
pub(super) const PRECONDITION_FAILED: u16 = 406;

/// Why the broker has not done what it was asked.
#[derive(Debug)]
pub(super) enum Refusal {
    /// It refused, and closed the channel.
    Refused {
        /// AMQP's reply code, such as 404.
        code: u16,
        /// The broker's words.
        text: String,
    },
    /// The connection has ended, for this reason.
    Ended(Arc<str>),
    /// It has not answered within 30 s.
    Silent,
}

impl Refusal {
    /// The error for an `operation`, which is named as in "consume the queue `x`".
    pub(super) fn during(self, operation: impl Into<String>) -> Error {
        match self {
            Self::Refused { text, .. } => Error::refused(operation, text),
            Self::Ended(reason) => {
                Error::Disconnected { method: None, may_have_run: false, reason: reason.to_string() }
            }
            Self::Silent => Error::silent(operation, ANSWER_TIMEOUT),
        }
    }
}

impl Link {
    /// Watches a connection that was opened on this wire, and tells `news` what happens to it.
    pub(super) fn new((connection, wire): (lapin::Connection, Arc<Wire>), news: Arc<News>) -> Arc<Self> {
        let connection = Arc::new(connection);
        let end = Arc::new(ConnectionEnd { reason: watch::channel(None).0, wanted: AtomicBool::new(false), news });
        tokio::spawn(watch_until_end(connection.events_listener(), connection.status().clone(), end.clone()));
        Arc::new(Self { connection, end, runtime: Handle::current(), wire })
    }

    /// Opens a channel.
    ///
    /// When the broker has closed a channel, lapin never uses its number again. It then refuses a new channel with this
    /// number without asking the broker, and the next number may be good. So this tries as many times as there are
    /// numbers. When all are used up, only a new connection helps, and this one counts as lost.
    pub(super) async fn channel(&self) -> Result<lapin::Channel, Refusal> {
        for _ in 0..self.channel_max() {
            match self.ask(self.connection.create_channel()).await {
                Err(Refusal::Refused { code, .. }) if code != 0 => {}
                // During an alarm the broker reads nothing. It answers after that.
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

    /// Ends the connection for this reason, and returns the refusal for what was asked on it.
    fn lost_over(&self, reason: impl Into<Arc<str>>) -> Refusal {
        let reason = reason.into();
        self.give_up(reason.clone());
        Refusal::Ended(reason)
    }

    /// Waits for an answer of the broker, at most 30 s. A channel on which an answer is missing must not be dropped: in
    /// lapin, an answer that comes later on a dropped channel ends the whole connection.
    pub(super) async fn ask<T>(&self, answer: impl Future<Output = lapin::Result<T>>) -> Result<T, Refusal> {
        tokio::time::timeout(ANSWER_TIMEOUT, self.hear(answer)).await.unwrap_or(Err(Refusal::Silent))
    }

    /// Waits for an answer of the broker until the connection ends. About a queue whose node is down, an answer may
    /// take more than a minute.
    pub(super) async fn hear<T>(&self, answer: impl Future<Output = lapin::Result<T>>) -> Result<T, Refusal> {
        if let Some(reason) = self.ended() {
            return Err(Refusal::Ended(reason));
        }
        let answer = tokio::select! {
            biased;
            answer = answer => answer,
            // lapin may not answer what is asked while the connection ends.
            reason = self.end() => return Err(Refusal::Ended(reason)),
        };
        match answer {
            Ok(answer) => Ok(answer),
            Err(error) if error.is_amqp_soft_error() || self.connection.status().connected() => {
                Err(Refusal::Refused { code: code(&error), text: words::of(&error) })
            }
            Err(error) => Err(Refusal::Ended(self.ended().unwrap_or_else(|| words::of(&error).into()))),
        }
    }

    /// The same for an answer that comes over the wire. It does not come if the connection ends.
    pub(super) async fn hear_of<T>(&self, answer: oneshot::Receiver<Result<T, ChannelClosed>>) -> Result<T, Refusal> {
        match answer.await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(ChannelClosed { code, text })) => Err(Refusal::Refused { code, text }),
            Err(_) => Err(Refusal::Ended(self.end().await)),
        }
    }

    /// The first bytes that the broker has sent.
    pub(super) fn first_words(&self) -> &[u8] {
        self.wire.first_words()
    }

    /// The socket of the connection.
    pub(super) fn wire(&self) -> &Wire {
        &self.wire
    }

    /// Counts the connection as lost for this reason.
    pub(super) fn give_up(&self, reason: Arc<str>) {
        self.end.lost(reason);
    }

    /// Why the connection has ended; `None` if it has not.
    pub(super) fn ended(&self) -> Option<Arc<str>> {
        self.end.reason.borrow().clone()
    }

    /// Waits until the connection ends. Returns the reason.
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

    /// Whether the broker reads nothing from this connection now. lapin does not write to it then.
    pub(super) fn is_blocked(&self) -> bool {
        self.connection.status().blocked()
    }

    /// Closes the connection. It does not count as lost. The broker may take the time `within` to confirm.
    ///
    /// `ended` is told only after that: if somebody dropped a channel while lapin closes the connection, lapin would
    /// break off.
    pub(super) async fn close(&self, within: Duration) {
        self.end.wanted.store(true, Ordering::SeqCst);
        let mut closing = std::pin::pin!(self.connection.close(200, "OK".into()));
        if self.is_blocked() {
            // The first poll queues the frame. lapin sends it when the alarm ends.
            let _ = closing.as_mut().now_or_never();
        } else {
            let closed = async {
                tokio::select! {
                    biased;
                    // lapin refuses if the connection has ended or is being closed, and may never answer if it ends
                    // now.
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

/// Tells `end` and its news what lapin reports of a connection. lapin reports each event to one listener only, so this
/// is the one, and tells everybody else.
async fn watch_until_end(
    listener: impl Stream<Item = lapin::Event>,
    status: ConnectionStatus,
    end: Arc<ConnectionEnd>,
) {
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
                end.news.tell(ConnectionEvent::Blocked(reason.into()));
            }
            Some(lapin::Event::ConnectionUnblocked) => {
                info!(name = end.news.name(), "the broker takes publications again");
                end.news.tell(ConnectionEvent::Unblocked);
            }
            Some(lapin::Event::Error(error)) if !error.is_amqp_soft_error() => {
                break words::of(&error).into();
            }
            Some(other) => debug!(name = end.news.name(), event = ?other, "told by the broker's connection"),
            None if status.connected() || status.closing() => {}
            None => break "the broker closed the connection".into(),
        }
    };
    end.lost(reason);
}

/// AMQP's reply code, or 0 if the error did not come from the broker.
pub(super) fn code(error: &lapin::Error) -> u16 {
    match error.kind() {
        ErrorKind::ProtocolError(error) => error.get_id(),
        _ => 0,
    }
}

/// Whether the socket has ended in one of these ways.
pub(super) fn ended_by(error: &lapin::Error, ways: &[io::ErrorKind]) -> bool {
    matches!(error.kind(), ErrorKind::IOError(error) if ways.contains(&error.kind()))
}
