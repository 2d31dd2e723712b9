//! The transport on RabbitMQ, built on the crate lapin. No other part of the library uses lapin.
//!
//! [`RabbitConnection`] implements what [`Transport`](super::Transport) promises. A client has one AMQP connection for
//! everything. A server and an operator have two, one to publish and one to consume: the broker stops reading from a
//! connection that publishes too much, and acknowledgements must not wait for that.

mod acks;
mod connection;
mod declare;
mod diagnosis;
mod exchanges;
mod feed;
mod frames;
mod pool;
mod probe;
mod properties;
mod publisher;
mod pull;
mod repeat;
mod socket;
mod stream;
#[cfg(feature = "tls")]
mod tls;
#[cfg(not(feature = "tls"))]
#[path = "rabbit/without_tls.rs"]
mod tls;
mod user;
mod wire;
mod words;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::broadcast;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

use crate::error::Error;
use crate::limits::ANSWER_TIMEOUT;
use crate::topology::{Binding, Declaration};
use crate::transport::address::RabbitAddress;
use crate::transport::{ConnectionEvent, Consumer, Delivery, Dial, Mode, Publication, QueueCount, ReceiptSender, Role};
use connection::{CLOSE_TIMEOUT, Link, News, Refusal};
use diagnosis::ConnectStage;
use exchanges::KnownExchanges;
use feed::Feed;
use pool::ConnectionSource;
pub use probe::{Comparison, Greeting};
use publisher::Publisher;
use pull::Puller;
pub(in crate::transport) use tls::Connector;
use user::User;

/// How long closing may take while the broker has not answered everything that it was asked. It confirms the end only
/// after that, but it has received it.
const UNANSWERED_CLOSE: Duration = Duration::from_secs(1);
/// How many channels of a connection are kept free of consumers, for questions to the broker.
const SPARE_CHANNELS: usize = 32;
/// A connection to RabbitMQ, or two. Clones share it. It is closed when the last of them is dropped.
#[derive(Debug, Clone)]
pub struct RabbitConnection(Arc<Inner>);

/// What the clones of a [`RabbitConnection`] share.
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
    known: KnownExchanges,
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

