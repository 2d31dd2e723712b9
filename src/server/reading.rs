//! What a server reads over one connection, and how the reading of each kind of queue ends before the connection does.

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::Site;
use super::message::Source;
use crate::transport::Transport;

/// A connection, as those see it who read queues over it.
pub(super) struct Reading {
    /// Which of the server's connections it is, counted from 1.
    pub(super) connection: u64,
    pub(super) transport: Transport,
    calls: Part,
    events: Part,
    own: Part,
}

/// Queues of one kind.
pub(super) struct Part {
    /// Fires when they are not to be read any more.
    pub(super) stop: CancellationToken,
    /// The tasks that read them; each waits for the calls it started.
    pub(super) tasks: TaskTracker,
}

impl Reading {
    /// Until the server drains, unless it is to end sooner.
    pub(super) fn over(connection: u64, transport: Transport, site: &Site) -> Self {
        let part = |until: &CancellationToken| Part { stop: until.child_token(), tasks: TaskTracker::new() };
        let (calls, events, own) = (part(&site.draining), part(&site.draining), part(&site.drained));
        Self { connection, transport, calls, events, own }
    }

    pub(super) fn part(&self, source: Source) -> &Part {
        match source {
            Source::Calls | Source::Work => &self.calls,
            Source::Events => &self.events,
            Source::Instance => &self.own,
        }
    }
}

impl Part {
    /// Has these queues read no more, and waits for the end of what came by them.
    pub(super) async fn end(&self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }
}
