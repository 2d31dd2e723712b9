//! The transport on RabbitMQ, built on the crate lapin. No other part of the library uses lapin.
//!
//! [`Connection`] implements what [`Transport`](super::Transport) promises. A client has one AMQP connection for
//! everything. A server and an operator have two, one to publish and one to consume: the broker stops reading from a
//! connection that publishes too much, and acknowledgements must not wait for that.

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

/// How long closing may take while the broker has not answered everything that it was asked. It confirms the end only
/// after that, but it has received it.
const UNANSWERED_CLOSE: Duration = Duration::from_secs(1);
/// The most settled deliveries that are taken at once.
const BATCH: usize = 256;
/// How long an ack may wait for others, to be sent in one frame with them.
const ACK_WITHIN: Duration = Duration::from_millis(2);
/// Acks do not wait when they make up this part of the prefetch (a quarter), since each of them still takes up a place
/// of it.
const ACKS_OF_PREFETCH: usize = 4;
/// How long [`Stop::Full`] waits until the prefetch is full.
const FULL_WITHIN: Duration = Duration::from_secs(2);
/// How many channels of a connection are kept free of consumers, for questions to the broker.
const SPARE_CHANNELS: usize = 32;
/// The `consumer_timeout` that consumers ask for, in milliseconds. A delivery that is not acknowledged in this time
/// costs its channel, and RabbitMQ's default of 30 minutes is too short for long handlers. This is nearly the longest
/// time that the broker's timers can count.
const CONSUMER_TIMEOUT_MS: i64 = 40 * 24 * 3_600_000;

/// A connection to RabbitMQ, or two. Clones share it. It is closed when the last of them is dropped.
#[derive(Debug, Clone)]
pub struct Connection(Arc<Inner>);

/// What the clones of a [`Connection`] share.
#[derive(Debug)]
struct Inner {
    /// Publishes on `publishing`.
    publisher: Publisher,
    /// The connection on which messages are published.
    publishing: Arc<Link>,
    /// The connection for everything else. A client has one connection, so both are the same.
    consuming: Arc<Link>,
    /// Takes single messages out of queues.
    puller: Puller,
    user: Arc<User>,
    /// The broker's address, for logs and errors: without user and password.
    broker: String,
    /// The exchanges that are known to exist.
    known: Known,
    /// Tells what happens to the connections.
    news: Arc<News>,
    /// Cancelled when this begins to close.
    closing: CancellationToken,
    /// The tasks that publish and consume. Closing waits until they have sent what they have.
    tasks: TaskTracker,
    /// The tasks that wait for an answer of the broker. Closing does not wait for them: they end with the connection.
    questions: TaskTracker,
    /// The runtime in which the connection was opened. All its tasks run there.
    runtime: Handle,
}

impl Inner {
    /// Closes the connections after everything that was handed in has been sent. Questions that the broker has not
    /// answered are not awaited: they end with the connections.
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
            // The broker confirms the end only after it has answered every question.
            let within = if questions.is_empty() { CLOSE_TIMEOUT } else { UNANSWERED_CLOSE };
            publishing.close(within).await;
            if !Arc::ptr_eq(&publishing, &consuming) {
                consuming.close(within).await;
            }
        }
    }
}

impl Drop for Inner {
    /// Closes the connections if nobody has. The tasks hold them, so they would stay open otherwise.
    fn drop(&mut self) {
        if self.publishing.ended().is_none() || self.consuming.ended().is_none() {
            self.runtime.spawn(self.close());
        }
    }
}

