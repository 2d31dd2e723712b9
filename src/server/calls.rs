//! Calls that run, and those that were cancelled before they came.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::message::{Message, Source};
use crate::document::InstanceStats;
use crate::frame::{Frame, Kind};

/// How many cancels of calls that have not come yet are remembered; the oldest are forgotten first.
const MAX_REMEMBERED: usize = 65_536;
/// A cancel is remembered until its call's deadline, but no shorter, since the call may wait here with time of its own
/// left, and no longer than this.
const MIN_MEMORY: Duration = Duration::from_secs(60);
const MAX_MEMORY: Duration = Duration::from_secs(3600);
/// A call that takes longer than this reports in, and then again and again: its caller knows whom to cancel it at, and
/// that it is still being worked on.
const REPORT_AFTER: Duration = Duration::from_secs(1);
const REPORT_EVERY: Duration = Duration::from_secs(5);

/// A call that runs.
struct Running {
    /// For a request; what nobody waits for is not given up.
    cancelled: Option<CancellationToken>,
    message: Arc<Message>,
    report_at: Instant,
}

#[derive(Default)]
pub(super) struct Calls {
    /// By id, and by a number of their own: the same call may come twice.
    running: BTreeMap<(Uuid, u64), Running>,
    next: u64,
    /// How many have run.
    finished: u64,
    /// How many frames could not be read, and how many were not to be run.
    pub(super) malformed: u64,
    pub(super) refused: u64,
    /// How many cancels met no call that runs.
    cancels_ignored: u64,
    /// Cancelled before they came.
    cancelled: HashSet<Uuid>,
    /// When that may be forgotten, in the order in which they were.
    forgettable: VecDeque<(Instant, Uuid)>,
}

impl Calls {
    /// Notes that a call runs, and gives the number it does under; none if it was cancelled before it came.
    pub(super) fn enter(
        &mut self,
        frame: &Frame,
        cancelled: &CancellationToken,
        message: &Arc<Message>,
    ) -> Option<u64> {
        let cancelled = (frame.kind == Kind::Request).then(|| cancelled.clone());
        if cancelled.is_some() && self.cancelled.remove(&frame.id) {
            return None;
        }
        let report_at = Instant::now() + REPORT_AFTER;
        self.next += 1;
        self.running.insert((frame.id, self.next), Running { cancelled, message: message.clone(), report_at });
        Some(self.next)
    }

    /// Which queue a call came from that runs.
    pub(super) fn source(&self, id: Uuid) -> Option<Source> {
        let (_, running) = self.running.range((id, 0)..=(id, u64::MAX)).next()?;
        Some(running.message.source)
    }

    /// The calls whose callers are to hear now that they still run.
    pub(super) fn due(&mut self, now: Instant) -> Vec<(Uuid, Arc<Message>)> {
        let waited_for = |cancelled: &CancellationToken| !cancelled.is_cancelled();
        let due = self.running.iter_mut().filter(|(_, call)| {
            call.report_at <= now && call.cancelled.as_ref().is_some_and(waited_for) && call.message.reply_to.is_some()
        });
        due.map(|((id, _), call)| {
            call.report_at = now + REPORT_EVERY;
            (*id, call.message.clone())
        })
        .collect()
    }

    /// Notes that a call does not run any more.
    pub(super) fn leave(&mut self, id: Uuid, number: u64) {
        self.running.remove(&(id, number));
        self.finished += 1;
    }

    /// How many run now, and how many have run.
    pub(super) fn tally(&self) -> (usize, u64) {
        (self.running.len(), self.finished)
    }

    /// What it has counted.
    pub(super) fn stats(&self) -> InstanceStats {
        let Self { finished, malformed, refused, cancels_ignored, .. } = *self;
        let running = self.running.len() as u64;
        InstanceStats { running, finished, malformed, refused, cancels_ignored, ..InstanceStats::default() }
    }

    /// Ends a call that runs, or remembers while it has time `remaining` that it is not to run.
    pub(super) fn cancel(&mut self, id: Uuid, remaining: Duration) {
        let running = self.running.range((id, 0)..=(id, u64::MAX));
        let mut running = running.filter_map(|(_, running)| running.cancelled.as_ref()).peekable();
        if running.peek().is_some() {
            return running.for_each(CancellationToken::cancel);
        }
        self.cancels_ignored += 1;
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
