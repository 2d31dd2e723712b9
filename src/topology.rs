//! The names and arguments of everything that Hopline declares on the broker: exchanges, queues, bindings and routing
//! keys. All names are made here, so that clients, servers and operators' tools agree on them.

mod declaration;
pub(crate) mod deletion;
mod named;
mod service;
mod words;

use std::fmt;
use std::time::Duration;

use uuid::Uuid;

pub use self::declaration::{Binding, Declaration, Exchange, ExchangeKind, Queue, QueueKind};
pub use self::named::QueueRole;
pub use self::service::ServiceId;
pub(crate) use self::words::{check_event_key, check_event_pattern};
pub use self::words::{check_name, topic_matches};

/// How often the broker delivers a oneway call before it makes it a dead letter by itself. The limit is for calls that
/// kill the process that runs them. A delivery whose connection ends counts too: a broker that restarts closes its
/// connections one after the other, and passes the same call from instance to instance. The limit leaves room for that.
pub(crate) const ONEWAY_DELIVERIES: u32 = 20;
/// The delivery limit of the queues of dead letters: as good as none, for operators who take messages out and put them
/// back. Without this argument RabbitMQ 4 would drop a message after twenty looks at it, and 3.10 would requeue it
/// behind all others.
const KEPT_DELIVERIES: u32 = 2_000_000_000;
/// How much the stream of rules keeps, in bytes: some ten thousand changes.
const RULES_BYTES: u64 = 16 * 1024 * 1024;
/// The highest priority in AMQP; the lowest is 0.
pub(crate) const MAX_PRIORITY: u8 = 9;

/// The headers of a dead letter. They say where it comes from and why it failed.
pub(crate) mod header {
    /// Why it failed, for people to read.
    pub(crate) const REASON: &str = "x-hopline-reason";
    /// The instance that made it a dead letter.
    pub(crate) const INSTANCE: &str = "x-hopline-instance";
    /// The exchange that it was published to.
    pub(crate) const EXCHANGE: &str = "x-hopline-exchange";
    /// The routing key that it was published with.
    pub(crate) const KEY: &str = "x-hopline-key";
    /// How many attempts were made.
    pub(crate) const ATTEMPTS: &str = "x-hopline-attempts";
    /// When it became a dead letter, in milliseconds since 1970.
    pub(crate) const FAILED_AT: &str = "x-hopline-failed-at";
    /// The method that was called, without the service.
    pub(crate) const METHOD: &str = "x-hopline-method";
    /// The user who published it first. Empty if the broker has not verified that user.
    pub(crate) const USER: &str = "x-hopline-user";
    /// The frame's id, or a new id if the message has none.
    pub(crate) const ID: &str = "x-hopline-id";
    /// The earlier failures of a dead letter that was replayed: one line each, the latest last.
    pub(crate) const HISTORY: &str = "x-hopline-history";

    /// Whether a header of this name is Hopline's own.
    pub(crate) fn is_ours(name: &str) -> bool {
        name.starts_with("x-hopline-")
    }

    /// The value of the header `wanted`.
    pub(crate) fn value<'a>(headers: &'a [(String, String)], wanted: &str) -> Option<&'a str> {
        headers.iter().find(|(name, _)| name == wanted).map(|(_, value)| value.as_str())
    }
}

