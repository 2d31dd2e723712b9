//! Giving back: a call that has not begun when a server drains is published again, so that another instance gets it as
//! a new message.
//!
//! A requeued message would be marked as redelivered, which means "may have run".

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;
use tracing::debug;
use uuid::Uuid;

use super::dispatch::Job;
use super::message::{Message, MessageEnd, Source};
use super::reason::MAX_REASON;
use super::worker::Worker;
use crate::codec::Codec;
use crate::error::{Code, Fault};
use crate::exchanges::to_queue;
use crate::frame::{CONTENT_TYPE, Frame, Kind, Metadata};
use crate::limits::ANSWER_TIMEOUT;
use crate::service::Answer;
use crate::topology::header;
use crate::transport::{Confirm, Life, Loss, Lost, Properties, Publication, Settle, Transport};

/// How long a frame that is published again waits for room in its queue. After that, it is requeued or its call fails.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often it is tried again in this time.
const PAUSE: Duration = Duration::from_millis(20);
/// How many times a message is published whose channel ends each time.
const MAX_TRIES: u32 = 10;

/// Where a frame is published again.
#[derive(Debug, Clone, Copy)]
pub(super) enum To {
    /// The queue for the service's calls.
    Calls,
    /// The queue for the service's oneway calls.
    Work,
    /// The same queue, after this pause.
    Retry(Duration),
}

impl Worker {
    /// Gives back a call that has not begun, since the server drains or since others should run it.
    pub(super) async fn give_back(self: Arc<Self>, job: Job) {
        let Job { mut frame, deadline, message, .. } = job;
        if !self.site.draining.is_cancelled() || self.site.given_back().insert(frame.id) {
            let (method, caller) = (frame.metadata.method.as_deref(), frame.metadata.instance.as_deref());
            debug!(service = %self.name, method, id = %frame.id, caller, "a call is given back: it has not started");
        }
        // The broker counts failed deliveries of a message. The new message has to continue that count.
        if message.failures > 0 {
            frame.metadata.more_mut().attempt = Some(message.attempt(&frame));
        }
        match message.source {
            source if self.leaves_in_order(source) => {}
            Source::Calls => {
                frame.metadata.remaining = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
                if !self.publish_again(&frame, To::Calls, &message).await {
                    self.unavailable(&frame, &message);
                }
            }
            Source::Work if message.frames == 1 => message.settle(Settle::GiveBack),
            Source::Work => _ = self.publish_again(&frame, To::Work, &message).await,
            Source::Instance if frame.kind == Kind::Request => self.unavailable(&frame, &message),
            Source::Instance | Source::Events => message.finish(),
        }
    }

    /// Publishes empty messages to a quorum queue, until its consumer has ended. A consumer of a quorum queue has to be
    /// full when it is cancelled: otherwise the broker requeues what is on its way to it, and marks that as
    /// redelivered.
    pub(super) async fn fill(self: Arc<Self>, transport: Transport, life: Arc<Life>) {
        let properties = Properties {
            content_type: Some(CONTENT_TYPE.to_owned()),
            app_id: Some(self.site.instance.to_string()),
            // Other instances get some of these messages, and the last one may leave some in the queue.
            expiration: Some(PATIENCE),
            ..Properties::default()
        };
        let body = Frame::new(Kind::Cancel, Uuid::nil(), Codec::Raw, Metadata::default(), Bytes::new()).to_body();
        let queue = self.site.namespace.calls_queue(&self.id);
        let nothing = Publication { mandatory: false, ..to_queue(queue, properties, body) };
        let filling = async {
            tokio::time::sleep(PAUSE).await;
            transport.repeat(nothing).await;
        };
        tokio::select! {
            _ = life.ended() => {}
            () = filling => {}
        }
    }

    /// Answers a call that could not be given back: it has not run.
    fn unavailable(&self, frame: &Frame, message: &Arc<Message>) {
        let why = match self.site.draining.is_cancelled() {
            true => format!("instance {} is shutting down: the call did not run", self.site.instance),
            false => format!("instance {} takes no calls now: the call did not run", self.site.instance),
        };
        let answer = Answer::Fault(Fault::new(Code::Unavailable, why));
        self.reply(frame.id, frame.codec, answer, None, message);
    }

