//! Messages to be published, and the outcome of each.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};

use crate::error::Error;

/// A message to be published.
#[derive(Debug, Clone)]
pub struct Publication {
    /// The exchange. The empty name is the default exchange, which routes to the queue with the name of the key.
    pub exchange: String,
    /// The routing key.
    pub key: String,
    /// Whether the broker returns the message if no queue gets it.
    pub mandatory: bool,
    /// The properties, which the broker reads.
    pub properties: Properties,
    /// The body, which it does not read.
    pub body: Bytes,
}

impl Publication {
    /// A message that no queue gets. `exchange` must route by keys. The broker confirms it as soon as it has read it.
    pub(crate) fn to_nobody(exchange: String) -> Self {
        let (key, properties) = (String::new(), Properties::default());
        Self { exchange, key, mandatory: false, properties, body: Bytes::new() }
    }
}

/// The AMQP properties that Hopline uses.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Properties {
    /// The request's id as text.
    pub correlation_id: Option<String>,
    /// The queue for replies.
    pub reply_to: Option<String>,
    /// The time in a queue after which the broker drops the message or makes it a dead letter.
    pub expiration: Option<Duration>,
    /// The AMQP `type`: what the message is, as `service.v1.method`.
    pub kind: Option<String>,
    /// The media type of the body.
    pub content_type: Option<String>,
    /// Whether a durable queue writes it to disk, so that it survives a restart of the broker.
    pub persistent: bool,
    /// 0 to 9. In queues with priorities, a higher one is delivered first.
    pub priority: Option<u8>,
    /// The instance that has published it.
    pub app_id: Option<String>,
    /// The user who has published it, verified by the broker. The transport sets it when it publishes, whatever is in
    /// the publication.
    pub user_id: Option<String>,
    /// Headers that are text. Others are not read.
    pub headers: Vec<(String, String)>,
}

/// The outcome of a publication.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Confirm {
    /// A queue has it, or it was not mandatory.
    Accepted,
    /// It was mandatory, and no queue gets it.
    Returned,
    /// A queue has refused it, since it is full.
    Refused,
    /// The broker accepts no messages over this size, in bytes. No queue has it.
    TooLarge(usize),
}

/// The outcome of a publication is not known, and never will be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lost {
    /// What was lost. It tells whether the message may have arrived.
    pub loss: Loss,
    /// The broker's words, or another reason.
    pub reason: Arc<str>,
}

/// What was lost before the outcome of a publication was known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// The connection, before the message was sent.
    Unsent,
    /// The connection. The message may have arrived.
    Connection,
    /// Only the channel, because of another message. This one may have arrived, and can be published again.
    Channel,
    /// Only the channel, because of this message, which the broker refuses.
    Refused,
}

impl Lost {
    /// The loss of a connection. `handed_over` tells whether the message may have been sent.
    pub(crate) fn connection(handed_over: bool, reason: Arc<str>) -> Self {
        Self { loss: if handed_over { Loss::Connection } else { Loss::Unsent }, reason }
    }

    /// Whether the message may have arrived at the broker.
    #[must_use]
    pub fn may_have_arrived(&self) -> bool {
        matches!(self.loss, Loss::Connection | Loss::Channel)
    }

    /// Whether the connection is still there.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        matches!(self.loss, Loss::Channel | Loss::Refused)
    }
}

impl From<Lost> for Error {
    fn from(lost: Lost) -> Self {
        let (may_have_run, reason) = (lost.may_have_arrived(), lost.reason.to_string());
        match lost.loss {
            Loss::Refused => Self::refused("take a message", reason),
            Loss::Unsent | Loss::Connection | Loss::Channel => {
                Self::Disconnected { method: None, may_have_run, reason }
            }
        }
    }
}

/// Resolves with the outcome of a publication.
#[derive(Debug)]
pub struct Receipt(oneshot::Receiver<Result<Confirm, Lost>>);

impl Receipt {
    pub(crate) fn new() -> (ReceiptSender, Self) {
        let (sender, receiver) = oneshot::channel();
        (ReceiptSender(Some(ReceiptListener::Receipt(sender))), Self(receiver))
    }
}

/// Where the outcome of a publication is told. If this is dropped before, the connection was closed.
#[derive(Debug)]
pub(crate) struct ReceiptSender(Option<ReceiptListener>);

/// Who waits for an outcome.
#[derive(Debug)]
enum ReceiptListener {
    Receipt(oneshot::Sender<Result<Confirm, Lost>>),
    /// Who publishes many, and tells them apart by numbers.
    Numbered(u64, mpsc::UnboundedSender<(u64, Result<Confirm, Lost>)>),
}

impl ReceiptSender {
    /// The outcome is sent to `listener`, with this number.
    pub(crate) fn numbered(number: u64, listener: mpsc::UnboundedSender<(u64, Result<Confirm, Lost>)>) -> Self {
        Self(Some(ReceiptListener::Numbered(number, listener)))
    }

    /// Tells the outcome. It does not matter if nobody waits for it.
    pub(crate) fn tell(mut self, outcome: Result<Confirm, Lost>) {
        self.tell_once(outcome);
    }

    fn tell_once(&mut self, outcome: Result<Confirm, Lost>) {
        match self.0.take() {
            Some(ReceiptListener::Receipt(receipt)) => _ = receipt.send(outcome),
            Some(ReceiptListener::Numbered(number, listener)) => _ = listener.send((number, outcome)),
            None => {}
        }
    }
}

impl Drop for ReceiptSender {
    fn drop(&mut self) {
        if self.0.is_some() {
            self.tell_once(untold());
        }
    }
}

impl Future for Receipt {
    type Output = Result<Confirm, Lost>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(context).map(|outcome| outcome.unwrap_or_else(|_| untold()))
    }
}

/// The outcome of a publication of which nobody has told it.
fn untold() -> Result<Confirm, Lost> {
    Err(Lost::connection(true, "the connection was closed".into()))
}

/// Whether these words of the broker mean that the node of a queue is down, or is just starting.
pub(crate) fn is_down(reason: &str) -> bool {
    reason.starts_with("NOT_FOUND") && reason.contains("is down or inaccessible")
}

/// Whether these words of the broker mean that the user lacks a permission.
pub(crate) fn forbids(reason: &str) -> bool {
    reason.starts_with("ACCESS_REFUSED")
}
