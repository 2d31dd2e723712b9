//! Faults of the broker in memory, which a test sets off: an alarm, a stall, lost connections, and queues that go away.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, OnceLock};

use tokio::sync::oneshot;

use super::Broker;
use super::broker::State;
use crate::transport::{Confirm, ConsumerEnd, Event, Loss, Lost, Publication, Settle};

/// Where it is told what became of a publication.
pub(super) type Said = oneshot::Sender<Result<Confirm, Lost>>;

/// What is wrong with a broker, and the publications that wait for the end of that.
#[derive(Default)]
pub(super) struct Faults {
    /// Why no publications are taken, and whoever publishes is told so.
    pub(super) alarm: Option<Arc<str>>,
    /// Whether nothing is taken, answered or delivered, and nobody is told.
    pub(super) stalled: bool,
    /// Queues that take, confirm, answer and deliver nothing.
    silent: BTreeSet<String>,
    /// Exchanges to which nobody may publish, and the words in which that is refused.
    refused: BTreeMap<String, Arc<str>>,
    /// Why nobody can connect.
    pub(super) down: Option<Arc<str>>,
    /// What waits until it is taken, in order.
    pub(super) held: Vec<Held>,
    /// What was said of messages that were pulled, by channel, and is heard later.
    settled: Vec<(u64, Settle)>,
}

/// A publication that nobody has taken yet.
pub(super) struct Held {
    pub(super) connection: u64,
    publication: Publication,
    said: Said,
}

/// Why a connection has ended, once it has.
pub(super) type End = Arc<OnceLock<Arc<str>>>;

impl Faults {
    /// Whether nothing keeps publications from being taken.
    fn let_all_pass(&self) -> bool {
        self.alarm.is_none() && !self.stalled && self.silent.is_empty() && self.refused.is_empty()
    }

    /// Whether nothing is heard of a queue, or of the whole broker.
    pub(super) fn is_silent(&self, queue: Option<&str>) -> bool {
        self.stalled || queue.is_some_and(|queue| self.silent.contains(queue))
    }
}

/// All of these are for tests. What a fault holds up goes on with [`Broker::restore`].
impl Broker {
    /// The broker is short of memory, for this reason: what anybody publishes waits, and whoever publishes is told.
    pub fn alarm(&self, reason: &str) {
        self.change(|state| state.faults.alarm = Some(reason.into()));
    }

    /// The broker takes nothing, answers nothing and delivers nothing. Connections stand, and nobody is told.
    pub fn stall(&self) {
        self.change(|state| state.faults.stalled = true);
    }

    /// The same of one queue alone, as when its node is away.
    pub fn stall_queue(&self, queue: &str) {
        self.change(|state| _ = state.faults.silent.insert(queue.to_owned()));
    }

    /// Refuses all publications to this exchange, in these words.
    pub fn refuse(&self, exchange: &str, words: &str) {
        self.change(|state| _ = state.faults.refused.insert(exchange.to_owned(), words.into()));
    }

    /// All connections are lost. New ones can be made at once.
    pub fn cut(&self) {
        self.change(|state| state.cut(None));
    }

    /// Only the connections of this user are lost.
    pub fn cut_user(&self, user: &str) {
        self.change(|state| state.cut(Some(user)));
    }

    /// All connections are lost, and nobody can connect. What the queues hold stays there.
    pub fn take_down(&self) {
        self.change(|state| {
            state.faults.down = Some("the broker in memory is down".into());
            state.cut(None);
        });
    }

    /// Ends all faults but lost connections: whatever was held up goes on, in order.
    pub fn restore(&self) {
        self.change(State::restore);
    }

    /// The channels end over which something was published that waits: it may have arrived. The connections stand.
    pub fn lose_publishing_channels(&self) {
        self.change(|state| {
            for held in std::mem::take(&mut state.faults.held) {
                let lost = Lost { loss: Loss::Channel, reason: "a test has the channel lost".into() };
                // Nobody has to read a receipt.
                let _ = held.said.send(Err(lost));
            }
        });
    }

    /// All channels end that consume a queue, for this reason; what is out on them goes back.
    pub fn lose_consumers(&self, queue: &str, end: &ConsumerEnd) {
        self.change(|state| {
            let of_queue = state.channels.iter().filter(|(_, channel)| *channel.queue == *queue);
            let of_queue = of_queue.inspect(|(_, channel)| channel.lose(end.clone()));
            let ids: Vec<_> = of_queue.map(|(id, _)| *id).collect();
            state.end(&ids);
        });
    }

    /// Deletes a queue with all that is in it, as an operator may.
    pub fn delete_queue(&self, queue: &str) {
        self.change(|state| {
            state.queues.remove(queue);
            state.forget(queue);
        });
    }

