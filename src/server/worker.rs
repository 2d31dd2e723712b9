//! The worker of one service. It takes each message apart, and brings its calls on their way: admit, dispatch, reply,
//! settle. The other files of `server/` hold the single steps.

use std::collections::BTreeMap;
use std::fmt;
use std::mem;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::runtime::{Handle, Runtime};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

use super::Site;
use super::admit::{Taken, crowded};
use super::calls::Calls;
use super::claims::Claims;
use super::copies::Copies;
use super::dead_letters::DeadQueue;
use super::dedup::{Dedup, Known};
use super::message::{Message, Source};
use super::reading::Reading;
use super::served_method::ServedMethod;
use super::served_queue::ServedQueue;
use super::through::Passage;
use crate::error::{Error, Fault};
use crate::frame::{self, Frame, Kind};
use crate::middleware::Chain;
use crate::outgoing::{MAX_BYTES, Share};
use crate::service::{Answer, Dispatch, Service};
use crate::topology::ServiceId;
use crate::transport::{Consumer, Delivery};

/// The name of the only method of a subscription.
pub(super) const EVENT: &str = "event";

/// Runs the calls of one service, whichever queue they come from. A subscription has a worker too.
pub(super) struct Worker {
    pub(super) id: ServiceId,
    /// The service's name for handlers and in the log: `name.vMAJOR`, or `events` for a subscription.
    pub(super) name: Arc<str>,
    pub(super) service: Service,
    pub(super) site: Arc<Site>,
    /// The middleware of the server, and inside of it that of the service.
    pub(super) middleware: Chain,
    pool: Option<Runtime>,
    permits: Arc<Semaphore>,
    prefetch: AtomicU16,
    /// The instance's own queue, where it is asked and told.
    own_queue: Mutex<Arc<str>>,
    calls: Arc<Mutex<Calls>>,
    /// The calls of methods that run a call once, and reply to it again without running it.
    dedup: Mutex<Dedup<(Frame, Arc<Message>)>>,
    claims: Mutex<Claims>,
    /// `Some` once the server has moved to another connection.
    copies: Mutex<Option<Copies>>,
    pub(super) dead_queue: DeadQueue,
    pub(super) methods: BTreeMap<String, Arc<ServedMethod>>,
}

/// A job that may start, since it has a place.
pub(super) type Started = (Job, RunningPlace);

/// A place among the calls that run at once, as many as [`Service::concurrency`] allows. Dropping it frees the place.
pub(super) struct RunningPlace {
    _permit: OwnedSemaphorePermit,
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

/// How a job ended. `outcome.rs` turns this into a reply, a retry, a dead letter or nothing.
pub(super) enum Ending {
    /// The handler ended, and ran for this time.
    Answered(Answer, Duration),
    /// The deadline passed while the handler ran.
    TimedOut,
    /// The handler did not run, because the arguments cannot be decompressed.
    Refused(Fault),
    /// The handler ended, but nobody waits for the reply any more.
    Unheard(Answer),
    /// The handler did not run or was stopped, because nobody waits for the reply any more.
    Forgotten,
    /// The call ran before, and this was its answer.
    Recalled(Answer),
    /// The call is running already. This delivery gets the same answer when it ends.
    Runs,
}

impl Worker {
    pub(super) fn new(id: &ServiceId, name: Arc<str>, mut service: Service, site: Arc<Site>) -> Result<Self, Error> {
        let pool = match service.dispatch {
            Dispatch::Pool(threads) => Some(pool(id, threads)?),
            Dispatch::Inline | Dispatch::Spawn | Dispatch::Blocking => None,
        };
        let has_oneway = service.methods.values().any(|(method, _)| method.oneway);
        let methods = mem::take(&mut service.methods).into_iter();
        let served = |(name, (method, handler))| (name, Arc::new(ServedMethod::new(method, handler)));
        let calls = Arc::<Mutex<Calls>>::default();
        site.calls.lock().expect("no panic while holding what is served").push(calls.clone());
        Ok(Self {
            id: id.clone(),
            name,
            prefetch: AtomicU16::new(service.prefetched()),
            own_queue: Mutex::new(Arc::default()),
            permits: Arc::new(Semaphore::new(service.concurrency.min(Semaphore::MAX_PERMITS))),
            methods: methods.map(served).collect(),
            middleware: site.middleware.around(&service.middleware),
            service,
            site,
            pool,
            calls,
            dedup: Mutex::default(),
            claims: Mutex::default(),
            copies: Mutex::default(),
            dead_queue: DeadQueue::new(has_oneway),
        })
    }

