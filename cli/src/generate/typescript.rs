//! The code in TypeScript: types, and a client over a transport of the user's.

use std::fmt::Write as _;

use super::contract::{Contract, Declared, Field, Operation, Shape, Variant};
use super::names::Taken;
use crate::printed::ascii;

/// Words that are no names in TypeScript, or mean something where the code is put.
const KEYWORDS: &[&str] = &[
    "any",
    "arguments",
    "as",
    "async",
    "await",
    "break",
    "case",
    "catch",
    "class",
    "const",
    "constructor",
    "continue",
    "debugger",
    "default",
    "delete",
    "do",
    "else",
    "enum",
    "eval",
    "export",
    "extends",
    "false",
    "finally",
    "for",
    "function",
    "get",
    "if",
    "implements",
    "import",
    "in",
    "instanceof",
    "interface",
    "let",
    "new",
    "null",
    "of",
    "package",
    "private",
    "protected",
    "public",
    "return",
    "set",
    "static",
    "super",
    "switch",
    "then",
    "this",
    "throw",
    "transport",
    "true",
    "try",
    "type",
    "typeof",
    "undefined",
    "var",
    "void",
    "while",
    "with",
    "yield",
];

const MEMORY: &str = "there is memory";

/// All of it.
pub(super) fn code(contract: &Contract) -> String {
    let (id, title) = (&contract.id, &contract.title);
    let mut code = format!(
        "// Calls the service `{id}`.\n// Written by `hopline generate typescript` from its schema: generate it anew instead of changing it.\n"
    );
    for (name, declared) in &contract.types {
        write!(code, "\nexport type {name} = {};\n", declaration(declared)).expect(MEMORY);
    }
    write!(
        code,
        "\n/** Makes the calls, by docs/wire.md of Hopline. It rejects with the errors, the method's own ones among them. */\n\
         export interface Transport {{\n  call(service: string, method: string, args: unknown[]): Promise<unknown>;\n  \
         oneway(service: string, method: string, args: unknown[]): Promise<void>;\n}}\n\n\
         export class {title}Client {{\n  readonly #transport: Transport;\n\n  constructor(transport: Transport) {{\n    \
         this.#transport = transport;\n  }}\n"
    )
    .expect(MEMORY);
    for method in &contract.methods {
        code.push_str(&method_code(&id.to_string(), method));
    }
    for sentence in &contract.left_out {
        writeln!(code, "\n  // {sentence}").expect(MEMORY);
    }
    code + "}\n"
}

fn declaration(declared: &Declared) -> String {
    match declared {
        Declared::Same(shape) => type_of(shape),
        Declared::Record(fields) => {
            let field = |Field { name, shape, required }: &Field| {
                format!("  {}{}: {};\n", ascii(name), if *required { "" } else { "?" }, type_of(shape))
            };
            format!("{{\n{}}}", fields.iter().map(field).collect::<String>())
        }
        Declared::Choice(variants) => {
            let variant = |Variant { name, content }: &Variant| match content {
                None => ascii(name),
                Some(content) => format!("{{ {}: {} }}", ascii(name), type_of(content)),
            };
            variants.iter().map(variant).collect::<Vec<_>>().join(" | ")
        }
    }
}

fn method_code(service: &str, method: &Operation) -> String {
    let ident = Taken::new(KEYWORDS).take(method.ident.clone());
    let mut idents = Taken::new(KEYWORDS);
    let (optional_from, mut declared, mut sent) = (method.optional_from(), Vec::new(), Vec::new());
    for (at, (name, shape)) in method.parameters.iter().enumerate() {
        let name = idents.take(name.clone());
        let default = if at >= optional_from { " = null" } else { "" };
        declared.push(format!("{name}: {}{default}", type_of(shape)));
        sent.push(name);
    }
    let how = if method.oneway { "oneway" } else { "call" };
    let call =
        format!("await this.#transport.{how}({}, {}, [{}])", ascii(service), ascii(&method.name), sent.join(", "));
    let (result, body) = match &method.result {
        _ if method.oneway => ("void".to_owned(), format!("{call};")),
        Shape::Null => ("void".to_owned(), format!("{call};")),
        result => (type_of(result), format!("return ({call}) as {};", type_of(result))),
    };
    format!("\n  async {ident}({}): Promise<{result}> {{\n    {body}\n  }}\n", declared.join(", "))
}

fn type_of(shape: &Shape) -> String {
    match shape {
        Shape::Any => "unknown".to_owned(),
        Shape::Null => "null".to_owned(),
        Shape::Boolean => "boolean".to_owned(),
        Shape::Integer(_) | Shape::Number => "number".to_owned(),
        Shape::Text => "string".to_owned(),
        Shape::List(item) => format!("({})[]", type_of(item)),
        Shape::Map(value) => format!("{{ [key: string]: {} }}", type_of(value)),
        Shape::Optional(inner) => format!("{} | null", type_of(inner)),
        Shape::Tuple(items) => format!("[{}]", items.iter().map(type_of).collect::<Vec<_>>().join(", ")),
        Shape::Named(name) => name.clone(),
    }
}
