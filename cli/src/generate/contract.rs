//! A schema as code can be made of it: methods, and types with names. What cannot be told more exactly is any value.

use std::collections::{BTreeMap, BTreeSet};

use hopline::{MethodSchema, ServiceId, ServiceSchema};
use serde_json::{Map, Value};

use super::names::{Taken, camel, snake};

/// What is generated.
pub(super) struct Contract {
    pub(super) id: ServiceId,
    /// The service in the names of types: `Demo`.
    pub(super) title: String,
    pub(super) methods: Vec<Operation>,
    /// What is left out, each a sentence.
    pub(super) left_out: Vec<String>,
    /// The types by their names, which are identifiers.
    pub(super) types: BTreeMap<String, Declared>,
}

pub(super) struct Operation {
    /// Its name on the wire.
    pub(super) name: String,
    /// Its name in code, before the words of the language are left out.
    pub(super) ident: String,
    pub(super) oneway: bool,
    pub(super) idempotent: bool,
    pub(super) timeout_ms: Option<u64>,
    pub(super) parameters: Vec<(String, Shape)>,
    pub(super) result: Shape,
    pub(super) error: Option<Shape>,
}

impl Operation {
    /// From which parameter on all may be missing.
    pub(super) fn optional_from(&self) -> usize {
        let required = |(_, shape): &(String, Shape)| !matches!(shape, Shape::Optional(_));
        self.parameters.iter().rposition(required).map_or(0, |last| last + 1)
    }
}

/// A type without a name of its own.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Shape {
    Any,
    Null,
    Boolean,
    /// Its name in Rust.
    Integer(&'static str),
    Number,
    Text,
    List(Box<Shape>),
    Tuple(Vec<Shape>),
    Map(Box<Shape>),
    Optional(Box<Shape>),
    Named(String),
}

/// A type with a name.
#[derive(Debug, PartialEq)]
pub(super) enum Declared {
    Record(Vec<Field>),
    Choice(Vec<Variant>),
    Same(Shape),
}

#[derive(Debug, PartialEq)]
pub(super) struct Field {
    pub(super) name: String,
    pub(super) shape: Shape,
    pub(super) required: bool,
}

/// One of several: its name as text, or a record of one field with that name, which has the content.
#[derive(Debug, PartialEq)]
pub(super) struct Variant {
    pub(super) name: String,
    pub(super) content: Option<Shape>,
}

impl Contract {
    /// Reads a schema.
    ///
    /// # Errors
    /// A sentence, for names that no service or method can have.
    pub(super) fn read(schema: &ServiceSchema) -> Result<Self, String> {
        let id: ServiceId = schema.service.parse().map_err(|error: hopline::Error| error.to_string())?;
        for method in &schema.methods {
            ServiceId::with_method(&format!("{id}.{}", method.name)).map_err(|error| error.to_string())?;
        }
        let title = camel(id.name());
        let title = if RESERVED.contains(&title.as_str()) { format!("{title}Service") } else { title };
        let mut taken = Taken::new(RESERVED);
        for end in ["", "Server", "Client"] {
            taken.take(format!("{title}{end}"));
        }
        let names = schema.definitions.keys();
        let names = names.map(|name| (name.as_str(), taken.take(camel(name)))).collect();
        let mut reading = Reading { names, taken, types: BTreeMap::new() };
        for (name, definition) in &schema.definitions {
            let name = reading.names[name.as_str()].clone();
            let declared = reading.declared(&name, definition);
            reading.types.insert(name, declared);
        }
        reading.end_circles();
        // Rust reads up to 16 arguments.
        let is_described =
            |method: &&MethodSchema| method.parameters.as_ref().is_some_and(|parameters| parameters.len() <= 16);
        let (described, undescribed): (Vec<_>, Vec<_>) = schema.methods.iter().partition(is_described);
        let mut idents = Taken::new(&[]);
        let methods = described.into_iter().map(|method| {
            let hint = camel(&method.name);
            let mut parameter_idents = Taken::new(&[]);
            let parameters = method.parameters.iter().flatten().map(|parameter| {
                let shape = reading.shape(&format!("{hint}{}", camel(&parameter.name)), &parameter.schema);
                (parameter_idents.take(snake(&parameter.name)), shape)
            });
            Operation {
                ident: idents.take(snake(&method.name)),
                name: method.name.clone(),
                oneway: method.oneway,
                idempotent: method.idempotent,
                timeout_ms: method.timeout_ms,
                parameters: parameters.collect(),
                result: reading.shape(&format!("{hint}Result"), &method.result),
                error: method.error.as_ref().map(|error| reading.shape(&format!("{hint}Error"), error)),
            }
        });
        let methods = methods.collect();
        let left_out = undescribed.into_iter().map(|method| match method.parameters {
            None => format!("`{}` is left out: its types have no schema.", method.name),
            Some(_) => format!("`{}` is left out: it has more than 16 parameters.", method.name),
        });
        Ok(Self { id, title, methods, left_out: left_out.collect(), types: reading.types })
    }
}

