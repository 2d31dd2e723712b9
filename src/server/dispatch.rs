//! The step between admission and the handler: a call waits for a place among the calls that run at once, and starts on
//! the threads of its [`Bulkhead`].

use std::sync::Arc;

use tokio::runtime::Handle;
use tokio::time::Instant;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

use super::bulkhead::{Bulkhead, QueueRoom};
use super::message::{Message, Source};
use super::places::RunPlace;
use super::served_method::ServedMethod;
use super::through::Passage;
use super::turns::Turn;
use super::worker::Worker;
use crate::clock::at;
use crate::frame::{Frame, Kind};
use crate::outgoing::Share;
use crate::service::QueueFull;

/// A job that may start, since it has a place.
pub(super) type Started = (Job, RunningPlace);

/// A place among the calls that run at once, as many as
/// [`Service::concurrency`](crate::Service::concurrency) allows. Dropping it frees the place.
pub(super) struct RunningPlace {
    /// `None`: it runs beside all places, or not at all.
    _place: Option<RunPlace>,
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
    /// Its turn among the events of its key, if they are ordered.
    pub(super) turn: Option<Turn>,
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

    /// Where a job runs.
    fn bulkhead<'a>(&'a self, job: &'a Job) -> &'a Bulkhead {
        job.served.bulkhead.as_ref().unwrap_or(&self.bulkhead)
    }

    /// Starts a job where its [`Bulkhead`] says, when it has a place. `together` are the jobs of its message that have a
    /// place already, and run where those of the service do.
    pub(super) async fn dispatch(
        self: &Arc<Self>,
        job: Job,
        place: Option<RunningPlace>,
        together: &mut Vec<Started>,
        tasks: &TaskTracker,
    ) {
        let is_inline = self.bulkhead(&job).is_inline();
        let Some(place) = place else { return self.dispatch_late(job, is_inline, together, tasks).await };
        if is_inline {
            self.start(std::mem::take(together), tasks);
            self.clone().perform((job, place), tasks.clone()).await;
        } else {
            self.start(vec![(job, place)], tasks);
        }
    }

    /// Sees to a job for which there is no place.
    async fn dispatch_late(
        self: &Arc<Self>,
        job: Job,
        is_inline: bool,
        together: &mut Vec<Started>,
        tasks: &TaskTracker,
    ) {
        let source = job.message.source;
        if self.site.draining.is_cancelled() || self.is_away(source) {
            return drop(tasks.spawn(self.clone().give_back(job)));
        }
        // Behind a call that waits for its place there may be a cancel: an instance's own queue is read on.
        let reads_on = source == Source::Instance && !is_inline;
        let Some(queue) = &self.bulkhead(&job).queue else {
            if reads_on {
                return drop(tasks.spawn(self.clone().start_when_free(job, None)));
            }
            self.start(std::mem::take(together), tasks);
            return match self.place(&job).await {
                None => drop(tasks.spawn(self.clone().give_back(job))),
                Some(place) if is_inline => self.clone().perform((job, place), tasks.clone()).await,
                Some(place) => self.start(vec![(job, place)], tasks),
            };
        };
        let room = if job.frame.kind == Kind::Request { queue.room() } else { None };
        let waits = room.is_some() || job.frame.kind != Kind::Request;
        match queue.when_full {
            _ if waits => drop(tasks.spawn(self.clone().start_when_free(job, room))),
            QueueFull::CallerRuns if reads_on => drop(tasks.spawn(self.clone().start_when_free(job, None))),
            QueueFull::CallerRuns => {
                self.start(std::mem::take(together), tasks);
                job.served.counts.caller_runs();
                let place = RunningPlace { _place: None, _addressed: self.addressed(source) };
                self.clone().perform((job, place), tasks.clone()).await;
            }
            QueueFull::Refuse => {
                let fault = queue.refusal(job.frame.metadata.method.as_deref().unwrap_or_default());
                self.passed_by(job.passage.as_deref(), fault.code.into());
                tasks.spawn(self.clone().refuse(job.frame, fault, job.message));
            }
        }
    }

    /// Waits for a place and starts the job. One whose time is over meanwhile ends, and gives its room to another.
    pub(super) async fn start_when_free(self: Arc<Self>, job: Job, room: Option<QueueRoom>) {
        let tasks = job.message.tasks().clone();
        let place = tokio::select! {
            biased;
            place = self.place(&job) => place,
            () = at(job.deadline) => {
                // It needs no place: it does not run, as any other that is late.
                let place = RunningPlace { _place: None, _addressed: self.addressed(job.message.source) };
                return self.perform((job, place), tasks).await;
            }
        };
        drop(room);
        match place {
            Some(place) => self.start(vec![(job, place)], &tasks),
            None => self.give_back(job).await,
        }
    }

    /// Waits for a place. `None` once the server drains or the service takes no calls.
    async fn place(&self, job: &Job) -> Option<RunningPlace> {
        let source = job.message.source;
        let addressed = self.addressed(source);
        // An event in order whose neighbours in its message may have run is to run, too: they would come again with it.
        let stays = job.turn.is_some() && job.message.frames > 1;
        let place = tokio::select! {
            biased;
            () = self.site.draining.cancelled(), if !stays => return None,
            () = self.leaves(source) => return None,
            place = self.bulkhead(job).places.take() => place?,
        };
        Some(RunningPlace { _place: Some(place), _addressed: addressed })
    }

    /// A place, if one is free now and the server does not drain.
    pub(super) fn place_at_once(&self, job: &Job) -> Option<RunningPlace> {
        let source = job.message.source;
        let addressed = self.addressed(source);
        if self.site.draining.is_cancelled() || self.is_away(source) {
            return None;
        }
        let place = self.bulkhead(job).places.try_take()?;
        Some(RunningPlace { _place: Some(place), _addressed: addressed })
    }

    /// Counts a call that came through the instance's own queue. This must happen before the check whether the server
    /// drains, so that the drain sees every call that still starts.
    fn addressed(&self, source: Source) -> Option<TaskTrackerToken> {
        (source == Source::Instance).then(|| self.site.addressed.token())
    }

    /// Starts jobs of one message on the threads of their [`Bulkhead`], which is the same for all of them.
    pub(super) fn start(self: &Arc<Self>, jobs: Vec<Started>, tasks: &TaskTracker) {
        let Some((first, _)) = jobs.first() else { return };
        let bulkhead = self.bulkhead(first);
        if bulkhead.is_blocking() {
            for started in jobs {
                let (worker, runtime, tracker) = (self.clone(), Handle::current(), tasks.clone());
                tasks.spawn_blocking(move || runtime.block_on(worker.perform(started, tracker)));
            }
            return;
        }
        let pool = bulkhead.pool();
        let performing = self.clone().perform_all(jobs, tasks.clone());
        match pool {
            Some(pool) => drop(tasks.spawn_on(performing, &pool)),
            None => drop(tasks.spawn(performing)),
        }
    }
}
