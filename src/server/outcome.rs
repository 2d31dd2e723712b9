//! What becomes of a frame: answered, given back, counted as failed or kept for an operator; then settled.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;
use tokio_util::task::TaskTracker;
use tracing::{error, warn};
use uuid::Uuid;

use super::letter::Letter;
use super::message::{Message, Source};
use super::worker::{Ending, Job, Worker};
use crate::codec::Codec;
use crate::compression::{Compression, Readable};
use crate::error::{Code, Fault};
use crate::frame::{self, CONTENT_TYPE, Frame, FrameError, Kind, Metadata};
use crate::service::Answer;
use crate::topology::{ONEWAY_DELIVERIES, header};
use crate::transport::{ANSWER_TIMEOUT, Confirm, Lost, Properties, Publication, Settle};

/// How much of a reason is told, in bytes.
const MAX_REASON: usize = 4096;
/// How long what is published again waits for room in its queue before there is another way out, and how often it looks.
const PATIENCE: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(20);
/// How often what cannot be settled otherwise is published on a channel that ends each time.
const MAX_TRIES: u32 = 10;
/// How many failed attempts the broker counts of a oneway call before it is published anew, for the broker to count from
/// there: its own limit is for calls that kill their instances, and is not to end one that may still be tried.
const MAX_FAILURES: u32 = ONEWAY_DELIVERIES / 2;

impl Worker {
    /// Answers, and settles once the broker has the answer.
    pub(super) fn conclude(self: &Arc<Self>, job: Job, ending: Ending, tasks: &TaskTracker) {
        let Job { frame, message, dedup, .. } = job;
        let heard = !matches!(ending, Ending::Unheard(_));
        let (answer, time) = match ending {
            Ending::Runs => return,
            Ending::Recalled(answer) => return self.tell(frame, answer, None, message, tasks),
            Ending::Refused(fault) => {
                let others = dedup.map(|window| self.dedup().end(&frame, None, window)).unwrap_or_default();
                for (frame, message) in others.into_iter().chain([(frame, message)]) {
                    tasks.spawn(self.clone().refuse(frame, fault.clone(), message));
                }
                return;
            }
            Ending::Forgotten => (None, None),
            Ending::Unheard(answer) => (Some(answer), None),
            Ending::Answered(answer, time) => (Some(answer), Some(time)),
            Ending::TimedOut => {
                (Some(Answer::Fault(Fault::new(Code::DeadlineExceeded, "the deadline passed while it ran"))), None)
            }
        };
        if let Some(window) = dedup {
            // An oneway call that failed is to run again.
            let remembered = |answer: &&Answer| frame.kind == Kind::Request || matches!(answer, Answer::Result(_));
            let remembered = answer.as_ref().filter(remembered).cloned();
            let waiting = self.dedup().end(&frame, remembered, window);
            for (frame, message) in waiting {
                match answer.clone() {
                    Some(answer) => self.tell(frame, answer, None, message, tasks),
                    None => message.finish(),
                }
            }
        }
        match answer {
            Some(answer) if heard => self.tell(frame, answer, time, message, tasks),
            Some(_) | None => message.finish(),
        }
    }

    /// What becomes of a delivery of a call that ended with `answer`.
    fn tell(
        self: &Arc<Self>,
        frame: Frame,
        answer: Answer,
        time: Option<Duration>,
        message: Arc<Message>,
        tasks: &TaskTracker,
    ) {
        match (frame.kind, answer) {
            (Kind::Request, answer) => self.answer(&frame, answer, time, &message),
            (_, Answer::Result(_)) => message.finish(),
            (_, Answer::Fault(fault)) if matches!(fault.code, Code::InvalidArgument | Code::Unimplemented) => {
                tasks.spawn(self.clone().refuse(frame, fault, message));
            }
            (_, failure) => drop(tasks.spawn(self.clone().failed(frame, failure, message))),
        }
    }

