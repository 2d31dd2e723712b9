//! What an instance says about itself, as documents. The server writes them; `Client::instances` and `Client::stats`
//! read them.
//!
//! Each document begins with its `type`: the name of the document after its version, such as `hopline.v1.info`. A
//! version may gain members: a reader ignores a member that it does not know, and takes the default for one that is
//! missing. A change that an older reader would misread needs a new version.

mod stats;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

pub use self::stats::{Histogram, InstanceStats, MethodStats};

/// The question whether an instance is up. The result is empty. All names of questions contain a dot, so that
/// no method of a service can have the same name.
pub(crate) const PING: &str = "hopline.ping";
/// The question for an [`Instance`].
pub(crate) const INFO: &str = "hopline.info";
/// The question for an [`InstanceStats`].
pub(crate) const STATS: &str = "hopline.stats";

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

/// What an instance of a service serves: the document `hopline.v1.info`.
/// [`Client::instances`](crate::Client::instances) collects them.
///
/// ```
/// # use std::time::Duration;
/// # async fn example(client: hopline::Client) -> Result<(), hopline::Error> {
/// for instance in client.instances(Duration::from_millis(500)).await? {
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
    /// Its methods, sorted by name.
    pub methods: Vec<MethodInfo>,
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
    /// The name to call it by.
    pub name: String,
    /// Its declaration in the language of the service, or only the name if the declaration is not known.
    pub signature: String,
    /// Whether it takes oneway calls, which have no reply.
    pub oneway: bool,
    /// Whether a call may run twice without harm.
    pub idempotent: bool,
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
        assert_eq!((Instance::TYPE, InstanceStats::TYPE), ("hopline.v1.info", "hopline.v1.stats"));
    }

    #[test]
    fn a_document_is_read_as_it_was_written() {
        for codec in [Codec::Cbor, Codec::Json, Codec::MessagePack] {
            let method = MethodInfo { name: "add".into(), signature: "add()".into(), oneway: true, idempotent: true };
            let (service, instance) = ("math.v1".to_owned(), "a1".to_owned());
            let info = Instance { service, instance, hopline: "1".into(), methods: vec![method] };
            let payload = written(codec, &info);
            assert!(codec.decode::<Typed>(&payload).is_ok_and(|typed| typed.is::<Instance>()));
            assert_eq!(codec.decode::<Instance>(&payload), Ok(info));
            let mut stats = InstanceStats { running: 3, ..InstanceStats::default() };
            stats.methods.push(MethodStats { name: "add".into(), finished: 7, ..MethodStats::default() });
            let payload = written(codec, &stats);
            assert!(codec.decode::<Typed>(&payload).is_ok_and(|typed| typed.is::<InstanceStats>()));
            assert!(codec.decode::<Typed>(&payload).is_ok_and(|typed| !typed.is::<Instance>()));
            assert_eq!(codec.decode::<InstanceStats>(&payload), Ok(stats));
        }
    }

    #[test]
    fn a_reader_ignores_what_it_does_not_know_and_takes_defaults_for_what_is_missing() {
        let read = |value: Value| Codec::Json.decode::<Instance>(value.to_string().as_bytes());
        assert_eq!(read(json!({})), Ok(Instance::default()));
        let newer = json!({"type": "hopline.v1.info", "service": "math.v1", "schema": {"add": []},
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
}