    /// How many messages of each queue may be unacknowledged at once.
    pub(super) fn prefetch(&self) -> u16 {
        self.prefetch.load(Ordering::Relaxed)
    }

    /// Lowers the prefetch to the number of calls that run at once. Called when the broker has taken messages back that
    /// waited here for too long.
    pub(super) fn holds_no_more_than_it_runs(&self) {
        let runs = u16::try_from(self.service.concurrency).unwrap_or(u16::MAX);
        self.prefetch.fetch_min(runs, Ordering::Relaxed);
    }

    /// Sets the name of the instance's own queue. The queue has a new name on each connection.
    pub(super) fn answers_at(&self, queue: &str) {
        *self.own_queue.lock().expect("no panic while holding a name") = queue.into();
    }

    /// Reads one queue until it is told to stop or the queue is gone. Then it waits for the calls that it has started.
    pub(super) async fn run(self: Arc<Self>, mut consumer: Consumer, reading: Arc<Reading>, queue: Arc<ServedQueue>) {
        let stop = reading.part(&queue).stop;
        // Whoever waits for that hears of it, be it by a panic.
        let reader = consumer.life.reader();
        let tasks = TaskTracker::new();
        let mut stopped = false;
        loop {
            let delivery = tokio::select! {
                biased;
                () = stop.cancelled(), if !stopped => {
                    if queue.source() == Source::Calls && queue.is_quorum() {
                        consumer.cancel_when_full();
                        tasks.spawn(self.clone().fill(reading.transport.clone(), consumer.life.clone()));
                    } else {
                        consumer.cancel();
                    }
                    stopped = true;
                    continue;
                }
                delivery = consumer.next() => delivery,
            };
            let Some(delivery) = delivery else { break };
            self.deliver(delivery, &reading, &queue, &tasks).await;
        }
        drop(reader);
        tasks.close();
        tasks.wait().await;
    }

    /// Decodes a message, and decides about each of its frames.
    async fn deliver(
        self: &Arc<Self>,
        delivery: Delivery,
        reading: &Reading,
        queue: &ServedQueue,
        tasks: &TaskTracker,
    ) {
        let (max_size, source) = (self.site.max_size, queue.source());
        let too_large = || vec![Err(frame::too_large(&delivery.body, max_size))];
        // Its sender may put frames together that are small enough each.
        let mut frames: Vec<_> = match delivery.body.len() {
            size if size > max_size.max(MAX_BYTES) => too_large(),
            _ => frame::decode(delivery.body.clone()).collect(),
        };
        if frames.len() == 1 && delivery.body.len() > max_size {
            frames = too_large();
        }
        let (transport, token) = (reading.transport.clone(), tasks.token());
        let message = Arc::new(Message::new(delivery, transport, source, frames.len(), token));
        if source == Source::Work && message.frames > 1 {
            self.claims().share(&message);
        }
        let (mut together, mut asked) = (Vec::new(), Vec::new());
        let mut work = Share::default();
        for frame in frames {
            match frame {
                Ok(frame) if queue.is_own() && self.is_copy(&frame, &message, reading) => message.finish(),
                Ok(frame) => match self.take(frame, &message, tasks) {
                    Some(Taken::Run(job)) if self.is_too_much(&job, &mut work) => {
                        tasks.spawn(self.clone().give_back(job));
                    }
                    Some(Taken::Run(job)) => self.dispatch(job, &mut together, tasks).await,
                    Some(Taken::Ask(job)) => asked.push(job),
                    None => {}
                },
                Err(error) => drop(tasks.spawn(self.clone().refuse_rest(error, message.clone()))),
            }
        }
        self.start(together, tasks);
        if !asked.is_empty() {
            tasks.spawn(self.clone().ask_first(asked));
        }
    }

    /// Whether this frame has already come over another connection. While a server moves it reads both connections, and
    /// a message through an exchange reaches its queues on both. This also notices the mark that no more copies come.
    fn is_copy(&self, frame: &Frame, message: &Message, reading: &Reading) -> bool {
        self.copies().as_mut().is_some_and(|copies| match message.exchange.is_empty() {
            true => copies.is_last(frame.id),
            false => copies.is_copy(reading.connection, frame.kind, frame.id),
        })
    }

