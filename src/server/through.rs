//! The way of a call through the middleware of a server: `admit` when it arrives, `handle` around its handler, and
//! `finished` when it has ended. Without middleware none of this runs.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use tokio::time::Instant;

use super::dispatch::Job;
use super::message::Message;
use super::outcome::Ending;
use super::worker::Worker;
use crate::codec::Codec;
use crate::context::Context;
use crate::error::{Code, Error, Fault};
use crate::frame::{self, Frame, Kind};
use crate::middleware::{Chain, Finished, Invocation, Reply, Style};
use crate::service::{Answer, Body};

/// What is known about a call with middleware, from its arrival to its end.
pub(super) struct Passage {
    pub(super) call: Invocation,
    received: Instant,
    /// Set when it begins to run.
    began: OnceLock<Began>,
    /// Whether its handler has started.
    ran: AtomicBool,
    /// How many middleware have admitted it.
    pub(super) admitted: AtomicUsize,
    /// The middleware, if there are policies among it, which have to know when the call leaves.
    governed: Option<Chain>,
}

impl Drop for Passage {
    fn drop(&mut self) {
        if let Some(middleware) = &self.governed {
            middleware.leaves(&self.call, self.admitted.load(Ordering::Relaxed));
        }
    }
}

/// When a call began to run, and how long it had waited until then.
struct Began {
    at: Instant,
    queue_time: Option<Duration>,
}

/// How a call ended, in the terms of [`Finished`].
pub(super) struct Outcome {
    code: Code,
    own_error: bool,
}

impl From<&Answer> for Outcome {
    fn from(answer: &Answer) -> Self {
        match answer {
            Answer::Result(_) => Code::Ok.into(),
            Answer::ServiceError(_) => Self { code: Code::Unknown, own_error: true },
            Answer::Fault(fault) => fault.code.into(),
        }
    }
}

impl From<Code> for Outcome {
    fn from(code: Code) -> Self {
        Self { code, own_error: false }
    }
}

impl Passage {
    /// Whether the handler has started.
    pub(super) fn has_run(&self) -> bool {
        self.ran.load(Ordering::Relaxed)
    }

    /// Notes that the call begins to run.
    fn begins(&self, context: &Context) {
        // It begins once: another delivery has a passage of its own.
        let _ = self.began.set(Began { at: Instant::now(), queue_time: context.queue_time() });
    }
}

impl Worker {
    /// The passage of a request, oneway call or event. `None` without middleware and for other frames.
    pub(super) fn passage(&self, frame: &Frame, message: &Message) -> Option<Arc<Passage>> {
        if self.middleware.is_empty() {
            return None;
        }
        let style = match frame.kind {
            Kind::Request if self.site.exchanges.is_for_all(&message.exchange, &message.key) => Style::Broadcast,
            Kind::Request => Style::Call,
            Kind::Oneway => Style::Oneway,
            Kind::Event => Style::Event,
            _ => return None,
        };
        let method = match (style, &frame.metadata.method) {
            (_, Some(method)) => method.clone(),
            (Style::Event, None) => message.key.as_str().into(),
            (_, None) => Arc::default(),
        };
        let served = frame.metadata.method.as_deref().and_then(|method| self.methods.get(method));
        let call = Invocation {
            caller: frame.metadata.instance.clone(),
            user: message.user.clone(),
            request_id: Some(frame.id),
            deadline: super::admit::deadline(frame, message),
            metadata: frame.metadata.more().user.clone().into(),
            codec: frame.codec,
            idempotent: frame.idempotent,
            traceparent: frame.metadata.traceparent.as_deref().copied(),
            served: served.is_some(),
            repeatable: served.is_some_and(|served| served.method.idempotent),
            ..Invocation::new(style, self.name.clone(), method, frame.call_id())
        };
        let (began, ran, admitted) = (OnceLock::new(), AtomicBool::new(false), AtomicUsize::new(0));
        let governed = self.is_governed.then(|| self.middleware.clone());
        Some(Arc::new(Passage { call, received: message.received, began, ran, admitted, governed }))
    }

