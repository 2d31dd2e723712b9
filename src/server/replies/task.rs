//! The task that publishes replies, as many at a time as the connection carries.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error};

use super::{AnsweredCall, Letter, Letters};
use crate::clock::at;
use crate::exchanges::to_queue;
use crate::frame::CONTENT_TYPE;
use crate::outgoing::{AROUND, BATCH, Bundle, Lane, Lanes, Outbox, Receipts, Share, Waiting, Weight, Window, take_all};
use crate::server::health::{Health, Trouble};
use crate::server::reply::too_large;
use crate::transport::{Confirm, Loss, Lost, Properties, Publication, Transport};

/// How many times a reply is published that is lost with its channel, since the broker has closed the channel over
/// another message.
const ATTEMPTS: usize = 100;
/// If the broker refuses replies from this user, this is the pause until the next one is tried. It doubles each time.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// The longest such pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// What decides when a waiting reply is sent. A sign of life is urgent: without it, the caller may give up the call.
fn weight(letter: &Letter) -> Weight {
    let is_sign_of_life = letter.token.message.is_none() && letter.token.audience.is_none();
    let urgency = if is_sign_of_life { u8::MAX } else { 0 };
    Weight { urgency, bytes: letter.frame.len(), keeps_order: false }
}

/// The task that publishes replies.
pub(super) struct ReplyTask {
    transports: watch::Receiver<Transport>,
    transport: Transport,
    /// The number of the connection, from 0.
    connection: u64,
    /// Whether this connection is lost.
    lost: bool,
    draining: CancellationToken,
    health: Arc<Health>,
    /// While the broker refuses replies from this user: until when none is published, and how long this pause is.
    refused: Option<(Instant, Duration)>,
    instance: Arc<str>,
    /// The replies that are handed in.
    waiting: mpsc::UnboundedReceiver<(Arc<str>, Letter)>,
    outbox: Outbox<Arc<str>, AnsweredCall>,
    /// Replies that wait for a connection, for the broker to accept them, or for room on the way there.
    unsent: Waiting<(Arc<str>, Letter)>,
    window: Window,
    lanes: Lanes,
    /// Replies for callers whose queue confirms nothing.
    stuck: HashMap<Lane, Waiting<(Arc<str>, Letter)>>,
    /// The number of the last message.
    number: u64,
    receipts: Receipts<ReplyUnderWay>,
}

/// A message of replies that is not confirmed yet.
struct ReplyUnderWay {
    connection: u64,
    number: u64,
    /// `None` for a probe.
    letters: Option<Letters>,
}

impl ReplyTask {
    pub(super) fn new(
        transports: &watch::Sender<Transport>,
        draining: CancellationToken,
        instance: Arc<str>,
        max_message_size: usize,
        health: Arc<Health>,
        waiting: mpsc::UnboundedReceiver<(Arc<str>, Letter)>,
    ) -> Self {
        let mut transports = transports.subscribe();
        let transport = transports.borrow_and_update().clone();
        Self {
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
            receipts: Receipts::default(),
        }
    }

    pub(super) async fn run(mut self) {
        let mut batch = Vec::with_capacity(BATCH);
        loop {
            let next_end = self.next_end();
            tokio::select! {
                biased;
                (away, said) = self.receipts.next() => self.concluded(away, said),
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

    /// When the next of the waiting replies is not wanted any more.
    fn next_end(&self) -> Option<Instant> {
        self.stuck.values().chain([&self.unsent]).filter_map(Waiting::next_end).min()
    }

    /// Ends the replies that nobody waits for any more.
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

    /// Publishes the outbox and what waits, as far as there is room on the way to the broker.
    fn publish(&mut self, now: Instant) {
        if self.outbox.is_empty() && self.unsent.is_empty() {
            return;
        }
        self.probe(now);
        let mut room = self.window.room();
        while room > 0 && !self.is_refused(now) {
            self.publish_outbox(now);
            room = self.window.room();
            if self.is_refused(now) || !self.take_unsent(room, now) {
                break;
            }
        }
        let left_over: Vec<_> = self.outbox.clear().collect();
        left_over.into_iter().for_each(|(caller, letter)| self.hold(caller, letter));
        if !self.unsent.is_empty() && self.window.room() == 0 {
            self.window.hold();
            self.probe(now);
        }
    }

    /// Moves as many waiting replies to the outbox as there is room for, in whatever messages they leave. Returns whether
    /// it has moved any.
    fn take_unsent(&mut self, mut room: usize, now: Instant) -> bool {
        let mut has_moved = false;
        while room > 0
            && let Some((caller, letter)) = self.unsent.pop(now)
        {
            has_moved = true;
            room = room.saturating_sub(letter.frame.len() + AROUND);
            self.outbox.push(caller, letter);
        }
        has_moved
    }

    /// Whether no reply is published now, since the broker refuses them from this user.
    fn is_refused(&self, now: Instant) -> bool {
        self.refused.is_some_and(|(until, _)| until > now)
    }

    /// Sends a probe if the window needs one.
    fn probe(&mut self, now: Instant) {
        if self.window.is_to_probe(now) && self.refused.is_none() {
            self.number += 1;
            self.window.probed(self.number, now);
            let away = ReplyUnderWay { connection: self.connection, number: self.number, letters: None };
            self.transport.submit(Publication::to_nobody(String::new()), self.receipts.keep(away));
        }
    }

    fn publish_outbox(&mut self, now: Instant) {
        while self.window.rest() > 0
            && !self.is_refused(now)
            && let Some(bundle) = self.outbox.next(self.window.rest(), |_| true)
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
            // The default exchange leads to the caller's queue. Mandatory: the broker returns the reply if the caller
            // has gone.
            let publication = to_queue(bundle.address.to_string(), properties, bundle.body());
            self.number += 1;
            self.window.sent(self.number, bundle.size(), now);
            #[cfg(feature = "metrics")]
            self.health.link.sent.add(bundle.parcels.len());
            let away = ReplyUnderWay { connection: self.connection, number: self.number, letters: Some(bundle) };
            // Nobody waits for the confirm except the settlement of the request, which may come a little later.
            self.transport.submit(publication, self.receipts.keep(away));
            if let Some((until, pause)) = &mut self.refused {
                // The other replies wait for the outcome of this one.
                *until = now + *pause;
            }
        }
    }

    /// The outcome of a message of replies is known. Its requests are settled, or the replies are published again.
    fn concluded(&mut self, away: ReplyUnderWay, said: Result<Confirm, Lost>) {
        let ReplyUnderWay { connection, number, letters } = away;
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
                Ok(Confirm::Returned) => {
                    if let Some(audience) = &parcel.token.audience {
                        audience.gone.cancel();
                    }
                    parcel.token.finish();
                }
                Ok(Confirm::Accepted | Confirm::Refused) => parcel.token.finish(),
            }
        }
    }

    /// The broker does not let this user send replies. It closes a channel for each, so none is published for a while.
    fn refuse(&mut self, reason: &str) {
        let pause = self.refused.map_or(FIRST_PAUSE, |(_, pause)| (pause * 2).min(LONGEST_PAUSE));
        self.refused = Some((Instant::now() + pause, pause));
        let why = format!(
            "the broker takes no replies from this server ({reason}): its user needs the permission to write to `amq.default`"
        );
        self.health.suffers(Trouble::Replies, why);
    }

    /// Publishes a reply again that was lost, unless that was tried too often.
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
