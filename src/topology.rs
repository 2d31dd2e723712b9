//! Every name on the broker, made once.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use crate::error::Error;

/// The longest name of a namespace, service or method, in bytes: the broker's names end at 255.
const MAX_NAME: usize = 64;

/// Whether `name` can be a part of a name on the broker: `[A-Za-z0-9_-]+`, so that dots separate.
///
/// # Errors
/// A sentence that says what is wrong with it.
pub fn check_name(what: &str, name: &str) -> Result<(), String> {
    if name.is_empty() {
        return Err(format!("a {what} needs a name"));
    }
    if name.len() > MAX_NAME {
        return Err(format!("the {what} `{name}` is longer than {MAX_NAME} bytes"));
    }
    match name.chars().find(|c| !(c.is_ascii_alphanumeric() || matches!(c, '_' | '-'))) {
        Some(c) => Err(format!("the {what} `{name}` has a {c:?} in it: use letters, digits, `_` and `-`")),
        None => Ok(()),
    }
}

/// The longest key that a message on the broker has, in bytes.
const MAX_KEY: usize = 255;

/// Whether `key` can be that of an event: words with single dots between them, 1 to 255 bytes, without `*` and `#`.
pub(crate) fn check_event_key(key: &str) -> Result<(), String> {
    check_words("event key", key)?;
    match key.find(['*', '#']) {
        Some(_) => {
            Err(format!("the event key `{key}` has a wildcard in it: those are for the patterns of subscribers"))
        }
        None => Ok(()),
    }
}

/// Whether `pattern` can be that of a subscription: as a key, and a word may be `*`, for any one, or `#`, for any number.
pub(crate) fn check_event_pattern(pattern: &str) -> Result<(), String> {
    check_words("event pattern", pattern)?;
    match pattern.split('.').find(|word| word.len() > 1 && word.contains(['*', '#'])) {
        Some(word) => {
            Err(format!("the event pattern `{pattern}` has `{word}` in it: `*` and `#` stand for whole words"))
        }
        None => Ok(()),
    }
}

fn check_words(what: &str, text: &str) -> Result<(), String> {
    if text.is_empty() {
        return Err(format!("an {what} has at least one word, such as `order` in `order.created`"));
    }
    if text.len() > MAX_KEY {
        return Err(format!("the {what} `{text}` is longer than {MAX_KEY} bytes"));
    }
    match text.split('.').any(str::is_empty) {
        true => Err(format!("the {what} `{text}` has an empty word: write words with single dots between them")),
        false => Ok(()),
    }
}

/// A service's name and major version, written `name.vMAJOR`; a bare `name` is its version 1.
///
/// ```
/// use hopline::ServiceId;
///
/// # fn main() -> Result<(), hopline::Error> {
/// let service: ServiceId = "billing.v2".parse()?;
/// assert_eq!((service.name(), service.version()), ("billing", 2));
/// assert_eq!("billing".parse::<ServiceId>()?.to_string(), "billing.v1");
/// let (service, method) = ServiceId::with_method("billing.v2.total")?;
/// assert_eq!((service.to_string().as_str(), method), ("billing.v2", "total"));
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceId {
    name: String,
    version: u32,
}

impl ServiceId {
    /// The service `name` in its major `version`.
    ///
    /// # Errors
    /// A sentence that says what is wrong with the name.
    pub(crate) fn new(name: &str, version: u32) -> Result<Self, String> {
        check_name("service", name)?;
        Ok(Self { name: name.to_owned(), version })
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its major version.
    #[must_use]
    pub fn version(&self) -> u32 {
        self.version
    }

    /// Reads a service and one of its methods, `name.method` or `name.vMAJOR.method`.
    ///
    /// # Errors
    /// `Invalid`, which says what is wrong with it.
    pub fn with_method(text: &str) -> Result<(Self, &str), Error> {
        let split = text.rsplit_once('.').ok_or_else(|| "write SERVICE.METHOD, such as demo.add".to_owned());
        let parsed = split.and_then(|(service, method)| {
            let service = Self::parse(service)?;
            check_name("method", method)?;
            Ok((service, method))
        });
        parsed.map_err(Error::Invalid)
    }

    /// Reads `name.vMAJOR`; a bare `name` is its version 1.
    ///
    /// # Errors
    /// A sentence that says what is wrong with it.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let Some((name, version)) = text.split_once('.') else { return Self::new(text, 1) };
        let number = version.strip_prefix('v').and_then(|digits| digits.parse::<u32>().ok());
        // What is not written as it is on the broker, as in `v+1` or `v01`, would be another name there.
        match number {
            Some(number) if version == format!("v{number}") => Self::new(name, number),
            _ => Err(format!("`{text}` is not a service: write `name` or `name.v2`")),
        }
    }
}

