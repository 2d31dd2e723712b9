//! Which types and traits of other crates the public API shows. A new major version of such a crate is one of Hopline, too.
//!
//! The source is read as text, as rustfmt writes it: what begins at the margin ends at the margin.

use std::collections::{BTreeMap, BTreeSet};

use crate::sources::{PUBLIC, exported, files, root, text};

/// What promises nothing, since it is hidden from the documentation.
const HIDDEN: [&str; 3] = ["topology", "transport", "bench"];
/// Names of other crates that are shown, as `crate::Name`, each with the items of ours that show it.
type Shown = BTreeMap<(String, String), BTreeSet<String>>;

/// The words of a text, with a path in one piece, such as `watch::Receiver`, and a lifetime with its mark.
fn paths(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !c.is_alphanumeric() && !['_', ':', '\''].contains(&c)).map(|word| word.trim_matches(':'))
}

/// The crates that Cargo.toml names, as they are written in Rust.
fn dependencies() -> BTreeSet<String> {
    let manifest = text("Cargo.toml");
    let (_, after) = manifest.split_once("\n[dependencies]\n").expect("there are some");
    let lines = after.lines().take_while(|line| !line.starts_with('['));
    let names = lines.filter_map(|line| line.split_once(" = ")).map(|(name, _)| name.replace('-', "_"));
    names.filter(|name| !name.starts_with('#') && name != "hopline_macros").collect()
}

/// The names that `use` brings into a file, each with its path, such as `Bytes` for `bytes::Bytes`.
fn imports(source: &str) -> BTreeMap<String, String> {
    fn open(tree: &str, before: &str, names: &mut BTreeMap<String, String>) {
        let (mut depth, mut start, mut parts) = (0_usize, 0, Vec::new());
        for (at, c) in tree.char_indices() {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                ',' if depth == 0 => {
                    parts.push(&tree[start..at]);
                    start = at + 1;
                }
                _ => {}
            }
        }
        parts.push(&tree[start..]);
        for part in parts.into_iter().map(str::trim).filter(|part| !part.is_empty()) {
            match part.split_once('{') {
                Some((path, inner)) => open(inner.trim_end_matches('}'), &format!("{before}{path}"), names),
                None => {
                    let (path, name) = part.split_once(" as ").unwrap_or((part, part));
                    let path = format!("{before}{path}");
                    let path = path.trim_end_matches("::self").to_owned();
                    let name = match name {
                        "self" => path.rsplit("::").next().unwrap_or_default().to_owned(),
                        name => name.rsplit("::").next().unwrap_or_default().to_owned(),
                    };
                    names.insert(name, path);
                }
            }
        }
    }
    let mut names = BTreeMap::new();
    for statement in format!("\n{source}").split("\nuse ").skip(1) {
        let (tree, _) = statement.split_once(';').expect("it ends");
        open(&tree.replace('\n', " "), "", &mut names);
    }
    names
}

/// The items of a file that stand at the margin, with the attributes before them, and without comments and unit tests.
fn items(source: &str) -> Vec<String> {
    let (mut items, mut item) = (Vec::new(), String::new());
    for line in source.lines().filter(|line| !line.is_empty() && !line.trim_start().starts_with("//")) {
        item.push_str(line);
        item.push('\n');
        let attribute = item.starts_with("#[") && line.starts_with("#[");
        if !line.starts_with(' ') && !attribute && line.ends_with(['}', ';']) {
            let ended = std::mem::take(&mut item);
            if !ended.contains("#[cfg(test)]") {
                items.push(ended);
            }
        }
    }
    items
}

