//! What a client may be told before it connects, and connecting.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::runtime::Handle;

use super::replies::{self, Replies};
use super::{Client, Inner, MAX_MESSAGE_SIZE, short_id};
use crate::codec::Codec;
use crate::error::Error;
use crate::topology::{Declaration, Namespace, Queue, QueueKind};
use crate::transport::{Mode, Role, Transport};

/// What a client may be told before it connects.
#[derive(Debug, Clone)]
pub struct ClientBuilder {
    pub(super) namespace: Result<Namespace, String>,
    pub(super) codec: Codec,
    pub(super) timeout: Duration,
    pub(super) max_message_size: usize,
}

impl Default for ClientBuilder {
    fn default() -> Self {
        Self {
            namespace: Ok(Namespace::default()),
            codec: Codec::default(),
            timeout: Duration::from_secs(30),
            max_message_size: MAX_MESSAGE_SIZE,
        }
    }
}

impl ClientBuilder {
    /// The prefix of every name on the broker, `[A-Za-z0-9_-]+`: services of other namespaces are not seen. Default
    /// `hopline`.
    #[must_use]
    pub fn namespace(mut self, name: &str) -> Self {
        self.namespace = Namespace::new(name);
        self
    }

    /// How payloads are written. Default [`Codec::Cbor`].
    #[must_use]
    pub fn codec(mut self, codec: Codec) -> Self {
        self.codec = codec;
        self
    }

    /// How long a call may take that does not say so itself. Default 30 s.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// The largest message to send, in bytes. Default 16 MiB, which is also what RabbitMQ 4 takes unless told
    /// otherwise.
    #[must_use]
    pub fn max_message_size(mut self, bytes: usize) -> Self {
        self.max_message_size = bytes;
        self
    }

    /// Connects to the broker that `url` names: `memory://`, `amqp://` or `amqps://`.
    ///
    /// # Errors
    /// `Invalid` for an address or a setting that cannot be used, `Connect` when the broker does not answer or refuses.
    pub async fn connect(self, url: &str) -> Result<Client, Error> {
        let namespace = self.namespace.clone().map_err(Error::Invalid)?;
        let transport = Transport::connect(url, Role::Client).await?;
        let instance = short_id();
        let reply_queue = namespace.reply_queue(&instance, &short_id());
        let mut topology = namespace.exchanges();
        topology.push(Declaration::Queue(Queue::new(&reply_queue, QueueKind::Exclusive)));
        transport.declare(&topology).await?;

        let events = transport.events();
        let queue = transport.consume(&reply_queue, Mode::NoAck).await?;
        let replies = Arc::new(Replies::default());
        tokio::spawn(replies::receive(replies.clone(), queue, events));
        Ok(Client(Arc::new(Inner {
            transport,
            settings: self,
            instance,
            reply_queue,
            replies,
            broadcastable: Mutex::default(),
            runtime: Handle::current(),
        })))
    }
}
