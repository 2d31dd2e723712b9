//! The task of one consumer: deliveries come from the broker, and settlements go there.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::{FutureExt as _, StreamExt as _};
use lapin::options::{BasicCancelOptions, BasicConsumeOptions, BasicQosOptions};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::acks::Acks;
use super::connection::{Link, Refusal};
use super::wire::{Arrived, Sink};
use super::words::{self, end_of_channel};
use super::{declare, stream};
use crate::limits::ANSWER_TIMEOUT;
use crate::transport::{Consumer, ConsumerEnd, Delivery, Life, Mode, Settle, Settler, Stop};

/// The most settled deliveries that are taken at once.
const BATCH: usize = 256;
/// How long an ack may wait for others, to be sent in one frame with them.
const ACK_WITHIN: Duration = Duration::from_millis(10);
/// Acks do not wait when they make up this part of the prefetch (a quarter), since each of them still takes up a place
/// of it.
const ACKS_OF_PREFETCH: usize = 4;
/// How long [`Stop::Full`] waits until the prefetch is full.
const FULL_WITHIN: Duration = Duration::from_secs(2);
/// The `consumer_timeout` that consumers ask for, in milliseconds. A delivery that is not acknowledged in this time
/// costs its channel, and RabbitMQ's default of 30 minutes is too short for long handlers. This is nearly the longest
/// time that the broker's timers can count.
const CONSUMER_TIMEOUT_MS: i64 = 40 * 24 * 3_600_000;

/// The task of one consumer. The wire passes deliveries to the consumer. The task passes settlements to the broker, and
/// sees the consumer's end.
pub(super) struct Feed {
    /// Tells the deliveries whether they can still be settled.
    life: Arc<Life>,
    link: Arc<Link>,
    channel: lapin::Channel,
    /// lapin's consumer. It gets no deliveries, and ends with the consumer.
    stream: lapin::Consumer,
    /// Where the consumer gets the deliveries.
    deliver: mpsc::UnboundedSender<Delivery>,
    /// How the consumer has settled deliveries, by their tags.
    settled: mpsc::UnboundedReceiver<(u64, Settle)>,
    arrivals: Arc<Arrivals>,
    acks: Acks,
    /// So many acks do not wait for more.
    acks_at_once: usize,
    /// How many deliveries may be unsettled at once.
    prefetch: usize,
    /// Whether deliveries have to be settled.
    settles: bool,
    /// A stream keeps its messages, and takes none back: RabbitMQ 3 ends the connection of who tries to give it one.
    is_stream: bool,
}

/// What the task knows of the deliveries that the wire has passed to the consumer.
#[derive(Debug, Default)]
struct Arrivals {
    /// The tag of the last delivery. The broker counts them from 1.
    last: AtomicU64,
    /// Tells that there are more.
    more: Notify,
}

impl Feed {
    /// Begins to consume, on a channel of its own.
    pub(super) async fn open(
        link: Arc<Link>,
        queue: ShortString,
        mode: Mode,
    ) -> Result<(Consumer, Self, oneshot::Receiver<Stop>), Refusal> {
        let channel = link.channel().await?;
        if let Some(prefetch) = mode.prefetch() {
            link.hear(channel.basic_qos(prefetch, BasicQosOptions { global: false })).await?;
        }
        let (deliver, deliveries) = mpsc::unbounded_channel();
        let (settler, settled) = mpsc::unbounded_channel();
        let (life, arrivals) = (Arc::new(Life::default()), Arc::new(Arrivals::default()));
        let settles = mode != Mode::NoAck;
        let is_stream = matches!(mode, Mode::Stream { .. });
        let sink = sink((deliver.clone(), is_stream), settles.then_some(settler), life.clone(), arrivals.clone());
        link.wire().consume(channel.id(), sink);
        let options = BasicConsumeOptions { no_ack: !settles, ..BasicConsumeOptions::default() };
        let stream = link.hear(channel.basic_consume(queue, "".into(), options, arguments(mode))).await?;
        let (cancel, cancelled) = oneshot::channel();
        let prefetch = usize::from(mode.prefetch().unwrap_or_default());
        let acks_at_once = (prefetch / ACKS_OF_PREFETCH).max(1);
        let consumer = Consumer { deliveries, cancel: Some(cancel), life: life.clone() };
        let feed = Self {
            life,
            link,
            channel,
            stream,
            deliver,
            settled,
            arrivals,
            acks: Acks::default(),
            acks_at_once,
            prefetch,
            settles,
            is_stream,
        };
        Ok((consumer, feed, cancelled))
    }

