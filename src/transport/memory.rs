//! A broker inside this process. It behaves like RabbitMQ, as far as Hopline relies on that.
//!
//! Everybody in the process who opens the same name meets there. A broker ends, with all its messages, when the last
//! connection to it is dropped. Tests can make it fail: see `memory/faults.rs`.

mod broker;
mod channel;
mod faults;
mod publishing;
mod queue;
mod stream;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::{broadcast, mpsc, oneshot, watch};
use uuid::Uuid;

use self::broker::{BrokerState, Peer};
use self::channel::Consumption;
use self::faults::EndReason;
use super::{
    ConnectionEvent, Consumer, Delivery, Life, Lost, Mode, Publication, QueueCount, Receipt, ReceiptSender, Settle,
    Stop,
};
use crate::error::Error;
use crate::topology::{Binding, Declaration};

/// The brokers of this process that somebody is connected to, by name.
static BROKERS: Mutex<BTreeMap<String, Weak<MemoryBroker>>> = Mutex::new(BTreeMap::new());

/// How many events a slow subscriber may be behind before it misses some.
const EVENTS: usize = 64;

/// The most settlements of a channel that are handled while the lock is held once.
const SETTLES_AT_ONCE: usize = 64;

/// One broker: its state behind a lock. It ends when this and all connections to it are dropped.
pub struct MemoryBroker {
    state: Mutex<BrokerState>,
    /// Whether the broker, or one of its queues, does not answer. It is sent whenever that may have changed.
    silent: watch::Sender<bool>,
}

impl MemoryBroker {
    /// The broker with this name. It is made if nobody has it or is connected to it.
    #[must_use]
    pub fn named(name: &str) -> Arc<Self> {
        let mut brokers = BROKERS.lock().expect("no panic while holding the brokers");
        if let Some(broker) = brokers.get(name).and_then(Weak::upgrade) {
            return broker;
        }
        brokers.retain(|_, broker| broker.strong_count() > 0);
        let broker = Arc::new_cyclic(|this: &Weak<Self>| Self {
            state: Mutex::new(BrokerState::new(this.clone())),
            silent: watch::Sender::new(false),
        });
        brokers.insert(name.to_owned(), Arc::downgrade(&broker));
        broker
    }

    fn state(&self) -> MutexGuard<'_, BrokerState> {
        self.state.lock().expect("no panic while holding the broker's state")
    }

    /// Waits until the broker is not stalled.
    async fn answers(&self) {
        let mut silent = self.silent.subscribe();
        while self.state().faults.stalled {
            // This cannot fail: the sender is in `self`.
            let _ = silent.changed().await;
        }
    }
}

impl fmt::Debug for MemoryBroker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Broker").finish_non_exhaustive()
    }
}

/// A connection to a broker in this process. It is closed when its last clone is dropped.
#[derive(Clone)]
pub struct MemoryConnection(Arc<MemoryLink>);

/// What the clones of a connection share.
struct MemoryLink {
    id: u64,
    user: Option<Arc<str>>,
    broker: Arc<MemoryBroker>,
    runtime: Handle,
    events: broadcast::Sender<ConnectionEvent>,
    end: EndReason,
}

impl Drop for MemoryLink {
    fn drop(&mut self) {
        self.broker.state().disconnect(self.id);
    }
}

impl fmt::Debug for MemoryConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("id", &self.0.id).finish_non_exhaustive()
    }
}

impl MemoryConnection {
    /// Connects to the broker with this name, as a user or without one. The broker is made if it does not exist. It
    /// knows every user, and believes everybody.
    ///
    /// # Errors
    /// A sentence, if the broker is [down](Broker::take_down) or has not answered within `patience`.
    ///
    /// # Panics
    /// Outside of a tokio runtime, which the broker's timers need.
    pub async fn open(name: &str, user: Option<&str>, patience: Duration) -> Result<Self, String> {
        let broker = MemoryBroker::named(name);
        if tokio::time::timeout(patience, broker.answers()).await.is_err() {
            return Err(format!("no answer within {patience:?}: the broker in memory is stalled"));
        }
        let down = broker.state().faults.down.clone();
        match down {
            Some(reason) => Err(reason.to_string()),
            None => Ok(Self::to(broker, user)),
        }
    }

