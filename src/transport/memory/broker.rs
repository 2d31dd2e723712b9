//! The state of a broker in memory, and what connecting, declaring and time do to it.
//!
//! Between two operations, no queue has both a waiting message and a consumer with room for it, unless the broker is
//! stalled.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Weak};

use tokio::runtime::Handle;
use tokio::sync::broadcast;
use tokio::time::{Instant, sleep_until};

use super::MemoryBroker;
use super::channel::Channel;
use super::faults::{EndReason, Faults};
use super::queue::{MemoryQueue, Timer, difference, invalid_argument};
use crate::error::Error;
use crate::topology::{self, Binding, Declaration, ExchangeKind, QueueKind};
use crate::transport::{ConnectionEvent, ConsumerEnd, Death, Publication};

/// Everything that a broker knows.
pub(super) struct BrokerState {
    /// The broker itself, for its timers and for messages that are taken out singly.
    pub(super) broker: Weak<MemoryBroker>,
    /// The last id that was given to a connection or a channel.
    next_id: u64,
    pub(super) connections: BTreeMap<u64, Peer>,
    /// What is wrong with the broker, and what waits until that is over.
    pub(super) faults: Faults,
    pub(super) exchanges: HashMap<String, MemoryExchange>,
    pub(super) queues: HashMap<Arc<str>, MemoryQueue>,
    pub(super) channels: HashMap<u64, Channel>,
    /// Dead letters that no queue has accepted.
    pub(super) unburied: Vec<(Publication, Death)>,
}

/// Somebody who is connected.
pub(super) struct Peer {
    /// The runtime of the connection, in which tasks can run.
    pub(super) runtime: Handle,
    pub(super) user: Option<Arc<str>>,
    pub(super) events: broadcast::Sender<ConnectionEvent>,
    pub(super) end: EndReason,
    /// Whether it was told of an alarm.
    pub(super) blocked: bool,
}

/// An exchange.
pub(super) struct MemoryExchange {
    pub(super) kind: ExchangeKind,
    /// The queues that are bound, by key or pattern.
    pub(super) bindings: HashMap<String, Vec<Arc<str>>>,
}

impl BrokerState {
    pub(super) fn new(broker: Weak<MemoryBroker>) -> Self {
        Self {
            broker,
            next_id: 0,
            connections: BTreeMap::new(),
            faults: Faults::default(),
            exchanges: HashMap::new(),
            queues: HashMap::new(),
            channels: HashMap::new(),
            unburied: Vec::new(),
        }
    }

    pub(super) fn new_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    pub(super) fn connect(&mut self, peer: Peer) -> u64 {
        let id = self.new_id();
        let is_first = self.connections.is_empty();
        self.connections.insert(id, peer);
        if is_first {
            // Without a connection, there was no runtime for the timers.
            self.set_timers();
        }
        id
    }

    pub(super) fn is_connected(&self, connection: u64) -> bool {
        self.connections.contains_key(&connection)
    }

    /// Ends a connection, its channels and its exclusive queues. Nothing happens if it has ended already.
    pub(super) fn disconnect(&mut self, connection: u64) {
        if self.connections.remove(&connection).is_none() {
            return;
        }
        // Dropping these tells their senders that the connection has ended.
        self.faults.held.retain(|held| held.connection != connection);
        let channels = self.channels.iter().filter(|(_, channel)| channel.connection == connection);
        let channels = channels.inspect(|(_, channel)| channel.lose(ConsumerEnd::Connection));
        let channels: Vec<_> = channels.map(|(id, _)| *id).collect();
        let owned = self.queues.extract_if(|_, queue| queue.owner == Some(connection));
        for name in owned.map(|(name, _)| name).collect::<Vec<_>>() {
            self.forget(&name);
        }
        self.end(&channels);
        // Timers may run in a runtime that ends with this connection, so they are set anew.
        self.queues.values_mut().for_each(|queue| queue.timer = None);
        self.set_timers();
    }

    pub(super) fn declare(&mut self, connection: u64, part: &Declaration) -> Result<(), Error> {
        match part {
            Declaration::Exchange(exchange) => self.declare_exchange(exchange),
            Declaration::Queue(queue) => self.declare_queue(connection, queue),
            Declaration::Binding(binding) => self.bind(connection, binding),
        }
    }

    fn declare_exchange(&mut self, wanted: &topology::Exchange) -> Result<(), Error> {
        let new = || MemoryExchange { kind: wanted.kind, bindings: HashMap::new() };
        let exchange = self.exchanges.entry(wanted.name.clone()).or_insert_with(new);
        match difference("type", Some(kind(exchange.kind)), Some(kind(wanted.kind))) {
            None => Ok(()),
            Some(difference) => {
                Err(Error::Mismatch { name: format!("exchange `{}`", wanted.name), differences: vec![difference] })
            }
        }
    }

