//! The port on RabbitMQ, by way of lapin.

mod connection;
mod declare;
mod diagnosis;
mod exchanges;
mod pool;
mod properties;
mod publisher;
mod pull;
mod repeat;
mod returns;
mod socket;
#[cfg(feature = "tls")]
mod tls;
#[cfg(not(feature = "tls"))]
#[path = "rabbit/without_tls.rs"]
mod tls;
mod user;

use std::collections::BTreeSet;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::{FutureExt as _, StreamExt as _};
use lapin::options::{
    BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicNackOptions, BasicQosOptions, BasicRejectOptions,
};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use tokio::runtime::Handle;
use tokio::sync::{broadcast, mpsc, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

use crate::error::Error;
use crate::topology::{Binding, Declaration};
use crate::transport::address::RabbitAddress;
use crate::transport::{
    ANSWER_TIMEOUT, Consumer, ConsumerEnd, Delivery, Dial, Event, Life, Mode, Publication, Receipt, Role, Settle,
    Settler, Stop,
};
use connection::{CLOSE_TIMEOUT, Link, News, Refusal};
use diagnosis::Stage;
use exchanges::Known;
use pool::Source;
use publisher::{Publisher, Told};
use pull::Puller;
pub(in crate::transport) use tls::Connector;
use user::User;

/// How long closing may take while the broker has not answered all that it was asked: it has heard of the end then, and
/// confirms it when it has.
const UNANSWERED_CLOSE: Duration = Duration::from_secs(1);
/// How many settled deliveries are taken at once.
const BATCH: usize = 256;
/// How long an ack may wait for others, to be told together. Until then the delivery takes up a place of the prefetch,
/// so no more than a part of it waits.
const ACK_WITHIN: Duration = Duration::from_millis(2);
const ACKS_OF_PREFETCH: usize = 4;
/// How long a consumer that wants no more waits until it is full.
const FULL_WITHIN: Duration = Duration::from_secs(2);
/// How many channels of a connection no consumer has.
const SPARE_CHANNELS: usize = 32;
/// How long a delivery may stay unsettled, in milliseconds: as long as the broker's timers can count, less a margin.
const CONSUMER_TIMEOUT_MS: i64 = 40 * 24 * 3_600_000;

/// A connection to RabbitMQ, or two; clones share it, and it closes with the last of them.
#[derive(Debug, Clone)]
pub struct Connection(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    publisher: Publisher,
    publishing: Arc<Link>,
    consuming: Arc<Link>,
    puller: Puller,
    user: Arc<User>,
    /// The broker's address, for people.
    broker: String,
    /// The exchanges that are known to be there.
    known: Known,
    news: Arc<News>,
    closing: CancellationToken,
    /// What publishes and consumes: closing lets it say what it has to.
    tasks: TaskTracker,
    /// What has been asked of the broker and is not answered, with its channels, until the connection ends.
    questions: TaskTracker,
    runtime: Handle,
}

impl Inner {
    /// Closes the connections, once what was handed in before has left. What is asked of the broker is not waited for: it ends
    /// with the connections.
    fn close(&self) -> impl Future<Output = ()> + Send + 'static {
        self.closing.cancel();
        self.tasks.close();
        let (tasks, questions, news) = (self.tasks.clone(), self.questions.clone(), self.news.clone());
        let (publishing, consuming) = (self.publishing.clone(), self.consuming.clone());
        async move {
            if tokio::time::timeout(CLOSE_TIMEOUT, tasks.wait()).await.is_err() {
                let name = news.name();
                if publishing.ended().or_else(|| consuming.ended()).is_none() {
                    warn!(name, "the broker did not take within {CLOSE_TIMEOUT:?} what was left to send");
                } else {
                    debug!(name, "what was left to send was lost with its connection");
                }
            }
            // The broker confirms it when it has answered all that was asked.
            let within = if questions.is_empty() { CLOSE_TIMEOUT } else { UNANSWERED_CLOSE };
            publishing.close(within).await;
            if !Arc::ptr_eq(&publishing, &consuming) {
                consuming.close(within).await;
            }
        }
    }
}

impl Drop for Inner {
    /// Closes what was not closed: the tasks hold the connections.
    fn drop(&mut self) {
        if self.publishing.ended().is_none() || self.consuming.ended().is_none() {
            self.runtime.spawn(self.close());
        }
    }
}

