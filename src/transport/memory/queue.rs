//! A queue of the broker in memory: which messages wait in it, in which order, and until when.

use std::collections::VecDeque;
use std::fmt::Display;
use std::sync::Arc;

use bytes::Bytes;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::stream::StreamLog;
use crate::topology::{self, QueueKind};
use crate::transport::{Death, Properties};

/// The delivery limit of a quorum queue that is declared without one, as on RabbitMQ 4.
const DEFAULT_DELIVERY_LIMIT: u32 = 20;

/// A message. The queues that have it share it.
#[derive(Clone)]
pub(super) struct StoredMessage {
    pub(super) exchange: String,
    pub(super) key: String,
    pub(super) properties: Properties,
    pub(super) body: Bytes,
    /// How it became a dead letter, if the broker made it one.
    pub(super) death: Option<Death>,
}

/// A message in one queue.
pub(super) struct QueueEntry {
    pub(super) message: Arc<StoredMessage>,
    pub(super) redelivered: bool,
    /// Its position among the messages of its level, which it keeps when it is requeued.
    position: u64,
    /// Its level: one for each priority.
    level: usize,
    /// When it expires.
    expires: Option<Instant>,
    /// How many deliveries of it have failed.
    pub(super) failures: u32,
    /// Its place in a stream.
    pub(super) offset: Option<u64>,
}

/// A task that looks at the queue at a given time. Dropping it cancels the task.
pub(super) struct Timer {
    pub(super) at: Instant,
    pub(super) task: JoinHandle<()>,
}

impl Drop for Timer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A queue: waiting messages, and consumers that take turns.
pub(super) struct MemoryQueue {
    pub(super) arguments: topology::Queue,
    /// The connection that an exclusive queue belongs to.
    pub(super) owner: Option<u64>,
    /// The channels that consume it. The first one gets the next message.
    pub(super) consumers: VecDeque<u64>,
    pub(super) timer: Option<Timer>,
    /// The waiting messages, by priority.
    levels: Vec<VecDeque<QueueEntry>>,
    /// The messages of a stream, which stay.
    pub(super) stream: StreamLog,
    next_position: u64,
    /// Since when nobody has consumed it.
    idle_since: Instant,
}

impl MemoryQueue {
    pub(super) fn new(arguments: topology::Queue, owner: Option<u64>) -> Self {
        let levels = usize::from(arguments.max_priority.unwrap_or(0)) + 1;
        Self {
            arguments,
            owner,
            consumers: VecDeque::new(),
            timer: None,
            levels: (0..levels).map(|_| VecDeque::new()).collect(),
            stream: StreamLog::default(),
            next_position: 0,
            idle_since: Instant::now(),
        }
    }

    /// Whether it belongs to another connection than this.
    pub(super) fn is_locked_to(&self, connection: u64) -> bool {
        self.owner.is_some_and(|owner| owner != connection)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.levels.iter().all(VecDeque::is_empty)
    }

    /// How many messages are ready. Those that are delivered and not settled do not count.
    pub(super) fn len(&self) -> usize {
        self.levels.iter().map(VecDeque::len).sum::<usize>() + self.stream.len()
    }

    pub(super) fn is_stream(&self) -> bool {
        self.arguments.kind == QueueKind::Stream
    }

    /// Whether it refuses further messages.
    pub(super) fn is_full(&self) -> bool {
        !self.arguments.keeps_latest && self.arguments.max_length.is_some_and(|most| self.len() >= most as usize)
    }

    /// Takes out the oldest message if there are more than may be.
    pub(super) fn pop_surplus(&mut self) -> Option<QueueEntry> {
        let most = self.arguments.max_length.filter(|_| self.arguments.keeps_latest)?;
        if self.len() <= most as usize {
            return None;
        }
        self.levels.iter_mut().find_map(VecDeque::pop_front)
    }

    /// Makes an entry of a new message, behind all others.
    pub(super) fn entry(&mut self, message: Arc<StoredMessage>, now: Instant) -> QueueEntry {
        self.next_position += 1;
        let priority = usize::from(message.properties.priority.unwrap_or(0));
        QueueEntry {
            redelivered: false,
            position: self.next_position,
            level: priority.min(self.levels.len() - 1),
            // A time that the clock cannot express never comes.
            expires: message.properties.expiration.and_then(|time| now.checked_add(time)),
            failures: 0,
            offset: None,
            message,
        }
    }

    /// Adds a new message.
    pub(super) fn push(&mut self, entry: QueueEntry) {
        self.levels[entry.level].push_back(entry);
    }

