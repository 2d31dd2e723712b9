//! What a server consumes over one connection, and how each of these consumers ends.
//!
//! A server that moves to another connection consumes over both for a while. So everything that belongs to one
//! connection is here.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::message::Source;
use super::{Declared, Site};
use crate::transport::Transport;

/// Identifies a queue of the server: the position of its service or subscription, and which of its queues it is.
pub(super) type Place = (usize, Source);

/// A connection over which queues are consumed.
pub(super) struct Reading {
    /// The number of the connection, from 1.
    pub(super) connection: u64,
    pub(super) transport: Transport,
    /// What is declared over it.
    pub(super) topology: Topology,
    /// The consumption of each queue.
    parts: Mutex<BTreeMap<Place, Part>>,
    /// Cancelled when the server begins to drain.
    draining: CancellationToken,
    /// Cancelled when the server has drained.
    drained: CancellationToken,
}

/// What was declared over one connection for each queue.
#[derive(Clone, Default)]
pub(super) struct Topology(Arc<Mutex<BTreeMap<Place, Declared>>>);

/// The consumption of one queue.
#[derive(Clone)]
pub(super) struct Part {
    /// Cancelled when the queue is not to be consumed any more.
    pub(super) stop: CancellationToken,
    /// The tasks that consume it. Each waits for the calls that it has started.
    pub(super) tasks: TaskTracker,
}

impl Reading {
    /// Queues are consumed over this connection until the server drains, unless they are ended before.
    pub(super) fn over(connection: u64, transport: Transport, site: &Site) -> Self {
        let (draining, drained) = (site.draining.clone(), site.drained.clone());
        Self { connection, transport, topology: Topology::default(), parts: Mutex::default(), draining, drained }
    }

    /// The consumption of a queue. An instance's own queue is consumed until the drain has ended, since cancels arrive
    /// there.
    pub(super) fn part(&self, place: Place) -> Part {
        let until = match place.1 {
            Source::Calls | Source::Work | Source::Events => &self.draining,
            Source::Instance => &self.drained,
        };
        let mut parts = self.parts.lock().expect("no panic while holding the parts");
        let new = || Part { stop: until.child_token(), tasks: TaskTracker::new() };
        parts.entry(place).or_insert_with(new).clone()
    }
}

impl Topology {
    pub(super) fn lock(&self) -> MutexGuard<'_, BTreeMap<Place, Declared>> {
        self.0.lock().expect("no panic while holding the topology")
    }
}

impl Part {
    /// Ends the consumption of the queue, and waits until everything that it has delivered is done.
    pub(super) async fn end(&self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }
}