    /// A connection to this broker.
    fn to(broker: Arc<MemoryBroker>, user: Option<&str>) -> Self {
        let (runtime, user, end) = (Handle::current(), user.map(Arc::from), EndReason::default());
        let (events, _) = broadcast::channel(EVENTS);
        let peer = Peer {
            runtime: runtime.clone(),
            user: user.clone(),
            events: events.clone(),
            end: end.clone(),
            blocked: false,
        };
        let id = broker.state().connect(peer);
        Self(Arc::new(MemoryLink { id, user, broker, runtime, events, end }))
    }

    /// A connection that has ended already.
    ///
    /// # Panics
    /// As [`MemoryConnection::open`].
    pub(crate) fn absent() -> Self {
        let connection = Self::to(MemoryBroker::named(&Uuid::new_v4().to_string()), None);
        connection.close();
        connection
    }

    /// The user as whom the connection was opened.
    #[must_use]
    pub fn user(&self) -> Option<&str> {
        self.0.user.as_deref()
    }

    /// Declares each part in this order.
    ///
    /// # Errors
    /// `Mismatch` if something exists with other arguments. `Broker` for what does not exist or belongs to another
    /// connection. `Disconnected` after [`MemoryConnection::close`].
    pub async fn declare(&self, parts: &[Declaration]) -> Result<(), Error> {
        drop(self.answers(None).await?);
        for part in parts {
            let queue = match part {
                Declaration::Queue(queue) => Some(&*queue.name),
                Declaration::Exchange(_) | Declaration::Binding(_) => None,
            };
            self.answers(queue).await?.declare(self.0.id, part)?;
        }
        Ok(())
    }

    /// Which of these exchanges do not exist.
    ///
    /// # Errors
    /// `Disconnected` after [`MemoryConnection::close`].
    pub async fn missing(&self, exchanges: &[String]) -> Result<Vec<String>, Error> {
        let state = self.answers(None).await?;
        Ok(exchanges.iter().filter(|name| !state.exchanges.contains_key(*name)).cloned().collect())
    }

    /// Whether this exchange exists.
    pub fn knows(&self, exchange: &str) -> bool {
        exchange.is_empty() || self.0.broker.state().exchanges.contains_key(exchange)
    }

    /// Deletes bindings.
    ///
    /// # Errors
    /// `Disconnected` after [`MemoryConnection::close`].
    pub async fn unbind(&self, bindings: &[Binding]) -> Result<(), Error> {
        let mut state = self.answers(None).await?;
        bindings.iter().for_each(|binding| state.unbind(binding));
        Ok(())
    }

    /// Routes a message. The receipt is resolved when this returns, unless the broker has a [fault](faults) that
    /// concerns the message.
    pub fn publish(&self, publication: Publication) -> Receipt {
        let (outcome, receipt) = Receipt::new();
        self.submit(publication, outcome);
        receipt
    }

    /// The same, where whoever publishes says to whom the outcome is told.
    pub(super) fn submit(&self, mut publication: Publication, outcome: ReceiptSender) {
        publication.properties.user_id = self.0.user.as_deref().map(str::to_owned);
        let mut state = self.0.broker.state();
        if !state.is_connected(self.0.id) {
            outcome.tell(Err(self.closed()));
        } else {
            state.take(self.0.id, publication, outcome);
        }
    }

    /// The broker's reason for accepting no messages of this connection, after it has told it.
    #[must_use]
    pub fn blocked(&self) -> Option<Arc<str>> {
        self.0.broker.state().blocked(self.0.id)
    }