impl Connection {
    /// Connects to the broker at `address`, within its time or the dial's.
    ///
    /// # Errors
    /// Why it cannot, in a sentence.
    pub(super) async fn open(address: &RabbitAddress, dial: &Dial, role: Role) -> Result<Self, String> {
        let within = address.options.connect_timeout.unwrap_or(dial.connect_timeout);
        let (name, closing, began) = (dial.label(role), CancellationToken::new(), Instant::now());
        let known = Known::default();
        let source = Source::of(address, dial, name.clone())?;
        let (news, user) = (Arc::new(News::of(name.clone())), Arc::new(User::of(source.uri())));
        let mut stage = Stage::Resolving;
        let opening = async {
            let Links { publishing, consuming, channel } = Links::open(&source, role, &news, &mut stage).await?;
            // A server judges by its own name what it receives. Under an alarm it hears it later.
            let introduced_within = (role != Role::Client).then(|| within.saturating_sub(began.elapsed()) / 2);
            let (link, user, known, closing) = (publishing.clone(), user.clone(), known.clone(), closing.clone());
            let writing = Publisher::open(link, channel, user, introduced_within, known, closing).await;
            let (publisher, writing) = writing.map_err(|refusal| diagnosis::unopened(refusal, address))?;
            Ok((publishing, consuming, publisher, writing))
        };
        let opened = tokio::time::timeout(within, opening).await;
        let opened = opened.unwrap_or_else(|_| Err(diagnosis::silence(stage, address, within)));
        let (publishing, consuming, publisher, writing) = opened?;
        let broker = address.to_string();
        debug!(name, broker, "a connection is open");
        let tasks = TaskTracker::new();
        tasks.spawn(writing);
        if role != Role::Client {
            tasks.spawn(end_together(publishing.clone(), consuming.clone(), closing.clone()));
        }
        let questions = TaskTracker::new();
        let puller = Puller::new(consuming.clone(), closing.clone(), tasks.clone(), questions.clone());
        Ok(Self(Arc::new(Inner {
            publisher,
            publishing,
            consuming,
            puller,
            user,
            broker,
            known,
            news,
            closing,
            tasks,
            questions,
            runtime: Handle::current(),
        })))
    }

    /// The broker's address, for people.
    pub(super) fn broker(&self) -> &str {
        &self.0.broker
    }

    /// The user in the broker's words, once it has said.
    pub(super) fn user(&self) -> Option<&str> {
        self.0.user.name().map(ShortString::as_str)
    }

    /// Why this user cannot reply to anybody, if the broker has said so.
    pub(super) fn replies_refused(&self) -> Option<&str> {
        self.0.user.refusal()
    }

    pub(super) async fn declare(&self, parts: &[Declaration]) -> Result<(), Error> {
        in_time(&declare::operation(parts), self.declare_however_long(parts)).await
    }

    pub(super) async fn declare_however_long(&self, parts: &[Declaration]) -> Result<(), Error> {
        let (link, parts, known) = (self.0.consuming.clone(), parts.to_vec(), self.0.known.clone());
        let declaring = async move {
            declare::declare(&link, &parts).await?;
            for part in parts {
                if let Declaration::Exchange(exchange) = part {
                    known.add(&exchange.name);
                }
            }
            Ok(())
        };
        self.see_through(declaring).await
    }

    pub(super) async fn missing(&self, exchanges: &[String]) -> Result<Vec<String>, Error> {
        let (link, exchanges) = (self.0.consuming.clone(), exchanges.to_vec());
        self.see_through(async move { declare::missing(&link, &exchanges).await }).await
    }

    pub(super) async fn unbind(&self, bindings: &[Binding]) -> Result<(), Error> {
        let (link, bindings) = (self.0.consuming.clone(), bindings.to_vec());
        let unbound = self.see_through(async move { declare::unbind(&link, &bindings).await });
        in_time("take bindings away", unbound).await
    }

