//! Whether arguments fit the parameters of a method, and which place of which one does not.

use jsonschema::error::{TypeKind, ValidationErrorKind};
use jsonschema::paths::{Location, LocationSegment};
use jsonschema::{JsonType, PatternOptions, ValidationError, Validator};
use serde_json::{Map, Value, json};

use super::bounded::bounded;
use super::integers::bound;
use crate::document::ServiceSchema;

/// How much of a value an error quotes, in characters.
const MAX_QUOTED: usize = 60;

/// The parameters of one method, in the order of its arguments.
pub(super) struct Parameters {
    /// `add(a: integer, b: integer) -> integer`.
    signature: String,
    each: Vec<Parameter>,
}

/// How many parameters a method may have whose arguments are checked.
const MAX_PARAMETERS: usize = 100;

struct Parameter {
    name: String,
    validator: Validator,
    /// What stands for an argument that is missing. `None`: it must not be missing.
    absent: Option<Value>,
}

impl Parameters {
    /// Those of a method that the schema describes.
    ///
    /// # Errors
    /// A sentence, if its schema is none.
    pub(super) fn new(schema: &ServiceSchema, method: &str) -> Result<Self, String> {
        let told = schema.method(method);
        let parameters = told.and_then(|method| method.parameters.as_deref()).unwrap_or_default();
        let unusable =
            |why: String| format!("`{}` tells a schema of `{method}` that cannot be used: {why}", schema.service);
        if parameters.len() > MAX_PARAMETERS {
            return Err(unusable(format!("it has {} parameters, and {MAX_PARAMETERS} are the most", parameters.len())));
        }
        let each = parameters.iter().map(|parameter| {
            bounded(&parameter.schema, &schema.definitions).map_err(unusable)?;
            // What it refers to is in here, as `#/$defs/NAME`.
            let mut whole = json!({ "$defs": schema.definitions, "allOf": [parameter.schema] });
            bound(&mut whole);
            // The schema comes from elsewhere: its patterns must not take time without end.
            let options = jsonschema::options().with_pattern_options(PatternOptions::regex());
            let validator = options.build(&whole).map_err(|error| unusable(error.to_string()))?;
            // An empty record stands for one of which each field may be missing, and not for an empty map.
            let is_record = resolved(schema, &parameter.schema).get("properties").is_some();
            let stand_ins = [Some(Value::Null), is_record.then(|| json!({}))];
            let absent = stand_ins.into_iter().flatten().find(|value| validator.is_valid(value));
            Ok(Parameter { name: parameter.name.clone(), validator, absent })
        });
        let each = each.collect::<Result<_, String>>()?;
        Ok(Self { signature: told.map(crate::document::MethodSchema::signature).unwrap_or_default(), each })
    }

    /// The arguments as they are sent.
    ///
    /// # Errors
    /// A sentence that names the place that does not fit.
    pub(super) fn checked(&self, arguments: Value) -> Result<Vec<Value>, String> {
        let arguments = match arguments {
            Value::Array(arguments) => arguments,
            Value::Object(named) => self.in_order(named)?,
            other => {
                let other = quoted(&other);
                return Err(format!("arguments are an array, or an object with their names, and not {other}"));
            }
        };
        if arguments.len() > self.each.len() {
            let s = if self.each.len() == 1 { "" } else { "s" };
            let (takes, got) = (self.each.len(), arguments.len());
            return Err(format!("`{}` takes {takes} argument{s}, got {got}", self.signature));
        }
        for (parameter, argument) in self.each.iter().zip(&arguments) {
            if let Err(error) = parameter.validator.validate(argument) {
                return Err(sentence(&parameter.name, &error));
            }
        }
        match self.each[arguments.len()..].iter().find(|parameter| parameter.absent.is_none()) {
            Some(missing) => Err(self.is_missing(&missing.name)),
            None => Ok(arguments),
        }
    }

    /// Arguments by name, in the order of the parameters.
    fn in_order(&self, mut named: Map<String, Value>) -> Result<Vec<Value>, String> {
        let ordered = self.each.iter().map(|parameter| {
            let argument = named.remove(&parameter.name).or_else(|| parameter.absent.clone());
            argument.ok_or_else(|| self.is_missing(&parameter.name))
        });
        let ordered = ordered.collect::<Result<_, _>>()?;
        match named.keys().next() {
            Some(name) => Err(format!("`{}` has no parameter `{name}`", self.signature)),
            None => Ok(ordered),
        }
    }

    fn is_missing(&self, name: &str) -> String {
        format!("{name} is missing: write `{}`", self.signature)
    }
}

/// The schema that this one refers to, or itself.
fn resolved<'a>(schema: &'a ServiceSchema, this: &'a Value) -> &'a Value {
    let name = this["$ref"].as_str().and_then(|path| path.strip_prefix("#/$defs/"));
    name.and_then(|name| schema.definitions.get(name)).unwrap_or(this)
}

