//! Faults of the broker in memory, for tests: an alarm, a stall, lost connections, and queues that do not answer.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, OnceLock};

use super::MemoryBroker;
use super::broker::BrokerState;
use crate::transport::{ConnectionEvent, ConsumerEnd, Loss, Lost, Publication, ReceiptSender, Settle};

/// What is wrong with a broker, and what waits until that is over.
#[derive(Default)]
pub(super) struct Faults {
    /// The reason of an alarm. Publications wait, and those who publish are told.
    pub(super) alarm: Option<Arc<str>>,
    /// Whether the broker accepts, answers and delivers nothing, without telling anybody.
    pub(super) stalled: bool,
    /// Queues that accept, confirm, answer and deliver nothing.
    silent: BTreeSet<String>,
    /// Exchanges to which nobody may publish, with the words of the refusal.
    refused: BTreeMap<String, Arc<str>>,
    /// Why nobody can connect.
    pub(super) down: Option<Arc<str>>,
    /// The publications that wait, in order.
    pub(super) held: Vec<Held>,
    /// Settlements of messages that were taken out singly, by channel. They are handled when the fault is over.
    settled: Vec<(u64, Settle)>,
}

/// A publication that waits.
pub(super) struct Held {
    pub(super) connection: u64,
    publication: Publication,
    outcome: ReceiptSender,
}

/// Why a connection has ended.
pub(super) type EndReason = Arc<OnceLock<Arc<str>>>;

impl Faults {
    /// Whether no fault holds up publications.
    fn let_all_pass(&self) -> bool {
        self.alarm.is_none() && !self.stalled && self.silent.is_empty() && self.refused.is_empty()
    }

    /// Whether a queue, or the whole broker, does not answer.
    pub(super) fn is_silent(&self, queue: Option<&str>) -> bool {
        self.stalled || queue.is_some_and(|queue| self.silent.contains(queue))
    }
}

/// The faults. Each lasts until [`Broker::restore`].
impl MemoryBroker {
    /// Raises an alarm: the broker is short of memory, for this reason. Publications wait, and those who publish are
    /// told.
    pub fn alarm(&self, reason: &str) {
        self.change(|state| state.faults.alarm = Some(reason.into()));
    }

    /// Stalls the broker: it accepts, answers and delivers nothing. Connections stay open, and nobody is told.
    pub fn stall(&self) {
        self.change(|state| state.faults.stalled = true);
    }

    /// Stalls one queue, as if its node was down.
    pub fn stall_queue(&self, queue: &str) {
        self.change(|state| _ = state.faults.silent.insert(queue.to_owned()));
    }

    /// Refuses all publications to this exchange, with these words.
    pub fn refuse(&self, exchange: &str, words: &str) {
        self.change(|state| _ = state.faults.refused.insert(exchange.to_owned(), words.into()));
    }

    /// Cuts all connections. New ones can be opened at once.
    pub fn cut(&self) {
        self.change(|state| state.cut(None));
    }

    /// Cuts the connections of this user.
    pub fn cut_user(&self, user: &str) {
        self.change(|state| state.cut(Some(user)));
    }

    /// Cuts all connections and accepts no new ones. The queues keep their messages.
    pub fn take_down(&self) {
        self.change(|state| {
            state.faults.down = Some("the broker in memory is down".into());
            state.cut(None);
        });
    }

    /// Ends all faults. What they held up goes on in order. Connections that were cut stay lost.
    pub fn restore(&self) {
        self.change(BrokerState::restore);
    }

    /// Ends the channels over which the waiting publications were sent. They may have arrived. The connections stay
    /// open.
    pub fn lose_publishing_channels(&self) {
        self.change(|state| {
            for held in std::mem::take(&mut state.faults.held) {
                let lost = Lost { loss: Loss::Channel, reason: "a test has the channel lost".into() };
                held.outcome.tell(Err(lost));
            }
        });
    }

    /// Ends all channels that consume a queue, for this reason. What they have not settled is requeued.
    pub fn lose_consumers(&self, queue: &str, end: &ConsumerEnd) {
        self.change(|state| {
            let of_queue = state.channels.iter().filter(|(_, channel)| *channel.queue == *queue);
            let of_queue = of_queue.inspect(|(_, channel)| channel.lose(end.clone()));
            let ids: Vec<_> = of_queue.map(|(id, _)| *id).collect();
            state.end(&ids);
        });
    }

    /// Deletes a queue with its messages, as an operator can.
    pub fn delete_queue(&self, queue: &str) {
        self.change(|state| state.remove(queue));
    }

    /// Deletes an exchange and its bindings, as an operator can.
    pub fn delete_exchange(&self, exchange: &str) {
        self.change(|state| _ = state.exchanges.remove(exchange));
    }

