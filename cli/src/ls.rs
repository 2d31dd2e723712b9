//! `hopline ls`: the services, and how busy they are.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use clap::Args;
use hopline::{Histogram, InstanceStats, ServiceId, ServiceQueues};
use serde_json::json;

use crate::asking::{Asking, service};
use crate::failed::{Failed, tell};
use crate::printed::{json, print, quantile, table};

/// For how long calls are counted.
const SAMPLE: Duration = Duration::from_secs(1);

/// List the services, and how busy they are.
///
/// Each instance is asked twice, a second apart: CALLS/S is what ended in between. The other numbers count from the
/// start of the instances. WAITING is how many messages wait in the queues of the service for a reader, and DEAD how
/// many dead letters there are. Where the broker has another number of readers than instances reply, INSTANCES says so: a
/// reader may hang, or have no permission to reply. A service whose instances all hang is told only if it is named: AMQP
/// lists no queues. P50 and P99 say how long handlers ran at most, in half and in 99 % of the calls. In JSON they
/// are `p50_us` and `p99_us`, in microseconds, and null if it was over 10 s or there was no call.
#[derive(Args)]
#[command(after_help = "Examples:\n  hopline ls --url amqp://broker.example.com\n  hopline ls billing mail --json")]
pub(crate) struct Ls {
    /// Services, as SERVICE or SERVICE.vMAJOR: only these, and each of them even if no instance replies [default: all
    /// that reply]
    #[arg(value_parser = service)]
    services: Vec<String>,
    #[command(flatten)]
    asking: Asking,
}

/// What is known of a service, of all its instances together.
#[derive(Default)]
struct Sum {
    instances: usize,
    running: u64,
    finished: u64,
    errors: u64,
    handler_time: Histogram,
    calls_per_s: f64,
    queues: Option<ServiceQueues>,
}

impl Sum {
    /// How many messages wait. `None` if the broker has not said.
    fn waiting(&self) -> Option<u64> {
        let queues = self.queues?;
        Some([queues.calls, queues.oneway].into_iter().flatten().map(|queue| queue.waiting).sum())
    }

    fn dead(&self) -> Option<u64> {
        Some(self.queues?.dead.map_or(0, |dead| dead.waiting))
    }

    /// How many read the queue of calls. `None` if the broker has not said, or there is no such queue.
    fn readers(&self) -> Option<u64> {
        self.queues?.calls.map(|queue| queue.consumers.into())
    }
}

impl Ls {
    pub(crate) async fn run(self) -> Result<(), Failed> {
        let named = self.services.iter().map(|service| Ok(service.parse::<ServiceId>()?.to_string()));
        let named = named.collect::<Result<Vec<_>, hopline::Error>>()?;
        self.asking
            .questions
            .ask(async |registry| {
                let (before, began) = (registry.all_stats().await?, Instant::now());
                tokio::time::sleep(SAMPLE).await;
                let (after, lasted) = (registry.all_stats().await?, began.elapsed());
                let mut sums = summed(&before, &after, lasted);
                if !named.is_empty() {
                    sums.retain(|service, _| named.contains(service));
                    for service in named {
                        sums.entry(service).or_default();
                    }
                }
                for (service, sum) in &mut sums {
                    match registry.queues(service).await {
                        Ok(queues) => sum.queues = Some(queues),
                        Err(error) => tell(&format!("the queues of {service} are not counted: {error}")),
                    }
                }
                if sums.is_empty() {
                    tell(&format!(
                        "no instance replies in the namespace `{}`",
                        self.asking.questions.namespace.namespace
                    ));
                }
                let shown = if self.asking.json { as_json(&sums) } else { as_table(&sums) };
                Ok(print(&shown)?)
            })
            .await
    }
}

/// The services of all instances that have replied at last, each with the sum of its instances.
fn summed(before: &[InstanceStats], after: &[InstanceStats], lasted: Duration) -> BTreeMap<String, Sum> {
    let earlier: BTreeMap<_, _> =
        before.iter().map(|stats| ((&stats.service, &stats.instance), stats.finished)).collect();
    let mut sums = BTreeMap::<_, Sum>::new();
    for stats in after {
        let sum = sums.entry(stats.service.clone()).or_default();
        sum.instances += 1;
        sum.running = sum.running.saturating_add(stats.running);
        sum.finished = sum.finished.saturating_add(stats.finished);
        for method in &stats.methods {
            sum.errors = sum.errors.saturating_add(method.errors());
            sum.handler_time = sum.handler_time.with(&method.handler_time);
        }
        // Of an instance that did not reply before it is not known how many have ended in between.
        let earlier = earlier.get(&(&stats.service, &stats.instance)).copied().unwrap_or(stats.finished);
        sum.calls_per_s += stats.finished.saturating_sub(earlier) as f64 / lasted.as_secs_f64();
    }
    sums
}

fn as_json(sums: &BTreeMap<String, Sum>) -> String {
    let one = |(service, sum): (&String, &Sum)| {
        let known = |share| sum.handler_time.quantile(share).filter(|time| *time < Duration::MAX);
        let micros = |share| known(share).map(|time| time.as_micros() as u64);
        json!({
            "service": service, "instances": sum.instances, "running": sum.running, "finished": sum.finished,
            "errors": sum.errors, "waiting": sum.waiting(), "dead": sum.dead(), "readers": sum.readers(),
            "calls_per_s": sum.calls_per_s, "p50_us": micros(0.5), "p99_us": micros(0.99),
        })
    };
    json(&sums.iter().map(one).collect::<Vec<_>>())
}

fn as_table(sums: &BTreeMap<String, Sum>) -> String {
    let head = ["SERVICE", "INSTANCES", "RUNNING", "WAITING", "DEAD", "CALLS", "ERRORS", "CALLS/S", "P50", "P99"]
        .map(str::to_owned);
    let row = |(service, sum): (&String, &Sum)| {
        [
            service.clone(),
            match sum.readers() {
                Some(readers) if readers != sum.instances as u64 => format!("{} of {readers}", sum.instances),
                _ => sum.instances.to_string(),
            },
            sum.running.to_string(),
            sum.waiting().map_or("?".to_owned(), |waiting| waiting.to_string()),
            sum.dead().map_or("?".to_owned(), |dead| dead.to_string()),
            sum.finished.to_string(),
            sum.errors.to_string(),
            format!("{:.0}", sum.calls_per_s),
            quantile(&sum.handler_time, 0.5),
            quantile(&sum.handler_time, 0.99),
        ]
    };
    table(std::iter::once(head).chain(sums.iter().map(row)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stats(instance: &str, finished: u64) -> InstanceStats {
        let mut stats = InstanceStats::default();
        (stats.service, stats.instance, stats.finished) = ("demo.v1".to_owned(), instance.to_owned(), finished);
        stats
    }

    #[test]
    fn a_service_is_the_sum_of_its_instances_that_are_there_at_last() {
        let (before, after) = ([stats("gone", 900), stats("old", 100)], [stats("new", 10), stats("old", 130)]);
        let sums = summed(&before, &after, Duration::from_secs(2));
        let sum = &sums["demo.v1"];
        assert_eq!((sums.len(), sum.instances, sum.finished, sum.calls_per_s), (1, 2, 140, 15.0));
    }
}