impl Connection {
    /// Connects to the broker at `address`. The time for this is in the address, or else in `dial`.
    ///
    /// # Errors
    /// A sentence that says why this fails, and what to look at.
    pub(super) async fn open(address: &RabbitAddress, dial: &Dial, role: Role) -> Result<Self, String> {
        let within = address.options.connect_timeout.unwrap_or(dial.connect_timeout);
        let (name, closing, began) = (dial.label(role), CancellationToken::new(), Instant::now());
        let known = Known::default();
        let source = Source::of(address, dial, name.clone())?;
        let (news, user) = (Arc::new(News::of(name.clone())), Arc::new(User::of(source.uri())));
        let mut stage = Stage::Resolving;
        let opening = async {
            let Links { publishing, consuming, channel } = Links::open(&source, role, &news, &mut stage).await?;
            // A server has to know its own user to judge what it receives, so the broker is asked at once. During an
            // alarm it answers later.
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

    /// The broker's address, for logs and errors.
    pub(super) fn broker(&self) -> &str {
        &self.0.broker
    }

    /// The user as whom the broker knows this connection. `None` before the broker was asked, or if it does not tell.
    pub(super) fn user(&self) -> Option<&str> {
        self.0.user.name().map(ShortString::as_str)
    }

    /// Why this user may not send replies, if the broker has said so.
    pub(super) fn replies_refused(&self) -> Option<&str> {
        self.0.user.refusal()
    }

    /// Declares exchanges, queues and bindings, in this order. Fails if the broker does not answer within 30 s.
    pub(super) async fn declare(&self, parts: &[Declaration]) -> Result<(), Error> {
        in_time(&declare::operation(parts), self.declare_however_long(parts)).await
    }

    /// The same, without a time-out: for queues whose node may be down.
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

    /// Which of these exchanges do not exist.
    pub(super) async fn missing(&self, exchanges: &[String]) -> Result<Vec<String>, Error> {
        let (link, exchanges) = (self.0.consuming.clone(), exchanges.to_vec());
        self.see_through(async move { declare::missing(&link, &exchanges).await }).await
    }

    /// Deletes bindings. A binding that does not exist is no error.
    pub(super) async fn unbind(&self, bindings: &[Binding]) -> Result<(), Error> {
        let (link, bindings) = (self.0.consuming.clone(), bindings.to_vec());
        let unbound = self.see_through(async move { declare::unbind(&link, &bindings).await });
        in_time("take bindings away", unbound).await
    }

    /// Runs `doing` on a task, so that it goes on if the caller stops waiting. If a channel was dropped while the
    /// broker closes it, lapin would end the whole connection.
    async fn see_through<T: Send + 'static>(
        &self,
        doing: impl Future<Output = Result<T, Error>> + Send + 'static,
    ) -> Result<T, Error> {
        let done = self.0.questions.spawn(doing).await;
        done.unwrap_or_else(|_| Err(Refusal::Ended("its runtime has ended".into()).during("see it through")))
    }

    /// How many queues can be consumed at once. Each needs a channel of its own, and some channels are kept for
    /// questions.
    pub(super) fn max_consumers(&self) -> usize {
        usize::from(self.0.consuming.channel_max()).saturating_sub(SPARE_CHANNELS)
    }

    /// Publishes a message. The receipt resolves as soon as its outcome is known.
    pub(super) fn publish(&self, publication: Publication) -> Receipt {
        self.0.publisher.publish(publication, Told::AtOnce)
    }

    /// The same, but the receipt may resolve a millisecond or two later, which saves waking a task for each confirm.
    pub(super) fn publish_quietly(&self, publication: Publication) -> Receipt {
        self.0.publisher.publish(publication, Told::InPassing)
    }

    /// Publishes a message again and again until this future is dropped. A task does it, which then closes its channel.
    pub(super) async fn repeat(&self, publication: Publication) {
        let (link, user, until) = (self.0.publishing.clone(), self.0.user.clone(), CancellationToken::new());
        let _until = until.clone().drop_guard();
        // An error means that the runtime has ended.
        let _ = self.0.questions.spawn(repeat::repeat(link, user, publication, until)).await;
    }

    /// Begins to consume a queue. Fails if the broker does not answer within 30 s.
    pub(super) async fn consume(&self, queue: &str, mode: Mode) -> Result<Consumer, Error> {
        in_time(&format!("consume the queue `{queue}`"), self.consume_however_long(queue, mode)).await
    }

    /// The same, without a time-out: for queues whose node may be down.
    pub(super) async fn consume_however_long(&self, queue: &str, mode: Mode) -> Result<Consumer, Error> {
        let name = properties::short(queue).map_err(Error::Invalid)?;
        let (link, closing, tasks) = (self.0.consuming.clone(), self.0.closing.clone(), self.0.tasks.clone());
        // This runs on a task, since the caller may stop waiting. lapin would keep a consumer that nobody reads.
        let consuming = self.0.questions.spawn(async move {
            let (consumer, feed, settler, cancelled) = Feed::open(&link, name, mode).await?;
            tasks.spawn(feed.run(link, settler, cancelled, closing));
            Ok(consumer)
        });
        let consuming = consuming.await.unwrap_or_else(|_| Err(Refusal::Ended("its runtime has ended".into())));
        consuming.map_err(|refusal| refusal.during(format!("consume the queue `{queue}`")))
    }

    /// Takes a message out of a queue. `None` if the queue is empty.
    pub(super) async fn get(&self, queue: &str) -> Result<Option<Delivery>, Error> {
        in_time(&format!("get a message of the queue `{queue}`"), self.0.puller.get(queue)).await
    }

    /// How many messages in a queue are ready to be delivered. `None` if there is no such queue.
    pub(super) async fn count(&self, queue: &str) -> Result<Option<u64>, Error> {
        in_time(&format!("count the messages of the queue `{queue}`"), self.0.puller.count(queue)).await
    }

    /// The broker's reason, while it accepts no messages.
    pub(super) fn blocked(&self) -> Option<Arc<str>> {
        self.0.news.blocked()
    }

    /// Tells what happens to the connection from now on. If it has ended already, that is the first event.
    pub(super) fn events(&self) -> broadcast::Receiver<Event> {
        let receiver = self.0.news.subscribe();
        let Some(reason) = self.0.publishing.ended().or_else(|| self.0.consuming.ended()) else {
            return receiver;
        };
        // The end was told before, so it is told again to this late subscriber.
        let (late, receiver) = broadcast::channel(1);
        let _ = late.send(Event::Lost(reason));
        receiver
    }

    /// Closes the connection, after publications and settlements that were handed in before have been sent.
    pub(super) async fn close(&self) {
        self.0.close().await;
    }
}

/// The opened connections of a role, and a channel to publish on.
struct Links {
    publishing: Arc<Link>,
    consuming: Arc<Link>,
    channel: lapin::Channel,
}

impl Links {
    /// Opens one connection for a client, and two for the other roles.
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

/// A delivery of lapin's as the transport's.
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

/// Closes the second connection after the first one has ended. A server without its publishing connection would take
/// calls that it cannot answer away from other servers.
async fn end_together(publishing: Arc<Link>, consuming: Arc<Link>, closing: CancellationToken) {
    tokio::select! {
        _ = publishing.end() => consuming.close(CLOSE_TIMEOUT).await,
        _ = consuming.end() => publishing.close(CLOSE_TIMEOUT).await,
        () = closing.cancelled() => {}
    }
}

/// Waits until a consumer wants no more messages: it says so, or it is dropped.
async fn unwanted(cancelled: &mut oneshot::Receiver<Stop>, deliver: &mpsc::UnboundedSender<Delivery>) -> Stop {
    tokio::select! {
        stop = cancelled => stop.unwrap_or(Stop::Now),
        () = deliver.closed() => Stop::Now,
    }
}

/// The task of one consumer. It passes deliveries from the broker to the consumer, and settlements from the consumer to
/// the broker.
struct Feed {
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
type Settlements = mpsc::UnboundedSender<(u64, Settle)>;

/// The arguments of a consumer. RabbitMQ before 3.11.15 ignores `x-consumer-timeout` and has one limit for all
/// consumers. From 4.3 on it is only allowed for quorum queues; other queues have no limit then.
fn arguments(mode: Mode) -> FieldTable {
    let mut arguments = FieldTable::default();
    if let Mode::SettleAnyTime { .. } = mode {
        arguments.insert("x-consumer-timeout".into(), AMQPValue::LongLongInt(CONSUMER_TIMEOUT_MS));
    }
    arguments
}

/// Why the broker has closed the channel of a consumer. It says for example "PRECONDITION_FAILED - delivery
/// acknowledgement on channel 2 timed out. Timeout value used: 5000 ms. This timeout value can be configured".
fn end_of_channel(words: &str) -> ConsumerEnd {
    let limit = words.split_once("timed out. Timeout value used: ").and_then(|(_, rest)| rest.split_once(" ms"));
    match limit.and_then(|(number, _)| number.parse().ok()) {
        Some(milliseconds) => ConsumerEnd::TimedOut(Duration::from_millis(milliseconds)),
        None => ConsumerEnd::Channel(words.into()),
    }
}

/// Waits for an answer of the broker, but not longer than 30 s. The question itself goes on, since it runs on a task.
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

    /// Runs until the consumer has ended and its deliveries are settled or dropped, or until the connection ends or is
    /// closed.
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