/// The prefix of every name on the broker. Services and clients of different namespaces do not see each other. Default:
/// `hopline`.
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

    /// The exchange of requests, cancels, and everything for one instance or all.
    #[must_use]
    pub fn rpc(&self) -> String {
        format!("{}.rpc", self.0)
    }

    /// The exchange of oneway calls that any instance may run.
    #[must_use]
    pub fn oneway(&self) -> String {
        format!("{}.oneway", self.0)
    }

    /// The exchange of events.
    #[must_use]
    pub fn events(&self) -> String {
        format!("{}.events", self.0)
    }

    /// The exchange of questions to every instance of every service, and of what instances announce.
    #[must_use]
    pub fn discovery(&self) -> String {
        format!("{}.discovery", self.0)
    }

    /// The queue that all instances of a service read requests from.
    pub(crate) fn calls_queue(&self, service: impl fmt::Display) -> String {
        format!("{}.{service}.calls", self.0)
    }

    /// The queue that all instances of a service read oneway calls from.
    pub(crate) fn work_queue(&self, service: impl fmt::Display) -> String {
        format!("{}.{service}.work", self.0)
    }

    /// The queue in which failed oneway calls wait for their next attempt.
    pub(crate) fn retry_queue(&self, service: impl fmt::Display) -> String {
        format!("{}.{service}.retry", self.0)
    }

    /// The queue of a service's dead letters.
    pub(crate) fn dead_queue(&self, service: &ServiceId) -> String {
        format!("{}.{service}.dead", self.0)
    }

    /// The stream that keeps the events of a pattern.
    pub(crate) fn kept_stream(&self, pattern: &str) -> String {
        format!("{}.kept:{pattern}", self.0)
    }

    /// The queue whose only message one instance of a group has: the one that reads the stream.
    pub(crate) fn turn_queue(&self, group: &ServiceId) -> String {
        format!("{}.{group}.turn", self.0)
    }

    /// The queue that says how far a group has read its stream.
    pub(crate) fn offset_queue(&self, group: &ServiceId) -> String {
        format!("{}.{group}.offset", self.0)
    }

    /// The exchange to which changes of rules are published, and the stream that keeps them.
    #[must_use]
    pub fn rules(&self) -> String {
        format!("{}.rules", self.0)
    }

    /// The queue that lists the services with dead letters.
    pub(crate) fn catalogue_queue(&self) -> String {
        format!("{}.services", self.0)
    }

    /// An instance's own queue. `suffix` differs for each connection, since the broker may not have deleted the last
    /// one's queue yet.
    pub(crate) fn instance_queue(&self, service: &ServiceId, instance: &str, suffix: &str) -> String {
        format!("{}.{service}@{instance}.{suffix}", self.0)
    }

    /// The queue of one subscription of an instance.
    pub(crate) fn events_queue(&self, instance: &str, suffix: &str) -> String {
        format!("{}.events@{instance}.{suffix}", self.0)
    }

    /// The queue in which a client gets its replies.
    pub(crate) fn reply_queue(&self, instance: &str, suffix: &str) -> String {
        format!("{}.reply@{instance}.{suffix}", self.0)
    }

    /// The exchanges that clients and servers publish to. Both declare them.
    #[must_use]
    pub fn exchanges(&self) -> Vec<Declaration> {
        [
            (self.rpc(), ExchangeKind::Direct),
            (self.oneway(), ExchangeKind::Topic),
            (self.events(), ExchangeKind::Topic),
            (self.discovery(), ExchangeKind::Direct),
        ]
        .into_iter()
        .map(|(name, kind)| Declaration::Exchange(Exchange { name, kind }))
        .collect()
    }

    /// The queue of a service's requests and its binding.
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

    /// The queue of a service's oneway calls, and a binding for each of `methods`: those that take oneway calls. The
    /// broker returns a oneway call of any other method to its sender.
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

    /// The queue of a group's events, and the binding of its pattern. It keeps them as [`work`](Self::work) keeps oneway
    /// calls.
    pub(crate) fn group(&self, group: &ServiceId, queue: &GroupQueue) -> Vec<Declaration> {
        let mut parts = self.work(group, &[]);
        if let Some(Declaration::Queue(work)) = parts.first_mut() {
            (work.max_length, work.single_active) = (queue.max_length, queue.in_order);
        }
        let bound =
            queue.pattern.as_ref().map(|pattern| binding(self.events(), pattern.clone(), &self.work_queue(group)));
        parts.extend(bound);
        parts
    }

    /// The stream that keeps the events of a pattern, and its binding.
    pub(crate) fn kept(&self, pattern: &str, age: Duration, bytes: u64) -> Vec<Declaration> {
        let stream = Queue::new(self.kept_stream(pattern), QueueKind::Stream);
        let stream = Queue { max_age: Some(age), max_bytes: Some(bytes), ..stream };
        let bound = binding(self.events(), pattern.to_owned(), &stream.name);
        vec![Declaration::Queue(stream), bound]
    }

    /// The queues of a group that reads a stream: for its turn, which one instance has, and for how far it has come.
    pub(crate) fn replaying(&self, group: &ServiceId) -> [Declaration; 2] {
        let kept = |name| Queue { delivery_limit: Some(KEPT_DELIVERIES), ..Queue::new(name, QueueKind::Quorum) };
        let turn = Queue { max_length: Some(1), single_active: true, ..kept(self.turn_queue(group)) };
        // More than one, since RabbitMQ 3 drops the latest when one that was taken out comes back to a full queue.
        let offset = Queue { max_length: Some(4), keeps_latest: true, ..kept(self.offset_queue(group)) };
        [turn, offset].map(Declaration::Queue)
    }

    /// The queue of oneway calls that wait for their next attempt. When a message's time is over, the broker moves it
    /// to the work queue.
    pub(crate) fn retry(&self, service: &ServiceId) -> Declaration {
        Declaration::Queue(Queue {
            dead_letter: Some((String::new(), self.work_queue(service))),
            ..Queue::new(self.retry_queue(service), QueueKind::Quorum)
        })
    }

    /// The queue of a service's dead letters. It is a quorum queue like those that dead letters come from, so they are
    /// kept as safely.
    pub(crate) fn dead(&self, service: &ServiceId) -> Declaration {
        Declaration::Queue(Queue {
            delivery_limit: Some(KEPT_DELIVERIES),
            ..Queue::new(self.dead_queue(service), QueueKind::Quorum)
        })
    }

    /// The queue with an entry for each service that has dead letters. It is a classic queue: servers get single
    /// messages from it, and RabbitMQ closes the whole connection when a quorum queue without a leader is asked for
    /// one.
    #[must_use]
    pub fn catalogue(&self) -> Declaration {
        Declaration::Queue(Queue::new(self.catalogue_queue(), QueueKind::Classic))
    }

    /// The exchange to which changes of rules are published, and the stream that keeps them. Everybody reads all of it.
    pub(crate) fn rules_kept(&self) -> Vec<Declaration> {
        let name = self.rules();
        let exchange = Exchange { name: name.clone(), kind: ExchangeKind::Fanout };
        let stream = Queue { max_bytes: Some(RULES_BYTES), ..Queue::new(name.clone(), QueueKind::Stream) };
        let bound = binding(name.clone(), String::new(), &name);
        vec![Declaration::Exchange(exchange), Declaration::Queue(stream), bound]
    }

    /// The `queue` of one instance of a service and its bindings: for calls to this instance, for broadcasts, for the
    /// questions of clients, and for discovery.
    pub(crate) fn instance(
        &self,
        service: &ServiceId,
        queue: &str,
        instance: &str,
        calls: CallsQueue,
    ) -> Vec<Declaration> {
        let mut parts = vec![
            Declaration::Queue(Queue::new(queue, QueueKind::Exclusive)),
            binding(self.rpc(), instance_key(service, instance), queue),
            binding(self.rpc(), all_key(service), queue),
            binding(self.discovery(), ASK_KEY.to_owned(), queue),
        ];
        // Nobody calls a group.
        if !service.is_group() {
            parts.push(binding(self.rpc(), presence_key(service), queue));
            parts.extend(calls.max_length.is_none().then(|| binding(self.rpc(), unlimited_key(service), queue)));
        }
        parts
    }

    /// The binding by which a client's `queue` of replies also gets what instances announce.
    pub(crate) fn announcements(&self, queue: &str) -> Declaration {
        Declaration::Binding(self.announced_to(queue))
    }

    /// The same, to unbind it.
    pub(crate) fn announced_to(&self, queue: &str) -> Binding {
        Binding { exchange: self.discovery(), key: TELL_KEY.to_owned(), queue: queue.to_owned() }
    }

    /// The queue of a subscription and the binding of its `pattern`.
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