    /// Puts a reply on its way. Its request is settled once the broker has it.
    pub(super) fn reply(
        &self,
        id: Uuid,
        codec: Codec,
        answer: Answer,
        handler_time: Option<Duration>,
        message: &Arc<Message>,
    ) {
        self.site.replies.post(id, codec, self.reply_body(id, codec, None, answer, handler_time), message);
    }

    /// Tells a caller that its call still runs here.
    pub(super) fn keep_alive(&self, id: Uuid, message: &Message) {
        let frame = Frame { kind: Kind::KeepAlive, ..reply_frame(id, Codec::Raw, &self.site.instance) };
        self.site.replies.keep_alive(id, frame.to_body(), message);
    }

    /// The same, compressed if the caller can read it.
    pub(super) fn answer(&self, request: &Frame, answer: Answer, time: Option<Duration>, message: &Arc<Message>) {
        let Frame { id, codec, .. } = *request;
        let compression = self.site.compression.filter(|compression| request.metadata.accepts.includes(*compression));
        self.site.replies.post(id, codec, self.reply_body(id, codec, compression, answer, time), message);
    }

    fn reply_body(
        &self,
        id: Uuid,
        codec: Codec,
        compression: Option<Compression>,
        answer: Answer,
        handler_time: Option<Duration>,
    ) -> Bytes {
        let mut reply = reply_frame(id, codec, &self.site.instance);
        reply.metadata.handler_time = handler_time;
        match answer {
            Answer::Result(payload) => reply.payload = payload.into(),
            Answer::ServiceError(payload) => {
                (reply.status, reply.service_error, reply.payload) = (Code::Unknown, true, payload.into());
            }
            Answer::Fault(fault) => {
                reply.status = fault.code;
                reply.metadata.more_mut().error = Some(shortened(&fault.message).to_owned());
                reply.metadata.more_mut().retry_after = fault.retry_after;
            }
        }
        let body = reply.to_body();
        let body = match compression {
            Some(compression) => frame::compressed(body, compression),
            None => body,
        };
        match body.len() {
            size if size > self.site.max_size => too_large(id, codec, &self.site.instance, size, self.site.max_size),
            _ => body,
        }
    }

    /// A failed attempt of an oneway call: it is tried again after a pause, which holds no place among the calls that
    /// run, but one of the prefetch. After the last attempt it is kept for an operator: the broker, at its own limit,
    /// would do the same, but without the reason.
    async fn failed(self: Arc<Self>, mut frame: Frame, failure: Answer, message: Arc<Message>) {
        let attempt = message.attempt(&frame);
        let own = "the method returned its own error";
        let (why, reason) = match &failure {
            Answer::Fault(fault) => (shortened(fault.reason()), fault.reason().into()),
            // It may be private: for those who see the call's arguments too, and not for the log.
            Answer::ServiceError(payload) => match frame.codec.decode::<serde_json::Value>(payload) {
                Ok(error) => (own, Cow::from(format!("{own}: {error}"))),
                Err(_) => (own, own.into()),
            },
            Answer::Result(_) => (own, own.into()),
        };
        warn!(service = %self.name, method = frame.metadata.method.as_deref(), id = %frame.id, attempt, why, "a oneway call or event failed");
        if message.source != Source::Work {
            return message.finish();
        }
        let retry = self.method(&frame).map(|method| method.retry).unwrap_or_default();
        let Some(pause) = retry.pause_after(attempt) else {
            return self.dead_letter(letter(&frame, &reason, &message), &message).await;
        };
        tokio::select! {
            () = self.site.draining.cancelled() => {}
            () = tokio::time::sleep(pause) => {}
        }
        if message.frames == 1 && message.failures < MAX_FAILURES {
            return message.settle(Settle::Failed);
        }
        // Its neighbours are not to run again with it.
        frame.metadata.more_mut().attempt = Some(attempt + 1);
        self.publish_again(&frame, self.site.namespace.work_queue(&self.name), &message).await;
    }

