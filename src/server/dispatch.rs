//! The step between admission and the handler: a call waits for a place among the calls that run at once, and starts on
//! the threads that the service's [`Dispatch`] says.

use std::sync::Arc;

use tokio::runtime::Handle;
use tokio::time::Instant;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

use super::message::{Message, Source};
use super::places::RunPlace;
use super::served_method::ServedMethod;
use super::through::Passage;
use super::worker::Worker;
use crate::frame::Frame;
use crate::outgoing::Share;
use crate::service::Dispatch;

/// A job that may start, since it has a place.
pub(super) type Started = (Job, RunningPlace);

/// A place among the calls that run at once, as many as
/// [`Service::concurrency`](crate::Service::concurrency) allows. Dropping it frees the place.
pub(super) struct RunningPlace {
    _place: RunPlace,
    /// Counts a call that came through the instance's own queue, so that this queue is read while the call runs.
    _addressed: Option<TaskTrackerToken>,
}

/// A frame that is going to run, with all that is needed to run it and to reply.
pub(super) struct Job {
    pub(super) frame: Frame,
    pub(super) served: Arc<ServedMethod>,
    pub(super) deadline: Option<Instant>,
    pub(super) message: Arc<Message>,
    /// `None` without middleware.
    pub(super) passage: Option<Arc<Passage>>,
}

impl Worker {
    /// Whether this oneway call is one too many from its message, and goes back to the queue for other instances. The
    /// sender does not know how long the calls take, so it may have put many slow ones into one message.
    pub(super) fn is_too_much(&self, job: &Job, work: &mut Share) -> bool {
        let Job { served, message, .. } = job;
        if message.source != Source::Work || message.frames == 1 {
            return false;
        }
        let pace = served.pace.average();
        let first = *work == Share::default();
        *work = work.plus(pace.map_or(Share::ALL, Share::of_work));
        !first && *work > Share::ALL
    }

    /// Starts a job in the way that the service's [`Dispatch`] says, when it has a place. `together` are the jobs of its
    /// message that have a place already.
    pub(super) async fn dispatch(
        self: &Arc<Self>,
        job: Job,
        place: Option<RunningPlace>,
        together: &mut Vec<Started>,
        tasks: &TaskTracker,
    ) {
        let source = job.message.source;
        let place = match place {
            // Behind a call that waits for its place there may be a cancel: an instance's own queue is read on.
            None if source == Source::Instance && !self.runs_inline() => {
                return drop(tasks.spawn(self.clone().start_when_free(job)));
            }
            None => {
                self.start(std::mem::take(together), tasks);
                self.place(source).await
            }
            place => place,
        };
        match place {
            None => drop(tasks.spawn(self.clone().give_back(job))),
            Some(place) if self.runs_inline() => self.clone().perform((job, place), tasks.clone()).await,
            Some(place) => together.push((job, place)),
        }
    }

    /// Waits for a place and starts the job.
    pub(super) async fn start_when_free(self: Arc<Self>, job: Job) {
        let tasks = job.message.tasks().clone();
        match self.place(job.message.source).await {
            Some(place) => self.start(vec![(job, place)], &tasks),
            None => self.give_back(job).await,
        }
    }

    /// Whether handlers run on the task that reads the queue.
    pub(super) fn runs_inline(&self) -> bool {
        self.service.dispatch == Dispatch::Inline
    }

    /// Waits for a place. `None` once the server drains or the service takes no calls.
    async fn place(&self, source: Source) -> Option<RunningPlace> {
        let addressed = self.addressed(source);
        let place = tokio::select! {
            biased;
            () = self.site.draining.cancelled() => return None,
            () = self.leaves(source) => return None,
            place = self.places.take() => place?,
        };
        Some(RunningPlace { _place: place, _addressed: addressed })
    }

    /// A place, if one is free now and the server does not drain.
    pub(super) fn place_at_once(&self, source: Source) -> Option<RunningPlace> {
        let addressed = self.addressed(source);
        if self.site.draining.is_cancelled() || self.is_away(source) {
            return None;
        }
        let place = self.places.try_take()?;
        Some(RunningPlace { _place: place, _addressed: addressed })
    }

    /// Counts a call that came through the instance's own queue. This must happen before the check whether the server
    /// drains, so that the drain sees every call that still starts.
    fn addressed(&self, source: Source) -> Option<TaskTrackerToken> {
        (source == Source::Instance).then(|| self.site.addressed.token())
    }

    /// Starts jobs of one message on the threads that the service's [`Dispatch`] says.
    pub(super) fn start(self: &Arc<Self>, jobs: Vec<Started>, tasks: &TaskTracker) {
        if jobs.is_empty() {
            return;
        }
        if self.service.dispatch == Dispatch::Blocking {
            for started in jobs {
                let (worker, runtime, tracker) = (self.clone(), Handle::current(), tasks.clone());
                tasks.spawn_blocking(move || runtime.block_on(worker.perform(started, tracker)));
            }
            return;
        }
        let performing = self.clone().perform_all(jobs, tasks.clone());
        match &self.pool {
            Some(pool) => drop(tasks.spawn_on(performing, pool.handle())),
            None => drop(tasks.spawn(performing)),
        }
    }
}