impl RabbitConnection {
    /// Connects to the broker at `address`. The time for this is in the address, or else in `dial`.
    ///
    /// # Errors
    /// A sentence that says why this fails, and what to look at.
    pub(super) async fn open(address: &RabbitAddress, dial: &Dial, role: Role) -> Result<Self, String> {
        let within = address.options.connect_timeout.unwrap_or(dial.connect_timeout);
        let (name, closing, began) = (dial.label(role), CancellationToken::new(), Instant::now());
        let known = KnownExchanges::default();
        let source = ConnectionSource::of(address, dial, name.clone())?;
        let (news, user) = (Arc::new(News::of(name.clone())), Arc::new(User::of(source.uri())));
        let mut stage = ConnectStage::Resolving;
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
        self.0.user.name()
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

    pub(super) fn knows(&self, exchange: &str) -> bool {
        self.0.known.has(exchange)
    }

    /// Publishes a message. Its outcome is told as soon as it is known.
    pub(super) fn submit(&self, publication: Publication, outcome: ReceiptSender) {
        self.0.publisher.submit(publication, outcome);
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
            let (consumer, feed, cancelled) = Feed::open(link, name, mode).await?;
            tasks.spawn(feed.run(cancelled, closing));
            Ok(consumer)
        });
        let consuming = consuming.await.unwrap_or_else(|_| Err(Refusal::Ended("its runtime has ended".into())));
        consuming.map_err(|refusal| refusal.during(format!("consume the queue `{queue}`")))
    }

    /// Takes a message out of a queue. `None` if the queue is empty.
    pub(super) async fn get(&self, queue: &str) -> Result<Option<Delivery>, Error> {
        in_time(&format!("get a message of the queue `{queue}`"), self.0.puller.get(queue)).await
    }

    /// How many messages in a queue are ready to be delivered, and how many consumers it has. `None` if there is no such
    /// queue.
    ///
    /// # Errors
    /// As [`Transport::look_at`](super::Transport::look_at).
    pub async fn count(&self, queue: &str) -> Result<Option<QueueCount>, Error> {
        in_time(&format!("count the messages of the queue `{queue}`"), self.0.puller.count(queue)).await
    }

    /// Deletes a queue. Tells how many of its messages were ready; `None` if there is no such queue.
    pub(super) async fn delete(&self, queue: &str) -> Result<Option<u64>, Error> {
        in_time(&format!("delete the queue `{queue}`"), self.0.puller.delete(queue)).await
    }

    /// What the broker has said of itself. `None` if that cannot be read.
    #[must_use]
    pub fn greeting(&self) -> Option<Greeting> {
        probe::greeting(&self.0.consuming)
    }

    /// How an exchange or a queue compares with its declaration. Declares nothing that is not there.
    ///
    /// # Errors
    /// `Broker` if this user may not do that, or the broker does not answer within 30 s. `Disconnected`.
    pub async fn compare(&self, part: &Declaration) -> Result<Comparison, Error> {
        let (link, part) = (self.0.consuming.clone(), part.clone());
        let operation = declare::operation(std::slice::from_ref(&part));
        let compared = self.see_through(async move { declare::compare(&link, &part).await });
        in_time(&operation, compared).await
    }

    /// Whether this user may publish to an exchange with this key. Nothing is published: what is sent breaks a rule that
    /// the broker checks last.
    ///
    /// # Errors
    /// `Broker` with the broker's words if not, or if there is no such exchange. `Disconnected`.
    pub async fn may_publish(&self, exchange: &str, key: &str) -> Result<(), Error> {
        let (link, operation) = (self.0.publishing.clone(), format!("publish to the exchange `{exchange}`"));
        let (exchange, key, during) = (exchange.to_owned(), key.to_owned(), operation.clone());
        let tried = self.see_through(async move {
            probe::publish(&link, &exchange, &key).await.map_err(|refusal| refusal.during(during))
        });
        in_time(&operation, tried).await
    }

    /// The broker's reason, while it accepts no messages.
    pub(super) fn blocked(&self) -> Option<Arc<str>> {
        self.0.news.blocked()
    }

    /// Tells what happens to the connection from now on. If it has ended already, that is the first event.
    pub(super) fn events(&self) -> broadcast::Receiver<ConnectionEvent> {
        let receiver = self.0.news.subscribe();
        let Some(reason) = self.0.publishing.ended().or_else(|| self.0.consuming.ended()) else {
            return receiver;
        };
        // The end was told before, so it is told again to this late subscriber.
        let (late, receiver) = broadcast::channel(1);
        let _ = late.send(ConnectionEvent::Lost(reason));
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
    async fn open(
        source: &ConnectionSource<'_>,
        role: Role,
        news: &Arc<News>,
        stage: &mut ConnectStage,
    ) -> Result<Self, String> {
        let publishing = Link::new(source.connect(stage).await?, news.clone());
        let consuming = match role {
            Role::Client => publishing.clone(),
            Role::Server | Role::Operator => Link::new(source.connect(stage).await?, news.clone()),
        };
        *stage = ConnectStage::Opening;
        let channel = publisher::confirming(&publishing).await;
        let channel = channel.map_err(|refusal| diagnosis::unopened(refusal, source.address()))?;
        Ok(Self { publishing, consuming, channel })
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

/// Waits for an answer of the broker, but not longer than 30 s. The question itself goes on, since it runs on a task.
async fn in_time<T>(operation: &str, answer: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    tokio::time::timeout(ANSWER_TIMEOUT, answer).await.unwrap_or_else(|_| Err(Refusal::Silent.during(operation)))
}
