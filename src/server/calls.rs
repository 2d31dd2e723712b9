//! The calls of a service that run, and those that were cancelled before they arrived.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use uuid::Uuid;

use super::message::{Message, Source};
use crate::context::Context;
use crate::document::InstanceStats;
use crate::frame::{Frame, Kind};

/// How many cancels are remembered of calls that have not arrived. The oldest are forgotten first.
const MAX_REMEMBERED: usize = 65_536;
/// A cancel is remembered until its call's deadline, but at least this long: the call may have waited in the queue, and
/// the server counts its time from when it was delivered.
const MIN_MEMORY: Duration = Duration::from_secs(60);
/// A cancel is remembered no longer than this.
const MAX_MEMORY: Duration = Duration::from_secs(3600);
/// A call that takes longer than this sends a sign of life to its caller. The caller then knows where to send a cancel.
const REPORT_AFTER: Duration = Duration::from_secs(1);
/// The pause between two signs of life of a call.
const REPORT_EVERY: Duration = Duration::from_secs(5);

/// A call that runs.
struct RunningCall {
    /// What cancels the call. `None` for oneway calls and events, which are never cancelled.
    context: Option<Context>,
    message: Arc<Message>,
    /// When its next sign of life is due.
    report_at: Instant,
}

/// The calls of one service on this instance, and the counters for its statistics.
#[derive(Default)]
pub(super) struct Calls {
    /// The calls that run, by id and a number: the same call may arrive twice.
    running: BTreeMap<(Uuid, u64), RunningCall>,
    next: u64,
    /// How many calls have ended.
    finished: u64,
    /// How many frames could not be read.
    pub(super) malformed: u64,
    /// How many calls were refused without running.
    pub(super) refused: u64,
    /// How many cancels were for calls that do not run here.
    cancels_ignored: u64,
    /// The ids of calls that were cancelled before they arrived.
    cancelled: HashSet<Uuid>,
    /// When each of them may be forgotten, the earliest first.
    forgettable: VecDeque<(Instant, Uuid)>,
}

impl Calls {
    /// Adds a call that begins to run, and returns its number. `None` if it was cancelled before it arrived.
    pub(super) fn enter(
        &mut self,
        frame: &Frame,
        context: &Context,
        message: &Arc<Message>,
        now: Instant,
    ) -> Option<u64> {
        let context = (frame.kind == Kind::Request).then(|| context.clone());
        if context.is_some() && !self.cancelled.is_empty() && self.cancelled.remove(&frame.id) {
            return None;
        }
        let report_at = now + REPORT_AFTER;
        self.next += 1;
        self.running.insert((frame.id, self.next), RunningCall { context, message: message.clone(), report_at });
        Some(self.next)
    }

    /// Which queue a running call came from.
    pub(super) fn source(&self, id: Uuid) -> Option<Source> {
        let (_, running) = self.running.range((id, 0)..=(id, u64::MAX)).next()?;
        Some(running.message.source)
    }

    /// The calls whose signs of life are due now.
    pub(super) fn due(&mut self, now: Instant) -> Vec<(Uuid, Arc<Message>)> {
        let waited_for = |context: &Context| !context.is_cancelled();
        let due = self.running.iter_mut().filter(|(_, call)| {
            call.report_at <= now && call.context.as_ref().is_some_and(waited_for) && call.message.reply_to.is_some()
        });
        due.map(|((id, _), call)| {
            call.report_at = now + REPORT_EVERY;
            (*id, call.message.clone())
        })
        .collect()
    }

    /// Removes a call that has ended.
    pub(super) fn leave(&mut self, id: Uuid, number: u64) {
        self.running.remove(&(id, number));
        self.finished += 1;
    }

    /// How many calls run, and how many have ended.
    pub(super) fn tally(&self) -> (usize, u64) {
        (self.running.len(), self.finished)
    }

    /// What it has counted.
    pub(super) fn stats(&self) -> InstanceStats {
        let Self { finished, malformed, refused, cancels_ignored, .. } = *self;
        let running = self.running.len() as u64;
        InstanceStats { running, finished, malformed, refused, cancels_ignored, ..InstanceStats::default() }
    }

    /// Cancels a running call. If it does not run here, the cancel is remembered, since the call may still arrive:
    /// `remaining` is the time that its caller had left.
    pub(super) fn cancel(&mut self, id: Uuid, remaining: Duration) {
        let running = self.running.range((id, 0)..=(id, u64::MAX));
        let mut running = running.filter_map(|(_, running)| running.context.as_ref()).peekable();
        if running.peek().is_some() {
            return running.for_each(Context::cancel);
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
