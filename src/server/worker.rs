//! The way of a call through one service: deliver → admit → dispatch → reply → settle.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::runtime::{Handle, Runtime};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

use super::Site;
use super::allow::Caller;
use super::calls::Calls;
use super::dedup::{Dedup, Known};
use super::message::{Message, Source};
use crate::client::MAX_TIMEOUT;
use crate::codec::Codec;
use crate::error::{Code, Error, Fault};
use crate::frame::{self, Frame, Kind};
use crate::outbox::{MAX_BYTES, Share};
use crate::pace::Pace;
use crate::registry::{self, Instance};
use crate::service::{Answer, Dispatch, Handler, Method, Service};
use crate::topology::ServiceId;
use crate::transport::{Consumer, Delivery, Transport};

/// How many calls to one instance wait there for a place: no prefetch holds back what has no acks.
const MAX_WAITING: usize = 1024;
/// The one method of a subscription.
pub(super) const EVENT: &str = "event";

/// Runs one service's calls, from whichever queue they come.
pub(super) struct Worker {
    pub(super) name: Arc<str>,
    service: Service,
    pub(super) site: Arc<Site>,
    pool: Option<Runtime>,
    permits: Arc<Semaphore>,
    /// Room for what an instance's own queue has delivered and no place is free for.
    waiting: Arc<Semaphore>,
    calls: Mutex<Calls>,
    /// Calls of methods that run once for each id.
    dedup: Mutex<Dedup<(Frame, Arc<Message>)>>,
    /// How long oneway calls take, by method: nobody replies to them, so their senders cannot know.
    pub(super) paces: BTreeMap<String, Pace>,
}

/// A job, and its place among those that run at once.
pub(super) type Started = (Job, Place);

/// A place among the calls that run at once.
pub(super) struct Place {
    _permit: OwnedSemaphorePermit,
    /// A call that came by the instance's own queue keeps that queue read while it runs.
    _addressed: Option<TaskTrackerToken>,
}

/// What is to be done about a frame.
enum Admitted {
    /// A handler runs it, and its answer is remembered for this time.
    Run(Handler, Option<Duration>),
    /// The worker knows the answer itself.
    Answered(Answer),
    /// Nothing more: it was a cancel, or has run already.
    Done,
    /// It runs already: it is told when that ends.
    Runs,
}

/// A frame that is going to be run.
pub(super) struct Job {
    pub(super) frame: Frame,
    pub(super) handler: Handler,
    pub(super) dedup: Option<Duration>,
    pub(super) deadline: Option<Instant>,
    pub(super) message: Arc<Message>,
}

/// How a job ended.
pub(super) enum Ending {
    /// The handler came to an end, after so long.
    Answered(Answer, Duration),
    /// The deadline passed while it ran.
    TimedOut,
    /// It did not run: its arguments cannot be decompressed.
    Refused(Fault),
    /// The handler came to an end, when nobody waited for it any more.
    Unheard(Answer),
    /// Nobody waits for it any more.
    Forgotten,
    /// It had run before, and ended like this.
    Recalled(Answer),
    /// It runs already: it is told when that ends.
    Runs,
}

impl Worker {
    pub(super) fn new(id: &ServiceId, service: Service, site: Arc<Site>) -> Result<Self, Error> {
        let pool = match service.dispatch {
            Dispatch::Pool(threads) => Some(pool(id, threads)?),
            Dispatch::Inline | Dispatch::Spawn | Dispatch::Blocking => None,
        };
        Ok(Self {
            name: id.to_string().into(),
            waiting: Arc::new(Semaphore::new(MAX_WAITING)),
            permits: Arc::new(Semaphore::new(service.concurrency.min(Semaphore::MAX_PERMITS))),
            paces: service.methods.keys().map(|name| (name.clone(), Pace::default())).collect(),
            service,
            site,
            pool,
            calls: Mutex::default(),
            dedup: Mutex::default(),
        })
    }

