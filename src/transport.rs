//! The port to a broker: declare, unbind, publish, consume, get, settle, events, close; and the address that picks the broker.
//!
//! Not part of the library's stable API: it is public so that one suite can hold every broker to the same contract.

mod address;
mod consuming;
mod dial;
pub mod memory;
pub mod rabbit;
#[cfg(feature = "tls")]
mod tls;

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{broadcast, oneshot};

pub use self::consuming::{Consumer, ConsumerEnd, Death, Delivery, Mode, Settle};
pub(crate) use self::consuming::{Life, Settler, Stop};
pub use self::dial::Dial;
pub(crate) use self::dial::DialSettings;
pub(crate) use self::dial::{next_look_back, pause_before_next};
#[cfg(feature = "tls")]
pub use self::tls::Tls;
use crate::error::Error;
use crate::topology::{Binding, Declaration};

/// How long the broker may take over one operation.
pub(crate) const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// A live connection to a broker.
#[derive(Debug, Clone)]
pub enum Transport {
    /// The broker in this process.
    Memory(memory::Connection),
    /// RabbitMQ.
    Rabbit(rabbit::Connection),
}

/// Who connects: a server publishes and consumes on connections of their own, so that a blocked publisher cannot delay acks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// One connection for both directions.
    Client,
    /// One connection for each direction.
    Server,
    /// As a server, but for people who look after one.
    Operator,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Client => "client",
            Self::Server => "server",
            Self::Operator => "operator",
        })
    }
}

impl Transport {
    /// Connects to the broker that `url` names, as [`Dial::parse`] reads it.
    ///
    /// # Errors
    /// `Invalid` for an address that cannot be used, `Connect` when the broker does not answer or refuses.
    pub async fn connect(url: &str, role: Role) -> Result<Self, Error> {
        Dial::parse(url)?.connect(role).await
    }

