//! Replies on their way to their callers: those to the same caller that are ready together share a message.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error};
use uuid::Uuid;

use super::health::{Health, Trouble};
use super::message::Message;
use super::outcome::too_large;
use crate::clock::later;
use crate::codec::Codec;
use crate::context::at;
use crate::frame::CONTENT_TYPE;
use crate::lanes::{Lane, Lanes};
use crate::outbox::{BATCH, Bundle, Outbox, Parcel, Share, UnderWay, take_all};
use crate::route::to_queue;
use crate::transport::{Confirm, Loss, Lost, Properties, Publication, Transport};
use crate::waiting::{Waiting, Weight};
use crate::window::Window;

/// How often a reply is published that is lost with its channel, over somebody else's message.
const ATTEMPTS: usize = 100;
/// How long a reply waits that cannot leave, if its request does not say how long its caller waits.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long a sign of life, or something for another instance, is of use.
const LIFE: Duration = Duration::from_secs(5);
/// The pause before the broker is given replies again that it refuses to this user grows from one to the other.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// What a reply belongs to.
pub(super) struct Answered {
    /// The request's message, which is settled once the broker has the reply; none for a sign of life.
    pub(super) message: Option<Arc<Message>>,
    pub(super) codec: Codec,
    pub(super) attempts: usize,
    /// From then on its caller does not wait for it any more.
    until: Instant,
}

impl Answered {
    /// Of what is of no use later.
    fn of_no_request() -> Self {
        Self { message: None, codec: Codec::Raw, attempts: 0, until: Instant::now() + LIFE }
    }

    fn finish(&self) {
        if let Some(message) = &self.message {
            message.finish();
        }
    }
}

type Letter = Parcel<Answered>;
type Letters = Bundle<Arc<str>, Answered>;

/// Where replies are handed in. Their task ends when this is dropped.
#[derive(Debug)]
pub(super) struct Replies(mpsc::UnboundedSender<(Arc<str>, Letter)>);

impl Replies {
    /// Replies over the last of `transports`; while that is lost they wait for the next, unless the server drains.
    pub(super) fn start(
        transports: &watch::Sender<Transport>,
        draining: CancellationToken,
        instance: Arc<str>,
        max_message_size: usize,
        health: Arc<Health>,
    ) -> Self {
        let (replies, waiting) = mpsc::unbounded_channel();
        let mut transports = transports.subscribe();
        let transport = transports.borrow_and_update().clone();
        let task = Task {
            transport,
            transports,
            connection: 0,
            lost: false,
            draining,
            health,
            refused: None,
            instance,
            waiting,
            outbox: Outbox::new(max_message_size),
            unsent: Waiting::default(),
            window: Window::default(),
            lanes: Lanes::default(),
            stuck: HashMap::new(),
            number: 0,
            receipts: FuturesUnordered::new(),
        };
        tokio::spawn(task.run());
        Self(replies)
    }

    /// Puts the reply `frame` to the request `id` on its way, and sees to the request once the broker has it.
    pub(super) fn post(&self, id: Uuid, codec: Codec, frame: Bytes, message: &Arc<Message>) {
        let until = match message.properties.expiration {
            Some(time) => later(message.received, time),
            None => Instant::now() + PATIENCE,
        };
        self.put(message, id, frame, Answered { message: Some(message.clone()), codec, attempts: 0, until });
    }

    /// Puts a sign of life on its way to the caller of `id`.
    pub(super) fn keep_alive(&self, id: Uuid, frame: Bytes, message: &Message) {
        self.put(message, id, frame, Answered::of_no_request());
    }

    /// Puts something about the call `id` on its way to another instance.
    pub(super) fn tell(&self, queue: Arc<str>, id: Uuid, frame: Bytes) {
        let token = Answered::of_no_request();
        let parcel = Parcel { id, frame, share: Share::LEAST, kind: None, expiration: None, token };
        // Without a task the runtime has ended.
        let _ = self.0.send((queue, parcel));
    }

    fn put(&self, message: &Message, id: Uuid, frame: Bytes, token: Answered) {
        let kind = message.kind.clone();
        let parcel = Parcel { id, frame, share: Share::LEAST, kind, expiration: None, token };
        // Without a task the runtime has ended.
        let _ = self.0.send((message.reply_to.clone().unwrap_or_default(), parcel));
    }
}

/// When a reply leaves, of several that wait. A sign of life keeps a call from being given up.
fn weight(letter: &Letter) -> Weight {
    let urgency = if letter.token.message.is_some() { 0 } else { u8::MAX };
    Weight { urgency, bytes: letter.frame.len(), keeps_order: false }
}