    /// Publishes a frame again, and is done with it after the broker has confirmed it. There it is a new message, where
    /// a requeued one would be marked. Returns `false` if the queue stays full and the frame is a request.
    pub(super) async fn publish_again(&self, frame: &Frame, to: To, message: &Arc<Message>) -> bool {
        let namespace = &self.site.namespace;
        let (queue, expiration) = match to {
            To::Calls => (namespace.calls_queue(&self.id), frame.metadata.remaining.or(message.properties.expiration)),
            To::Work => (namespace.work_queue(&self.id), None),
            To::Retry(pause) => (namespace.retry_queue(&self.id), Some(pause)),
        };
        let body = frame.to_body();
        // From now on the message carries the user of this server.
        let mut headers = message.properties.headers.clone();
        // Handlers see no headers. A peer may have filled the message with some, which would be too large together with
        // those that are added.
        headers.retain(|(name, value)| header::is_ours(name) && name != header::USER && value.len() <= MAX_REASON);
        headers.push((header::USER.to_owned(), message.user.as_deref().unwrap_or_default().to_owned()));
        for (name, value) in [(header::EXCHANGE, &message.exchange), (header::KEY, &message.key)] {
            if header::value(&headers, name).is_none() {
                headers.push((name.to_owned(), value.clone()));
            }
        }
        let patience = Instant::now() + frame.metadata.remaining.unwrap_or(PATIENCE).min(PATIENCE);
        // Requeueing the whole message would run its other oneway calls again. So this waits longer, unless the server
        // drains.
        let shared = frame.kind.is_kept() && message.frames > 1;
        let waits = || Instant::now() < patience || (shared && !self.site.draining.is_cancelled());
        let may_repeat = frame.idempotent || frame.kind.is_kept();
        let mut tries = 0;
        loop {
            tries += 1;
            let properties = Properties { expiration, headers: headers.clone(), ..message.properties.clone() };
            let publication = to_queue(queue.clone(), properties, body.clone());
            let confirm = tokio::select! {
                biased;
                confirm = message.transport.publish(publication) => confirm,
                lost = self.unanswered() => Err(lost),
            };
            match confirm {
                Ok(Confirm::Accepted) => {
                    self.done(frame.id, MessageEnd::Moved(frame.metadata.attempt()), message);
                    return true;
                }
                // The queue is declared when it is needed for the first time.
                Ok(Confirm::Returned)
                    if matches!(to, To::Retry(_))
                        && tries < MAX_TRIES
                        && message.transport.declare(&[namespace.retry(&self.id)]).await.is_ok() => {}
                // Other instances take calls out of the queue, so there will be room.
                Ok(Confirm::Refused) if waits() => tokio::time::sleep(PAUSE).await,
                Err(lost)
                    if (lost.loss == Loss::Refused || lost.loss == Loss::Channel && may_repeat)
                        && waits()
                        && tries < MAX_TRIES =>
                {
                    tokio::time::sleep(PAUSE * tries).await;
                }
                // It may be in the queue, and may run there.
                Err(lost) if lost.loss == Loss::Channel && frame.kind == Kind::Request => {
                    let why = format!(
                        "instance {} was shutting down and gave the call back: it may have run",
                        self.site.instance
                    );
                    self.reply(frame.id, frame.codec, Answer::Fault(Fault::new(Code::Aborted, why)), None, message);
                    return true;
                }
                Ok(_) | Err(Lost { loss: Loss::Refused, .. }) if frame.kind == Kind::Request => return false,
                // The message is requeued at the head of its queue, and is marked as redelivered.
                Ok(_) | Err(_) => {
                    message.settle(Settle::GiveBack);
                    return true;
                }
            }
        }
    }

    /// Resolves when a draining server has waited long enough for a confirm. A quorum queue without its majority never
    /// confirms.
    async fn unanswered(&self) -> Lost {
        self.site.draining.cancelled().await;
        tokio::time::sleep(ANSWER_TIMEOUT).await;
        let reason = format!("the broker gave no answer within {ANSWER_TIMEOUT:?}").into();
        Lost { loss: Loss::Channel, reason }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use tokio_util::task::TaskTracker;
    use uuid::Uuid;

    use super::*;
    use crate::codec::Codec;
    use crate::frame::Metadata;
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
        let worker =
            Arc::new(Worker::new(&id, "work.v1".into(), service, running.site.clone()).expect("no threads of its own"));

        let transport = Transport::connect(&url, Role::Client).await.expect("in memory");
        let name = running.site.namespace.work_queue(&id);
        let full = Queue { max_length: Some(0), ..Queue::new(&name, QueueKind::Classic) };
        let parts = [full, Queue::new("work", QueueKind::Classic)].map(Declaration::Queue);
        transport.declare(&parts).await.expect("new queues");
        let publication = to_queue("work".to_owned(), Properties::default(), Bytes::new());
        assert_eq!(transport.publish(publication).await, Ok(Confirm::Accepted));
        let mut work = transport.consume("work", Mode::Settle { prefetch: 1 }).await.expect("it is there");
        let delivery = work.next().await.expect("a message");

        let message = Message::new(delivery, transport.clone(), Source::Work, 2, TaskTracker::new().token());
        let frame = Frame::new(Kind::Oneway, Uuid::new_v4(), Codec::Cbor, Metadata::default(), Bytes::new());
        let publishing = tokio::spawn(async move {
            worker.publish_again(&frame, To::Work, &Arc::new(message)).await;
        });
        tokio::time::sleep(100 * PATIENCE).await;
        assert!(!publishing.is_finished(), "its neighbours are not to run again without need");
        running.site.draining.cancel();
        tokio::time::timeout(2 * PATIENCE, publishing).await.expect("it gives up").expect("no panic");
        assert!(work.next().await.expect("the message again").redelivered);
    }
}
