//! What Hopline declares on a broker, as values: exchanges, queues and bindings. `topology.rs` makes them; a transport
//! declares them.

use std::time::Duration;

/// In how many files a stream is kept at least that is bounded by bytes.
const SEGMENTS: u64 = 16;
/// The largest file of a stream that does not keep everything, in bytes. A stream of 100 GB has 6 000 of them then.
const LARGEST_SEGMENT: u64 = 16 * 1024 * 1024;

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
    pub max_bytes: Option<u64>,
    /// How long it keeps a message, in whole seconds, rounded up (`x-max-age`). For streams only. `None`: for ever.
    ///
    /// RabbitMQ deletes whole segments, which are files of at most 16 MiB, and only when it begins a new one. So what is
    /// older stays until later messages have filled a segment, and the last segment always stays.
    pub max_age: Option<Duration>,
    /// How many messages it holds before it refuses more (`x-max-length` with `reject-publish`). `None`: no limit.
    pub max_length: Option<u32>,
    /// Whether it drops its oldest message, instead of refusing the new one, when it holds `max_length` (`drop-head`).
    /// A dropped message becomes a dead letter; but the broker loses it if the queue of dead letters refuses it.
    ///
    /// Messages that are delivered and not settled do not count. If one comes back to a queue that is full, it is dropped
    /// as the oldest; a quorum queue of RabbitMQ 3 drops the latest then.
    pub keeps_latest: bool,
    /// Whether only the first of its consumers gets messages (`x-single-active-consumer`). When that one is cancelled, or
    /// its channel or connection ends, the next one does. For all but streams. No message can be taken out of such a
    /// quorum queue without a consumer.
    pub single_active: bool,
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
            max_age: None,
            max_length: None,
            keeps_latest: false,
            single_active: false,
            max_priority: None,
            delivery_limit: None,
            dead_letter: None,
        }
    }

    /// What it does at its [`max_length`](Self::max_length) (`x-overflow`).
    pub(crate) fn overflow(&self) -> Option<&'static str> {
        self.max_length.map(|_| if self.keeps_latest { "drop-head" } else { "reject-publish" })
    }

    /// The [`max_age`](Self::max_age) as RabbitMQ reads it, such as `60s` (`x-max-age`).
    pub(crate) fn age(&self) -> Option<String> {
        let seconds = |age: Duration| age.as_secs().saturating_add((age.subsec_nanos() > 0).into()).max(1);
        self.max_age.map(|age| format!("{}s", seconds(age)))
    }

    /// The size of the files of a stream that does not keep everything (`x-stream-max-segment-size-bytes`). RabbitMQ
    /// deletes whole files, never the last one, and only when it begins a new one. With its default of 500 MB a stream
    /// with little traffic would keep everything for years.
    pub(crate) fn segment_bytes(&self) -> Option<u64> {
        let of_bytes = self.max_bytes.map(|bytes| (bytes / SEGMENTS).clamp(1, LARGEST_SEGMENT));
        of_bytes.or(self.max_age.map(|_| LARGEST_SEGMENT))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_age_is_told_in_whole_seconds_and_is_never_too_short() {
        let age = |max_age| Queue { max_age, ..Queue::new("stream", QueueKind::Stream) }.age();
        assert_eq!(age(None), None);
        for (age_of, told) in [(0, "1s"), (1, "1s"), (1000, "1s"), (1001, "2s"), (3_600_000, "3600s")] {
            assert_eq!(age(Some(Duration::from_millis(age_of))).as_deref(), Some(told));
        }
        assert_eq!(age(Some(Duration::MAX)), Some(format!("{}s", u64::MAX)));
    }

    #[test]
    fn the_files_of_a_stream_are_small_enough_for_its_bounds() {
        let mebibyte = 1024 * 1024;
        let size = |max_bytes, max_age| {
            Queue { max_bytes, max_age, ..Queue::new("stream", QueueKind::Stream) }.segment_bytes()
        };
        let hour = Some(Duration::from_secs(3600));
        assert_eq!(size(None, None), None);
        assert_eq!(size(None, hour), Some(16 * mebibyte));
        for age in [None, hour] {
            assert_eq!(size(Some(16 * mebibyte), age), Some(mebibyte));
            assert_eq!(size(Some(u64::MAX), age), Some(16 * mebibyte));
            assert_eq!(size(Some(1), age), Some(1));
        }
    }
}
