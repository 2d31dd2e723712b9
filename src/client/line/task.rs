//! The task between a client's calls and its connection, which it makes anew whenever it is lost.

mod ends;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt as _, StreamExt as _};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tracing::{debug, warn};

use self::ends::{closed, copy, renew};
use super::{Address, Order, Places, Rules, Shared, Token};
use crate::client::Client;
use crate::client::pending::Ticket;
use crate::client::replies::{Call, End, Place, Replies, Waiter};
use crate::client::session::{Happening, Session, Sessions};
use crate::client::waiting::Waiting;
use crate::context::at;
use crate::frame::{self, CONTENT_TYPE, Kind};
use crate::outbox::{BATCH, Bundle, Outbox, Parcel, UnderWay, take_all};
use crate::state::{Attempts, State, enter};
use crate::transport::{Delivery, Properties, Publication, Role, Transport};

/// How often the instances that run long calls are looked after.
const LOOK: Duration = Duration::from_secs(1);

/// What is sent again of a call whose message the broker has had.
type Again = (Address, Parcel<Token>);

/// A message of which the broker has not said yet what became of it.
struct Away {
    bundle: Bundle<Address, Token>,
    /// Its calls that were given up meanwhile.
    given_up: Vec<(Client, Ticket)>,
}

pub(super) struct Task {
    sessions: Arc<Sessions>,
    rules: Rules,
    waiting: mpsc::UnboundedReceiver<Order>,
    shared: Arc<Shared>,
    /// The connection; while there is none, it is being opened, unless the client is closed.
    session: Option<Session>,
    opening: Option<BoxFuture<'static, Session>>,
    outbox: Outbox<Address, Token>,
    replies: Replies<Again>,
    /// What waits for the connection, or for the broker to take messages again.
    unsent: Waiting<(Address, Parcel<Token>)>,
    /// What waits for a place among the calls in flight.
    crowd: Waiting<(Address, Parcel<Token>)>,
    /// Since when, and why, the broker takes nothing.
    blocked: Option<(Instant, Arc<str>)>,
    /// When the calls end that it has not taken.
    stuck_at: Option<Instant>,
    receipts: FuturesUnordered<UnderWay<u64>>,
    /// The messages that are under way, by their numbers.
    under_way: BTreeMap<u64, Away>,
    number: u64,
    /// The number of the first message of this session: replies to earlier ones have nowhere to come to.
    first: u64,
    look_at: Instant,
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
        let mut task = Self {
            sessions: Arc::new(sessions),
            outbox: Outbox::new(rules.max_message_size),
            rules,
            waiting,
            shared,
            session: None,
            opening: None,
            replies: Replies::default(),
            unsent: Waiting::default(),
            crowd: Waiting::default(),
            blocked: None,
            stuck_at: None,
            receipts: FuturesUnordered::new(),
            under_way: BTreeMap::new(),
            number: 0,
            first: 1,
            look_at: Instant::now(),
            vacate_at: Instant::now(),
        };
        match session {
            Some(session) => task.opened(session),
            None => task.open(None, None),
        }
        task
    }

    pub(super) async fn run(mut self) {
        let mut orders = Vec::with_capacity(BATCH);
        loop {
            let wake_at = self.wake_at();
            tokio::select! {
                happening = next_of(&mut self.session) => match happening {
                    Happening::Delivered(delivery) => {
                        self.read(delivery);
                        for _ in 1..BATCH {
                            let Some(delivery) = self.session.as_mut().and_then(Session::try_next) else { break };
                            self.read(delivery);
                        }
                    }
                    Happening::Blocked(reason) => self.block(reason),
                    Happening::Unblocked => self.unblock(),
                    Happening::Over(reason) => self.lose(&reason).await,
                },
                session = opened(&mut self.opening) => self.opened(session),
                Some((number, said)) = self.receipts.next(), if !self.receipts.is_empty() => {
                    self.concluded(number, said);
                }
                () = at(wake_at) => self.look(),
                count = take_all(&mut self.waiting, &mut orders) => if count == 0 {
                    break;
                },
            }
            orders.drain(..).for_each(|order| self.follow(order));
            // What is not wanted any more gives its place to others when it comes to leave.
            loop {
                self.seat();
                self.publish();
                if self.crowd.is_empty() || !self.has_place() {
                    break;
                }
            }
            let in_flight = self.replies.len() + self.unsent.len() + self.crowd.len();
            self.shared.in_flight.store(in_flight, Ordering::Relaxed);
        }
        // What the clients sent without waiting for it, as cancels are, still leaves.
        self.enter(State::Closed);
        if let Some(session) = &self.session {
            session.transport.close().await;
        }
    }

    fn enter(&self, new: State) {
        self.shared.state.send_if_modified(|state| enter(state, new));
    }

    /// Starts to open a session, on `transport` if that is still good.
    fn open(&mut self, reason: Option<Arc<str>>, transport: Option<Transport>) {
        let attempts = Attempts::new(self.shared.state.clone(), self.sessions.dial.label(Role::Client), reason);
        self.opening = Some(self.sessions.clone().open_again(attempts, transport).boxed());
    }

    fn opened(&mut self, session: Session) {
        self.opening = None;
        self.first = self.number + 1;
        self.shared.declared.lock().expect("no panic while holding the set").clear();
        self.shared.transport.send_replace(Some(session.transport.clone()));
        self.session = Some(session);
        self.enter(State::Ready);
        match self.session.as_ref().and_then(|session| session.transport.blocked()) {
            Some(reason) => self.block(reason),
            None => self.send_unsent(),
        }
    }

    fn follow(&mut self, order: Order) {
        match order {
            Order::Post(address, mut parcel) => {
                let counts = matches!(parcel.token.reply, Some((Waiter::One(_), _)));
                if counts && self.rules.places.is_some() {
                    if !self.has_place() {
                        // What is not wanted any more gives its place back.
                        self.publish();
                        self.vacate();
                    }
                    let Some(Places { free, limit, waits }) = &self.rules.places else { return };
                    // Who came before goes before.
                    let permit = self.crowd.is_empty().then(|| free.clone().try_acquire_owned().ok()).flatten();
                    parcel.token.place = permit.map(|permit| Place::new(permit, parcel.token.deadline));
                    if parcel.token.place.is_none() {
                        return match waits {
                            true => self.crowd.push(parcel.id, self.patience(&parcel), (address, parcel)),
                            false => parcel.token.end(&End::Full(*limit)),
                        };
                    }
                }
                self.route(address, parcel);
            }
            Order::Forget(id, cancel) => {
                if let Some((_, parcel)) = self.crowd.remove(id).or_else(|| self.unsent.remove(id)) {
                    // It had left, was lost, and was to leave again.
                    if let Some(cancel) = cancel.filter(|_| parcel.token.attempts > 0) {
                        cancel.0.cancel(&cancel.1);
                    }
                    return;
                }
                let instance = self.replies.runs_on(id).map(ToString::to_string);
                // What has not left will not; what has been answered has ended.
                if let (Some(call), Some(mut cancel)) = (self.replies.forget(id), cancel) {
                    if cancel.1.instance.is_none() {
                        cancel.1.instance = instance;
                    }
                    match self.under_way.get_mut(&call.message) {
                        // Only a request that some queue has taken can be cancelled.
                        Some(away) => away.given_up.push(*cancel),
                        None => cancel.0.cancel(&cancel.1),
                    }
                }
            }
            Order::Overdue(id) => self.overdue(id),
            Order::Close(done) => {
                let transport = self.session.as_ref().map(|session| session.transport.clone());
                // What came before leaves.
                self.publish();
                self.close();
                // Here the ends of what is under way are still waited for.
                tokio::spawn(async move {
                    if let Some(transport) = transport {
                        transport.close().await;
                    }
                    // Whoever closed the client may not wait for it.
                    let _ = done.send(());
                });
            }
        }
    }

    /// Lets a parcel leave with the next messages, or wait until it can.
    fn route(&mut self, address: Address, parcel: Parcel<Token>) {
        match (&self.session, &self.blocked) {
            (Some(_), None) => self.outbox.push(address, parcel),
            (Some(_), Some(_)) => self.unsent.push(parcel.id, self.patience(&parcel), (address, parcel)),
            (None, _) if self.opening.is_some() => {
                self.unsent.push(parcel.id, parcel.token.deadline, (address, parcel));
            }
            (None, _) => parcel.token.end(&End::Lost(closed(false))),
        }
    }

    /// How long what cannot leave now waits. Nobody waits for cancels, which are of use later too.
    fn patience(&self, parcel: &Parcel<Token>) -> Instant {
        let deadline = parcel.token.deadline;
        match self.blocked {
            Some(_) if parcel.token.is_told() => deadline.min(Instant::now() + self.rules.blocked_wait),
            _ => deadline,
        }
    }

    /// Takes places back from calls that nobody has collected though their time is over.
    fn vacate(&mut self) {
        let now = Instant::now();
        if self.vacate_at <= now {
            self.vacate_at = now + LOOK;
            self.replies.vacate(now);
        }
    }

    fn has_place(&self) -> bool {
        self.rules.places.as_ref().is_none_or(|places| places.free.available_permits() > 0)
    }

    /// Gives free places to those that wait for one.
    fn seat(&mut self) {
        // A broker that takes nothing is waited for here as well as anywhere.
        while self.blocked.is_none()
            && !self.crowd.is_empty()
            && let Some(Places { free, .. }) = &self.rules.places
            && let Ok(permit) = free.clone().try_acquire_owned()
            && let Some((address, mut parcel)) = self.crowd.pop()
        {
            if parcel.token.is_wanted() {
                parcel.token.place = Some(Place::new(permit, parcel.token.deadline));
                renew(&mut parcel);
                self.route(address, parcel);
            }
        }
    }

    fn send_unsent(&mut self) {
        while let Some((address, mut parcel)) = self.unsent.pop() {
            if parcel.token.is_wanted() {
                renew(&mut parcel);
                self.outbox.push(address, parcel);
            }
        }
    }

    /// Publishes what may leave.
    fn publish(&mut self) {
        let Some(session) = &self.session else { return };
        while let Some(mut bundle) = self.outbox.next(Token::is_wanted) {
            self.number += 1;
            for parcel in &mut bundle.parcels {
                parcel.token.attempts += 1;
                if let Some((waiter, target)) = parcel.token.reply.take() {
                    let again = parcel.token.repeatable.then(|| Box::new((bundle.address.clone(), copy(parcel))));
                    let place = parcel.token.place.take();
                    self.replies.expect(parcel.id, Call { waiter, target, message: self.number, place, again });
                }
            }
            let Address { exchange, key, mandatory, persistent, answered, priority } = &bundle.address;
            let publication = Publication {
                exchange: exchange.to_string(),
                key: key.to_string(),
                mandatory: *mandatory,
                properties: Properties {
                    correlation_id: bundle.correlation_id(),
                    reply_to: answered.then(|| session.reply_queue.clone()),
                    expiration: bundle.expiration(),
                    kind: bundle.kind(),
                    content_type: Some(CONTENT_TYPE.to_owned()),
                    persistent: *persistent,
                    priority: *priority,
                    app_id: Some(self.sessions.instance.to_string()),
                    ..Properties::default()
                },
                body: bundle.body(),
            };
            add(&self.shared.messages_sent, 1);
            add(&self.shared.calls_sent, bundle.parcels.len());
            let receipt = if bundle.parcels.iter().any(|parcel| parcel.token.said.is_some()) {
                session.transport.publish(publication)
            } else {
                // Whoever is answered hears of an acceptance by that, and of a return soon enough.
                session.transport.publish_quietly(publication)
            };
            self.under_way.insert(self.number, Away { bundle, given_up: Vec::new() });
            self.receipts.push(UnderWay::new(self.number, receipt));
        }
    }

    fn read(&mut self, delivery: Delivery) {
        add(&self.shared.messages_received, 1);
        for frame in frame::decode(delivery.body) {
            let awaited = match frame {
                Ok(frame) if frame.kind == Kind::Reply => {
                    add(&self.shared.replies_received, 1);
                    self.replies.deliver(frame)
                }
                Ok(frame) if frame.kind == Kind::KeepAlive => {
                    if !self.replies.has_reports() {
                        self.look_at = Instant::now() + LOOK;
                    }
                    self.replies.report(frame.id, frame.metadata.instance.unwrap_or_default())
                }
                Ok(frame) => {
                    debug!(kind = ?frame.kind, "not a reply, on the reply queue");
                    false
                }
                Err(error) => {
                    warn!(%error, "a malformed message on the reply queue");
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
        let look = self.replies.has_reports().then_some(self.look_at);
        let vacate = (!self.crowd.is_empty()).then_some(self.vacate_at);
        [self.unsent.next_end(), self.crowd.next_end(), self.stuck_at, look, vacate].into_iter().flatten().min()
    }

    fn look(&mut self) {
        let now = Instant::now();
        self.end_waiting(now);
        if self.stuck_at.is_some_and(|at| at <= now) {
            self.stuck_at = None;
            self.end_stuck();
        }
        if !self.crowd.is_empty() {
            self.vacate();
        }
        if self.replies.has_reports() && self.look_at <= now {
            self.look_at = now + LOOK;
            self.end_silent();
        }
    }

    /// Ends all that waits.
    fn close(&mut self) {
        self.enter(State::Closed);
        (self.session, self.opening) = (None, None);
        self.shared.transport.send_replace(None);
        let unsent: Vec<_> = self.outbox.clear().collect();
        let waiting = std::iter::from_fn(|| self.crowd.pop().or_else(|| self.unsent.pop())).map(|(_, parcel)| parcel);
        for parcel in unsent.into_iter().chain(waiting) {
            let handed_over = parcel.token.attempts > 0;
            parcel.token.end(&End::Lost(closed(handed_over)));
        }
        self.end_answerless();
    }
}

/// The next of what happens on a connection, while there is one.
async fn next_of(session: &mut Option<Session>) -> Happening {
    match session {
        Some(session) => session.next().await,
        None => std::future::pending().await,
    }
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
