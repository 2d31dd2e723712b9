//! What an instance says about itself, as documents. The server writes them, and the registry reads them.
//!
//! Each document begins with its `type`: the name of the document after its version, such as `hopline.v1.info`. A
//! version may gain members: a reader ignores a member that it does not know, and takes the default for one that is
//! missing. A change that an older reader would misread needs a new version.

mod announcement;
mod rule;
#[cfg(feature = "schema")]
mod schema;
mod stats;
mod tap;

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

pub(crate) use self::announcement::{ANNOUNCED, Announcement, LifeState};
pub use self::rule::RuleInForce;
pub(crate) use self::rule::{RULE, RuleDocument};
#[cfg(feature = "schema")]
pub use self::schema::{MethodSchema, ParameterSchema, ServiceSchema};
pub use self::stats::{Histogram, InstanceStats, LastFault, MethodStats};
pub use self::tap::{Tapped, TappedCall};

/// The question whether an instance is up. The result is empty. All names of questions contain a dot, so that
/// no method of a service can have the same name.
pub(crate) const PING: &str = "hopline.ping";
/// The question for an [`Instance`].
pub(crate) const INFO: &str = "hopline.info";
/// The question for an [`InstanceStats`].
pub(crate) const STATS: &str = "hopline.stats";
/// The question for a [`ServiceSchema`].
#[cfg(feature = "schema")]
pub(crate) const SCHEMA: &str = "hopline.schema";

/// The question that makes one instance drain. The result is empty.
pub(crate) const DRAIN: &str = "hopline.drain";
/// The question for the calls that an instance runs. It is answered for a while, by one [`Tapped`] after the other.
pub(crate) const TAP: &str = "hopline.tap";

/// A document that an instance can be asked for.
pub(crate) trait Document: Serialize + DeserializeOwned {
    /// The name of the question that this document answers.
    const QUESTION: &str;
    /// Its `type` member, with the version.
    const TYPE: &str;

    /// The service and the instance that wrote it. Clients sort documents by this.
    fn source(&self) -> (&str, &str);
}

/// Only the `type` of a document. It is read before the document, so that no other document is read by mistake.
#[derive(Deserialize)]
pub(crate) struct Typed {
    #[serde(rename = "type", default)]
    kind: String,
}

impl Typed {
    /// Whether the document can be read as a `D`. A document without a `type` can: it answers the question for a `D`.
    pub(crate) fn is<D: Document>(&self) -> bool {
        self.kind.is_empty() || self.kind == D::TYPE
    }
}

/// An instance of a service, and what it serves: the document `hopline.v1.info`. A [`Registry`](crate::Registry) gathers
/// them.
///
/// ```
/// # async fn example(client: hopline::Client) -> Result<(), hopline::Error> {
/// for instance in client.registry().instances("demo").await? {
///     let methods: Vec<_> = instance.methods.iter().map(|method| &*method.signature).collect();
///     println!("{} at {}: {}", instance.service, instance.instance, methods.join(", "));
/// }
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename = "hopline.v1.info", default)]
#[non_exhaustive]
pub struct Instance {
    /// The service, as `name.vMAJOR`.
    pub service: String,
    /// The instance's id: what [`Call::to`](crate::Call::to) takes.
    pub instance: String,
    /// The version of Hopline that the instance runs.
    pub hopline: String,
    /// The name of the machine that it runs on. Empty if it is not known.
    pub host: String,
    /// The id of its process. 0 if it is not known.
    pub pid: u32,
    /// When it started, in milliseconds since 1970, by the clock of its machine. 0 if it is not known. See
    /// [`started_at`](Self::started_at).
    pub started_at_ms: u64,
    /// The serializations that it reads, as [`Codec::name`](crate::Codec::name) writes them.
    pub codecs: Vec<String>,
    /// The compressions that it reads, as [`Compression::name`](crate::Compression::name) writes them.
    pub compressions: Vec<String>,
    /// Whether it drains: it takes no more calls, and ends when those that run have ended.
    pub draining: bool,
    /// Whether it takes no calls for a while, since too many have failed there: [`Quarantine`](crate::Quarantine).
    pub quarantined: bool,
    /// What its program says about it, by [`Server::attribute`](crate::Server::attribute).
    pub attributes: BTreeMap<String, String>,
    /// The rules of the service and its methods that are in force there, by their targets. `None` if it does not [heed
    /// rules](crate::ServerBuilder::rules).
    pub rules: Option<Vec<RuleInForce>>,
    /// Its methods, sorted by name.
    pub methods: Vec<MethodInfo>,
}

