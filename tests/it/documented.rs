//! What the documentation shows: an example of every public type.

use std::collections::BTreeSet;

use crate::sources::{defined, exported, files, root, text};

#[test]
fn every_public_type_has_an_example() {
    let exported = exported();
    assert!(exported.contains("Client") && exported.contains("Fake"), "{exported:?}");
    let (mut with, mut without) = (BTreeSet::new(), BTreeSet::new());
    for file in files(&root().join("src"), ".rs") {
        let text = text(&file);
        let lines: Vec<_> = text.lines().collect();
        for (number, name) in lines.iter().enumerate().filter_map(|(number, line)| Some((number, defined(line)?))) {
            // Up to the end of what stands before it.
            let before = lines[..number].iter().rev().take_while(|line| !matches!(line.trim(), "" | "}" | "};"));
            match before.into_iter().any(|line| line.trim_start().starts_with("/// ```")) {
                true => with.insert(name.to_owned()),
                false => without.insert(format!("{name} in {}", file.display())),
            };
        }
    }
    let missing: Vec<_> = exported.difference(&with).collect();
    assert!(missing.is_empty(), "without an example: {missing:?}; all without: {without:?}");
}
