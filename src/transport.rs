//! The transport: what Hopline needs of a broker, and nothing else. There are two, RabbitMQ and a broker in this
//! process.
//!
//! It declares, publishes, consumes and tells what happens to the connection. A transport is never reconnected: when
//! its connection ends, it ends. It is public so that one test suite can hold both brokers to the same contract, and
//! not a part of the library's stable API.

mod address;
mod consuming;
mod dial;
pub mod memory;
mod publishing;
pub mod rabbit;
#[cfg(feature = "tls")]
mod tls;

use std::fmt;
use std::future::Future;
use std::sync::Arc;

use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;

pub use self::address::Account;
pub use self::consuming::{Consumer, ConsumerEnd, Death, Delivery, Mode, QueueCount, Settle, StreamStart};
pub(crate) use self::consuming::{Life, Settler, Stop};
pub use self::dial::Dial;
pub(crate) use self::dial::DialSettings;
pub(crate) use self::dial::{check_address, check_program_name, next_look_back, pause_before_next};
pub(crate) use self::publishing::ReceiptSender;
pub use self::publishing::{Confirm, Loss, Lost, Properties, Publication, Receipt};
pub(crate) use self::publishing::{forbids, is_down};
#[cfg(feature = "tls")]
pub use self::tls::Tls;
use crate::error::Error;
use crate::limits::ANSWER_TIMEOUT;
use crate::topology::{Binding, Declaration};

/// A connection to a broker.
#[derive(Debug, Clone)]
pub enum Transport {
    /// The broker in this process.
    Memory(memory::MemoryConnection),
    /// RabbitMQ.
    Rabbit(rabbit::RabbitConnection),
}