    /// Begins to consume a queue.
    ///
    /// # Errors
    /// `Broker` if the queue does not exist or belongs to another connection, `Disconnected` after
    /// [`MemoryConnection::close`].
    pub async fn consume(&self, queue: &str, mode: Mode) -> Result<Consumer, Error> {
        let mut state = self.answers(Some(queue)).await?;
        let (sent, deliveries) = mpsc::unbounded_channel();
        let (settler, settled) = mpsc::unbounded_channel();
        let (cancel, cancelled) = oneshot::channel();
        let life = Arc::new(Life::default());
        let consumption = Consumption { mode, deliveries: sent, settler };
        let channel = state.consume(self.0.id, queue, consumption, life.clone())?;
        let broker = (Arc::downgrade(&self.0.broker), self.0.broker.silent.subscribe());
        self.0.runtime.spawn(serve(broker, (channel, queue.to_owned()), cancelled, settled));
        Ok(Consumer { deliveries, cancel: Some(cancel), life })
    }

    /// Takes one message out of a queue. `None` if none is ready.
    ///
    /// # Errors
    /// As [`MemoryConnection::consume`].
    pub async fn get(&self, queue: &str) -> Result<Option<Delivery>, Error> {
        self.answers(Some(queue)).await?.get(self.0.id, queue)
    }

    /// Publishes a message again and again.
    pub async fn repeat(&self, publication: Publication) {
        while self.publish(publication.clone()).await.is_ok() {
            tokio::task::yield_now().await;
        }
    }

    /// How many messages of a queue are ready. `None` if there is no such queue.
    ///
    /// # Errors
    /// `Broker` if the queue belongs to another connection, `Disconnected` after [`MemoryConnection::close`].
    pub async fn count(&self, queue: &str) -> Result<Option<QueueCount>, Error> {
        self.answers(Some(queue)).await?.count(self.0.id, queue)
    }

    /// Deletes a queue. Returns how many of its messages were ready. `None` if there is no such queue.
    ///
    /// # Errors
    /// As [`MemoryConnection::count`].
    pub async fn delete(&self, queue: &str) -> Result<Option<u64>, Error> {
        let mut state = self.answers(Some(queue)).await?;
        let counted = state.count(self.0.id, queue)?;
        state.remove(queue);
        Ok(counted.map(|count| count.waiting))
    }

    /// The offset of a stream's last message. `None` if nothing was written to it.
    ///
    /// # Errors
    /// As [`MemoryConnection::consume`].
    pub async fn last_offset(&self, stream: &str) -> Result<Option<u64>, Error> {
        self.answers(Some(stream)).await?.last_offset(stream)
    }

    /// Tells what happens to the connection from now on.
    #[must_use]
    pub fn events(&self) -> broadcast::Receiver<ConnectionEvent> {
        self.0.events.subscribe()
    }

    /// Closes the connection for all its clones. Deliveries that are not settled are requeued, and exclusive queues are
    /// deleted.
    pub fn close(&self) {
        self.0.broker.state().disconnect(self.0.id);
    }

    /// Waits until the broker answers, about a queue or about anything else. Returns its state, locked.
    ///
    /// # Errors
    /// The connection has ended.
    async fn answers(&self, queue: Option<&str>) -> Result<MutexGuard<'_, BrokerState>, Error> {
        let mut silent = self.0.broker.silent.subscribe();
        loop {
            if let Some(answer) = self.answer(queue) {
                return answer;
            }
            // This cannot fail: the sender is in the broker, which this connection holds.
            let _ = silent.changed().await;
        }
    }

    /// The same without waiting. `None` if the broker does not answer now.
    fn answer(&self, queue: Option<&str>) -> Option<Result<MutexGuard<'_, BrokerState>, Error>> {
        let state = self.0.broker.state();
        if !state.is_connected(self.0.id) {
            return Some(Err(self.closed().into()));
        }
        (!state.faults.is_silent(queue)).then_some(Ok(state))
    }

    fn closed(&self) -> Lost {
        let reason = self.0.end.get().cloned();
        Lost::connection(false, reason.unwrap_or_else(|| "the connection was closed".into()))
    }
}

