//! Metrics as text, written by the crate prometheus-client.

use std::fmt;
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, prometheus_text, text};
use prometheus_client::metrics::exemplar::Exemplar;
use prometheus_client::registry::Registry;

use super::families::{Families, Family, SeriesValue};
use crate::counting::CallExemplar;

type NoExemplar<'a> = Option<&'a Exemplar<[(&'static str, String); 0], f64>>;

/// OpenMetrics, with exemplars.
pub(super) fn open_metrics(families: Families) -> String {
    let (registry, exemplars) = registered(families);
    let mut written = String::new();
    // A `String` takes whatever is written to it.
    let _ = text::encode(&mut written, &registry);
    let exemplars = exemplars.lock().unwrap_or_else(PoisonError::into_inner);
    with_exemplars(&written, &exemplars)
}

/// Prometheus' older text format.
pub(super) fn plain(families: Families) -> String {
    let mut written = String::new();
    let _ = prometheus_text::encode(&mut written, &registered(families).0);
    written
}

type Exemplars = Arc<Mutex<Vec<Option<CallExemplar>>>>;

fn registered(families: Families) -> (Registry, Exemplars) {
    let (mut registry, exemplars) = (Registry::default(), Exemplars::default());
    let collected = Collected { families: families.all().collect(), exemplars: exemplars.clone() };
    registry.register_collector(Box::new(collected));
    (registry, exemplars)
}

#[derive(Debug)]
struct Collected {
    families: Vec<Family>,
    /// What each line of a bucket has for an exemplar, in the order in which they were written.
    exemplars: Exemplars,
}

impl Collector for Collected {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        for family in &self.families {
            let (name, help, unit) = (family.name, family.help, family.unit.as_ref());
            let mut described = encoder.encode_descriptor(name, help, unit, family.kind)?;
            for (labels, value) in &family.series {
                self.write(value, described.encode_family(labels)?)?;
            }
        }
        Ok(())
    }
}

impl Collected {
    fn write(&self, value: &SeriesValue, mut metric: MetricEncoder<'_>) -> fmt::Result {
        match value {
            SeriesValue::Count(count) => metric.encode_counter(count, NoExemplar::None),
            SeriesValue::Seconds(seconds) => metric.encode_counter(seconds, NoExemplar::None),
            SeriesValue::Level(level) => metric.encode_gauge(level),
            SeriesValue::Histogram(histogram) => {
                let count = histogram.buckets.iter().map(|(_, count)| count).sum();
                let mut exemplars = self.exemplars.lock().unwrap_or_else(PoisonError::into_inner);
                let of_buckets = histogram.exemplars.iter().copied().chain(std::iter::repeat(None));
                exemplars.extend(of_buckets.take(histogram.buckets.len()));
                let none = None::<&std::collections::HashMap<usize, Exemplar<[(&'static str, String); 0], f64>>>;
                metric.encode_histogram(histogram.sum, count, &histogram.buckets, none)
            }
        }
    }
}

/// Adds exemplars to the lines of buckets, one for each such line or none. The crate writes only those of its own histograms.
fn with_exemplars(written: &str, exemplars: &[Option<CallExemplar>]) -> String {
    if exemplars.iter().all(Option::is_none) {
        return written.to_owned();
    }
    let (mut text, mut exemplars) = (String::with_capacity(written.len() * 2), exemplars.iter());
    for line in written.lines() {
        text.push_str(line);
        let is_bucket = line.split_once('{').is_some_and(|(name, _)| name.ends_with("_bucket") && !name.contains(' '));
        if is_bucket && let Some(Some(exemplar)) = exemplars.next() {
            let CallExemplar { trace, took, at } = exemplar;
            let at = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
            let _ = write!(text, " # {{trace_id=\"{trace:032x}\"}} {} {:.3}", took.as_secs_f64(), at.as_secs_f64());
        }
        text.push('\n');
    }
    text
}
