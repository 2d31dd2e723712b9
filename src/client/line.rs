//! The task between a client's calls and its connection: publishes what waits to leave, hands out what comes back.

use std::collections::BTreeMap;
use std::hash::{Hash, Hasher};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use tokio::sync::{broadcast, mpsc, oneshot};
use tracing::{debug, warn};
use uuid::Uuid;

use super::pending::Ticket;
use super::replies::{Call, Replies, Said, Waiter};
use super::target::Target;
use super::{Client, Traffic};
use crate::frame::{self, CONTENT_TYPE, Kind};
use crate::outbox::{BATCH, Bundle, Outbox, Parcel, Share, UnderWay, take_all};
use crate::transport::{Confirm, Consumer, Delivery, Event, Lost, Properties, Publication, Transport};

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

/// Who is told of a parcel.
#[derive(Debug, Default)]
pub(super) struct Token {
    /// What the broker said of it.
    pub(super) said: Option<oneshot::Sender<Said>>,
    /// What comes back.
    pub(super) reply: Option<(Waiter, Arc<Target>)>,
}

impl Token {
    /// Nobody wants a parcel that has not left when its sender is gone; if it ever had one.
    fn is_wanted(&self) -> bool {
        match (&self.said, &self.reply) {
            (Some(said), _) => !said.is_closed(),
            (None, Some((Waiter::One(reply), _))) => !reply.is_closed(),
            (None, Some((Waiter::Many(_), _)) | None) => true,
        }
    }

    /// Tells what the broker said, if that is the end.
    fn end(self, said: &Said) {
        if let Some((Waiter::One(reply), _)) = self.reply {
            // The caller gave up at this very moment, here and below.
            let _ = reply.send(Err(said.clone()));
        }
        if let Some(sender) = self.said {
            let _ = sender.send(said.clone());
        }
    }
}

enum Order {
    Post(Address, Parcel<Token>),
    /// Nobody waits for replies any more; where a ticket is given, those who run the call are told. The client is kept
    /// until they are.
    Forget(Uuid, Option<Box<(Client, Ticket)>>),
    /// Ends all that waits, and closes the connection.
    Close(oneshot::Sender<()>),
}

/// What the callers hold of the task. It ends, and closes the connection, when this is dropped.
#[derive(Debug)]
pub(super) struct Line {
    orders: mpsc::UnboundedSender<Order>,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    /// Why no reply can come any more.
    lost: OnceLock<Arc<str>>,
    messages_sent: AtomicU64,
    calls_sent: AtomicU64,
    messages_received: AtomicU64,
    replies_received: AtomicU64,
}

impl Line {
    pub(super) fn start(
        transport: Transport,
        queue: Consumer,
        reply_queue: String,
        instance: String,
        max_message_size: usize,
    ) -> Self {
        let (orders, waiting) = mpsc::unbounded_channel();
        let shared = Arc::new(Shared::default());
        let task = Task {
            events: transport.events(),
            waiting,
            queue,
            shared: shared.clone(),
            reply_queue,
            instance,
            outbox: Outbox::new(max_message_size),
            replies: Replies::default(),
            receipts: FuturesUnordered::new(),
            under_way: BTreeMap::new(),
            number: 0,
            transport: transport.clone(),
        };
        tokio::spawn(task.run());
        Self { orders, shared }
    }

    /// Puts a frame on its way.
    pub(super) fn post(&self, address: Address, parcel: Parcel<Token>) {
        if let Err(mpsc::error::SendError(Order::Post(_, parcel))) = self.orders.send(Order::Post(address, parcel)) {
            // The task outlives the client unless the runtime has gone.
            let reason = "the runtime of the connection has ended".into();
            parcel.token.end(&Err(Lost { handed_over: false, connected: false, reason }));
        }
    }

    /// Nobody waits for `id` any more. With a ticket, whoever runs the call is told, once some queue has taken it.
    pub(super) fn forget(&self, id: Uuid, cancel: Option<(Client, Ticket)>) {
        // A task that has ended has nothing to forget.
        let _ = self.orders.send(Order::Forget(id, cancel.map(Box::new)));
    }

