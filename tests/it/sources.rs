//! The tree as text, for the tests that hold its structure.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Modules whose public items are public as they are. Those of others are what `lib.rs` exports.
pub(crate) const PUBLIC: [&str; 4] = ["testing", "blocking", "dynamic", "environment"];

pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A file, by its path under the root.
pub(crate) fn text(path: impl AsRef<Path>) -> String {
    let path = root().join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// All files under a directory whose names end in this, in order.
pub(crate) fn files(directory: &Path, end: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).expect("it is there") {
        let path = entry.expect("it can be read").path();
        if path.is_dir() {
            if path.file_name().is_some_and(|name| name != "target" && name != "node_modules") {
                found.extend(files(&path, end));
            }
        } else if path.to_string_lossy().ends_with(end) {
            found.push(path);
        }
    }
    found.sort();
    found
}

/// The types and traits that `lib.rs` and the public modules export.
pub(crate) fn exported() -> BTreeSet<String> {
    let mut exported = BTreeSet::new();
    for module in ["lib"].iter().chain(&PUBLIC) {
        let text = text(format!("src/{module}.rs"));
        exported.extend(text.lines().filter_map(defined).map(str::to_owned));
        for statement in text.split(';') {
            let Some((_, names)) = statement.rsplit_once("\npub use ") else { continue };
            let names = names.split(|c: char| !c.is_alphanumeric());
            exported.extend(names.filter(|name| name.starts_with(char::is_uppercase)).map(str::to_owned));
        }
    }
    exported
}

/// The public type that a line begins to define, if it does.
pub(crate) fn defined(line: &str) -> Option<&str> {
    let kinds = ["pub struct ", "pub enum ", "pub trait "];
    let rest = kinds.into_iter().find_map(|kind| line.trim_start().strip_prefix(kind))?;
    rest.split(|c: char| !c.is_alphanumeric()).next()
}