    /// Sees to a frame that must not run: the caller is told, or the frame is kept for an operator.
    pub(super) async fn refuse(self: Arc<Self>, frame: Frame, fault: Fault, message: Arc<Message>) {
        self.calls().refused += 1;
        match (&message.reply_to, frame.kind) {
            (Some(_), kind) if kind != Kind::Oneway => {
                self.reply(frame.id, frame.codec, Answer::Fault(fault), None, &message);
            }
            _ => self.dead_letter(letter(&frame, fault.reason(), &message), &message).await,
        }
    }

    /// Sees to what is left of a body after a frame that cannot be read.
    pub(super) async fn refuse_rest(self: Arc<Self>, error: FrameError, message: Arc<Message>) {
        self.calls().malformed += 1;
        let named = message.properties.correlation_id.as_deref().and_then(|text| text.parse().ok());
        match (&message.reply_to, error.id.or(named)) {
            (Some(_), Some(id)) => {
                let fault = Fault::new(error.code, error.to_string());
                self.reply(id, Codec::Cbor, Answer::Fault(fault), None, &message);
            }
            (_, id) => {
                let letter = Letter {
                    body: message.body.slice(error.frame..),
                    reason: &error.to_string(),
                    id: id.unwrap_or_else(Uuid::new_v4),
                    method: None,
                    attempts: u64::from(message.failures) + 1,
                };
                self.dead_letter(letter, &message).await;
            }
        }
    }

    /// Keeps what nobody can be told about where an operator finds it.
    async fn dead_letter(&self, letter: Letter<'_>, message: &Message) {
        let reason = shortened(letter.reason);
        warn!(service = %self.name, id = %letter.id, reason, "a message that cannot be handled");
        // Each subscriber has a copy of an event: the publisher's mistake is not kept by each of them.
        if message.source == Source::Events {
            return message.finish();
        }
        let properties = Properties {
            persistent: true,
            correlation_id: message.properties.correlation_id.clone(),
            reply_to: message.properties.reply_to.clone(),
            headers: letter.headers(&self.site.instance, message),
            ..self.properties(message.properties.kind.clone())
        };
        let publication = Publication {
            exchange: self.site.namespace.dead(),
            key: self.name.to_string(),
            mandatory: true,
            properties,
            body: letter.body,
        };
        let mut tries = 0;
        loop {
            tries += 1;
            match message.transport.publish(publication.clone()).await {
                Ok(Confirm::Accepted) => message.finish(),
                // A user that may not publish there has its channel closed each time.
                Err(lost) if lost.connected && tries < MAX_TRIES => {
                    tokio::time::sleep(PAUSE * tries).await;
                    continue;
                }
                Ok(Confirm::Returned | Confirm::Refused | Confirm::TooLarge(_)) | Err(Lost { connected: true, .. }) => {
                    error!(service = %self.name, reason, "the queue of dead letters does not take a message: it is dropped");
                    // Its neighbours are not to be dropped with it.
                    if message.frames == 1 { message.settle(Settle::Discard) } else { message.finish() }
                }
                Err(lost) => {
                    warn!(service = %self.name, reason = %lost.reason, "a dead letter was lost with its connection");
                }
            }
            return;
        }
    }

    /// Sees to a job that has not started when the server drains.
    pub(super) async fn give_back(self: Arc<Self>, job: Job) {
        let Job { mut frame, deadline, message, .. } = job;
        // What is published again has to carry on what the broker counts.
        if message.failures > 0 {
            frame.metadata.more_mut().attempt = Some(message.attempt(&frame));
        }
        match message.source {
            Source::Calls => {
                frame.metadata.remaining = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
                if !self.publish_again(&frame, self.site.namespace.calls_queue(&self.name), &message).await {
                    self.unavailable(&frame, &message);
                }
            }
            Source::Work if message.frames == 1 => message.settle(Settle::GiveBack),
            Source::Work => _ = self.publish_again(&frame, self.site.namespace.work_queue(&self.name), &message).await,
            Source::Instance if frame.kind == Kind::Request => self.unavailable(&frame, &message),
            Source::Instance | Source::Events => message.finish(),
        }
    }

