//! What a client's calls hold of the task that publishes what waits to leave and hands out what comes back.

mod places;
mod task;
mod unconfirmed;

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use self::task::Task;
use super::builder::WhenFull;
use super::replies::{Call, End, Place, Waiter};
use super::session::{Session, Sessions};
use super::target::Target;
use super::{Absent, Traffic};
use crate::outbox::Parcel;
use crate::route::Address;
use crate::state::State;
use crate::transport::Lost;

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
    /// Whether it leaves though no instance may be there.
    pub(super) absent: Absent,
    /// Cancelled when the server drains that serves the call itself, and one of whose handlers made it.
    pub(super) leaving: Option<CancellationToken>,
    /// How often it has left.
    pub(super) attempts: u32,
    /// How many attempts of its call came before it, which were other requests.
    pub(super) before: u32,
    /// Its place among the calls in flight, where they are limited.
    pub(super) place: Option<Place>,
}

impl Token {
    /// Of a parcel of which nobody is told.
    pub(super) fn until(deadline: Instant) -> Self {
        Self {
            said: None,
            reply: None,
            deadline,
            repeatable: false,
            absent: Absent::Wait,
            leaving: None,
            attempts: 0,
            before: 0,
            place: None,
        }
    }

    /// Takes back what its call held while that was under way.
    fn take_back(&mut self, call: Call<Addressed>) {
        let Call { waiter, target, leaving, place, .. } = call;
        (self.reply, self.leaving, self.place) = (Some((waiter, target)), leaving, place);
    }

    /// A parcel whose waiter has gone is not sent; one that never had a waiter is.
    fn is_wanted(&self) -> bool {
        match (&self.said, &self.reply) {
            (Some(said), _) => !said.is_closed(),
            (None, Some((Waiter::One(reply), _))) => !reply.is_closed(),
            (None, Some((Waiter::Many(_), _)) | None) => true,
        }
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

/// What leaves, and where to.
pub(super) type Addressed = (Address, Parcel<Token>);

#[expect(clippy::large_enum_variant, reason = "nearly all orders are of the large one")]
enum Order {
    Post(Address, Parcel<Token>),
    /// Nobody waits for replies any more; with what there is of a cancel, those who run the call are told.
    Forget(Uuid, Option<Box<Addressed>>),
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
    /// How many calls may be in flight, and what becomes of others.
    pub(super) max_in_flight: Option<(usize, WhenFull)>,
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
    /// Why there will be no connection any more, once that is so.
    over: OnceLock<Arc<str>>,
    messages_sent: AtomicU64,
    calls_sent: AtomicU64,
    messages_received: AtomicU64,
    replies_received: AtomicU64,
    replies_ignored: AtomicU64,
    /// How many calls wait for a reply now.
    in_flight: AtomicUsize,
}

impl Shared {
    fn new() -> Self {
        Self {
            state: Arc::new(watch::channel(State::Connecting { reason: None }).0),
            over: OnceLock::new(),
            messages_sent: AtomicU64::new(0),
            calls_sent: AtomicU64::new(0),
            messages_received: AtomicU64::new(0),
            replies_received: AtomicU64::new(0),
            replies_ignored: AtomicU64::new(0),
            in_flight: AtomicUsize::new(0),
        }
    }

    /// Why no reply comes: what the connection says of itself.
    fn reason(&self) -> Arc<str> {
        let over = self.over.get().cloned();
        over.or_else(|| self.state.borrow().missing()).unwrap_or_else(|| "no more replies".into())
    }
}

impl Line {
    /// With a session that is open, or none, which is then opened for as long as it takes.
    pub(super) fn start(sessions: Sessions, session: Option<Session>, rules: Rules) -> Self {
        let (orders, waiting) = mpsc::unbounded_channel();
        let shared = Arc::new(Shared::new());
        let task = Task::new(sessions, session, rules, waiting, shared.clone());
        tokio::spawn(task.run());
        Self { orders, shared }
    }

    /// Puts a frame on its way.
    pub(super) fn post(&self, address: Address, parcel: Parcel<Token>) {
        if let Err(mpsc::error::SendError(Order::Post(_, parcel))) = self.orders.send(Order::Post(address, parcel)) {
            // The task outlives the client unless its runtime has ended.
            parcel.token.end(&End::Lost(Lost::connection(false, self.reason())));
        }
    }

    /// Nobody waits for `id` any more. With a cancel, whoever runs the call is told, once some queue has taken it.
    pub(super) fn forget(&self, id: Uuid, cancel: Option<Addressed>) {
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

    /// Why no reply comes.
    pub(super) fn reason(&self) -> Arc<str> {
        self.shared.reason()
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
