//! The line of a client: what its calls use of the task that publishes requests and receives replies.
//!
//! A call hands its frame to the line and waits for a reply or a [`CallEnd`]. All calls of a client share one line, one
//! task and one connection. The task is in `line/task.rs`; it alone knows which calls are in flight, so no lock is
//! needed for them.

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

use self::task::LineTask;
use super::builder::WhenFull;
use super::in_flight::{CallEnd, PendingCall, Place, Waiter};
use super::session::{Session, Sessions};
use super::target::Target;
use super::{Absent, Traffic};
#[cfg(feature = "metrics")]
use crate::counting::LinkCounts;
use crate::document::Announcement;
use crate::error::Error;
use crate::exchanges::Address;
use crate::outgoing::Parcel;
use crate::state::State;
use crate::transport::{Lost, QueueCount};

/// How many news of instances may wait to be read. Who lets more wait begins to watch anew.
const NEWS: usize = 4096;

/// What the task keeps with each parcel: who waits for it, and what may be done with it.
#[derive(Debug)]
pub(super) struct Token {
    /// Where the broker's confirm is told, for oneway calls and events. `None` for requests.
    pub(super) said: Option<oneshot::Sender<CallEnd>>,
    /// Who waits for replies, and the method that is called. `None` for oneway calls and events.
    pub(super) reply: Option<(Waiter, Arc<Target>)>,
    /// After this time the parcel is not sent any more.
    pub(super) deadline: Instant,
    /// Whether it may be sent again although it may have arrived: the method is idempotent, or it is a oneway call or
    /// an event.
    pub(super) repeatable: bool,
    /// What to do if the service has no instance: send it anyway, or fail.
    pub(super) absent: Absent,
    /// For a call that a handler made to a service of its own server: cancelled when that server drains.
    pub(super) leaving: Option<CancellationToken>,
    /// How many times it was sent.
    pub(super) attempts: u32,
    /// How many attempts of the same call came before this request.
    pub(super) before: u32,
    /// Its place among the calls in flight. `None` if they are not limited.
    pub(super) place: Option<Place>,
}

impl Token {
    /// The token of a parcel for which nobody waits, such as a cancel.
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

    /// Takes back what the call held while it was in flight, since the parcel will be sent again or end.
    fn take_back(&mut self, call: PendingCall<Addressed>) {
        let PendingCall { waiter, target, leaving, place, .. } = call;
        (self.reply, self.leaving, self.place) = (Some((waiter, target)), leaving, place);
    }

    /// Whether somebody still waits for the parcel, or nobody ever did. A parcel whose caller has given up is not sent.
    fn is_wanted(&self) -> bool {
        match (&self.said, &self.reply) {
            (Some(said), _) => !said.is_closed(),
            (None, Some((Waiter::One(reply), _))) => !reply.is_closed(),
            (None, Some((Waiter::Many(_), _)) | None) => true,
        }
    }

    /// Tells the caller how the call ended.
    fn end(self, end: &CallEnd) {
        if let Some((Waiter::One(reply), _)) = self.reply {
            // An error means that the caller gave up at this moment, here and below.
            let _ = reply.send(Err(end.clone()));
        }
        if let Some(sender) = self.said {
            let _ = sender.send(end.clone());
        }
    }
}

/// A parcel with the address that it goes to.
pub(super) type Addressed = (Address, Parcel<Token>);

/// What the task is told to do.
#[expect(clippy::large_enum_variant, reason = "nearly all orders are of the large one")]
enum Order {
    /// Publish this parcel.
    Post(Address, Parcel<Token>),
    /// The caller of this call has given up. If a cancel is given, it is sent to the instances that may run the call.
    Forget(Uuid, Option<Box<Addressed>>),
    /// The deadline of this call has passed. The task tells the caller what is known of it.
    Overdue(Uuid),
    /// Ask the broker how much is in this queue.
    Count(String, oneshot::Sender<Result<Option<QueueCount>, Error>>),
    /// Tell this watcher what instances announce.
    Watch(mpsc::Sender<InstanceNews>),
    /// End everything that waits, and close the connection.
    Close(oneshot::Sender<()>),
}

/// What a watcher of the instances hears.
#[derive(Debug, Clone)]
pub(crate) enum InstanceNews {
    /// From now on it hears what instances announce. It may have missed something before.
    Listening,
    /// The broker does not let this client hear what they announce, for this reason.
    Deaf(Arc<str>),
    /// An instance has announced this.
    Said(Arc<Announcement>),
    /// The broker has deleted a queue of this instance. It may have another one by now.
    Deleted { service: String, instance: String },
}

