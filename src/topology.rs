//! Every name on the broker, made once.

mod declaration;
mod service;
mod words;

use std::fmt;
use std::time::Duration;

pub use self::declaration::{Binding, Declaration, Exchange, ExchangeKind, Queue, QueueKind};
pub use self::service::ServiceId;
pub(crate) use self::words::{check_event_key, check_event_pattern};
pub use self::words::{check_name, topic_matches};

/// How often the broker delivers a oneway call before it dead-letters it by itself, for one that kills whoever runs it.
/// Connections that end count too, and a broker that closes many closes them one after the other: one that is restarted
/// hands the same call from instance to instance, and is not to use up its attempts.
pub(crate) const ONEWAY_DELIVERIES: u32 = 20;
/// As good as no limit, for what operators take out of a queue and put back: without one RabbitMQ 4 would drop a message after
/// the twentieth look, and 3.10 would put what comes back behind all others.
const KEPT_DELIVERIES: u32 = 2_000_000_000;
/// AMQP's priorities are 0 to 9.
pub(crate) const MAX_PRIORITY: u8 = 9;

/// What a dead letter says of itself.
pub(crate) mod header {
    pub(crate) const REASON: &str = "x-hopline-reason";
    /// The instance that gave it up.
    pub(crate) const INSTANCE: &str = "x-hopline-instance";
    /// Where it was published to.
    pub(crate) const EXCHANGE: &str = "x-hopline-exchange";
    pub(crate) const KEY: &str = "x-hopline-key";
    /// How often it was tried.
    pub(crate) const ATTEMPTS: &str = "x-hopline-attempts";
    /// When it was given up, in milliseconds since 1970.
    pub(crate) const FAILED_AT: &str = "x-hopline-failed-at";
    pub(crate) const METHOD: &str = "x-hopline-method";
    /// Whose a message was that is published again: empty if nobody had verified that.
    pub(crate) const USER: &str = "x-hopline-user";
    /// The frame's id, or a new one for what has none.
    pub(crate) const ID: &str = "x-hopline-id";
    /// Earlier deaths of a message that was replayed: a line for each, the latest last.
    pub(crate) const HISTORY: &str = "x-hopline-history";

    /// What the header `wanted` says.
    pub(crate) fn value<'a>(headers: &'a [(String, String)], wanted: &str) -> Option<&'a str> {
        headers.iter().find(|(name, _)| name == wanted).map(|(_, value)| value.as_str())
    }
}

/// The prefix of every name on the broker: services of two namespaces do not see each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Namespace(String);

impl Default for Namespace {
    fn default() -> Self {
        Self("hopline".to_owned())
    }
}

impl Namespace {
    /// A namespace of this name.
    ///
    /// # Errors
    /// A sentence that says what is wrong with the name.
    pub fn new(name: &str) -> Result<Self, String> {
        check_name("namespace", name)?;
        Ok(Self(name.to_owned()))
    }

    pub(crate) fn rpc(&self) -> String {
        format!("{}.rpc", self.0)
    }

    pub(crate) fn oneway(&self) -> String {
        format!("{}.oneway", self.0)
    }

    pub(crate) fn events(&self) -> String {
        format!("{}.events", self.0)
    }

    pub(crate) fn discovery(&self) -> String {
        format!("{}.discovery", self.0)
    }

    pub(crate) fn calls_queue(&self, service: impl fmt::Display) -> String {
        format!("{}.{service}.calls", self.0)
    }

    pub(crate) fn work_queue(&self, service: impl fmt::Display) -> String {
        format!("{}.{service}.work", self.0)
    }

    pub(crate) fn retry_queue(&self, service: impl fmt::Display) -> String {
        format!("{}.{service}.retry", self.0)
    }

    pub(crate) fn dead_queue(&self, service: &ServiceId) -> String {
        format!("{}.{service}.dead", self.0)
    }

    /// Where the services stand that have dead letters.
    pub(crate) fn catalogue_queue(&self) -> String {
        format!("{}.services", self.0)
    }

    /// An instance's own queue; `suffix` is new at each connection, since the broker may still hold the old queue.
    pub(crate) fn instance_queue(&self, service: &ServiceId, instance: &str, suffix: &str) -> String {
        format!("{}.{service}@{instance}.{suffix}", self.0)
    }

    pub(crate) fn events_queue(&self, instance: &str, suffix: &str) -> String {
        format!("{}.events@{instance}.{suffix}", self.0)
    }

    pub(crate) fn reply_queue(&self, instance: &str, suffix: &str) -> String {
        format!("{}.reply@{instance}.{suffix}", self.0)
    }

    /// The exchanges that both sides publish to.
    pub(crate) fn exchanges(&self) -> Vec<Declaration> {
        [
            (self.rpc(), ExchangeKind::Direct),
            (self.oneway(), ExchangeKind::Topic),
            (self.events(), ExchangeKind::Topic),
            (self.discovery(), ExchangeKind::Fanout),
        ]
        .into_iter()
        .map(|(name, kind)| Declaration::Exchange(Exchange { name, kind }))
        .collect()
    }

    /// The queue of a service's calls, and what leads there.
    pub(crate) fn calls(&self, service: &ServiceId, calls: CallsQueue) -> Vec<Declaration> {
        let queue = Queue {
            expires: Some(calls.grace),
            max_length: calls.max_length,
            max_priority: (calls.priorities && calls.kind == QueueKind::Classic).then_some(MAX_PRIORITY),
            ..Queue::new(self.calls_queue(service), calls.kind)
        };
        let bound = binding(self.rpc(), service.to_string(), &queue.name);
        vec![Declaration::Queue(queue), bound]
    }