    /// Runs until the consumer has ended and its deliveries are settled or dropped, or until the connection ends or is
    /// closed.
    pub(super) async fn run(mut self, cancelled: oneshot::Receiver<Stop>, closing: CancellationToken) {
        let link = self.link.clone();
        tokio::select! {
            () = self.deliver_and_settle(cancelled) => {}
            () = closing.cancelled() => self.settle_what_waits(),
            reason = link.end() => {
                debug!(queue = %self.stream.queue(), %reason, "a consumer ends with its connection");
                self.life.end(ConsumerEnd::Connection);
                return self.link.wire().stop_consuming(self.channel.id());
            }
        }
        // The consumer sees its end first. Closing the channel then requeues what was not settled.
        let Self { channel, stream, deliver, .. } = self;
        link.wire().stop_consuming(channel.id());
        drop(deliver);
        declare::close(&link, &channel).await;
        drop(stream);
    }

    /// The work of the task, until the consumer has ended and everything is settled. Deliveries can still be settled
    /// after the consumer has ended.
    async fn deliver_and_settle(&mut self, mut cancelled: oneshot::Receiver<Stop>) {
        let mut settled = Vec::with_capacity(BATCH);
        let arrivals = self.arrivals.clone();
        let (mut active, mut filling) = (true, false);
        let mut full_by = std::pin::pin!(tokio::time::sleep(FULL_WITHIN));
        let mut ack_by = std::pin::pin!(tokio::time::sleep(ACK_WITHIN));
        let mut end_by = std::pin::pin!(tokio::time::sleep(ANSWER_TIMEOUT));
        loop {
            let mut cancel = false;
            tokio::select! {
                end = self.stream.next() => match end {
                    // The wire has it.
                    Some(Ok(_)) => {}
                    Some(Err(error)) => {
                        let end = end_of_channel(&words::of(&error));
                        debug!(queue = %self.stream.queue(), ?end, "the broker closed a consumer's channel");
                        self.life.end(end);
                        break;
                    }
                    None if active => {
                        debug!(queue = %self.stream.queue(), "the broker ended a consumer");
                        self.life.end(ConsumerEnd::Cancelled);
                        break;
                    }
                    None => break,
                },
                _ = self.settled.recv_many(&mut settled, BATCH), if self.settles && !filling => {
                    let waiting = self.acks.waiting() > 0;
                    self.settle(&mut settled);
                    if !active || self.acks.waiting() >= self.acks_at_once {
                        self.ack();
                    } else if !waiting {
                        ack_by.as_mut().reset(Instant::now() + ACK_WITHIN);
                    }
                }
                () = &mut ack_by, if self.acks.waiting() > 0 && !filling => self.ack(),
                stop = unwanted(&mut cancelled, &self.deliver), if active && !filling => {
                    (filling, cancel) = (stop == Stop::Full, stop == Stop::Now);
                    full_by.as_mut().reset(Instant::now() + FULL_WITHIN);
                }
                // Whether it is full now is seen below.
                () = arrivals.more.notified(), if filling => {}
                () = &mut full_by, if filling => cancel = true,
                // The broker does not confirm the end, for example since the queue has lost its leader.
                () = &mut end_by, if !active => {
                    warn!(queue = %self.stream.queue(), "a consumer's end was not confirmed within {ANSWER_TIMEOUT:?}");
                    break;
                }
            }
            if cancel || filling && self.is_full() {
                (active, filling) = (false, false);
                // The consumer is cancelled first. Acks before that would make room for further deliveries.
                self.cancel();
                self.ack();
                end_by.as_mut().reset(Instant::now() + ANSWER_TIMEOUT);
            }
        }
        // From here on the consumer gets `None` after the last delivery.
        let (nobody, _) = mpsc::unbounded_channel();
        self.deliver = nobody;
        self.link.wire().stop_consuming(self.channel.id());
        self.life.finish();
        self.ack();
        while self.settled.recv_many(&mut settled, BATCH).await > 0 {
            self.settle(&mut settled);
            self.ack();
        }
    }

