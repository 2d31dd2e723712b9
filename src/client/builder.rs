//! What a client may be told before it connects, and connecting.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::runtime::Handle;

use super::line::Line;
use super::target::{Target, Targets};
use super::{Client, Inner, MAX_MESSAGE_SIZE, short_id};
use crate::codec::Codec;
use crate::error::Error;
use crate::outbox::Share;
use crate::topology::{Declaration, Namespace, Queue, QueueKind};
use crate::transport::{Mode, Role, Transport};

/// Which calls may share a message. A broker's cost is per message, so sharing is worth about ten times the throughput;
/// what a call means and how it ends is the same either way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Coalesce {
    /// Calls that wait to leave at the same moment share a message when their methods are quick: at most 64 calls,
    /// 64 KiB, and 1 ms of work going by the handler times that replies report. Calls of slow methods, and of those that
    /// have not replied yet, go alone, so that prefetch keeps sharing work evenly.
    #[default]
    Auto,
    /// Up to this many calls share a message, whatever their methods take; 0 counts as 1.
    Fixed(usize),
    /// Each call has a message of its own.
    Off,
}

impl Coalesce {
    /// What a call takes up of a message.
    pub(super) fn share_of(self, target: &Target) -> Share {
        match self {
            Self::Auto => target.pace.average().map_or(Share::ALL, Share::of_work),
            Self::Fixed(_) | Self::Off => self.share(),
        }
    }

    /// What anything takes up of a message for which nobody can work while the rest of it waits.
    pub(super) fn share(self) -> Share {
        match self {
            Self::Auto => Share::LEAST,
            Self::Fixed(calls) => Share::one_of(calls),
            Self::Off => Share::ALL,
        }
    }
}

/// What a client may be told before it connects.
#[derive(Debug, Clone)]
pub struct ClientBuilder {
    pub(super) namespace: Result<Namespace, String>,
    pub(super) codec: Codec,
    pub(super) timeout: Duration,
    pub(super) max_message_size: usize,
    pub(super) coalesce: Coalesce,
}

impl Default for ClientBuilder {
    fn default() -> Self {
        Self {
            namespace: Ok(Namespace::default()),
            codec: Codec::default(),
            timeout: Duration::from_secs(30),
            max_message_size: MAX_MESSAGE_SIZE,
            coalesce: Coalesce::default(),
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

    /// Which calls may share a message. Default [`Coalesce::Auto`].
    #[must_use]
    pub fn coalesce(mut self, coalesce: Coalesce) -> Self {
        self.coalesce = coalesce;
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

        let queue = transport.consume(&reply_queue, Mode::NoAck).await?;
        Ok(Client(Arc::new(Inner {
            line: Line::start(transport.clone(), queue, reply_queue, instance.clone(), self.max_message_size),
            transport,
            rpc: namespace.rpc().into(),
            oneway: namespace.oneway().into(),
            settings: self,
            instance: instance.into(),
            targets: Targets::default(),
            broadcastable: Mutex::default(),
            runtime: Handle::current(),
        })))
    }
}
