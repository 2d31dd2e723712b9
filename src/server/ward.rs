//! The ward of a worker with a [`Quarantine`]: it counts how calls end, and says when the shared queues are not read.

use std::future::pending;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::FutureExt as _;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use super::health::Trouble;
use super::message::Source;
use super::worker::Worker;
use crate::error::Code;
use crate::limits::ANSWER_TIMEOUT;
use crate::middleware::{OutcomeWindow, Quarantine, QuarantineRule, QuarantineTally};

/// How many times longer the longest quarantine takes than the first.
const LONGEST: u32 = 10;
/// When it is first asked whether others still read the queue, and how often after that.
const FIRST_LOOK: Duration = Duration::from_secs(1);
const LOOK: Duration = Duration::from_secs(5);

/// What a worker with a quarantine knows of it.
pub(super) struct Ward {
    rule: QuarantineRule,
    tally: Arc<QuarantineTally>,
    ended: Mutex<OutcomeWindow>,
    /// Notified when too many calls have failed.
    failing: Notify,
    /// Whether the shared queues are not read.
    away: watch::Sender<bool>,
}

impl Ward {
    pub(super) fn of(quarantine: &Quarantine) -> Self {
        Self {
            rule: quarantine.rule,
            tally: quarantine.tally.clone(),
            ended: Mutex::new(OutcomeWindow::new(quarantine.rule.within)),
            failing: Notify::new(),
            away: watch::channel(false).0,
        }
    }

    /// Counts a call whose handler has run and ended.
    pub(super) fn ended(&self, code: Code) {
        if code == Code::Cancelled || *self.away.borrow() {
            return;
        }
        let mut window = self.ended.lock().expect("no panic while holding the window");
        let (all, failed) = window.count(code == Code::Internal, Instant::now());
        #[expect(clippy::cast_precision_loss, reason = "counts of a few seconds")]
        let is_bad = all >= self.rule.least && failed as f64 >= self.rule.share * all as f64 && failed > 0;
        if is_bad && code == Code::Internal {
            self.failing.notify_one();
        }
    }

    fn forget(&self) {
        self.ended.lock().expect("no panic while holding the window").clear();
    }
}

impl Worker {
    /// Whether this queue is not read now.
    pub(super) fn is_away(&self, source: Source) -> bool {
        self.ward.as_ref().is_some_and(|ward| is_shared(source) && *ward.away.borrow())
    }

    /// Resolves when this queue is not to be read.
    pub(super) async fn leaves(&self, source: Source) {
        match &self.ward {
            Some(ward) if is_shared(source) => _ = ward.away.subscribe().wait_for(|away| *away).await,
            _ => pending().await,
        }
    }

    /// Resolves when the queues are to be read again.
    pub(super) async fn comes_back(&self) {
        if let Some(ward) = &self.ward {
            let _ = ward.away.subscribe().wait_for(|away| !*away).await;
        }
    }

    /// Begins and ends quarantines until the server drains.
    pub(super) async fn keep_ward(self: Arc<Self>) {
        tokio::select! {
            () = self.site.draining.cancelled() => {}
            () = self.judge() => {}
        }
    }

    async fn judge(&self) {
        let Some(ward) = &self.ward else { return };
        let (mut times, mut last): (u32, Option<Instant>) = (0, None);
        loop {
            ward.failing.notified().await;
            if self.readers().await.is_none_or(|readers| readers < 2) {
                ward.tally.spares();
                tokio::time::sleep(LOOK).await;
                ward.forget();
                continue;
            }
            let is_soon = last.is_some_and(|last| last.elapsed() < ward.rule.time * LONGEST);
            times = if is_soon { (times + 1).min(LONGEST) } else { 1 };
            let time = ward.rule.time * times;
            let trouble = Trouble::Quarantine(self.name.clone());
            let why = format!(
                "quarantined for {time:?}: too many calls of `{}` ended as INTERNAL here, and other instances take them",
                self.name
            );
            self.site.health.suffers(trouble.clone(), why);
            ward.tally.begins();
            ward.away.send_replace(true);
            let until = Instant::now() + time;
            let mut look = Instant::now() + FIRST_LOOK;
            loop {
                tokio::time::sleep_until(until.min(look)).await;
                look = Instant::now() + LOOK;
                if Instant::now() >= until || self.readers().await == Some(0) {
                    break;
                }
            }
            ward.forget();
            // What has ended since it began says nothing new.
            let _ = ward.failing.notified().now_or_never();
            last = Some(Instant::now());
            ward.tally.ends();
            ward.away.send_replace(false);
            self.site.health.cured(&trouble);
        }
    }

    /// How many consumers the queue of calls has. `None` if the broker does not say.
    async fn readers(&self) -> Option<u32> {
        let (transport, queue) = (self.site.transport(), self.site.namespace.calls_queue(&self.id));
        let count = tokio::time::timeout(ANSWER_TIMEOUT, transport.look_at(&queue)).await;
        Some(count.ok()?.ok()??.consumers)
    }
}

/// Whether other instances read this queue, too.
fn is_shared(source: Source) -> bool {
    matches!(source, Source::Calls | Source::Work)
}
