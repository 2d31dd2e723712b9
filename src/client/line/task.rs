//! The task between a client's calls and its connection, which it makes anew whenever it is lost.

mod asking;
mod cancels;
mod ends;
mod late;
mod moving;
mod outgoing;
mod unclear;

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::future::{BoxFuture, join_all};
use futures::stream::FuturesUnordered;
use futures::{FutureExt as _, StreamExt as _};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};
use tracing::{debug, warn};

use self::ends::closed;
use self::moving::{Former, Move};
use self::unclear::Cause;
use super::places::{Entry, Places};
use super::unconfirmed::Unconfirmed;
use super::{Addressed, Order, Rules, Shared, Token};
use crate::client::RUNTIME_ENDED;
use crate::client::replies::{End, Place, Replies, Waiter};
use crate::client::session::{Happening, Rest, Session, Sessions};
use crate::client::target::Target;
use crate::frame::{self, Kind};
use crate::lanes::{Lane, Lanes};
use crate::outbox::{BATCH, Outbox, Parcel, UnderWay, take_all};
use crate::route::{Address, Exchanges};
use crate::state::{Attempts, State, enter};
use crate::transport::{Confirm, Delivery, Lost, Role, Transport, next_look_back};
use crate::waiting::Waiting;
use crate::window::Window;

/// How often calls that take long are looked after.
const LOOK: Duration = Duration::from_secs(1);
/// How long the last cancels of a client that has gone wait until it is known whether their calls are in a queue.
const PARTING: Duration = Duration::from_secs(5);

/// Sessions whose end is told when all that arrived before it has been read.
#[derive(Default)]
struct Leaving {
    rests: VecDeque<Rest>,
    /// What was said meanwhile of its messages.
    concluded: Vec<(u64, Result<Confirm, Lost>)>,
}

pub(super) struct Task {
    sessions: Arc<Sessions>,
    exchanges: Exchanges,
    rules: Rules,
    waiting: mpsc::UnboundedReceiver<Order>,
    shared: Arc<Shared>,
    /// The connection; while there is none, it is being opened, unless the client is closed.
    session: Option<Session>,
    opening: Option<BoxFuture<'static, Session>>,
    /// Those that are lost, while something may still come of them.
    leaving: Option<Leaving>,
    /// The connection of before a move, while replies are waited for there, and a move that is under way.
    former: Option<Former>,
    moving: Move,
    /// When the first address is tried again, where this is another one.
    back_at: Option<Instant>,
    outbox: Outbox<Address, Token>,
    replies: Replies<Addressed>,
    /// What waits for the connection, for the broker to take messages again, or for room on the way there.
    unsent: Waiting<Addressed>,
    window: Window,
    lanes: Lanes,
    /// What waits for a queue that does not confirm what it has got.
    stuck: HashMap<Lane, Waiting<Addressed>>,
    /// Places of calls that nobody waits for, until these messages of theirs have arrived.
    kept: Vec<(u64, Place)>,
    /// Places among the calls in flight, and what waits for one.
    places: Places<Addressed>,
    /// What is not to wait for an instance, by service, while the broker is asked whether there is one.
    asking: HashMap<Arc<str>, Waiting<Addressed>>,
    questions: FuturesUnordered<UnderWay<(Arc<Target>, u64)>>,
    /// What no queue has taken, by service, while the broker is asked why.
    unclear: HashMap<(Arc<str>, Cause), Waiting<Parcel<Token>>>,
    causes: FuturesUnordered<UnderWay<(Arc<Target>, Cause)>>,
    /// Cancels that nobody has heard, until they are sent again.
    unheard: Waiting<Addressed>,
    /// Since when, and why, the broker takes nothing.
    blocked: Option<(Instant, Arc<str>)>,
    /// When the calls end that it has not taken.
    stuck_at: Option<Instant>,
    receipts: FuturesUnordered<UnderWay<u64>>,
    unconfirmed: Unconfirmed,
    /// The number of the last message.
    number: u64,
    /// The number of the first message of this session or the next: replies to earlier ones have nowhere to come to.
    first: u64,
    look_at: Instant,
    /// Since when the state tells that the broker confirms nothing, or not all.
    late_since: Option<Instant>,
    /// The number of the last message when it was last looked.
    looked: u64,
    /// When places are looked for that are taken in vain.
    vacate_at: Instant,
}