struct Task {
    transports: watch::Receiver<Transport>,
    transport: Transport,
    /// Counts the connections, and whether this one is lost.
    connection: u64,
    lost: bool,
    draining: CancellationToken,
    health: Arc<Health>,
    /// Until when the broker is given no replies, since it refuses them to this user, and for how long then.
    refused: Option<(Instant, Duration)>,
    instance: Arc<str>,
    waiting: mpsc::UnboundedReceiver<(Arc<str>, Letter)>,
    outbox: Outbox<Arc<str>, Answered>,
    /// What waits for a connection, for a broker that takes replies, or for room on the way there.
    unsent: Waiting<(Arc<str>, Letter)>,
    window: Window,
    lanes: Lanes,
    /// What waits for a caller's queue that does not confirm what it has got.
    stuck: HashMap<Lane, Waiting<(Arc<str>, Letter)>>,
    /// The number of the last message.
    number: u64,
    receipts: FuturesUnordered<UnderWay<Away>>,
}

/// A message of replies on its way.
struct Away {
    connection: u64,
    number: u64,
    /// None for a probe.
    letters: Option<Letters>,
}

impl Task {
    async fn run(mut self) {
        let mut batch = Vec::with_capacity(BATCH);
        loop {
            let next_end = self.next_end();
            tokio::select! {
                biased;
                Some((away, said)) = self.receipts.next(), if !self.receipts.is_empty() => self.concluded(away, said),
                Ok(()) = self.transports.changed() => {
                    self.transport = self.transports.borrow_and_update().clone();
                    self.connection += 1;
                    self.lost = false;
                    self.window = Window::default();
                }
                count = take_all(&mut self.waiting, &mut batch) => if count == 0 {
                    return;
                },
                () = at(self.refused.map(|(until, _)| until)), if !self.lost && !self.unsent.is_empty() && self.window.room() > 0 => {
                    // Whether it refuses still is seen by the next.
                }
                () = at(next_end) => self.give_up(Instant::now()),
                () = self.draining.cancelled(), if self.lost && !(self.unsent.is_empty() && self.stuck.is_empty()) => {
                    // There will be no other connection: the requests have gone back to their queue with this one.
                    drop(self.unsent.clear());
                    self.stuck.clear();
                }
            }
            let waits = self.lost || self.refused.is_some() || !self.unsent.is_empty();
            for (caller, letter) in batch.drain(..) {
                if waits {
                    self.hold(caller, letter);
                } else {
                    self.outbox.push(caller, letter);
                }
            }
            if !self.lost {
                self.publish(Instant::now());
            }
        }
    }

    fn hold(&mut self, caller: Arc<str>, letter: Letter) {
        self.unsent.push(letter.id, letter.token.until, weight(&letter), (caller, letter));
    }

    /// When nobody waits any more for the next of the replies that wait.
    fn next_end(&self) -> Option<Instant> {
        self.stuck.values().chain([&self.unsent]).filter_map(Waiting::next_end).min()
    }

    /// Ends replies for which nobody waits any more.
    fn give_up(&mut self, now: Instant) {
        let waiting = self.stuck.values_mut().chain([&mut self.unsent]);
        let ended = waiting.flat_map(|waiting| std::iter::from_fn(|| waiting.pop_ended(now)));
        for (caller, letter) in ended {
            if let (Some((_, pause)), Some(message)) = (self.refused, &letter.token.message) {
                error!(instance = &*self.instance, key = message.key, id = %letter.id, queue = &*caller, ?pause, "the broker did not take a reply until its caller's time was over");
            } else {
                debug!(id = %letter.id, queue = &*caller, "a reply did not leave until its caller's time was over");
            }
            letter.token.finish();
        }
        self.stuck.retain(|_, stuck| !stuck.is_empty());
    }

    /// Publishes what may leave, and what has waited for that, as far as there is room on the way to the broker.
    fn publish(&mut self, now: Instant) {
        if self.outbox.is_empty() && self.unsent.is_empty() {
            return;
        }
        self.probe(now);
        loop {
            self.publish_outbox(now);
            let mut room = self.window.room();
            if room == 0 || self.is_refused(now) {
                break;
            }
            while room > 0
                && let Some((caller, letter)) = self.unsent.pop(now)
            {
                room = room.saturating_sub(letter.frame.len());
                self.outbox.push(caller, letter);
            }
            if self.outbox.is_empty() {
                return;
            }
        }
        let left_over: Vec<_> = self.outbox.clear().collect();
        left_over.into_iter().for_each(|(caller, letter)| self.hold(caller, letter));
        if !self.unsent.is_empty() && self.window.room() == 0 {
            self.window.hold();
            self.probe(now);
        }
    }

    /// Whether the broker is given no replies now, since it refuses them to this user.
    fn is_refused(&self, now: Instant) -> bool {
        self.refused.is_some_and(|(until, _)| until > now)
    }

    /// Has the way to the broker measured, where that is to be done.
    fn probe(&mut self, now: Instant) {
        if self.window.is_to_probe(now) && self.refused.is_none() {
            self.number += 1;
            self.window.probed(self.number, now);
            let receipt = self.transport.publish(Publication::to_nobody(String::new()));
            let away = Away { connection: self.connection, number: self.number, letters: None };
            self.receipts.push(UnderWay::new(away, receipt));
        }
    }

