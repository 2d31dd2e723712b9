//! The arguments of `hopline call`: as a shell gives them, and as they are sent.

use std::collections::BTreeSet;
use std::time::Duration;

use hopline::dynamic::Dynamic;
use hopline::{Client, Error, ServiceSchema};
use serde_json::{Map, Value};

use crate::failed::Failed;
use crate::input;

/// How long a schema is waited for that is not needed for the call.
const QUICK: Duration = Duration::from_millis(500);

/// One argument of the command.
#[derive(Clone)]
pub(crate) enum Given {
    /// A JSON array with one element for each argument.
    Array(Vec<Value>),
    /// A JSON object with the argument of each parameter.
    Object(Map<String, Value>),
    /// `NAME=VALUE`: the argument of one parameter.
    Named(String, String),
}

/// Reads one argument of the command.
///
/// # Errors
/// A sentence that says what to write.
pub(crate) fn given(text: &str) -> Result<Given, String> {
    let read = input::from_elsewhere(text)?;
    if read.is_none()
        && let Some((name, value)) = text.split_once('=')
        && !name.is_empty()
        // An address is no name, and must not be repeated.
        && name.chars().all(|c| c.is_alphanumeric() || matches!(c, '_' | '-'))
    {
        return Ok(Given::Named(name.to_owned(), value.to_owned()));
    }
    match serde_json::from_str(read.as_deref().unwrap_or(text)) {
        Ok(Value::Array(arguments)) => Ok(Given::Array(arguments)),
        Ok(Value::Object(named)) => Ok(Given::Object(named)),
        Ok(_) => {
            Err("write a JSON array with one element for each argument, such as '[2, 3]', or NAME=VALUE".to_owned())
        }
        Err(error) => Err(format!("not JSON: {error}")),
    }
}

/// Whether what is given can be sent. It is said before connecting.
///
/// # Errors
/// `Invalid`, with a sentence that says what to write.
pub(crate) fn fit_together(all: &[Given]) -> Result<(), Failed> {
    let names: Vec<_> =
        all.iter().filter_map(|given| if let Given::Named(name, _) = given { Some(name) } else { None }).collect();
    let invalid = |why: String| Err(Error::Invalid(why).into());
    if names.len() < all.len() && all.len() > 1 {
        return invalid("give all arguments as one JSON array, such as '[2, 3]', or each as NAME=VALUE".to_owned());
    }
    let mut seen = BTreeSet::new();
    match names.into_iter().find(|name| !seen.insert(*name)) {
        Some(twice) => invalid(format!("{twice} is given twice")),
        None => Ok(()),
    }
}

/// The arguments in the order in which they are sent. They are checked if `check` says so and an instance tells its schema
/// quickly. Those that are given by name need the schema.
///
/// # Errors
/// `Invalid` if an argument does not fit, and what the question for the schema fails with, if that is needed.
pub(crate) async fn in_order(
    client: &Client,
    service: &str,
    method: &str,
    all: &[Given],
    check: bool,
    left: Duration,
) -> Result<Vec<Value>, Failed> {
    let ask = |total: Duration| async move { client.registry().total(total).schema(service).await };
    let described = match all {
        [] | [Given::Array(_)] => {
            let arguments = if let [Given::Array(arguments)] = all { arguments.clone() } else { Vec::new() };
            // A call without a check is better than none.
            let schema = if check { ask(left.min(QUICK)).await.ok() } else { None };
            return match schema {
                Some(schema) => Ok(Dynamic::new(client, schema).checked(method, arguments.into())?),
                None => Ok(arguments),
            };
        }
        _ => match ask(left).await {
            Ok(schema) => Dynamic::new(client, schema),
            Err(Error::Fault(mut fault)) => {
                fault.message.push_str("; give the arguments as an array, such as '[2, 3]'");
                return Err(Error::Fault(fault).into());
            }
            Err(error) => return Err(error.into()),
        },
    };
    let named = match all {
        [Given::Object(named)] => named.clone(),
        all => {
            let named = all
                .iter()
                .filter_map(|given| if let Given::Named(name, text) = given { Some((name, text)) } else { None });
            named.map(|(name, text)| (name.clone(), value(described.schema(), method, name, text))).collect()
        }
    };
    Ok(described.checked(method, named.into())?)
}

