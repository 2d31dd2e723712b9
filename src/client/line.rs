//! What a client's calls hold of the task that publishes what waits to leave and hands out what comes back.

mod task;

use std::collections::HashSet;
use std::hash::{Hash, Hasher};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::time::Instant;
use uuid::Uuid;

use self::task::Task;
use super::pending::Ticket;
use super::replies::{End, Place, Waiter};
use super::session::{Session, Sessions};
use super::target::Target;
use super::{Client, Traffic};
use crate::error::Error;
use crate::outbox::Parcel;
use crate::state::{State, blocked_for};
use crate::topology::{Declaration, Exchange, ExchangeKind};
use crate::transport::{Lost, Transport};

/// What the messages of parcels that may share one agree on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Address {
    pub(super) exchange: Arc<str>,
    pub(super) key: Arc<str>,
    pub(super) mandatory: bool,
    pub(super) persistent: bool,
    /// Whether it says where replies go.
    pub(super) answered: bool,
    pub(super) priority: Option<u8>,
}

impl Hash for Address {
    /// By what differs most.
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        self.key.hash(hasher);
    }
}

/// Who is told of a parcel, and what may become of it.
#[derive(Debug)]
pub(super) struct Token {
    /// What the broker said of it.
    pub(super) said: Option<oneshot::Sender<End>>,
    /// What comes back.
    pub(super) reply: Option<(Waiter, Arc<Target>)>,
    /// From then on it is not to leave any more.
    pub(super) deadline: Instant,
    /// Whether it may leave again though it may have arrived.
    pub(super) repeatable: bool,
    /// How often it has left.
    pub(super) attempts: u32,
    /// Its place among the calls in flight, where they are limited.
    pub(super) place: Option<Place>,
}

impl Token {
    /// Of a parcel of which nobody is told.
    pub(super) fn until(deadline: Instant) -> Self {
        Self { said: None, reply: None, deadline, repeatable: false, attempts: 0, place: None }
    }

    /// Nobody wants a parcel that has not left when its sender is gone; if it ever had one.
    fn is_wanted(&self) -> bool {
        match (&self.said, &self.reply) {
            (Some(said), _) => !said.is_closed(),
            (None, Some((Waiter::One(reply), _))) => !reply.is_closed(),
            (None, Some((Waiter::Many(_), _)) | None) => true,
        }
    }

    /// Whether anybody is told what becomes of it.
    fn is_told(&self) -> bool {
        self.said.is_some() || self.reply.is_some()
    }

    /// Tells what it came to, if that is the end.
    fn end(self, end: &End) {
        if let Some((Waiter::One(reply), _)) = self.reply {
            // The caller gave up at this very moment, here and below.
            let _ = reply.send(Err(end.clone()));
        }
        if let Some(sender) = self.said {
            let _ = sender.send(end.clone());
        }
    }
}

enum Order {
    Post(Address, Parcel<Token>),
    /// Nobody waits for replies any more; where a ticket is given, those who run the call are told. The client is kept
    /// until they are.
    Forget(Uuid, Option<Box<(Client, Ticket)>>),
    /// The time of a call is over: it is told whether it has left.
    Overdue(Uuid),
    /// Ends all that waits, and closes the connection.
    Close(oneshot::Sender<()>),
}

/// What the task is to keep to.
#[derive(Debug)]
pub(super) struct Rules {
    pub(super) max_message_size: usize,
    /// How long a call waits for a broker that takes nothing.
    pub(super) blocked_wait: Duration,
    /// How many calls may be in flight, and whether others wait or are refused.
    pub(super) places: Option<Places>,
}

#[derive(Debug)]
pub(super) struct Places {
    pub(super) free: Arc<Semaphore>,
    pub(super) limit: usize,
    pub(super) waits: bool,
}

/// What the callers hold of the task. It ends, and closes the connection, when this is dropped.
#[derive(Debug)]
pub(super) struct Line {
    orders: mpsc::UnboundedSender<Order>,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    state: Arc<watch::Sender<State>>,
    /// The connection, while there is one.
    transport: watch::Sender<Option<Transport>>,
    /// Exchanges that this client has declared on it, and who declares another.
    declared: Mutex<HashSet<String>>,
    declaring: tokio::sync::Mutex<()>,
    /// How long a call waits for a broker that takes nothing.
    blocked_wait: Duration,
    messages_sent: AtomicU64,
    calls_sent: AtomicU64,
    messages_received: AtomicU64,
    replies_received: AtomicU64,
    replies_ignored: AtomicU64,
    /// How many calls wait for a reply now.
    in_flight: AtomicUsize,
}

