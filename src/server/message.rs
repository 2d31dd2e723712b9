//! A delivered message and its settlement: it is settled when all its frames are.

use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::Bytes;
use tokio::time::Instant;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;
use uuid::Uuid;

use super::allow::user_of;
use crate::frame::Frame;
use crate::transport::{Delivery, Life, Properties, Settle, Transport};

/// Which queue a message came from, and so what it can be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Source {
    /// Calls to any instance.
    Calls,
    /// Oneway calls to any instance.
    Work,
    /// Calls to this instance, broadcasts, cancels.
    Instance,
    /// Events that a subscriber's patterns match.
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

/// How an instance is done with a oneway call. Of several ends of a call the greatest counts: what has been moved may have come
/// back and run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum End {
    /// It has been published again, alone, for this attempt: that copy is to run.
    Moved(u64),
    /// It has run, or is kept with the dead letters.
    Over,
}

impl End {
    /// Whether a delivery of the call is not to run, in a message of so many: it is not the copy that was published again.
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
    delivery: Mutex<Option<Delivery>>,
    /// The life of the consumer that it came to, if it is to be settled.
    life: Option<Arc<Life>>,
    open: AtomicUsize,
    /// Its oneway calls that are done with, where there are several.
    done: Mutex<Vec<(Uuid, End)>>,
    /// The connection it came over. On another one it may have been delivered again.
    pub(super) transport: Transport,
    pub(super) source: Source,
    pub(super) frames: usize,
    /// Where replies go.
    pub(super) reply_to: Option<Arc<str>>,
    /// The AMQP `type`.
    pub(super) kind: Option<Arc<str>>,
    /// Its caller, as the broker has verified.
    pub(super) user: Option<Arc<str>>,
    pub(super) properties: Properties,
    pub(super) exchange: String,
    pub(super) key: String,
    pub(super) body: Bytes,
    pub(super) redelivered: bool,
    /// How many deliveries of it have failed before.
    pub(super) failures: u32,
    pub(super) received: Instant,
    /// Whoever waits for the calls of a queue waits for their settlement too.
    settled: TaskTrackerToken,
}

impl Message {
    /// A delivery over `transport`.
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

    /// The tasks of those who read the queue that it came from.
    pub(super) fn tasks(&self) -> &TaskTracker {
        self.settled.task_tracker()
    }

    /// Which attempt of a call this is, 1 for the first: those that the broker counts come on top of those that the call
    /// had in other messages.
    pub(super) fn attempt(&self, frame: &Frame) -> u64 {
        let before = frame.metadata.attempt();
        // A queue that does not count says no more than that it was delivered before.
        let since = if self.source == Source::Calls { self.redelivered.into() } else { 0 };
        before.saturating_add(u64::from(self.failures).max(since))
    }

    /// Whether the broker has taken it back, and delivers it again: what has not begun is not to.
    pub(super) fn is_taken_back(&self) -> bool {
        self.life.as_ref().is_some_and(|life| life.took_back())
    }

    /// One of its oneway calls is done with, and is not to run again if the message is delivered once more.
    pub(super) fn note_done(&self, id: Uuid, end: End) {
        self.done().push((id, end));
    }

    /// Its oneway calls that are done with, where there are several.
    pub(super) fn done(&self) -> MutexGuard<'_, Vec<(Uuid, End)>> {
        self.done.lock().expect("no panic while holding the calls that are done with")
    }

    /// One of its frames is done with: answered, given back or dead-lettered. The last one acks the message.
    pub(super) fn finish(&self) {
        if self.open.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.settle(Settle::Ack);
        }
    }

    /// Settles the message as a whole, whatever becomes of its frames.
    pub(super) fn settle(&self, settle: Settle) {
        if let Some(delivery) = self.delivery.lock().expect("no panic while holding the delivery").take() {
            delivery.settle(settle);
        }
    }
}