impl Task {
    pub(super) fn new(
        sessions: Sessions,
        session: Option<Session>,
        rules: Rules,
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
            replies: Replies::default(),
            unsent: Waiting::default(),
            window: Window::default(),
            lanes: Lanes::default(),
            stuck: HashMap::new(),
            kept: Vec::new(),
            asking: HashMap::new(),
            questions: FuturesUnordered::new(),
            unclear: HashMap::new(),
            causes: FuturesUnordered::new(),
            unheard: Waiting::default(),
            blocked: None,
            stuck_at: None,
            receipts: FuturesUnordered::new(),
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
                Some((number, said)) = self.receipts.next(), if !self.receipts.is_empty() => {
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
                () = &mut clock, if wake_at.is_some() => self.look(),
                count = take_all(&mut self.waiting, &mut orders) => if count == 0 {
                    break;
                },
            }
            orders.drain(..).for_each(|order| self.follow(order));
            self.switch();
            self.publish();
            // What leaves or is not wanted any more frees places: repeated until nobody waits or none is free.
            while self.seat() {
                self.publish();
            }
            let asking: usize = self.asking.values().map(Waiting::len).sum();
            let unclear: usize = self.unclear.values().map(Waiting::len).sum();
            let stuck: usize = self.stuck.values().map(Waiting::len).sum();
            let waiting = self.unsent.len() + self.places.crowd.len() + asking + unclear + stuck;
            let in_flight = self.replies.len() + waiting;
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

    /// What the client is called in the log.
    fn name(&self) -> String {
        self.sessions.dial.label(Role::Client)
    }

    fn enter(&self, new: State) {
        self.shared.state.send_if_modified(|state| enter(state, new));
    }

    /// Starts to open a session, on `transport` if that is still good.
    fn open(&mut self, reason: Option<Arc<str>>, transport: Option<Transport>) {
        let attempts = Attempts::new(self.shared.state.clone(), self.name(), reason);
        self.opening = Some(self.sessions.clone().open_again(attempts, transport).boxed());
    }

    fn opened(&mut self, session: Session) {
        self.opening = None;
        self.back_at = self.sessions.dial.is_elsewhere(&session.transport).then(next_look_back);
        self.session = Some(session);
        self.enter(State::Ready);
        if let Some(reason) = self.session.as_ref().and_then(|session| session.transport.blocked()) {
            self.block(reason);
        }
    }

    fn follow(&mut self, order: Order) {
        match order {
            Order::Post(address, mut parcel) => {
                if matches!(parcel.token.reply, Some((Waiter::One(_), _))) {
                    if self.places.is_full() {
                        // What is not wanted any more gives its place back.
                        self.publish();
                        self.vacate();
                    }
                    match self.places.enter(parcel.token.deadline) {
                        Entry::In(place) => parcel.token.place = place,
                        Entry::Waits => {
                            let until = self.patience(&address, &parcel);
                            return self.places.wait(parcel.id, until, (address, parcel));
                        }
                        Entry::Full(limit) => return parcel.token.end(&End::Full(limit)),
                    }
                }
                self.route(address, parcel);
            }
            Order::Forget(id, cancel) => self.forget(id, cancel.map(|cancel| *cancel)),
            Order::Overdue(id) => self.overdue(id),
            Order::Close(done) => {
                let sessions = self.session.iter().chain(self.former.as_ref().map(|former| &former.session));
                let transports: Vec<_> = sessions.map(|session| session.transport.clone()).collect();
                // What came before leaves, as far as it can at once.
                self.stay();
                self.publish();
                self.close("the client was closed");
                // Here the ends of what is under way are still waited for.
                tokio::spawn(async move {
                    join_all(transports.iter().map(Transport::close)).await;
                    // Whoever closed the client may not wait for it.
                    let _ = done.send(());
                });
            }
        }
    }

    fn read(&mut self, delivery: Delivery) {
        add(&self.shared.messages_received, 1);
        let moment = self.moment(delivery.received);
        for frame in frame::decode(delivery.body) {
            let awaited = match frame {
                Ok(frame) if frame.kind == Kind::Reply => {
                    add(&self.shared.replies_received, 1);
                    self.replies.deliver(frame, moment)
                }
                Ok(frame) if frame.kind == Kind::KeepAlive => {
                    self.replies.report(frame.id, frame.metadata.instance.unwrap_or_default(), moment)
                }
                Ok(frame) => {
                    debug!(name = self.name(), kind = ?frame.kind, id = %frame.id, "not a reply, on the reply queue");
                    false
                }
                Err(error) => {
                    warn!(name = self.name(), id = error.id.map(tracing::field::display), %error, "a malformed message on the reply queue");
                    false
                }
            };
            if !awaited {
                add(&self.shared.replies_ignored, 1);
            }
        }
    }

    /// When something is to be done without anything happening.
    fn wake_at(&self) -> Option<Instant> {
        let looks = self.replies.len() > 0
            || !self.unconfirmed.is_empty()
            || self.late_since.is_some()
            || self.former.is_some();
        let look = looks.then_some(self.look_at);
        let vacate = (!self.places.crowd.is_empty()).then_some(self.vacate_at);
        let ends = [&self.unsent, &self.places.crowd, &self.unheard].map(Waiting::next_end);
        let stuck = self.stuck.values().map(Waiting::next_end);
        ends.into_iter().chain(stuck).chain([self.stuck_at, look, vacate, self.moves_at()]).flatten().min()
    }

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
            if self.replies.has_reports() {
                self.end_silent();
            }
            self.ask_about_unanswered(now);
            self.look_for_confirms(now);
            self.leave_former();
        }
    }

    /// Ends all that waits.
    fn close(&mut self, reason: &str) {
        // The first reason is the one that is told.
        let _ = self.shared.over.set(reason.into());
        self.enter(State::Closed);
        (self.session, self.opening, self.former, self.moving) = (None, None, None, Move::None);
        self.first = self.number + 1;
        let mut parcels: Vec<_> = self.outbox.clear().collect();
        let waiting = [&mut self.places.crowd, &mut self.unsent, &mut self.unheard].into_iter();
        for waiting in waiting.chain(self.asking.values_mut()).chain(self.stuck.values_mut()) {
            parcels.extend(waiting.clear());
        }
        self.kept.clear();
        self.end_unclear();
        for (_, parcel) in parcels {
            let handed_over = parcel.token.attempts > 0;
            parcel.token.end(&End::Lost(closed(&self.shared, handed_over)));
        }
        self.left();
    }
}