/// How the queue of a service's requests is declared. It must be the same for every instance, or the broker refuses it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CallsQueue {
    /// Classic or quorum.
    pub(crate) kind: QueueKind,
    /// How long the queue stays after its last consumer has left.
    pub(crate) grace: Duration,
    /// How many messages may wait before the broker refuses more. `None`: no limit.
    pub(crate) max_length: Option<u32>,
    /// Whether messages of a higher priority overtake others.
    pub(crate) priorities: bool,
}

/// How the queue of a group's events is declared. It must be the same for every instance, but for the pattern.
#[derive(Debug, Clone)]
pub(crate) struct GroupQueue {
    /// Which events it gets. `None`: they come from a stream, and here are those that are tried again.
    pub(crate) pattern: Option<String>,
    /// How many messages may wait before the broker refuses more. `None`: no limit.
    pub(crate) max_length: Option<u32>,
    /// Whether one instance at a time gets the events.
    pub(crate) in_order: bool,
}

/// 48 random bits as text: enough to tell the instances of one namespace apart, short enough to read aloud.
pub(crate) fn short_id() -> String {
    let mut id = Uuid::new_v4().simple().to_string();
    id.truncate(12);
    id
}

/// The key that reaches every instance of every service, on the exchange of discovery.
pub(crate) const ASK_KEY: &str = "ask";
/// The key of what instances announce, on the exchange of discovery.
pub(crate) const TELL_KEY: &str = "tell";

/// The key that reaches one instance, on the exchange of calls.
pub(crate) fn instance_key(service: impl fmt::Display, instance: &str) -> String {
    format!("{service}@{instance}")
}

/// The key that reaches all instances of a service, on the exchange of calls. No name contains a `*`.
pub(crate) fn all_key(service: impl fmt::Display) -> String {
    format!("{service}@*")
}

/// Whether a key on the exchange of calls reaches all instances of a service.
pub(crate) fn is_all_key(key: &str) -> bool {
    key.ends_with("@*")
}

/// The key of the question whether an instance takes calls whose service's queue of calls has no limit. While such an
/// instance can be reached, no call is refused. No name contains a `~`.
pub(crate) fn unlimited_key(service: impl fmt::Display) -> String {
    format!("{service}@~")
}

/// The key of the question whether any instance takes calls. No name contains a `?`.
pub(crate) fn presence_key(service: impl fmt::Display) -> String {
    format!("{service}@?")
}

/// Whether a key on the exchange of calls is that of the question whether any instance takes calls.
pub(crate) fn is_presence_key(key: &str) -> bool {
    key.ends_with("@?")
}

/// The key of a oneway call that any instance may run.
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
        let group = ServiceId::group("billing").expect("a good name");
        assert_eq!(namespace.work_queue(&group), "hopline.group:billing.work");
        assert_eq!(namespace.dead_queue(&group), "hopline.group:billing.dead");
    }
}
