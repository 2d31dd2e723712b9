//! What a server counts for metrics, beside its statistics: how long calls took until they ended, whatever their end, and
//! what it kept with the dead letters.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use tokio::time::Instant;

use super::Site;
use super::dispatch::Job;
use super::letter::LetterCause;
use super::message::{Message, Source};
use super::outcome::Ending;
use super::worker::Worker;
use crate::clock::unix_millis;
use crate::counting::{EndCounts, LinkCounts, TimesTold};
use crate::document::MethodStats;
use crate::error::{Code, EndOfCall, RefusedBy};
use crate::frame::{Frame, Kind, Trace};
use crate::service::Answer;
use crate::topology::ServiceId;

/// What a worker counts, of no method in particular.
#[derive(Debug, Default)]
pub(super) struct MeasuredService {
    /// The calls of methods that the service does not have.
    others: EndCounts,
    /// Those of them that were refused.
    others_refused: [AtomicU64; RefusedBy::ALL.len()],
    /// The dead letters that the broker has taken, by [`LetterCause`].
    letters: [AtomicU64; 3],
}

impl MeasuredService {
    /// Counts a call of a method that the service does not have.
    pub(super) fn refuses(&self, by: RefusedBy) {
        self.others_refused[by as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a dead letter.
    pub(super) fn is_kept(&self, cause: LetterCause) {
        self.letters[cause as usize].fetch_add(1, Ordering::Relaxed);
    }
}

impl Worker {
    /// Counts how a job ended. Some endings are not the end of the call, or are counted elsewhere.
    pub(super) fn measures(&self, job: &Job, ending: &Ending) {
        let Some(end) = ending.end_of_call(job) else { return };
        self.ended_as(&job.served.ends, &job.frame, &job.message, end);
    }

    /// Counts a call that was refused without running.
    pub(super) fn measures_refused(&self, frame: &Frame, code: Code, message: &Message) {
        let ends = self.method(frame).map_or(&self.measured.others, |served| &served.ends);
        self.ended_as(ends, frame, message, EndOfCall::Coded(code));
    }

    /// Counts a call that got the answer of an earlier delivery. Questions of discovery are no calls of a method.
    pub(super) fn measures_repeated(&self, frame: &Frame, answer: &Answer, message: &Message) {
        if let Some(served) = self.method(frame) {
            self.ended_as(&served.ends, frame, message, answer.into());
        }
    }

    fn ended_as(&self, ends: &EndCounts, frame: &Frame, message: &Message, end: EndOfCall) {
        if frame.kind != Kind::Event || message.source == Source::Work {
            let trace = frame.metadata.traceparent.as_deref().and_then(|parent| Trace::parse(parent.as_str()));
            ends.add(end, message.received.elapsed(), trace.map(|trace| trace.id()));
        }
    }

    /// Counts how long a call waited that begins to run.
    pub(super) fn measures_wait(&self, job: &Job) {
        let metadata = &job.frame.metadata;
        let (Some(sent_at), Some(sender)) = (metadata.sent_at, &metadata.instance) else { return };
        let difference = (unix_millis() as i64).saturating_sub_unsigned(sent_at);
        if let Some(waited) = self.site.clocks.waited(sender, difference, Instant::now()) {
            job.served.waits.add(waited, None);
        }
    }

    fn tells(&self) -> ServiceTold {
        let methods = self.all_methods().map(|served| MethodTold {
            stats: served.stats(),
            ends: served.ends.told(),
            refused: refused(served.counts.refused()),
            waits: served.waits.told(),
        });
        let letter = |cause: LetterCause| self.measured.letters[cause as usize].load(Ordering::Relaxed);
        ServiceTold {
            name: self.name.clone(),
            methods: methods.collect(),
            others: self.measured.others.told(),
            others_refused: refused(&self.measured.others_refused),
            malformed: self.calls().malformed,
            letters: [
                ("failed", letter(LetterCause::Failed)),
                ("refused", letter(LetterCause::Refused)),
                ("malformed", letter(LetterCause::Malformed)),
            ],
        }
    }
}

/// What was counted of a service.
#[derive(Debug)]
pub(crate) struct ServiceTold {
    /// As `name.vMAJOR`.
    pub(crate) name: Arc<str>,
    pub(crate) methods: Vec<MethodTold>,
    /// The ends of calls of methods that it does not have.
    pub(crate) others: Vec<(EndOfCall, TimesTold)>,
    /// Those of them that were refused, by reason.
    pub(crate) others_refused: [(&'static str, u64); RefusedBy::ALL.len()],
    pub(crate) malformed: u64,
    /// The dead letters by reason.
    pub(crate) letters: [(&'static str, u64); 3],
}

/// What was counted of a method.
#[derive(Debug)]
pub(crate) struct MethodTold {
    pub(crate) stats: MethodStats,
    pub(crate) ends: Vec<(EndOfCall, TimesTold)>,
    /// By reason.
    pub(crate) refused: [(&'static str, u64); RefusedBy::ALL.len()],
    pub(crate) waits: TimesTold,
}

fn refused(counters: &[AtomicU64; RefusedBy::ALL.len()]) -> [(&'static str, u64); RefusedBy::ALL.len()] {
    RefusedBy::ALL.map(|by| (by.name(), counters[by as usize].load(Ordering::Relaxed)))
}

/// A server whose counters can be read as long as it runs. It keeps nothing of it alive.
#[derive(Clone)]
pub(crate) struct MeasuredServer(Weak<Site>);

impl MeasuredServer {
    pub(super) fn of(site: &Arc<Site>) -> Self {
        Self(Arc::downgrade(site))
    }

    /// Whether both are the same server.
    pub(crate) fn is(&self, other: &Self) -> bool {
        self.0.ptr_eq(&other.0)
    }

    /// Its services, each with whether it has oneway methods. Empty once it has ended.
    pub(crate) fn services(&self) -> Vec<(ServiceId, bool)> {
        let Some(site) = self.0.upgrade() else { return Vec::new() };
        let has_oneway = |worker: &Worker| worker.all_methods().any(|served| served.method.oneway);
        workers(&site).map(|worker| (worker.id.clone(), has_oneway(&worker))).collect()
    }

    /// What its services have counted, and `read` is given what it counts of its connection. `None` once it has ended.
    pub(crate) fn told(&self, read: impl FnOnce(&LinkCounts)) -> Option<Vec<ServiceTold>> {
        let site = self.0.upgrade()?;
        read(&site.health.link);
        Some(workers(&site).map(|worker| worker.tells()).collect())
    }
}

/// The workers of a server, without those of subscriptions: events are no calls.
fn workers(site: &Site) -> impl Iterator<Item = Arc<Worker>> {
    site.workers().into_iter().filter(|worker| worker.service.pattern.is_none())
}
