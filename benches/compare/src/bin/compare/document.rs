//! The generated part of `performance.md`; all around it is written by hand and stays.

use std::fmt::Write;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::ValueEnum;

use crate::promises;
use crate::results::Table;
use crate::scenario::Contender;
use crate::wrap::wrap;

const NAME: &str = "performance.md";
const BEGIN: &str = "<!-- compare:begin -->";
const END: &str = "<!-- compare:end -->";

/// What stands before and after the generated part, markers included.
pub(crate) struct Document {
    path: PathBuf,
    before: String,
    after: String,
}

/// Reads the document of a folder, or begins one.
pub(crate) fn open(folder: &Path) -> anyhow::Result<Document> {
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let path = folder.join(NAME);
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == ErrorKind::NotFound => format!("# Performance\n\n{BEGIN}\n{END}\n"),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
    };
    let (before, after) =
        around(&text).with_context(|| format!("{} lacks the lines {BEGIN} and {END}", path.display()))?;
    Ok(Document { before: before.to_owned(), after: after.to_owned(), path })
}

/// What stands up to the first marker and from the second one on.
fn around(text: &str) -> Option<(&str, &str)> {
    let begin = text.find(BEGIN)? + BEGIN.len();
    let end = begin + text[begin..].find(END)?;
    Some((&text[..begin], &text[end..]))
}

/// Writes the document with new results.
pub(crate) fn write(document: Document, folder: &Path, machine: &str, tables: &[Table]) -> anyhow::Result<()> {
    let Document { path, before, after } = document;
    let generated = generated(machine, tables)?;
    fs::write(&path, format!("{before}\n{generated}{after}"))
        .with_context(|| format!("cannot write {NAME} to {}", folder.display()))
}

fn generated(machine: &str, tables: &[Table]) -> anyhow::Result<String> {
    let mut text = format!("{machine}\n![calls per second of small calls](performance.svg)\n\n");
    text.push_str("### What each promises\n\n");
    promised(&mut text, tables)?;
    for table in tables {
        writeln!(text, "### {}\n", table.title)?;
        let cpu = "CPU µs a call: client | server | broker";
        writeln!(text, "| contender | calls/s | quartiles | p50 µs | p99 µs | {cpu} |")?;
        writeln!(text, "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")?;
        for row in &table.rows {
            let errors = match row.errors() {
                0 => String::new(),
                errors => format!(" ({errors} calls failed)"),
            };
            writeln!(text, "| {}{errors} | {} |", row.contender, row.cells().join(" | "))?;
        }
        text.push('\n');
    }
    text.push_str("### Hopline ÷ the others\n\n");
    text.push_str("Calls/s of Hopline divided by those of each other in the same round, as medians of the rounds.\n\n");
    for (title, ratios) in tables.iter().filter_map(|it| Some((&it.title, it.ratios()?))) {
        writeln!(text, "{}", wrap(&format!("- **{title}**: {ratios}"), 2))?;
    }
    text.push('\n');
    Ok(text)
}

/// The promises of those that were measured.
fn promised(text: &mut String, tables: &[Table]) -> anyhow::Result<()> {
    writeln!(text, "| {} |\n|{}", promises::TITLES.join(" | "), " --- |".repeat(promises::TITLES.len()))?;
    let measured = |it: &Contender| tables.iter().flat_map(|table| &table.rows).any(|row| row.contender == *it);
    for contender in Contender::value_variants().iter().filter(|it| measured(it)) {
        writeln!(text, "| {contender} | {} |", promises::of(*contender).join(" | "))?;
    }
    writeln!(text, "\n{}\n", wrap(promises::NOTE, 0))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_by_hand_stays() {
        let text = format!("by hand\n{BEGIN}\nold figures\n{END}\nalso by hand\n");
        let (before, after) = around(&text).expect("both markers are there");
        assert_eq!(before, format!("by hand\n{BEGIN}"));
        assert_eq!(after, format!("{END}\nalso by hand\n"));
        assert_eq!(around("by hand\n"), None);
    }
}
