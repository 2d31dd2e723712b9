//! The task of a client: it publishes requests, receives replies, and reconnects whenever the connection is lost.
//!
//! [`LineTask::run`] waits for the next event and calls a method for it. What the methods do is in the files below
//! `task/`: what callers tell it to do (`orders.rs`), sending (`publishing.rs`), what arrives (`reading.rs`), how calls
//! without a reply end (`ends.rs`), what leaves later than it was made (`again.rs`), cancels (`cancels.rs`), whether a
//! service has an instance (`asking.rs`), what instances announce (`watching.rs`), why a queue has refused a call (`unclear.rs`), late confirms (`late.rs`), and
//! moving back to the first address (`moving.rs`).

mod again;
mod asking;
mod cancels;
mod ends;
mod late;
mod moving;
mod orders;
mod publishing;
mod reading;
mod unclear;
mod watching;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt as _, StreamExt as _};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

use self::ends::closed;
use self::moving::{Former, Move};
use self::reading::{LostSessions, next_of, rest_of};
use self::unclear::Cause;
use self::watching::{Listening, Watcher, listened};
use super::places::Places;
use super::unconfirmed::Unconfirmed;
use super::{Addressed, LineSettings, Order, Shared, Token};
use crate::client::RUNTIME_ENDED;
use crate::client::in_flight::{CallEnd, CallsInFlight, HeldReply, Place};
use crate::client::session::{Happening, Session, Sessions};
use crate::client::target::Target;
use crate::exchanges::{Address, Exchanges};
use crate::outgoing::{BATCH, Lane, Lanes, Outbox, Parcel, Receipts, UnderWay, Waiting, Window, take_all};
use crate::state::{Attempts, State, enter};
use crate::transport::{Role, Transport, next_look_back};

/// How often the task looks for late confirms, silent instances and calls that nobody answers.
const LOOK: Duration = Duration::from_secs(1);
/// When a client is dropped, its last cancels wait for the confirms of their calls. This is the longest time.
const PARTING: Duration = Duration::from_secs(5);

/// The state of the task. It is the only owner of the calls in flight.
pub(super) struct LineTask {
    sessions: Arc<Sessions>,
    exchanges: Exchanges,
    rules: LineSettings,
    /// What callers tell it to do.
    waiting: mpsc::UnboundedReceiver<Order>,
    shared: Arc<Shared>,
    /// The open session. While there is none, `opening` opens one, unless the client is closed.
    session: Option<Session>,
    opening: Option<BoxFuture<'static, Session>>,
    /// Sessions that were lost, while something may still be read from them.
    leaving: Option<LostSessions>,
    /// The session before a move to another address, while replies are awaited there.
    former: Option<Former>,
    /// A move to the first address that is going on.
    moving: Move,
    /// When the first address is tried again. `None` if the session is there.
    back_at: Option<Instant>,
    /// The parcels that are published next.
    outbox: Outbox<Address, Token>,
    /// The calls that were sent and wait for a reply.
    in_flight: CallsInFlight<Addressed>,
    /// The replies of the message that is read, and who waits for them.
    answered: Vec<HeldReply>,
    /// The parcels that wait for a connection, for the end of an alarm, or for room on the way to the broker.
    unsent: Waiting<Addressed>,
    /// How many bytes may be on their way to the broker.
    window: Window,
    /// How many messages to each queue are unconfirmed.
    lanes: Lanes,
    /// The parcels for queues that confirm nothing.
    stuck: HashMap<Lane, Waiting<Addressed>>,
    /// Places of calls whose callers have given up. Each is returned when the message with this number has arrived at
    /// the broker.
    kept: Vec<(u64, Place)>,
    /// The places among the calls in flight, and the calls that wait for one.
    places: Places<Addressed>,
    /// Calls that must not wait for an instance. They wait, by service, until the broker has told whether there is one.
    asking: HashMap<Arc<str>, Waiting<Addressed>>,
    /// The questions whether a service has an instance.
    questions: FuturesUnordered<UnderWay<(Arc<Target>, u64)>>,
    /// Calls that their queue has not accepted. They wait, by service, until the broker has told why.
    unclear: HashMap<(Arc<str>, Cause), Waiting<Parcel<Token>>>,
    /// The questions why.
    causes: FuturesUnordered<UnderWay<(Arc<Target>, Cause)>>,
    /// Who watches the instances.
    watchers: Vec<Watcher>,
    /// By which the reply queue gets what watchers hear.
    listening: Listening,
    /// Cancels that no instance has received. They wait until they are sent again.
    unheard: Waiting<Addressed>,
    /// Since when the broker accepts no messages, and its reason.
    blocked: Option<(Instant, Arc<str>)>,
    /// When the calls fail that were sent before the alarm and were not confirmed.
    stuck_at: Option<Instant>,
    /// The numbers of the messages whose outcome is not known, and where it is told.
    receipts: Receipts<u64>,
    /// The messages without a confirm, with their parcels.
    unconfirmed: Unconfirmed,
    /// The number of the last message.
    number: u64,
    /// The number of the first message of this session. Replies to earlier messages would go to a queue that is gone.
    first: u64,
    /// When the task looks again, see [`LOOK`].
    look_at: Instant,
    /// Since when the state says that confirms are late.
    late_since: Option<Instant>,
    /// The number of the last message at the last look.
    looked: u64,
    /// When places are taken back again from calls whose time is over.
    vacate_at: Instant,
}