/// Names that mean something else where the code is put.
const RESERVED: &[&str] = &[
    "Any",
    "Array",
    "BTreeMap",
    "Box",
    "Boolean",
    "Clone",
    "Context",
    "Copy",
    "Debug",
    "Default",
    "Err",
    "Error",
    "False",
    "Function",
    "Future",
    "Map",
    "None",
    "Null",
    "Number",
    "Object",
    "Ok",
    "Option",
    "PartialEq",
    "Promise",
    "Record",
    "Result",
    "Self",
    "Send",
    "Set",
    "Some",
    "String",
    "Symbol",
    "Sync",
    "Transport",
    "True",
    "Vec",
];

/// Reads schemas one after the other, and collects the types that need names.
struct Reading<'a> {
    /// The names of the definitions, as identifiers.
    names: BTreeMap<&'a str, String>,
    taken: Taken,
    types: BTreeMap<String, Declared>,
}

impl Reading<'_> {
    /// The type that a definition declares under this name.
    fn declared(&mut self, name: &str, schema: &Value) -> Declared {
        if schema["$ref"].is_string() {
            return Declared::Same(self.shape(name, schema));
        }
        let texts = |schema: &Value| texts(schema).filter(|_| schema["type"] == "string");
        if let Some(texts) = texts(schema) {
            let variants = texts.into_iter().map(|name| Variant { name, content: None }).collect();
            return Declared::Choice(variants);
        }
        if let Some(choice) = self.choice(name, schema) {
            return choice;
        }
        match schema["properties"].as_object() {
            // What else may be in there could not be told.
            Some(fields)
                if schema["type"] == "object" && !schema["additionalProperties"].is_object() && !is_union(schema) =>
            {
                self.record(name, fields, schema)
            }
            _ => Declared::Same(self.shape(name, schema)),
        }
    }

    fn record(&mut self, name: &str, fields: &Map<String, Value>, schema: &Value) -> Declared {
        let required =
            |field: &str| schema["required"].as_array().is_some_and(|names| names.iter().any(|name| name == field));
        let fields = fields.iter().map(|(field, schema)| Field {
            name: field.clone(),
            shape: self.shape(&format!("{name}{}", camel(field)), schema),
            required: required(field),
        });
        Declared::Record(fields.collect())
    }

    /// A union whose members are texts, and records of one field: what serde makes of an enum.
    fn choice(&mut self, name: &str, schema: &Value) -> Option<Declared> {
        let members = schema["oneOf"].as_array()?;
        let mut variants = Vec::new();
        for member in members {
            if let Some(texts) = texts(member).filter(|_| member["type"] == "string") {
                variants.extend(texts.into_iter().map(|name| Variant { name, content: None }));
                continue;
            }
            let fields = member["properties"].as_object().filter(|fields| fields.len() == 1)?;
            let (tag, content) = fields.iter().next()?;
            // Another kind of enum has more fields, or a field that tells the variant by its value.
            if member["required"] != serde_json::json!([tag]) || content.get("const").is_some() {
                return None;
            }
            let content = self.shape(&format!("{name}{}", camel(tag)), content);
            variants.push(Variant { name: tag.clone(), content: Some(content) });
        }
        let mut names: Vec<_> = variants.iter().map(|variant| &variant.name).collect();
        names.sort_unstable();
        (!names.is_empty() && names.windows(2).all(|pair| pair[0] != pair[1])).then_some(Declared::Choice(variants))
    }

    /// Lets types be any that are nothing but other names of themselves.
    fn end_circles(&mut self) {
        fn names(shape: &Shape, found: &mut Vec<String>) {
            match shape {
                Shape::Named(name) => found.push(name.clone()),
                Shape::List(inner) | Shape::Map(inner) | Shape::Optional(inner) => names(inner, found),
                Shape::Tuple(items) => items.iter().for_each(|item| names(item, found)),
                _ => {}
            }
        }
        let all: Vec<_> = self.types.keys().cloned().collect();
        for name in all {
            let (mut seen, mut next) = (BTreeSet::new(), vec![name.clone()]);
            while let Some(one) = next.pop() {
                let Some(Declared::Same(shape)) = self.types.get(&one) else { continue };
                names(shape, &mut next);
                if next.contains(&name) {
                    self.types.insert(name.clone(), Declared::Same(Shape::Any));
                    break;
                }
                next.retain(|name| !seen.contains(name));
                seen.insert(one);
            }
        }
    }

    /// The type of a schema. If it needs a name, it gets one after `hint`.
    fn shape(&mut self, hint: &str, schema: &Value) -> Shape {
        if let Some(reference) = schema["$ref"].as_str() {
            let name = reference.strip_prefix("#/$defs/").and_then(|name| self.names.get(name));
            return name.map_or(Shape::Any, |name| Shape::Named(name.clone()));
        }
        if let [only] = schema["allOf"].as_array().map_or(&[][..], Vec::as_slice) {
            return self.shape(hint, only);
        }
        for union in ["anyOf", "oneOf"] {
            if let Some(members) = schema[union].as_array() {
                let others: Vec<_> = members.iter().filter(|member| member["type"] != "null").collect();
                return match (&others[..], others.len() < members.len()) {
                    ([only], true) => optional(self.shape(hint, only)),
                    ([only], false) => self.shape(hint, only),
                    _ => match self.choice(hint, schema) {
                        Some(choice) => self.named(hint, choice),
                        None => Shape::Any,
                    },
                };
            }
        }
        match &schema["type"] {
            Value::String(kind) => self.of_kind(hint, kind, schema),
            Value::Array(kinds) => {
                let others: Vec<_> = kinds.iter().filter_map(Value::as_str).filter(|kind| *kind != "null").collect();
                match (&others[..], others.len() < kinds.len()) {
                    ([kind], true) => optional(self.of_kind(hint, kind, schema)),
                    ([kind], false) => self.of_kind(hint, kind, schema),
                    _ => Shape::Any,
                }
            }
            _ => Shape::Any,
        }
    }

    fn of_kind(&mut self, hint: &str, kind: &str, schema: &Value) -> Shape {
        match kind {
            "null" => Shape::Null,
            "boolean" => Shape::Boolean,
            "integer" => Shape::Integer(integer(schema)),
            "number" => Shape::Number,
            "string" => Shape::Text,
            "array" => {
                let items = schema["prefixItems"].as_array().map_or(&[][..], Vec::as_slice);
                // Rust reads tuples of up to 16 elements.
                let is_tuple = (1..=16).contains(&items.len())
                    && schema["minItems"] == items.len()
                    && (schema["maxItems"] == items.len() || schema["items"] == false);
                match is_tuple {
                    true => Shape::Tuple(items.iter().map(|item| self.shape(hint, item)).collect()),
                    false if items.is_empty() => {
                        Shape::List(Box::new(self.shape(&format!("{hint}Item"), &schema["items"])))
                    }
                    false => Shape::List(Box::new(Shape::Any)),
                }
            }
            "object" if is_union(schema) => Shape::Any,
            "object" => match (schema["properties"].as_object(), &schema["additionalProperties"]) {
                (Some(fields), more) if !more.is_object() => {
                    let record = self.record(hint, fields, schema);
                    self.named(hint, record)
                }
                (None, more) => Shape::Map(Box::new(self.shape(&format!("{hint}Value"), more))),
                _ => Shape::Any,
            },
            _ => Shape::Any,
        }
    }

    fn named(&mut self, hint: &str, declared: Declared) -> Shape {
        let name = self.taken.take(hint.to_owned());
        self.types.insert(name.clone(), declared);
        Shape::Named(name)
    }
}

