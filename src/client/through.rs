//! The way of a call through the middleware of a client. A client without middleware sends its calls directly, at no
//! extra cost.

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context as TaskContext, Poll};
use std::time::Duration;

use futures::{FutureExt as _, Stream, StreamExt as _};
use tokio::time::Instant;
use tracing::error;

use super::attempt::traced;
#[cfg(feature = "metrics")]
use super::counted::MeasuredCall;
use super::pending::{Answer, Gathering, OVERDUE};
use super::request::{ArgumentWriter, Request, unwritten};
use super::span::{call_span, within};
use super::started::{Started, Through, Way};
use super::{Attempt, Client, Target};
use crate::context::Context;
use crate::error::{Code, Error, Fault, Unanswered};
use crate::exchanges::Recipients;
use crate::frame::Kind;
use crate::middleware::{Chain, Finished, Invocation, Reply, Style, TalliedCall};
use crate::outcome_span::OutcomeSpan;
use crate::panics::words;

/// The replies to a broadcast, each with its instance. If the connection is lost, the last item says so.
pub(crate) enum Answers {
    /// The instances were asked, and reply one after the other.
    Asked(Gathering),
    /// A middleware replied itself, without asking any instance.
    Made(Option<Reply>),
}

impl Stream for Answers {
    type Item = Result<Answer, Error>;

    fn poll_next(self: Pin<&mut Self>, task: &mut TaskContext<'_>) -> Poll<Option<Self::Item>> {
        match self.get_mut() {
            Self::Asked(gathering) => gathering.poll_next_unpin(task),
            Self::Made(reply) => Poll::Ready(reply.take().map(|reply| Ok((reply.instance.clone(), Ok(reply))))),
        }
    }
}

impl Client {
    /// Starts a call.
    pub(crate) fn begin(&self, request: Request<ArgumentWriter>) -> Result<Started, Error> {
        #[cfg(feature = "metrics")]
        let measured = MeasuredCall::begins(&request);
        let way = self.set_out(request);
        #[cfg(feature = "metrics")]
        let (way, measured) = match (way, measured) {
            (Err(error), Some(measured)) => return Err(measured.has_not_begun(error)),
            begun => begun,
        };
        Ok(Started {
            way: way?,
            #[cfg(feature = "metrics")]
            measured,
        })
    }

    fn set_out(&self, request: Request<ArgumentWriter>) -> Result<Way, Error> {
        let has_middleware = !self.0.settings.middleware.is_empty() || !request.asked.is_nothing();
        let is_paced = request.target.as_ref().is_ok_and(|target| self.is_paced(target));
        let is_watched = is_paced || self.0.policies.breakers.is_some();
        if !has_middleware && !is_watched && self.route_of(&request).is_none() {
            return Ok(Way::Straight(self.dispatch(request)?));
        }
        let (context, runtime) = (request.context.clone(), self.0.runtime.clone());
        if !has_middleware {
            let (target, attempt, request) = self.fixed(request)?;
            let span = call_span(&target, Kind::Request, attempt.call_id, attempt.trace);
            let client = self.clone();
            let running = within(span, async move { client.deliver(request).await });
            return Ok(Way::Through(Through::new(running, runtime, context)));
        }
        let (span, call, request) = self.opened(request, Style::Call)?;
        let is_for_any = request.recipients == Recipients::Any;
        let fallen = (request.asked.fails_back && is_for_any).then(|| self.fallen(&call, &request));
        let running = self.attempts(call, request, |client, request| async move { client.deliver(request).await });
        let running = within(span, self.or_later(running.boxed(), fallen));
        Ok(Way::Through(Through::new(running, runtime, context)))
    }

    /// Publishes a oneway call. Returns when the broker has confirmed it.
    pub(crate) async fn send(&self, request: Request<ArgumentWriter>) -> Result<(), Error> {
        let mut request = self.ruled(self.with_canary(request), false)?;
        request.asked = request.asked.for_style(Style::Oneway);
        #[cfg(feature = "metrics")]
        let measured = MeasuredCall::begins(&request);
        let outcome = self.send_on(request).await;
        #[cfg(feature = "metrics")]
        if let Some(measured) = measured {
            measured.sends(&outcome);
        }
        outcome
    }

    pub(super) async fn send_on(&self, request: Request<ArgumentWriter>) -> Result<(), Error> {
        if self.0.settings.middleware.is_empty() && request.asked.is_nothing() {
            return self.hand_over(request).await;
        }
        let (span, call, request) = self.opened(request, Style::Oneway)?;
        let codec = call.codec;
        let sending = self.attempts(call, request, move |client, request| async move {
            client.hand_over(request).await?;
            Ok(Reply::empty(codec))
        });
        within(span, sending).await.map(drop)
    }

