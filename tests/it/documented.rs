//! What the documentation shows: an example of every public type, and code that is in the examples.

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

#[test]
fn code_of_the_guide_that_cannot_be_compiled_there_stands_in_an_example() {
    let dense = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    let examples: Vec<_> = files(&root().join("examples"), ".rs").iter().map(|file| dense(&text(file))).collect();
    let mut found = 0;
    for page in files(&root().join("docs/guide/src"), ".md") {
        let page_text = text(&page);
        // rustdoc compiles what is marked as `rust`, and leaves out what is marked as `rs`.
        for shown in page_text.split("\n```rs\n").skip(1) {
            let (shown, _) = shown.split_once("\n```").expect("a block ends");
            let is_there = examples.iter().any(|example| example.contains(&dense(shown)));
            assert!(is_there, "no example has this of {}:\n{shown}", page.display());
            found += 1;
        }
    }
    assert!(found > 0);
}
