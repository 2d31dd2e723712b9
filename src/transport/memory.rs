//! A broker inside the process, with RabbitMQ's semantics as far as Hopline relies on them.
//!
//! Everybody in the process who opens the same name meets there. A broker goes, with all that it holds, when the last
//! connection to it is dropped.

mod broker;
mod channel;
mod publishing;
mod queue;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use tokio::runtime::Handle;
use tokio::sync::{broadcast, mpsc, oneshot};
use uuid::Uuid;

use self::broker::State;
use self::channel::Consumption;
use super::{Consumer, Delivery, Event, Life, Lost, Mode, Publication, Receipt, Settle, Stop};
use crate::error::Error;
use crate::topology::{Binding, Declaration};

/// The brokers of this process that somebody is connected to.
static BROKERS: Mutex<BTreeMap<String, Weak<Broker>>> = Mutex::new(BTreeMap::new());

/// How many events a slow subscriber may be behind.
const EVENTS: usize = 64;

/// How many settled deliveries of a channel are handled under one lock.
const SETTLES_AT_ONCE: usize = 64;

/// One broker: its state, and the lock around it.
struct Broker(Mutex<State>);

impl Broker {
    /// The broker of this name; a new one when nobody is connected to it.
    fn named(name: &str) -> Arc<Self> {
        let mut brokers = BROKERS.lock().expect("no panic while holding the brokers");
        if let Some(broker) = brokers.get(name).and_then(Weak::upgrade) {
            return broker;
        }
        brokers.retain(|_, broker| broker.strong_count() > 0);
        let broker = Arc::new_cyclic(|this: &Weak<Self>| Self(Mutex::new(State::new(this.clone()))));
        brokers.insert(name.to_owned(), Arc::downgrade(&broker));
        broker
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("no panic while holding the broker's state")
    }
}

/// A connection to a broker in this process; it closes when its last clone is dropped.
#[derive(Clone)]
pub struct Connection(Arc<Link>);

/// What the clones of a connection share.
struct Link {
    id: u64,
    user: Option<String>,
    broker: Arc<Broker>,
    runtime: Handle,
    events: broadcast::Sender<Event>,
}

impl Drop for Link {
    fn drop(&mut self) {
        self.broker.state().disconnect(self.id);
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("id", &self.0.id).finish_non_exhaustive()
    }
}

impl Connection {
    /// Connects to the broker of this name, which is made when it does not exist.
    ///
    /// # Panics
    /// Outside a tokio runtime: the broker's timers need one.
    #[must_use]
    pub fn open(name: &str) -> Self {
        Self::open_as(None, name)
    }

    /// The same as a user, who need not be known and is who it says it is.
    ///
    /// # Panics
    /// As [`Connection::open`].
    #[must_use]
    pub fn open_as(user: Option<&str>, name: &str) -> Self {
        let runtime = Handle::current();
        let broker = Broker::named(name);
        let (events, _) = broadcast::channel(EVENTS);
        let id = broker.state().connect(runtime.clone(), events.clone());
        Self(Arc::new(Link { id, user: user.map(str::to_owned), broker, runtime, events }))
    }

    /// One that has ended already, to a broker that nobody else can reach.
    ///
    /// # Panics
    /// As [`Connection::open`].
    pub(crate) fn absent() -> Self {
        let connection = Self::open(&Uuid::new_v4().to_string());
        connection.close();
        connection
    }

    /// The user that the connection was opened as.
    #[must_use]
    pub fn user(&self) -> Option<&str> {
        self.0.user.as_deref()
    }

    /// Declares each part in order.
    ///
    /// # Errors
    /// `Mismatch` where something exists with other arguments, `Broker` for what is missing or belongs to another
    /// connection, `Disconnected` after [`Connection::close`].
    pub fn declare(&self, parts: &[Declaration]) -> Result<(), Error> {
        let mut state = self.state()?;
        parts.iter().try_for_each(|part| state.declare(self.0.id, part))
    }

    /// Which of these exchanges are not there.
    ///
    /// # Errors
    /// `Disconnected` after [`Connection::close`].
    pub fn missing(&self, exchanges: &[String]) -> Result<Vec<String>, Error> {
        let state = self.state()?;
        Ok(exchanges.iter().filter(|name| !state.exchanges.contains_key(*name)).cloned().collect())
    }

    /// Takes bindings away.
    ///
    /// # Errors
    /// `Disconnected` after [`Connection::close`].
    pub fn unbind(&self, bindings: &[Binding]) -> Result<(), Error> {
        let mut state = self.state()?;
        bindings.iter().for_each(|binding| state.unbind(binding));
        Ok(())
    }