/// The texts that a schema allows and nothing else, if it is such a schema.
fn texts(schema: &Value) -> Option<Vec<String>> {
    let all: Vec<_> = match (&schema["enum"], &schema["const"]) {
        (Value::Array(all), _) => all.iter().map(Value::as_str).collect::<Option<_>>()?,
        (_, Value::String(only)) => vec![only.as_str()],
        _ => return None,
    };
    let mut sorted = all.clone();
    sorted.sort_unstable();
    let are_different = sorted.windows(2).all(|pair| pair[0] != pair[1]);
    (!all.is_empty() && are_different).then(|| all.into_iter().map(str::to_owned).collect())
}

fn is_union(schema: &Value) -> bool {
    ["anyOf", "oneOf", "allOf"].iter().any(|union| schema[*union].is_array())
}

/// What may be null. What may be null already stays as it is.
fn optional(shape: Shape) -> Shape {
    match shape {
        Shape::Any | Shape::Null | Shape::Optional(_) => shape,
        shape => Shape::Optional(Box::new(shape)),
    }
}

/// The type of an integer in Rust, by the format that schemas of Rust types tell.
fn integer(schema: &Value) -> &'static str {
    let named = ["i8", "i16", "i32", "i64", "u8", "u16", "u32", "u64"];
    let format = schema["format"].as_str().unwrap_or_default();
    let format = format.replace("uint", "u").replace("int", "i");
    match (named.into_iter().find(|name| *name == format), schema["minimum"].as_f64()) {
        (Some(name), _) => name,
        (None, Some(0.0..)) => "u64",
        (None, _) => "i64",
    }
}
