//! A delivered message, and its settlement: it is acknowledged when all its frames are done.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::Bytes;
use tokio::time::Instant;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;
use uuid::Uuid;

use crate::frame::Frame;
use crate::headers::user_of;
use crate::transport::{Delivery, Life, Properties, Settle, Transport};

/// Which queue a message came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Source {
    /// The queue for calls to any instance.
    Calls,
    /// The queue for oneway calls to any instance of a service, or for the events of a group.
    Work,
    /// The instance's own queue: calls to it, broadcasts and cancels.
    Instance,
    /// The queue for the events of a subscription without a group.
    Events,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Calls => "calls",
            Self::Work => "oneway calls",
            Self::Instance => "one instance",
            Self::Events => "events",
        })
    }
}

/// How an instance is done with a oneway call. If there are several ends of a call, the greatest counts, since a call
/// that was moved may have come back and run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum MessageEnd {
    /// It was published again, alone, for this attempt. That copy will run.
    Moved(u64),
    /// It has run, or is a dead letter.
    Over,
}

impl MessageEnd {
    /// Whether this delivery of the call must not run. `frames` is the number of frames in its message. The copy that
    /// was published again may run.
    pub(super) fn ends(self, frame: &Frame, frames: usize) -> bool {
        match self {
            Self::Moved(attempt) => frames > 1 || frame.metadata.attempt() < attempt,
            Self::Over => true,
        }
    }
}

/// What all frames of a message share.
#[derive(Debug)]
pub(super) struct Message {
    /// The delivery, until it is settled.
    delivery: Mutex<Option<Delivery>>,
    /// The life of the consumer that got it. `None` if it need not be settled.
    life: Option<Arc<Life>>,
    /// How many of its frames are not done.
    open: AtomicUsize,
    /// Whether one of its frames has had its turn.
    begun: AtomicBool,
    /// The oneway calls in it that are done, if it has several.
    done: Mutex<Vec<(Uuid, MessageEnd)>>,
    /// The connection over which it came. After that is lost, the broker delivers the message again.
    pub(super) transport: Transport,
    pub(super) source: Source,
    pub(super) frames: usize,
    /// The queue for replies.
    pub(super) reply_to: Option<Arc<str>>,
    /// The AMQP `type`.
    pub(super) kind: Option<Arc<str>>,
    /// The user of the caller, as the broker has verified.
    pub(super) user: Option<Arc<str>>,
    pub(super) properties: Properties,
    pub(super) exchange: String,
    pub(super) key: String,
    pub(super) body: Bytes,
    pub(super) redelivered: bool,
    /// How many deliveries of it have failed before.
    pub(super) failures: u32,
    /// When it was delivered.
    pub(super) received: Instant,
    /// Held until it is dropped: those who wait for the calls of a queue wait for their settlement too.
    settled: TaskTrackerToken,
}

impl Message {
    /// A message that was delivered over `transport`, with this many frames.
    pub(super) fn new(
        mut delivery: Delivery,
        transport: Transport,
        source: Source,
        frames: usize,
        open: TaskTrackerToken,
    ) -> Self {
        Self {
            user: user_of(&delivery.properties, transport.user()),
            open: AtomicUsize::new(frames),
            begun: AtomicBool::new(false),
            done: Mutex::default(),
            transport,
            source,
            frames,
            reply_to: delivery.properties.reply_to.as_deref().map(Into::into),
            kind: delivery.properties.kind.as_deref().map(Into::into),
            properties: std::mem::take(&mut delivery.properties),
            exchange: std::mem::take(&mut delivery.exchange),
            key: std::mem::take(&mut delivery.key),
            body: delivery.body.clone(),
            redelivered: delivery.redelivered,
            failures: delivery.failures,
            received: delivery.received,
            life: delivery.life().cloned(),
            delivery: Mutex::new(Some(delivery)),
            settled: open,
        }
    }

    /// The tasks that consume the queue that it came from.
    pub(super) fn tasks(&self) -> &TaskTracker {
        self.settled.task_tracker()
    }

    /// Which attempt of a call this is; the first is 1. Attempts in earlier messages are in the frame, and the broker
    /// counts those in this one.
    pub(super) fn attempt(&self, frame: &Frame) -> u64 {
        let before = frame.metadata.attempt();
        // A queue for calls does not count. It only tells that the message was delivered before.
        let since = if self.source == Source::Calls { self.redelivered.into() } else { 0 };
        before.saturating_add(u64::from(self.failures).max(since))
    }

    /// Whether the broker has requeued it, since its channel has ended. Calls in it that have not begun must not begin:
    /// they are delivered again.
    pub(super) fn is_taken_back(&self) -> bool {
        self.life.as_ref().is_some_and(|life| life.took_back())
    }

    /// One of its frames has its turn. From now on all of them are to run: a message is settled as a whole.
    pub(super) fn begin(&self) {
        self.begun.store(true, Ordering::Relaxed);
    }

    pub(super) fn has_begun(&self) -> bool {
        self.begun.load(Ordering::Relaxed)
    }

    /// Notes that one of its oneway calls is done, and must not run if the message is delivered again.
    pub(super) fn note_done(&self, id: Uuid, end: MessageEnd) {
        self.done().push((id, end));
    }

    /// The oneway calls in it that are done.
    pub(super) fn done(&self) -> MutexGuard<'_, Vec<(Uuid, MessageEnd)>> {
        self.done.lock().expect("no panic while holding the calls that are done with")
    }

    /// One of its frames is done: answered, published again, or a dead letter. After the last one the message is
    /// acknowledged.
    pub(super) fn finish(&self) {
        if self.open.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.settle(Settle::Ack);
        }
    }

    /// Settles the whole message, whatever happens to its frames. Only the first settlement counts.
    pub(super) fn settle(&self, settle: Settle) {
        if let Some(delivery) = self.delivery.lock().expect("no panic while holding the delivery").take() {
            delivery.settle(settle);
        }
    }
}
