//! What Hopline declares on a broker, as values: exchanges, queues and bindings. `topology.rs` makes them; a transport
//! declares them.

use std::time::Duration;

/// How an exchange routes messages to the queues that are bound to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExchangeKind {
    /// To the queues that are bound with the message's key.
    Direct,
    /// To the queues that are bound with a pattern that the key matches. In a pattern `*` is one word, and `#` is any
    /// number.
    Topic,
    /// To all queues that are bound.
    Fanout,
}

/// A durable exchange.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exchange {
    /// Its name.
    pub name: String,
    /// How it routes messages.
    pub kind: ExchangeKind,
}

/// How long a queue lives, and on how many nodes its messages are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QueueKind {
    /// It belongs to one connection. The broker deletes it when the connection ends.
    Exclusive,
    /// It is durable, and its messages are on one node.
    Classic,
    /// It is durable, and its messages are replicated to several nodes.
    Quorum,
    /// It is durable and replicated, and keeps its messages when they are read. Every consumer gets all of them.
    Stream,
}

/// A queue and its arguments. A broker refuses to declare a queue again with other arguments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Queue {
    /// Its name.
    pub name: String,
    /// Its lifetime and storage.
    pub kind: QueueKind,
    /// How long the queue stays without consumers (`x-expires`). `None`: for ever.
    pub expires: Option<Duration>,
    /// How much it keeps, in bytes: the oldest messages go first (`x-max-length-bytes`). For streams only. `None`: everything.
    pub max_bytes: Option<u32>,
    /// How many messages it holds before it refuses more (`x-max-length` with `reject-publish`). `None`: no limit.
    pub max_length: Option<u32>,
    /// The highest priority that it distinguishes (`x-max-priority`). `None`: it ignores priorities.
    pub max_priority: Option<u8>,
    /// How often a message may be requeued before it is dead-lettered (`x-delivery-limit`).
    pub delivery_limit: Option<u32>,
    /// The exchange and key for messages that are rejected, have expired, or have reached the delivery limit. A quorum
    /// queue keeps such a message until another queue has it (`x-dead-letter-strategy`).
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
            max_bytes: None,
            max_length: None,
            max_priority: None,
            delivery_limit: None,
            dead_letter: None,
        }
    }
}

/// A rule of an exchange: messages to `exchange` whose key matches `key` go to `queue`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binding {
    /// The exchange.
    pub exchange: String,
    /// The key, or the pattern if it is a topic exchange.
    pub key: String,
    /// The queue that gets the messages.
    pub queue: String,
}

/// One thing that is declared on the broker before it is used. To declare the same again changes nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Declaration {
    /// An exchange.
    Exchange(Exchange),
    /// A queue.
    Queue(Queue),
    /// A binding.
    Binding(Binding),
}
