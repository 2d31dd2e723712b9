//! The generated part of `performance.md`; all around it is written by hand and stays.

use std::fmt::Write;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::Context;

use crate::results::{Table, cells};

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
    let mut text = format!("{machine}\n![calls per second with 64 and 256 calls in flight](performance.svg)\n\n");
    for table in tables {
        let by = if table.scenario.concurrency == 1 { "p50" } else { "calls/s" };
        writeln!(text, "### {}\n", table.scenario)?;
        writeln!(text, "| contender | calls/s | min-max | p50 µs | p99 µs | Hopline is, by {by} |")?;
        writeln!(text, "| --- | ---: | ---: | ---: | ---: | ---: |")?;
        for row in &table.rows {
            let errors = match row.errors() {
                0 => String::new(),
                errors => format!(" ({errors} calls failed)"),
            };
            writeln!(text, "| {}{errors} | {} |", row.contender, cells(table, row).join(" | "))?;
        }
        text.push('\n');
    }
    Ok(text)
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
