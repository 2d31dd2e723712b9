//! Consuming: how messages come out of a queue, how each is settled, and how a consumer ends.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{Properties, memory};

/// How a queue is consumed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Each delivery has to be settled. At most `prefetch` of them are unsettled at once; 0 counts as 1.
    Settle {
        /// A number of messages.
        prefetch: u16,
    },
    /// The same, but a delivery may stay unsettled for any time, whatever the broker's `consumer_timeout` is. For
    /// quorum queues only, from RabbitMQ 3.11.15 on.
    SettleAnyTime {
        /// A number of messages.
        prefetch: u16,
    },
    /// Deliveries count as acknowledged when the broker sends them.
    NoAck,
    /// The messages of a stream, which stay in it. They are acknowledged, in any order, to make room for further ones.
    Stream {
        /// The first of them.
        from: StreamStart,
        /// A number of messages. RabbitMQ 3 sends messages that were written together as a whole, even if they are more.
        prefetch: u16,
    },
}

/// Where a consumer of a stream begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StreamStart {
    /// At the oldest message.
    First,
    /// At the last messages that were written together, often one. If there are none, at the next message.
    Last,
    /// At the message with this [offset](Delivery::offset). If that is deleted, at the oldest message. If it is not
    /// written yet, at it: what is written before is left out.
    Offset(u64),
    /// At the first message that was written at this time or later. RabbitMQ counts in whole seconds, and may deliver
    /// some earlier messages first, which were written together with that one. If nothing was written since, at the next
    /// message, whenever that is written.
    Time(SystemTime),
}

impl Mode {
    /// How many deliveries may be out at once, if they are settled.
    pub(crate) fn prefetch(self) -> Option<u16> {
        match self {
            Self::Settle { prefetch } | Self::SettleAnyTime { prefetch } | Self::Stream { prefetch, .. } => {
                Some(prefetch.max(1))
            }
            Self::NoAck => None,
        }
    }
}

/// How much is in a queue.
///
/// ```
/// # fn example(queues: hopline::ServiceQueues) {
/// if let Some(hopline::QueueCount { waiting, consumers: 0 }) = queues.calls {
///     println!("{waiting} calls wait, and nobody reads them");
/// }
/// # }
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct QueueCount {
    /// Messages that are ready, without those that are delivered and not settled. Several calls may share a message.
    pub waiting: u64,
    /// Consumers.
    pub consumers: u32,
}

/// How a consumer settles a delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Settle {
    /// Acknowledged: the broker deletes the message.
    Ack,
    /// Requeued without having been tried (`basic.nack`).
    GiveBack,
    /// Requeued after an attempt that has failed, which the queue counts (`basic.reject` with requeue).
    Failed,
    /// Rejected: the broker drops the message, or makes it a dead letter (`basic.reject`).
    Discard,
}

/// Why a consumer has ended that was not cancelled here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConsumerEnd {
    /// The broker has ended this consumer only: its queue was deleted or has crashed.
    Cancelled,
    /// The broker has closed the channel, with these words.
    Channel(Arc<str>),
    /// The broker has closed the channel, since a delivery was not settled within this time, its `consumer_timeout`.
    TimedOut(Duration),
    /// The connection has ended.
    Connection,
}

/// The life of a consumer. The consumer and its deliveries share it.
#[derive(Debug, Default)]
pub(crate) struct Life {
    ended: CancellationToken,
    end: OnceLock<ConsumerEnd>,
}

impl Life {
    /// The consumer has ended for this reason. Deliveries that came before may still have to be read.
    pub(crate) fn end(&self, end: ConsumerEnd) {
        // Only the first reason counts.
        let _ = self.end.set(end);
        self.ended.cancel();
    }

    /// The consumer has ended, since it was cancelled here.
    pub(crate) fn finish(&self) {
        self.ended.cancel();
    }

    /// A guard of the reader. The consumer ends when it is dropped.
    pub(crate) fn reader(&self) -> DropGuard {
        self.ended.clone().drop_guard()
    }

    /// Waits until the consumer has ended. Returns the reason, unless it was cancelled here.
    pub(crate) async fn ended(&self) -> Option<&ConsumerEnd> {
        self.ended.cancelled().await;
        self.end.get()
    }

    /// Whether the broker has requeued everything that was not settled. It delivers that again, to any consumer.
    pub(crate) fn took_back(&self) -> bool {
        matches!(self.end.get(), Some(ConsumerEnd::Channel(_) | ConsumerEnd::TimedOut(_) | ConsumerEnd::Connection))
    }
}

/// When a consumer is cancelled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stop {
    /// At once.
    Now,
    /// When the prefetch is full, or after 2 s.
    Full,
}

