//! What the runs of a scenario gave, and how it reads in a terminal.

use std::fmt;

use hopline_compare::Report;

use crate::cpu::Used;
use crate::figures::{Quartiles, grouped, paired_ratio, short};
use crate::scenario::{Contender, ONE_CALL_A_MESSAGE, Scenario};

/// The results of one scenario, or of some of its contenders. The first row is compared with each of the others.
pub(crate) struct Table {
    pub(crate) scenario: Scenario,
    pub(crate) title: String,
    pub(crate) rows: Vec<Row>,
}

/// The results of one contender.
#[derive(Clone)]
pub(crate) struct Row {
    pub(crate) contender: Contender,
    /// One for each round; none where the run failed.
    rounds: Vec<Option<Run>>,
}

/// The results of one contender in one round.
#[derive(Clone)]
pub(crate) struct Run {
    pub(crate) report: Report,
    pub(crate) used: Used,
}

impl Run {
    fn calls(&self) -> Option<f64> {
        Some(self.report.calls_per_s)
    }

    /// CPU time of the server's process for each call, in microseconds.
    fn server_cpu(&self) -> Option<f64> {
        self.for_each_call(self.used.server)
    }

    fn broker_cpu(&self) -> Option<f64> {
        self.for_each_call(self.used.broker?)
    }

    fn for_each_call(&self, used: f64) -> Option<f64> {
        (self.report.calls > 0).then(|| used * 1e6 / self.report.calls_per_s)
    }
}

impl Row {
    pub(crate) fn new(contender: Contender) -> Self {
        Self { contender, rounds: Vec::new() }
    }

    pub(crate) fn add(&mut self, run: Option<Run>) {
        self.rounds.push(run);
    }

    /// Median and quartiles of calls/s; none when every run failed.
    pub(crate) fn calls(&self) -> Option<Quartiles> {
        self.quartiles(Run::calls)
    }

    /// Calls that failed, in all rounds.
    pub(crate) fn errors(&self) -> u64 {
        self.rounds.iter().flatten().map(|run| run.report.errors).sum()
    }

    fn is_complete(&self) -> bool {
        self.rounds.iter().all(Option::is_some) && self.errors() == 0
    }

    fn quartiles(&self, figure: impl Fn(&Run) -> Option<f64>) -> Option<Quartiles> {
        Quartiles::of(self.rounds.iter().flatten().filter_map(figure))
    }

    fn by_round(&self) -> Vec<Option<f64>> {
        self.rounds.iter().map(|run| run.as_ref().and_then(Run::calls)).collect()
    }

    /// Calls/s and their quartiles, p50, p99, and CPU time by process, as text.
    pub(crate) fn cells(&self) -> [String; 7] {
        let median = |figure: fn(&Run) -> Option<f64>| self.quartiles(figure).map(|it| it.median);
        let whole = |figure: Option<f64>| figure.map_or("–".to_owned(), grouped);
        let fine = |figure: Option<f64>| figure.map_or("–".to_owned(), short);
        let calls = self.calls();
        [
            calls.map_or("failed".to_owned(), |it| grouped(it.median)),
            calls.map_or("–".to_owned(), |it| format!("{}-{}", grouped(it.lower), grouped(it.upper))),
            whole(median(|it| it.report.p50_us)),
            whole(median(|it| it.report.p99_us)),
            fine(median(|it| it.report.cpu_us_per_call)),
            fine(median(Run::server_cpu)),
            fine(median(Run::broker_cpu)),
        ]
    }
}

impl Table {
    /// The tables of a scenario: of all as they are, and of those that send one message for each call.
    pub(crate) fn of(scenario: Scenario, rows: Vec<Row>) -> Vec<Self> {
        let title = scenario.to_string();
        let some = |wanted: &dyn Fn(Contender) -> bool| -> Vec<Row> {
            rows.iter().filter(|row| wanted(row.contender)).cloned().collect()
        };
        let mut tables = vec![Self { scenario, title: title.clone(), rows: some(&|it| it != Contender::HoplineOff) }];
        if scenario.has_one_call_a_message() {
            let rows = some(&|it| ONE_CALL_A_MESSAGE.contains(&it));
            tables.push(Self { scenario, title: format!("{title}, one call a message"), rows });
        }
        tables.retain(|table| !table.rows.is_empty());
        tables
    }