/// What is wrong, and where.
fn sentence(name: &str, error: &ValidationError<'_>) -> String {
    let error = deepest(error);
    let place = place(name, error.instance_path());
    let is = quoted(error.instance());
    match error.kind() {
        ValidationErrorKind::Type { kind } => format!("{place} must be {}, and it is {is}", types(kind)),
        ValidationErrorKind::Required { property } => {
            format!("{place}.{} is missing", property.as_str().unwrap_or_default())
        }
        ValidationErrorKind::AdditionalProperties { unexpected } => {
            format!("{place} has no field `{}`", unexpected.first().map_or("", String::as_str))
        }
        ValidationErrorKind::Minimum { limit } => format!("{place} must be at least {limit}, and it is {is}"),
        ValidationErrorKind::Maximum { limit } => format!("{place} must be at most {limit}, and it is {is}"),
        ValidationErrorKind::Enum { options } => format!("{place} must be one of {options}, and it is {is}"),
        ValidationErrorKind::Constant { expected_value } => format!("{place} must be {expected_value}, and it is {is}"),
        ValidationErrorKind::AnyOf { .. } | ValidationErrorKind::OneOfNotValid { .. } => {
            format!("{place} fits none of the types that it may have, and it is {is}")
        }
        _ => format!("{place} does not fit: {}", error.masked()),
    }
}

/// Of a value that fits none of several schemas, the error that lies deepest in it: that schema was meant.
fn deepest<'a>(error: &'a ValidationError<'_>) -> &'a ValidationError<'a> {
    let (ValidationErrorKind::AnyOf { context } | ValidationErrorKind::OneOfNotValid { context }) = error.kind() else {
        return error;
    };
    let depth = |error: &ValidationError<'_>| error.instance_path().into_iter().count();
    let within: Vec<_> = context.iter().flatten().map(|error| deepest(error)).collect();
    let is_optional = |one: &&&ValidationError<'_>| !is_of_null(one);
    let meant: Vec<_> = within.iter().filter(is_optional).collect();
    match &meant[..] {
        // What may be null as well is meant to be something else.
        [only] => only,
        _ => meant
            .into_iter()
            .filter(|one| depth(one) > depth(error))
            .max_by_key(|one| depth(one))
            .map_or(error, |one| one),
    }
}

/// Whether the error is that a value is not null.
fn is_of_null(error: &ValidationError<'_>) -> bool {
    matches!(error.kind(), ValidationErrorKind::Type { kind: TypeKind::Single(JsonType::Null) })
}

/// The place in an argument, as one writes it in most languages: `order.lines[2].price`.
fn place(name: &str, path: &Location) -> String {
    path.into_iter().fold(name.to_owned(), |place, segment| match segment {
        LocationSegment::Property(property) => format!("{place}.{property}"),
        LocationSegment::Index(index) => format!("{place}[{index}]"),
    })
}

fn types(kind: &TypeKind) -> String {
    match kind {
        TypeKind::Single(kind) => with_article(*kind).to_owned(),
        TypeKind::Multiple(kinds) => kinds.iter().map(with_article).collect::<Vec<_>>().join(" or "),
    }
}

fn with_article(kind: JsonType) -> &'static str {
    match kind {
        JsonType::Array => "an array",
        JsonType::Boolean => "true or false",
        JsonType::Integer => "an integer",
        JsonType::Null => "null",
        JsonType::Number => "a number",
        JsonType::Object => "an object",
        JsonType::String => "a string",
    }
}