/// A consumer: the deliveries of one queue, in order.
#[derive(Debug)]
pub struct Consumer {
    pub(crate) deliveries: mpsc::UnboundedReceiver<Delivery>,
    /// Cancels the consumer. `None` after that.
    pub(crate) cancel: Option<oneshot::Sender<Stop>>,
    pub(crate) life: Arc<Life>,
}

impl Consumer {
    /// The next delivery. `None` when the queue or the connection is gone, or after [`Consumer::cancel`].
    pub async fn next(&mut self) -> Option<Delivery> {
        self.deliveries.recv().await
    }

    /// The next delivery, if it has arrived already.
    pub(crate) fn try_next(&mut self) -> Option<Delivery> {
        self.deliveries.try_recv().ok()
    }

    /// Asks the broker for no more deliveries. [`Consumer::next`] still returns those that were prefetched, then
    /// `None`.
    pub fn cancel(&mut self) {
        self.stop(Stop::Now);
    }

    /// Cancels the consumer of a quorum queue when its prefetch is full, or after 2 s. Until then the broker is not
    /// told what was settled.
    ///
    /// When a consumer is cancelled, a quorum queue requeues messages that are on their way to it, and counts them as
    /// delivered. No message is on its way to a full consumer.
    pub fn cancel_when_full(&mut self) {
        self.stop(Stop::Full);
    }

    fn stop(&mut self, stop: Stop) {
        if let Some(cancel) = self.cancel.take() {
            // An error means that the connection has ended, so there is nothing to cancel.
            let _ = cancel.send(stop);
        }
    }

    /// Waits until the consumer has ended. Returns the reason, unless it was cancelled here.
    pub async fn ended(&self) -> Option<ConsumerEnd> {
        self.life.ended().await.cloned()
    }
}

impl Drop for Consumer {
    /// Requeues deliveries that nobody has read.
    fn drop(&mut self) {
        self.deliveries.close();
        while let Ok(delivery) = self.deliveries.try_recv() {
            delivery.settle(Settle::GiveBack);
        }
    }
}

/// A message that was delivered from a queue.
#[derive(Debug)]
pub struct Delivery {
    /// The message's body.
    pub body: Bytes,
    /// The message's properties.
    pub properties: Properties,
    /// The exchange that it was published to.
    pub exchange: String,
    /// The key that it was published with.
    pub key: String,
    /// Whether it was delivered before.
    pub redelivered: bool,
    /// How many deliveries of it have failed before. Only quorum queues count this; it is 0 for others. RabbitMQ before
    /// 4.0 also counts requeued deliveries.
    pub failures: u32,
    /// How it became a dead letter, if the broker made it one.
    pub death: Option<Death>,
    /// Where it is in its stream: the first message that was written there has 0, and each further one the next number.
    /// `None` if it does not come from a stream.
    pub offset: Option<u64>,
    /// When it arrived here.
    pub(crate) received: Instant,
    /// How it is settled. `None` in the mode [`Mode::NoAck`].
    pub(crate) settler: Option<Settler>,
}

/// How the broker made a message a dead letter, the last time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Death {
    /// RabbitMQ's word: `delivery_limit`, `rejected`, `expired` or `maxlen`.
    pub reason: String,
    /// The queue that has given it up.
    pub queue: String,
    /// When, in seconds since 1970, by the broker's clock.
    pub at: u64,
}

/// Carries a settlement back to where the delivery came from.
#[derive(Debug)]
pub(crate) enum Settler {
    /// To the task of the channel.
    Channel { tag: u64, channel: mpsc::UnboundedSender<(u64, Settle)>, life: Arc<Life> },
    /// To the broker in this process.
    Memory(memory::Pull),
}

impl Settler {
    /// Settles the delivery that it came with.
    pub(crate) fn settle(self, settle: Settle) {
        match self {
            // If the channel is gone, the broker has requeued its deliveries already.
            Self::Channel { tag, channel, .. } => _ = channel.send((tag, settle)),
            Self::Memory(pull) => pull.settle(settle),
        }
    }
}

impl Delivery {
    /// The life of the consumer that got it. `None` if it need not be settled.
    pub(crate) fn life(&self) -> Option<&Arc<Life>> {
        match &self.settler {
            Some(Settler::Channel { life, .. }) => Some(life),
            Some(Settler::Memory(_)) | None => None,
        }
    }

    /// Whether the broker has requeued it, since it was not settled when its channel or connection ended. The broker
    /// delivers it again.
    #[must_use]
    pub fn is_taken_back(&self) -> bool {
        self.life().is_some_and(|life| life.took_back())
    }

    /// Settles the delivery. This does nothing in the mode [`Mode::NoAck`]. A delivery that is dropped without being
    /// settled stays delivered until its connection ends.
    pub fn settle(self, settle: Settle) {
        if let Some(settler) = self.settler {
            settler.settle(settle);
        }
    }
}