impl Line {
    /// With a session that is open, or none, which is then opened for as long as it takes.
    pub(super) fn start(sessions: Sessions, session: Option<Session>, rules: Rules) -> Self {
        let (orders, waiting) = mpsc::unbounded_channel();
        let shared = Arc::new(Shared {
            state: Arc::new(watch::channel(State::Connecting { reason: None }).0),
            transport: watch::channel(None).0,
            declared: Mutex::default(),
            declaring: tokio::sync::Mutex::default(),
            blocked_wait: rules.blocked_wait,
            messages_sent: AtomicU64::new(0),
            calls_sent: AtomicU64::new(0),
            messages_received: AtomicU64::new(0),
            replies_received: AtomicU64::new(0),
            replies_ignored: AtomicU64::new(0),
            in_flight: AtomicUsize::new(0),
        });
        let task = Task::new(sessions, session, rules, waiting, shared.clone());
        tokio::spawn(task.run());
        Self { orders, shared }
    }

    /// Puts a frame on its way.
    pub(super) fn post(&self, address: Address, parcel: Parcel<Token>) {
        if let Err(mpsc::error::SendError(Order::Post(_, parcel))) = self.orders.send(Order::Post(address, parcel)) {
            // The task outlives the client unless the runtime has gone.
            let reason = "the runtime of the connection has ended".into();
            parcel.token.end(&End::Lost(Lost { handed_over: false, connected: false, reason }));
        }
    }

    /// Nobody waits for `id` any more. With a ticket, whoever runs the call is told, once some queue has taken it.
    pub(super) fn forget(&self, id: Uuid, cancel: Option<(Client, Ticket)>) {
        // A task that has ended has nothing to forget.
        let _ = self.orders.send(Order::Forget(id, cancel.map(Box::new)));
    }

    /// The time of `id` is over. Whoever waits for it is told what it came to.
    pub(super) fn overdue(&self, id: Uuid) {
        // A task that has ended has told it.
        let _ = self.orders.send(Order::Overdue(id));
    }

    pub(super) fn state(&self) -> watch::Receiver<State> {
        self.shared.state.subscribe()
    }

    pub(super) fn is_closed(&self) -> bool {
        *self.shared.state.borrow() == State::Closed
    }

    /// Why no reply comes: what the connection says of itself.
    pub(super) fn reason(&self) -> Arc<str> {
        self.shared.state.borrow().missing().unwrap_or_else(|| "no more replies".into())
    }

    /// Declares a fanout exchange, once for each connection; waits for one if there is none.
    ///
    /// # Errors
    /// `Disconnected` when there is none by the deadline, `Mismatch` or `Broker` for what it refuses.
    pub(super) async fn declare(&self, exchange: &str, deadline: Instant) -> Result<(), Error> {
        let declared = || self.shared.declared.lock().expect("no panic while holding the set");
        let mut transports = self.shared.transport.subscribe();
        let declaring = async {
            loop {
                let there = transports.wait_for(Option::is_some).await.ok().and_then(|there| there.clone());
                let Some(transport) = there else { return Err(self.unconnected()) };
                if declared().contains(exchange) {
                    return Ok(());
                }
                // Of many who want the same, one asks.
                let _turn = self.shared.declaring.lock().await;
                if declared().contains(exchange) {
                    return Ok(());
                }
                let fanout = Exchange { name: exchange.to_owned(), kind: ExchangeKind::Fanout };
                match transport.declare(&[Declaration::Exchange(fanout)]).await {
                    Err(Error::Disconnected { .. }) if !self.is_closed() => {
                        // There will be another one.
                        if transports.changed().await.is_err() {
                            return Err(self.unconnected());
                        }
                    }
                    Err(error) => return Err(error),
                    Ok(()) => {
                        declared().insert(exchange.to_owned());
                        return Ok(());
                    }
                }
            }
        };
        let mut state = self.state();
        tokio::select! {
            declared = declaring => declared,
            _ = state.wait_for(|state| *state == State::Closed) => Err(self.unconnected()),
            () = tokio::time::sleep_until(deadline) => Err(self.unconnected()),
            () = blocked_for(self.state(), self.shared.blocked_wait) => Err(self.unconnected()),
        }
    }

    /// Why the broker cannot be asked.
    fn unconnected(&self) -> Error {
        match &*self.shared.state.borrow() {
            State::Blocked { reason, since } => {
                Error::Blocked { reason: reason.to_string(), after: since.elapsed(), may_have_run: false }
            }
            state => {
                let reason = state.missing().unwrap_or_else(|| "it gives no answer".into());
                Error::Disconnected { may_have_run: false, reason: reason.to_string() }
            }
        }
    }

    pub(super) async fn close(&self) {
        let (done, closed) = oneshot::channel();
        if self.orders.send(Order::Close(done)).is_ok() {
            // A task that ends without an answer has closed as well.
            let _ = closed.await;
        }
    }

    pub(super) fn in_flight(&self) -> usize {
        self.shared.in_flight.load(Ordering::Relaxed)
    }

    pub(super) fn traffic(&self) -> Traffic {
        Traffic {
            messages_sent: self.shared.messages_sent.load(Ordering::Relaxed),
            calls_sent: self.shared.calls_sent.load(Ordering::Relaxed),
            messages_received: self.shared.messages_received.load(Ordering::Relaxed),
            replies_received: self.shared.replies_received.load(Ordering::Relaxed),
            replies_ignored: self.shared.replies_ignored.load(Ordering::Relaxed),
        }
    }
}