    /// Runs the handler of a call with the middleware around it.
    pub(super) fn go_through(
        &self,
        job: &Job,
        passage: &Arc<Passage>,
        context: &Context,
        payload: Bytes,
    ) -> BoxFuture<'static, Answer> {
        passage.begins(context);
        let call = Invocation { payload, ..passage.call.clone() };
        let codec = call.codec;
        let (handler, context, passage) = (job.served.handler.clone(), context.clone(), passage.clone());
        let end = move |call: Invocation| {
            passage.ran.store(true, Ordering::Relaxed);
            // The handler sees what the middleware has set. A run that several calls share has a context of its own.
            let context = Context::current().as_ref().unwrap_or(&context).with_metadata(&call.metadata);
            let running = context.clone().scope_of(|| handler(context.clone(), call.codec, call.payload));
            let running = context.scope(running);
            async move { read(codec, running.await) }.boxed()
        };
        self.middleware.run(call, end).map(move |outcome| written(codec, outcome)).boxed()
    }

    /// Tells the middleware that a call was answered or refused without being run.
    pub(super) fn passed_by(&self, passage: Option<&Passage>, outcome: Outcome) {
        if let Some(passage) = passage {
            self.tell_finished(passage, &outcome);
        }
    }

    /// Tells the middleware how a job ended. Some endings are not the end of the call, and are not told.
    pub(super) fn passed(&self, job: &Job, ending: &Ending) {
        let Some(passage) = &job.passage else { return };
        let over = || match job.deadline {
            Some(deadline) if deadline <= Instant::now() => Code::DeadlineExceeded,
            _ => Code::Cancelled,
        };
        let outcome = match ending {
            Ending::Answered(answer, _) | Ending::Recalled(answer) => answer.into(),
            Ending::Refused(fault) => fault.code.into(),
            Ending::TimedOut => Code::DeadlineExceeded.into(),
            Ending::Unheard(_) => over().into(),
            // It comes again.
            Ending::Forgotten if job.message.is_taken_back() && passage.began.get().is_none() => return,
            Ending::Forgotten => over().into(),
            // It ends with the delivery that runs.
            Ending::Runs => return,
        };
        self.tell_finished(passage, &outcome);
    }

    /// Calls `finished` of all middleware.
    fn tell_finished(&self, passage: &Passage, outcome: &Outcome) {
        let began = passage.began.get();
        if passage.has_run() {
            if let Some(ward) = &self.ward {
                ward.ended(outcome.code);
            }
            if let Some(began) = began {
                let own = self.methods.get(passage.call.method()).and_then(|served| served.bulkhead.as_ref());
                own.unwrap_or(&self.bulkhead).places.ended(outcome.code, began.at.elapsed());
            }
        }
        self.middleware.finished(&Finished {
            call: &passage.call,
            code: outcome.code,
            own_error: outcome.own_error,
            ran: passage.has_run(),
            queue_time: began.and_then(|began| began.queue_time),
            handler_time: began.map(|began| began.at.elapsed()),
            took: passage.received.elapsed(),
        });
    }
}

/// What a handler answered, as middleware gets it.
fn read(codec: Codec, answer: Answer) -> Result<Reply, Error> {
    let (body, own_error) = match answer {
        Answer::Result(body) => (body, false),
        Answer::ServiceError(body) => (body, true),
        Answer::Fault(fault) => return Err(Error::Fault(fault)),
    };
    Ok(Reply { metadata: body.metadata.clone(), payload: body.into_payload(), own_error, ..Reply::empty(codec) })
}

/// What middleware returned for a call, as it is sent. `codec` is the codec of the call.
fn written(codec: Codec, outcome: Result<Reply, Error>) -> Answer {
    let wrong = |why: String| Answer::Fault(Fault::new(Code::Internal, why));
    match outcome {
        Ok(reply) if reply.codec != codec => {
            wrong(format!("a middleware answered a call in {} by {}", codec.name(), reply.codec.name()))
        }
        Ok(reply) => match frame::check_entries(reply.metadata.iter()) {
            Ok(()) => {
                let mut body = Body::from(Vec::from(reply.payload));
                body.metadata = reply.metadata;
                if reply.own_error { Answer::ServiceError(body) } else { Answer::Result(body) }
            }
            Err(excess) => wrong(format!("a middleware gave the reply too much metadata: {excess}")),
        },
        Err(Error::Fault(fault)) => Answer::Fault(fault),
        Err(error) => Answer::Fault(Fault::new(error.code(), error.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn middleware_answers_in_the_calls_codec_and_within_the_bounds_of_metadata() {
        let reply = |codec| Reply::result(codec, &7).expect("it can be written");
        assert!(
            matches!(written(Codec::Json, Ok(reply(Codec::Json))), Answer::Result(body) if *body.payload() == *b"7")
        );
        let refused = |outcome| match written(Codec::Json, outcome) {
            Answer::Fault(fault) => fault,
            answer => panic!("it is no fault: {answer:?}"),
        };
        assert!(refused(Ok(reply(Codec::Cbor))).message.contains("JSON by CBOR"));
        let mut large = reply(Codec::Json);
        large.set_metadata("large", "x".repeat(61 * 1024));
        assert!(refused(Ok(large)).message.contains("too much metadata"));
        let fault = Fault::new(Code::NotFound, "no such");
        assert_eq!(refused(Err(Error::Fault(fault.clone()))), fault);
        assert_eq!(refused(Err(Error::Invalid("a bad name".into()))), Fault::new(Code::InvalidArgument, "a bad name"));
    }

    #[test]
    fn what_a_handler_answers_is_read_and_written_back_as_it_was() {
        for answer in [Answer::Result(vec![1].into()), Answer::ServiceError(vec![2].into())] {
            let text = format!("{answer:?}");
            assert_eq!(format!("{:?}", written(Codec::Cbor, read(Codec::Cbor, answer))), text);
        }
    }
}
