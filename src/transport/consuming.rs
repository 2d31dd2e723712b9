//! Messages that come out of a queue: how it is consumed, what is said of each delivery, and how that ends.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{Properties, memory};

/// How a queue is consumed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Each delivery is settled; at most this many are out at once, no fewer than 1.
    Settle {
        /// Messages.
        prefetch: u16,
    },
    /// The same, and settling may take as long as it takes, whatever the broker's `consumer_timeout` is: for quorum queues
    /// alone, of which RabbitMQ from 3.11.15 on takes this of each consumer.
    SettleAnyTime {
        /// Messages.
        prefetch: u16,
    },
    /// Deliveries count as acked when they leave the broker.
    NoAck,
}

impl Mode {
    /// How many deliveries may be out at once, if they are settled.
    pub(crate) fn prefetch(self) -> Option<u16> {
        match self {
            Self::Settle { prefetch } | Self::SettleAnyTime { prefetch } => Some(prefetch.max(1)),
            Self::NoAck => None,
        }
    }
}

/// What the consumer says of a delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Settle {
    /// Done with it.
    Ack,
    /// Not tried: back to the queue (`basic.nack`).
    GiveBack,
    /// An attempt failed: back to the queue, and counted (`basic.reject` with requeue).
    Failed,
    /// Not wanted: dropped or dead-lettered (`basic.reject`).
    Discard,
}

/// Why nothing more comes of a queue, though nobody here wanted that.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConsumerEnd {
    /// The broker ended the consumer alone: its queue was deleted, or crashed.
    Cancelled,
    /// The broker closed the channel, in these words.
    Channel(Arc<str>),
    /// The broker closed the channel, since a delivery was not settled within this time: its `consumer_timeout`.
    TimedOut(Duration),
    /// The connection ended.
    Connection,
}

/// The life of a consumer, as it and its deliveries see it.
#[derive(Debug, Default)]
pub(crate) struct Life {
    ended: CancellationToken,
    end: OnceLock<ConsumerEnd>,
}

impl Life {
    /// Nothing more comes, for this reason, though some of what came before may still have to be read.
    pub(crate) fn end(&self, end: ConsumerEnd) {
        // The first reason is the one that counts.
        let _ = self.end.set(end);
        self.ended.cancel();
    }

    /// Nothing more comes, as was wanted.
    pub(crate) fn finish(&self) {
        self.ended.cancel();
    }

    /// When this is dropped, nobody reads any more.
    pub(crate) fn reader(&self) -> DropGuard {
        self.ended.clone().drop_guard()
    }

    /// Waits until nothing more comes; tells why, if nobody here wanted that.
    pub(crate) async fn ended(&self) -> Option<&ConsumerEnd> {
        self.ended.cancelled().await;
        self.end.get()
    }

    /// Whether the broker has taken back what was not settled: it delivers that again, to whomever.
    pub(crate) fn took_back(&self) -> bool {
        matches!(self.end.get(), Some(ConsumerEnd::Channel(_) | ConsumerEnd::TimedOut(_) | ConsumerEnd::Connection))
    }
}

/// When a consumer is cancelled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stop {
    Now,
    /// Once the broker has sent it as many messages as may be out at once, or is too late with them.
    Full,
}

/// Deliveries of one queue, in order.
#[derive(Debug)]
pub struct Consumer {
    pub(crate) deliveries: mpsc::UnboundedReceiver<Delivery>,
    /// Told once that no more deliveries are wanted.
    pub(crate) cancel: Option<oneshot::Sender<Stop>>,
    pub(crate) life: Arc<Life>,
}

impl Consumer {
    /// The next delivery; `None` when the queue or the connection is gone, or after [`Consumer::cancel`].
    pub async fn next(&mut self) -> Option<Delivery> {
        self.deliveries.recv().await
    }

    /// A delivery that is there already.
    pub(crate) fn try_next(&mut self) -> Option<Delivery> {
        self.deliveries.try_recv().ok()
    }

    /// Asks for no more; what was prefetched still comes out of [`Consumer::next`], then `None`.
    pub fn cancel(&mut self) {
        self.stop(Stop::Now);
    }

    /// Asks for no more of a quorum queue once as many deliveries are out as may be: the broker is not told before what has
    /// been settled. A message that is on its way to a consumer as that is cancelled goes back to its queue, and counts as
    /// delivered; to a consumer that is full, none is on its way. After 2 s it is cancelled all the same.
    pub fn cancel_when_full(&mut self) {
        self.stop(Stop::Full);
    }

    fn stop(&mut self, stop: Stop) {
        if let Some(cancel) = self.cancel.take() {
            // The other end is gone when the connection is: there is nothing left to cancel then.
            let _ = cancel.send(stop);
        }
    }

    /// Waits until nothing more comes; tells why, if nobody here wanted that.
    pub async fn ended(&self) -> Option<ConsumerEnd> {
        self.life.ended().await.cloned()
    }
}

impl Drop for Consumer {
    /// Gives back what was not handed out.
    fn drop(&mut self) {
        self.deliveries.close();
        while let Ok(delivery) = self.deliveries.try_recv() {
            delivery.settle(Settle::GiveBack);
        }
    }
}

/// A message from a queue.
#[derive(Debug)]
pub struct Delivery {
    /// The message's body.
    pub body: Bytes,
    /// The message's properties.
    pub properties: Properties,
    /// The exchange it was published to.
    pub exchange: String,
    /// The key it was published with.
    pub key: String,
    /// Whether it was delivered before.
    pub redelivered: bool,
    /// How many deliveries of it have failed before, as quorum queues count them; 0 from other queues. RabbitMQ before
    /// 4.0 counts what was given back too.
    pub failures: u32,
    /// How it came to a queue of dead letters, if the broker brought it there.
    pub death: Option<Death>,
    /// When it left the broker.
    pub(crate) received: Instant,
    pub(crate) settler: Option<Settler>,
}

/// How the broker dead-lettered a message, most recently.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Death {
    /// RabbitMQ's word: `delivery_limit`, `rejected`, `expired` or `maxlen`.
    pub reason: String,
    /// The queue that gave up on it.
    pub queue: String,
    /// When, in seconds since 1970, by the broker's clock.
    pub at: u64,
}

/// Carries what is said of a delivery back to the channel it came from.
#[derive(Debug)]
pub(crate) enum Settler {
    /// By way of the channel's task.
    Channel { tag: u64, channel: mpsc::UnboundedSender<(u64, Settle)>, life: Arc<Life> },
    /// At once, in the broker of this process.
    Memory(memory::Pull),
}

impl Delivery {
    /// The life of the consumer that it came to, if it is to be settled.
    pub(crate) fn life(&self) -> Option<&Arc<Life>> {
        match &self.settler {
            Some(Settler::Channel { life, .. }) => Some(life),
            Some(Settler::Memory(_)) | None => None,
        }
    }

    /// Whether the broker has taken it back, being unsettled, and delivers it again.
    #[must_use]
    pub fn is_taken_back(&self) -> bool {
        self.life().is_some_and(|life| life.took_back())
    }

    /// Settles the delivery; nothing to do for one of [`Mode::NoAck`]. A delivery dropped unsettled stays out until its
    /// connection ends.
    pub fn settle(self, settle: Settle) {
        match self.settler {
            // A channel that is gone has given its deliveries back already.
            Some(Settler::Channel { tag, channel, .. }) => _ = channel.send((tag, settle)),
            Some(Settler::Memory(pull)) => pull.settle(settle),
            None => {}
        }
    }
}
