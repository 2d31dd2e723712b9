//! Where messages go: the exchange and the routing key of each call, event, cancel and question. No other file combines
//! an exchange and a key; `topology.rs` makes their names.

use std::hash::{Hash, Hasher};
use std::sync::Arc;

use bytes::Bytes;

use crate::frame::Kind;
use crate::outgoing::Lane;
use crate::topology::{ASK_KEY, Namespace, TELL_KEY, all_key, instance_key, is_all_key, presence_key, unlimited_key};
use crate::transport::{Properties, Publication};

/// Which instances of its service a call is for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) enum Recipients {
    /// Any one of them.
    #[default]
    Any,
    /// This one alone, by its id.
    One(String),
    /// Every instance that is up.
    All,
    /// Every instance of every service, for questions of discovery.
    Everywhere,
}

impl Recipients {
    /// The one instance that the call is for, if it is for one.
    pub(crate) fn instance(&self) -> Option<&str> {
        match self {
            Self::One(instance) => Some(instance),
            Self::Any | Self::All | Self::Everywhere => None,
        }
    }
}

/// Where a message is published to, and what all its frames have in common. Frames with equal addresses may share a
/// message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Address {
    exchange: Arc<str>,
    key: Arc<str>,
    kind: Kind,
    priority: Option<u8>,
    is_mandatory: bool,
}

/// A question that a client asks about a service. It is sent as a cancel without a call. The broker answers it: it
/// returns the message if no instance has a queue for it, which means no.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Question {
    /// Does any instance take calls?
    IsThere,
    /// Is there an instance whose queue of calls has no limit?
    HasNoLimit,
}

/// The exchanges of one namespace, and the addresses on them.
#[derive(Debug, Clone)]
pub(crate) struct Exchanges {
    rpc: Arc<str>,
    oneway: Arc<str>,
    events: Arc<str>,
    discovery: Arc<str>,
}

impl Exchanges {
    pub(crate) fn of(namespace: &Namespace) -> Self {
        Self {
            rpc: namespace.rpc().into(),
            oneway: namespace.oneway().into(),
            events: namespace.events().into(),
            discovery: namespace.discovery().into(),
        }
    }

    /// Where a request to a `service`, written `name.vMAJOR`, goes.
    pub(crate) fn request(&self, recipients: &Recipients, service: &Arc<str>) -> Address {
        match recipients {
            Recipients::Any => Address::new(&self.rpc, service.clone(), Kind::Request),
            Recipients::Everywhere => Address::new(&self.discovery, ASK_KEY.into(), Kind::Request),
            Recipients::One(_) | Recipients::All => self.to_instances(recipients, service, Kind::Request),
        }
    }

    /// The address of a oneway call. `method` is written `name.vMAJOR.method`.
    pub(crate) fn oneway(&self, recipients: &Recipients, service: &str, method: &Arc<str>) -> Address {
        match recipients {
            Recipients::Any => Address::new(&self.oneway, method.clone(), Kind::Oneway),
            Recipients::One(_) | Recipients::All | Recipients::Everywhere => {
                self.to_instances(recipients, service, Kind::Oneway)
            }
        }
    }

    /// A message to everybody who watches the instances.
    pub(crate) fn announcement(&self, body: Bytes) -> Publication {
        let (exchange, key, properties) = (self.discovery.to_string(), TELL_KEY.to_owned(), Properties::default());
        Publication { exchange, key, mandatory: false, properties, body }
    }

    /// Where an event goes. Whether the broker returns it if no queue gets it is for its publisher to say.
    pub(crate) fn event(&self, key: Arc<str>, is_mandatory: bool) -> Address {
        Address { is_mandatory, ..Address::new(&self.events, key, Kind::Event) }
    }

    /// The address of the cancel of a call that was sent by `recipients`. If any instance may run the call, the cancel goes
    /// to all.
    pub(crate) fn cancel(&self, recipients: &Recipients, service: &str) -> Address {
        self.to_instances(recipients, service, Kind::Cancel)
    }

    /// The address of the question which instance is running a call.
    pub(crate) fn locate(&self, recipients: &Recipients, service: &str) -> Address {
        self.to_instances(recipients, service, Kind::Locate)
    }

    /// The address of a question about a service.
    pub(crate) fn question(&self, question: Question, service: &str) -> Address {
        let key = match question {
            Question::IsThere => presence_key(service),
            Question::HasNoLimit => unlimited_key(service),
        };
        Address::new(&self.rpc, key.into(), Kind::Cancel)
    }

    /// Whether a message with this exchange and key went to all instances of a service.
    pub(crate) fn is_for_all(&self, exchange: &str, key: &str) -> bool {
        (exchange == &*self.rpc && is_all_key(key)) || exchange == &*self.discovery
    }