/// A value as JSON, cut if it is long.
fn quoted(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(MAX_QUOTED) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parameters(each: Value, definitions: Value) -> Result<Parameters, String> {
        let method = json!({"name": "order", "parameters": each, "result": {"type": "integer"}});
        let schema = json!({"service": "shop.v1", "methods": [method], "$defs": definitions});
        let schema = serde_json::from_value(schema).expect("it is a document");
        Parameters::new(&schema, "order")
    }

    /// `order(order: Order, count: u8, note: Option<String>)`.
    fn order() -> Parameters {
        let parameters = parameters(
            json!([
                {"name": "order", "schema": {"anyOf": [{"$ref": "#/$defs/Order"}, {"type": "null"}]}},
                {"name": "count", "schema": {"type": "integer", "minimum": 0, "maximum": 255}},
                {"name": "note", "schema": {"type": ["string", "null"]}},
            ]),
            json!({
                "Order": {"type": "object", "required": ["lines"],
                    "properties": {"lines": {"type": "array", "items": {"$ref": "#/$defs/Line"}}}},
                "Line": {"type": "object", "required": ["price"],
                    "properties": {"price": {"type": "number"}, "kind": {"type": "string", "enum": ["A", "B"]}}},
            }),
        );
        parameters.expect("a good schema")
    }

    #[test]
    fn arguments_by_name_come_in_the_order_of_the_parameters() {
        let named = json!({"count": 3, "note": "x", "order": {"lines": []}});
        assert_eq!(order().checked(named), Ok(vec![json!({"lines": []}), json!(3), json!("x")]));
        assert_eq!(order().checked(json!({"count": 3})), Ok(vec![Value::Null, json!(3), Value::Null]));
        assert_eq!(order().checked(json!([null, 3])), Ok(vec![Value::Null, json!(3)]), "as on the wire");
    }

    #[test]
    fn an_error_names_the_place_that_does_not_fit() {
        let price = |price: Value| json!([{"lines": [{"price": 1}, {"price": 2}, {"price": price}]}, 1]);
        for (arguments, told) in [
            (price(json!("x")), r#"order.lines[2].price must be a number, and it is "x""#),
            (json!([{"lines": [{}]}, 1]), "order.lines[0].price is missing"),
            (
                json!([{"lines": [{"price": 1, "kind": "C"}]}, 1]),
                r#"order.lines[0].kind must be one of ["A","B"], and it is "C""#,
            ),
            (json!([3, 1]), "order must be an object, and it is 3"),
            (json!([null, "x"]), r#"count must be an integer, and it is "x""#),
            (json!([null, 256]), "count must be at most 255, and it is 256"),
            (json!([null, -1]), "count must be at least 0, and it is -1"),
            (json!([null, 1, 5]), "note must be null or a string, and it is 5"),
            (
                json!([null]),
                "count is missing: write `order(order: Order | null, count: integer, note: string | null) -> integer`",
            ),
            (json!({"count": 1, "colour": 1}), "has no parameter `colour`"),
            (json!([null, 1, null, 4]), "takes 3 arguments, got 4"),
            (json!(5), "arguments are an array, or an object with their names, and not 5"),
            (json!([null, "x".repeat(1000)]), r#"xxx..."#),
        ] {
            let error = order().checked(arguments).expect_err(told);
            assert!(error.contains(told), "{error}");
        }
    }

    #[test]
    fn integers_have_the_bounds_of_their_formats() {
        let of = |format: &str, schema: Value| {
            let mut schema = schema;
            schema["format"] = json!(format);
            let within = json!({"type": "array", "items": {"$ref": "#/$defs/format"}});
            // A field with the name of a keyword is a field.
            let definitions = json!({"format": {"type": "object", "properties": {"enum": schema}}});
            parameters(json!([{"name": "a", "schema": within}]), definitions).expect("a good schema")
        };
        let one = |number: &str| serde_json::from_str(&format!("[[{{\"enum\": {number}}}]]")).expect("it is JSON");
        let (integer, positive) = (json!({"type": ["integer", "null"]}), json!({"type": "integer", "minimum": 0}));
        for (format, schema, least, most, below, above) in [
            ("int32", &integer, "-2147483648", "2147483647", "-2147483649", "2147483648"),
            ("uint32", &positive, "0", "4294967295", "-1", "4294967296"),
            ("int64", &integer, "-9223372036854775808", "9223372036854775807", "-1e19", "9223372036854775808"),
            ("uint64", &positive, "0", "18446744073709551615", "-1", "18446744073709551616"),
            ("uint", &positive, "0", "18446744073709551615", "-1", "1e40"),
        ] {
            let parameters = of(format, schema.clone());
            for fits in [least, most] {
                assert!(parameters.checked(one(fits)).is_ok(), "{format} {fits}");
            }
            for (number, told) in [(below, format!("at least {least}")), (above, format!("at most {most}"))] {
                let error = parameters.checked(one(number)).expect_err(number);
                assert!(error.starts_with(&format!("a[0].enum must be {told}, and it is ")), "{format}: {error}");
            }
        }
        let own = of("int32", json!({"type": "integer", "maximum": 7}));
        assert!(own.checked(one("8")).is_err_and(|error| error.contains("at most 7")));
    }

    #[test]
    fn an_empty_record_stands_for_a_missing_one_of_optional_fields_and_no_map_does() {
        let options = json!({"name": "options", "schema": {"$ref": "#/$defs/Options"}});
        let definitions = json!({"Options": {"type": "object", "properties": {"deep": {"type": "boolean"}}}});
        let optional = parameters(json!([options]), definitions).expect("a good schema");
        assert_eq!(optional.checked(json!({})), Ok(vec![json!({})]));
        let map = json!({"name": "map", "schema": {"type": "object", "additionalProperties": {"type": "integer"}}});
        let map = parameters(json!([map]), json!({})).expect("a good schema");
        assert!(map.checked(json!({})).is_err_and(|error| error.starts_with("map is missing")));
    }

    #[test]
    fn a_schema_of_a_peer_fetches_nothing_and_ends() {
        let one = |schema: Value, definitions: Value| parameters(json!([{"name": "a", "schema": schema}]), definitions);
        for reference in ["http://127.0.0.1:1/x.json", "file:///etc/passwd", "#/$defs/Missing"] {
            let error = one(json!({"$ref": reference}), json!({})).err().expect("it is not there");
            assert!(error.starts_with("`shop.v1` tells a schema of `order` that cannot be used"), "{error}");
        }
        let round = one(json!({"$ref": "#/$defs/A"}), json!({"A": {"allOf": [{"$ref": "#/$defs/A"}]}}));
        assert!(round.is_err_and(|error| error.ends_with("`A` is nothing but itself")));
        let slow = one(json!({"type": "string", "pattern": "^(a+)+$"}), json!({})).expect("a pattern");
        assert!(slow.checked(json!([format!("{}!", "a".repeat(10_000))])).is_err());
    }
}
