//! The task of one consumer: deliveries come from the broker, and settlements go there.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::{FutureExt as _, StreamExt as _};
use lapin::options::{
    BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicNackOptions, BasicQosOptions, BasicRejectOptions,
};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::connection::{Link, Refusal};
use super::words::end_of_channel;
use super::{declare, properties, words};
use crate::limits::ANSWER_TIMEOUT;
use crate::transport::{Consumer, ConsumerEnd, Delivery, Life, Mode, Settle, Settler, Stop};

/// The most settled deliveries that are taken at once.
const BATCH: usize = 256;
/// How long an ack may wait for others, to be sent in one frame with them.
const ACK_WITHIN: Duration = Duration::from_millis(2);
/// Acks do not wait when they make up this part of the prefetch (a quarter), since each of them still takes up a place
/// of it.
const ACKS_OF_PREFETCH: usize = 4;
/// How long [`Stop::Full`] waits until the prefetch is full.
const FULL_WITHIN: Duration = Duration::from_secs(2);
/// The `consumer_timeout` that consumers ask for, in milliseconds. A delivery that is not acknowledged in this time
/// costs its channel, and RabbitMQ's default of 30 minutes is too short for long handlers. This is nearly the longest
/// time that the broker's timers can count.
const CONSUMER_TIMEOUT_MS: i64 = 40 * 24 * 3_600_000;

/// The task of one consumer. It passes deliveries from the broker to the consumer, and settlements from the consumer to
/// the broker.
pub(super) struct Feed {
    /// Tells the deliveries whether they can still be settled.
    life: Arc<Life>,
    channel: lapin::Channel,
    /// What the broker delivers.
    stream: lapin::Consumer,
    /// Where the consumer gets the deliveries.
    deliver: mpsc::UnboundedSender<Delivery>,
    /// How the consumer has settled deliveries, by their tags.
    settled: mpsc::UnboundedReceiver<(u64, Settle)>,
    /// The tags of the deliveries that are not settled.
    unsettled: BTreeSet<u64>,
    /// The tags of those whose ack waits to be sent with others.
    acked: BTreeSet<u64>,
    /// So many acks do not wait for more.
    acks_at_once: usize,
    /// How many deliveries may be unsettled at once.
    prefetch: usize,
}

/// Where deliveries say how they were settled.
pub(super) type Settlements = mpsc::UnboundedSender<(u64, Settle)>;

impl Feed {
    /// Begins to consume, on a channel of its own.
    pub(super) async fn open(
        link: &Link,
        queue: ShortString,
        mode: Mode,
    ) -> Result<(Consumer, Self, Option<Settlements>, oneshot::Receiver<Stop>), Refusal> {
        let channel = link.channel().await?;
        if let Some(prefetch) = mode.prefetch() {
            link.hear(channel.basic_qos(prefetch, BasicQosOptions { global: false })).await?;
        }
        let options = BasicConsumeOptions { no_ack: mode == Mode::NoAck, ..BasicConsumeOptions::default() };
        let stream = channel.basic_consume(queue, "".into(), options, arguments(mode));
        let stream = link.hear(stream).await?;
        let (deliver, deliveries) = mpsc::unbounded_channel();
        let (settler, settled) = mpsc::unbounded_channel();
        let (cancel, cancelled) = oneshot::channel();
        let prefetch = usize::from(mode.prefetch().unwrap_or_default());
        let acks_at_once = (prefetch / ACKS_OF_PREFETCH).max(1);
        let (unsettled, acked) = (BTreeSet::new(), BTreeSet::new());
        let life = Arc::new(Life::default());
        let consumer = Consumer { deliveries, cancel: Some(cancel), life: life.clone() };
        let feed = Self { life, channel, stream, deliver, settled, unsettled, acked, acks_at_once, prefetch };
        Ok((consumer, feed, (mode != Mode::NoAck).then_some(settler), cancelled))
    }

    /// Runs until the consumer has ended and its deliveries are settled or dropped, or until the connection ends or is
    /// closed.
    pub(super) async fn run(
        mut self,
        link: Arc<Link>,
        settler: Option<Settlements>,
        cancelled: oneshot::Receiver<Stop>,
        closing: CancellationToken,
    ) {
        let settles = settler.is_some();
        tokio::select! {
            () = self.deliver_and_settle(settler, cancelled) => {}
            () = closing.cancelled() => self.settle_what_waits(),
            reason = link.end() => {
                // Deliveries that arrived before the end and need no ack are lost unless they are passed on now. The
                // broker redelivers the others.
                while !settles && let Some(Some(Ok(delivery))) = self.stream.next().now_or_never() {
                    self.deliver(delivery, None);
                }
                debug!(queue = %self.stream.queue(), %reason, "a consumer ends with its connection");
                return self.life.end(ConsumerEnd::Connection);
            }
        }
        // The consumer sees its end first. Closing the channel then requeues what was not settled.
        let Self { channel, stream, deliver, .. } = self;
        drop(deliver);
        declare::close(&link, &channel).await;
        drop(stream);
    }