    /// Changes the state, and wakes everybody who waits for an answer.
    fn change(&self, change: impl FnOnce(&mut BrokerState)) {
        let mut state = self.state();
        change(&mut state);
        let silent = state.faults.stalled || !state.faults.silent.is_empty();
        // Those who are woken take the lock, so it is released first.
        drop(state);
        self.silent.send_replace(silent);
    }
}

impl BrokerState {
    /// Publishes a message, or lets it wait if a fault holds it up.
    pub(super) fn take(&mut self, connection: u64, publication: Publication, outcome: ReceiptSender) {
        if self.faults.let_all_pass() {
            outcome.tell(Ok(self.publish(publication)));
        } else {
            self.take_despite_faults(connection, publication, outcome);
        }
    }

    /// The same, while there is a fault.
    fn take_despite_faults(&mut self, connection: u64, publication: Publication, outcome: ReceiptSender) {
        let queues = self.routes(&publication.exchange, &publication.key).unwrap_or_default();
        if self.faults.stalled || queues.iter().any(|queue| self.faults.is_silent(Some(queue))) {
            self.faults.held.push(Held { connection, publication, outcome });
        } else if let Some(reason) = self.faults.alarm.clone() {
            self.faults.held.push(Held { connection, publication, outcome });
            // RabbitMQ also tells those who publish.
            if let Some(peer) = self.connections.get_mut(&connection).filter(|peer| !peer.blocked) {
                peer.blocked = true;
                // An error means that nobody listens, here and below.
                let _ = peer.events.send(ConnectionEvent::Blocked(reason));
            }
        } else {
            let refused = self.faults.refused.get(&publication.exchange).cloned();
            let said = match refused {
                Some(reason) => Err(Lost { loss: Loss::Refused, reason }),
                None => Ok(self.publish(publication)),
            };
            outcome.tell(said);
        }
    }

    /// Whether settlements of a channel have to wait.
    pub(super) fn hears_nothing_of(&self, channel: u64, queue: &str) -> bool {
        self.channels.contains_key(&channel) && self.faults.is_silent(Some(queue))
    }

    /// Settles a message that was taken out singly, at once or when the fault is over.
    pub(super) fn hear_of_pulled(&mut self, channel: u64, settle: Settle) {
        let queue = self.channels.get(&channel).map(|channel| channel.queue.clone());
        match queue.is_some_and(|queue| self.faults.is_silent(Some(&queue))) {
            true => self.faults.settled.push((channel, settle)),
            false => self.settle_pulled(channel, settle),
        }
    }

    /// The reason of the alarm, if this connection was told of it.
    pub(super) fn blocked(&self, connection: u64) -> Option<Arc<str>> {
        self.faults.alarm.clone().filter(|_| self.connections.get(&connection).is_some_and(|peer| peer.blocked))
    }

    /// Ends all connections, or those of one user.
    fn cut(&mut self, user: Option<&str>) {
        let reason: Arc<str> = "a test has the connection lost".into();
        let is_cut = |peer: &super::Peer| user.is_none_or(|user| peer.user.as_deref() == Some(user));
        let cut = self.connections.iter().filter(|(_, peer)| is_cut(peer));
        let cut: Vec<_> = cut.map(|(id, peer)| (*id, peer.events.clone(), peer.end.clone())).collect();
        // With a stall, nothing that is requeued is delivered to a connection that is cut next.
        let stalled = std::mem::replace(&mut self.faults.stalled, true);
        for (id, events, end) in cut {
            // Only the first reason counts.
            let _ = end.set(reason.clone());
            for held in self.faults.held.extract_if(.., |held| held.connection == id) {
                held.outcome.tell(Err(Lost::connection(true, reason.clone())));
            }
            let _ = events.send(ConnectionEvent::Lost(reason.clone()));
            self.disconnect(id);
        }
        self.faults.stalled = stalled;
        self.look_at_all();
    }

    /// Ends all faults, and lets everything go on that has waited.
    fn restore(&mut self) {
        let Faults { held, settled, .. } = std::mem::take(&mut self.faults);
        for peer in self.connections.values_mut().filter(|peer| peer.blocked) {
            peer.blocked = false;
            let _ = peer.events.send(ConnectionEvent::Unblocked);
        }
        for Held { connection, publication, outcome } in held {
            self.take(connection, publication, outcome);
        }
        for (channel, settle) in settled {
            self.settle_pulled(channel, settle);
        }
        self.look_at_all();
    }

    /// Delivers what waits in all queues, and drops what has expired.
    fn look_at_all(&mut self) {
        for queue in self.queues.keys().cloned().collect::<Vec<_>>() {
            self.ring(&queue);
        }
    }
}