    /// Routes a message at once, and the receipt is resolved when this returns; during an [alarm](Self::alarm) after that.
    pub fn publish(&self, mut publication: Publication) -> Receipt {
        publication.properties.user_id.clone_from(&self.0.user);
        let (said, receipt) = Receipt::new();
        let mut state = self.0.broker.state();
        if !state.is_connected(self.0.id) {
            // Nobody has to read a receipt.
            let _ = said.send(Err(closed()));
        } else {
            state.take(self.0.id, publication, said);
        }
        receipt
    }

    /// For tests: the broker is short of memory, for this reason, or no longer is. Until then what is published by any
    /// connection waits.
    pub fn alarm(&self, reason: Option<&str>) {
        self.0.broker.state().alarm(reason.map(Into::into));
    }

    /// Why the broker takes no publications of this connection, once it has said so.
    #[must_use]
    pub fn blocked(&self) -> Option<Arc<str>> {
        self.0.broker.state().blocked(self.0.id)
    }

    /// Starts to consume a queue.
    ///
    /// # Errors
    /// `Broker` when the queue does not exist or is another connection's, `Disconnected` after [`Connection::close`].
    pub fn consume(&self, queue: &str, mode: Mode) -> Result<Consumer, Error> {
        let (sent, deliveries) = mpsc::unbounded_channel();
        let (settler, settled) = mpsc::unbounded_channel();
        let (cancel, cancelled) = oneshot::channel();
        let life = Arc::new(Life::default());
        let consumption = Consumption { mode, deliveries: sent, settler };
        let channel = self.state()?.consume(self.0.id, queue, consumption, life.clone())?;
        self.0.runtime.spawn(serve(Arc::downgrade(&self.0.broker), channel, cancelled, settled));
        Ok(Consumer { deliveries, cancel: Some(cancel), life })
    }

    /// Takes one message out of a queue; none when none waits.
    ///
    /// # Errors
    /// As [`Connection::consume`].
    pub fn get(&self, queue: &str) -> Result<Option<Delivery>, Error> {
        self.state()?.get(self.0.id, queue)
    }

    /// Publishes a message again and again.
    pub async fn repeat(&self, publication: Publication) {
        while self.publish(publication.clone()).await.is_ok() {
            tokio::task::yield_now().await;
        }
    }

    /// How many messages wait in a queue; none when there is no such queue.
    ///
    /// # Errors
    /// `Broker` when it is another connection's, `Disconnected` after [`Connection::close`].
    pub fn count(&self, queue: &str) -> Result<Option<u64>, Error> {
        self.state()?.count(self.0.id, queue)
    }

    /// What happens to the connection from now on: it can be blocked, but not lost.
    #[must_use]
    pub fn events(&self) -> broadcast::Receiver<Event> {
        self.0.events.subscribe()
    }

    /// Closes the connection for all its clones: unsettled deliveries go back, exclusive queues are deleted.
    pub fn close(&self) {
        self.0.broker.state().disconnect(self.0.id);
    }

    /// The broker's state, if it still knows this connection.
    fn state(&self) -> Result<MutexGuard<'_, State>, Error> {
        let state = self.0.broker.state();
        if state.is_connected(self.0.id) { Ok(state) } else { Err(closed().into()) }
    }
}

/// A message that was taken out of a queue without consuming it: it has a channel of its own.
pub(crate) struct Pull {
    broker: Weak<Broker>,
    channel: u64,
}

impl Pull {
    /// Settles the message; with its broker or its connection gone, there is nothing left to settle.
    pub(crate) fn settle(self, settle: Settle) {
        if let Some(broker) = self.broker.upgrade() {
            broker.state().settle_pulled(self.channel, settle);
        }
    }
}

impl fmt::Debug for Pull {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pull").field("channel", &self.channel).finish_non_exhaustive()
    }
}

fn closed() -> Lost {
    Lost::connection(false, "the connection was closed".into())
}

