//! The last step of a frame: it is answered, retried, requeued or made a dead letter. Then its message is acknowledged.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};
use uuid::Uuid;

use super::dispatch::Job;
use super::give_back::To;
use super::letter::{Letter, LetterCause};
use super::locate::Ended;
use super::message::{Message, MessageEnd, Source};
use super::reason::shortened;
use super::reply::{self, OutgoingReply};
use super::turns::Turn;
use super::worker::Worker;
use crate::codec::Codec;
use crate::error::{Code, EndOfCall, Fault, RefusedBy};
use crate::frame::{Frame, FrameError, Kind};
use crate::service::Answer;

/// The longest pause before another attempt of a oneway call that a fault can ask for. Calls leave the queue in which they
/// wait in order, so a longer one would hold up others.
const LONGEST_ASKED: Duration = Duration::from_secs(30);

/// How a job ended. It becomes a reply, a retry, a dead letter or nothing.
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

impl From<&Answer> for EndOfCall {
    fn from(answer: &Answer) -> Self {
        match answer {
            Answer::Result(_) => Self::Coded(Code::Ok),
            Answer::ServiceError(_) => Self::ServiceError,
            Answer::Fault(fault) => Self::Coded(fault.code),
        }
    }
}

impl Ending {
    /// How the call ended, as metrics and spans tell it. `None` if this is not its end, or is told elsewhere.
    pub(super) fn end_of_call(&self, job: &Job) -> Option<EndOfCall> {
        let given_up = || match job.deadline {
            Some(deadline) if deadline <= Instant::now() => EndOfCall::Coded(Code::DeadlineExceeded),
            _ => EndOfCall::Coded(Code::Cancelled),
        };
        Some(match self {
            Self::Answered(answer, _) | Self::Recalled(answer) => answer.into(),
            Self::TimedOut => EndOfCall::Coded(Code::DeadlineExceeded),
            Self::Unheard(_) => given_up(),
            // It comes again.
            Self::Forgotten if job.message.is_taken_back() => return None,
            Self::Forgotten => given_up(),
            // The one is told where it is refused, the other when the delivery ends that runs.
            Self::Refused(_) | Self::Runs => return None,
        })
    }
}

/// The fault of a call whose deadline passed while its handler ran.
pub(super) fn timed_out() -> Fault {
    Fault::new(Code::DeadlineExceeded, "the deadline passed while it ran")
}

/// The time in a reply that repeats an answer, for which no handler has run. A fault without a time says that the call has
/// not run at all, so one that is repeated has the time 0.
pub(super) fn time_of_repeated(answer: &Answer) -> Option<Duration> {
    matches!(answer, Answer::Fault(_)).then_some(Duration::ZERO)
}

impl Worker {
    /// Does what the end of a job asks for: replies, tells other deliveries of the same call, and acknowledges the
    /// message once the broker has the reply.
    pub(super) fn conclude(self: &Arc<Self>, job: Job, ending: Ending, tasks: &TaskTracker) {
        self.passed(&job, &ending);
        #[cfg(feature = "metrics")]
        self.measures(&job, &ending);
        let Job { frame, message, served, turn, .. } = job;
        let dedup = served.method.dedup;
        let heard = !matches!(ending, Ending::Unheard(_));
        let has_run = matches!(ending, Ending::Answered(..)) && message.source == Source::Work;
        let ended = has_run.then(|| Ended::of(self, frame.id));
        let (answer, time) = match ending {
            Ending::Runs => return,
            Ending::Recalled(answer) => {
                let time = time_of_repeated(&answer);
                return self.tell(frame, answer, time, message, (None, turn), tasks);
            }
            Ending::Refused(fault) => {
                let user = message.user.as_ref();
                let waiting = dedup.map(|window| self.dedup().end(&frame, user, None, window)).unwrap_or_default();
                for (other, waits) in waiting {
                    match other.id == frame.id {
                        true => drop(tasks.spawn(self.clone().refuse(other, fault.clone(), waits))),
                        false => self.take_again(other, &waits, None),
                    }
                }
                tasks.spawn(self.clone().refuse(frame, fault, message));
                return;
            }
            Ending::Forgotten => (None, None),
            Ending::Unheard(answer) => (Some(answer), None),
            Ending::Answered(answer, time) => (Some(answer), Some(time)),
            Ending::TimedOut => (Some(Answer::Fault(timed_out())), None),
        };
        if let Some(window) = dedup {
            // A oneway call that failed is to run again.
            let remembered = |answer: &&Answer| frame.kind == Kind::Request || matches!(answer, Answer::Result(_));
            let remembered = answer.as_ref().filter(remembered).cloned();
            let waiting = self.dedup().end(&frame, message.user.as_ref(), remembered, window);
            for (other, waits) in waiting {
                match &answer {
                    // Its caller has given up the one that ran, or makes another attempt when one fails.
                    None | Some(Answer::Fault(_)) if other.id != frame.id => self.take_again(other, &waits, None),
                    Some(answer) => {
                        served.counts.repeats();
                        self.tell(other, answer.clone(), time_of_repeated(answer), waits, (None, None), tasks);
                    }
                    None => waits.finish(),
                }
            }
        }
        match answer {
            Some(answer) if heard => self.tell(frame, answer, time, message, (ended, turn), tasks),
            Some(_) | None => message.finish(),
        }
    }

