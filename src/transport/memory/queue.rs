//! One queue of the broker in memory: what waits in it, in which order, and until when.

use std::collections::VecDeque;
use std::fmt::Display;
use std::sync::Arc;

use bytes::Bytes;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::topology::{self, QueueKind};
use crate::transport::{Death, Properties};

/// RabbitMQ 4's delivery limit of a quorum queue that is declared without one.
const DEFAULT_DELIVERY_LIMIT: u32 = 20;

/// A message as the queues it was routed to share it.
#[derive(Clone)]
pub(super) struct Message {
    pub(super) exchange: String,
    pub(super) key: String,
    pub(super) properties: Properties,
    pub(super) body: Bytes,
    /// How it came to a queue of dead letters, if the broker brought it there.
    pub(super) death: Option<Death>,
}

/// A message's stay in one queue.
pub(super) struct Entry {
    pub(super) message: Arc<Message>,
    pub(super) redelivered: bool,
    /// Where it belongs among the others of its level.
    position: u64,
    level: usize,
    expires: Option<Instant>,
    pub(super) failures: u32,
}

/// A task that wakes the queue at a time; it is called off when dropped.
pub(super) struct Timer {
    pub(super) at: Instant,
    pub(super) task: JoinHandle<()>,
}

impl Drop for Timer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A queue: messages that wait and consumers that take turns.
pub(super) struct Queue {
    pub(super) arguments: topology::Queue,
    /// The connection that an exclusive queue belongs to.
    pub(super) owner: Option<u64>,
    /// Channels that consume it; the first is the next to get a message.
    pub(super) consumers: VecDeque<u64>,
    pub(super) timer: Option<Timer>,
    /// Messages that wait, by priority.
    levels: Vec<VecDeque<Entry>>,
    next_position: u64,
    /// Since when nobody has consumed it.
    idle_since: Instant,
}

impl Queue {
    pub(super) fn new(arguments: topology::Queue, owner: Option<u64>) -> Self {
        let levels = usize::from(arguments.max_priority.unwrap_or(0)) + 1;
        Self {
            arguments,
            owner,
            consumers: VecDeque::new(),
            timer: None,
            levels: (0..levels).map(|_| VecDeque::new()).collect(),
            next_position: 0,
            idle_since: Instant::now(),
        }
    }

    pub(super) fn is_locked_to(&self, connection: u64) -> bool {
        self.owner.is_some_and(|owner| owner != connection)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.levels.iter().all(VecDeque::is_empty)
    }

    /// How many messages wait; those that are out unsettled do not count.
    pub(super) fn len(&self) -> usize {
        self.levels.iter().map(VecDeque::len).sum()
    }

    /// Whether it refuses another message.
    pub(super) fn is_full(&self) -> bool {
        self.arguments.max_length.is_some_and(|most| self.len() >= most as usize)
    }

    /// A message that has come last.
    pub(super) fn entry(&mut self, message: Arc<Message>, now: Instant) -> Entry {
        self.next_position += 1;
        let priority = usize::from(message.properties.priority.unwrap_or(0));
        Entry {
            redelivered: false,
            position: self.next_position,
            level: priority.min(self.levels.len() - 1),
            // A time past what the clock can count is never.
            expires: message.properties.expiration.and_then(|time| now.checked_add(time)),
            failures: 0,
            message,
        }
    }

    /// Lets a new message wait.
    pub(super) fn push(&mut self, entry: Entry) {
        self.levels[entry.level].push_back(entry);
    }

    /// Lets a message wait that was out, where it was before.
    pub(super) fn put_back(&mut self, mut entry: Entry) {
        entry.redelivered = true;
        let level = &mut self.levels[entry.level];
        let place = level.partition_point(|waiting| waiting.position < entry.position);
        level.insert(place, entry);
    }

