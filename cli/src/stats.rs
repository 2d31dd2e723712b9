//! `hopline stats`: what the instances of a service have counted.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal as _};
use std::time::Duration;

use clap::Args;
use hopline::{InstanceStats, MethodStats};

use crate::asking::{Asking, nobody, service};
use crate::failed::{Failed, tell};
use crate::printed::{age, bytes, json, one_line, print, quantile, table, time};
use crate::signals::until_told;

/// How often `--watch` asks again.
const PAUSE: Duration = Duration::from_secs(2);

/// Show what the instances of a service have counted since they started.
///
/// The first table has the methods, each of all instances together, and the second one the instances. Exits with 0 when
/// an instance has replied, with 1 and an error on stderr when none has, and with 2 on wrong usage.
#[derive(Args)]
#[command(after_help = "Examples:\n  hopline stats demo\n  hopline stats demo --watch")]
pub(crate) struct Stats {
    /// SERVICE, or SERVICE.vMAJOR for a version other than 1
    #[arg(value_parser = service)]
    service: String,
    /// Ask again every 2 s, until interrupted, which ends it with 0
    #[arg(long)]
    watch: bool,
    #[command(flatten)]
    asking: Asking,
}

impl Stats {
    pub(crate) async fn run(self) -> Result<(), Failed> {
        // The screen is a terminal's.
        let clear = if self.watch && io::stdout().is_terminal() { "\x1b[2J\x1b[H" } else { "" };
        let showing = self.asking.questions.ask(async |registry| {
            loop {
                let stats = match registry.stats(&self.service).await {
                    Ok(stats) if stats.is_empty() => Err(nobody(&registry, &self.service).await),
                    stats => stats.map_err(Failed::from),
                };
                match stats {
                    Ok(stats) => {
                        let shown = if self.asking.json { json(&stats) } else { shown(&stats) };
                        print(&format!("{clear}{shown}"))?;
                    }
                    Err(failed) if self.watch => tell(&failed.to_string()),
                    Err(failed) => return Err(failed),
                }
                if !self.watch {
                    return Ok(());
                }
                tokio::time::sleep(PAUSE).await;
            }
        });
        if self.watch { until_told(showing).await } else { showing.await }
    }
}

fn shown(stats: &[InstanceStats]) -> String {
    let mut methods = BTreeMap::<&str, MethodStats>::new();
    for method in stats.iter().flat_map(|stats| &stats.methods) {
        let sum = methods.entry(&method.name).or_default();
        *sum = sum.with(method);
    }
    let faults = methods.iter().filter_map(|(name, method)| {
        let fault = method.last_fault.as_ref()?;
        Some(one_line(&format!("{name}: {} ago, {}: {}", age(fault.at_ms), fault.code, fault.message)))
    });
    let faults: Vec<_> = faults.collect();
    let head = [
        "METHOD",
        "RUNNING",
        "CALLS",
        "ERRORS",
        "FAULTS",
        "CANCELLED",
        "REFUSED",
        "REDELIVERED",
        "QUEUED P50",
        "P99",
        "RAN P50",
        "P99",
        "IN",
        "OUT",
    ];
    let row = |(name, method): (&&str, &MethodStats)| {
        [
            (*name).to_owned(),
            method.running.to_string(),
            method.finished.to_string(),
            method.service_errors.to_string(),
            method.errors().saturating_sub(method.service_errors).to_string(),
            method.cancelled.to_string(),
            method.refused.to_string(),
            method.redelivered.to_string(),
            quantile(&method.queue_time, 0.5),
            quantile(&method.queue_time, 0.99),
            quantile(&method.handler_time, 0.5),
            quantile(&method.handler_time, 0.99),
            bytes(method.received_bytes),
            bytes(method.returned_bytes),
        ]
    };
    let methods = table(std::iter::once(head.map(str::to_owned)).chain(methods.iter().map(row)).collect());
    let head = ["INSTANCE", "RUNNING", "CALLS", "MALFORMED", "REFUSED", "CPU", "MEMORY"].map(str::to_owned);
    let row = |stats: &InstanceStats| {
        [
            stats.instance.clone(),
            stats.running.to_string(),
            stats.finished.to_string(),
            stats.malformed.to_string(),
            stats.refused.to_string(),
            stats.cpu_micros.map_or_else(|| "-".to_owned(), |micros| time(Duration::from_micros(micros))),
            stats.memory_bytes.map_or_else(|| "-".to_owned(), bytes),
        ]
    };
    let instances = table(std::iter::once(head).chain(stats.iter().map(row)).collect());
    let faults = if faults.is_empty() { String::new() } else { format!("\n\nLAST FAULTS\n{}", faults.join("\n")) };
    format!("{methods}\n\n{instances}{faults}")
}