/// The parts of an item that others see: each with the name under which it is reported.
fn visible(item: &str, exported: &BTreeSet<String>, in_public_module: bool) -> Vec<(String, String)> {
    let lines: Vec<_> = item.lines().collect();
    let begins = lines.iter().position(|line| !line.starts_with("#[") && !line.starts_with([' ', ')'])).unwrap_or(0);
    let derived = lines[..begins].iter().filter(|line| line.starts_with("#[derive(")).copied();
    let derived = derived.map(|line| line.replace("thiserror::Error", "")).collect::<String>();
    let body = lines[begins..].join("\n");
    let (head, inner) = body.split_once("{\n").unwrap_or((&body, ""));
    let named = |kind: &str| {
        let rest = head.strip_prefix(kind)?;
        rest.split(|c: char| !c.is_alphanumeric() && c != '_').next().map(str::to_owned)
    };
    let signatures = |begin: &[&str]| {
        let mut found = Vec::new();
        let lines: Vec<_> = inner.lines().collect();
        for (number, line) in lines.iter().enumerate() {
            let Some(line) = line.strip_prefix("    ").filter(|line| begin.iter().any(|word| line.starts_with(word)))
            else {
                continue;
            };
            let end = lines[number..].iter().position(|line| {
                line.ends_with(['{', ';', ',', '}']) && {
                    let indent = line.len() - line.trim_start().len();
                    indent == 4
                }
            });
            let all = lines[number..=number + end.unwrap_or(0)].join("\n");
            // The body of a function in one line shows nothing.
            let all = all.split_once(" { ").map_or(all.as_str(), |(signature, _)| signature).to_owned();
            let words = line.split(|c: char| !c.is_alphanumeric() && c != '_');
            let name = words
                .filter(|word| !["pub", "async", "fn", "const", "type"].contains(word))
                .find(|word| !word.is_empty());
            found.push((name.unwrap_or_default().to_owned(), all));
        }
        found
    };
    let within = |owner: &str, parts: Vec<(String, String)>| -> Vec<(String, String)> {
        parts.into_iter().map(|(name, text)| (format!("{owner}::{name}"), text)).collect()
    };
    if head.starts_with("impl") {
        let (line, _) = head.split_once("\nwhere").unwrap_or((head, ""));
        let of = after_generics(line);
        let name_of = |part: &str| {
            let path = paths(part).find(|word| !word.is_empty()).unwrap_or_default();
            path.rsplit("::").next().unwrap_or(path).to_owned()
        };
        let mut parts = match of.split_once(" for ") {
            Some((of_trait, target))
                if exported.contains(&name_of(of_trait)) || exported.contains(&name_of(target)) =>
            {
                within(&name_of(target), signatures(&["type "]))
            }
            None if exported.contains(&name_of(of)) => {
                within(&name_of(of), signatures(&["pub fn ", "pub async fn ", "pub const "]))
            }
            _ => return Vec::new(),
        };
        parts.push((line.trim().to_owned(), head.to_owned()));
        return parts;
    }
    for (kind, begin) in [("pub trait ", ["fn ", "type ", "async fn "]), ("pub struct ", ["pub "; 3])] {
        if let Some(name) = named(kind).filter(|name| exported.contains(name)) {
            let mut parts = within(&name, signatures(&begin));
            parts.push((name, format!("{derived} {head}")));
            return parts;
        }
    }
    if let Some(name) = named("pub enum ").filter(|name| exported.contains(name)) {
        return vec![(name, format!("{derived} {body}"))];
    }
    if in_public_module
        && let Some(name) = named("pub fn ").or_else(|| named("pub async fn ")).or_else(|| named("pub type "))
    {
        return vec![(name, head.to_owned())];
    }
    match head.strip_prefix("pub use ") {
        Some(used) if in_public_module => vec![(format!("pub use {used}"), used.to_owned())],
        _ => Vec::new(),
    }
}

/// What stands after `impl<...>`.
fn after_generics(head: &str) -> &str {
    let head = head.trim_start_matches("impl");
    if !head.starts_with('<') {
        return head;
    }
    let mut depth = 0;
    let end = head.char_indices().find(|(at, c)| {
        let arrow = *c == '>' && head[..*at].ends_with('-');
        depth += match c {
            '<' => 1,
            '>' if !arrow => -1,
            _ => 0,
        };
        depth == 0
    });
    end.map_or(head, |(at, _)| &head[at + 1..])
}

