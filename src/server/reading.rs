//! What a server reads over one connection, and how the reading of each queue ends before the connection does.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::message::Source;
use super::{Declared, Site};
use crate::transport::Transport;

/// Which queue it is of those that a server reads: the place of what it is for among all that is served, and its kind.
pub(super) type Place = (usize, Source);

/// A connection, as those see it who read queues over it.
pub(super) struct Reading {
    /// Which of the server's connections it is, counted from 1.
    pub(super) connection: u64,
    pub(super) transport: Transport,
    pub(super) topology: Topology,
    parts: Mutex<BTreeMap<Place, Part>>,
    draining: CancellationToken,
    drained: CancellationToken,
}

/// What is declared over one connection for each queue.
#[derive(Clone, Default)]
pub(super) struct Topology(Arc<Mutex<BTreeMap<Place, Declared>>>);

/// The reading of one queue.
#[derive(Clone)]
pub(super) struct Part {
    /// Fires when it is not to be read any more.
    pub(super) stop: CancellationToken,
    /// The tasks that read it; each waits for the calls it started.
    pub(super) tasks: TaskTracker,
}

impl Reading {
    /// Until the server drains, unless it is to end sooner.
    pub(super) fn over(connection: u64, transport: Transport, site: &Site) -> Self {
        let (draining, drained) = (site.draining.clone(), site.drained.clone());
        Self { connection, transport, topology: Topology::default(), parts: Mutex::default(), draining, drained }
    }

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
    /// Has the queue read no more, and waits for the end of what came by it.
    pub(super) async fn end(&self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }
}