    /// A message that no queue gets. The broker confirms it as soon as it has read it, so it measures the round trip.
    pub(crate) fn probe(&self) -> Publication {
        Publication::to_nobody(self.rpc.to_string())
    }

    /// The address of the own queues of one instance, or of all.
    fn to_instances(&self, recipients: &Recipients, service: &str, kind: Kind) -> Address {
        let key = match recipients {
            Recipients::One(instance) => instance_key(service, instance),
            Recipients::Any | Recipients::All | Recipients::Everywhere => all_key(service),
        };
        Address::new(&self.rpc, key.into(), kind)
    }
}

impl Address {
    fn new(exchange: &Arc<str>, key: Arc<str>, kind: Kind) -> Self {
        Self { exchange: exchange.clone(), key, kind, priority: None, is_mandatory: true }
    }

    /// A queue, by its name.
    #[cfg(test)]
    pub(crate) fn queue(name: &str, kind: Kind) -> Self {
        Self { exchange: "".into(), key: name.into(), kind, priority: None, is_mandatory: true }
    }

    /// The same address for messages of this priority, 0 to 9.
    pub(crate) fn with_priority(self, priority: Option<u8>) -> Self {
        Self { priority, ..self }
    }

    /// The same exchange with the key of one instance of a service.
    pub(crate) fn at(self, service: &str, instance: &str) -> Self {
        Self { key: instance_key(service, instance).into(), ..self }
    }

    /// The kind of frames that are published here.
    pub(crate) fn kind(&self) -> Kind {
        self.kind
    }

    pub(crate) fn exchange(&self) -> &Arc<str> {
        &self.exchange
    }

    pub(crate) fn key(&self) -> &Arc<str> {
        &self.key
    }

    pub(crate) fn priority(&self) -> Option<u8> {
        self.priority
    }

    /// Whether its messages name a queue for replies.
    pub(crate) fn is_answered(&self) -> bool {
        self.kind == Kind::Request
    }

    /// Whether the broker returns a message that no queue gets. It does so for all but events whose publisher does not ask.
    pub(crate) fn is_mandatory(&self) -> bool {
        self.is_mandatory
    }

    /// Whether its messages survive a restart of the broker.
    pub(crate) fn is_persistent(&self) -> bool {
        matches!(self.kind, Kind::Oneway | Kind::Event)
    }

    /// Whether any instance of `service` may run its requests.
    pub(crate) fn is_for_any(&self, service: &str) -> bool {
        self.kind == Kind::Request && *self.key == *service
    }

    /// The service whose work queue it leads to, if it is for oneway calls that any instance may run.
    pub(crate) fn worked_off_by(&self) -> Option<&str> {
        // An instance's key ends in `@` and its id; that of a oneway call in the method, which has no dot in it.
        let (service, method) = self.key.rsplit_once('.').filter(|_| self.kind == Kind::Oneway)?;
        (!method.contains('@')).then_some(service)
    }

    /// The lane of its messages: addresses that lead to the same queue share one. A service's oneway calls have one
    /// queue for all methods.
    pub(crate) fn lane(&self) -> Lane {
        Lane::of((self.kind as u8, self.worked_off_by().unwrap_or(&self.key)))
    }

    /// A message to this address. The address also sets the priority and the persistence in `properties`.
    pub(crate) fn publication(&self, properties: Properties, body: Bytes) -> Publication {
        Publication {
            exchange: self.exchange.to_string(),
            key: self.key.to_string(),
            mandatory: self.is_mandatory(),
            properties: Properties { persistent: self.is_persistent(), priority: self.priority, ..properties },
            body,
        }
    }
}

/// A message to the queue `name`, through the default exchange. The broker returns it if the queue does not exist.
pub(crate) fn to_queue(name: String, properties: Properties, body: Bytes) -> Publication {
    Publication { exchange: String::new(), key: name, mandatory: true, properties, body }
}

impl Hash for Address {
    /// By what differs most.
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        self.key.hash(hasher);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exchanges() -> Exchanges {
        Exchanges::of(&Namespace::new("shop").expect("a good name"))
    }

    fn one() -> Recipients {
        Recipients::One("a1".to_owned())
    }

    /// Exchange, key and kind.
    fn parts(address: &Address) -> (&str, &str, Kind) {
        (address.exchange(), address.key(), address.kind())
    }

    #[test]
    fn a_request_goes_to_the_queue_of_its_service_or_to_the_queues_of_its_instances() {
        let (exchanges, service) = (exchanges(), Arc::from("demo.v1"));
        for (recipients, key) in [(Recipients::Any, "demo.v1"), (one(), "demo.v1@a1"), (Recipients::All, "demo.v1@*")] {
            let address = exchanges.request(&recipients, &service);
            assert_eq!(parts(&address), ("shop.rpc", key, Kind::Request));
            assert!(address.is_answered() && address.is_mandatory() && !address.is_persistent());
            assert_eq!(address.is_for_any("demo.v1"), recipients == Recipients::Any);
            assert_eq!(exchanges.is_for_all(address.exchange(), address.key()), recipients == Recipients::All);
        }
    }