    /// Whether this oneway call is one too many from its message, and goes back to the queue for other instances. The
    /// sender does not know how long the calls take, so it may have put many slow ones into one message.
    fn is_too_much(&self, job: &Job, work: &mut Share) -> bool {
        let Job { served, message, .. } = job;
        if message.source != Source::Work || message.frames == 1 {
            return false;
        }
        let pace = served.pace.average();
        let first = *work == Share::default();
        *work = work.plus(pace.map_or(Share::ALL, Share::of_work));
        !first && *work > Share::ALL
    }

    /// Waits for a place and starts the job in the way that the service's [`Dispatch`] says. A job that gets a place at
    /// once is put into `together`, and is started later with the other jobs of its message.
    async fn dispatch(self: &Arc<Self>, job: Job, together: &mut Vec<Started>, tasks: &TaskTracker) {
        let source = job.message.source;
        let place = match self.place_at_once(source) {
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
    fn runs_inline(&self) -> bool {
        self.service.dispatch == Dispatch::Inline
    }

    /// Waits for a place. `None` once the server drains.
    async fn place(&self, source: Source) -> Option<RunningPlace> {
        let addressed = self.addressed(source);
        let permit = tokio::select! {
            biased;
            () = self.site.draining.cancelled() => return None,
            permit = self.permits.clone().acquire_owned() => permit.ok()?,
        };
        Some(RunningPlace { _permit: permit, _addressed: addressed })
    }

    /// A place, if one is free now and the server does not drain.
    fn place_at_once(&self, source: Source) -> Option<RunningPlace> {
        let addressed = self.addressed(source);
        if self.site.draining.is_cancelled() {
            return None;
        }
        let permit = self.permits.clone().try_acquire_owned().ok()?;
        Some(RunningPlace { _permit: permit, _addressed: addressed })
    }

    /// Counts a call that came through the instance's own queue. This must happen before the check whether the server
    /// drains, so that the drain sees every call that still starts.
    fn addressed(&self, source: Source) -> Option<TaskTrackerToken> {
        (source == Source::Instance).then(|| self.site.addressed.token())
    }

    /// Starts jobs of one message on the threads that the service's [`Dispatch`] says.
    fn start(self: &Arc<Self>, jobs: Vec<Started>, tasks: &TaskTracker) {
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

    /// The method that a frame calls. `None` if the service has no such method.
    pub(super) fn method(&self, frame: &Frame) -> Option<&Arc<ServedMethod>> {
        let name = if frame.kind == Kind::Event { EVENT } else { frame.metadata.method.as_deref()? };
        self.methods.get(name)
    }

    /// For a method with dedup: notes that the call begins to run and returns `None`, or returns the ending if the call
    /// has run before or is running.
    pub(super) fn begin_once(&self, job: &Job) -> Option<Ending> {
        let mut dedup = self.dedup();
        let Job { frame, served, message, .. } = job;
        match dedup.recall(frame, message.user.as_ref(), || (frame.clone(), message.clone())) {
            None => {
                dedup.begin(frame, message.user.as_ref());
                None
            }
            Some(Known::Ended(answer)) => {
                served.counts.repeats();
                Some(Ending::Recalled(answer))
            }
            Some(Known::Runs) => Some(Ending::Runs),
            Some(Known::Crowded) => Some(Ending::Recalled(Answer::Fault(crowded()))),
        }
    }

    pub(super) fn dedup(&self) -> MutexGuard<'_, Dedup<(Frame, Arc<Message>)>> {
        self.dedup.lock().expect("no panic while holding the answers")
    }

    pub(super) fn claims(&self) -> MutexGuard<'_, Claims> {
        self.claims.lock().expect("no panic while holding the claims")
    }

    pub(super) fn copies(&self) -> MutexGuard<'_, Option<Copies>> {
        self.copies.lock().expect("no panic while holding the copies")
    }

    /// The name of the instance's own queue.
    pub(super) fn own_queue(&self) -> Arc<str> {
        self.own_queue.lock().expect("no panic while holding a name").clone()
    }

    pub(super) fn calls(&self) -> MutexGuard<'_, Calls> {
        self.calls.lock().expect("no panic while holding the calls")
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // A runtime that waits for its tasks may not be dropped where others run.
        if let Some(pool) = self.pool.take() {
            pool.shutdown_background();
        }
    }
}

impl fmt::Debug for Worker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Worker").field("service", &self.service).finish_non_exhaustive()
    }
}

/// The threads for [`Dispatch::Pool`].
fn pool(id: &ServiceId, threads: usize) -> Result<Runtime, Error> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(threads.max(1))
        .thread_name(format!("hopline-{id}"))
        .enable_all()
        .build()
        .map_err(|error| Error::Invalid(format!("no threads for the pool of `{id}`: {error}")))
}
