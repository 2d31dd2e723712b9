//! The step that runs a handler. The handler runs within the context of its call until it ends, or until nobody waits
//! for it any more and its method need not finish.

use std::any::Any;
use std::future::poll_fn;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::sync::{Arc, OnceLock};
use std::task::{self, Poll};
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{Instrument, debug, error, warn};

use super::admit::crowded;
use super::dedup::Known;
use super::dispatch::{Job, RunningPlace, Started};
use super::message::Source;
use super::outcome::{Ending, timed_out};
use super::served_method::RunEnd;
use super::tap::tapped;
use super::worker::Worker;
use crate::clock::{at, unix_millis};
use crate::context::{self, Context};
use crate::error::{Code, EndOfCall, Fault};
use crate::frame::{Frame, Kind};
use crate::outcome_span::{OutcomeSpan, outcome_span};
use crate::panics::words;
use crate::service::Answer;

/// How often the server looks for calls that take long, to tell their callers that they are still running.
const LOOK: Duration = Duration::from_millis(500);

/// What a handler has come to after its first poll.
enum Begun {
    Ended(Ending),
    Waits(RunningHandler),
}

/// When a handler started, and its number among the running calls.
#[derive(Clone, Copy)]
struct HandlerStart {
    at: std::time::Instant,
    number: u64,
}

/// A handler that waits for something.
struct RunningHandler {
    call: BoxFuture<'static, Answer>,
    context: Context,
    span: OutcomeSpan,
    started: HandlerStart,
}

impl Worker {
    /// Runs jobs of one message. Each handler is polled once, one after the other. Those that then wait get a task of
    /// their own, so a quick call costs no task.
    pub(super) async fn perform_all(self: Arc<Self>, jobs: Vec<Started>, tasks: TaskTracker) {
        for (job, place) in jobs {
            match self.first_poll(&job).await {
                Begun::Ended(ending) => {
                    drop(place);
                    self.conclude(job, ending, &tasks);
                }
                Begun::Waits(running) => drop(tasks.spawn(self.clone().go_on(job, place, running, tasks.clone()))),
            }
        }
    }

    /// Runs a job to its end.
    pub(super) async fn perform(self: Arc<Self>, (job, place): Started, tasks: TaskTracker) {
        match self.first_poll(&job).await {
            Begun::Ended(ending) => {
                drop(place);
                self.conclude(job, ending, &tasks);
            }
            Begun::Waits(running) => self.go_on(job, place, running, tasks).await,
        }
    }

    /// Runs a job until its handler ends or waits.
    async fn first_poll(&self, job: &Job) -> Begun {
        poll_fn(|context| Poll::Ready(self.begin(job, context))).await
    }

    /// Runs the rest of a job whose handler waits.
    async fn go_on(self: Arc<Self>, job: Job, place: RunningPlace, running: RunningHandler, tasks: TaskTracker) {
        let ending = self.wait_for(&job, running).await;
        drop(place);
        self.conclude(job, ending, &tasks);
    }

    /// Starts a handler and polls it once.
    fn begin(&self, job: &Job, task: &mut task::Context<'_>) -> Begun {
        let frame = &job.frame;
        if job.served.method.dedup.is_some()
            && let Some(ending) = self.begin_once(job)
        {
            return Begun::Ended(ending);
        }
        let forgotten = || {
            let (method, caller) = (frame.metadata.method.as_deref(), frame.metadata.instance.as_deref());
            debug!(service = %self.name, method, id = %frame.id, caller, "a call does not run: nobody waits for it any more");
            job.served.counts.expires();
            Begun::Ended(Ending::Forgotten)
        };
        let now = Instant::now();
        if job.deadline.is_some_and(|deadline| deadline <= now) {
            return forgotten();
        }
        if job.message.is_taken_back() {
            let method = frame.metadata.method.as_deref();
            debug!(service = %self.name, method, id = %frame.id, "a call does not run: the broker has taken it back and delivers it again");
            return Begun::Ended(Ending::Forgotten);
        }
        let payload = match frame.plain_payload(self.site.max_size) {
            Ok(payload) => payload,
            Err(refusal) => {
                let method = frame.metadata.method.as_deref().unwrap_or_default();
                let why = format!("the arguments of `{method}`: {refusal}");
                return Begun::Ended(Ending::Refused(Fault::new(refusal.code(), why)));
            }
        };
        if self.is_governed
            && frame.kind == Kind::Request
            && let Some(passage) = &job.passage
            && let Err(fault) = self.middleware.begins(&passage.call)
        {
            return Begun::Ended(Ending::Refused(fault));
        }
        let context = self.context(job);
        let Some(number) = self.calls().enter(frame, &context, &job.message, now) else {
            return forgotten();
        };
        // What has come before has waited elsewhere, or has run.
        let is_first = context.attempt() == 1 && !context.redelivered();
        job.served.counts.begins(frame.payload.len(), context.queue_time().filter(|_| is_first));
        #[cfg(feature = "metrics")]
        if is_first {
            self.measures_wait(job);
        }
        let mut span = self.span(frame, &context);
        let started = HandlerStart { at: std::time::Instant::now(), number };
        // A handler may panic, and so may the future that it makes.
        let first = catch_unwind(AssertUnwindSafe(|| {
            let _entered = span.span().enter();
            context.clone().scope_of(|| {
                let mut call = match &job.passage {
                    None => (job.served.handler)(context.clone(), frame.codec, payload),
                    Some(passage) => self.go_through(job, passage, &context, payload),
                };
                let polled = call.as_mut().poll(task);
                (call, polled)
            })
        }));
        let answer = match first {
            Ok((call, Poll::Pending)) => return Begun::Waits(RunningHandler { call, context, span, started }),
            Ok((_, Poll::Ready(answer))) => self.told(frame, answer),
            Err(panic) => self.panicked(job, &*panic),
        };
        let ending = self.ended(job, answer, &context, started);
        tell(&mut span, &ending, job);
        Begun::Ended(ending)
    }