    /// Requeues a message at the position that it had.
    pub(super) fn put_back(&mut self, mut entry: QueueEntry) {
        if self.is_stream() {
            // It has never left.
            return;
        }
        entry.redelivered = true;
        let level = &mut self.levels[entry.level];
        let place = level.partition_point(|waiting| waiting.position < entry.position);
        level.insert(place, entry);
    }

    /// Requeues a message after a failed delivery. Returns it instead if it has reached the delivery limit.
    pub(super) fn fail(&mut self, mut entry: QueueEntry) -> Option<QueueEntry> {
        let limit = match self.arguments.kind {
            QueueKind::Quorum => self.arguments.delivery_limit.unwrap_or(DEFAULT_DELIVERY_LIMIT),
            QueueKind::Classic | QueueKind::Exclusive | QueueKind::Stream => u32::MAX,
        };
        entry.failures += 1;
        if entry.failures > limit {
            return Some(entry);
        }
        self.put_back(entry);
        None
    }

    /// Takes out the next message.
    pub(super) fn pop(&mut self) -> Option<QueueEntry> {
        self.levels.iter_mut().rev().find_map(VecDeque::pop_front)
    }

    /// Takes out a message that has expired. Like RabbitMQ, it looks only at the first of each level.
    pub(super) fn pop_expired(&mut self, now: Instant) -> Option<QueueEntry> {
        let is_late = |entry: &QueueEntry| entry.expires.is_some_and(|time| time <= now);
        self.levels.iter_mut().find(|level| level.front().is_some_and(is_late))?.pop_front()
    }

    /// The queue was declared again or has lost a consumer, so its time without a consumer starts again.
    pub(super) fn touch(&mut self) {
        self.idle_since = Instant::now();
    }

    /// When the queue is deleted, unless somebody consumes it before.
    pub(super) fn expires_at(&self) -> Option<Instant> {
        let time = self.arguments.expires.filter(|_| self.consumers.is_empty())?;
        self.idle_since.checked_add(time)
    }

    /// When the queue, or one of its messages, expires next.
    pub(super) fn due(&self) -> Option<Instant> {
        let heads = self.levels.iter().filter_map(|level| level.front()?.expires);
        heads.chain(self.expires_at()).min()
    }

    /// A sentence for each argument in which `wanted` differs from this queue.
    pub(super) fn differences(&self, wanted: &topology::Queue) -> Vec<String> {
        let has = &self.arguments;
        let milliseconds = |queue: &topology::Queue| queue.expires.map(|time| time.as_millis());
        let dead_exchange = |queue: &topology::Queue| queue.dead_letter.clone().map(|(exchange, _)| exchange);
        let dead_key = |queue: &topology::Queue| queue.dead_letter.clone().map(|(_, key)| key);
        let single_active = |queue: &topology::Queue| queue.single_active.then_some(true);
        [
            difference("x-queue-type", Some(storage(has)), Some(storage(wanted))),
            difference("x-expires", milliseconds(has), milliseconds(wanted)),
            difference("x-max-length-bytes", has.max_bytes, wanted.max_bytes),
            difference("x-stream-max-segment-size-bytes", has.segment_bytes(), wanted.segment_bytes()),
            difference("x-max-age", has.age(), wanted.age()),
            difference("x-max-length", has.max_length, wanted.max_length),
            difference("x-overflow", has.overflow(), wanted.overflow()),
            difference("x-single-active-consumer", single_active(has), single_active(wanted)),
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

/// A sentence for an argument that differs: its value, and the one that was declared. `None` if they are the same.
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

/// An argument that queues of this kind cannot have.
pub(super) fn invalid_argument(queue: &topology::Queue) -> Option<&'static str> {
    let priority = queue.max_priority.map(|_| "x-max-priority");
    let age = queue.max_age.map(|_| "x-max-age");
    match queue.kind {
        QueueKind::Stream => priority
            .or(queue.expires.map(|_| "x-expires"))
            .or(queue.max_length.map(|_| "x-max-length"))
            .or(queue.single_active.then_some("x-single-active-consumer")),
        QueueKind::Quorum => priority.or(age),
        QueueKind::Classic | QueueKind::Exclusive => queue.delivery_limit.map(|_| "x-delivery-limit").or(age),
    }
}

fn storage(queue: &topology::Queue) -> &'static str {
    match queue.kind {
        QueueKind::Exclusive | QueueKind::Classic => "classic",
        QueueKind::Quorum => "quorum",
        QueueKind::Stream => "stream",
    }
}
