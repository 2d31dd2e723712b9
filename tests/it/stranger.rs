//! Peers that speak the wire by hand: one that calls, and one that serves.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::Bytes;
use hopline::topology::{Binding, Declaration, Queue, QueueKind};
use hopline::transport::{Confirm, Consumer, Delivery, Mode, Properties, Publication, Settle, Transport};
use uuid::Uuid;

use crate::support::{Scene, soon};

/// The frame type of a sign of life.
pub(crate) const KEEP_ALIVE: u8 = 9;

/// A peer that publishes directly to a service's queue, and the queue for its answers.
pub(crate) struct Stranger {
    pub(crate) transport: Transport,
    namespace: String,
    pub(crate) reply_to: String,
    replies: Consumer,
    /// Answers that came in one message with another.
    more: VecDeque<Bytes>,
}

impl Stranger {
    pub(crate) async fn new(scene: &Scene) -> Self {
        let transport = scene.transport().await;
        let reply_to = format!("{}.stranger", scene.namespace);
        transport.declare(&[Declaration::Queue(Queue::new(&reply_to, QueueKind::Exclusive))]).await.expect("declared");
        let replies = transport.consume(&reply_to, Mode::NoAck).await.expect("it is ours");
        Self { transport, namespace: scene.namespace.clone(), reply_to, replies, more: VecDeque::new() }
    }

    pub(crate) async fn send(
        &self,
        exchange: &str,
        key: &str,
        body: Vec<u8>,
        reply_to: Option<String>,
        id: Option<Uuid>,
    ) {
        let properties = Properties { reply_to, correlation_id: id.map(|id| id.to_string()), ..Properties::default() };
        let publication = Publication {
            exchange: format!("{}.{exchange}", self.namespace),
            key: key.to_owned(),
            mandatory: true,
            properties,
            body: body.into(),
        };
        assert_eq!(self.transport.publish(publication).await, Ok(Confirm::Accepted));
    }

    /// The id, the status and the frame of the next answer.
    pub(crate) async fn answer(&mut self) -> (Uuid, u8, Bytes) {
        while self.more.is_empty() {
            let message = soon(self.replies.next()).await.expect("answered").body;
            // A call that takes a second sends signs of life; they are skipped.
            self.more.extend(frames(message).into_iter().filter(|frame| frame[4] != KEEP_ALIVE));
        }
        let body = self.more.pop_front().expect("a message has a frame");
        assert_eq!(&body[..3], b"HL\x01");
        assert_eq!(body[4], 2, "a reply");
        (Uuid::from_slice(&body[8..24]).expect("16 bytes"), body[5], body)
    }
}

/// A peer in the place of a server. It takes the messages out of a queue of calls that a server has declared.
pub(crate) struct Impostor {
    transport: Transport,
    calls: Consumer,
}

impl Impostor {
    pub(crate) async fn new(scene: &Scene, service: &str) -> Self {
        let transport = scene.transport().await;
        let queue = format!("{}.{service}.calls", scene.namespace);
        let calls = transport.consume(&queue, Mode::Settle { prefetch: 100 }).await.expect("a server has declared it");
        Self { transport, calls }
    }

    /// The next message of calls: its body, and the queue for its replies.
    pub(crate) async fn taken(&mut self) -> (Bytes, String) {
        let mut call: Delivery = soon(self.calls.next()).await.expect("a call");
        let reply_to = call.properties.reply_to.take().expect("where replies go");
        let body = call.body.clone();
        call.settle(Settle::Ack);
        (body, reply_to)
    }

    pub(crate) async fn send(&self, reply_to: &str, body: Vec<u8>) {
        let publication = Publication {
            exchange: String::new(),
            key: reply_to.to_owned(),
            mandatory: true,
            properties: Properties::default(),
            body: body.into(),
        };
        assert_eq!(self.transport.publish(publication).await, Ok(Confirm::Accepted));
    }
}

/// The frames of a message.
pub(crate) fn frames(mut message: Bytes) -> Vec<Bytes> {
    let mut frames = Vec::new();
    while !message.is_empty() {
        let number = |at: usize| u32::from_be_bytes(message[at..at + 4].try_into().expect("4 bytes")) as usize;
        let length = 32 + number(24) + number(28);
        frames.push(message.split_to(length));
    }
    frames
}

/// A consumer of everything that is published to `exchange` with `key`, in addition to the queues that are bound
/// already.
pub(crate) async fn overheard(transport: &Transport, exchange: &str, key: &str) -> Consumer {
    let queue = format!("overheard-{}", Uuid::new_v4().simple());
    let binding = Binding { exchange: exchange.to_owned(), key: key.to_owned(), queue: queue.clone() };
    let parts = [Declaration::Queue(Queue::new(&queue, QueueKind::Exclusive)), Declaration::Binding(binding)];
    transport.declare(&parts).await.expect("declared");
    transport.consume(&queue, Mode::NoAck).await.expect("it is ours")
}

/// A reply frame. Its payload is compressed as `compression` says.
pub(crate) fn reply(call: &[u8], compression: u8, payload: &[u8], accepts: Option<u8>) -> Vec<u8> {
    // A CBOR map: 13 => the compressions that are read, a number below 24.
    let metadata = accepts.map_or(vec![0xa0], |accepts| vec![0xa1, 13, accepts]);
    reply_with(call, compression, &metadata, payload)
}

/// A reply frame that says how long its handler took.
pub(crate) fn reply_after(call: &[u8], took: Duration, payload: &[u8]) -> Vec<u8> {
    // A CBOR map: 7 => microseconds, a number of 4 bytes.
    let micros = u32::try_from(took.as_micros()).expect("a short time").to_be_bytes();
    reply_with(call, 0, &[&[0xa1, 7, 0x1a][..], &micros].concat(), payload)
}

fn reply_with(call: &[u8], compression: u8, metadata: &[u8], payload: &[u8]) -> Vec<u8> {
    let length = |bytes: &[u8]| u32::try_from(bytes.len()).expect("a short one").to_be_bytes();
    let header = [b'H', b'L', 1, call[3], 2, 0, compression, 0];
    [&header, &call[8..24], &length(metadata), &length(payload), metadata, payload].concat()
}

/// A reply frame with this status and the text of an error, without a payload.
pub(crate) fn failing_reply(call: &[u8], status: u8, text: &str) -> Vec<u8> {
    let length = |length: usize| u32::try_from(length).expect("a short one").to_be_bytes();
    assert!(text.len() < 24, "longer ones are written otherwise");
    // A CBOR map: 11 => the text.
    let metadata = [&[0xa1, 11, 0x60 | u8::try_from(text.len()).expect("a short one")], text.as_bytes()].concat();
    let header = [b'H', b'L', 1, call[3], 2, status, 0, 0];
    [&header, &call[8..24], &length(metadata.len()), &length(0), &metadata].concat()
}