/// Who connects. Servers and operators publish and consume on different connections, so that a blocked publisher does
/// not hold up acks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Uses one connection for both.
    Client,
    /// Uses a connection to publish and one to consume.
    Server,
    /// The same as a server, for people who look after one.
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
    /// Connects to the broker at `url`, in the forms that [`Dial::parse`] reads.
    ///
    /// # Errors
    /// `Invalid` for an address that cannot be used, `Connect` if the broker does not answer or refuses.
    pub async fn connect(url: &str, role: Role) -> Result<Self, Error> {
        Dial::parse(url)?.connect(role).await
    }

    /// Stands in for a connection that will be opened later. It has ended, so everything that is asked of it fails.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub(crate) fn absent() -> Self {
        Self::Memory(memory::MemoryConnection::absent())
    }

    /// Declares each part in this order. Exclusive queues belong to the connection that consumes.
    ///
    /// # Errors
    /// `Mismatch` if something exists with other arguments. `Broker` for any other refusal, and if the broker does not
    /// answer within 30 s.
    pub async fn declare(&self, parts: &[Declaration]) -> Result<(), Error> {
        match self {
            Self::Memory(connection) => in_time("declare what it was asked to", connection.declare(parts)).await,
            Self::Rabbit(connection) => connection.declare(parts).await,
        }
    }

    /// The same without a time-out. About a queue whose node is down, the answer takes more than a minute.
    ///
    /// # Errors
    /// As [`Transport::declare`].
    pub async fn declare_however_long(&self, parts: &[Declaration]) -> Result<(), Error> {
        match self {
            Self::Memory(connection) => connection.declare(parts).await,
            Self::Rabbit(connection) => connection.declare_however_long(parts).await,
        }
    }

    /// Which of these exchanges do not exist. This has no time-out. An exchange that this user may not know of counts
    /// as existing.
    ///
    /// # Errors
    /// `Broker` for any other refusal, `Disconnected` if the connection is lost.
    pub async fn missing(&self, exchanges: &[String]) -> Result<Vec<String>, Error> {
        match self {
            Self::Memory(connection) => connection.missing(exchanges).await,
            Self::Rabbit(connection) => connection.missing(exchanges).await,
        }
    }

    /// Whether this exchange is known to exist: it was declared or found over this connection, and the broker has not said
    /// since that it is missing. It tells why a message came back.
    #[must_use]
    pub fn knows(&self, exchange: &str) -> bool {
        match self {
            Self::Memory(connection) => connection.knows(exchange),
            Self::Rabbit(connection) => connection.knows(exchange),
        }
    }

    /// Deletes bindings. When this returns, nothing more is routed by them. A binding that does not exist is no error.
    ///
    /// # Errors
    /// `Broker` for a refusal, `Disconnected` if the connection is lost.
    pub async fn unbind(&self, bindings: &[Binding]) -> Result<(), Error> {
        match self {
            Self::Memory(connection) => connection.unbind(bindings).await,
            Self::Rabbit(connection) => connection.unbind(bindings).await,
        }
    }

    /// Publishes a message, after those that were published before. The receipt tells the outcome.
    pub fn publish(&self, publication: Publication) -> Receipt {
        let (outcome, receipt) = Receipt::new();
        self.submit(publication, outcome);
        receipt
    }

    /// The same, where whoever publishes says to whom the outcome is told.
    pub(crate) fn submit(&self, publication: Publication, outcome: ReceiptSender) {
        match self {
            Self::Memory(connection) => connection.submit(publication, outcome),
            Self::Rabbit(connection) => connection.submit(publication, outcome),
        }
    }

    /// Publishes a message again and again until this future is dropped, without holding up others. Only a few of the
    /// messages are unconfirmed at any time.
    pub async fn repeat(&self, publication: Publication) {
        match self {
            Self::Memory(connection) => connection.repeat(publication).await,
            Self::Rabbit(connection) => connection.repeat(publication).await,
        }
    }

    /// How many queues can be consumed at once. `None`: there is no limit.
    #[must_use]
    pub fn max_consumers(&self) -> Option<usize> {
        match self {
            Self::Memory(_) => None,
            Self::Rabbit(connection) => Some(connection.max_consumers()),
        }
    }

    /// Begins to consume a queue.
    ///
    /// # Errors
    /// `Broker` if the queue does not exist or belongs to another connection, or if the broker does not answer within
    /// 30 s. `Disconnected` if the connection is lost.
    pub async fn consume(&self, queue: &str, mode: Mode) -> Result<Consumer, Error> {
        match self {
            Self::Memory(connection) => in_time("start a consumer", connection.consume(queue, mode)).await,
            Self::Rabbit(connection) => connection.consume(queue, mode).await,
        }
    }

    /// The same without a time-out.
    ///
    /// # Errors
    /// As [`Transport::consume`].
    pub async fn consume_however_long(&self, queue: &str, mode: Mode) -> Result<Consumer, Error> {
        match self {
            Self::Memory(connection) => connection.consume(queue, mode).await,
            Self::Rabbit(connection) => connection.consume_however_long(queue, mode).await,
        }
    }

    /// Takes one message out of a queue, which then has to be settled. `None` if none is ready. If the future is
    /// dropped, the message is requeued.
    ///
    /// A message that this transport has requeued is ready again. If the broker refuses, messages that were taken out
    /// of other queues are not affected.
    ///
    /// # Errors
    /// As [`Transport::consume`].
    pub async fn get(&self, queue: &str) -> Result<Option<Delivery>, Error> {
        match self {
            Self::Memory(connection) => connection.get(queue).await,
            Self::Rabbit(connection) => connection.get(queue).await,
        }
    }

    /// How many messages of a queue are ready, without those that are delivered and not settled. `None` if there is no
    /// such queue. A message that was requeued a moment ago may be missing.
    ///
    /// # Errors
    /// `Broker` if the queue belongs to another connection, `Disconnected` if the connection is lost.
    pub async fn count(&self, queue: &str) -> Result<Option<u64>, Error> {
        Ok(self.look_at(queue).await?.map(|count| count.waiting))
    }

    /// How many messages of a queue are ready, as [`count`](Self::count) says, and how many consumers it has. `None` if
    /// there is no such queue.
    ///
    /// # Errors
    /// As [`count`](Self::count).
    pub async fn look_at(&self, queue: &str) -> Result<Option<QueueCount>, Error> {
        match self {
            Self::Memory(connection) => connection.count(queue).await,
            Self::Rabbit(connection) => connection.count(queue).await,
        }
    }

    /// Deletes a queue with all its messages, bindings and consumers. Returns how many messages were ready, as
    /// [`count`](Self::count) says. `None` if there was no such queue.
    ///
    /// # Errors
    /// `Broker` if the queue belongs to another connection, if this user may not delete it, or if the broker does not
    /// answer within 30 s. `Disconnected` if the connection is lost.
    pub async fn delete(&self, queue: &str) -> Result<Option<u64>, Error> {
        match self {
            Self::Memory(connection) => in_time("delete a queue", connection.delete(queue)).await,
            Self::Rabbit(connection) => connection.delete(queue).await,
        }
    }

    /// The [offset](Delivery::offset) of a stream's last message, or of one that was written meanwhile. `None` if
    /// nothing was ever written to it, which takes a second to find out over RabbitMQ.
    ///
    /// While a stream is not ready, as after a restart, RabbitMQ ends the connection of who asks for it.
    ///
    /// # Errors
    /// As [`Transport::consume`].
    pub async fn last_offset(&self, stream: &str) -> Result<Option<u64>, Error> {
        match self {
            Self::Memory(connection) => in_time("find the end of a stream", connection.last_offset(stream)).await,
            Self::Rabbit(connection) => connection.last_offset(stream).await,
        }
    }

    /// The user of this transport, whose name every published message carries. `None` if the broker has no users, or
    /// was not asked yet: a client asks with its first publication.
    #[must_use]
    pub fn user(&self) -> Option<&str> {
        match self {
            Self::Memory(connection) => connection.user(),
            Self::Rabbit(connection) => connection.user(),
        }
    }

    /// The broker's address, for logs and errors. `None` for a broker in this process.
    pub(crate) fn broker(&self) -> Option<&str> {
        match self {
            Self::Memory(_) => None,
            Self::Rabbit(connection) => Some(connection.broker()),
        }
    }

    /// Why this user may not publish to queues, as replies do, if the broker has said so. A server asks when it
    /// connects.
    #[must_use]
    pub fn replies_refused(&self) -> Option<&str> {
        match self {
            Self::Memory(_) => None,
            Self::Rabbit(connection) => connection.replies_refused(),
        }
    }

    /// The broker's reason, while it accepts no messages. To miss nothing, call [`Transport::events`] first.
    #[must_use]
    pub fn blocked(&self) -> Option<Arc<str>> {
        match self {
            Self::Memory(connection) => connection.blocked(),
            Self::Rabbit(connection) => connection.blocked(),
        }
    }

    /// Tells what happens to the connection from now on.
    #[must_use]
    pub fn events(&self) -> broadcast::Receiver<ConnectionEvent> {
        match self {
            Self::Memory(connection) => connection.events(),
            Self::Rabbit(connection) => connection.events(),
        }
    }

    /// Closes the connection. Deliveries that are not settled are requeued.
    pub async fn close(&self) {
        match self {
            Self::Memory(connection) => connection.close(),
            Self::Rabbit(connection) => connection.close().await,
        }
    }
}

/// Waits for the broker in memory, which may take too long if a test says so.
async fn in_time<T>(operation: &str, answer: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    tokio::time::timeout(ANSWER_TIMEOUT, answer).await.unwrap_or_else(|_| Err(Error::silent(operation, ANSWER_TIMEOUT)))
}

/// Whether this is the last of [`Transport::events`].
pub(crate) fn is_end(event: &Result<ConnectionEvent, RecvError>) -> bool {
    matches!(event, Ok(ConnectionEvent::Lost(_)) | Err(RecvError::Closed))
}

/// Something that happened to the connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConnectionEvent {
    /// The broker accepts no messages for now, for this reason.
    Blocked(Arc<str>),
    /// It accepts messages again.
    Unblocked,
    /// The connection is lost, for this reason.
    Lost(Arc<str>),
}
