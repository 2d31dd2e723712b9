//! The way of a message through the broker in memory: to its queues, to a consumer, or to the dead letters.

use std::sync::Arc;

use tokio::time::Instant;

use super::broker::{BrokerState, MemoryExchange};
use super::channel::next_consumer;
use super::queue::{QueueEntry, StoredMessage};
use crate::clock::unix_millis;
use crate::topology::{ExchangeKind, topic_matches};
use crate::transport::{Confirm, Death, Properties, Publication};

/// RabbitMQ's word for a message that has expired.
const EXPIRED: &str = "expired";
/// RabbitMQ's word for a message that had to make room for a later one.
const SURPLUS: &str = "maxlen";

impl BrokerState {
    /// Routes a message. It counts as refused if any of its queues is full, even if others have accepted it.
    pub(super) fn publish(&mut self, publication: Publication) -> Confirm {
        self.route(publication, None)
    }

    /// Routes a message, which is a dead letter if `death` tells how it died.
    fn route(&mut self, publication: Publication, death: Option<Death>) -> Confirm {
        let Publication { exchange, key, mandatory, properties, body } = publication;
        let Some(queues) = self.routes(&exchange, &key) else {
            return Confirm::Returned;
        };
        let Some((last, others)) = queues.split_last() else {
            return if mandatory { Confirm::Returned } else { Confirm::Accepted };
        };
        let message = Arc::new(StoredMessage { exchange, key, properties, body, death });
        let mut taken = true;
        for queue in others {
            taken &= self.enqueue(queue, message.clone());
        }
        taken &= self.enqueue(last, message);
        if taken { Confirm::Accepted } else { Confirm::Refused }
    }

    /// The queues that get a message, each once. `None` if the exchange does not exist.
    pub(super) fn routes(&self, exchange: &str, key: &str) -> Option<Vec<Arc<str>>> {
        if exchange.is_empty() {
            return Some(self.queues.get_key_value(key).map(|(queue, _)| queue.clone()).into_iter().collect());
        }
        let MemoryExchange { kind, bindings } = self.exchanges.get(exchange)?;
        let matches = |pattern: &str| *kind == ExchangeKind::Fanout || topic_matches(pattern, key);
        let mut queues: Vec<_> = match kind {
            // Each queue is in the list of a key only once.
            ExchangeKind::Direct => return Some(bindings.get(key).cloned().unwrap_or_default()),
            ExchangeKind::Topic | ExchangeKind::Fanout => {
                bindings.iter().filter(|(pattern, _)| matches(pattern)).flat_map(|(_, queues)| queues.clone()).collect()
            }
        };
        queues.sort_unstable();
        queues.dedup();
        Some(queues)
    }

    /// Puts a message into a queue. Returns `false` if the queue is full.
    fn enqueue(&mut self, name: &str, message: Arc<StoredMessage>) -> bool {
        // A deleted queue has lost its bindings, so a route never leads to a queue that does not exist.
        let Some(queue) = self.queues.get_mut(name) else {
            return true;
        };
        if queue.is_stream() {
            queue.stream.push(message);
            self.turn(name);
            return true;
        }
        if queue.is_full() {
            return false;
        }
        let entry = queue.entry(message, Instant::now());
        // A waiting consumer gets the message, even if it must not wait in the queue.
        if !self.faults.is_silent(Some(name))
            && queue.is_empty()
            && let Some(consumer) = next_consumer(queue, &mut self.channels)
        {
            consumer.deliver(entry);
            return true;
        }
        queue.push(entry);
        self.turn(name);
        true
    }

    /// Delivers waiting messages while consumers have room, and makes dead letters of those that have expired, or for
    /// which there is no room.
    pub(super) fn turn(&mut self, name: &str) {
        if self.faults.is_silent(Some(name)) {
            return;
        }
        let Some(queue) = self.queues.get_mut(name) else {
            return;
        };
        if queue.is_stream() {
            queue.stream.trim(&queue.arguments);
            for reader in queue.consumers.clone() {
                if let Some(channel) = self.channels.get_mut(&reader) {
                    channel.read_on(queue);
                }
            }
            return;
        }
        let now = Instant::now();
        let mut dead = Vec::new();
        loop {
            dead.extend(std::iter::from_fn(|| queue.pop_expired(now)).map(|entry| (entry, EXPIRED)));
            if queue.is_empty() {
                break;
            }
            let Some(consumer) = next_consumer(queue, &mut self.channels) else {
                break;
            };
            let Some(entry) = queue.pop() else { break };
            consumer.deliver(entry);
        }
        dead.extend(std::iter::from_fn(|| queue.pop_surplus()).map(|entry| (entry, SURPLUS)));
        self.set_timer(name);
        self.bury(name, dead);
    }

    /// Publishes the messages that a queue has given up, each with the reason, to its exchange for dead letters, if it
    /// has one.
    pub(super) fn bury(&mut self, queue: &str, dead: Vec<(QueueEntry, &str)>) {
        if dead.is_empty() {
            return;
        }
        let Some((exchange, key)) = self.queues.get(queue).and_then(|queue| queue.arguments.dead_letter.clone()) else {
            return;
        };
        for (QueueEntry { message, .. }, reason) in dead {
            let StoredMessage { properties, body, .. } = Arc::unwrap_or_clone(message);
            // Otherwise the letter would expire in the next queue too.
            let properties = Properties { expiration: None, ..properties };
            let letter =
                Publication { exchange: exchange.clone(), key: key.clone(), mandatory: true, properties, body };
            let death = Death { reason: reason.to_owned(), queue: queue.to_owned(), at: unix_millis() / 1000 };
            self.lay_to_rest(letter, death);
        }
    }

    /// Routes a dead letter. If no queue accepts it, it waits until one does, as with quorum queues of RabbitMQ.
    fn lay_to_rest(&mut self, letter: Publication, death: Death) {
        if self.route(letter.clone(), Some(death.clone())) != Confirm::Accepted {
            self.unburied.push((letter, death));
        }
    }

    /// Routes the dead letters again that no queue has accepted.
    pub(super) fn bury_again(&mut self) {
        for (letter, death) in std::mem::take(&mut self.unburied) {
            self.lay_to_rest(letter, death);
        }
    }
}
