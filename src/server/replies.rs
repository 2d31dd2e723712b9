//! The replies of a server on their way to their callers. Replies to the same caller that are ready together share a
//! message.
//!
//! One task publishes them. A request is acknowledged after the broker has confirmed its reply, so that a lost reply is
//! made again.

mod task;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::task_tracker::TaskTrackerToken;
use uuid::Uuid;

use self::task::ReplyTask;
use super::health::Health;
use super::message::Message;
use crate::clock::later;
use crate::codec::Codec;
use crate::outgoing::{Bundle, Parcel, Share};
use crate::transport::Transport;

/// How long a reply waits that cannot be sent, if its request does not say how long its caller waits.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long a sign of life, or a message for another instance, is of use.
const LIFE: Duration = Duration::from_secs(5);
/// What a reply belongs to.
pub(super) struct AnsweredCall {
    /// The message of the request, which is settled after the broker has confirmed the reply. `None` for a sign of
    /// life.
    pub(super) message: Option<Arc<Message>>,
    pub(super) codec: Codec,
    /// How many times it was published and lost.
    pub(super) attempts: usize,
    /// When its caller stops waiting for it.
    until: Instant,
    /// `None` if nobody wants to know what becomes of it.
    audience: Option<Audience>,
}

/// What the sender of several replies to one request hears of each.
pub(super) struct Audience {
    /// Cancelled if the queue is gone.
    pub(super) gone: CancellationToken,
    /// Held until the broker has it, or it is given up.
    pub(super) _under_way: TaskTrackerToken,
}

impl AnsweredCall {
    /// For something that is of no use later, and answers no request.
    fn of_no_request() -> Self {
        Self { message: None, codec: Codec::Raw, attempts: 0, until: Instant::now() + LIFE, audience: None }
    }

    /// The reply has reached the broker, or is not wanted any more: one frame of the request's message is done.
    fn finish(&self) {
        if let Some(message) = &self.message {
            message.finish();
        }
    }
}

/// A reply that is to be published.
type Letter = Parcel<AnsweredCall>;
/// Replies that share a message.
type Letters = Bundle<Arc<str>, AnsweredCall>;

/// Where replies are handed in. The task ends when this is dropped.
#[derive(Debug)]
pub(super) struct Replier(mpsc::UnboundedSender<(Arc<str>, Letter)>);

impl Replier {
    /// Starts the task. It publishes over the newest of `transports`. If that is lost, replies wait for the next one,
    /// unless the server drains.
    pub(super) fn start(
        transports: &watch::Sender<Transport>,
        draining: CancellationToken,
        instance: Arc<str>,
        max_message_size: usize,
        health: Arc<Health>,
    ) -> Self {
        let (replies, waiting) = mpsc::unbounded_channel();
        let task = ReplyTask::new(transports, draining, instance, max_message_size, health, waiting);
        tokio::spawn(task.run());
        Self(replies)
    }

    /// Publishes the reply `frame` to the request `id`, and then settles the request.
    pub(super) fn post(&self, id: Uuid, codec: Codec, frame: Bytes, message: &Arc<Message>) {
        let until = match message.properties.expiration {
            Some(time) => later(message.received, time),
            None => Instant::now() + PATIENCE,
        };
        self.put(
            message,
            id,
            frame,
            AnsweredCall { message: Some(message.clone()), codec, attempts: 0, until, audience: None },
        );
    }

    /// Publishes a sign of life for the call `id`.
    pub(super) fn keep_alive(&self, id: Uuid, frame: Bytes, message: &Message) {
        self.put(message, id, frame, AnsweredCall::of_no_request());
    }

    /// Publishes a frame about the call `id` for another instance, into its queue.
    pub(super) fn tell(&self, queue: Arc<str>, id: Uuid, frame: Bytes) {
        self.hand_in(queue, id, frame, AnsweredCall::of_no_request());
    }

    /// Publishes one of several replies to the request `id`.
    pub(super) fn tell_audience(&self, queue: Arc<str>, id: Uuid, frame: Bytes, audience: Audience) {
        self.hand_in(queue, id, frame, AnsweredCall { audience: Some(audience), ..AnsweredCall::of_no_request() });
    }

    fn hand_in(&self, queue: Arc<str>, id: Uuid, frame: Bytes, token: AnsweredCall) {
        let parcel = Parcel { id, frame, share: Share::LEAST, kind: None, expiration: None, token };
        // An error means that the task has ended, and so has the runtime.
        let _ = self.0.send((queue, parcel));
    }

    fn put(&self, message: &Message, id: Uuid, frame: Bytes, token: AnsweredCall) {
        let kind = message.kind.clone();
        let parcel = Parcel { id, frame, share: Share::LEAST, kind, expiration: None, token };
        // An error means that the task has ended, and so has the runtime.
        let _ = self.0.send((message.reply_to.clone().unwrap_or_default(), parcel));
    }
}
