//! The first step of a frame that a server gets: it decides whether the frame runs, is answered at once, or is refused.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::task::TaskTracker;

use super::allow::Caller;
use super::claims::Heard;
use super::dedup::Known;
use super::dispatch::Job;
use super::message::{Message, MessageEnd, Source};
use super::outcome::time_of_repeated;
use super::served_method::ServedMethod;
use super::through::Passage;
use super::turns::Turn;
use super::worker::Worker;
use crate::document::DRAIN;
use crate::error::{Code, Fault};
use crate::frame::{Frame, Kind};
use crate::limits::MAX_TIMEOUT;
use crate::middleware::NotAdmitted;
use crate::service::Answer;
use crate::topology::topic_matches;

/// How long a policy holds a oneway call if it does not say.
const HELD: Duration = Duration::from_millis(100);

/// A frame that goes on to run.
pub(super) enum Taken {
    /// It runs.
    Run(Job),
    /// It was delivered before. It runs if no other instance is running it.
    Ask(Job),
}

/// What is decided about a frame.
enum Decision {
    /// Its method runs.
    Run(Arc<ServedMethod>),
    /// It was delivered before. Its method runs if no other instance is running it.
    Ask(Arc<ServedMethod>),
    /// It gets this answer at once, without a handler.
    Answered(Answer),
    /// There is nothing to do: it was a cancel, for example, or has run before.
    Done,
    /// A middleware refuses this oneway call for now. It is tried again after a pause.
    NotNow(Fault),
    /// A policy holds this oneway call for so long, and is asked again then.
    Held(Arc<ServedMethod>, Duration),
    /// The same call is running already. This frame gets the same answer when that ends.
    Runs,
}

impl Worker {
    /// Gives out what is to run. Whatever else is to be done about a frame is seen to.
    pub(super) fn take(
        self: &Arc<Self>,
        frame: Frame,
        message: &Arc<Message>,
        turn: Option<Turn>,
        tasks: &TaskTracker,
    ) -> Option<Taken> {
        let passage = self.passage(&frame, message);
        let admitted = self.admit(&frame, message, passage.as_deref());
        match &admitted {
            Ok(Decision::Answered(answer)) => self.passed_by(passage.as_deref(), answer.into()),
            Err(fault) | Ok(Decision::NotNow(fault)) => self.passed_by(passage.as_deref(), fault.code.into()),
            Ok(_) => {}
        }
        let job = |frame: Frame, served, turn| {
            let deadline = deadline(&frame, message);
            Job { frame, served, deadline, message: message.clone(), passage, turn }
        };
        match admitted {
            Ok(Decision::Run(served)) => return Some(Taken::Run(job(frame, served, turn))),
            Ok(Decision::Ask(served)) => match self.runs(frame.id) {
                // Its reply is its answer.
                true if frame.kind == Kind::Request => message.finish(),
                true => drop(tasks.spawn(self.clone().hold_here(job(frame, served, turn)))),
                false => return Some(Taken::Ask(job(frame, served, turn))),
            },
            Ok(Decision::Answered(answer)) => {
                let time = time_of_repeated(&answer);
                #[cfg(feature = "metrics")]
                self.measures_repeated(&frame, &answer, message);
                self.answer(&frame, answer, time, message);
            }
            Ok(Decision::Done) => message.finish(),
            Ok(Decision::Runs) => {}
            Ok(Decision::Held(served, pause)) => {
                drop(tasks.spawn(self.clone().hold_back(job(frame, served, turn), pause)))
            }
            Ok(Decision::NotNow(fault)) => {
                drop(tasks.spawn(self.clone().refuse_for_now(frame, fault, message.clone(), turn)));
            }
            Err(fault) => drop(tasks.spawn(self.clone().refuse(frame, fault, message.clone()))),
        }
        None
    }

    /// Decides about a frame that waited: for another attempt of the same call, which ended without a result, or for its
    /// turn.
    pub(super) fn take_again(self: &Arc<Self>, frame: Frame, message: &Arc<Message>, turn: Option<Turn>) {
        let tasks = message.tasks();
        match self.take(frame, message, turn, tasks) {
            Some(Taken::Run(job)) => drop(tasks.spawn(self.clone().start_when_free(job, None))),
            Some(Taken::Ask(job)) => drop(tasks.spawn(self.clone().ask_first(vec![job]))),
            None => {}
        }
    }

    /// Holds a oneway call that a policy does not let run yet, and decides again about it. It waits here, so that no
    /// attempt is counted, and is given back if the server drains meanwhile.
    async fn hold_back(self: Arc<Self>, job: Job, pause: Duration) {
        tokio::select! {
            biased;
            () = self.site.draining.cancelled() => return self.give_back(job).await,
            () = self.leaves(job.message.source) => return self.give_back(job).await,
            () = tokio::time::sleep(pause) => {}
        }
        let Job { frame, message, turn, .. } = job;
        self.take_again(frame, &message, turn);
    }

