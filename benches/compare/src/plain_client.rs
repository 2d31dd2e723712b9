//! The client that lapin's users write by hand: one message a call, and a map of who waits for which reply.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use anyhow::Context;
use futures::StreamExt;
use lapin::options::{BasicConsumeOptions, BasicPublishOptions, QueueDeclareOptions};
use lapin::types::{FieldTable, ShortString};
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties};
use tokio::sync::oneshot;

/// Calls the queue `requests`, and takes the replies from an exclusive queue of its own.
#[derive(Clone)]
pub struct PlainClient {
    channel: Channel,
    requests: ShortString,
    replies: ShortString,
    waiting: Waiting,
    next_id: Arc<AtomicU64>,
    _connection: Arc<Connection>,
}

/// Who waits for the reply with which correlation id.
type Waiting = Arc<Mutex<HashMap<String, oneshot::Sender<Vec<u8>>>>>;

impl PlainClient {
    /// Connects, and listens for replies from then on.
    pub async fn connect(url: &str, requests: &str) -> anyhow::Result<Self> {
        let connection = Connection::connect(url, ConnectionProperties::default()).await?;
        let channel = connection.create_channel().await?;
        let queue = channel.queue_declare("".into(), QueueDeclareOptions::exclusive(), FieldTable::default()).await?;
        let replies = queue.name().clone();
        // A reply that is lost with this client would find nobody waiting: nothing to acknowledge.
        let options = BasicConsumeOptions { no_ack: true, ..Default::default() };
        let mut consumer =
            channel.basic_consume(replies.clone(), "replies".into(), options, FieldTable::default()).await?;

        let waiting = Waiting::default();
        let answered = waiting.clone();
        tokio::spawn(async move {
            while let Some(Ok(reply)) = consumer.next().await {
                let Some(id) = reply.properties.correlation_id() else { continue };
                let caller = answered.lock().expect("no panic while holding the map").remove(id.as_str());
                if let Some(caller) = caller {
                    let _ = caller.send(reply.data);
                }
            }
        });
        let (requests, next_id) = (requests.into(), Arc::default());
        Ok(Self { channel, requests, replies, waiting, next_id, _connection: Arc::new(connection) })
    }

    /// One call: a message there, a message back.
    pub async fn call(&self, payload: &[u8]) -> anyhow::Result<Vec<u8>> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed).to_string();
        let (caller, reply) = oneshot::channel();
        let properties =
            BasicProperties::default().with_correlation_id(id.as_str().into()).with_reply_to(self.replies.clone());
        self.waiting.lock().expect("no panic while holding the map").insert(id, caller);
        self.channel
            .basic_publish("".into(), self.requests.clone(), BasicPublishOptions::default(), payload, properties)
            .await?;
        reply.await.context("the connection ended before the reply came")
    }
}