    /// Whether every run gave figures, and no call failed.
    pub(crate) fn is_complete(&self) -> bool {
        self.rows.iter().all(Row::is_complete)
    }

    /// How many times the calls/s of each other row Hopline makes, in words; none where it did not run.
    pub(crate) fn ratios(&self) -> Option<String> {
        let (first, others) = self.rows.split_first()?;
        let ratio = |row: &Row| paired_ratio(&first.by_round(), &row.by_round());
        let ratios: Vec<_> =
            others.iter().filter_map(|row| Some(format!("{} × {}", short(ratio(row)?), row.contender))).collect();
        (first.contender.is_hopline() && !ratios.is_empty()).then(|| ratios.join(", "))
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (the last three columns: CPU µs a call by process)", self.title)?;
        let mut line = |name: &dyn fmt::Display, [calls, quartiles, p50, p99, client, server, broker]: [&str; 7]| {
            write!(f, "\n  {name:22} {calls:>9} {quartiles:>17} {p50:>9} {p99:>9} {client:>8} {server:>8} {broker:>8}")
        };
        line(&"contender", ["calls/s", "quartiles", "p50 µs", "p99 µs", "client", "server", "broker"])?;
        for row in &self.rows {
            line(&row.contender, row.cells().each_ref().map(String::as_str))?;
        }
        Ok(())
    }
}

/// One run, in one line.
pub(crate) fn line(contender: Contender, run: &Run) -> String {
    let Report { calls_per_s, p50_us, p99_us, errors, .. } = run.report;
    let [p50, p99] = [p50_us, p99_us].map(|it| it.map_or("–".to_owned(), grouped));
    let errors = if errors > 0 { format!("  {errors} ERRORS") } else { String::new() };
    format!("{contender:22} {:>9} calls/s  p50 {p50:>9} µs  p99 {p99:>9} µs{errors}", grouped(calls_per_s))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scenario::SCENARIOS;

    fn run(calls_per_s: f64) -> Option<Run> {
        let report = Report {
            calls_per_s,
            p50_us: Some(1.0),
            p99_us: Some(2.0),
            p999_us: Some(3.0),
            calls: 1,
            errors: 0,
            concurrency: 64,
            size: 64,
            cpu_us_per_call: Some(4.0),
        };
        Some(Run { report, used: Used { server: 0.5, broker: None } })
    }

    fn row(contender: Contender, rounds: [Option<Run>; 3]) -> Row {
        Row { contender, rounds: rounds.into() }
    }

    #[test]
    fn what_shares_messages_and_what_does_not_have_a_table_each() {
        use Contender::{Hopline, HoplineOff, Lapin, Nats};
        let rows = vec![
            row(Hopline, [run(40.0), run(400.0), None]),
            row(HoplineOff, [run(8.0), run(80.0), run(8.0)]),
            row(Lapin, [run(10.0), run(100.0), run(10.0)]),
            row(Nats, [run(50.0), run(500.0), run(50.0)]),
        ];
        let tables = Table::of(SCENARIOS[1], rows);
        let ratios: Vec<_> = tables.iter().filter_map(|it| Some((it.title.as_str(), it.ratios()?))).collect();
        assert_eq!(
            ratios,
            [
                ("64 B, 64 in flight", "4.0 × plain lapin, 0.80 × NATS".to_owned()),
                ("64 B, 64 in flight, one call a message", "0.80 × plain lapin".to_owned()),
            ]
        );
        assert!(!tables[0].is_complete() && tables[1].is_complete());
    }

    #[test]
    fn the_cpu_time_of_a_call_is_that_of_a_second_over_its_calls() {
        let row = row(Contender::Tarpc, [run(50_000.0), run(50_000.0), run(100_000.0)]);
        assert_eq!(row.cells(), ["50 000", "50 000-75 000", "1", "2", "4.0", "10", "–"]);
    }
}
