//! Calls that run, and those that were cancelled before they came.

use std::collections::{HashMap, HashSet, VecDeque};
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// How many cancels of calls that have not come yet are remembered; the oldest are forgotten first.
const MAX_REMEMBERED: usize = 65_536;
/// A cancel is remembered until its call's deadline, but no shorter, since the call may wait here with time of its own
/// left, and no longer than this.
const MIN_MEMORY: Duration = Duration::from_secs(60);
const MAX_MEMORY: Duration = Duration::from_secs(3600);
#[derive(Default)]
pub(super) struct Calls {
    running: HashMap<Uuid, CancellationToken>,
    /// How many have run.
    finished: u64,
    /// Cancelled before they came.
    cancelled: HashSet<Uuid>,
    /// When that may be forgotten, in the order in which they were.
    forgettable: VecDeque<(Instant, Uuid)>,
}

impl Calls {
    /// Notes that a call runs; not if it was cancelled before it came.
    pub(super) fn enter(&mut self, id: Uuid, token: &CancellationToken) -> bool {
        if self.cancelled.remove(&id) {
            return false;
        }
        self.running.insert(id, token.clone());
        true
    }

    /// Notes that a call does not run any more.
    pub(super) fn leave(&mut self, id: Uuid) {
        self.running.remove(&id);
        self.finished += 1;
    }

    /// How many run, and how many have run.
    pub(super) fn count(&self) -> (u64, u64) {
        (self.running.len() as u64, self.finished)
    }

    /// Ends a call that runs, or remembers while it has time `remaining` that it is not to run.
    pub(super) fn cancel(&mut self, id: Uuid, remaining: Duration) {
        if let Some(running) = self.running.get(&id) {
            return running.cancel();
        }
        let now = Instant::now();
        while let Some(&(until, id)) = self.forgettable.front()
            && (until <= now || self.forgettable.len() >= MAX_REMEMBERED)
        {
            self.forgettable.pop_front();
            self.cancelled.remove(&id);
        }
        self.cancelled.insert(id);
        self.forgettable.push_back((now + remaining.clamp(MIN_MEMORY, MAX_MEMORY), id));
    }
}