    /// Does something on a task, which sees it through when nobody waits for it any more: a channel that is dropped while
    /// the broker closes it takes its whole connection down in lapin.
    async fn see_through<T: Send + 'static>(
        &self,
        doing: impl Future<Output = Result<T, Error>> + Send + 'static,
    ) -> Result<T, Error> {
        let done = self.0.questions.spawn(doing).await;
        done.unwrap_or_else(|_| Err(Refusal::Ended("its runtime has ended".into()).during("see it through")))
    }

    /// Each has a channel of its own; some are for what is asked of the broker meanwhile.
    pub(super) fn max_consumers(&self) -> usize {
        usize::from(self.0.consuming.channel_max()).saturating_sub(SPARE_CHANNELS)
    }

    pub(super) fn publish(&self, publication: Publication) -> Receipt {
        self.0.publisher.publish(publication, Told::AtOnce)
    }

    pub(super) fn publish_quietly(&self, publication: Publication) -> Receipt {
        self.0.publisher.publish(publication, Told::InPassing)
    }

    /// On a task, which closes the channel when this is dropped.
    pub(super) async fn repeat(&self, publication: Publication) {
        let (link, user, until) = (self.0.publishing.clone(), self.0.user.clone(), CancellationToken::new());
        let _until = until.clone().drop_guard();
        // It ends with its runtime at the latest.
        let _ = self.0.questions.spawn(repeat::repeat(link, user, publication, until)).await;
    }

    pub(super) async fn consume(&self, queue: &str, mode: Mode) -> Result<Consumer, Error> {
        in_time(&format!("consume the queue `{queue}`"), self.consume_however_long(queue, mode)).await
    }

    pub(super) async fn consume_however_long(&self, queue: &str, mode: Mode) -> Result<Consumer, Error> {
        let name = properties::short(queue).map_err(Error::Invalid)?;
        let (link, closing, tasks) = (self.0.consuming.clone(), self.0.closing.clone(), self.0.tasks.clone());
        // On a task, which sees it through when nobody waits for it any more: lapin would keep a consumer that nobody reads.
        let consuming = self.0.questions.spawn(async move {
            let (consumer, feed, settler, cancelled) = Feed::open(&link, name, mode).await?;
            tasks.spawn(feed.run(link, settler, cancelled, closing));
            Ok(consumer)
        });
        let consuming = consuming.await.unwrap_or_else(|_| Err(Refusal::Ended("its runtime has ended".into())));
        consuming.map_err(|refusal| refusal.during(format!("consume the queue `{queue}`")))
    }

    pub(super) async fn get(&self, queue: &str) -> Result<Option<Delivery>, Error> {
        in_time(&format!("get a message of the queue `{queue}`"), self.0.puller.get(queue)).await
    }

    pub(super) async fn count(&self, queue: &str) -> Result<Option<u64>, Error> {
        in_time(&format!("count the messages of the queue `{queue}`"), self.0.puller.count(queue)).await
    }

    pub(super) fn blocked(&self) -> Option<Arc<str>> {
        self.0.news.blocked()
    }

    pub(super) fn events(&self) -> broadcast::Receiver<Event> {
        let receiver = self.0.news.subscribe();
        let Some(reason) = self.0.publishing.ended().or_else(|| self.0.consuming.ended()) else {
            return receiver;
        };
        // Who comes after the end is told of it as well.
        let (late, receiver) = broadcast::channel(1);
        let _ = late.send(Event::Lost(reason));
        receiver
    }

    /// Lets what was handed in before leave: publications, for a moment, and what was said of deliveries.
    pub(super) async fn close(&self) {
        self.0.close().await;
    }
}

/// The connections of a role, and a channel to publish on.
struct Links {
    publishing: Arc<Link>,
    consuming: Arc<Link>,
    channel: lapin::Channel,
}

impl Links {
    async fn open(source: &Source<'_>, role: Role, news: &Arc<News>, stage: &mut Stage) -> Result<Self, String> {
        let publishing = Link::new(source.connect(stage).await?, news.clone());
        let consuming = match role {
            Role::Client => publishing.clone(),
            Role::Server | Role::Operator => Link::new(source.connect(stage).await?, news.clone()),
        };
        *stage = Stage::Opening;
        let channel = publisher::confirming(&publishing).await;
        let channel = channel.map_err(|refusal| diagnosis::unopened(refusal, source.address()))?;
        Ok(Self { publishing, consuming, channel })
    }
}

