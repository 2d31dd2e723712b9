//! The code in Rust: types, and a trait for `#[hopline::service]`.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use super::contract::{Contract, Declared, Field, Operation, Shape, Variant};
use super::names::{Taken, camel, snake};

/// Words that are no names in Rust.
const KEYWORDS: &[&str] = &[
    "abstract", "as", "async", "await", "become", "box", "break", "const", "continue", "crate", "do", "dyn", "else",
    "enum", "extern", "false", "final", "fn", "for", "gen", "if", "impl", "in", "let", "loop", "macro", "match", "mod",
    "move", "mut", "override", "priv", "pub", "ref", "return", "self", "static", "struct", "super", "trait", "true",
    "try", "type", "typeof", "unsafe", "unsized", "use", "virtual", "where", "while", "yield",
];

/// Those of them that stay so with `r#` before them, and what makes the client.
const NO_NAMES: &[&str] = &["crate", "new", "self", "super"];

/// All of it.
pub(super) fn code(contract: &Contract) -> String {
    let (id, title) = (&contract.id, &contract.title);
    let mut code = format!(
        "// Written by `hopline generate rust` from the schema of `{id}`: generate it anew instead of changing it.\n"
    );
    for (name, declared) in &contract.types {
        code.push_str(&type_code(contract, name, declared));
    }
    let (service, version) = (literal(id.name()), id.version());
    write!(code, "\n#[hopline::service(name = {service}, version = {version})]\npub trait {title} {{\n").expect(MEMORY);
    for method in &contract.methods {
        code.push_str(&method_code(method));
    }
    for sentence in &contract.left_out {
        writeln!(code, "    // {sentence}").expect(MEMORY);
    }
    code.push_str("}\n");
    code
}

const MEMORY: &str = "there is memory";

fn type_code(contract: &Contract, name: &str, declared: &Declared) -> String {
    let derived = "#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]";
    // A type that contains itself needs a place elsewhere.
    let inner = |shape: &Shape| type_of(shape, &|other| contains(contract, other, name));
    let mut idents = Taken::new(NO_NAMES);
    match declared {
        Declared::Same(shape) => format!("\npub type {name} = {};\n", type_of(shape, &|_| false)),
        Declared::Record(fields) => {
            let mut code = format!("\n{derived}\npub struct {name} {{\n");
            for Field { name, shape, required } in fields {
                let ident = as_ident(&mut idents, snake(name));
                let mut options = Vec::new();
                if ident.trim_start_matches("r#") != *name {
                    options.push(format!("rename = {}", literal(name)));
                }
                let mut field_type = inner(shape);
                if !required {
                    let is_optional = matches!(shape, Shape::Optional(_));
                    field_type = if is_optional { field_type } else { format!("Option<{field_type}>") };
                    options.push("default, skip_serializing_if = \"Option::is_none\"".to_owned());
                }
                if !options.is_empty() {
                    writeln!(code, "    #[serde({})]", options.join(", ")).expect(MEMORY);
                }
                writeln!(code, "    pub {ident}: {field_type},").expect(MEMORY);
            }
            code + "}\n"
        }
        Declared::Choice(variants) => {
            let mut code = format!("\n{derived}\npub enum {name} {{\n");
            let mut idents = Taken::new(&["Self"]);
            for Variant { name, content } in variants {
                let ident = idents.take(camel(name));
                if ident != *name {
                    writeln!(code, "    #[serde(rename = {})]", literal(name)).expect(MEMORY);
                }
                let content = content.as_ref().map(|content| format!("({})", inner(content))).unwrap_or_default();
                writeln!(code, "    {ident}{content},").expect(MEMORY);
            }
            code + "}\n"
        }
    }
}

