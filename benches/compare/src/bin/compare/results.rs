//! What the runs of a scenario gave, and how it reads in a terminal.

use std::fmt;

use hopline_compare::Report;

use crate::scenario::{Contender, Scenario};

/// The results of one scenario.
pub(crate) struct Table {
    pub(crate) scenario: &'static Scenario,
    pub(crate) rows: Vec<Row>,
}

/// The results of one contender.
pub(crate) struct Row {
    pub(crate) contender: Contender,
    pub(crate) failures: usize,
    reports: Vec<Report>,
}

impl Row {
    pub(crate) fn new(contender: Contender) -> Self {
        Self { contender, failures: 0, reports: Vec::new() }
    }

    pub(crate) fn add(&mut self, report: Report) {
        self.reports.push(report);
    }

    /// The median of one figure of the rounds; none when every run failed.
    pub(crate) fn median(&self, figure: impl Fn(&Report) -> f64) -> Option<f64> {
        let sorted = self.sorted(figure);
        let middle = sorted.len() / 2;
        match sorted.len() {
            0 => None,
            odd if odd % 2 == 1 => Some(sorted[middle]),
            _ => Some((sorted[middle - 1] + sorted[middle]) / 2.0),
        }
    }

    /// The smallest and the largest of one figure.
    pub(crate) fn range(&self, figure: impl Fn(&Report) -> f64) -> Option<(f64, f64)> {
        let sorted = self.sorted(figure);
        Some((*sorted.first()?, *sorted.last()?))
    }

    /// Calls that failed, in all rounds.
    pub(crate) fn errors(&self) -> u64 {
        self.reports.iter().map(|report| report.errors).sum()
    }

    fn sorted(&self, figure: impl Fn(&Report) -> f64) -> Vec<f64> {
        let mut figures: Vec<_> = self.reports.iter().map(figure).collect();
        figures.sort_by(f64::total_cmp);
        figures
    }
}

impl Table {
    /// Whether every run gave figures, and no call failed.
    pub(crate) fn is_complete(&self) -> bool {
        self.rows.iter().all(|row| row.failures == 0 && row.errors() == 0)
    }

    /// How many times as fast as this row the first one is: by latency with one call in flight, else by throughput.
    pub(crate) fn ratio(&self, row: &Row) -> Option<f64> {
        let first = self.rows.first()?;
        if self.scenario.concurrency == 1 {
            Some(row.median(|it| it.p50_us)? / first.median(|it| it.p50_us)?)
        } else {
            Some(first.median(|it| it.calls_per_s)? / row.median(|it| it.calls_per_s)?)
        }
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let titles = ["contender", "calls/s", "min-max", "p50 µs", "p99 µs", "hopline is"];
        let [contender, calls, range, p50, p99, ratio] = titles;
        write!(f, "{}\n  {contender:22} {calls:>10} {range:>19} {p50:>9} {p99:>9} {ratio:>12}", self.scenario)?;
        for row in &self.rows {
            let [calls, range, p50, p99, ratio] = cells(self, row);
            write!(f, "\n  {:22} {calls:>10} {range:>19} {p50:>9} {p99:>9} {ratio:>12}", row.contender)?;
        }
        Ok(())
    }
}

/// Throughput, its range, p50, p99, and the ratio to the first row, as text.
pub(crate) fn cells(table: &Table, row: &Row) -> [String; 5] {
    let figure = |figure: Option<f64>| figure.map_or("failed".to_owned(), grouped);
    let is_first = table.rows.first().is_some_and(|first| first.contender == row.contender);
    [
        figure(row.median(|it| it.calls_per_s)),
        row.range(|it| it.calls_per_s).map_or(String::new(), |(min, max)| format!("{}-{}", grouped(min), grouped(max))),
        figure(row.median(|it| it.p50_us)),
        figure(row.median(|it| it.p99_us)),
        match table.ratio(row) {
            Some(ratio) if !is_first && ratio < 1.0 => format!("{ratio:.2} × as fast"),
            Some(ratio) if !is_first => format!("{ratio:.1} × as fast"),
            _ => String::new(),
        },
    ]
}

/// One run, in one line.
pub(crate) fn line(contender: Contender, report: &Report) -> String {
    let Report { calls_per_s, p50_us, p99_us, errors, .. } = report;
    let (calls, p50, p99) = (grouped(*calls_per_s), grouped(*p50_us), grouped(*p99_us));
    let errors = if *errors > 0 { format!("  {errors} ERRORS") } else { String::new() };
    format!("{contender:22} {calls:>9} calls/s  p50 {p50:>8} µs  p99 {p99:>8} µs{errors}")
}

/// A rounded number, its thousands apart.
pub(crate) fn grouped(number: f64) -> String {
    let digits = format!("{number:.0}");
    let mut text = String::new();
    for (position, digit) in digits.chars().enumerate() {
        if position > 0 && (digits.len() - position).is_multiple_of(3) {
            text.push(' ');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(calls_per_s: f64) -> Report {
        Report { calls_per_s, p50_us: 1.0, p99_us: 2.0, p999_us: 3.0, calls: 1, errors: 0, concurrency: 64, size: 64 }
    }

    #[test]
    fn one_disturbed_round_does_not_move_the_median() {
        let mut row = Row::new(Contender::Hopline);
        assert_eq!(row.median(|it| it.calls_per_s), None);
        for calls_per_s in [100.0, 3.0, 90.0] {
            row.add(report(calls_per_s));
        }
        assert_eq!(row.median(|it| it.calls_per_s), Some(90.0));
        row.add(report(80.0));
        assert_eq!(row.median(|it| it.calls_per_s), Some(85.0));
    }

    #[test]
    fn thousands_stand_apart() {
        assert_eq!(grouped(12.4), "12");
        assert_eq!(grouped(999.6), "1 000");
        assert_eq!(grouped(1_234_567.0), "1 234 567");
    }
}