    fn publish_outbox(&mut self, now: Instant) {
        while self.window.room() > 0
            && !self.is_refused(now)
            && let Some(bundle) = self.outbox.next(self.window.room(), |_| true)
        {
            let lane = Lane::of(&bundle.address);
            if self.lanes.is_stuck(lane, self.window.round_trip(), now) {
                let stuck = self.stuck.entry(lane).or_default();
                let Bundle { address, parcels } = bundle;
                for letter in parcels {
                    stuck.push(letter.id, letter.token.until, weight(&letter), (address.clone(), letter));
                }
                continue;
            }
            self.lanes.sent(lane, now);
            let properties = Properties {
                correlation_id: bundle.correlation_id(),
                kind: bundle.kind(),
                content_type: Some(CONTENT_TYPE.to_owned()),
                app_id: Some(self.instance.to_string()),
                ..Properties::default()
            };
            // Mandatory tells when the caller has gone.
            let publication = to_queue(bundle.address.to_string(), properties, bundle.body());
            // Nobody waits for it: only the request's settlement does.
            let receipt = self.transport.publish_quietly(publication);
            self.number += 1;
            self.window.sent(self.number, bundle.size(), now);
            let away = Away { connection: self.connection, number: self.number, letters: Some(bundle) };
            self.receipts.push(UnderWay::new(away, receipt));
            if let Some((until, pause)) = &mut self.refused {
                // The others wait for what becomes of this one.
                *until = now + *pause;
            }
        }
    }

    /// A reply does not wait for the broker's confirm, but the request's settlement does.
    fn concluded(&mut self, away: Away, said: Result<Confirm, Lost>) {
        let Away { connection, number, letters } = away;
        let now = Instant::now();
        if connection == self.connection {
            self.window.arrived(number, now);
        }
        let Some(Bundle { address: caller, parcels, .. }) = letters else { return };
        let lane = Lane::of(&caller);
        self.lanes.concluded(lane, now);
        for (caller, letter) in self.stuck.remove(&lane).unwrap_or_default().clear() {
            self.hold(caller, letter);
        }
        let together = parcels.len() > 1;
        match &said {
            Ok(_) if self.refused.take().is_some() => self.health.cured(&Trouble::Replies),
            Ok(Confirm::Returned) => {
                debug!(queue = &*caller, replies = parcels.len(), "replies reach nobody: the caller has gone")
            }
            Err(Lost { loss: Loss::Refused, reason }) => self.refuse(reason),
            Err(Lost { loss: Loss::Unsent | Loss::Connection, reason }) => {
                // The caller may still be there; it ignores a second reply. The requests go back to their queue.
                debug!(queue = &*caller, %reason, replies = parcels.len(), "replies wait for the next connection");
                self.lost |= connection == self.connection;
                return parcels.into_iter().for_each(|parcel| self.again(&caller, parcel, reason));
            }
            _ => {}
        }
        for mut parcel in parcels {
            match &said {
                Ok(Confirm::TooLarge(limit)) => {
                    if !together {
                        parcel.frame =
                            too_large(parcel.id, parcel.token.codec, &self.instance, parcel.frame.len(), *limit);
                    }
                    parcel.share = Share::ALL;
                    self.again(&caller, parcel, "it is over the broker's limit of a message");
                }
                // The broker refuses it to this user, and may take it later.
                Err(Lost { loss: Loss::Refused, .. }) => self.hold(caller.clone(), parcel),
                // The caller ignores a second reply, should both arrive.
                Err(Lost { reason, .. }) => self.again(&caller, parcel, reason),
                Ok(Confirm::Accepted | Confirm::Refused | Confirm::Returned) => parcel.token.finish(),
            }
        }
    }

    /// The broker does not let this user reply: nothing is published for a while, since it closes a channel over each.
    fn refuse(&mut self, reason: &str) {
        let pause = self.refused.map_or(FIRST_PAUSE, |(_, pause)| (pause * 2).min(LONGEST_PAUSE));
        self.refused = Some((Instant::now() + pause, pause));
        let why = format!(
            "the broker takes no replies from this server ({reason}): its user needs the permission to write to `amq.default`"
        );
        self.health.suffers(Trouble::Replies, why);
    }

    fn again(&mut self, caller: &Arc<str>, mut parcel: Letter, why: &str) {
        let Some(message) = &parcel.token.message else { return };
        parcel.token.attempts += 1;
        if parcel.token.attempts < ATTEMPTS {
            return self.hold(caller.clone(), parcel);
        }
        error!(instance = &*self.instance, key = message.key, id = %parcel.id, queue = &**caller, why, "the broker does not take a reply: the caller will not hear of it");
        message.finish();
    }
}