    /// Answers one delivery of a call that ended with `answer`. `ended` is set if it is a oneway call that ran here, and its
    /// turn if it is an event in order.
    fn tell(
        self: &Arc<Self>,
        frame: Frame,
        answer: Answer,
        time: Option<Duration>,
        message: Arc<Message>,
        (ended, turn): (Option<Ended>, Option<Turn>),
        tasks: &TaskTracker,
    ) {
        match (frame.kind, answer) {
            (Kind::Request, answer) => self.answer(&frame, answer, time, &message),
            (_, Answer::Result(_)) => self.done(frame.id, MessageEnd::Over, &message),
            (_, failure) => {
                let worker = self.clone();
                tasks.spawn(async move {
                    match failure {
                        Answer::Fault(fault) if matches!(fault.code, Code::InvalidArgument | Code::Unimplemented) => {
                            worker.turn_away(frame, fault, message).await;
                        }
                        failure => worker.failed(frame, failure, message, turn).await,
                    }
                    drop(ended);
                });
            }
        }
    }

    /// Sends a reply. The broker confirms the reply before its request is acknowledged.
    pub(super) fn reply(
        &self,
        id: Uuid,
        codec: Codec,
        answer: Answer,
        handler_time: Option<Duration>,
        message: &Arc<Message>,
    ) {
        self.post(
            OutgoingReply { id, codec, instance: &self.site.instance, compression: None, handler_time, running: None },
            answer,
            message,
        );
    }

    /// Tells a caller that its call is still running here.
    pub(super) fn keep_alive(&self, id: Uuid, message: &Message) {
        self.site.replies.keep_alive(id, reply::keep_alive(id, &self.site.instance), message);
    }

    /// Sends a reply to `request`, compressed if the caller can read that.
    pub(super) fn answer(&self, request: &Frame, answer: Answer, time: Option<Duration>, message: &Arc<Message>) {
        let Frame { id, codec, .. } = *request;
        let compression = self.site.compression.filter(|compression| request.metadata.accepts.includes(*compression));
        let running = (message.source == Source::Instance)
            .then(|| self.all_methods().map(|served| served.counts.running()).sum());
        let reply =
            OutgoingReply { id, codec, instance: &self.site.instance, compression, handler_time: time, running };
        self.post(reply, answer, message);
    }

    fn post(&self, reply: OutgoingReply<'_>, answer: Answer, message: &Arc<Message>) {
        let body = reply.body(answer, self.site.max_size);
        self.site.replies.post(reply.id, reply.codec, body, message);
    }

    /// Sees to a failed attempt of a oneway call, or of a group's event. It is retried after a pause, in which it waits at
    /// the broker and takes no place here; an event in order waits here, and keeps its turn. After the last attempt it
    /// becomes a dead letter with the reason. The broker's own delivery limit would do that without a reason.
    async fn failed(self: Arc<Self>, mut frame: Frame, failure: Answer, message: Arc<Message>, turn: Option<Turn>) {
        let attempt = message.attempt(&frame);
        let (method, caller) = (frame.metadata.method.as_deref(), frame.metadata.instance.as_deref());
        let own = "the method returned its own error";
        let (why, reason) = match &failure {
            Answer::Fault(fault) => (shortened(fault.reason()), fault.reason().into()),
            // It may be private: for those who see the call's arguments too, and not for the log.
            Answer::ServiceError(body) => match frame.codec.decode::<serde_json::Value>(body.payload()) {
                Ok(error) => (own, Cow::from(format!("{own}: {error}"))),
                Err(_) => (own, own.into()),
            },
            Answer::Result(_) => (own, own.into()),
        };
        match message.source {
            Source::Work => {}
            Source::Events => {
                let pattern = self.service.pattern.as_deref();
                warn!(key = message.key, pattern, id = %frame.id, caller, reason = why, "an event's handler failed");
                return message.finish();
            }
            Source::Instance | Source::Calls => {
                warn!(service = %self.name, method, id = %frame.id, caller, reason = why, "a oneway call to this instance, or to all, failed: it is not tried again");
                return message.finish();
            }
        }
        let retry = self.method(&frame).map(|served| served.method.retry).unwrap_or_default();
        let Some(pause) = retry.pause_after(attempt) else {
            let cause = LetterCause::Failed;
            return self.dead_letter(Letter { why, cause, ..letter(&frame, &reason, &message) }, &message).await;
        };
        let asked = if let Answer::Fault(fault) = &failure { fault.retry_after } else { None };
        let pause = asked.map_or(pause, |asked| pause.max(asked.min(LONGEST_ASKED)));
        let what = if frame.kind == Kind::Event { "an event's handler" } else { "a oneway call" };
        if attempt == 1 {
            warn!(service = %self.name, method, id = %frame.id, caller, attempt, reason = why, ?pause, "{what} failed: it is tried again");
        } else {
            debug!(service = %self.name, method, id = %frame.id, caller, attempt, reason = why, ?pause, "{what} failed once more: it is tried again");
        }
        // Who has another delivery of it tries it again.
        if self.hand_over(frame.id, &message) {
            return message.finish();
        }
        if turn.is_some() {
            tokio::select! {
                biased;
                () = self.site.draining.cancelled() => return,
                () = tokio::time::sleep(pause) => {}
            }
            frame.metadata.more_mut().attempt = Some(frame.metadata.attempt() + 1);
            return self.take_again(frame, &message, turn);
        }
        // As a new message: its neighbours are not to run again with it, and the broker's own limit, which is for calls that
        // kill their instances, is not to end it.
        frame.metadata.more_mut().attempt = Some(attempt + 1);
        let to = if pause.is_zero() { To::Work } else { To::Retry(pause) };
        self.publish_again(&frame, to, &message).await;
    }