/// A message that was taken out of a queue without a consumer. It has a channel of its own.
pub(crate) struct Pull {
    broker: Weak<MemoryBroker>,
    channel: u64,
}

impl Pull {
    /// Settles the message. If the broker or the connection is gone, there is nothing to settle.
    pub(crate) fn settle(self, settle: Settle) {
        if let Some(broker) = self.broker.upgrade() {
            broker.state().hear_of_pulled(self.channel, settle);
        }
    }
}

impl fmt::Debug for Pull {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pull").field("channel", &self.channel).finish_non_exhaustive()
    }
}

/// The task of a consumer. It passes settlements to the broker until nobody can send any more.
async fn serve(
    (broker, mut silent): (Weak<MemoryBroker>, watch::Receiver<bool>),
    (channel, queue): (u64, String),
    mut cancelled: oneshot::Receiver<Stop>,
    mut settled: mpsc::UnboundedReceiver<(u64, Settle)>,
) {
    let mut consuming = true;
    let mut settles = Vec::with_capacity(SETTLES_AT_ONCE);
    loop {
        let mut stops = false;
        let count = tokio::select! {
            // Dropping a consumer cancels it as well.
            _ = &mut cancelled, if consuming => {
                stops = true;
                0
            }
            count = settled.recv_many(&mut settles, SETTLES_AT_ONCE) => count,
        };
        let broker = loop {
            // This is cheaper than locking the state, and mostly enough.
            let is_silent = *silent.borrow_and_update();
            let Some(broker) = broker.upgrade() else { return };
            if !is_silent || !broker.state().hears_nothing_of(channel, &queue) {
                break broker;
            }
            drop(broker);
            if silent.changed().await.is_err() {
                return;
            }
        };
        if stops {
            consuming = false;
            broker.state().cancel(channel);
        } else if count == 0 {
            return broker.state().end(&[channel]);
        } else {
            broker.state().settle(channel, settles.drain(..));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use bytes::Bytes;

    use super::*;
    use crate::topology::{Queue, QueueKind};
    use crate::transport::{Confirm, Properties};

    fn unique() -> String {
        uuid::Uuid::new_v4().to_string()
    }

    /// A connection to a new broker with one queue, named `queue`.
    async fn with_queue(queue: Queue) -> MemoryConnection {
        let connection = open(&unique()).await;
        connection.declare(&[Declaration::Queue(queue)]).await.expect("a queue that nobody has");
        connection
    }

    async fn open(name: &str) -> MemoryConnection {
        MemoryConnection::open(name, None, Duration::ZERO).await.expect("it answers at once")
    }

    fn message(expiration: Option<Duration>) -> Publication {
        Publication {
            exchange: String::new(),
            key: "queue".to_owned(),
            mandatory: true,
            properties: Properties { expiration, ..Properties::default() },
            body: Bytes::new(),
        }
    }

    #[tokio::test]
    async fn those_who_open_the_same_name_meet_until_the_last_has_gone() {
        let (name, other_name) = (unique(), unique());
        let (one, two, stranger) = (open(&name).await, open(&name).await, open(&other_name).await);
        one.declare(&[Declaration::Queue(Queue::new("queue", QueueKind::Classic))]).await.expect("a new queue");
        assert_eq!(two.publish(message(None)).await, Ok(Confirm::Accepted));
        assert_eq!(stranger.publish(message(None)).await, Ok(Confirm::Returned));
        drop(one);
        assert_eq!(two.publish(message(None)).await, Ok(Confirm::Accepted));
        drop(two);
        assert_eq!(open(&name).await.publish(message(None)).await, Ok(Confirm::Returned));
    }

    #[tokio::test]
    async fn a_connection_closes_with_its_last_clone() {
        let name = unique();
        let (owner, other) = (open(&name).await, open(&name).await);
        let clone = owner.clone();
        owner.declare(&[Declaration::Queue(Queue::new("queue", QueueKind::Exclusive))]).await.expect("a new queue");
        drop(owner);
        assert_eq!(other.publish(message(None)).await, Ok(Confirm::Accepted));
        drop(clone);
        assert_eq!(other.publish(message(None)).await, Ok(Confirm::Returned));
    }

    #[tokio::test]
    async fn what_is_published_during_an_alarm_waits_for_its_end_in_order() {
        let connection = with_queue(Queue { max_length: Some(1), ..Queue::new("queue", QueueKind::Classic) }).await;
        let mut events = connection.events();
        connection.0.broker.alarm("low on memory");
        assert_eq!(connection.blocked(), None);
        let (mut first, second) = (connection.publish(message(None)), connection.publish(message(None)));
        assert_eq!(events.recv().await, Ok(ConnectionEvent::Blocked("low on memory".into())));
        assert_eq!(connection.blocked().as_deref(), Some("low on memory"));
        assert!(futures::poll!(&mut first).is_pending());
        connection.0.broker.restore();
        assert_eq!((first.await, second.await), (Ok(Confirm::Accepted), Ok(Confirm::Refused)));
        assert_eq!((events.recv().await, connection.blocked()), (Ok(ConnectionEvent::Unblocked), None));
    }

    #[tokio::test]
    async fn a_thread_without_a_runtime_can_publish() {
        let connection = with_queue(Queue::new("queue", QueueKind::Classic)).await;
        let publisher = connection.clone();
        let receipt = std::thread::spawn(move || publisher.publish(message(Some(Duration::from_secs(60)))));
        assert_eq!(receipt.join().expect("no panic").await, Ok(Confirm::Accepted));
    }

    #[tokio::test(start_paused = true)]
    async fn time_is_tokios_and_can_be_paused() {
        let day = Duration::from_secs(86_400);
        let connection =
            with_queue(Queue { expires: Some(day), max_length: Some(1), ..Queue::new("queue", QueueKind::Classic) })
                .await;
        assert_eq!(connection.publish(message(Some(day / 4))).await, Ok(Confirm::Accepted));
        assert_eq!(connection.publish(message(None)).await, Ok(Confirm::Refused));
        tokio::time::sleep(day / 2).await;
        assert_eq!(connection.publish(message(None)).await, Ok(Confirm::Accepted));
        tokio::time::sleep(day).await;
        assert_eq!(connection.publish(message(None)).await, Ok(Confirm::Returned));
    }

    #[tokio::test]
    async fn giving_back_does_not_count_towards_the_delivery_limit() {
        let connection = with_queue(Queue { delivery_limit: Some(1), ..Queue::new("queue", QueueKind::Quorum) }).await;
        assert_eq!(connection.publish(message(None)).await, Ok(Confirm::Accepted));
        let mut consumer = connection.consume("queue", Mode::Settle { prefetch: 1 }).await.expect("the queue exists");
        for _ in 0..50 {
            consumer.next().await.expect("it comes again").settle(Settle::GiveBack);
        }
    }

    #[tokio::test]
    async fn timers_outlive_the_runtime_of_the_connection_that_closes() {
        let name = unique();
        let staying = open(&name).await;
        let other_name = name.clone();
        let leaving = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
            runtime.block_on(async {
                let leaving = open(&other_name).await;
                let brief =
                    Queue { expires: Some(Duration::from_millis(50)), ..Queue::new("queue", QueueKind::Classic) };
                leaving.declare(&[Declaration::Queue(brief)]).await.expect("a new queue");
            });
        });
        leaving.join().expect("no panic");
        while staying.publish(message(None)).await == Ok(Confirm::Accepted) {
            tokio::task::yield_now().await;
        }
    }
}