/// What a text means for a parameter: JSON, or a string if JSON of its type does not fit.
fn value(schema: &ServiceSchema, method: &str, name: &str, text: &str) -> Value {
    let parameters = schema.method(method).and_then(|method| method.parameters.as_deref()).unwrap_or_default();
    let parameter = parameters.iter().find(|parameter| parameter.name == name);
    let mut types = BTreeSet::new();
    if let Some(parameter) = parameter {
        types_of(schema, &parameter.schema, &mut BTreeSet::new(), &mut types);
    }
    let string = || Value::String(text.to_owned());
    let Ok(json) = serde_json::from_str::<Value>(text) else { return string() };
    let fits = match &json {
        Value::Null => types.contains("null"),
        Value::Bool(_) => types.contains("boolean"),
        Value::Number(_) => types.contains("number") || types.contains("integer"),
        Value::String(_) => types.contains("string"),
        Value::Array(_) => types.contains("array"),
        Value::Object(_) => types.contains("object"),
    };
    if !fits && types.contains("string") { string() } else { json }
}

/// The types that a value of a schema may have. A schema that says nothing has none. `seen` are the definitions that were
/// looked at: one may refer to itself.
fn types_of<'a>(
    schema: &'a ServiceSchema,
    this: &'a Value,
    seen: &mut BTreeSet<&'a str>,
    types: &mut BTreeSet<&'a str>,
) {
    if let Some(name) = this["$ref"].as_str().and_then(|path| path.strip_prefix("#/$defs/"))
        && let Some(definition) = schema.definitions.get(name)
        && seen.insert(name)
    {
        types_of(schema, definition, seen, types);
    }
    match &this["type"] {
        Value::String(kind) => drop(types.insert(kind)),
        Value::Array(kinds) => types.extend(kinds.iter().filter_map(Value::as_str)),
        _ => {}
    }
    for part in ["anyOf", "oneOf", "allOf"].iter().filter_map(|union| this[*union].as_array()).flatten() {
        types_of(schema, part, seen, types);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_text_is_json_unless_only_a_string_fits() {
        let schema: ServiceSchema = serde_json::from_value(json!({
            "methods": [{"name": "put", "parameters": [
                {"name": "number", "schema": {"type": "integer"}},
                {"name": "text", "schema": {"type": "string"}},
                {"name": "maybe", "schema": {"type": ["string", "null"]}},
                {"name": "either", "schema": {"anyOf": [{"type": "string"}, {"type": "integer"}]}},
                {"name": "colour", "schema": {"$ref": "#/$defs/Colour"}},
                {"name": "round", "schema": {"$ref": "#/$defs/Round"}},
            ]}],
            "$defs": {
                "Colour": {"oneOf": [{"type": "string", "const": "Red"}]},
                "Round": {"anyOf": [{"$ref": "#/$defs/Round"}, {"$ref": "#/$defs/Round"}]},
            },
        }))
        .expect("it is a document");
        for (name, text, expected) in [
            ("number", "2", json!(2)),
            ("number", "x", json!("x")),
            ("text", "2", json!("2")),
            ("text", "\"2\"", json!("2")),
            ("text", "a=b", json!("a=b")),
            ("maybe", "null", json!(null)),
            ("maybe", "true", json!("true")),
            ("either", "2", json!(2)),
            ("colour", "Red", json!("Red")),
            ("round", "[1]", json!([1])),
            ("unknown", "3", json!(3)),
        ] {
            assert_eq!(value(&schema, "put", name, text), expected, "{name}={text}");
        }
    }

    #[test]
    fn arguments_are_one_array_or_names() {
        let all = |texts: &[&str]| {
            let all: Vec<_> = texts.iter().map(|text| given(text).expect("each can be read")).collect();
            fit_together(&all).map_err(|failed| failed.to_string())
        };
        for fine in [&[][..], &["[2, 3]"], &["{\"a\": 2}"], &["a=2", "b=x=y"]] {
            assert_eq!(all(fine), Ok(()));
        }
        assert!(all(&["[2]", "b=3"]).is_err_and(|why| why.starts_with("give all arguments as one JSON array")));
        assert_eq!(all(&["a=2", "a=3"]), Err("a is given twice".to_owned()));
        assert!(given("\"a=b\"").is_err_and(|why| why.starts_with("write a JSON array")));
        assert!(given("amqp://me:s3cret@host/?a=b").is_err_and(|why| !why.contains("s3cret")));
        assert!(given("2,3").is_err_and(|why| why.starts_with("not JSON")));
    }
}
