//! What becomes of a frame: answered, given back, counted as failed or kept for an operator; then settled.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;
use tracing::{debug, error, warn};
use uuid::Uuid;

use super::message::{Message, Source};
use super::worker::{Ending, Job, Worker};
use crate::codec::Codec;
use crate::error::{Code, Fault};
use crate::frame::{CONTENT_TYPE, Frame, FrameError, Kind, Metadata};
use crate::service::Answer;
use crate::transport::{Confirm, Properties, Publication, Settle};

/// How much of a reason is told, in bytes.
const MAX_REASON: usize = 4096;

impl Worker {
    /// Answers, and settles once the broker has the answer.
    pub(super) async fn conclude(self: Arc<Self>, job: Job, ending: Ending) {
        let Job { frame, message, .. } = job;
        let (answer, time) = match ending {
            Ending::Forgotten => return message.finish(),
            Ending::Answered(answer, time) => (answer, Some(time)),
            Ending::TimedOut => {
                (Answer::Fault(Fault::new(Code::DeadlineExceeded, "the deadline passed while it ran")), None)
            }
        };
        match (frame.kind, answer) {
            (Kind::Request, answer) => self.reply(frame.id, frame.codec, answer, time, &message).await,
            (_, Answer::Result(_)) => message.finish(),
            (_, Answer::Fault(fault)) if matches!(fault.code, Code::InvalidArgument | Code::Unimplemented) => {
                self.refuse(frame, fault, message).await;
            }
            (_, failure) => self.failed(frame, &failure, &message).await,
        }
    }

    /// Answers a frame that needed no handler.
    pub(super) async fn answer(self: Arc<Self>, frame: Frame, answer: Answer, message: Arc<Message>) {
        self.reply(frame.id, frame.codec, answer, None, &message).await;
    }

    /// Publishes a reply; it does not wait for the broker's confirm, but the request's settlement does.
    async fn reply(&self, id: Uuid, codec: Codec, answer: Answer, handler_time: Option<Duration>, message: &Message) {
        let body = self.reply_body(id, codec, answer, handler_time);
        let properties = Properties {
            correlation_id: message.properties.correlation_id.clone(),
            ..self.properties(message.properties.kind.clone())
        };
        let key = message.properties.reply_to.clone().unwrap_or_default();
        let publication = Publication { exchange: String::new(), key, mandatory: true, properties, body };
        match self.site.transport.publish(publication).await {
            Ok(Confirm::Accepted | Confirm::Refused) => message.finish(),
            Ok(Confirm::Returned) => {
                debug!(service = %self.name, %id, "the caller has gone");
                message.finish();
            }
            // Unsettled, the request goes back to its queue with the connection.
            Err(lost) => {
                warn!(service = %self.name, %id, reason = %lost.reason, "a reply was lost with its connection")
            }
        }
    }

    fn reply_body(&self, id: Uuid, codec: Codec, answer: Answer, handler_time: Option<Duration>) -> Bytes {
        let metadata = Metadata { instance: Some(self.site.instance.to_string()), handler_time, ..Metadata::default() };
        let reply = |payload: Vec<u8>| Frame::new(Kind::Reply, id, codec, metadata.clone(), payload.into());
        let faulty = |fault: Fault, too_large| {
            let metadata = Metadata {
                error: Some(shortened(&fault.message).to_owned()),
                retry_after: fault.retry_after,
                too_large,
                ..metadata.clone()
            };
            Frame { status: fault.code, metadata, ..reply(Vec::new()) }
        };
        let frame = match answer {
            Answer::Result(payload) => reply(payload),
            Answer::ServiceError(payload) => Frame { status: Code::Unknown, service_error: true, ..reply(payload) },
            Answer::Fault(fault) => faulty(fault, None),
        };
        let body = frame.to_body();
        if body.len() <= self.site.max_size {
            return body;
        }
        let why = format!("the reply takes {} bytes, over the cap of {}", body.len(), self.site.max_size);
        faulty(Fault::new(Code::ResourceExhausted, why), Some((body.len() as u64, self.site.max_size as u64))).to_body()
    }

    /// A failed attempt of an oneway call: the broker counts it and delivers again, up to its limit.
    async fn failed(&self, frame: Frame, failure: &Answer, message: &Message) {
        warn!(service = %self.name, method = frame.metadata.method, id = %frame.id, ?failure, "an oneway call or event failed");
        match message.source {
            Source::Work if message.frames == 1 => message.settle(Settle::Failed),
            // Its neighbours are not to run again with it.
            Source::Work => self.publish_again(&frame, message).await,
            Source::Calls | Source::Instance | Source::Events => message.finish(),
        }
    }