    /// In the place of a connection that is yet to be made: it has ended, and whatever is asked of it fails with that.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub(crate) fn absent() -> Self {
        Self::Memory(memory::Connection::absent())
    }

    /// Declares each part in order. Exclusive queues belong to this transport's consuming connection.
    ///
    /// # Errors
    /// `Mismatch` where something exists with other arguments, `Broker` for any other refusal and when it does not answer within
    /// 30 s.
    pub async fn declare(&self, parts: &[Declaration]) -> Result<(), Error> {
        match self {
            Self::Memory(connection) => connection.declare(parts),
            Self::Rabbit(connection) => connection.declare(parts).await,
        }
    }

    /// The same, for as long as the broker takes, which is more than a minute for a queue whose node is away.
    ///
    /// # Errors
    /// As [`Transport::declare`].
    pub async fn declare_however_long(&self, parts: &[Declaration]) -> Result<(), Error> {
        match self {
            Self::Memory(connection) => connection.declare(parts),
            Self::Rabbit(connection) => connection.declare_however_long(parts).await,
        }
    }

    /// Which of these exchanges are not there, for as long as the broker takes to say. One of which the user may not know counts
    /// as there.
    ///
    /// # Errors
    /// `Broker` for any other refusal, `Disconnected` when the broker is gone.
    pub async fn missing(&self, exchanges: &[String]) -> Result<Vec<String>, Error> {
        match self {
            Self::Memory(connection) => connection.missing(exchanges),
            Self::Rabbit(connection) => connection.missing(exchanges).await,
        }
    }

    /// Takes bindings away: when this returns, nothing more is routed by them. One that is not there is fine.
    ///
    /// # Errors
    /// `Broker` for a refusal, `Disconnected` when the broker is gone.
    pub async fn unbind(&self, bindings: &[Binding]) -> Result<(), Error> {
        match self {
            Self::Memory(connection) => connection.unbind(bindings),
            Self::Rabbit(connection) => connection.unbind(bindings).await,
        }
    }

    /// Hands a message over, in order with the others; the receipt tells what became of it.
    pub fn publish(&self, publication: Publication) -> Receipt {
        match self {
            Self::Memory(connection) => connection.publish(publication),
            Self::Rabbit(connection) => connection.publish(publication),
        }
    }

    /// The same, with a receipt that may be told some milliseconds late: the machine need not wake for it alone.
    pub fn publish_quietly(&self, publication: Publication) -> Receipt {
        match self {
            Self::Memory(connection) => connection.publish(publication),
            Self::Rabbit(connection) => connection.publish_quietly(publication),
        }
    }

    /// Publishes a message again and again until this is dropped, apart from all others: whatever becomes of it, they leave. Some
    /// are unconfirmed at any time, but few.
    pub async fn repeat(&self, publication: Publication) {
        match self {
            Self::Memory(connection) => connection.repeat(publication).await,
            Self::Rabbit(connection) => connection.repeat(publication).await,
        }
    }

    /// How many queues can be consumed at once; none where there is no limit.
    #[must_use]
    pub fn max_consumers(&self) -> Option<usize> {
        match self {
            Self::Memory(_) => None,
            Self::Rabbit(connection) => Some(connection.max_consumers()),
        }
    }

    /// Starts to consume a queue.
    ///
    /// # Errors
    /// `Broker` when the queue does not exist or is another's, or the broker does not answer within 30 s; `Disconnected` when
    /// it is gone.
    pub async fn consume(&self, queue: &str, mode: Mode) -> Result<Consumer, Error> {
        match self {
            Self::Memory(connection) => connection.consume(queue, mode),
            Self::Rabbit(connection) => connection.consume(queue, mode).await,
        }
    }

    /// The same, for as long as the broker takes.
    ///
    /// # Errors
    /// As [`Transport::consume`].
    pub async fn consume_however_long(&self, queue: &str, mode: Mode) -> Result<Consumer, Error> {
        match self {
            Self::Memory(connection) => connection.consume(queue, mode),
            Self::Rabbit(connection) => connection.consume_however_long(queue, mode).await,
        }
    }

    /// Takes one message out of a queue, to be settled; none when none is ready. One that was given back before, after
    /// this transport had got it, is ready. If the future is dropped, what it would have taken goes back.
    ///
    /// What is refused here touches nothing that is out of other queues.
    ///
    /// # Errors
    /// As [`Transport::consume`].
    pub async fn get(&self, queue: &str) -> Result<Option<Delivery>, Error> {
        match self {
            Self::Memory(connection) => connection.get(queue),
            Self::Rabbit(connection) => connection.get(queue).await,
        }
    }

    /// How many messages of a queue are ready, without those that are out unsettled; none when there is no such queue.
    /// What was settled a moment ago may be missing. What is out stays out, whatever the answer.
    ///
    /// # Errors
    /// `Broker` when the queue is another's, `Disconnected` when the broker is gone.
    pub async fn count(&self, queue: &str) -> Result<Option<u64>, Error> {
        match self {
            Self::Memory(connection) => connection.count(queue),
            Self::Rabbit(connection) => connection.count(queue).await,
        }
    }

    /// The user that this transport is to the broker, and that every message carries which it publishes. `None` where the
    /// broker has no users, or has not said yet: a client may hear it with its first publication only.
    #[must_use]
    pub fn user(&self) -> Option<&str> {
        match self {
            Self::Memory(connection) => connection.user(),
            Self::Rabbit(connection) => connection.user(),
        }
    }

    /// The broker's address, for people; none if it is in this process.
    pub(crate) fn broker(&self) -> Option<&str> {
        match self {
            Self::Memory(_) => None,
            Self::Rabbit(connection) => Some(connection.broker()),
        }
    }

    /// Why this transport's user cannot publish to queues, as replies do, if the broker has said so: a server's is asked
    /// when it connects.
    #[must_use]
    pub fn replies_refused(&self) -> Option<&str> {
        match self {
            Self::Memory(_) => None,
            Self::Rabbit(connection) => connection.replies_refused(),
        }
    }

    /// Why the broker takes no publications at this moment, if it does not: to be asked after [`Transport::events`].
    #[must_use]
    pub fn blocked(&self) -> Option<Arc<str>> {
        match self {
            Self::Memory(connection) => connection.blocked(),
            Self::Rabbit(connection) => connection.blocked(),
        }
    }

    /// What happens to the connection from now on.
    #[must_use]
    pub fn events(&self) -> broadcast::Receiver<Event> {
        match self {
            Self::Memory(connection) => connection.events(),
            Self::Rabbit(connection) => connection.events(),
        }
    }

    /// Closes the connection; unsettled deliveries go back to their queues.
    pub async fn close(&self) {
        match self {
            Self::Memory(connection) => connection.close(),
            Self::Rabbit(connection) => connection.close().await,
        }
    }
}

/// A message on its way to an exchange.
#[derive(Debug, Clone)]
pub struct Publication {
    /// Where to; the empty name is the default exchange, which sends to the queue that the key names.
    pub exchange: String,
    /// The routing key.
    pub key: String,
    /// Return it when no queue takes it.
    pub mandatory: bool,
    /// What the broker reads.
    pub properties: Properties,
    /// What it does not.
    pub body: Bytes,
}

