//! Messages that go to an exchange, and what becomes of each.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::oneshot;

use crate::error::Error;

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