    /// Deletes an exchange and its bindings, as an operator may.
    pub fn delete_exchange(&self, exchange: &str) {
        self.change(|state| _ = state.exchanges.remove(exchange));
    }

    /// Changes the state, and has everybody look at it who waits for an answer.
    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.state();
        change(&mut state);
        let silent = state.faults.stalled || !state.faults.silent.is_empty();
        // Those who look take the lock.
        drop(state);
        self.silent.send_replace(silent);
    }
}

impl State {
    /// Publishes at once, unless a fault is in the way.
    pub(super) fn take(&mut self, connection: u64, publication: Publication, said: Said) {
        if self.faults.let_all_pass() {
            // Nobody has to read a receipt.
            let _ = said.send(Ok(self.publish(publication)));
        } else {
            self.take_despite_faults(connection, publication, said);
        }
    }

    fn take_despite_faults(&mut self, connection: u64, publication: Publication, said: Said) {
        let queues = self.routes(&publication.exchange, &publication.key).unwrap_or_default();
        if self.faults.stalled || queues.iter().any(|queue| self.faults.is_silent(Some(queue))) {
            self.faults.held.push(Held { connection, publication, said });
        } else if let Some(reason) = self.faults.alarm.clone() {
            self.faults.held.push(Held { connection, publication, said });
            // Like RabbitMQ, it tells whoever publishes.
            if let Some(peer) = self.connections.get_mut(&connection).filter(|peer| !peer.blocked) {
                peer.blocked = true;
                // Not everybody listens, here and below.
                let _ = peer.events.send(Event::Blocked(reason));
            }
        } else {
            let refused = self.faults.refused.get(&publication.exchange).cloned();
            let outcome = match refused {
                Some(reason) => Err(Lost { loss: Loss::Refused, reason }),
                None => Ok(self.publish(publication)),
            };
            let _ = said.send(outcome);
        }
    }

    /// Whether what is said of the deliveries of a channel does not arrive now.
    pub(super) fn hears_nothing_of(&self, channel: u64, queue: &str) -> bool {
        self.channels.contains_key(&channel) && self.faults.is_silent(Some(queue))
    }

    /// Settles a message that was pulled, once that is heard.
    pub(super) fn hear_of_pulled(&mut self, channel: u64, settle: Settle) {
        let queue = self.channels.get(&channel).map(|channel| channel.queue.clone());
        match queue.is_some_and(|queue| self.faults.is_silent(Some(&queue))) {
            true => self.faults.settled.push((channel, settle)),
            false => self.settle_pulled(channel, settle),
        }
    }

    /// Why a connection is blocked, if it has been told so.
    pub(super) fn blocked(&self, connection: u64) -> Option<Arc<str>> {
        self.faults.alarm.clone().filter(|_| self.connections.get(&connection).is_some_and(|peer| peer.blocked))
    }

    /// Ends connections, all of them or those of a user.
    fn cut(&mut self, user: Option<&str>) {
        let reason: Arc<str> = "a test has the connection lost".into();
        let is_cut = |peer: &super::Peer| user.is_none_or(|user| peer.user.as_deref() == Some(user));
        let cut = self.connections.iter().filter(|(_, peer)| is_cut(peer));
        let cut: Vec<_> = cut.map(|(id, peer)| (*id, peer.events.clone(), peer.end.clone())).collect();
        // What goes back goes to none of those that are cut next.
        let stalled = std::mem::replace(&mut self.faults.stalled, true);
        for (id, events, end) in cut {
            // The first reason is the one that is told.
            let _ = end.set(reason.clone());
            for held in self.faults.held.extract_if(.., |held| held.connection == id) {
                let _ = held.said.send(Err(Lost::connection(true, reason.clone())));
            }
            let _ = events.send(Event::Lost(reason.clone()));
            self.disconnect(id);
        }
        self.faults.stalled = stalled;
        self.look_at_all();
    }

    fn restore(&mut self) {
        let Faults { held, settled, .. } = std::mem::take(&mut self.faults);
        for peer in self.connections.values_mut().filter(|peer| peer.blocked) {
            peer.blocked = false;
            let _ = peer.events.send(Event::Unblocked);
        }
        for Held { connection, publication, said } in held {
            self.take(connection, publication, said);
        }
        for (channel, settle) in settled {
            self.settle_pulled(channel, settle);
        }
        self.look_at_all();
    }

    /// Looks at all queues: hands out what waits there, and drops what has expired.
    fn look_at_all(&mut self) {
        for queue in self.queues.keys().cloned().collect::<Vec<_>>() {
            self.ring(&queue);
        }
    }
}