    /// For a method with dedup: notes that the call begins to run and returns `None`, or returns the ending if the call
    /// has run before or is running.
    fn begin_once(&self, job: &Job) -> Option<Ending> {
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

    /// Waits until a handler ends. If its method need not finish, this stops it when its deadline passes or its caller
    /// gives up.
    async fn wait_for(&self, job: &Job, running: RunningHandler) -> Ending {
        let RunningHandler { call, context, mut span, started } = running;
        let waiting = async {
            let mut call = pin!(context.scope(call));
            let (ending, why) = tokio::select! {
                biased;
                () = context.cancelled() => (Ending::Forgotten, "its caller gave up"),
                answer = &mut call => return Ok(self.told(&job.frame, answer)),
                () = at(job.deadline) => (Ending::TimedOut, "its deadline passed"),
            };
            if context.finishes() {
                context.cancel();
                return Ok(self.told(&job.frame, call.await));
            }
            Err((ending, why))
        };
        // It may panic, and so may whatever is dropped with it when it is cancelled.
        let ended = AssertUnwindSafe(waiting.instrument(span.span().clone())).catch_unwind().await;
        let ending = match ended.unwrap_or_else(|panic| Ok(self.panicked(job, &*panic))) {
            Ok(answer) => self.ended(job, answer, &context, started),
            Err((ending, why)) => {
                let fault = timed_out();
                let end = match ending {
                    Ending::TimedOut => RunEnd::Fault(&fault),
                    _ => RunEnd::Cancelled,
                };
                let time = self.leave(job, &context, started, end);
                self.log_dropped(job, &context, time, why);
                ending
            }
        };
        tell(&mut span, &ending, job);
        ending
    }

    /// Logs that a handler was stopped, because work may have been left half done. For an idempotent method that does
    /// no harm, so it is logged at the level debug only.
    fn log_dropped(&self, job: &Job, context: &Context, ran: Duration, why: &str) {
        let (service, method, id, caller) = (&self.name, context.method(), job.frame.id, context.caller());
        if job.served.method.idempotent {
            debug!(%service, method, %id, caller, ?ran, why, "a handler was dropped half-way");
        } else {
            warn!(%service, method, %id, caller, ?ran, why, "a handler was dropped half-way: mark its method `finishes` if it must not be, or `idempotent` if it may be");
        }
    }

    /// How a job ends whose handler has ended.
    fn ended(&self, job: &Job, answer: Answer, context: &Context, started: HandlerStart) -> Ending {
        let late = context.is_cancelled() || job.deadline.is_some_and(|deadline| deadline <= Instant::now());
        let ran = self.leave(job, context, started, RunEnd::of(&answer));
        if !late {
            return Ending::Answered(answer, ran);
        }
        debug!(service = %self.name, method = context.method(), id = %job.frame.id, caller = context.caller(), ?ran, "a handler has ended, for nobody");
        Ending::Unheard(answer)
    }

    /// Removes a handler from the running calls. Returns how long it ran.
    fn leave(&self, job: &Job, context: &Context, started: HandlerStart, end: RunEnd<'_>) -> Duration {
        let Job { frame, message, served, .. } = job;
        let time = started.at.elapsed();
        served.counts.ends(end, time);
        self.taps.see(|| tapped(frame, context, end, time));
        if frame.kind.is_kept() {
            served.pace.report(time);
        }
        if message.source == Source::Work {
            // Before it leaves: at no moment does who asks for it hear nothing.
            self.claims().ends(frame.id);
        }
        self.calls().leave(frame.id, started.number);
        // Whatever the handler handed to other tasks hears of it too.
        if context.is_shared() || job.passage.is_some() {
            context.cancel();
        }
        time
    }

    /// Tells the callers of calls that take long that their calls are still running. Ends when the server drains and no
    /// call is running any more.
    pub(super) async fn report_in(self: Arc<Self>) {
        let mut tick = tokio::time::interval(LOOK);
        loop {
            tokio::select! {
                () = self.site.drained.cancelled() => return,
                _ = tick.tick() => {}
            }
            let due = self.calls().due(Instant::now());
            for (id, message) in due {
                self.keep_alive(id, &message);
            }
        }
    }

    /// The span of a call, around its handler.
    fn span(&self, frame: &Frame, context: &Context) -> OutcomeSpan {
        let name = format_args!("{}/{}", self.name, context.method());
        outcome_span!(
            "handle",
            otel.kind = if frame.kind == Kind::Request { "server" } else { "consumer" },
            otel.name = %name,
            rpc.system.name = "hopline",
            rpc.method = %name,
            id = %frame.id,
            caller = context.caller(),
            traceparent = context.traceparent(),
        )
    }

    /// The context of a call, for its handler.
    fn context(&self, job: &Job) -> Context {
        let Job { frame, message, served, .. } = job;
        Context::new(context::Inner {
            service: self.name.clone(),
            method: frame.metadata.method.clone().unwrap_or_default(),
            instance: self.site.instance.clone(),
            id: frame.id,
            call_id: frame.call_id(),
            caller: frame.metadata.instance.clone(),
            user: message.user.clone(),
            deadline: job.deadline,
            finishes: served.method.finishes,
            redelivered: message.redelivered,
            attempt: message.attempt(frame),
            queue_time: frame.metadata.sent_at.map(since),
            metadata: match &job.passage {
                None => frame.metadata.more().user.clone().into(),
                Some(passage) => passage.call.metadata.clone(),
            },
            event_version: frame.metadata.more().event_version.unwrap_or(1),
            parent: frame.metadata.traceparent.as_deref().copied(),
            trace: OnceLock::new(),
            cancelled: CancellationToken::new(),
            draining: self.site.draining.clone(),
            services: self.site.services.clone(),
        })
    }

    /// Passes a handler's answer on, and logs the fault of a request.
    fn told(&self, frame: &Frame, answer: Answer) -> Answer {
        if let Answer::Fault(fault) = &answer
            && frame.kind == Kind::Request
        {
            self.log_fault(frame, fault);
        }
        answer
    }

    /// The answer to a call whose handler, or a middleware around it, panicked.
    fn panicked(&self, job: &Job, panic: &(dyn Any + Send)) -> Answer {
        let frame = &job.frame;
        let method = frame.metadata.method.as_deref().unwrap_or_default();
        let who = match &job.passage {
            None => format!("`{}.{method}`", self.name),
            Some(passage) if passage.has_run() => format!("`{}.{method}`, or a middleware around it,", self.name),
            Some(_) => format!("a middleware around `{}.{method}`", self.name),
        };
        let said = words(panic);
        let why = match (frame.kind, said) {
            // A dead letter and the log are read by whoever runs the service; a reply by anybody who may call it.
            (Kind::Oneway | Kind::Event, Some(said)) => format!("{who} panicked: {said}"),
            (Kind::Oneway | Kind::Event, None) => format!("{who} panicked"),
            _ => {
                let caller = frame.metadata.instance.as_deref();
                error!(service = %self.name, method, id = %frame.id, caller, panic = said, "{who} panicked");
                format!("{who} panicked: the log of instance {} says why", self.site.instance)
            }
        };
        Answer::Fault(Fault::new(Code::Internal, why))
    }
}

/// Tells the span of a call how it has ended.
fn tell(span: &mut OutcomeSpan, ending: &Ending, job: &Job) {
    span.ends(ending.end_of_call(job).unwrap_or(EndOfCall::Coded(Code::Cancelled)));
}

/// How long ago this was, in milliseconds since 1970. The other clock may be ahead, in which case this is zero.
fn since(sent_at: u64) -> Duration {
    Duration::from_millis(unix_millis().saturating_sub(sent_at))
}