    #[test]
    fn a_oneway_call_goes_to_the_work_queue_by_its_method_or_to_the_queues_of_instances() {
        let (exchanges, method) = (exchanges(), Arc::from("demo.v1.note"));
        for (recipients, exchange, key, worked_off_by) in [
            (Recipients::Any, "shop.oneway", "demo.v1.note", Some("demo.v1")),
            (one(), "shop.rpc", "demo.v1@a1", None),
            (Recipients::All, "shop.rpc", "demo.v1@*", None),
        ] {
            let address = exchanges.oneway(&recipients, "demo.v1", &method);
            assert_eq!(parts(&address), (exchange, key, Kind::Oneway));
            assert!(!address.is_answered() && address.is_mandatory() && address.is_persistent());
            assert_eq!(address.worked_off_by(), worked_off_by);
        }
    }

    #[test]
    fn an_event_goes_to_whoever_listens_be_it_nobody() {
        let event = |is_mandatory| exchanges().event("order.created".into(), is_mandatory);
        let address = event(false);
        assert_eq!(parts(&address), ("shop.events", "order.created", Kind::Event));
        assert!(!address.is_answered() && !address.is_mandatory() && address.is_persistent());
        assert_eq!(address.worked_off_by(), None);
        assert!(event(true).is_mandatory() && event(true) != address, "they do not share a message");
        assert_eq!(event(true).lane(), address.lane());
    }

    #[test]
    fn a_cancel_goes_to_whoever_may_run_the_call() {
        for (recipients, key) in [(Recipients::Any, "demo.v1@*"), (one(), "demo.v1@a1"), (Recipients::All, "demo.v1@*")]
        {
            let address = exchanges().cancel(&recipients, "demo.v1");
            assert_eq!(parts(&address), ("shop.rpc", key, Kind::Cancel));
            assert!(address.is_mandatory() && !address.is_persistent());
            let located = exchanges().locate(&recipients, "demo.v1");
            assert_eq!(parts(&located), ("shop.rpc", key, Kind::Locate));
        }
        let at_one = exchanges().cancel(&Recipients::Any, "demo.v1").at("demo.v1", "b2");
        assert_eq!(parts(&at_one), ("shop.rpc", "demo.v1@b2", Kind::Cancel));
    }

    #[test]
    fn questions_go_to_all_or_to_nobody_in_particular() {
        let exchanges = exchanges();
        let discovery = exchanges.request(&Recipients::Everywhere, &"hopline.v1".into());
        assert_eq!(parts(&discovery), ("shop.discovery", "ask", Kind::Request));
        assert!(exchanges.is_for_all(discovery.exchange(), discovery.key()));
        for (question, key) in [(Question::IsThere, "demo.v1@?"), (Question::HasNoLimit, "demo.v1@~")] {
            let address = exchanges.question(question, "demo.v1");
            assert_eq!(parts(&address), ("shop.rpc", key, Kind::Cancel));
            assert!(address.is_mandatory(), "the return is the answer");
        }
        let probe = exchanges.probe();
        assert_eq!((&*probe.exchange, &*probe.key, probe.mandatory), ("shop.rpc", "", false));
    }

    #[test]
    fn what_goes_to_one_queue_shares_a_lane() {
        let exchanges = exchanges();
        let oneway = |method: &str| exchanges.oneway(&Recipients::Any, "demo.v1", &method.into()).lane();
        assert_eq!(oneway("demo.v1.note"), oneway("demo.v1.other"));
        assert_ne!(oneway("demo.v1.note"), oneway("demo.v2.note"));
        let service = Arc::from("demo.v1");
        assert_ne!(exchanges.request(&Recipients::Any, &service).lane(), exchanges.request(&one(), &service).lane());
        let urgent = exchanges.request(&Recipients::Any, &service).with_priority(Some(9));
        assert_eq!(exchanges.request(&Recipients::Any, &service).lane(), urgent.lane());
    }

    #[test]
    fn a_publication_has_what_its_address_says() {
        let address = exchanges().oneway(&Recipients::Any, "demo.v1", &"demo.v1.note".into()).with_priority(Some(3));
        let published = address.publication(Properties::default(), Bytes::from_static(b"x"));
        assert_eq!((&*published.exchange, &*published.key), ("shop.oneway", "demo.v1.note"));
        assert_eq!((published.mandatory, published.properties.persistent), (true, true));
        assert_eq!((published.properties.priority, &*published.body), (Some(3), &b"x"[..]));
        let to_queue = to_queue("shop.reply@c3".to_owned(), Properties::default(), Bytes::new());
        assert_eq!((&*to_queue.exchange, &*to_queue.key, to_queue.mandatory), ("", "shop.reply@c3", true));
    }
}
