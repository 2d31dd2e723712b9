//! `hopline call --repeat`: the same call many times, and what became of all of them.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use clap::{Args, value_parser};
use futures::StreamExt as _;
use hdrhistogram::Histogram;
use hopline::CallError;
use serde_json::{Value, json};

use crate::printed::{json, time};

/// How often a call is made.
#[derive(Args)]
pub(crate) struct Repeating {
    /// Make the call so many times, and print how many went well and how long they took, and not their replies
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = value_parser!(u64).range(1..), conflicts_with = "all")]
    repeat: u64,
    /// How many of these calls are made at once
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = value_parser!(u32).range(1..=65_536), requires = "repeat")]
    concurrency: u32,
}

/// What became of calls.
pub(crate) struct Sums {
    calls: u64,
    /// How many failed, by the name of their code.
    failed: BTreeMap<&'static str, u64>,
    /// What the first one that failed says.
    first: Option<CallError<Value>>,
    /// Of those that went well, in microseconds.
    latencies: Histogram<u64>,
    elapsed: Duration,
}

impl Repeating {
    pub(crate) fn is_once(&self) -> bool {
        self.repeat == 1
    }

    /// Makes the calls.
    pub(crate) async fn summed<F>(&self, call: impl Fn() -> F) -> Sums
    where
        F: Future<Output = Result<(), CallError<Value>>>,
    {
        let began = Instant::now();
        let timed = |_| {
            let call = call();
            async move {
                let began = Instant::now();
                (call.await, began.elapsed())
            }
        };
        let mut ended = futures::stream::iter(0..self.repeat).map(timed).buffer_unordered(self.concurrency as usize);
        let latencies = Histogram::new(3).expect("it can hold up to 5 digits");
        let (failed, elapsed) = (BTreeMap::new(), Duration::ZERO);
        let mut sums = Sums { calls: self.repeat, failed, first: None, latencies, elapsed };
        while let Some((outcome, took)) = ended.next().await {
            match outcome {
                Ok(()) => {
                    let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
                    sums.latencies.record(micros).expect("it grows as it has to");
                }
                Err(error) => {
                    *sums.failed.entry(kind(&error)).or_default() += 1;
                    sums.first.get_or_insert(error);
                }
            }
        }
        sums.elapsed = began.elapsed();
        sums
    }
}

impl Sums {
    /// How many calls failed, and what the first one of them says.
    pub(crate) fn failed(self) -> Option<(u64, CallError<Value>)> {
        self.first.map(|first| (self.failed.values().sum(), first))
    }

    fn latency(&self, part: f64) -> Option<u64> {
        (!self.latencies.is_empty()).then(|| self.latencies.value_at_quantile(part))
    }

    fn calls_per_second(&self) -> f64 {
        self.calls as f64 / self.elapsed.as_secs_f64()
    }

    pub(crate) fn as_json(&self) -> String {
        json(&json!({
            "calls": self.calls, "ok": self.latencies.len(), "failed": self.failed,
            "calls_per_s": self.calls_per_second(), "p50_us": self.latency(0.5), "p99_us": self.latency(0.99),
        }))
    }

    pub(crate) fn as_text(&self) -> String {
        let shown = |part| self.latency(part).map_or_else(|| "-".to_owned(), |us| time(Duration::from_micros(us)));
        let failed: u64 = self.failed.values().sum();
        let kinds: Vec<_> = self.failed.iter().map(|(kind, count)| format!("{kind} {count}")).collect();
        let kinds = if kinds.is_empty() { String::new() } else { format!(" ({})", kinds.join(", ")) };
        format!(
            "{} calls: {} ok, {failed} failed{kinds}\np50 {}, p99 {}, {:.0} calls/s",
            self.calls,
            self.latencies.len(),
            shown(0.5),
            shown(0.99),
            self.calls_per_second()
        )
    }
}

/// What failed calls are counted by.
fn kind(error: &CallError<Value>) -> &'static str {
    match error {
        CallError::Service(_) => "SERVICE_ERROR",
        CallError::Failed(error) => error.code().name(),
    }
}

#[cfg(test)]
mod tests {
    use hopline::{Code, Error, Fault};

    use super::*;

    #[test]
    fn calls_are_summed_up_by_how_they_ended() {
        let repeating = Repeating { repeat: 6, concurrency: 2 };
        let number = std::cell::Cell::new(0);
        let sums = hopline::blocking::wait(repeating.summed(|| {
            number.set(number.get() + 1);
            std::future::ready(match number.get() {
                1 => Err(CallError::Service(json!("no"))),
                2 | 3 => Err(Error::Fault(Fault::new(Code::NotFound, "x")).into()),
                _ => Ok(()),
            })
        }));
        let told: Value = serde_json::from_str(&sums.as_json()).expect("it is JSON");
        assert_eq!(
            (&told["calls"], &told["ok"], &told["failed"]),
            (&json!(6), &json!(3), &json!({ "NOT_FOUND": 2, "SERVICE_ERROR": 1 }))
        );
        assert!(sums.as_text().starts_with("6 calls: 3 ok, 3 failed (NOT_FOUND 2, SERVICE_ERROR 1)\np50 "));
        assert!(matches!(sums.failed(), Some((3, CallError::Service(_)))));
    }
}