    /// The work of the task, until the consumer has ended and everything is settled. Deliveries can still be settled
    /// after the consumer has ended.
    async fn deliver_and_settle(&mut self, settler: Option<Settlements>, mut cancelled: oneshot::Receiver<Stop>) {
        let mut settled = Vec::with_capacity(BATCH);
        let (mut active, mut filling) = (true, false);
        let mut full_by = std::pin::pin!(tokio::time::sleep(FULL_WITHIN));
        let mut ack_by = std::pin::pin!(tokio::time::sleep(ACK_WITHIN));
        let mut end_by = std::pin::pin!(tokio::time::sleep(ANSWER_TIMEOUT));
        loop {
            let mut cancel = false;
            tokio::select! {
                delivery = self.stream.next() => match delivery {
                    Some(Ok(delivery)) => self.deliver(delivery, settler.as_ref()),
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
                _ = self.settled.recv_many(&mut settled, BATCH), if settler.is_some() && !filling => {
                    let waiting = !self.acked.is_empty();
                    self.settle(&mut settled);
                    if !active || self.acked.len() >= self.acks_at_once {
                        self.ack();
                    } else if !waiting {
                        ack_by.as_mut().reset(Instant::now() + ACK_WITHIN);
                    }
                }
                () = &mut ack_by, if !self.acked.is_empty() && !filling => self.ack(),
                stop = unwanted(&mut cancelled, &self.deliver), if active && !filling => {
                    (filling, cancel) = (stop == Stop::Full, stop == Stop::Now);
                    full_by.as_mut().reset(Instant::now() + FULL_WITHIN);
                }
                () = &mut full_by, if filling => cancel = true,
                // The broker does not confirm the end, for example since the queue has lost its leader.
                () = &mut end_by, if !active => {
                    warn!(queue = %self.stream.queue(), "a consumer's end was not confirmed within {ANSWER_TIMEOUT:?}");
                    break;
                }
            }
            if cancel || filling && self.unsettled.len() >= self.prefetch {
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
        self.life.finish();
        drop(settler);
        self.ack();
        while self.settled.recv_many(&mut settled, BATCH).await > 0 {
            self.settle(&mut settled);
            self.ack();
        }
    }

    /// Passes a delivery to the consumer. If the consumer is gone, the delivery is requeued.
    fn deliver(&mut self, delivery: lapin::message::Delivery, settler: Option<&Settlements>) {
        let tag = delivery.delivery_tag;
        let settler =
            settler.map(|channel| Settler::Channel { tag, channel: channel.clone(), life: self.life.clone() });
        if settler.is_some() {
            self.unsettled.insert(tag);
        }
        let delivery = delivered(delivery, settler);
        if let Err(mpsc::error::SendError(delivery)) = self.deliver.send(delivery) {
            delivery.settle(Settle::GiveBack);
        }
    }

    /// Asks the broker for no more deliveries. lapin's stream ends after those that were already on their way.
    fn cancel(&self) {
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
    ///
    /// Each future is polled once, which sends its frame. After that it would wait until the frame has left the socket,
    /// which nobody needs to know: if the channel ends before, the broker requeues the delivery.
    fn settle(&mut self, settled: &mut Vec<(u64, Settle)>) {
        for (tag, settle) in settled.drain(..) {
            let _ = match settle {
                Settle::Ack => {
                    self.acked.insert(tag);
                    continue;
                }
                Settle::GiveBack => {
                    let options = BasicNackOptions { multiple: false, requeue: true };
                    self.channel.basic_nack(tag, options).now_or_never()
                }
                Settle::Failed => self.channel.basic_reject(tag, BasicRejectOptions { requeue: true }).now_or_never(),
                Settle::Discard => self.channel.basic_reject(tag, BasicRejectOptions { requeue: false }).now_or_never(),
            };
            self.unsettled.remove(&tag);
        }
    }

    /// Sends the collected acks. Those in front of which nothing is unsettled are sent as one frame.
    fn ack(&mut self) {
        let acked = std::mem::take(&mut self.acked);
        let finished = self.unsettled.iter().zip(&acked).take_while(|(unsettled, acked)| unsettled == acked).count();
        let mut acks = acked.iter().copied().enumerate().skip(finished.saturating_sub(1));
        for (position, tag) in &mut acks {
            let multiple = position + 1 == finished;
            let _ = self.channel.basic_ack(tag, BasicAckOptions { multiple }).now_or_never();
        }
        self.unsettled.retain(|tag| !acked.contains(tag));
    }
}

/// The arguments of a consumer. RabbitMQ before 3.11.15 ignores `x-consumer-timeout` and has one limit for all
/// consumers. From 4.3 on it is only allowed for quorum queues; other queues have no limit then.
fn arguments(mode: Mode) -> FieldTable {
    let mut arguments = FieldTable::default();
    if let Mode::SettleAnyTime { .. } = mode {
        arguments.insert("x-consumer-timeout".into(), AMQPValue::LongLongInt(CONSUMER_TIMEOUT_MS));
    }
    arguments
}

/// A delivery of lapin's as the transport's.
pub(super) fn delivered(delivery: lapin::message::Delivery, settler: Option<Settler>) -> Delivery {
    Delivery {
        properties: properties::read(&delivery.properties),
        failures: properties::failures(&delivery.properties),
        death: properties::death(&delivery.properties),
        body: Bytes::from(delivery.data),
        exchange: delivery.exchange.to_string(),
        key: delivery.routing_key.to_string(),
        redelivered: delivery.redelivered,
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