    /// Asks all recipients of the request.
    pub(crate) async fn ask(&self, request: Request<ArgumentWriter>) -> Result<Answers, Error> {
        if self.0.settings.middleware.is_empty() {
            return Ok(Answers::Asked(self.gather(request).await?));
        }
        let (span, call, request) = self.opened(request, Style::Broadcast)?;
        let codec = call.codec;
        // The last that is asked is heard. One before it is given up.
        let asked = Arc::new(Mutex::new(None));
        let slot = asked.clone();
        let asking = self.attempts(call, request, move |client, request| {
            let slot = slot.clone();
            async move {
                let gathering = client.gather(request).await?;
                *slot.lock().expect("no panic while holding what was asked") = Some(gathering);
                Ok(Reply::empty(codec))
            }
        });
        let reply = within(span, asking).await?;
        let asked = asked.lock().expect("no panic while holding what was asked").take();
        Ok(asked.map_or_else(|| Answers::Made(Some(reply)), Answers::Asked))
    }

    /// A request that may be sent several times, with its target and its first attempt: its arguments are written, and its
    /// time runs.
    fn fixed(&self, request: Request<ArgumentWriter>) -> Result<(Arc<Target>, Attempt, Request), Error> {
        let target = request.target.clone().map_err(Error::Invalid)?;
        let codec = request.codec.unwrap_or(self.0.settings.codec);
        let mut request = request.written(codec).map_err(|error| unwritten(&target, error))?;
        request.context = request.context.or_else(Context::current);
        let timeout = self.time_for(request.timeout, request.context.as_ref());
        let attempt = Attempt { trace: traced(request.context.as_ref()), ..Attempt::first(timeout) };
        request.attempt = Some(Box::new(attempt));
        request.metadata = self.with_own(request.metadata);
        Ok((target, attempt, request))
    }

    /// A request as middleware gets it, and the rest of the request, which middleware does not see. The span is that of the
    /// call.
    fn opened(
        &self,
        request: Request<ArgumentWriter>,
        style: Style,
    ) -> Result<(OutcomeSpan, Invocation, Request), Error> {
        let (target, attempt, mut request) = self.fixed(request)?;
        let kind = if style == Style::Oneway { Kind::Oneway } else { Kind::Request };
        let span = call_span(&target, kind, attempt.call_id, attempt.trace);
        let call = Invocation {
            caller: Some(self.0.caller.clone()),
            deadline: Some(attempt.deadline),
            metadata: std::mem::take(&mut request.metadata).into(),
            codec: request.codec.unwrap_or(self.0.settings.codec),
            payload: std::mem::take(&mut request.payload),
            idempotent: request.idempotent,
            asked: request.asked.for_style(style),
            retry_on: request.retry_on.take(),
            counted: Some(Arc::new(TalliedCall::new(target.counted.policies.clone()))),
            ..Invocation::new(style, target.service_text.clone(), target.method.clone(), attempt.call_id)
        };
        Ok((span, call, request))
    }

    /// Runs a call through the middleware. Each run of the innermost sends a copy of the request.
    fn attempts<F, A>(
        &self,
        call: Invocation,
        request: Request,
        send: F,
    ) -> impl Future<Output = Result<Reply, Error>> + Send + use<F, A>
    where
        F: Fn(Self, Request) -> A + Send + Sync + 'static,
        A: Future<Output = Result<Reply, Error>> + Send + 'static,
    {
        let first = request.attempt.as_deref().copied().unwrap_or_else(|| Attempt::first(self.time_for(None, None)));
        self.through(call, first, move |client, call, attempt| {
            let attempt = Attempt { set_trace: call.set_trace(), ..attempt };
            let Invocation { metadata, payload, avoid, apart, counted, .. } = call;
            let (metadata, attempt) = (metadata.into_vec(), Some(Box::new(attempt)));
            let request = Request { metadata, payload, avoid, apart, counted, attempt, ..request.clone() };
            send(client, request)
        })
    }