    /// Reads one queue until `stop` fires, or it is gone; then waits for the calls that it started.
    pub(super) async fn run(
        self: Arc<Self>,
        mut queue: Consumer,
        transport: Transport,
        source: Source,
        stop: CancellationToken,
    ) {
        // Whoever waits for that hears of it, be it by a panic.
        let ended = queue.ended.clone().drop_guard();
        let tasks = TaskTracker::new();
        let mut stopped = false;
        loop {
            let delivery = tokio::select! {
                biased;
                () = stop.cancelled(), if !stopped => {
                    queue.cancel();
                    stopped = true;
                    continue;
                }
                delivery = queue.next() => delivery,
            };
            let Some(delivery) = delivery else { break };
            self.deliver(delivery, &transport, source, &tasks).await;
        }
        drop(ended);
        tasks.close();
        tasks.wait().await;
    }

    /// Takes a message apart and sees to each of its frames.
    async fn deliver(self: &Arc<Self>, delivery: Delivery, transport: &Transport, source: Source, tasks: &TaskTracker) {
        let max_size = self.site.max_size;
        let too_large = || vec![Err(frame::too_large(&delivery.body, max_size))];
        // Its sender may put frames together that are small enough each.
        let mut frames: Vec<_> = match delivery.body.len() {
            size if size > max_size.max(MAX_BYTES) => too_large(),
            _ => frame::decode(delivery.body.clone()).collect(),
        };
        if frames.len() == 1 && delivery.body.len() > max_size {
            frames = too_large();
        }
        let message = Arc::new(Message::new(delivery, transport.clone(), source, frames.len(), tasks.token()));
        let mut together = Vec::new();
        let mut work = Share::default();
        for frame in frames {
            match frame {
                Ok(frame) => match self.admit(&frame, &message) {
                    Ok(Admitted::Answered(answer)) => self.answer(&frame, answer, None, &message),
                    Ok(Admitted::Run(handler, dedup)) => {
                        // Nobody waits for the end of the others, so no time of theirs can be over.
                        let remaining = frame.metadata.remaining.filter(|_| frame.kind == Kind::Request);
                        let deadline = remaining.map(|remaining| message.received + remaining.min(MAX_TIMEOUT));
                        let job = Job { frame, handler, dedup, deadline, message: message.clone() };
                        if self.is_too_much(&job, &mut work) {
                            tasks.spawn(self.clone().give_back(job));
                        } else {
                            self.dispatch(job, &mut together, tasks).await;
                        }
                    }
                    Ok(Admitted::Done) => message.finish(),
                    Ok(Admitted::Runs) => {}
                    Err(fault) => drop(tasks.spawn(self.clone().refuse(frame, fault, message.clone()))),
                },
                Err(error) => drop(tasks.spawn(self.clone().refuse_rest(error, message.clone()))),
            }
        }
        self.start(together, tasks);
    }

    /// Whether a oneway call is one too many in its message. Who sent it does not know how long it takes, so slow ones may
    /// come together, of which others are to have their part. And where a message has come back, one of its calls may
    /// have killed the instance that had it: it is not to take the others along again.
    fn is_too_much(&self, job: &Job, work: &mut Share) -> bool {
        let Job { frame, message, .. } = job;
        if message.source != Source::Work || message.frames == 1 {
            return false;
        }
        let method = frame.metadata.method.as_deref().unwrap_or_default();
        let pace = self.paces.get(method).and_then(Pace::average);
        let first = *work == Share::default();
        *work = work.plus(pace.map_or(Share::ALL, Share::of_work));
        message.redelivered || (!first && *work > Share::ALL)
    }

