//! Where a subscription begins that reads events of the past, and how long these are kept.

use std::time::Duration;

use crate::topology::{Declaration, Namespace, ServiceId};

/// Where a subscription begins to read the events that were kept for it: see
/// [`Subscription::from`](crate::Subscription::from).
///
/// ```
/// use std::time::Duration;
///
/// use hopline::{Replay, Subscription};
///
/// let today: Subscription<u64> = Subscription::to("order.*").from(Replay::Ago(Duration::from_secs(24 * 3600)));
/// # let _ = today;
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Replay {
    /// The oldest event that is kept.
    Start,
    /// The last event that was published.
    Last,
    /// The first event that was published since so long ago, counted from when this is given to the subscription, by the
    /// clock of the event's publisher.
    Ago(Duration),
    /// The event at this position. The first that was ever kept has the position 0. Events that share a message have one
    /// position. If the position is not kept any more, the oldest event that is.
    Offset(u64),
}

/// What a subscription says of the events that are kept for it.
#[derive(Debug, Clone)]
pub(crate) struct ReplaySettings {
    pub(crate) from: Replay,
    /// When the subscription was made, in milliseconds since 1970.
    pub(crate) made_at: u64,
    pub(crate) pattern: String,
    /// How long events are kept.
    pub(crate) keep_for: Duration,
    /// How many bytes of them are kept.
    pub(crate) keep_bytes: u64,
}

impl ReplaySettings {
    /// What is declared for it: the stream, and if a group reads it, the queues for its turn and for how far it has come.
    pub(crate) fn declarations(&self, namespace: &Namespace, id: &ServiceId) -> Vec<Declaration> {
        let mut parts = namespace.kept(&self.pattern, self.keep_for, self.keep_bytes);
        if id.is_group() {
            parts.extend(namespace.replaying(id));
        }
        parts
    }
}