    /// Runs a call through the middleware, and then tells the middleware how it ended. `send` is innermost. It gets the
    /// call as the middleware has changed it, and its attempt.
    pub(super) fn through<F, A>(
        &self,
        call: Invocation,
        first: Attempt,
        send: F,
    ) -> impl Future<Output = Result<Reply, Error>> + Send + use<F, A>
    where
        F: Fn(Self, Invocation, Attempt) -> A + Send + Sync + 'static,
        A: Future<Output = Result<Reply, Error>> + Send + 'static,
    {
        let attempts = Arc::new(AttemptCount::default());
        let mut watch = Watch {
            middleware: self.0.settings.middleware.clone(),
            call: call.clone(),
            since: Instant::now(),
            attempts: attempts.clone(),
            is_over: false,
        };
        let client = self.clone();
        let chain = self.0.policies.around(&self.0.settings.middleware, call.asked);
        let running = chain.run(call, move |call| {
            let number = attempts.begin();
            let sent = send(client.clone(), call, Attempt { number, ..first });
            let attempts = attempts.clone();
            async move { attempts.end(sent.await) }.boxed()
        });
        // An attempt says what is known of it by one OVERDUE after the deadline. The middleware has another one to pass it on.
        let limit = self.timer(first.deadline + OVERDUE + OVERDUE);
        async move {
            let outcome = tokio::select! {
                biased;
                outcome = AssertUnwindSafe(running).catch_unwind() => outcome,
                () = limit => Ok(Err(watch.still_running(first.timeout))),
            };
            let outcome = outcome.unwrap_or_else(|panic| Err(watch.panicked(words(&*panic))));
            // A middleware may return another error than that of the last attempt.
            let outcome = outcome.map_err(|error| watch.attempts.of_the_call(error));
            watch.ends(&outcome);
            outcome
        }
    }
}

/// The attempts of one call.
#[derive(Debug, Default)]
struct AttemptCount {
    /// How many were begun.
    begun: AtomicU32,
    /// How many of these may have run, or may still run.
    may_have_run: AtomicU32,
}

impl AttemptCount {
    /// Counts an attempt that begins. Returns its number, which is 1 for the first.
    fn begin(&self) -> u32 {
        self.may_have_run.fetch_add(1, Ordering::Relaxed);
        self.begun.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Counts that an attempt has ended.
    fn end(&self, outcome: Result<Reply, Error>) -> Result<Reply, Error> {
        match outcome {
            Err(error) if !error.may_have_run() => {
                self.may_have_run.fetch_sub(1, Ordering::Relaxed);
                Err(self.of_the_call(error))
            }
            outcome => outcome,
        }
    }

    /// An error as it is true of the call: it says that the call has not run only if no attempt may have run.
    fn of_the_call(&self, error: Error) -> Error {
        if self.may_have_run() { error.after_another_attempt() } else { error }
    }

    /// Whether the call may have run.
    fn may_have_run(&self) -> bool {
        self.may_have_run.load(Ordering::Relaxed) > 0
    }
}

/// Tells the middleware how a call ended. If it is dropped before that, nobody waited for the call to end, and it tells
/// that the call was cancelled.
struct Watch {
    middleware: Chain,
    call: Invocation,
    since: Instant,
    attempts: Arc<AttemptCount>,
    is_over: bool,
}

impl Watch {
    /// Logs that a middleware panicked. Returns the error of the call.
    fn panicked(&self, said: Option<&str>) -> Error {
        let (service, method) = (self.call.service(), self.call.method());
        error!(service, method, panic = said, "a middleware panicked");
        Error::Fault(Fault::new(Code::Internal, "a middleware of the client panicked: its log says why"))
    }

    /// The error of a call whose middleware has not ended in time.
    fn still_running(&self, timeout: Duration) -> Error {
        let method = match self.call.style() {
            Style::Event => self.call.method().to_owned(),
            _ => format!("{}.{}", self.call.service(), self.call.method()),
        };
        let why = Unanswered::Middleware { may_have_run: self.attempts.may_have_run() };
        Error::Timeout { method, after: timeout, why }
    }

    fn ends(&mut self, outcome: &Result<Reply, Error>) {
        let (code, own_error, handler_time) = match outcome {
            Ok(reply) if reply.own_error => (Code::Unknown, true, reply.handler_time),
            Ok(reply) => (Code::Ok, false, reply.handler_time),
            Err(error) => (error.code(), false, None),
        };
        self.tell(code, own_error, handler_time);
    }

    fn tell(&mut self, code: Code, own_error: bool, handler_time: Option<Duration>) {
        self.is_over = true;
        self.middleware.finished(&Finished {
            call: &self.call,
            code,
            own_error,
            ran: self.attempts.may_have_run(),
            queue_time: None,
            handler_time,
            took: self.since.elapsed(),
        });
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if !self.is_over {
            self.tell(Code::Cancelled, false, None);
        }
    }
}