    /// Why no reply can come any more.
    pub(super) fn lost(&self) -> Option<&Arc<str>> {
        self.shared.lost.get()
    }

    pub(super) async fn close(&self) {
        let (done, closed) = oneshot::channel();
        if self.orders.send(Order::Close(done)).is_ok() {
            // A task that ends without an answer has closed as well.
            let _ = closed.await;
        }
    }

    pub(super) fn traffic(&self) -> Traffic {
        Traffic {
            messages_sent: self.shared.messages_sent.load(Ordering::Relaxed),
            calls_sent: self.shared.calls_sent.load(Ordering::Relaxed),
            messages_received: self.shared.messages_received.load(Ordering::Relaxed),
            replies_received: self.shared.replies_received.load(Ordering::Relaxed),
        }
    }
}

struct Task {
    transport: Transport,
    events: broadcast::Receiver<Event>,
    waiting: mpsc::UnboundedReceiver<Order>,
    queue: Consumer,
    shared: Arc<Shared>,
    reply_queue: String,
    instance: String,
    outbox: Outbox<Address, Token>,
    replies: Replies,
    /// The bundles that are under way, with the numbers of their messages.
    receipts: FuturesUnordered<UnderWay<(u64, Bundle<Address, Token>)>>,
    /// Those numbers, and the calls that were given up meanwhile.
    under_way: BTreeMap<u64, Vec<(Client, Ticket)>>,
    number: u64,
}

impl Task {
    async fn run(mut self) {
        let mut orders = Vec::with_capacity(BATCH);
        loop {
            let connected = self.shared.lost.get().is_none();
            tokio::select! {
                Ok(event) = self.events.recv(), if connected => if let Event::Lost(reason) = event {
                    // What arrived before the end is read before the end is told.
                    let rest = async { while let Some(delivery) = self.queue.next().await { self.read(delivery) } };
                    let _ = tokio::time::timeout(Duration::from_secs(1), rest).await;
                    self.lose(reason);
                },
                delivery = self.queue.next(), if connected => match delivery {
                    Some(delivery) => {
                        self.read(delivery);
                        for _ in 1..BATCH {
                            let Some(delivery) = self.queue.try_next() else { break };
                            self.read(delivery);
                        }
                    }
                    None => self.lose("the connection or its reply queue is gone".into()),
                },
                Some(((number, bundle), said)) = self.receipts.next(), if !self.receipts.is_empty() => {
                    self.concluded(number, bundle, said);
                }
                count = take_all(&mut self.waiting, &mut orders) => if count == 0 {
                    break;
                },
            }
            orders.drain(..).for_each(|order| self.follow(order));
            self.publish();
        }
        // What the clients sent without waiting for it, as cancels are, still leaves.
        self.transport.close().await;
    }

    fn follow(&mut self, order: Order) {
        match order {
            Order::Post(address, parcel) => match self.shared.lost.get() {
                None => self.outbox.push(address, parcel),
                Some(reason) => parcel.token.end(&Err(unsent(reason))),
            },
            Order::Forget(id, cancel) => {
                // What has not left will not; what has been answered has ended.
                if let (Some(call), Some(cancel)) = (self.replies.forget(id), cancel) {
                    match self.under_way.get_mut(&call.message) {
                        // Only a request that some queue has taken can be cancelled.
                        Some(given_up) => given_up.push(*cancel),
                        None => cancel.0.cancel(&cancel.1),
                    }
                }
            }
            Order::Close(done) => {
                self.lose("the client was closed".into());
                let transport = self.transport.clone();
                // Here the ends of what is under way are still waited for.
                tokio::spawn(async move {
                    transport.close().await;
                    // Whoever closed the client may not wait for it.
                    let _ = done.send(());
                });
            }
        }
    }

