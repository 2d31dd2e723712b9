//! The report of a load, as text and as JSON.

use std::fmt::Display;

use serde_json::{Value, json};

use super::measured::{Load, Measured, Style};
use super::{bytes, coalescing};

/// The report for people, with a line for each figure.
pub(super) fn text(load: &Load, measured: &Measured, served_here: bool) -> String {
    let Load { concurrency, size, coalesce, style, .. } = *load;
    let (calls, ended) = match style {
        Style::Call => ("calls", "from a call to its reply"),
        Style::Oneway => ("oneway calls", "from a call until the broker has it"),
    };
    let (size, coalesce, elapsed) = (bytes(size), coalescing(coalesce), measured.elapsed);
    let whose = if served_here { "client and server, which share this process" } else { "this client process" };
    let micros = |part| format!("{} µs", some(measured.latency(part), 0));

    let mut lines = vec![
        format!("{concurrency} {calls} in flight, {size} each, coalesce {coalesce}, measured for {elapsed:.2?}"),
        format!("Latencies are {ended}."),
        String::new(),
        line("calls", measured.calls()),
        line("calls/s", format!("{:.0}", measured.calls_per_second())),
        line("errors", measured.errors),
        line("p50 latency", micros(0.5)),
        line("p90 latency", micros(0.9)),
        line("p99 latency", micros(0.99)),
        line("p99.9 latency", micros(0.999)),
        line("longest latency", micros(1.0)),
        line("messages/s", format!("{} (requests and replies)", some(measured.messages_per_second(), 0))),
        line("calls a message", some(measured.calls_per_message(), 2)),
    ];
    if let Some(micros) = measured.cpu_per_call() {
        lines.push(line("CPU time a call", format!("{micros:.1} µs (user and system, {whose})")));
    }
    lines.join("\n")
}

fn line(name: &str, figure: impl Display) -> String {
    format!("{name:<16} {figure}")
}

/// A figure with this many digits after the point, or a dash if nothing was counted.
pub(super) fn some(figure: Option<impl Display>, digits: usize) -> String {
    figure.map_or_else(|| "-".to_owned(), |figure| format!("{figure:.digits$}"))
}

/// The report for programs.
pub(super) fn json(load: &Load, measured: &Measured) -> Value {
    json!({
        "calls_per_s": measured.calls_per_second(),
        "p50_us": measured.latency(0.5),
        "p99_us": measured.latency(0.99),
        "p999_us": measured.latency(0.999),
        "calls": measured.calls(),
        "errors": measured.errors,
        "concurrency": load.concurrency,
        "size": load.size,
        "calls_per_message": measured.calls_per_message(),
        "cpu_us_per_call": measured.cpu_per_call(),
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use hdrhistogram::Histogram;
    use hopline::Traffic;

    use super::*;

    fn load(style: Style) -> Load {
        let measured = Duration::from_secs(2);
        Load { concurrency: 64, size: 1024, coalesce: hopline::Coalesce::Fixed(8), style, methods: 1, measured }
    }

    /// 100 calls of 1 to 100 ms within 2 s, ten to a message, for 5 ms of CPU time.
    fn measured() -> Measured {
        let mut latencies = Histogram::new(3).expect("3 digits");
        for millis in 1..=100 {
            latencies.record(millis * 1000).expect("it grows");
        }
        let mut traffic = Traffic::default();
        (traffic.messages_sent, traffic.calls_sent) = (10, 100);
        (traffic.messages_received, traffic.replies_received) = (30, 100);
        Measured {
            latencies,
            elapsed: Duration::from_secs(2),
            errors: 3,
            first_error: None,
            traffic,
            cpu: Some(Duration::from_millis(5)),
        }
    }

    fn nothing() -> Measured {
        let latencies = Histogram::new(3).expect("3 digits");
        Measured { latencies, errors: 0, traffic: Traffic::default(), ..measured() }
    }

    /// Whether a figure is right within the precision of a histogram with three digits.
    fn about(figure: &Value, expected: f64) -> bool {
        figure.as_f64().is_some_and(|figure| (figure / expected - 1.0).abs() < 0.001)
    }

    #[test]
    fn figures_are_those_of_the_time_that_was_measured() {
        let json = json(&load(Style::Call), &measured());
        let expected = [("calls_per_s", 50.0), ("p50_us", 50e3), ("p99_us", 99e3), ("p999_us", 100e3)];
        for (key, expected) in
            expected.into_iter().chain([("calls_per_message", 10.0), ("cpu_us_per_call", 50.0), ("errors", 3.0)])
        {
            assert!(about(&json[key], expected), "{key}, not {expected}: {json}");
        }
        let text = text(&load(Style::Oneway), &measured(), false);
        assert!(text.starts_with("64 oneway calls in flight, 1 KiB each, coalesce 8, measured for 2.00s\n"), "{text}");
        for line in ["calls/s          50", "messages/s       20 (requests and replies)", "calls a message  10.00"] {
            assert!(text.lines().any(|other| other == line), "no `{line}` in {text}");
        }
        assert!(text.ends_with("CPU time a call  50.0 µs (user and system, this client process)"), "{text}");
    }

    #[test]
    fn a_figure_of_nothing_is_left_open() {
        let json = json(&load(Style::Call), &nothing());
        for key in ["p50_us", "p99_us", "p999_us", "calls_per_message"] {
            assert!(json[key].is_null(), "{key}: {json}");
        }
        let text = text(&load(Style::Call), &nothing(), true);
        assert!(text.contains("p50 latency      - µs") && !text.contains("CPU"), "{text}");
    }
}