/// What the public API shows of other crates.
fn shown() -> Shown {
    let (dependencies, exported) = (dependencies(), exported());
    let mut shown = Shown::new();
    for file in files(&root().join("src"), ".rs") {
        let path = file.strip_prefix(root().join("src")).expect("it is in there");
        let module = path.components().next().expect("it has a name").as_os_str().to_string_lossy();
        let module = module.trim_end_matches(".rs");
        // `Tls` and `ServiceId` are all that is exported of the hidden ones.
        let is_exported = path.ends_with("tls.rs") || path.ends_with("topology/service.rs");
        if HIDDEN.contains(&module) && !is_exported {
            continue;
        }
        let source = text(&file);
        let imports = imports(&source);
        let in_public_module = module == "lib" || PUBLIC.contains(&module);
        for (name, part) in items(&source).iter().flat_map(|item| visible(item, &exported, in_public_module)) {
            for word in paths(&part) {
                let (first, rest) = word.split_once("::").map_or((word, ""), |(first, rest)| (first, rest));
                let whole = match imports.get(first) {
                    Some(path) if rest.is_empty() => path.clone(),
                    Some(path) => format!("{path}::{rest}"),
                    None => word.to_owned(),
                };
                let Some((root, path)) = whole.split_once("::") else { continue };
                if dependencies.contains(root) {
                    let last = path.rsplit("::").next().unwrap_or(path);
                    shown.entry((root.to_owned(), last.to_owned())).or_default().insert(name.clone());
                }
            }
        }
    }
    shown
}

/// The table of CONTRIBUTING.md: the names of each crate that may be shown.
fn listed() -> BTreeSet<(String, String)> {
    let text = text("CONTRIBUTING.md");
    let (_, table) = text.split_once("| crate | what the API shows of it |").expect("CONTRIBUTING.md has the table");
    let rows = table.lines().skip(2).take_while(|line| line.starts_with('|'));
    let ticked = |cell: &str| cell.split('`').skip(1).step_by(2).map(str::to_owned).collect::<Vec<_>>();
    rows.flat_map(|row| {
        let cells: Vec<_> = row.split('|').collect();
        let name = ticked(cells[1]).concat();
        ticked(cells[2]).into_iter().map(move |shown| (name.clone(), shown))
    })
    .collect()
}

#[test]
fn the_public_api_shows_no_other_crates_than_those_that_are_listed_with_a_reason() {
    let (shown, listed) = (shown(), listed());
    let new: Vec<_> = shown.iter().filter(|(key, _)| !listed.contains(key)).collect();
    assert!(new.is_empty(), "hide these, or give a reason in the table of CONTRIBUTING.md: {new:#?}");
    let gone: Vec<_> = listed.iter().filter(|key| !shown.contains_key(key)).collect();
    assert!(gone.is_empty(), "no longer shown: take these out of the table of CONTRIBUTING.md: {gone:?}");
}

#[test]
fn what_is_shown_is_found_in_each_kind_of_item() {
    let exported: BTreeSet<_> = ["Mine".to_owned()].into();
    let all = |source: &str| -> Vec<String> {
        let parts = items(source).into_iter().flat_map(|item| visible(&item, &exported, false));
        parts
            .map(|(name, text)| {
                format!("{name}: {}", paths(&text).filter(|word| word.contains('x')).collect::<String>())
            })
            .collect()
    };
    assert_eq!(
        all("#[derive(x::D)]\npub struct Mine {\n    pub a: x::A,\n    b: x::B,\n}\n"),
        ["Mine::a: x::A", "Mine: x::D"]
    );
    assert_eq!(all("pub enum Mine {\n    A(x::A),\n}\n"), ["Mine: x::A"]);
    let method = "impl<T: Fn() -> u8> Mine<T> {\n    pub fn a(\n        self,\n    ) -> x::A {\n        x::B\n    }\n\n    fn b(x::C) {}\n}\n";
    assert_eq!(all(method)[0], "Mine::a: x::A");
    assert_eq!(all(method).len(), 2);
    assert_eq!(all("impl x::T for Mine {\n    type O = x::O;\n}\n"), ["Mine::O: x::O", "impl x::T for Mine: x::T"]);
    assert_eq!(all("pub trait Mine {\n    fn a(&self) -> x::A;\n}\n"), ["Mine::a: x::A", "Mine: "]);
    assert!(all("impl Other {\n    pub fn a() -> x::A {}\n}\n#[cfg(test)]\nmod tests {\n    x::B\n}\n").is_empty());
    let used = imports("use std::fmt;\nuse x::{A, b::{self, C}, d::E as F};\n");
    let used: Vec<_> = used.iter().map(|(name, path)| format!("{name}={path}")).collect();
    assert_eq!(used, ["A=x::A", "C=x::b::C", "F=x::d::E", "b=x::b", "fmt=std::fmt"]);
}