impl Drop for Task {
    /// With its runtime, the task ends wherever it is: what is left is told so, and so is whoever comes later.
    fn drop(&mut self) {
        self.close(RUNTIME_ENDED);
        self.waiting.close();
        while let Ok(order) = self.waiting.try_recv() {
            if let Order::Post(_, parcel) = order {
                parcel.token.end(&End::Lost(closed(&self.shared, false)));
            }
        }
    }
}

/// The next of what happens on a connection, while there is one.
async fn next_of(session: Option<&mut Session>) -> Happening {
    match session {
        Some(session) => session.next().await,
        None => std::future::pending().await,
    }
}

/// The next of what arrived on connections that are lost; none once nothing more comes.
async fn rest_of(leaving: &mut Option<Leaving>) -> Option<Delivery> {
    let Some(leaving) = leaving else { return std::future::pending().await };
    while let Some(rest) = leaving.rests.front_mut() {
        if let Some(delivery) = rest.next().await {
            return Some(delivery);
        }
        leaving.rests.pop_front();
    }
    None
}

async fn opened(opening: &mut Option<BoxFuture<'static, Session>>) -> Session {
    match opening {
        Some(opening) => opening.await,
        None => std::future::pending().await,
    }
}

fn add(counter: &AtomicU64, count: usize) {
    // One task counts; the others read.
    counter.fetch_add(count as u64, Ordering::Relaxed);
}