impl LineTask {
    /// A task that is ready to run. Without an open session it begins to open one.
    pub(super) fn new(
        sessions: Sessions,
        session: Option<Session>,
        rules: LineSettings,
        waiting: mpsc::UnboundedReceiver<Order>,
        shared: Arc<Shared>,
    ) -> Self {
        let now = Instant::now();
        let mut task = Self {
            exchanges: Exchanges::of(&sessions.namespace),
            sessions: Arc::new(sessions),
            outbox: Outbox::new(rules.max_message_size),
            places: Places::new(rules.max_in_flight),
            rules,
            waiting,
            shared,
            session: None,
            opening: None,
            leaving: None,
            former: None,
            moving: Move::None,
            back_at: None,
            in_flight: CallsInFlight::default(),
            answered: Vec::new(),
            unsent: Waiting::default(),
            window: Window::default(),
            lanes: Lanes::default(),
            stuck: HashMap::new(),
            kept: Vec::new(),
            asking: HashMap::new(),
            questions: FuturesUnordered::new(),
            unclear: HashMap::new(),
            causes: FuturesUnordered::new(),
            watchers: Vec::new(),
            listening: Listening::default(),
            unheard: Waiting::default(),
            blocked: None,
            stuck_at: None,
            receipts: Receipts::default(),
            unconfirmed: Unconfirmed::default(),
            number: 0,
            first: 1,
            look_at: now,
            late_since: None,
            looked: 0,
            vacate_at: now,
        };
        match session {
            Some(session) => task.opened(session),
            None => task.open(None, None),
        }
        task
    }

    /// Runs until the client is dropped, that is, until nobody can give orders any more.
    pub(super) async fn run(mut self) {
        let mut orders = Vec::with_capacity(BATCH);
        let mut clock = std::pin::pin!(sleep_until(self.look_at));
        loop {
            let wake_at = self.wake_at();
            if let Some(at) = wake_at.filter(|at| *at != clock.deadline()) {
                clock.as_mut().reset(at);
            }
            tokio::select! {
                happening = next_of(self.session.as_mut()) => match happening {
                    Happening::Delivered(delivery) => {
                        self.read(delivery);
                        for _ in 1..BATCH {
                            let Some(delivery) = self.session.as_mut().and_then(Session::try_next) else { break };
                            self.read(delivery);
                        }
                    }
                    Happening::Blocked(reason) => self.block(reason),
                    Happening::Unblocked => self.unblock(),
                    Happening::Over(reason) => self.lose(&reason),
                },
                delivery = rest_of(&mut self.leaving) => match delivery {
                    Some(delivery) => self.read(delivery),
                    None => self.left(),
                },
                session = opened(&mut self.opening) => self.opened(session),
                happening = next_of(self.former.as_mut().map(|former| &mut former.session)) => match happening {
                    Happening::Delivered(delivery) => self.read(delivery),
                    Happening::Over(_) => self.lose_former(),
                    Happening::Blocked(_) | Happening::Unblocked => {}
                },
                opened = self.moving.connected() => self.connected(opened),
                (number, said) = self.receipts.next() => {
                    match &mut self.leaving {
                        Some(leaving) if number < self.first => leaving.concluded.push((number, said)),
                        _ => self.concluded(number, said),
                    }
                }
                Some(((target, last), said)) = self.questions.next(), if !self.questions.is_empty() => {
                    self.answered(&target, last, &said);
                }
                Some(((target, cause), said)) = self.causes.next(), if !self.causes.is_empty() => {
                    self.found(&target, cause, &said);
                }
                listened = listened(&mut self.listening) => self.listens(listened),
                () = &mut clock, if wake_at.is_some() => self.look(),
                count = take_all(&mut self.waiting, &mut orders) => if count == 0 {
                    break;
                },
            }
            orders.drain(..).for_each(|order| self.follow(order));
            self.switch();
            self.publish();
            // Parcels that are sent or not wanted any more return their places. So this repeats until no call waits or
            // no place is free.
            while self.seat() {
                self.publish();
            }
            let asking: usize = self.asking.values().map(Waiting::len).sum();
            let unclear: usize = self.unclear.values().map(Waiting::len).sum();
            let stuck: usize = self.stuck.values().map(Waiting::len).sum();
            let waiting = self.unsent.len() + self.places.crowd.len() + asking + unclear + stuck;
            let in_flight = self.in_flight.len() + waiting;
            self.shared.in_flight.store(in_flight, Ordering::Relaxed);
        }
        self.stay();
        self.part().await;
        self.enter(State::Closed);
        // Closing writes what is still queued, such as cancels.
        if let Some(session) = &self.session {
            session.transport.close().await;
        }
    }