    fn unavailable(&self, frame: &Frame, message: &Arc<Message>) {
        let why = format!("instance {} is shutting down: the call did not run", self.site.instance);
        let answer = Answer::Fault(Fault::new(Code::Unavailable, why));
        self.reply(frame.id, frame.codec, answer, None, message);
    }

    /// Publishes a frame again to the queue that it came from, and is done with it once the broker has it: there it is
    /// new, while a requeue would mark it as perhaps run. Tells whether the frame is seen to: not if the queue stays
    /// full and the frame is a call.
    async fn publish_again(&self, frame: &Frame, queue: String, message: &Arc<Message>) -> bool {
        let remaining = frame.metadata.remaining.or(message.properties.expiration);
        let body = frame.to_body();
        // From here on the message carries this server's name.
        let mut headers = message.properties.headers.clone();
        // Handlers see no headers, and what a peer has filled them with has to fit into a frame with what is added.
        headers.retain(|(name, value)| {
            name.starts_with("x-hopline-") && name != header::USER && value.len() <= MAX_REASON
        });
        headers.push((header::USER.to_owned(), message.user.as_deref().unwrap_or_default().to_owned()));
        let patience = Instant::now() + remaining.unwrap_or(PATIENCE).min(PATIENCE);
        // Given back as a whole, a message would run its other oneway calls again. A server that is to end does so still.
        let shared = frame.kind == Kind::Oneway && message.frames > 1;
        let waits = || Instant::now() < patience || (shared && !self.site.draining.is_cancelled());
        let may_repeat = frame.idempotent || frame.kind == Kind::Oneway;
        let mut tries = 0;
        loop {
            tries += 1;
            let publication = Publication {
                exchange: String::new(),
                key: queue.clone(),
                mandatory: true,
                properties: Properties {
                    expiration: remaining,
                    headers: headers.clone(),
                    ..message.properties.clone()
                },
                body: body.clone(),
            };
            let confirm = tokio::select! {
                biased;
                confirm = message.transport.publish(publication) => confirm,
                lost = self.unanswered() => Err(lost),
            };
            match confirm {
                Ok(Confirm::Accepted) => {
                    message.finish();
                    return true;
                }
                // The others are at it: there will be room.
                Ok(Confirm::Refused) if waits() => tokio::time::sleep(PAUSE).await,
                Err(lost) if lost.connected && (!lost.handed_over || may_repeat) && waits() && tries < MAX_TRIES => {
                    tokio::time::sleep(PAUSE * tries).await;
                }
                // It may be in the queue.
                Err(lost) if lost.connected && lost.handed_over && frame.kind == Kind::Request => {
                    let why = format!(
                        "instance {} was shutting down and gave the call back: it may have run",
                        self.site.instance
                    );
                    self.reply(frame.id, frame.codec, Answer::Fault(Fault::new(Code::Aborted, why)), None, message);
                    return true;
                }
                Ok(_) | Err(Lost { connected: true, .. }) if frame.kind == Kind::Request => return false,
                // Back to the queue's head then, at the price of being marked.
                Ok(_) | Err(_) => {
                    message.settle(Settle::GiveBack);
                    return true;
                }
            }
        }
    }

    /// The end of a publication that the broker does not answer, as a quorum queue without its majority does not: a server
    /// that is to end does not wait for it.
    async fn unanswered(&self) -> Lost {
        self.site.draining.cancelled().await;
        tokio::time::sleep(ANSWER_TIMEOUT).await;
        let reason = format!("the broker gave no answer within {ANSWER_TIMEOUT:?}").into();
        Lost { handed_over: true, connected: true, reason }
    }