impl Instance {
    /// When it started, by the clock of its machine. `None` if that is not known.
    #[must_use]
    pub fn started_at(&self) -> Option<SystemTime> {
        since_1970(self.started_at_ms)
    }
}

/// The point in time that is so many milliseconds after the beginning of 1970. `None` for 0, which stands for nothing.
fn since_1970(millis: u64) -> Option<SystemTime> {
    (millis > 0).then(|| UNIX_EPOCH.checked_add(Duration::from_millis(millis)))?
}

impl Document for Instance {
    const QUESTION: &str = INFO;
    const TYPE: &str = "hopline.v1.info";

    fn source(&self) -> (&str, &str) {
        (&self.service, &self.instance)
    }
}

/// What an instance says about one of its methods.
///
/// ```
/// # fn example(instance: hopline::Instance) {
/// for method in instance.methods.iter().filter(|method| !method.oneway) {
///     println!("{}: {}", method.name, method.signature);
/// }
/// # }
/// ```
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct MethodInfo {
    /// The name to call it by, or `*` for what answers the calls of all other methods:
    /// [`Service::fallback`](crate::Service::fallback).
    pub name: String,
    /// Its declaration in the language of the service, or only the name if the declaration is not known.
    pub signature: String,
    /// Whether it takes oneway calls, which have no reply.
    pub oneway: bool,
    /// Whether a call may run twice without harm.
    pub idempotent: bool,
    /// Whether a handler that has begun runs to its end, even when the caller gives up.
    pub finishes: bool,
    /// For how many milliseconds an instance remembers how a call has ended, so that the same call does not run again.
    /// `None`: it remembers nothing.
    pub dedup_ms: Option<u64>,
    /// The time-out of calls that set none, in milliseconds, as the service's trait declares it. `None`: that is up to
    /// the client.
    pub timeout_ms: Option<u64>,
    /// Whether the instance knows the schema of its types. The cargo feature `schema` has `Registry::schema`, which asks
    /// for it.
    pub schema: bool,
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::codec::Codec;

    fn written<D: Document>(codec: Codec, document: &D) -> Vec<u8> {
        codec.encode(document).expect("it can be written")
    }

    #[test]
    fn a_document_says_first_what_it_is() {
        let info = String::from_utf8(written(Codec::Json, &Instance::default())).expect("JSON");
        assert!(info.starts_with(r#"{"type":"hopline.v1.info","service":"#), "{info}");
        let stats = String::from_utf8(written(Codec::Json, &InstanceStats::default())).expect("JSON");
        assert!(stats.starts_with(r#"{"type":"hopline.v1.stats","service":"#), "{stats}");
        let tapped = String::from_utf8(written(Codec::Json, &Tapped::default())).expect("JSON");
        assert!(tapped.starts_with(r#"{"type":"hopline.v1.tap","service":"#), "{tapped}");
        let types = (Instance::TYPE, InstanceStats::TYPE, Tapped::TYPE);
        assert_eq!(types, ("hopline.v1.info", "hopline.v1.stats", "hopline.v1.tap"));
    }

    #[test]
    fn a_document_is_read_as_it_was_written() {
        for codec in [Codec::Cbor, Codec::Json, Codec::MessagePack] {
            let method = MethodInfo {
                name: "add".into(),
                signature: "add()".into(),
                oneway: true,
                idempotent: true,
                finishes: true,
                dedup_ms: Some(7),
                timeout_ms: None,
                schema: true,
            };
            let info = Instance {
                service: "math.v1".into(),
                instance: "a1".into(),
                hopline: "1".into(),
                host: "here".into(),
                pid: 5,
                started_at_ms: 1,
                draining: true,
                quarantined: true,
                codecs: vec!["CBOR".into()],
                compressions: vec!["lz4".into()],
                attributes: BTreeMap::from([("zone".into(), "eu1".into())]),
                rules: Some(vec![RuleInForce { target: "math.v1".into(), at_ms: 9, ..RuleInForce::default() }]),
                methods: vec![method],
            };
            let payload = written(codec, &info);
            assert!(codec.decode::<Typed>(&payload).is_ok_and(|typed| typed.is::<Instance>()));
            assert_eq!(codec.decode::<Instance>(&payload), Ok(info));
            let mut stats = InstanceStats { running: 3, ..InstanceStats::default() };
            let last_fault = Some(LastFault { code: "INTERNAL".into(), message: "oh".into(), at_ms: 3 });
            stats.methods.push(MethodStats { name: "add".into(), finished: 7, last_fault, ..MethodStats::default() });
            let payload = written(codec, &stats);
            assert!(codec.decode::<Typed>(&payload).is_ok_and(|typed| typed.is::<InstanceStats>()));
            assert!(codec.decode::<Typed>(&payload).is_ok_and(|typed| !typed.is::<Instance>()));
            assert_eq!(codec.decode::<InstanceStats>(&payload), Ok(stats));
            let call =
                TappedCall { method: "add".into(), queue_micros: Some(4), own_error: true, ..TappedCall::default() };
            let tapped = Tapped { calls: vec![call], left_out: 2, last: true, ..Tapped::default() };
            assert_eq!(codec.decode::<Tapped>(&written(codec, &tapped)), Ok(tapped));
        }
    }

    #[test]
    fn a_reader_ignores_what_it_does_not_know_and_takes_defaults_for_what_is_missing() {
        let read = |value: Value| Codec::Json.decode::<Instance>(value.to_string().as_bytes());
        assert_eq!(read(json!({})), Ok(Instance::default()));
        let newer = json!({"type": "hopline.v1.info", "service": "math.v1", "colour": {"add": []},
            "methods": [{"name": "add", "cost": 1.5}]});
        let expected = Instance {
            service: "math.v1".into(),
            methods: vec![MethodInfo { name: "add".into(), ..MethodInfo::default() }],
            ..Instance::default()
        };
        assert_eq!(read(newer), Ok(expected));
        let stats = json!({"methods": [{"handler_time": {"count": 1}, "faults": {"NEW": 1}}]});
        let stats = Codec::Json.decode::<InstanceStats>(stats.to_string().as_bytes()).expect("it is read");
        assert_eq!((stats.methods[0].handler_time.count, stats.methods[0].faults["NEW"]), (1, 1));
    }

    #[test]
    fn another_version_is_known_as_one_and_what_has_no_type_is_taken_for_what_was_asked_for() {
        let typed = |value: Value| Codec::Json.decode::<Typed>(value.to_string().as_bytes()).expect("an object");
        assert!(!typed(json!({"type": "hopline.v2.info"})).is::<Instance>());
        assert!(typed(json!({"service": "math.v1"})).is::<Instance>());
    }

    #[test]
    fn a_start_is_a_point_in_time_unless_it_is_not_known() {
        assert_eq!(Instance::default().started_at(), None);
        let started = Instance { started_at_ms: 1_500, ..Instance::default() }.started_at();
        assert_eq!(started, Some(UNIX_EPOCH + Duration::from_millis(1_500)));
        let absurd = Instance { started_at_ms: u64::MAX, ..Instance::default() };
        // What cannot be told is no panic.
        let _ = absurd.started_at();
    }
}
