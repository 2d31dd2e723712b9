//! What a server consumes over one connection, and how each of these consumers ends.
//!
//! A server that moves to another connection consumes over both for a while. So everything that belongs to one
//! connection is here.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::served_queue::ServedQueue;
use crate::topology::{Binding, Declaration};
use crate::transport::Transport;

/// A connection over which queues are consumed.
pub(super) struct Reading {
    /// The number of the connection, from 1.
    pub(super) connection: u64,
    pub(super) transport: Transport,
    /// What is declared over it.
    pub(super) topology: Topology,
    /// The consumption of each queue, by its number.
    parts: Mutex<BTreeMap<usize, Part>>,
}

/// What was declared over one connection for each queue, by its number.
#[derive(Clone, Default)]
pub(super) struct Topology(Arc<Mutex<BTreeMap<usize, Declared>>>);

/// A queue that was declared, and everything that was declared for it.
#[derive(Debug)]
pub(super) struct Declared {
    pub(super) queue: Arc<ServedQueue>,
    pub(super) parts: Vec<Declaration>,
    /// Whether it is consumed now.
    pub(super) is_read: bool,
}

/// The consumption of one queue.
#[derive(Clone)]
pub(super) struct Part {
    /// Cancelled when the queue is not to be consumed any more.
    pub(super) stop: CancellationToken,
    /// The tasks that consume it. Each waits for the calls that it has started.
    pub(super) tasks: TaskTracker,
}

impl Reading {
    /// Queues are consumed over this connection until they end, unless the connection is left before.
    pub(super) fn over(connection: u64, transport: Transport) -> Self {
        Self { connection, transport, topology: Topology::default(), parts: Mutex::default() }
    }

    /// The consumption of a queue.
    pub(super) fn part(&self, queue: &ServedQueue) -> Part {
        let mut parts = self.parts.lock().expect("no panic while holding the parts");
        let new = || Part { stop: queue.end.child_token(), tasks: TaskTracker::new() };
        parts.entry(queue.number).or_insert_with(new).clone()
    }
}

impl Topology {
    pub(super) fn lock(&self) -> MutexGuard<'_, BTreeMap<usize, Declared>> {
        self.0.lock().expect("no panic while holding the topology")
    }

    /// The bindings of the queues that belong to this connection.
    pub(super) fn own_bindings(&self) -> Vec<Binding> {
        let declared = self.lock();
        let own = declared.values().filter(|declared| declared.queue.is_own());
        own.flat_map(Declared::bindings).collect()
    }
}

impl Declared {
    /// The name of the queue.
    pub(super) fn name(&self) -> Option<&str> {
        self.parts.iter().find_map(|part| match part {
            Declaration::Queue(queue) => Some(&*queue.name),
            Declaration::Exchange(_) | Declaration::Binding(_) => None,
        })
    }

    pub(super) fn bindings(&self) -> Vec<Binding> {
        let bindings = self.parts.iter().filter_map(|part| match part {
            Declaration::Binding(binding) => Some(binding.clone()),
            Declaration::Queue(_) | Declaration::Exchange(_) => None,
        });
        bindings.collect()
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
