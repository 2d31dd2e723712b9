//! What the methods of a service take and return: the document `hopline.v1.schema`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Document, SCHEMA};

/// What the methods of a service take and return, as [JSON Schema](https://json-schema.org/draft/2020-12): the document
/// `hopline.v1.schema`. [`Registry::schema`](crate::Registry::schema) asks an instance for it.
///
/// A schema in it refers to another by `#/$defs/NAME`, which is in [`definitions`](Self::definitions).
///
/// ```
/// # async fn example(client: hopline::Client) -> Result<(), hopline::Error> {
/// let schema = client.registry().schema("demo").await?;
/// for method in &schema.methods {
///     println!("{}", method.signature());
/// }
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename = "hopline.v1.schema", default)]
#[non_exhaustive]
pub struct ServiceSchema {
    /// The service, as `name.vMAJOR`.
    pub service: String,
    /// The id of the instance that said so.
    pub instance: String,
    /// Its methods, sorted by name.
    pub methods: Vec<MethodSchema>,
    /// The schemas that others refer to, by name.
    #[serde(rename = "$defs")]
    pub definitions: BTreeMap<String, Value>,
}

impl ServiceSchema {
    /// The method of this name.
    #[must_use]
    pub fn method(&self, name: &str) -> Option<&MethodSchema> {
        self.methods.iter().find(|method| method.name == name)
    }
}

impl Document for ServiceSchema {
    const QUESTION: &str = SCHEMA;
    const TYPE: &str = "hopline.v1.schema";

    fn source(&self) -> (&str, &str) {
        (&self.service, &self.instance)
    }
}

/// What one method takes and returns.
///
/// ```
/// # fn example(schema: hopline::ServiceSchema) {
/// for method in schema.methods.iter().filter(|method| method.parameters.is_none()) {
///     println!("{}: its types have no schema", method.name);
/// }
/// # }
/// ```
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct MethodSchema {
    /// The name to call it by.
    pub name: String,
    /// Whether it takes oneway calls, which have no reply.
    pub oneway: bool,
    /// Whether a call may run twice without harm.
    pub idempotent: bool,
    /// The time-out that callers should give it, in milliseconds. `None`: that is up to them.
    pub timeout_ms: Option<u64>,
    /// What it takes, in the order of the arguments in a call. `None`: its types have no schema, and the next two say
    /// nothing.
    pub parameters: Option<Vec<ParameterSchema>>,
    /// The schema of what it returns. That of a method that returns nothing is the schema of null.
    pub result: Value,
    /// The schema of its own error. `None`: it has none.
    pub error: Option<Value>,
}

/// One parameter of a method.
///
/// ```
/// # fn example(method: hopline::MethodSchema) {
/// let names: Vec<_> = method.parameters.iter().flatten().map(|parameter| parameter.name.as_str()).collect();
/// println!("{}({})", method.name, names.join(", "));
/// # }
/// ```
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct ParameterSchema {
    /// Its name.
    pub name: String,
    /// The schema of its argument.
    pub schema: Value,
}

impl MethodSchema {
    /// The method for people, in no particular language: `add(a: integer, b: integer) -> integer`. Only the name if its
    /// types have no schema. The texts in it come from the service.
    #[must_use]
    pub fn signature(&self) -> String {
        let Some(parameters) = &self.parameters else { return self.name.clone() };
        let parameters: Vec<_> =
            parameters.iter().map(|parameter| format!("{}: {}", parameter.name, briefly(&parameter.schema))).collect();
        let result = briefly(&self.result);
        let result = if self.oneway || result == "null" { String::new() } else { format!(" -> {result}") };
        let error = self.error.as_ref().map(|error| format!(", or error {}", briefly(error))).unwrap_or_default();
        format!("{}({}){result}{error}", self.name, parameters.join(", "))
    }
}

/// A schema in a few words: a type, `[...]` around that of the items of an array, or the name of a definition.
fn briefly(schema: &Value) -> String {
    if let Some(name) = schema["$ref"].as_str() {
        return name.rsplit('/').next().unwrap_or_default().to_owned();
    }
    for union in ["anyOf", "oneOf"] {
        if let Some(of) = schema[union].as_array() {
            return of.iter().map(briefly).collect::<Vec<_>>().join(" | ");
        }
    }
    let one = |kind: &str| match (kind, schema["prefixItems"].as_array()) {
        ("array", Some(items)) => format!("[{}]", items.iter().map(briefly).collect::<Vec<_>>().join(", ")),
        ("array", None) => format!("[{}]", briefly(&schema["items"])),
        _ => kind.to_owned(),
    };
    match &schema["type"] {
        Value::String(kind) => one(kind),
        Value::Array(kinds) => kinds.iter().filter_map(Value::as_str).map(one).collect::<Vec<_>>().join(" | "),
        _ => "any".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::codec::Codec;
    use crate::document::Typed;

    #[test]
    fn the_document_is_read_as_it_was_written_and_says_first_what_it_is() {
        let parameters = Some(vec![ParameterSchema { name: "a".into(), schema: json!({"type": "integer"}) }]);
        let method = MethodSchema { name: "add".into(), parameters, ..MethodSchema::default() };
        let definitions = BTreeMap::from([("Order".to_owned(), json!({"type": "object"}))]);
        let schema = ServiceSchema { methods: vec![method], definitions, ..ServiceSchema::default() };
        for codec in [Codec::Cbor, Codec::Json, Codec::MessagePack] {
            let payload = codec.encode(&schema).expect("it can be written");
            assert!(codec.decode::<Typed>(&payload).is_ok_and(|typed| typed.is::<ServiceSchema>()));
            assert_eq!(codec.decode::<ServiceSchema>(&payload), Ok(schema.clone()));
        }
        let json = String::from_utf8(Codec::Json.encode(&schema).expect("JSON")).expect("text");
        assert!(json.starts_with(r#"{"type":"hopline.v1.schema","service":"#), "{json}");
        assert_eq!(Codec::Json.decode::<ServiceSchema>(b"{}"), Ok(ServiceSchema::default()));
    }

    #[test]
    fn a_signature_tells_types_in_a_few_words() {
        for (schema, told) in [
            (json!({"type": "array", "items": {"type": "integer"}}), "[integer]"),
            (json!({"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}]}), "[integer, string]"),
            (json!({"type": ["string", "null"]}), "string | null"),
            (json!({"anyOf": [{"$ref": "#/$defs/Order"}, {"type": "null"}]}), "Order | null"),
            (json!(true), "any"),
        ] {
            assert_eq!(briefly(&schema), told);
        }
        let parameter = ParameterSchema { name: "n".into(), schema: json!({"type": "integer"}) };
        let mut method = MethodSchema { name: "f".into(), ..MethodSchema::default() };
        assert_eq!(method.signature(), "f");
        (method.parameters, method.result) = (Some(vec![parameter]), json!({"type": "null"}));
        assert_eq!(method.signature(), "f(n: integer)");
        (method.result, method.error) = (json!({"type": "string"}), Some(json!({"$ref": "#/$defs/MathError"})));
        assert_eq!(method.signature(), "f(n: integer) -> string, or error MathError");
    }
}
