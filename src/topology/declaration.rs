//! Exchanges, queues and bindings, as they are declared.

use std::time::Duration;

/// What the broker does with a message for an exchange.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExchangeKind {
    /// To the queues bound with the message's very key.
    Direct,
    /// To the queues bound with a pattern that the key matches: `*` is one word, `#` any number.
    Topic,
    /// To every bound queue.
    Fanout,
}

/// A durable exchange.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exchange {
    /// Its name.
    pub name: String,
    /// How it routes.
    pub kind: ExchangeKind,
}

/// How long a queue lives and where its messages are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QueueKind {
    /// Belongs to one connection and dies with it.
    Exclusive,
    /// Durable, on one node.
    Classic,
    /// Durable, replicated.
    Quorum,
}

/// A queue and its arguments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Queue {
    /// Its name.
    pub name: String,
    /// Its lifetime and storage.
    pub kind: QueueKind,
    /// How long it stays without consumers (`x-expires`).
    pub expires: Option<Duration>,
    /// How many messages it holds before it refuses more (`x-max-length` with `reject-publish`).
    pub max_length: Option<u32>,
    /// The highest priority it distinguishes (`x-max-priority`).
    pub max_priority: Option<u8>,
    /// How many failed attempts a message may have (`x-delivery-limit`).
    pub delivery_limit: Option<u32>,
    /// Exchange and key for messages that are discarded, expired or at their delivery limit. A quorum queue keeps them until
    /// another queue has them (`x-dead-letter-strategy`).
    pub dead_letter: Option<(String, String)>,
}

impl Queue {
    /// A queue without arguments.
    #[must_use]
    pub fn new(name: impl Into<String>, kind: QueueKind) -> Self {
        Self {
            name: name.into(),
            kind,
            expires: None,
            max_length: None,
            max_priority: None,
            delivery_limit: None,
            dead_letter: None,
        }
    }
}

/// Messages for `exchange` with `key` go to `queue`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binding {
    /// Where messages come from.
    pub exchange: String,
    /// The key or pattern.
    pub key: String,
    /// Where they go.
    pub queue: String,
}

/// A part of the topology, declared before it is used; declaring it again changes nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Declaration {
    /// An exchange.
    Exchange(Exchange),
    /// A queue.
    Queue(Queue),
    /// A binding.
    Binding(Binding),
}