    fn declare_queue(&mut self, connection: u64, wanted: &topology::Queue) -> Result<(), Error> {
        let operation = || format!("declare the queue `{}`", wanted.name);
        if let Some(argument) = invalid_argument(wanted) {
            let reason = format!("PRECONDITION_FAILED: {:?} queues have no `{argument}`", wanted.kind);
            return Err(Error::refused(operation(), reason));
        }
        if let Some(queue) = self.queues.get_mut(wanted.name.as_str()) {
            let exclusive = wanted.kind == QueueKind::Exclusive;
            if queue.is_locked_to(connection) || queue.owner.is_some() != exclusive {
                return Err(locked(operation()));
            }
            let differences = queue.differences(wanted);
            if !differences.is_empty() {
                return Err(Error::Mismatch { name: format!("queue `{}`", wanted.name), differences });
            }
            queue.touch();
        } else {
            let owner = (wanted.kind == QueueKind::Exclusive).then_some(connection);
            self.queues.insert(wanted.name.as_str().into(), MemoryQueue::new(wanted.clone(), owner));
            self.bury_again();
        }
        self.set_timer(&wanted.name);
        Ok(())
    }

    pub(super) fn unbind(&mut self, binding: &Binding) {
        let exchange = self.exchanges.get_mut(&binding.exchange);
        if let Some(bound) = exchange.and_then(|exchange| exchange.bindings.get_mut(&binding.key)) {
            bound.retain(|queue| **queue != *binding.queue);
        }
    }

    fn bind(&mut self, connection: u64, binding: &Binding) -> Result<(), Error> {
        let operation = || format!("bind the queue `{}` to the exchange `{}`", binding.queue, binding.exchange);
        let Some((queue, state)) = self.queues.get_key_value(binding.queue.as_str()) else {
            return Err(missing(operation(), "queue"));
        };
        if state.is_locked_to(connection) {
            return Err(locked(operation()));
        }
        let Some(exchange) = self.exchanges.get_mut(&binding.exchange) else {
            return Err(missing(operation(), "exchange"));
        };
        let bound = exchange.bindings.entry(binding.key.clone()).or_default();
        if !bound.contains(queue) {
            bound.push(queue.clone());
        }
        Ok(())
    }

    /// Deletes a queue, with everything that belongs to it.
    pub(super) fn remove(&mut self, name: &str) {
        self.queues.remove(name);
        self.forget(name);
    }

    /// Ends the consumers of a queue that was removed, and deletes its bindings.
    pub(super) fn forget(&mut self, name: &str) {
        let of_queue = self.channels.extract_if(|_, channel| *channel.queue == *name);
        of_queue.for_each(|(_, channel)| channel.lose(ConsumerEnd::Cancelled));
        for exchange in self.exchanges.values_mut() {
            exchange.bindings.retain(|_, queues| {
                queues.retain(|queue| **queue != *name);
                !queues.is_empty()
            });
        }
    }
}

// Time.
impl BrokerState {
    /// Sets the timers of all queues.
    fn set_timers(&mut self) {
        for name in self.queues.keys().cloned().collect::<Vec<_>>() {
            self.set_timer(&name);
        }
    }

    /// Sets a timer for the moment at which the queue's next message, or the queue itself, expires.
    pub(super) fn set_timer(&mut self, name: &str) {
        let Some(queue) = self.queues.get_mut(name) else {
            return;
        };
        let Some(at) = queue.due() else { return };
        // A timer that rings too early does no harm: it is set again then.
        if queue.timer.as_ref().is_some_and(|timer| timer.at <= at) {
            return;
        }
        // Without a connection there is nobody who could notice.
        let Some(Peer { runtime, .. }) = self.connections.values().next() else {
            return;
        };
        let (broker, name) = (self.broker.clone(), name.to_owned());
        let task = runtime.spawn(async move {
            sleep_until(at).await;
            if let Some(broker) = broker.upgrade() {
                broker.state().ring(&name);
            }
        });
        queue.timer = Some(Timer { at, task });
    }

    /// The timer of a queue rings: the queue or its messages may have expired.
    pub(super) fn ring(&mut self, name: &str) {
        let is_silent = self.faults.is_silent(Some(name));
        let Some(queue) = self.queues.get_mut(name) else {
            return;
        };
        queue.timer = None;
        if is_silent {
            // The queue is looked at when it answers again.
            return;
        }
        if queue.expires_at().is_some_and(|at| at <= Instant::now()) {
            self.remove(name);
        } else {
            self.turn(name);
        }
    }
}

fn kind(kind: ExchangeKind) -> &'static str {
    match kind {
        ExchangeKind::Direct => "direct",
        ExchangeKind::Topic => "topic",
        ExchangeKind::Fanout => "fanout",
    }
}

/// The error for a queue or an exchange that does not exist.
pub(super) fn missing(operation: String, what: &str) -> Error {
    Error::refused(operation, format!("NOT_FOUND: there is no such {what}"))
}

/// The error for a queue that belongs to another connection.
pub(super) fn locked(operation: String) -> Error {
    Error::refused(
        operation,
        "RESOURCE_LOCKED: the queue is exclusive to another connection, or not declared as exclusive",
    )
}