    /// What is to be done about a frame; a fault for what must not run.
    fn admit(
        self: &Arc<Self>,
        frame: &Frame,
        message: &Arc<Message>,
        passage: Option<&Passage>,
    ) -> Result<Decision, Fault> {
        match (frame.kind, message.source) {
            // Who cancels no call asks whether there is an instance, and is answered by the broker.
            (Kind::Cancel, _) if frame.id.is_nil() => return Ok(Decision::Done),
            (Kind::Cancel, _) if self.taps.cancel(frame.id) => return Ok(Decision::Done),
            (Kind::Cancel, _) => {
                self.calls().cancel(frame.id, frame.metadata.remaining.unwrap_or_default());
                return Ok(Decision::Done);
            }
            (Kind::Locate, Source::Instance) => {
                self.locate(frame.id, message);
                return Ok(Decision::Done);
            }
            (Kind::KeepAlive | Kind::Reply, Source::Instance) => {
                let instance = frame.metadata.instance.clone().unwrap_or_default();
                let heard = match (frame.kind, frame.status) {
                    (Kind::KeepAlive, _) => Heard::Runs(instance),
                    (_, Code::Ok) => Heard::Ended(MessageEnd::Over),
                    (_, Code::Cancelled) => Heard::Ended(MessageEnd::Moved(frame.metadata.attempt())),
                    _ => Heard::Failed,
                };
                self.claims().hear(frame.id, &heard);
                return Ok(Decision::Done);
            }
            (Kind::Request, Source::Calls | Source::Instance) if message.reply_to.is_none() => {
                return Err(Fault::new(Code::InvalidArgument, "a request without `reply_to`: nobody can be answered"));
            }
            (Kind::Request, Source::Calls | Source::Instance)
            | (Kind::Oneway, Source::Instance)
            | (Kind::Event, Source::Events) => {}
            (kind, Source::Work) if (kind == Kind::Event) == self.id.is_group() && kind.is_kept() => {}
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
        if let Some(fault) = self.not_subscribed(name, message) {
            // Another instance may be of the release that wants it. One that keeps its order cannot wait for that.
            return if self.service.order.is_some() { Err(fault) } else { Ok(Decision::NotNow(fault)) };
        }
        if let Some(passage) = passage
            && let Err(NotAdmitted { fault, holds }) = self.middleware.admit(&passage.call, &passage.admitted)
        {
            match self.method(frame) {
                Some(served) if holds && frame.kind.is_kept() => {
                    return Ok(Decision::Held(served.clone(), fault.retry_after.unwrap_or(HELD)));
                }
                _ if message.source == Source::Work && fault.is_transient() => {
                    // One that was delivered before may be running, here or elsewhere. It is not published again, which
                    // would run it twice, but goes on as if it had been admitted: it was, at its first delivery.
                    if !message.redelivered {
                        return Ok(Decision::NotNow(fault));
                    }
                }
                _ => return Err(fault),
            }
        }
        let Some(served) = self.method(frame) else {
            if name == DRAIN && frame.kind == Kind::Request {
                return self.asked_to_drain(frame, message).map(Decision::Answered);
            }
            if let Some(answer) = self.about_itself(frame, message) {
                return Ok(Decision::Answered(answer));
            }
            let known: Vec<&str> = self.methods.keys().map(String::as_str).collect();
            let why = format!("`{}` has no method `{name}`: it has {}", self.name, known.join(", "));
            return Err(Fault::new(Code::Unimplemented, why));
        };
        if message.redelivered {
            served.counts.is_redelivered();
        }
        if served.method.dedup.is_some()
            && let Some(known) = self.recall(frame, message)
        {
            return match known {
                Known::Ended(answer) => {
                    served.counts.repeats();
                    let is_request = frame.kind == Kind::Request;
                    Ok(if is_request { Decision::Answered(answer) } else { Decision::Done })
                }
                Known::Runs => Ok(Decision::Runs),
                Known::Crowded => Err(crowded()),
            };
        }
        if message.redelivered && frame.kind.is_kept() && self.claims().is_done(frame, message.frames) {
            return Ok(Decision::Done);
        }
        // What may run twice is run at once, of a oneway call only what nobody runs now.
        let may_run_twice =
            message.source == Source::Events || (frame.kind == Kind::Request && served.method.idempotent);
        if message.redelivered && !may_run_twice {
            return Ok(Decision::Ask(served.clone()));
        }
        Ok(Decision::Run(served.clone()))
    }

    /// Checks that the frame names the method or event of its routing key. The broker's permissions are checked against
    /// the key, so a frame must not ask for something else.
    fn check_key(&self, frame: &Frame, message: &Message) -> Result<(), Fault> {
        let method = frame.metadata.method.as_deref();
        let agrees = match message.source {
            Source::Events => method.is_none_or(|method| method == message.key),
            Source::Work if message.exchange == self.site.namespace.events() => method == Some(&*message.key),
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

    /// Why an event is not for this instance, although its group's queue has it: it matches the pattern of an earlier or
    /// later release.
    fn not_subscribed(&self, key: &str, message: &Message) -> Option<Fault> {
        let pattern = self.service.pattern.as_deref().filter(|_| message.source == Source::Work)?;
        let why = || {
            let group = self.id.name();
            format!(
                "`{key}` does not match `{pattern}`, to which this instance of the group `{group}` subscribes: the group \
                 gets it by the pattern of another release, which `hopline groups unbind {group} PATTERN` ends"
            )
        };
        (!topic_matches(pattern, key)).then(|| Fault::new(Code::Unavailable, why()))
    }

    /// What is known about a call of a method with dedup. If the call is running, this delivery waits for its answer.
    fn recall(&self, frame: &Frame, message: &Arc<Message>) -> Option<Known> {
        self.dedup().recall(frame, message.user.as_ref(), || (frame.clone(), message.clone()))
    }
}

/// The fault for a delivery when too many others wait for the answer to the same call.
pub(super) fn crowded() -> Fault {
    Fault::new(Code::ResourceExhausted, "too many deliveries of this call wait for its answer already")
}

/// When nobody waits any more for the reply to a frame. `None` if it has no reply.
pub(super) fn deadline(frame: &Frame, message: &Message) -> Option<Instant> {
    let remaining = frame.metadata.remaining.filter(|_| frame.kind == Kind::Request);
    remaining.map(|remaining| message.received + remaining.min(MAX_TIMEOUT))
}