    /// What is to be done about a frame; a fault for what must not run.
    fn admit(&self, frame: &Frame, message: &Arc<Message>) -> Result<Admitted, Fault> {
        match (frame.kind, message.source) {
            (Kind::Cancel, _) => {
                self.calls().cancel(frame.id, frame.metadata.remaining.unwrap_or_default());
                return Ok(Admitted::Done);
            }
            (Kind::Request, Source::Calls | Source::Instance) if message.reply_to.is_none() => {
                return Err(Fault::new(Code::InvalidArgument, "a request without `reply_to`: nobody can be answered"));
            }
            (Kind::Request, Source::Calls | Source::Instance)
            | (Kind::Oneway, Source::Work | Source::Instance)
            | (Kind::Event, Source::Events) => {}
            (kind, source) => {
                let why = format!("a message of type {} ({kind:?}) does not belong on a queue of {source}", kind as u8);
                return Err(Fault::new(Code::Unimplemented, why));
            }
        }
        let name = frame.metadata.method.as_deref().unwrap_or_default();
        if self.site.allow.is_set() {
            let caller = Caller { user: message.user.as_deref(), instance: frame.metadata.instance.as_deref() };
            // No service has a colon in its name.
            let (whose, sign) = if frame.kind == Kind::Event { ("event", ':') } else { (&*self.name, '.') };
            self.site.allow.check(&caller, &format!("{whose}{sign}{name}"))?;
        }
        self.check_key(frame, message)?;
        let name = if frame.kind == Kind::Event { EVENT } else { name };
        let Some((method, handler)) = self.service.methods.get(name) else {
            if let Some(answer) = self.about_itself(name, frame.codec) {
                return Ok(Admitted::Answered(answer));
            }
            let known: Vec<&str> = self.service.methods.keys().map(String::as_str).collect();
            let why = format!("`{}` has no method `{name}`: it has {}", self.name, known.join(", "));
            return Err(Fault::new(Code::Unimplemented, why));
        };
        if method.dedup.is_some()
            && let Some(known) = self.recall(frame, message)
        {
            return match known {
                Known::Ended(answer) if frame.kind == Kind::Request => Ok(Admitted::Answered(answer)),
                Known::Ended(_) => Ok(Admitted::Done),
                Known::Runs => Ok(Admitted::Runs),
                Known::Crowded => Err(crowded()),
            };
        }
        // Whether it ran before, nobody can tell: what may not run twice is not run again.
        if message.redelivered && frame.kind == Kind::Request && !method.idempotent {
            let why = format!("the instance that took `{}.{name}` went away: it may have run", self.name);
            return Err(Fault::new(Code::Aborted, why));
        }
        Ok(Admitted::Run(handler.clone(), method.dedup))
    }

    /// What the broker has let pass by its key is not to be something else.
    fn check_key(&self, frame: &Frame, message: &Message) -> Result<(), Fault> {
        let method = frame.metadata.method.as_deref();
        let agrees = match message.source {
            Source::Events => method.is_none_or(|method| method == message.key),
            Source::Work if message.exchange == self.site.namespace.oneway() => {
                let named = message.key.strip_prefix(&*self.name).and_then(|key| key.strip_prefix('.'));
                named == Some(method.unwrap_or_default())
            }
            Source::Work | Source::Calls | Source::Instance => true,
        };
        if agrees {
            return Ok(());
        }
        let why = format!("its key is `{}`, and it names `{}`", message.key, method.unwrap_or_default());
        Err(Fault::new(Code::InvalidArgument, why))
    }

    /// The answer to a question of discovery, which needs no place among the calls.
    fn about_itself(&self, question: &str, codec: Codec) -> Option<Answer> {
        let (service, instance) = (self.name.to_string(), self.site.instance.to_string());
        let written = match question {
            registry::PING => codec.encode(&()),
            registry::INFO => {
                let methods = self.service.methods.values().map(|(method, _)| method.info()).collect();
                codec.encode(&Instance { service, instance, hopline: env!("CARGO_PKG_VERSION").to_owned(), methods })
            }
            registry::STATS => {
                let repeated = self.dedup().repeated();
                let stats = self.calls().stats(service, instance, repeated);
                codec.encode(&stats)
            }
            _ => return None,
        };
        Some(written.map_or_else(|error| Answer::Fault(Fault::new(Code::Internal, error.to_string())), Answer::Result))
    }

