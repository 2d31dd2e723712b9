//! `performance.svg`: how many calls a second each contender makes, as bars.

use std::fmt::Write;
use std::fs;
use std::path::Path;

use anyhow::Context;
use hopline_compare::Style;

use crate::figures::grouped;
use crate::results::Table;
use crate::scenario::SMALL;

const WIDTH: usize = 760;
/// Where the bars begin: the names are left of it.
const LEFT: usize = 180;
/// The longest bar; its number is right of it.
const LONGEST: f64 = 480.0;
const BAR: usize = 20;
const STEP: usize = 28;
const TITLE: usize = 44;

/// Draws the scenarios of many small calls, all at one scale.
pub(crate) fn write(folder: &Path, tables: &[Table]) -> anyhow::Result<()> {
    let drawn: Vec<_> = tables
        .iter()
        .filter(|Table { scenario: it, .. }| it.style == Style::Call && it.size == SMALL && it.concurrency > 1)
        .collect();
    let path = folder.join("performance.svg");
    fs::write(&path, svg(&drawn)?).with_context(|| format!("cannot write {}", path.display()))
}

fn svg(tables: &[&Table]) -> anyhow::Result<String> {
    let figures = tables.iter().flat_map(|table| &table.rows).filter_map(|row| Some(row.calls()?.median));
    let scale = LONGEST / figures.fold(1.0, f64::max);

    let mut shapes = String::new();
    let mut y = 8;
    for table in tables {
        writeln!(shapes, r#"<text class="title" x="16" y="{}">{}: calls/s</text>"#, y + 24, table.title)?;
        y += TITLE;
        for row in &table.rows {
            let calls = row.calls().map(|it| it.median);
            let class = if row.contender.is_hopline() { "own" } else { "other" };
            let (length, text) = (calls.unwrap_or(0.0) * scale, y + 15);
            let number = calls.map_or("failed".to_owned(), grouped);
            writeln!(shapes, r#"<text class="name" x="{}" y="{text}">{}</text>"#, LEFT - 10, row.contender)?;
            writeln!(shapes, r#"<rect class="{class}" x="{LEFT}" y="{y}" width="{length:.1}" height="{BAR}"/>"#)?;
            writeln!(shapes, r#"<text x="{:.1}" y="{text}">{number}</text>"#, LEFT as f64 + length + 8.0)?;
            y += STEP;
        }
        y += 12;
    }
    Ok(format!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" height="{y}">
<style>
text {{ font: 13px sans-serif; fill: #24292f; }}
.title {{ font-weight: bold; }}
.name {{ text-anchor: end; }}
.own {{ fill: #d9480f; }}
.other {{ fill: #8c959f; }}
</style>
<rect width="{WIDTH}" height="{y}" fill="#ffffff"/>
{shapes}</svg>
"##
    ))
}