    /// Counts a failed attempt and lets the message wait again; gives it out instead when that was its last.
    pub(super) fn fail(&mut self, mut entry: Entry) -> Option<Entry> {
        let limit = match self.arguments.kind {
            QueueKind::Quorum => self.arguments.delivery_limit.unwrap_or(DEFAULT_DELIVERY_LIMIT),
            QueueKind::Classic | QueueKind::Exclusive => u32::MAX,
        };
        entry.failures += 1;
        if entry.failures > limit {
            return Some(entry);
        }
        self.put_back(entry);
        None
    }

    /// Takes the next message out.
    pub(super) fn pop(&mut self) -> Option<Entry> {
        self.levels.iter_mut().rev().find_map(VecDeque::pop_front)
    }

    /// Takes a message out that has waited too long. Like RabbitMQ it looks no further than the head of each level.
    pub(super) fn pop_expired(&mut self, now: Instant) -> Option<Entry> {
        let is_late = |entry: &Entry| entry.expires.is_some_and(|time| time <= now);
        self.levels.iter_mut().find(|level| level.front().is_some_and(is_late))?.pop_front()
    }

    /// The queue was declared again or lost a consumer: its time without any starts anew.
    pub(super) fn touch(&mut self) {
        self.idle_since = Instant::now();
    }

    /// When it is to be deleted, unless somebody consumes it by then.
    pub(super) fn expires_at(&self) -> Option<Instant> {
        let time = self.arguments.expires.filter(|_| self.consumers.is_empty())?;
        self.idle_since.checked_add(time)
    }

    /// When it has to be looked at next.
    pub(super) fn due(&self) -> Option<Instant> {
        let heads = self.levels.iter().filter_map(|level| level.front()?.expires);
        heads.chain(self.expires_at()).min()
    }

    /// A sentence for each argument in which `wanted` differs from what the queue has.
    pub(super) fn differences(&self, wanted: &topology::Queue) -> Vec<String> {
        let has = &self.arguments;
        let milliseconds = |queue: &topology::Queue| queue.expires.map(|time| time.as_millis());
        let dead_exchange = |queue: &topology::Queue| queue.dead_letter.clone().map(|(exchange, _)| exchange);
        let dead_key = |queue: &topology::Queue| queue.dead_letter.clone().map(|(_, key)| key);
        let overflow = |queue: &topology::Queue| queue.max_length.map(|_| "reject-publish");
        [
            difference("x-queue-type", Some(storage(has)), Some(storage(wanted))),
            difference("x-expires", milliseconds(has), milliseconds(wanted)),
            difference("x-max-length", has.max_length, wanted.max_length),
            difference("x-overflow", overflow(has), overflow(wanted)),
            difference("x-max-priority", has.max_priority, wanted.max_priority),
            difference("x-delivery-limit", has.delivery_limit, wanted.delivery_limit),
            difference("x-dead-letter-exchange", dead_exchange(has), dead_exchange(wanted)),
            difference("x-dead-letter-routing-key", dead_key(has), dead_key(wanted)),
        ]
        .into_iter()
        .flatten()
        .collect()
    }
}

/// A sentence for an argument that differs, naming what it is and what was asked for.
pub(super) fn difference<T: Display + PartialEq>(argument: &str, has: Option<T>, wanted: Option<T>) -> Option<String> {
    if has == wanted {
        return None;
    }
    let said = match (has, wanted) {
        (Some(has), Some(wanted)) => format!("is {has}, not {wanted} as declared here"),
        (Some(has), None) => format!("is {has}, but not declared here"),
        (None, Some(wanted)) => format!("is not set, but declared here as {wanted}"),
        (None, None) => return None,
    };
    Some(format!("`{argument}` {said}"))
}

/// An argument that a queue of this kind does not have.
pub(super) fn invalid_argument(queue: &topology::Queue) -> Option<&'static str> {
    match queue.kind {
        QueueKind::Quorum => queue.max_priority.map(|_| "x-max-priority"),
        QueueKind::Classic | QueueKind::Exclusive => queue.delivery_limit.map(|_| "x-delivery-limit"),
    }
}

fn storage(queue: &topology::Queue) -> &'static str {
    match queue.kind {
        QueueKind::Exclusive | QueueKind::Classic => "classic",
        QueueKind::Quorum => "quorum",
    }
}
