//! What the documentation shows: an example of every public type.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// The lines of all files in `src`, by their names.
fn source() -> BTreeMap<String, Vec<String>> {
    fn read(folder: &Path, files: &mut BTreeMap<String, Vec<String>>) {
        for entry in fs::read_dir(folder).expect("the folder is there") {
            let path = entry.expect("it can be read").path();
            if path.is_dir() {
                read(&path, files);
            } else {
                let text = fs::read_to_string(&path).expect("it is text");
                files.insert(path.display().to_string(), text.lines().map(str::to_owned).collect());
            }
        }
    }
    let mut files = BTreeMap::new();
    read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut files);
    files
}

/// The types and traits that `lib.rs` and the public modules export.
fn exported(files: &BTreeMap<String, Vec<String>>) -> BTreeSet<String> {
    let public = ["src/lib.rs", "src/testing.rs", "src/blocking.rs", "src/environment.rs"];
    let texts = files.iter().filter(|(name, _)| public.iter().any(|end| name.ends_with(end)));
    let mut exported = BTreeSet::new();
    for (_, lines) in texts {
        exported.extend(lines.iter().filter_map(|line| defined(line)).map(str::to_owned));
        for statement in lines.join("\n").split(';') {
            let Some((_, names)) = statement.rsplit_once("\npub use ") else { continue };
            let names = names.split(|c: char| !c.is_alphanumeric());
            exported.extend(names.filter(|name| name.starts_with(char::is_uppercase)).map(str::to_owned));
        }
    }
    exported
}

/// The public type that a line begins to define, if it does.
fn defined(line: &str) -> Option<&str> {
    let kinds = ["pub struct ", "pub enum ", "pub trait "];
    let rest = kinds.into_iter().find_map(|kind| line.trim_start().strip_prefix(kind))?;
    rest.split(|c: char| !c.is_alphanumeric()).next()
}

#[test]
fn every_public_type_has_an_example() {
    let files = source();
    let exported = exported(&files);
    assert!(exported.contains("Client") && exported.contains("Fake"), "{exported:?}");
    let (mut with, mut without) = (BTreeSet::new(), BTreeSet::new());
    for (file, lines) in &files {
        for (number, name) in lines.iter().enumerate().filter_map(|(number, line)| Some((number, defined(line)?))) {
            // Up to the end of what stands before it.
            let before = lines[..number].iter().rev().take_while(|line| !matches!(line.trim(), "" | "}" | "};"));
            match before.into_iter().any(|line| line.trim_start().starts_with("/// ```")) {
                true => with.insert(name.to_owned()),
                false => without.insert(format!("{name} in {file}")),
            };
        }
    }
    let missing: Vec<_> = exported.difference(&with).collect();
    assert!(missing.is_empty(), "without an example: {missing:?}; all without: {without:?}");
}