    /// The name of the client in the log.
    fn name(&self) -> String {
        self.sessions.dial.label(Role::Client)
    }

    fn enter(&self, new: State) {
        self.shared.state.send_if_modified(|state| {
            #[cfg(feature = "metrics")]
            self.shared.link.changes(state, &new);
            enter(state, new)
        });
    }

    /// Begins to open a session, on `transport` if that connection is still good. `reason` is why the last one was
    /// lost.
    fn open(&mut self, reason: Option<Arc<str>>, transport: Option<Transport>) {
        #[cfg(feature = "metrics")]
        self.shared.link.is_lost();
        let attempts = Attempts::new(self.shared.state.clone(), self.name(), reason);
        self.opening = Some(self.sessions.clone().open_again(attempts, transport).boxed());
    }

    /// A session has been opened.
    fn opened(&mut self, session: Session) {
        self.opening = None;
        self.back_at = self.sessions.dial.is_elsewhere(&session.transport).then(next_look_back);
        self.session = Some(session);
        self.listen_anew();
        self.enter(State::Ready);
        if let Some(reason) = self.session.as_ref().and_then(|session| session.transport.blocked()) {
            self.block(reason);
        }
    }

    /// When the task has to wake up even if nothing happens.
    fn wake_at(&self) -> Option<Instant> {
        let looks = self.in_flight.len() > 0
            || !self.unconfirmed.is_empty()
            || self.late_since.is_some()
            || self.former.is_some();
        let look = looks.then_some(self.look_at);
        let vacate = (!self.places.crowd.is_empty()).then_some(self.vacate_at);
        let ends = [&self.unsent, &self.places.crowd, &self.unheard].map(Waiting::next_end);
        let stuck = self.stuck.values().map(Waiting::next_end);
        ends.into_iter().chain(stuck).chain([self.stuck_at, look, vacate, self.moves_at()]).flatten().min()
    }

    /// Does everything that is due by the clock.
    fn look(&mut self) {
        let now = Instant::now();
        self.end_waiting(now);
        self.cancel_again(now);
        if self.stuck_at.is_some_and(|at| at <= now) {
            self.stuck_at = None;
            self.end_stuck();
        }
        if !self.places.crowd.is_empty() {
            self.vacate();
        }
        self.look_back(now);
        if self.look_at <= now {
            self.look_at = now + LOOK;
            if self.in_flight.has_reports() {
                self.end_silent();
            }
            self.ask_about_unanswered(now);
            self.look_for_confirms(now);
            self.leave_former();
        }
    }
}

impl Drop for LineTask {
    /// When the runtime ends, the task is dropped wherever it is. All calls are told so, and so is everybody who calls
    /// later.
    fn drop(&mut self) {
        self.close(RUNTIME_ENDED);
        self.waiting.close();
        while let Ok(order) = self.waiting.try_recv() {
            if let Order::Post(_, parcel) = order {
                parcel.token.end(&CallEnd::Lost(closed(&self.shared, false)));
            }
        }
    }
}

/// The session that is being opened. Never resolves if none is.
async fn opened(opening: &mut Option<BoxFuture<'static, Session>>) -> Session {
    match opening {
        Some(opening) => opening.await,
        None => std::future::pending().await,
    }
}

/// Adds to a counter that callers may read.
fn add(counter: &AtomicU64, count: usize) {
    // Only this task counts. The others read.
    counter.fetch_add(count as u64, Ordering::Relaxed);
}