    fn properties(&self, kind: Option<String>) -> Properties {
        Properties {
            kind,
            content_type: Some(CONTENT_TYPE.to_owned()),
            app_id: Some(self.site.instance.to_string()),
            ..Properties::default()
        }
    }
}

/// In place of a reply over a cap, ours or the broker's.
pub(super) fn too_large(id: Uuid, codec: Codec, instance: &Arc<str>, size: usize, limit: usize) -> Bytes {
    let mut reply = reply_frame(id, codec, instance);
    reply.status = Code::ResourceExhausted;
    reply.metadata.more_mut().error = Some(format!("the reply takes {size} bytes, over the cap of {limit}"));
    reply.metadata.more_mut().too_large = Some((size as u64, limit as u64));
    reply.to_body()
}

fn reply_frame(id: Uuid, codec: Codec, instance: &Arc<str>) -> Frame {
    let metadata = Metadata { instance: Some(instance.clone()), accepts: Readable::HERE, ..Metadata::default() };
    Frame::new(Kind::Reply, id, codec, metadata, Bytes::new())
}

fn letter<'a>(frame: &'a Frame, reason: &'a str, message: &Message) -> Letter<'a> {
    let method = frame.metadata.method.as_deref();
    Letter { body: frame.to_body(), reason, id: frame.id, method, attempts: message.attempt(frame) }
}

/// A reason's first part: it may quote what the peer sent, and has to fit into metadata and into an AMQP header.
pub(super) fn shortened(reason: &str) -> &str {
    cut(reason, MAX_REASON)
}

/// As many whole letters of a text as fit into so many bytes.
pub(super) fn cut(text: &str, bytes: usize) -> &str {
    let end = (0..=text.len().min(bytes)).rev().find(|end| text.is_char_boundary(*end));
    &text[..end.unwrap_or_default()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::Server;
    use crate::service::Service;
    use crate::topology::{Declaration, Queue, QueueKind, ServiceId};
    use crate::transport::{Mode, Role, Transport};

    #[tokio::test(start_paused = true)]
    async fn a_oneway_call_that_finds_no_room_goes_back_with_its_message_once_the_server_drains() {
        let url = format!("memory://{}", Uuid::new_v4());
        let running = Server::connect(&url).await.expect("in memory").start().await.expect("it serves nothing");
        let service = Service::new("work", 1);
        let id = ServiceId::parse("work").expect("a name");
        let worker = Arc::new(Worker::new(&id, service, running.site.clone()).expect("no threads of its own"));

        let transport = Transport::connect(&url, Role::Client).await.expect("in memory");
        let full = Queue { max_length: Some(0), ..Queue::new("full", QueueKind::Classic) };
        let parts = [full, Queue::new("work", QueueKind::Classic)].map(Declaration::Queue);
        transport.declare(&parts).await.expect("new queues");
        let publication = Publication {
            exchange: String::new(),
            key: "work".to_owned(),
            mandatory: true,
            properties: Properties::default(),
            body: Bytes::new(),
        };
        assert_eq!(transport.publish(publication).await, Ok(Confirm::Accepted));
        let mut work = transport.consume("work", Mode::Settle { prefetch: 1 }).await.expect("it is there");
        let delivery = work.next().await.expect("a message");

        let message = Message::new(delivery, transport.clone(), Source::Work, 2, TaskTracker::new().token());
        let frame = Frame::new(Kind::Oneway, Uuid::new_v4(), Codec::Cbor, Metadata::default(), Bytes::new());
        let publishing = tokio::spawn(async move {
            worker.publish_again(&frame, "full".to_owned(), &Arc::new(message)).await;
        });
        tokio::time::sleep(100 * PATIENCE).await;
        assert!(!publishing.is_finished(), "its neighbours are not to run again without need");
        running.site.draining.cancel();
        tokio::time::timeout(2 * PATIENCE, publishing).await.expect("it gives up").expect("no panic");
        assert!(work.next().await.expect("the message again").redelivered);
    }
}
