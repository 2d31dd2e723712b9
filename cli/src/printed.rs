//! What the commands print: tables, ages, and texts from elsewhere.

use std::io::{self, Write};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hopline::Histogram;
use serde::Serialize;

/// How much of a cell a table shows, in characters.
const MAX_CELL: usize = 100;

/// Prints text and a line end to stdout.
///
/// # Errors
/// A sentence, when nobody reads it any more.
pub(crate) fn print(text: &str) -> Result<(), String> {
    let mut stdout = io::stdout();
    let printed = writeln!(stdout, "{text}").and_then(|()| stdout.flush());
    printed.map_err(|error| format!("nobody reads what this prints: {error}"))
}

/// A table. Each column is as wide as its widest cell, except for the last. What is in a cell may come from elsewhere.
pub(crate) fn table<const N: usize>(rows: Vec<[String; N]>) -> String {
    let rows: Vec<_> = rows.into_iter().map(|row| row.map(|cell| cut(&one_line(&cell)))).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<_> = (0..N).map(width).collect();
    let line = |row: &[String; N]| {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// The beginning of a text, with dots after it if that is not all of it.
fn cut(text: &str) -> String {
    match text.char_indices().nth(MAX_CELL) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_owned(),
    }
}

/// A value as JSON in one line, with no character in it that steers a terminal.
pub(crate) fn json(value: &impl Serialize) -> String {
    let text = serde_json::to_string(value).expect("texts, numbers, lists and records of them can be JSON");
    // Only texts have such characters, and there they may be written like this.
    let escaped = |c: char| if steers(c) { format!("\\u{:04x}", u32::from(c)) } else { c.to_string() };
    if text.chars().any(steers) { text.chars().map(escaped).collect() } else { text }
}

/// A value as JSON in several lines, otherwise as [`json`].
pub(crate) fn pretty(value: &impl Serialize) -> String {
    let text = serde_json::to_string_pretty(value).expect("texts, numbers, lists and records of them can be JSON");
    let escaped = |c: char| if steers(c) && c != '\n' { format!("\\u{:04x}", u32::from(c)) } else { c.to_string() };
    text.chars().map(escaped).collect()
}

/// A text as a literal of JSON, which Python and JavaScript read as well. What is not ASCII is escaped, as far as all three
/// escape it in the same way.
pub(crate) fn ascii(text: &str) -> String {
    let json = serde_json::to_string(text).expect("a text can be JSON");
    let escaped = |c: char| match u32::from(c) {
        code @ (0..0x20 | 0x7f..=0xffff) => format!("\\u{code:04x}"),
        _ => c.to_string(),
    };
    json.chars().map(escaped).collect()
}

/// Text from elsewhere, without characters that steer a terminal.
pub(crate) fn one_line(text: &str) -> String {
    text.chars().map(|c| if steers(c) { ' ' } else { c }).collect()
}

/// Whether a character does something to a terminal: control characters, and those that turn the direction of writing.
fn steers(c: char) -> bool {
    c.is_control() || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// How long ago a time in milliseconds since 1970 is, in its largest unit. 0 stands for a time that is not known.
pub(crate) fn age(at: u64) -> String {
    if at == 0 {
        return "-".to_owned();
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    span(now.saturating_sub(Duration::from_millis(at)).as_secs())
}

fn span(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3_600 => format!("{}m", seconds / 60),
        3_600..86_400 => format!("{}h", seconds / 3_600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// A time in the unit that suits it, such as `2.5ms`.
pub(crate) fn time(time: Duration) -> String {
    let micros = time.as_micros();
    match micros {
        0..1_000 => format!("{micros}us"),
        1_000..1_000_000 => format!("{}ms", short(micros as f64 / 1e3)),
        _ => format!("{}s", short(micros as f64 / 1e6)),
    }
}

/// How long a share of what a histogram counts took at most, such as `≤2.5ms`.
pub(crate) fn quantile(times: &Histogram, share: f64) -> String {
    match times.quantile(share) {
        None => "-".to_owned(),
        Some(Duration::MAX) => ">10s".to_owned(),
        Some(bound) => format!("≤{}", time(bound)),
    }
}

/// A number of bytes in the unit that suits it, such as `3.4 MiB`.
pub(crate) fn bytes(bytes: u64) -> String {
    let (mut number, mut units) = (bytes as f64, ["KiB", "MiB", "GiB", "TiB"].into_iter());
    let mut unit = "B";
    while number >= 1024.0
        && let Some(next) = units.next()
    {
        (number, unit) = (number / 1024.0, next);
    }
    format!("{} {unit}", short(number))
}

/// A number with at most one digit after the point.
fn short(number: f64) -> String {
    let text = format!("{number:.1}");
    text.strip_suffix(".0").map_or(text.clone(), str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_age_is_told_in_its_largest_unit() {
        assert_eq!(
            [0, 59, 60, 3_599, 3_600, 86_399, 86_400, 900_000].map(span),
            ["0s", "59s", "1m", "59m", "1h", "23h", "1d", "10d"]
        );
    }

    #[test]
    fn times_and_bytes_are_told_in_the_unit_that_suits_them() {
        let times = [0, 999, 1_000, 2_500, 999_949, 1_500_000, 90_000_000].map(Duration::from_micros).map(time);
        assert_eq!(times, ["0us", "999us", "1ms", "2.5ms", "999.9ms", "1.5s", "90s"]);
        assert_eq!([0, 1023, 1024, 1536, 5 << 30].map(bytes), ["0 B", "1023 B", "1 KiB", "1.5 KiB", "5 GiB"]);
    }

    #[test]
    fn columns_are_as_wide_as_what_is_in_them() {
        let rows = [["ID", "REASON"], ["größer", "x"], ["a", ""]].map(|row| row.map(str::to_owned));
        assert_eq!(table(rows.to_vec()), "ID      REASON\ngrößer  x\na");
    }

    #[test]
    fn a_message_does_not_steer_the_terminal() {
        assert_eq!(one_line("a\u{1b}[2J\nb\u{9b}c\u{202e}"), "a [2J b c ");
        assert_eq!(table(vec![["\u{1b}[2J".to_owned()]]), " [2J");
        assert_eq!(ascii("ö\"\n\u{202e}\u{7f}\u{1f600}"), "\"\\u00f6\\\"\\n\\u202e\\u007f\u{1f600}\"");
        assert_eq!(json(&"ö\u{1b}\u{9b}\u{202e}"), r#""ö\u001b\u009b\u202e""#);
    }

    #[test]
    fn a_cell_that_is_too_long_is_cut() {
        let long = table(vec![["ö".repeat(70_000), "b".to_owned()]]);
        assert_eq!(long, format!("{}...  b", "ö".repeat(MAX_CELL)));
    }
}