/// The settings of the client that the task follows.
#[derive(Debug)]
pub(super) struct LineSettings {
    /// The largest message, in bytes.
    pub(super) max_message_size: usize,
    /// How long a call waits while the broker accepts no messages.
    pub(super) blocked_wait: Duration,
    /// How many calls may be in flight, and what is done with further ones.
    pub(super) max_in_flight: Option<(usize, WhenFull)>,
}

/// The callers' end of the line. When it is dropped, the task ends and closes the connection.
#[derive(Debug)]
pub(super) struct Line {
    orders: mpsc::UnboundedSender<Order>,
    shared: Arc<Shared>,
}

/// What the task tells all callers.
#[derive(Debug)]
struct Shared {
    /// The state of the client.
    state: Arc<watch::Sender<State>>,
    /// Why there will never be a connection again, once that is certain.
    over: OnceLock<Arc<str>>,
    messages_sent: AtomicU64,
    calls_sent: AtomicU64,
    messages_received: AtomicU64,
    replies_received: AtomicU64,
    replies_ignored: AtomicU64,
    /// How many calls wait for a reply or for being sent.
    in_flight: AtomicUsize,
    #[cfg(feature = "metrics")]
    link: Arc<LinkCounts>,
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
            #[cfg(feature = "metrics")]
            link: Arc::default(),
        }
    }

    /// Why no reply comes, as far as the state of the connection tells.
    fn reason(&self) -> Arc<str> {
        let over = self.over.get().cloned();
        over.or_else(|| self.state.borrow().missing()).unwrap_or_else(|| "no more replies".into())
    }
}

impl Line {
    /// Starts the task. Without an open session, it opens one, however long that takes.
    pub(super) fn start(sessions: Sessions, session: Option<Session>, rules: LineSettings) -> Self {
        let (orders, waiting) = mpsc::unbounded_channel();
        let shared = Arc::new(Shared::new());
        let task = LineTask::new(sessions, session, rules, waiting, shared.clone());
        tokio::spawn(task.run());
        Self { orders, shared }
    }

    /// Hands a parcel to the task, which publishes it as soon as it can.
    pub(super) fn post(&self, address: Address, parcel: Parcel<Token>) {
        if let Err(mpsc::error::SendError(Order::Post(_, parcel))) = self.orders.send(Order::Post(address, parcel)) {
            // The task has ended, and so its runtime has: otherwise the task lives longer than the client.
            parcel.token.end(&CallEnd::Lost(Lost::connection(false, self.reason())));
        }
    }

    /// The caller of `id` has given up. If a cancel is given, it is sent to the instances that may run the call, but
    /// only after a queue has accepted the call.
    pub(super) fn forget(&self, id: Uuid, cancel: Option<Addressed>) {
        // A task that has ended has nothing to forget.
        let _ = self.orders.send(Order::Forget(id, cancel.map(Box::new)));
    }

    /// The deadline of `id` has passed. The task tells its caller what is known of the call.
    pub(super) fn overdue(&self, id: Uuid) {
        // A task that has ended has told it already.
        let _ = self.orders.send(Order::Overdue(id));
    }

    pub(super) fn state(&self) -> watch::Receiver<State> {
        self.shared.state.subscribe()
    }

    pub(super) fn is_closed(&self) -> bool {
        *self.shared.state.borrow() == State::Closed
    }

    /// Why no reply comes, as far as the state of the connection tells.
    pub(super) fn reason(&self) -> Arc<str> {
        self.shared.reason()
    }

    /// How much is in a queue. `None` if there is no such queue.
    pub(super) async fn count(&self, queue: String) -> Result<Option<QueueCount>, Error> {
        let (answer, told) = oneshot::channel();
        // A task that has ended drops it.
        let _ = self.orders.send(Order::Count(queue, answer));
        told.await.unwrap_or_else(|_| Err(Lost::connection(false, self.reason()).into()))
    }

    /// What instances announce, from now on.
    pub(super) fn watch(&self) -> mpsc::Receiver<InstanceNews> {
        let (watcher, heard) = mpsc::channel(NEWS);
        // A task that has ended hears nothing.
        let _ = self.orders.send(Order::Watch(watcher));
        heard
    }

    /// Ends everything that waits, and closes the connection.
    pub(super) async fn close(&self) {
        let (done, closed) = oneshot::channel();
        if self.orders.send(Order::Close(done)).is_ok() {
            // An error means that the task has ended, which closes as well.
            let _ = closed.await;
        }
    }

    /// How many calls wait for a reply or for being sent.
    pub(super) fn in_flight(&self) -> usize {
        self.shared.in_flight.load(Ordering::Relaxed)
    }

    /// What is counted of the connection.
    #[cfg(feature = "metrics")]
    pub(super) fn link(&self) -> Arc<LinkCounts> {
        self.shared.link.clone()
    }

    /// What was sent and received since the client connected.
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