impl FromStr for ServiceId {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        Self::parse(text).map_err(Error::Invalid)
    }
}

impl fmt::Display for ServiceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.v{}", self.name, self.version)
    }
}

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

/// Whether a topic exchange sends `key` to a queue bound with `pattern`: `*` is one word, `#` any number of them.
#[must_use]
pub fn topic_matches(pattern: &str, key: &str) -> bool {
    fn words_match(pattern: &[&str], key: &[&str]) -> bool {
        match (pattern.split_first(), key.split_first()) {
            (None, None) => true,
            (Some((&"#", rest)), _) => {
                words_match(rest, key) || key.split_first().is_some_and(|(_, key)| words_match(pattern, key))
            }
            (Some((word, rest)), Some((first, key))) => (*word == "*" || word == first) && words_match(rest, key),
            _ => false,
        }
    }
    let pattern: Vec<&str> = pattern.split('.').collect();
    let key: Vec<&str> = key.split('.').collect();
    words_match(&pattern, &key)
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

    #[test]
    fn a_bad_name_is_refused_with_the_character_in_it() {
        assert_eq!(
            ServiceId::new("a.b", 1),
            Err("the service `a.b` has a '.' in it: use letters, digits, `_` and `-`".into())
        );
        assert!(Namespace::new("").is_err());
        assert!(check_name("method", &"x".repeat(65)).is_err());
        for text in ["demo.2", "demo.v", "demo.v+1", "demo.v01", "demo.v4294967296"] {
            assert!(ServiceId::parse(text).is_err(), "{text}");
        }
        assert!(ServiceId::parse("demo.v1.add").is_err());
    }

    #[test]
    fn a_bare_name_is_version_one() {
        assert_eq!(ServiceId::parse("demo"), ServiceId::new("demo", 1));
        assert_eq!(ServiceId::parse("demo.v7"), ServiceId::new("demo", 7));
    }

    #[test]
    fn keys_of_events_are_words_with_dots_between_them_and_patterns_have_wildcards_too() {
        let longest = "x".repeat(255);
        for key in ["order", "order.created", "Größe.a b", &longest] {
            assert_eq!(check_event_key(key), Ok(()));
            assert_eq!(check_event_pattern(key), Ok(()));
        }
        for pattern in ["#", "*", "order.*", "#.eu", "a.#.*"] {
            assert_eq!(check_event_pattern(pattern), Ok(()));
            let why = check_event_key(pattern).expect_err("a wildcard");
            assert!(why.contains(pattern) && why.contains("wildcard"), "{why}");
        }
        for (wrong, said) in [
            ("", "at least one word"),
            (".", "empty word"),
            (".order", "empty word"),
            ("order.", "empty word"),
            ("order..#.*", "empty word"),
            (&*"x".repeat(256), "255 bytes"),
        ] {
            for checked in [check_event_key(wrong), check_event_pattern(wrong)] {
                let why = checked.expect_err(wrong);
                assert!(why.contains(wrong) && why.contains(said), "{why}");
            }
        }
        for pattern in ["order*", "order.#x", "**", "a.*#"] {
            assert!(check_event_pattern(pattern).expect_err(pattern).contains("whole words"));
        }
    }

    #[test]
    fn topic_patterns_match_whole_words() {
        assert!(topic_matches("order.*", "order.created"));
        assert!(!topic_matches("order.*", "order"));
        assert!(!topic_matches("order.*", "order.created.eu"));
        assert!(topic_matches("order.#", "order"));
        assert!(topic_matches("#.eu", "order.created.eu"));
        assert!(topic_matches("#", ""));
        assert!(topic_matches("a.#.b.*", "a.x.y.b.c"));
        assert!(!topic_matches("a.#.b.*", "a.x.y.c"));
    }
}
