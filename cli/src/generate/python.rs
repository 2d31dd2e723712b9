//! The code in Python: types for a type checker, and a client over a transport of the user's.

use std::fmt::Write as _;

use super::contract::{Contract, Declared, Field, Operation, Shape, Variant};
use super::names::{Taken, camel};
use crate::printed::ascii;

/// Words that are no names in Python, or mean something where the code is put.
const KEYWORDS: &[&str] = &[
    "and",
    "as",
    "assert",
    "async",
    "await",
    "bool",
    "break",
    "class",
    "continue",
    "def",
    "del",
    "elif",
    "else",
    "except",
    "finally",
    "float",
    "for",
    "from",
    "global",
    "if",
    "import",
    "in",
    "int",
    "is",
    "lambda",
    "match",
    "nonlocal",
    "not",
    "or",
    "pass",
    "raise",
    "return",
    "self",
    "str",
    "t",
    "transport",
    "try",
    "type",
    "while",
    "with",
    "yield",
];

const MEMORY: &str = "there is memory";

/// All of it.
pub(super) fn code(contract: &Contract) -> String {
    let (id, title) = (&contract.id, &contract.title);
    let mut code = format!(
        "\"\"\"Calls the service `{id}`. For Python 3.11 and later.\n\nWritten by `hopline generate python` from its schema: generate it anew instead of changing it.\n\"\"\"\n\nfrom __future__ import annotations\n\nimport typing as t\n"
    );
    for (name, declared) in &contract.types {
        code.push_str(&type_code(name, declared));
    }
    write!(
        code,
        "\n\nclass Transport(t.Protocol):\n    \"\"\"Makes the calls, by docs/wire.md of Hopline. It raises the errors, the method's own ones among them.\"\"\"\n\n    \
         def call(self, service: str, method: str, /, *arguments: t.Any) -> t.Any: ...\n\n    \
         def oneway(self, service: str, method: str, /, *arguments: t.Any) -> t.Any: ...\n\n\n\
         class {title}Client:\n    def __init__(self, transport: Transport) -> None:\n        self._transport = transport\n"
    )
    .expect(MEMORY);
    for method in &contract.methods {
        code.push_str(&method_code(&id.to_string(), method));
    }
    for sentence in &contract.left_out {
        writeln!(code, "\n    # {sentence}").expect(MEMORY);
    }
    code
}

fn type_code(name: &str, declared: &Declared) -> String {
    match declared {
        Declared::Same(shape) => format!("\n{name}: t.TypeAlias = {}\n", quoted(shape)),
        Declared::Record(fields) => {
            let field = |field: &Field| {
                let shape = type_of(&field.shape);
                let shape = if field.required { shape } else { format!("t.NotRequired[{shape}]") };
                format!("    {}: {},\n", ascii(&field.name), ascii(&shape))
            };
            let fields: String = fields.iter().map(field).collect();
            format!("\n{name} = t.TypedDict({}, {{\n{fields}}})\n", ascii(name))
        }
        Declared::Choice(variants) => {
            let mut idents = Taken::new(&[]);
            let mut code = String::new();
            let mut members = Vec::new();
            for Variant { name: variant, content } in variants {
                let ident = idents.take(camel(variant));
                match content {
                    None => members.push(format!("t.Literal[{}]", ascii(variant))),
                    Some(content) => {
                        // Two underscores, which no other type has.
                        let tagged = format!("{name}__{ident}");
                        let (tag, content) = (ascii(variant), ascii(&type_of(content)));
                        write!(code, "\n{tagged} = t.TypedDict({}, {{{tag}: {content}}})\n", ascii(&tagged))
                            .expect(MEMORY);
                        members.push(tagged);
                    }
                }
            }
            format!("{code}\n{name}: t.TypeAlias = t.Union[{}]\n", members.join(", "))
        }
    }
}

fn method_code(service: &str, method: &Operation) -> String {
    let ident = Taken::new(KEYWORDS).take(method.ident.clone());
    let mut idents = Taken::new(KEYWORDS);
    let (optional_from, mut declared, mut sent) = (method.optional_from(), String::new(), String::new());
    for (at, (name, shape)) in method.parameters.iter().enumerate() {
        let name = idents.take(name.clone());
        let default = if at >= optional_from { " = None" } else { "" };
        write!(declared, ", {name}: {}{default}", type_of(shape)).expect(MEMORY);
        write!(sent, ", {name}").expect(MEMORY);
    }
    let how = if method.oneway { "oneway" } else { "call" };
    let call = format!("self._transport.{how}({}, {}{sent})", ascii(service), ascii(&method.name));
    let (result, body) = match &method.result {
        _ if method.oneway => ("None".to_owned(), call),
        Shape::Null => ("None".to_owned(), call),
        result => {
            let result = type_of(result);
            let body = format!("return t.cast({}, {call})", ascii(&result));
            (result, body)
        }
    };
    format!("\n    def {ident}(self{declared}) -> {result}:\n        {body}\n")
}

/// The type where it is evaluated: names may stand further down.
fn quoted(shape: &Shape) -> String {
    ascii(&type_of(shape))
}

fn type_of(shape: &Shape) -> String {
    match shape {
        Shape::Any => "t.Any".to_owned(),
        Shape::Null => "None".to_owned(),
        Shape::Boolean => "bool".to_owned(),
        Shape::Integer(_) => "int".to_owned(),
        Shape::Number => "float".to_owned(),
        Shape::Text => "str".to_owned(),
        Shape::List(item) => format!("t.List[{}]", type_of(item)),
        Shape::Map(value) => format!("t.Dict[str, {}]", type_of(value)),
        Shape::Optional(inner) => format!("t.Optional[{}]", type_of(inner)),
        // On the way it is an array.
        Shape::Tuple(_) => "t.List[t.Any]".to_owned(),
        Shape::Named(name) => name.clone(),
    }
}