/// Carries to the broker what is said of a channel's deliveries, until nobody can say anything any more.
async fn serve(
    broker: Weak<Broker>,
    channel: u64,
    mut cancelled: oneshot::Receiver<Stop>,
    mut settled: mpsc::UnboundedReceiver<(u64, Settle)>,
) {
    let mut consuming = true;
    let mut settles = Vec::with_capacity(SETTLES_AT_ONCE);
    loop {
        tokio::select! {
            // A consumer that is dropped is cancelled too.
            _ = &mut cancelled, if consuming => {
                consuming = false;
                let Some(broker) = broker.upgrade() else { return };
                broker.state().cancel(channel);
            }
            count = settled.recv_many(&mut settles, SETTLES_AT_ONCE) => {
                let Some(broker) = broker.upgrade() else { return };
                if count == 0 {
                    return broker.state().end(&[channel]);
                }
                broker.state().settle(channel, settles.drain(..));
            }
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
    fn with_queue(queue: Queue) -> Connection {
        let connection = Connection::open(&unique());
        connection.declare(&[Declaration::Queue(queue)]).expect("a queue that nobody has");
        connection
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
        let (one, two, stranger) = (Connection::open(&name), Connection::open(&name), Connection::open(&other_name));
        one.declare(&[Declaration::Queue(Queue::new("queue", QueueKind::Classic))]).expect("a new queue");
        assert_eq!(two.publish(message(None)).await, Ok(Confirm::Accepted));
        assert_eq!(stranger.publish(message(None)).await, Ok(Confirm::Returned));
        drop(one);
        assert_eq!(two.publish(message(None)).await, Ok(Confirm::Accepted));
        drop(two);
        assert_eq!(Connection::open(&name).publish(message(None)).await, Ok(Confirm::Returned));
    }

    #[tokio::test]
    async fn a_connection_closes_with_its_last_clone() {
        let name = unique();
        let (owner, other) = (Connection::open(&name), Connection::open(&name));
        let clone = owner.clone();
        owner.declare(&[Declaration::Queue(Queue::new("queue", QueueKind::Exclusive))]).expect("a new queue");
        drop(owner);
        assert_eq!(other.publish(message(None)).await, Ok(Confirm::Accepted));
        drop(clone);
        assert_eq!(other.publish(message(None)).await, Ok(Confirm::Returned));
    }

    #[tokio::test]
    async fn what_is_published_during_an_alarm_waits_for_its_end_in_order() {
        let connection = with_queue(Queue { max_length: Some(1), ..Queue::new("queue", QueueKind::Classic) });
        let mut events = connection.events();
        connection.alarm(Some("low on memory"));
        assert_eq!(connection.blocked(), None);
        let (mut first, second) = (connection.publish(message(None)), connection.publish(message(None)));
        assert_eq!(events.recv().await, Ok(Event::Blocked("low on memory".into())));
        assert_eq!(connection.blocked().as_deref(), Some("low on memory"));
        assert!(futures::poll!(&mut first).is_pending());
        connection.alarm(None);
        assert_eq!((first.await, second.await), (Ok(Confirm::Accepted), Ok(Confirm::Refused)));
        assert_eq!((events.recv().await, connection.blocked()), (Ok(Event::Unblocked), None));
    }

    #[tokio::test]
    async fn a_thread_without_a_runtime_can_publish() {
        let connection = with_queue(Queue::new("queue", QueueKind::Classic));
        let publisher = connection.clone();
        let receipt = std::thread::spawn(move || publisher.publish(message(Some(Duration::from_secs(60)))));
        assert_eq!(receipt.join().expect("no panic").await, Ok(Confirm::Accepted));
    }

    #[tokio::test(start_paused = true)]
    async fn time_is_tokios_and_can_be_paused() {
        let day = Duration::from_secs(86_400);
        let connection =
            with_queue(Queue { expires: Some(day), max_length: Some(1), ..Queue::new("queue", QueueKind::Classic) });
        assert_eq!(connection.publish(message(Some(day / 4))).await, Ok(Confirm::Accepted));
        assert_eq!(connection.publish(message(None)).await, Ok(Confirm::Refused));
        tokio::time::sleep(day / 2).await;
        assert_eq!(connection.publish(message(None)).await, Ok(Confirm::Accepted));
        tokio::time::sleep(day).await;
        assert_eq!(connection.publish(message(None)).await, Ok(Confirm::Returned));
    }

    #[tokio::test]
    async fn giving_back_does_not_count_towards_the_delivery_limit() {
        let connection = with_queue(Queue { delivery_limit: Some(1), ..Queue::new("queue", QueueKind::Quorum) });
        assert_eq!(connection.publish(message(None)).await, Ok(Confirm::Accepted));
        let mut consumer = connection.consume("queue", Mode::Settle { prefetch: 1 }).expect("the queue exists");
        for _ in 0..50 {
            consumer.next().await.expect("it comes again").settle(Settle::GiveBack);
        }
    }

    #[tokio::test]
    async fn timers_outlive_the_runtime_of_the_connection_that_closes() {
        let name = unique();
        let staying = Connection::open(&name);
        let other_name = name.clone();
        let leaving = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
            runtime.block_on(async {
                let leaving = Connection::open(&other_name);
                let brief =
                    Queue { expires: Some(Duration::from_millis(50)), ..Queue::new("queue", QueueKind::Classic) };
                leaving.declare(&[Declaration::Queue(brief)]).expect("a new queue");
            });
        });
        leaving.join().expect("no panic");
        while staying.publish(message(None)).await == Ok(Confirm::Accepted) {
            tokio::task::yield_now().await;
        }
    }
}
