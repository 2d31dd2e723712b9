//! What the broker in memory delivers to its consumers, and how they settle it.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use tokio::sync::mpsc::UnboundedSender;
use tokio::time::Instant;

use super::Pull;
use super::broker::{BrokerState, locked, missing};
use super::queue::{MemoryQueue, QueueEntry, StoredMessage};
use crate::error::Error;
use crate::topology::QueueKind;
use crate::transport::{ConsumerEnd, Delivery, Life, Mode, QueueCount, Settle, Settler};

/// RabbitMQ's word for a message that was delivered too often.
const DELIVERY_LIMIT: &str = "delivery_limit";
/// RabbitMQ's word for a message that was rejected.
const REJECTED: &str = "rejected";
/// The tag of a message that was taken out singly. It is the only one of its channel.
const PULLED: u64 = 1;

/// The channel of one consumer. It exists as long as the consumer, or one of its deliveries, does.
pub(super) struct Channel {
    pub(super) connection: u64,
    pub(super) queue: Arc<str>,
    /// The deliveries that are not settled, by tag.
    unsettled: BTreeMap<u64, QueueEntry>,
    /// Whether its queue counts failed deliveries.
    counts: bool,
    next_tag: u64,
    /// The offset of the message of a stream that is next.
    next_of_stream: u64,
    /// `None` after the consumer was cancelled.
    consumption: Option<Consumption>,
    life: Arc<Life>,
}

/// Where the deliveries of a consumer go, and how they are settled.
pub(super) struct Consumption {
    pub(super) mode: Mode,
    pub(super) deliveries: UnboundedSender<Delivery>,
    pub(super) settler: UnboundedSender<(u64, Settle)>,
}

impl BrokerState {
    /// Opens a channel that consumes a queue. Returns its id.
    pub(super) fn consume(
        &mut self,
        connection: u64,
        queue: &str,
        consumption: Consumption,
        life: Arc<Life>,
    ) -> Result<u64, Error> {
        let id = self.new_id();
        let operation = || format!("consume the queue `{queue}`");
        let Some(state) = self.queues.get_mut(queue) else {
            return Err(missing(operation(), "queue"));
        };
        if state.is_locked_to(connection) {
            return Err(locked(operation()));
        }
        state.consumers.push_back(id);
        let counts = state.arguments.kind == QueueKind::Quorum;
        let next_of_stream = match consumption.mode {
            Mode::Stream { from, .. } => state.stream.start(from),
            Mode::Settle { .. } | Mode::SettleAnyTime { .. } | Mode::NoAck => 0,
        };
        let (unsettled, consumption) = (BTreeMap::new(), Some(consumption));
        let channel = Channel {
            connection,
            queue: queue.into(),
            unsettled,
            counts,
            next_tag: 1,
            next_of_stream,
            consumption,
            life,
        };
        self.channels.insert(id, channel);
        self.turn(queue);
        Ok(id)
    }

    /// Takes the next message out of a queue, on a channel of its own.
    pub(super) fn get(&mut self, connection: u64, queue: &str) -> Result<Option<Delivery>, Error> {
        let operation = || format!("get a message of the queue `{queue}`");
        let id = self.new_id();
        let Some(state) = self.queues.get_mut(queue) else {
            return Err(missing(operation(), "queue"));
        };
        if state.is_locked_to(connection) {
            return Err(locked(operation()));
        }
        if state.arguments.single_active && state.arguments.kind == QueueKind::Quorum {
            return Err(Error::refused(
                operation(),
                "RESOURCE_LOCKED: a single consumer gets the messages of the queue",
            ));
        }
        state.touch();
        let Some(entry) = state.pop() else { return Ok(None) };
        let counts = state.arguments.kind == QueueKind::Quorum;
        let settler = Settler::Memory(Pull { broker: self.broker.clone(), channel: id });
        let failures = if counts { entry.failures } else { 0 };
        let delivery = delivery(entry.message.clone(), entry.redelivered, failures, Some(settler));
        let unsettled = BTreeMap::from([(PULLED, entry)]);
        let channel = Channel {
            connection,
            queue: queue.into(),
            unsettled,
            counts,
            next_tag: PULLED + 1,
            next_of_stream: 0,
            consumption: None,
            life: Arc::default(),
        };
        self.channels.insert(id, channel);
        self.set_timer(queue);
        Ok(Some(delivery))
    }

    /// Settles a message that [`BrokerState::get`] has taken out.
    pub(super) fn settle_pulled(&mut self, channel: u64, settle: Settle) {
        self.settle(channel, std::iter::once((PULLED, settle)));
        self.channels.remove(&channel);
    }

    /// How many messages of a queue are ready.
    pub(super) fn count(&mut self, connection: u64, queue: &str) -> Result<Option<QueueCount>, Error> {
        match self.queues.get_mut(queue) {
            Some(state) if state.is_locked_to(connection) => {
                Err(locked(format!("count the messages of the queue `{queue}`")))
            }
            state => Ok(state.map(|state| {
                state.stream.trim(&state.arguments);
                let consumers = u32::try_from(state.consumers.len()).unwrap_or(u32::MAX);
                QueueCount { waiting: state.len() as u64, consumers }
            })),
        }
    }

    /// The offset of a stream's last message.
    pub(super) fn last_offset(&self, stream: &str) -> Result<Option<u64>, Error> {
        let found = self.queues.get(stream).map(|state| state.stream.last());
        found.ok_or_else(|| missing(format!("find the end of the stream `{stream}`"), "queue"))
    }