    /// Waits for a free place, and runs the job where the service's handlers run: `together` with others of its message
    /// for which there was a place at once, which are started later.
    async fn dispatch(self: &Arc<Self>, job: Job, together: &mut Vec<Started>, tasks: &TaskTracker) {
        let source = job.message.source;
        let place = match self.place_at_once(source) {
            // Behind a call that waits for its place there may be a cancel: an instance's own queue is read on.
            None if source == Source::Instance && !self.runs_inline() => {
                return self.start_later(job, tasks);
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

    /// Lets a job wait for its place, unless too many do.
    fn start_later(self: &Arc<Self>, job: Job, tasks: &TaskTracker) {
        let worker = self.clone();
        let Ok(waiting) = self.waiting.clone().try_acquire_owned() else {
            let why = format!("{MAX_WAITING} calls wait for instance {} already", self.site.instance);
            let fault = Fault::new(Code::ResourceExhausted, why);
            tasks.spawn(worker.refuse(job.frame, fault, job.message));
            return;
        };
        let tracker = tasks.clone();
        tasks.spawn(async move {
            let place = worker.place(job.message.source).await;
            drop(waiting);
            match place {
                Some(place) => worker.start(vec![(job, place)], &tracker),
                None => worker.give_back(job).await,
            }
        });
    }

    /// Whether handlers run on the task that reads the queue.
    fn runs_inline(&self) -> bool {
        self.service.dispatch == Dispatch::Inline
    }

    /// A place among the calls that run at once; none once the server drains.
    async fn place(&self, source: Source) -> Option<Place> {
        let addressed = self.addressed(source);
        let permit = tokio::select! {
            biased;
            () = self.site.draining.cancelled() => return None,
            permit = self.permits.clone().acquire_owned() => permit.ok()?,
        };
        Some(Place { _permit: permit, _addressed: addressed })
    }

    fn place_at_once(&self, source: Source) -> Option<Place> {
        let addressed = self.addressed(source);
        if self.site.draining.is_cancelled() {
            return None;
        }
        let permit = self.permits.clone().try_acquire_owned().ok()?;
        Some(Place { _permit: permit, _addressed: addressed })
    }

    /// Taken before it is asked whether the server drains: what still runs then is seen by the drain.
    fn addressed(&self, source: Source) -> Option<TaskTrackerToken> {
        (source == Source::Instance).then(|| self.site.addressed.token())
    }

    /// Starts jobs of one message.
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

    /// The method that a frame is for, if there is one.
    pub(super) fn method(&self, frame: &Frame) -> Option<&Method> {
        let name = if frame.kind == Kind::Event { EVENT } else { frame.metadata.method.as_deref()? };
        self.service.methods.get(name).map(|(method, _)| method)
    }

    /// What is known of a call whose method runs once for each id. When it runs, its end is this delivery's end too.
    fn recall(&self, frame: &Frame, message: &Arc<Message>) -> Option<Known> {
        self.dedup().recall(frame, || (frame.clone(), message.clone()))
    }

    /// Notes that such a call begins to run; or how it ends, if it has run or runs already.
    pub(super) fn begin_once(&self, job: &Job) -> Option<Ending> {
        let mut dedup = self.dedup();
        match dedup.recall(&job.frame, || (job.frame.clone(), job.message.clone())) {
            None => {
                dedup.begin(&job.frame);
                None
            }
            Some(Known::Ended(answer)) => Some(Ending::Recalled(answer)),
            Some(Known::Runs) => Some(Ending::Runs),
            Some(Known::Crowded) => Some(Ending::Recalled(Answer::Fault(crowded()))),
        }
    }

    pub(super) fn dedup(&self) -> MutexGuard<'_, Dedup<(Frame, Arc<Message>)>> {
        self.dedup.lock().expect("no panic while holding the answers")
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

fn crowded() -> Fault {
    Fault::new(Code::ResourceExhausted, "too many deliveries of this call wait for its answer already")
}

fn pool(id: &ServiceId, threads: usize) -> Result<Runtime, Error> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(threads.max(1))
        .thread_name(format!("hopline-{id}"))
        .enable_all()
        .build()
        .map_err(|error| Error::Invalid(format!("no threads for the pool of `{id}`: {error}")))
}