    /// Logs the fault of a request. The caller is told, so this is logged at the level debug only.
    pub(super) fn log_fault(&self, request: &Frame, fault: &Fault) {
        let (service, method) = (&self.name, request.metadata.method.as_deref());
        let (caller, why) = (request.metadata.instance.as_deref(), shortened(fault.reason()));
        debug!(%service, method, id = %request.id, caller, code = ?fault.code, reason = why, "a call failed: its caller is told");
    }

    /// Sees to a oneway call that a middleware refuses for now: it is tried again, as after an error of its handler.
    pub(super) async fn refuse_for_now(
        self: Arc<Self>,
        frame: Frame,
        fault: Fault,
        message: Arc<Message>,
        turn: Option<Turn>,
    ) {
        self.count_refused(&frame, fault.refused_by);
        #[cfg(feature = "metrics")]
        self.measures_refused(&frame, fault.code, &message);
        self.failed(frame, Answer::Fault(fault), message, turn).await;
    }

    /// Sees to a frame that must not run.
    pub(super) async fn refuse(self: Arc<Self>, frame: Frame, fault: Fault, message: Arc<Message>) {
        self.count_refused(&frame, fault.refused_by);
        #[cfg(feature = "metrics")]
        self.measures_refused(&frame, fault.code, &message);
        self.turn_away(frame, fault, message).await;
    }

    /// Sees to a frame that must not run, or not again. Its caller gets the fault. If nobody waits for a reply, it becomes a
    /// dead letter.
    async fn turn_away(self: Arc<Self>, frame: Frame, fault: Fault, message: Arc<Message>) {
        match (&message.reply_to, frame.kind) {
            (Some(_), kind) if !kind.is_kept() => {
                self.log_fault(&frame, &fault);
                self.reply(frame.id, frame.codec, Answer::Fault(fault), None, &message);
            }
            _ => self.dead_letter(letter(&frame, fault.reason(), &message), &message).await,
        }
    }

    fn count_refused(&self, frame: &Frame, by: RefusedBy) {
        self.calls().refused += 1;
        match self.method(frame) {
            Some(served) => served.counts.refuses(by),
            #[cfg(feature = "metrics")]
            None => self.measured.refuses(by),
            #[cfg(not(feature = "metrics"))]
            None => {}
        }
    }

    /// Sees to a frame that cannot be read, and to the rest of its message.
    pub(super) async fn refuse_rest(self: Arc<Self>, error: FrameError, message: Arc<Message>) {
        self.calls().malformed += 1;
        let named = message.properties.correlation_id.as_deref().and_then(|text| text.parse().ok());
        match (&message.reply_to, error.id.or(named)) {
            (Some(_), Some(id)) => {
                debug!(service = %self.name, %id, %error, "a message that cannot be read: its sender is told");
                let fault = Fault::new(error.code, error.to_string());
                self.reply(id, Codec::Cbor, Answer::Fault(fault), None, &message);
            }
            (_, id) => {
                let reason = error.to_string();
                let letter = Letter {
                    cause: LetterCause::Malformed,
                    body: message.body.slice(error.frame..),
                    reason: &reason,
                    why: &reason,
                    id: id.unwrap_or_else(Uuid::new_v4),
                    method: None,
                    caller: message.properties.app_id.as_deref(),
                    attempts: u64::from(message.failures) + 1,
                };
                self.dead_letter(letter, &message).await;
            }
        }
    }
}

/// A frame as a dead letter.
fn letter<'a>(frame: &'a Frame, reason: &'a str, message: &Message) -> Letter<'a> {
    let method = frame.metadata.method.as_deref();
    let mut kept = frame.clone();
    if kept.metadata.more().attempt.is_some() {
        // Of the letter's headers one tells.
        kept.metadata.more_mut().attempt = None;
    }
    let caller = frame.metadata.instance.as_deref();
    let (id, attempts) = (frame.id, message.attempt(frame));
    Letter { cause: LetterCause::Refused, body: kept.to_body(), reason, why: reason, id, method, caller, attempts }
}
