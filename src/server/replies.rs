//! Replies on their way to their callers: those to the same caller that are ready together share a message.

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
use crate::codec::Codec;
use crate::context::at;
use crate::frame::CONTENT_TYPE;
use crate::outbox::{BATCH, Bundle, Outbox, Parcel, Share, UnderWay, take_all};
use crate::transport::{Confirm, Loss, Lost, Properties, Publication, Transport};

/// How often a reply is published that is lost with its channel, over somebody else's message.
const ATTEMPTS: usize = 100;
/// How long a reply waits that the broker refuses, if its request does not say how long its caller waits.
const PATIENCE: Duration = Duration::from_secs(60);
/// The pause before the broker is given replies again that it refuses to this user grows from one to the other.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// What a reply belongs to.
pub(super) struct Answered {
    /// The request's message, which is settled once the broker has the reply; none for a sign of life.
    pub(super) message: Option<Arc<Message>>,
    pub(super) codec: Codec,
    pub(super) attempts: usize,
}

impl Answered {
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
            receipts: FuturesUnordered::new(),
        };
        tokio::spawn(task.run());
        Self(replies)
    }

    /// Puts the reply `frame` to the request `id` on its way, and sees to the request once the broker has it.
    pub(super) fn post(&self, id: Uuid, codec: Codec, frame: Bytes, message: &Arc<Message>) {
        self.put(message, id, frame, Answered { message: Some(message.clone()), codec, attempts: 0 });
    }

    /// Puts a sign of life on its way to the caller of `id`.
    pub(super) fn keep_alive(&self, id: Uuid, frame: Bytes, message: &Message) {
        self.put(message, id, frame, Answered { message: None, codec: Codec::Raw, attempts: 0 });
    }

    /// Puts something about the call `id` on its way to another instance.
    pub(super) fn tell(&self, queue: Arc<str>, id: Uuid, frame: Bytes) {
        let token = Answered { message: None, codec: Codec::Raw, attempts: 0 };
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
    receipts: FuturesUnordered<UnderWay<(u64, Letters)>>,
}

impl Task {
    async fn run(mut self) {
        let mut batch = Vec::with_capacity(BATCH);
        loop {
            tokio::select! {
                biased;
                Some(((connection, bundle), said)) = self.receipts.next(), if !self.receipts.is_empty() => {
                    self.concluded(connection, bundle, said);
                }
                Ok(()) = self.transports.changed() => {
                    self.transport = self.transports.borrow_and_update().clone();
                    self.connection += 1;
                    self.lost = false;
                }
                count = take_all(&mut self.waiting, &mut batch) => if count == 0 {
                    return;
                },
                () = at(self.refused.map(|(until, _)| until)), if !self.outbox.is_empty() => {
                    // Whether it refuses still is seen by the next.
                }
                () = self.draining.cancelled(), if self.lost && !self.outbox.is_empty() => {
                    // There will be no other connection: the requests have gone back to their queue with this one.
                    self.outbox.clear().for_each(drop);
                }
            }
            let lost = self.lost;
            // Signs of life are of no use later.
            let kept = batch.drain(..).filter(|(_, letter)| !lost || letter.token.message.is_some());
            kept.for_each(|(caller, letter)| self.outbox.push(caller, letter));
            if !self.lost && self.refused.is_none_or(|(until, _)| until <= Instant::now()) {
                self.publish();
            }
        }
    }

    fn publish(&mut self) {
        while let Some(bundle) = self.outbox.next(|_| true) {
            let properties = Properties {
                correlation_id: bundle.correlation_id(),
                kind: bundle.kind(),
                content_type: Some(CONTENT_TYPE.to_owned()),
                app_id: Some(self.instance.to_string()),
                ..Properties::default()
            };
            let key = bundle.address.to_string();
            let body = bundle.body();
            // The default exchange; mandatory tells when the caller has gone.
            let publication = Publication { exchange: String::new(), key, mandatory: true, properties, body };
            // Nobody waits for it: only the request's settlement does.
            let receipt = self.transport.publish_quietly(publication);
            self.receipts.push(UnderWay::new((self.connection, bundle), receipt));
            if let Some((until, pause)) = &mut self.refused {
                // The others wait for what becomes of this one.
                *until = Instant::now() + *pause;
                return;
            }
        }
    }

    /// A reply does not wait for the broker's confirm, but the request's settlement does.
    fn concluded(&mut self, connection: u64, bundle: Letters, said: Result<Confirm, Lost>) {
        let Bundle { address: caller, parcels, .. } = bundle;
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
                Err(Lost { loss: Loss::Refused, .. }) => self.later(&caller, parcel),
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

    /// Keeps a reply for as long as its caller waits.
    fn later(&mut self, caller: &Arc<str>, parcel: Letter) {
        let Some(message) = &parcel.token.message else { return };
        if message.received.elapsed() < message.properties.expiration.unwrap_or(PATIENCE) {
            return self.outbox.push(caller.clone(), parcel);
        }
        error!(instance = &*self.instance, key = message.key, id = %parcel.id, queue = &**caller, "the broker did not take a reply until its caller's time was over");
        message.finish();
    }

    fn again(&mut self, caller: &Arc<str>, mut parcel: Letter, why: &str) {
        let Some(message) = &parcel.token.message else { return };
        parcel.token.attempts += 1;
        if parcel.token.attempts < ATTEMPTS {
            return self.outbox.push(caller.clone(), parcel);
        }
        error!(instance = &*self.instance, key = message.key, id = %parcel.id, queue = &**caller, why, "the broker does not take a reply: the caller will not hear of it");
        message.finish();
    }
}