/// A delivery as the port knows it.
fn delivered(delivery: lapin::message::Delivery, settler: Option<Settler>) -> Delivery {
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

/// Closes the other connection when one has ended: to take calls without answering them would keep them from those
/// who can.
async fn end_together(publishing: Arc<Link>, consuming: Arc<Link>, closing: CancellationToken) {
    tokio::select! {
        _ = publishing.end() => consuming.close(CLOSE_TIMEOUT).await,
        _ = consuming.end() => publishing.close(CLOSE_TIMEOUT).await,
        () = closing.cancelled() => {}
    }
}

/// Waits until a consumer wants no more: it says so, or is dropped.
async fn unwanted(cancelled: &mut oneshot::Receiver<Stop>, deliver: &mpsc::UnboundedSender<Delivery>) -> Stop {
    tokio::select! {
        stop = cancelled => stop.unwrap_or(Stop::Now),
        () = deliver.closed() => Stop::Now,
    }
}

/// Moves the deliveries of a queue to their consumer, and what it says of them to the broker.
struct Feed {
    life: Arc<Life>,
    channel: lapin::Channel,
    stream: lapin::Consumer,
    deliver: mpsc::UnboundedSender<Delivery>,
    settled: mpsc::UnboundedReceiver<(u64, Settle)>,
    unsettled: BTreeSet<u64>,
    /// Of those, what is to be acked, and how much of it does not wait for more.
    acked: BTreeSet<u64>,
    acks_at_once: usize,
    /// How many may be unsettled at once.
    prefetch: usize,
}

type Settlements = mpsc::UnboundedSender<(u64, Settle)>;

/// What the broker is told of a consumer. One before 3.11.15 does not read it, and has one limit for all; from 4.3 on it is
/// refused for other queues than quorum queues, which have no limit then.
fn arguments(mode: Mode) -> FieldTable {
    let mut arguments = FieldTable::default();
    if let Mode::SettleAnyTime { .. } = mode {
        arguments.insert("x-consumer-timeout".into(), AMQPValue::LongLongInt(CONSUMER_TIMEOUT_MS));
    }
    arguments
}

/// What the broker means that closed a consumer's channel with such words as "PRECONDITION_FAILED - delivery acknowledgement on
/// channel 2 timed out. Timeout value used: 5000 ms. This timeout value can be configured".
fn end_of_channel(words: &str) -> ConsumerEnd {
    let limit = words.split_once("timed out. Timeout value used: ").and_then(|(_, rest)| rest.split_once(" ms"));
    match limit.and_then(|(number, _)| number.parse().ok()) {
        Some(milliseconds) => ConsumerEnd::TimedOut(Duration::from_millis(milliseconds)),
        None => ConsumerEnd::Channel(words.into()),
    }
}

/// What the broker answers, unless that takes too long. What was asked goes on, since it is on a task of its own.
async fn in_time<T>(operation: &str, answer: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    tokio::time::timeout(ANSWER_TIMEOUT, answer).await.unwrap_or_else(|_| Err(Refusal::Silent.during(operation)))
}

impl Feed {
    /// Begins to consume, on a channel of its own.
    async fn open(
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

    /// Runs until the consumer has ended and its deliveries are settled or dropped, or the connection ends or closes.
    async fn run(
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
                // What arrived before the end comes again if it is to be settled, and otherwise never.
                while !settles && let Some(Some(Ok(delivery))) = self.stream.next().now_or_never() {
                    self.deliver(delivery, None);
                }
                debug!(queue = %self.stream.queue(), %reason, "a consumer ends with its connection");
                return self.life.end(ConsumerEnd::Connection);
            }
        }
        // The consumer sees its end before the channel's close, which gives back what was neither settled nor kept.
        let Self { channel, stream, deliver, .. } = self;
        drop(deliver);
        declare::close(&link, &channel).await;
        drop(stream);
    }

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
                        let end = end_of_channel(&connection::words(&error));
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
                // As when the queue has lost its leader.
                () = &mut end_by, if !active => {
                    warn!(queue = %self.stream.queue(), "a consumer's end was not confirmed within {ANSWER_TIMEOUT:?}");
                    break;
                }
            }
            if cancel || filling && self.unsettled.len() >= self.prefetch {
                (active, filling) = (false, false);
                // What is acked before that would make room.
                self.cancel();
                self.ack();
                end_by.as_mut().reset(Instant::now() + ANSWER_TIMEOUT);
            }
        }
        // The consumer's end: it sees `None` after the last delivery.
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

    /// Asks for no more; lapin's stream ends after what was prefetched.
    fn cancel(&self) {
        // Polling once sends it; the answer is the end of the stream.
        let _ = self.channel.basic_cancel(self.stream.tag(), BasicCancelOptions::default()).now_or_never();
    }

    fn settle_what_waits(&mut self) {
        let mut settled = Vec::new();
        while let Ok(next) = self.settled.try_recv() {
            settled.push(next);
        }
        self.settle(&mut settled);
        self.ack();
    }

    /// Tells the broker, except for acks, which are collected.
    ///
    /// Each future is polled once, which sends its frame; it would wait for the frame to leave, which need not be known:
    /// a channel that ends gives back what was not settled.
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

    /// Tells the broker of collected acks, in one frame for all of them before which nothing is unsettled.
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