fn method_code(method: &Operation) -> String {
    let ident = as_ident(&mut Taken::new(NO_NAMES), method.ident.clone());
    let mut options = Vec::new();
    if ident.trim_start_matches("r#") != method.name {
        options.push(format!("name = {}", literal(&method.name)));
    }
    options.extend(method.oneway.then(|| "oneway".to_owned()));
    options.extend(method.idempotent.then(|| "idempotent".to_owned()));
    options.extend(method.timeout_ms.filter(|ms| *ms > 0).map(|ms| format!("timeout = \"{ms}ms\"")));
    let options = if options.is_empty() { String::new() } else { format!("    #[rpc({})]\n", options.join(", ")) };
    let mut idents = Taken::new(NO_NAMES);
    let plain = |shape: &Shape| type_of(shape, &|_| false);
    let parameters: String = method
        .parameters
        .iter()
        .map(|(name, shape)| format!(", {}: {}", as_ident(&mut idents, name.clone()), plain(shape)))
        .collect();
    let returned = match (&method.result, &method.error) {
        (Shape::Null, None) => String::new(),
        (result, None) => format!(" -> {}", plain(result)),
        (_, Some(error)) if method.oneway => format!(" -> Result<(), {}>", plain(error)),
        (result, Some(error)) => format!(" -> Result<{}, {}>", plain(result), plain(error)),
    };
    let returned = if method.oneway && method.error.is_none() { String::new() } else { returned };
    format!("{options}    async fn {ident}(&self{parameters}){returned};\n")
}

/// The type in Rust. `is_round` says of which names a value must lie elsewhere.
fn type_of(shape: &Shape, is_round: &dyn Fn(&str) -> bool) -> String {
    let flat = |shape: &Shape| type_of(shape, &|_| false);
    match shape {
        Shape::Any => "serde_json::Value".to_owned(),
        Shape::Null => "()".to_owned(),
        Shape::Boolean => "bool".to_owned(),
        Shape::Integer(name) => (*name).to_owned(),
        Shape::Number => "f64".to_owned(),
        Shape::Text => "String".to_owned(),
        Shape::List(item) => format!("Vec<{}>", flat(item)),
        Shape::Map(value) => format!("std::collections::BTreeMap<String, {}>", flat(value)),
        Shape::Optional(inner) => format!("Option<{}>", type_of(inner, is_round)),
        Shape::Tuple(items) => {
            let items: String = items.iter().map(|item| format!("{}, ", type_of(item, is_round))).collect();
            if items.matches(", ").count() > 1 {
                format!("({})", items.trim_end_matches(", "))
            } else {
                format!("({})", items.trim_end())
            }
        }
        Shape::Named(name) if is_round(name) => format!("Box<{name}>"),
        Shape::Named(name) => name.clone(),
    }
}

/// The name if it is free, as an identifier.
fn as_ident(taken: &mut Taken, name: String) -> String {
    let name = taken.take(name);
    if KEYWORDS.contains(&name.as_str()) { format!("r#{name}") } else { name }
}

/// Whether a value of the type `of` contains one of the type `other`, other than in a list or a map.
fn contains(contract: &Contract, of: &str, other: &str) -> bool {
    fn names<'a>(shape: &'a Shape, found: &mut Vec<&'a str>) {
        match shape {
            Shape::Named(name) => found.push(name),
            Shape::Optional(inner) => names(inner, found),
            Shape::Tuple(items) => items.iter().for_each(|item| names(item, found)),
            _ => {}
        }
    }
    let (mut seen, mut next) = (BTreeSet::new(), vec![of]);
    while let Some(name) = next.pop() {
        if name == other {
            return true;
        }
        if !seen.insert(name) {
            continue;
        }
        match contract.types.get(name) {
            Some(Declared::Record(fields)) => fields.iter().for_each(|field| names(&field.shape, &mut next)),
            Some(Declared::Choice(variants)) => {
                variants
                    .iter()
                    .filter_map(|variant| variant.content.as_ref())
                    .for_each(|content| names(content, &mut next));
            }
            Some(Declared::Same(shape)) => names(shape, &mut next),
            None => {}
        }
    }
    false
}

/// A text as a literal, with nothing but printable ASCII in it.
fn literal(text: &str) -> String {
    let escaped = |c: char| match c {
        '"' | '\\' => format!("\\{c}"),
        ' '..='~' => c.to_string(),
        c => c.escape_unicode().to_string(),
    };
    format!("\"{}\"", text.chars().map(escaped).collect::<String>())
}