    /// Delivers nothing more on a channel. What is delivered can still be settled.
    pub(super) fn cancel(&mut self, id: u64) {
        if let Some(name) = self.stop(id) {
            // It may be another consumer's turn now.
            self.turn(&name);
        }
    }

    /// Takes a channel away from the consumers of its queue, which is returned.
    fn stop(&mut self, id: u64) -> Option<Arc<str>> {
        let channel = self.channels.get_mut(&id)?;
        channel.consumption = None;
        let name = channel.queue.clone();
        if let Some(queue) = self.queues.get_mut(&name) {
            queue.consumers.retain(|consumer| *consumer != id);
            queue.touch();
        }
        self.set_timer(&name);
        Some(name)
    }

    /// Settles deliveries of a channel.
    pub(super) fn settle(&mut self, channel: u64, settles: impl Iterator<Item = (u64, Settle)>) {
        // If its queue or connection is gone, there is nothing to settle.
        let Some(channel) = self.channels.get_mut(&channel) else {
            return;
        };
        let name = channel.queue.clone();
        let Some(queue) = self.queues.get_mut(&name) else {
            return;
        };
        let mut dead = Vec::new();
        for (tag, settle) in settles {
            let Some(entry) = channel.unsettled.remove(&tag) else {
                continue;
            };
            match settle {
                Settle::Ack => {}
                Settle::GiveBack => queue.put_back(entry),
                Settle::Failed => dead.extend(queue.fail(entry).map(|entry| (entry, DELIVERY_LIMIT))),
                Settle::Discard => dead.push((entry, REJECTED)),
            }
        }
        self.turn(&name);
        self.bury(&name, dead);
    }

    /// Ends channels. What they have not settled is requeued before anybody gets the next message. As on RabbitMQ, that
    /// counts as a failed delivery, since the message may have killed its consumer.
    pub(super) fn end(&mut self, channels: &[u64]) {
        let mut queues = Vec::new();
        for id in channels {
            self.stop(*id);
            let Some(channel) = self.channels.remove(id) else {
                continue;
            };
            let Some(queue) = self.queues.get_mut(&channel.queue) else {
                continue;
            };
            let dead = channel.unsettled.into_values().filter_map(|entry| queue.fail(entry));
            let dead = dead.map(|entry| (entry, DELIVERY_LIMIT)).collect();
            queues.push((channel.queue, dead));
        }
        for (name, dead) in queues {
            self.turn(&name);
            self.bury(&name, dead);
        }
    }
}

/// The consumer whose turn it is, among those with room.
pub(super) fn next_consumer<'a>(
    queue: &mut MemoryQueue,
    channels: &'a mut HashMap<u64, Channel>,
) -> Option<&'a mut Channel> {
    let has_room = |id: &u64| channels.get(id).is_some_and(Channel::has_room);
    if queue.arguments.single_active {
        let active = queue.consumers.front().filter(|id| has_room(id))?;
        return channels.get_mut(active);
    }
    let place = queue.consumers.iter().position(has_room)?;
    let id = queue.consumers.remove(place)?;
    queue.consumers.push_back(id);
    channels.get_mut(&id)
}

impl Channel {
    /// The consumer ends without being cancelled.
    pub(super) fn lose(&self, end: ConsumerEnd) {
        if self.consumption.is_some() {
            self.life.end(end);
        }
    }

    /// Whether the consumer can get another message.
    fn has_room(&self) -> bool {
        self.consumption.as_ref().is_some_and(|consumption| match consumption.mode {
            _ if consumption.deliveries.is_closed() => false,
            mode => mode.prefetch().is_none_or(|prefetch| self.unsettled.len() < usize::from(prefetch)),
        })
    }

    /// Delivers messages of a stream, as far as the consumer has room.
    pub(super) fn read_on(&mut self, stream: &mut MemoryQueue) {
        while self.has_room()
            && let Some((offset, message)) = stream.stream.at_or_after(self.next_of_stream)
        {
            self.next_of_stream = offset + 1;
            let mut entry = stream.entry(message, Instant::now());
            entry.offset = Some(offset);
            self.deliver(entry);
        }
    }

    /// Delivers a message to the consumer, which must have room for it.
    pub(super) fn deliver(&mut self, entry: QueueEntry) {
        let consumption = self.consumption.as_ref().expect("a cancelled channel has no room");
        let settler = match consumption.mode {
            Mode::Settle { .. } | Mode::SettleAnyTime { .. } | Mode::Stream { .. } => Some(Settler::Channel {
                tag: self.next_tag,
                channel: consumption.settler.clone(),
                life: self.life.clone(),
            }),
            Mode::NoAck => None,
        };
        let settled = settler.is_some();
        let (redelivered, failures) = (entry.redelivered, if self.counts { entry.failures } else { 0 });
        let (message, offset) = (entry.message.clone(), entry.offset);
        if settled {
            self.unsettled.insert(self.next_tag, entry);
            self.next_tag += 1;
        } else {
            // If this was the last queue with the message, it is moved out and not copied.
            drop(entry);
        }
        // If the consumer was dropped at this moment, its channel ends and the message is requeued.
        let delivery = delivery(message, redelivered, failures, settler);
        let _ = consumption.deliveries.send(Delivery { offset, ..delivery });
    }
}

fn delivery(message: Arc<StoredMessage>, redelivered: bool, failures: u32, settler: Option<Settler>) -> Delivery {
    let StoredMessage { exchange, key, properties, body, death } = Arc::unwrap_or_clone(message);
    let (offset, received) = (None, Instant::now());
    Delivery { body, properties, exchange, key, redelivered, failures, death, offset, received, settler }
}