    /// The queue of a service's oneway calls, and what leads there: its `methods` that take such calls, and no others.
    pub(crate) fn work(&self, service: &ServiceId, methods: &[String]) -> Vec<Declaration> {
        let queue = Queue {
            // The broker counts what follows the first delivery.
            delivery_limit: Some(ONEWAY_DELIVERIES - 1),
            // The default exchange leads to every queue, and nobody can delete it or a binding of it.
            dead_letter: Some((String::new(), self.dead_queue(service))),
            ..Queue::new(self.work_queue(service), QueueKind::Quorum)
        };
        let bound = methods.iter().map(|method| binding(self.oneway(), oneway_key(service, method), &queue.name));
        let bound: Vec<_> = bound.collect();
        std::iter::once(Declaration::Queue(queue)).chain(bound).collect()
    }

    /// Where oneway calls wait that have failed, until their time is over and they go back to their queue.
    pub(crate) fn retry(&self, service: &ServiceId) -> Declaration {
        Declaration::Queue(Queue {
            dead_letter: Some((String::new(), self.work_queue(service))),
            ..Queue::new(self.retry_queue(service), QueueKind::Quorum)
        })
    }

    /// The queue of a service's dead letters: as safe as those from which they come.
    pub(crate) fn dead(&self, service: &ServiceId) -> Declaration {
        Declaration::Queue(Queue {
            delivery_limit: Some(KEPT_DELIVERIES),
            ..Queue::new(self.dead_queue(service), QueueKind::Quorum)
        })
    }

    /// The queue with an entry for each service that has dead letters: a classic one, since servers take messages out of it, and
    /// to get one from a quorum queue whose leader is away ends their whole connection.
    pub(crate) fn catalogue(&self) -> Declaration {
        Declaration::Queue(Queue::new(self.catalogue_queue(), QueueKind::Classic))
    }

    /// The `queue` of one instance of a service, and what leads there.
    pub(crate) fn instance(
        &self,
        service: &ServiceId,
        queue: &str,
        instance: &str,
        calls: CallsQueue,
    ) -> Vec<Declaration> {
        let unlimited = calls.max_length.is_none().then(|| binding(self.rpc(), unlimited_key(service), queue));
        let parts = [
            Declaration::Queue(Queue::new(queue, QueueKind::Exclusive)),
            binding(self.rpc(), instance_key(service, instance), queue),
            binding(self.rpc(), all_key(service), queue),
            binding(self.rpc(), presence_key(service), queue),
            binding(self.discovery(), String::new(), queue),
        ];
        parts.into_iter().chain(unlimited).collect()
    }

    /// A subscriber's queue and its patterns.
    pub(crate) fn subscription(&self, queue: &str, pattern: &str) -> Vec<Declaration> {
        vec![
            Declaration::Queue(Queue::new(queue, QueueKind::Exclusive)),
            binding(self.events(), pattern.to_owned(), queue),
        ]
    }
}

fn binding(exchange: String, key: String, queue: &str) -> Declaration {
    Declaration::Binding(Binding { exchange, key, queue: queue.to_owned() })
}

/// How a service's queue of calls is made; the same for every instance.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CallsQueue {
    pub(crate) kind: QueueKind,
    pub(crate) grace: Duration,
    pub(crate) max_length: Option<u32>,
    pub(crate) priorities: bool,
}

/// The key that reaches one instance on the exchange of calls.
pub(crate) fn instance_key(service: impl fmt::Display, instance: &str) -> String {
    format!("{service}@{instance}")
}

/// The key that reaches all instances on the exchange of calls: no name has a `*` in it.
pub(crate) fn all_key(service: impl fmt::Display) -> String {
    format!("{service}@*")
}

/// Whether a key on the exchange of calls reaches all instances of a service.
pub(crate) fn is_all_key(key: &str) -> bool {
    key.ends_with("@*")
}

/// The key of the question whether an instance is there whose service's queue of calls has no limit, so that it refuses none
/// while it can be reached: no name has a `~` in it.
pub(crate) fn unlimited_key(service: impl fmt::Display) -> String {
    format!("{service}@~")
}

/// The key of the question whether an instance is there that takes calls: no name has a `?` in it.
pub(crate) fn presence_key(service: impl fmt::Display) -> String {
    format!("{service}@?")
}

/// Whether a key on the exchange of calls is that of such a question.
pub(crate) fn is_presence_key(key: &str) -> bool {
    key.ends_with("@?")
}

/// The key of a oneway call.
pub(crate) fn oneway_key(service: &ServiceId, method: &str) -> String {
    format!("{service}.{method}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_wire_document() {
        let namespace = Namespace::default();
        let demo = ServiceId::new("demo", 2).expect("a good name");
        assert_eq!(namespace.calls_queue(&demo), "hopline.demo.v2.calls");
        assert_eq!(namespace.work_queue(&demo), "hopline.demo.v2.work");
        assert_eq!(namespace.retry_queue(&demo), "hopline.demo.v2.retry");
        assert_eq!(namespace.dead_queue(&demo), "hopline.demo.v2.dead");
        assert_eq!(namespace.instance_queue(&demo, "i", "s"), "hopline.demo.v2@i.s");
        assert_eq!((instance_key(&demo, "i"), all_key(&demo)), ("demo.v2@i".into(), "demo.v2@*".into()));
        assert_eq!(oneway_key(&demo, "note"), "demo.v2.note");
    }
}