impl Publication {
    /// One that nobody gets, on an exchange whose queues are bound by keys: the broker confirms it as soon as it reads it.
    pub(crate) fn to_nobody(exchange: String) -> Self {
        let (key, properties) = (String::new(), Properties::default());
        Self { exchange, key, mandatory: false, properties, body: Bytes::new() }
    }
}

/// The AMQP properties that Hopline uses.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Properties {
    /// The request's id, as text.
    pub correlation_id: Option<String>,
    /// The queue for replies.
    pub reply_to: Option<String>,
    /// Time in a queue after which the message is dropped or dead-lettered.
    pub expiration: Option<Duration>,
    /// What the message is: `service.v1.method`.
    pub kind: Option<String>,
    /// The media type of the body.
    pub content_type: Option<String>,
    /// Whether it survives a restart of the broker in a durable queue.
    pub persistent: bool,
    /// 0 to 9, higher first, in queues that distinguish priorities.
    pub priority: Option<u8>,
    /// The instance that sent it.
    pub app_id: Option<String>,
    /// The user who published it, as the broker has verified. The transport sets it to its own, whatever a publication
    /// says.
    pub user_id: Option<String>,
    /// Text headers; other types of header are not read.
    pub headers: Vec<(String, String)>,
}

/// What became of a publication.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Confirm {
    /// Some queue has it, or it was not mandatory.
    Accepted,
    /// Mandatory, and no queue takes it.
    Returned,
    /// A queue refused it, being full.
    Refused,
    /// The broker takes no messages over this size, in bytes; nothing has it.
    TooLarge(usize),
}

/// Why the broker has not said what became of a publication, and will not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lost {
    /// What was lost, and with it what is known of the message.
    pub loss: Loss,
    /// The broker's words, or what else ended it.
    pub reason: Arc<str>,
}

/// What was lost before the outcome of a publication was known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// The connection, before the message was handed over.
    Unsent,
    /// The connection; the message may have reached the broker.
    Connection,
    /// Only the channel, over somebody else's message. This one may have reached the broker, and can be published again.
    Channel,
    /// Only the channel, over this very message, which the broker refuses.
    Refused,
}

impl Lost {
    /// Of a connection that has ended.
    pub(crate) fn connection(handed_over: bool, reason: Arc<str>) -> Self {
        Self { loss: if handed_over { Loss::Connection } else { Loss::Unsent }, reason }
    }

    /// Whether the message may have reached the broker.
    #[must_use]
    pub fn may_have_arrived(&self) -> bool {
        matches!(self.loss, Loss::Connection | Loss::Channel)
    }

    /// Whether the connection lives on.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        matches!(self.loss, Loss::Channel | Loss::Refused)
    }
}

impl From<Lost> for Error {
    fn from(lost: Lost) -> Self {
        let (may_have_run, reason) = (lost.may_have_arrived(), lost.reason.to_string());
        match lost.loss {
            Loss::Refused => Self::Broker { operation: "take a message".to_owned(), reason },
            Loss::Unsent | Loss::Connection | Loss::Channel => {
                Self::Disconnected { method: None, may_have_run, reason }
            }
        }
    }
}

/// Resolves once the broker has said what became of a publication.
#[derive(Debug)]
pub struct Receipt(oneshot::Receiver<Result<Confirm, Lost>>);

impl Receipt {
    pub(crate) fn new() -> (oneshot::Sender<Result<Confirm, Lost>>, Self) {
        let (sender, receiver) = oneshot::channel();
        (sender, Self(receiver))
    }
}

impl Future for Receipt {
    type Output = Result<Confirm, Lost>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0)
            .poll(context)
            .map(|outcome| outcome.unwrap_or_else(|_| Err(Lost::connection(true, "the connection was closed".into()))))
    }
}

/// Whether the broker refuses something because of the user, by its words.
pub(crate) fn forbids(reason: &str) -> bool {
    reason.starts_with("ACCESS_REFUSED")
}

/// Whether the next of [`Transport::events`] is the last.
pub(crate) fn is_end(event: &Result<Event, RecvError>) -> bool {
    matches!(event, Ok(Event::Lost(_)) | Err(RecvError::Closed))
}

/// What happened to the connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The broker takes no publications for now, and why.
    Blocked(Arc<str>),
    /// It takes them again.
    Unblocked,
    /// The connection is gone, and why.
    Lost(Arc<str>),
}