    /// Publishes what may leave.
    fn publish(&mut self) {
        while let Some(mut bundle) = self.outbox.next(Token::is_wanted) {
            self.number += 1;
            for parcel in &mut bundle.parcels {
                if let Some((waiter, target)) = parcel.token.reply.take() {
                    self.replies.expect(parcel.id, Call { waiter, target, message: self.number });
                }
            }
            let Address { exchange, key, mandatory, persistent, answered, priority } = &bundle.address;
            let publication = Publication {
                exchange: exchange.to_string(),
                key: key.to_string(),
                mandatory: *mandatory,
                properties: Properties {
                    correlation_id: bundle.correlation_id(),
                    reply_to: answered.then(|| self.reply_queue.clone()),
                    expiration: bundle.expiration(),
                    kind: bundle.kind(),
                    content_type: Some(CONTENT_TYPE.to_owned()),
                    persistent: *persistent,
                    priority: *priority,
                    app_id: Some(self.instance.clone()),
                    headers: Vec::new(),
                },
                body: bundle.body(),
            };
            add(&self.shared.messages_sent, 1);
            add(&self.shared.calls_sent, bundle.parcels.len());
            let receipt = if bundle.parcels.iter().any(|parcel| parcel.token.said.is_some()) {
                self.transport.publish(publication)
            } else {
                // Whoever is answered hears of an acceptance by that, and of a return soon enough.
                self.transport.publish_quietly(publication)
            };
            self.under_way.insert(self.number, Vec::new());
            self.receipts.push(UnderWay::new((self.number, bundle), receipt));
        }
    }

    /// The broker has said what became of a message.
    fn concluded(&mut self, number: u64, bundle: Bundle<Address, Token>, said: Said) {
        let given_up = self.under_way.remove(&number).unwrap_or_default();
        // Refused by one queue, a broadcast may run on others.
        if matches!(said, Ok(Confirm::Accepted | Confirm::Refused)) {
            given_up.into_iter().for_each(|(client, ticket)| client.cancel(&ticket));
        }
        let too_large_together = matches!(said, Ok(Confirm::TooLarge(_))) && bundle.parcels.len() > 1;
        let Bundle { address, parcels, .. } = bundle;
        for mut parcel in parcels {
            if too_large_together {
                let call = self.replies.forget(parcel.id);
                if address.answered && call.is_none() {
                    // Its caller has given up.
                    continue;
                }
                parcel.token.reply = call.map(|call| (call.waiter, call.target));
                parcel.share = Share::ALL;
                self.follow(Order::Post(address.clone(), parcel));
                continue;
            }
            // A broadcast's replies may come nevertheless, when only one of its queues has refused it.
            if said != Ok(Confirm::Accepted)
                && let Some(Call { waiter: waiter @ Waiter::One(_), target, .. }) = self.replies.forget_one(parcel.id)
            {
                parcel.token.reply = Some((waiter, target));
            }
            parcel.token.end(&said);
        }
        if self.shared.lost.get().is_some() {
            self.end_answerless();
        }
    }

    fn read(&mut self, delivery: Delivery) {
        add(&self.shared.messages_received, 1);
        for frame in frame::decode(delivery.body) {
            match frame {
                Ok(frame) if frame.kind == Kind::Reply => {
                    add(&self.shared.replies_received, 1);
                    self.replies.deliver(frame);
                }
                Ok(frame) => debug!(kind = ?frame.kind, "not a reply, on the reply queue"),
                Err(error) => warn!(%error, "a malformed message on the reply queue"),
            }
        }
    }

    /// No reply can come any more, and nothing leaves.
    fn lose(&mut self, reason: Arc<str>) {
        let reason = self.shared.lost.get_or_init(|| reason);
        let end = Err(unsent(reason));
        self.outbox.clear().for_each(|parcel| parcel.token.end(&end));
        self.end_answerless();
    }

    /// Ends the calls that wait for a reply though their message is no longer under way.
    fn end_answerless(&mut self) {
        let Some(reason) = self.shared.lost.get() else { return };
        let end = Err(Lost { handed_over: true, ..unsent(reason) });
        for call in self.replies.forget_all(|message| self.under_way.contains_key(&message)) {
            Token { said: None, reply: Some((call.waiter, call.target)) }.end(&end);
        }
    }
}

fn unsent(reason: &Arc<str>) -> Lost {
    Lost { handed_over: false, connected: false, reason: reason.clone() }
}

fn add(counter: &AtomicU64, count: usize) {
    // One task counts; the others read.
    counter.fetch_add(count as u64, Ordering::Relaxed);
}