    /// Sees to a frame that must not run: the caller is told, or the frame is kept for an operator.
    pub(super) async fn refuse(self: Arc<Self>, frame: Frame, fault: Fault, message: Arc<Message>) {
        match (&message.properties.reply_to, frame.kind) {
            (Some(_), kind) if kind != Kind::Oneway => {
                self.reply(frame.id, frame.codec, Answer::Fault(fault), None, &message).await;
            }
            _ => self.dead_letter(frame.to_body(), &fault.message, &message).await,
        }
    }

    /// Sees to what is left of a body after a frame that cannot be read.
    pub(super) async fn refuse_rest(self: Arc<Self>, error: FrameError, message: Arc<Message>) {
        let named = message.properties.correlation_id.as_deref().and_then(|text| text.parse().ok());
        match (&message.properties.reply_to, error.id.or(named)) {
            (Some(_), Some(id)) => {
                let fault = Fault::new(error.code, error.to_string());
                self.reply(id, Codec::Cbor, Answer::Fault(fault), None, &message).await;
            }
            _ => self.dead_letter(message.body.slice(error.frame..), &error.to_string(), &message).await,
        }
    }

    /// Keeps what nobody can be told about where an operator finds it.
    async fn dead_letter(&self, body: Bytes, reason: &str, message: &Message) {
        warn!(service = %self.name, reason, "a message that cannot be handled");
        // Each subscriber has a copy of an event: the publisher's mistake is not kept by each of them.
        if message.source == Source::Events {
            return message.finish();
        }
        let header = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let properties = Properties {
            persistent: true,
            correlation_id: message.properties.correlation_id.clone(),
            reply_to: message.properties.reply_to.clone(),
            headers: vec![
                header("x-hopline-reason", shortened(reason)),
                header("x-hopline-instance", &self.site.instance),
                header("x-hopline-exchange", &message.exchange),
                header("x-hopline-key", &message.key),
            ],
            ..self.properties(message.properties.kind.clone())
        };
        let publication = Publication {
            exchange: self.site.namespace.dead(),
            key: self.name.to_string(),
            mandatory: true,
            properties,
            body,
        };
        match self.site.transport.publish(publication).await {
            Ok(Confirm::Accepted) => message.finish(),
            Ok(Confirm::Returned | Confirm::Refused) => {
                error!(service = %self.name, reason, "the queue of dead letters does not take a message: it is dropped");
                message.finish();
            }
            Err(lost) => {
                warn!(service = %self.name, reason = %lost.reason, "a dead letter was lost with its connection")
            }
        }
    }

    /// Sees to a job that has not started when the server drains.
    pub(super) async fn give_back(self: Arc<Self>, job: Job) {
        let Job { mut frame, deadline, message, .. } = job;
        match message.source {
            Source::Calls => {
                frame.metadata.remaining = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
                self.publish_again(&frame, &message).await;
            }
            Source::Work if message.frames == 1 => message.settle(Settle::GiveBack),
            Source::Work => self.publish_again(&frame, &message).await,
            Source::Instance if frame.kind == Kind::Request => {
                let why = format!("instance {} is shutting down", self.site.instance);
                self.reply(frame.id, frame.codec, Answer::Fault(Fault::new(Code::Unavailable, why)), None, &message)
                    .await;
            }
            Source::Instance | Source::Events => message.finish(),
        }
    }

    /// Publishes a frame again to the queue that it came from, and is done with it once the broker has it: there it is
    /// new, while a requeue would mark it as perhaps run.
    async fn publish_again(&self, frame: &Frame, message: &Message) {
        let key = match message.source {
            Source::Work => self.site.namespace.work_queue(&self.name),
            Source::Calls | Source::Instance | Source::Events => self.site.namespace.calls_queue(&self.name),
        };
        let remaining = frame.metadata.remaining.or(message.properties.expiration);
        let properties = Properties { expiration: remaining, ..message.properties.clone() };
        let body = frame.to_body();
        let publication = Publication { exchange: String::new(), key, mandatory: true, properties, body };
        match self.site.transport.publish(publication).await {
            Ok(Confirm::Accepted) => message.finish(),
            // Back to the queue's head then, at the price of being marked.
            Ok(Confirm::Returned | Confirm::Refused) | Err(_) => message.settle(Settle::GiveBack),
        }
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

/// A reason's first part: it may quote what the peer sent, and has to fit into metadata and into an AMQP header.
fn shortened(reason: &str) -> &str {
    let end = (0..=reason.len().min(MAX_REASON)).rev().find(|end| reason.is_char_boundary(*end));
    &reason[..end.unwrap_or_default()]
}
