//! The port to a broker: declare, unbind, publish, consume, get, settle, events, close; and the address that picks the broker.
//!
//! Not part of the library's stable API: it is public so that one suite can hold every broker to the same contract.

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
use std::time::Duration;

use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;

pub use self::consuming::{Consumer, ConsumerEnd, Death, Delivery, Mode, Settle};
pub(crate) use self::consuming::{Life, Settler, Stop};
pub use self::dial::Dial;
pub(crate) use self::dial::DialSettings;
pub(crate) use self::dial::{next_look_back, pause_before_next};
pub(crate) use self::publishing::forbids;
pub use self::publishing::{Confirm, Loss, Lost, Properties, Publication, Receipt};
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
            Self::Memory(connection) => in_time("declare what it was asked to", connection.declare(parts)).await,
            Self::Rabbit(connection) => connection.declare(parts).await,
        }
    }

    /// The same, for as long as the broker takes, which is more than a minute for a queue whose node is away.
    ///
    /// # Errors
    /// As [`Transport::declare`].
    pub async fn declare_however_long(&self, parts: &[Declaration]) -> Result<(), Error> {
        match self {
            Self::Memory(connection) => connection.declare(parts).await,
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
            Self::Memory(connection) => connection.missing(exchanges).await,
            Self::Rabbit(connection) => connection.missing(exchanges).await,
        }
    }

    /// Takes bindings away: when this returns, nothing more is routed by them. One that is not there is fine.
    ///
    /// # Errors
    /// `Broker` for a refusal, `Disconnected` when the broker is gone.
    pub async fn unbind(&self, bindings: &[Binding]) -> Result<(), Error> {
        match self {
            Self::Memory(connection) => connection.unbind(bindings).await,
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
            Self::Memory(connection) => in_time("start a consumer", connection.consume(queue, mode)).await,
            Self::Rabbit(connection) => connection.consume(queue, mode).await,
        }
    }

    /// The same, for as long as the broker takes.
    ///
    /// # Errors
    /// As [`Transport::consume`].
    pub async fn consume_however_long(&self, queue: &str, mode: Mode) -> Result<Consumer, Error> {
        match self {
            Self::Memory(connection) => connection.consume(queue, mode).await,
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
            Self::Memory(connection) => connection.get(queue).await,
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
            Self::Memory(connection) => connection.count(queue).await,
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

/// What the broker in memory answers, unless a test has it take too long.
async fn in_time<T>(operation: &str, answer: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    let silent = |_| {
        let reason = format!("it gave no answer within {ANSWER_TIMEOUT:?}");
        Err(Error::Broker { operation: operation.to_owned(), reason })
    };
    tokio::time::timeout(ANSWER_TIMEOUT, answer).await.unwrap_or_else(silent)
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