    /// Whether as many deliveries are unsettled as may be.
    fn is_full(&self) -> bool {
        self.acks.unsettled(self.arrivals.last.load(Ordering::Acquire)) >= self.prefetch as u64
    }

    /// Asks the broker for no more deliveries. lapin's stream ends after those that were already on their way. What is
    /// acknowledged from now on is sent after that.
    fn cancel(&self) {
        self.link.wire().hold_until_cancelled(self.channel.id());
        // The first poll sends the frame. The end of the stream is the answer.
        let _ = self.channel.basic_cancel(self.stream.tag(), BasicCancelOptions::default()).now_or_never();
    }

    /// Sends all settlements before the transport closes.
    fn settle_what_waits(&mut self) {
        let mut settled = Vec::new();
        while let Ok(next) = self.settled.try_recv() {
            settled.push(next);
        }
        self.settle(&mut settled);
        self.ack();
    }

    /// Sends settlements to the broker, except for acks, which are collected.
    fn settle(&mut self, settled: &mut Vec<(u64, Settle)>) {
        for (tag, settle) in settled.drain(..) {
            if settle == Settle::Ack || self.is_stream {
                self.acks.add(tag);
            } else {
                self.link.wire().settle(self.channel.id(), tag, settle);
                self.acks.settled_otherwise(tag);
            }
        }
    }

    /// Sends the collected acks.
    fn ack(&mut self) {
        let (wire, channel) = (self.link.wire(), self.channel.id());
        self.acks.send(|tag, multiple| wire.ack(channel, tag, multiple));
    }
}

/// Passes deliveries to the consumer. If the consumer is gone, they are requeued.
fn sink(
    (deliver, is_stream): (mpsc::UnboundedSender<Delivery>, bool),
    settler: Option<mpsc::UnboundedSender<(u64, Settle)>>,
    life: Arc<Life>,
    arrivals: Arc<Arrivals>,
) -> Sink {
    Arc::new(move |arrived| {
        let tag = arrived.envelope.tag;
        let settler =
            settler.as_ref().map(|channel| Settler::Channel { tag, channel: channel.clone(), life: life.clone() });
        // In another queue, this is what a publisher has made up.
        let offset = arrived.content.offset.filter(|_| is_stream);
        let sent = deliver.send(Delivery { offset, ..delivered(arrived, settler) });
        arrivals.last.store(tag, Ordering::Release);
        arrivals.more.notify_one();
        if let Err(mpsc::error::SendError(delivery)) = sent {
            delivery.settle(Settle::GiveBack);
        }
    })
}

/// The arguments of a consumer. RabbitMQ before 3.11.15 ignores `x-consumer-timeout` and has one limit for all
/// consumers. From 4.3 on it is only allowed for quorum queues; other queues have no limit then.
fn arguments(mode: Mode) -> FieldTable {
    let mut arguments = FieldTable::default();
    match mode {
        Mode::SettleAnyTime { .. } => {
            arguments.insert("x-consumer-timeout".into(), AMQPValue::LongLongInt(CONSUMER_TIMEOUT_MS));
        }
        Mode::Stream { from, .. } => {
            arguments.insert("x-stream-offset".into(), stream::offset(from));
        }
        Mode::Settle { .. } | Mode::NoAck => {}
    }
    arguments
}

/// What has arrived, as the transport's delivery.
pub(super) fn delivered(arrived: Arrived, settler: Option<Settler>) -> Delivery {
    let Arrived { envelope, content, body } = arrived;
    Delivery {
        properties: content.properties,
        failures: content.failures,
        death: content.death,
        body,
        exchange: envelope.exchange,
        key: envelope.key,
        redelivered: envelope.redelivered,
        offset: None,
        received: Instant::now(),
        settler,
    }
}

/// Waits until a consumer wants no more messages: it says so, or it is dropped.
async fn unwanted(cancelled: &mut oneshot::Receiver<Stop>, deliver: &mpsc::UnboundedSender<Delivery>) -> Stop {
    tokio::select! {
        stop = cancelled => stop.unwrap_or(Stop::Now),
        () = deliver.closed() => Stop::Now,
    }
}
