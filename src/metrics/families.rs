//! The metrics by their names, units and labels, as OpenTelemetry's conventions for RPC and Prometheus' rules for names have
//! them, and what goes into them. Here is the only place that has these names.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Unit;

use super::queues::QueueTold;
use crate::client::{CalledMethodTold, ClientCounts};
use crate::counting::{BOUNDS, CallExemplar, LinkCounts, Spread, TimesTold};
use crate::document::Histogram;
use crate::error::{EndOfCall, RefusedBy};
use crate::middleware::BreakerState;
use crate::server::{MeasuredServer, ServiceTold};

/// The labels of a series. None has many values: no ids, instances or keys.
pub(super) type Labels = Vec<(&'static str, String)>;

/// The status of a call. Released versions of the conventions, up to 1.44, call it so; the next one `rpc.status_code`.
const STATUS: &str = "rpc_response_status_code";
const SYSTEM: (&str, &str) = ("rpc_system_name", "hopline");
const METHOD: &str = "rpc_method";
/// The method of calls whose names may come from outside.
const OTHER: &str = "_OTHER";

/// A metric: all series of one name.
#[derive(Debug)]
pub(super) struct Family {
    pub(super) name: &'static str,
    pub(super) help: &'static str,
    pub(super) unit: Option<Unit>,
    pub(super) kind: MetricType,
    pub(super) series: BTreeMap<Labels, SeriesValue>,
}

/// The value of a series.
#[derive(Debug, Clone)]
pub(super) enum SeriesValue {
    /// Of a counter that counts.
    Count(u64),
    /// Of a counter of time, in seconds.
    Seconds(f64),
    /// Of a gauge.
    Level(i64),
    Histogram(HistogramValue),
}

/// The value of a histogram.
#[derive(Debug, Clone)]
pub(super) struct HistogramValue {
    /// The upper bound of each bucket, and how much is in that bucket alone. The last bound is infinite.
    pub(super) buckets: Vec<(f64, u64)>,
    pub(super) sum: f64,
    /// One for each bucket, or none at all.
    pub(super) exemplars: Vec<Option<CallExemplar>>,
}

impl SeriesValue {
    /// Adds what another client or server has counted in the same series.
    fn add(&mut self, other: Self) {
        match (self, other) {
            (Self::Count(sum), Self::Count(more)) => *sum = sum.saturating_add(more),
            (Self::Seconds(sum), Self::Seconds(more)) => *sum += more,
            (Self::Level(sum), Self::Level(more)) => *sum = sum.saturating_add(more),
            (Self::Histogram(sum), Self::Histogram(more)) => {
                for (bucket, (_, count)) in sum.buckets.iter_mut().zip(more.buckets) {
                    bucket.1 = bucket.1.saturating_add(count);
                }
                sum.sum += more.sum;
                for (kept, new) in sum.exemplars.iter_mut().zip(more.exemplars) {
                    *kept = new.or(*kept);
                }
            }
            // A metric has one kind of value.
            (_, _) => {}
        }
    }

    fn times(bounds: &[Duration], told: TimesTold) -> Self {
        let (buckets, sum) = (bucketed(bounds.iter().map(Duration::as_secs_f64), told.buckets), told.sum);
        Self::Histogram(HistogramValue { buckets, sum: sum.as_secs_f64(), exemplars: told.exemplars })
    }

    fn statistics(told: Histogram) -> Self {
        let sum = told.sum().as_secs_f64();
        let buckets = bucketed(Histogram::BOUNDS.iter().map(Duration::as_secs_f64), told.buckets);
        Self::Histogram(HistogramValue { buckets, sum, exemplars: Vec::new() })
    }

    fn spread((buckets, sum): (Vec<u64>, u64)) -> Self {
        let buckets = bucketed(Spread::BOUNDS.iter().map(|bound| *bound as f64), buckets);
        Self::Histogram(HistogramValue { buckets, sum: sum as f64, exemplars: Vec::new() })
    }

    /// Whether it is a histogram without any value.
    fn is_empty(&self) -> bool {
        matches!(self, Self::Histogram(histogram) if histogram.buckets.iter().all(|(_, count)| *count == 0))
    }
}

fn bucketed(bounds: impl Iterator<Item = f64>, counts: Vec<u64>) -> Vec<(f64, u64)> {
    bounds.chain([f64::INFINITY]).zip(counts).collect()
}

/// All metrics. A new one is a field here, a line in `Default` and in `all`, and a row in the guide's table.
#[derive(Debug)]
pub(super) struct Families {
    client_calls: Family,
    attempts: Family,
    retries: Family,
    hedges: Family,
    retry_delay: Family,
    in_flight: Family,
    rejected: Family,
    cache: Family,
    policies: Family,
    breakers: Family,
    server_calls: Family,
    server_rejected: Family,
    active: Family,
    handler: Family,
    queue: Family,
    dead_lettered: Family,
    redelivered: Family,
    cancelled: Family,
    malformed: Family,
    queue_messages: Family,
    queue_consumers: Family,
    message_calls: Family,
    reconnects: Family,
    blocked: Family,
}

impl Default for Families {
    fn default() -> Self {
        use MetricType::{Counter, Gauge, Histogram};
        let family = |kind, name, help| Family { name, help, unit: None, kind, series: BTreeMap::new() };
        let time = |kind, name, help| Family { unit: Some(Unit::Seconds), ..family(kind, name, help) };
        Self {
            client_calls: time(
                Histogram,
                "rpc_client_call_duration",
                "How long calls took, with all their attempts, until their callers knew how they ended",
            ),
            attempts: family(Counter, "hopline_client_attempts", "Attempts of calls that were made, by kind"),
            retries: family(Histogram, "hopline_client_call_retries", "How often calls were retried that were retried"),
            hedges: family(Histogram, "hopline_client_call_hedges", "How many hedges calls had that had any"),
            retry_delay: time(
                Histogram,
                "hopline_client_call_retry_delay",
                "How long calls that were retried have paused between their attempts",
            ),
            in_flight: family(Gauge, "hopline_client_in_flight", "Calls whose callers wait now"),
            rejected: family(
                Counter,
                "hopline_client_rejected",
                "Attempts that the client itself refused to send, by reason",
            ),
            cache: family(
                Counter,
                "hopline_client_cache",
                "Calls that asked the cache for their results, by what it had for them",
            ),
            policies: family(
                Counter,
                "hopline_client_policy_events",
                "What else the policies of a client did, by event",
            ),
            breakers: family(
                Gauge,
                "hopline_breaker_state",
                "How many circuit breakers of the method are in this state: one for calls to any instance, and one for each instance that is called by itself",
            ),
            server_calls: time(
                Histogram,
                "rpc_server_call_duration",
                "How long calls took from their delivery to their end, however they ended",
            ),
            server_rejected: family(
                Counter,
                "hopline_server_rejected",
                "Calls that a server refused to run, by what has refused them",
            ),
            active: family(Gauge, "hopline_server_active", "Calls that run now"),
            handler: time(Histogram, "hopline_server_handler_duration", "How long handlers ran"),
            queue: time(
                Histogram,
                "hopline_server_queue_duration",
                "How much longer calls waited before they ran than the fastest of the same sender in the last minutes",
            ),
            dead_lettered: family(
                Counter,
                "hopline_server_dead_lettered",
                "Messages that were kept with the dead letters, by reason",
            ),
            redelivered: family(Counter, "hopline_server_redelivered", "Calls that the broker has delivered again"),
            cancelled: family(
                Counter,
                "hopline_server_cancelled",
                "Calls for which nobody waited any more, by what was done with them",
            ),
            malformed: family(Counter, "hopline_server_malformed", "Frames that could not be read"),
            queue_messages: family(
                Gauge,
                "hopline_queue_messages",
                "Messages that wait in a queue of the service, by what the queue is for",
            ),
            queue_consumers: family(Gauge, "hopline_queue_consumers", "Consumers of a queue of the service"),
            message_calls: family(Histogram, "hopline_message_calls", "How many frames shared a message"),
            reconnects: family(Counter, "hopline_connection_reconnects", "How often a lost connection was made again"),
            blocked: time(
                Counter,
                "hopline_connection_blocked_duration",
                "For how long the broker took no messages, being short of memory or disk",
            ),
        }
    }
}

impl Family {
    fn add(&mut self, labels: Labels, value: SeriesValue) {
        match self.series.get_mut(&labels) {
            Some(sum) => sum.add(value),
            None => drop(self.series.insert(labels, value)),
        }
    }

    /// Adds the counters of a method, unless all of them are zero, as where a policy is not switched on.
    fn add_used<const N: usize>(&mut self, method: &str, by: &'static str, counts: [(&'static str, u64); N]) {
        if counts.iter().any(|(_, count)| *count > 0) {
            for (what, count) in counts {
                self.add(vec![label(METHOD, method), label(by, what)], SeriesValue::Count(count));
            }
        }
    }
}

fn label(name: &'static str, value: impl Into<String>) -> (&'static str, String) {
    (name, value.into())
}

/// The labels of a call that has ended.
fn of_end(method: &str, end: EndOfCall) -> Labels {
    let mut labels = vec![label(SYSTEM.0, SYSTEM.1), label(METHOD, method), label(STATUS, end.status())];
    labels.extend(end.error_type().map(|error| label("error_type", error)));
    labels
}

impl Families {
    /// All of them that have a series.
    pub(super) fn all(self) -> impl Iterator<Item = Family> {
        let Self { client_calls, attempts, retries, hedges, retry_delay, in_flight, rejected, cache, .. } = self;
        let Self { policies, breakers, server_calls, server_rejected, active, handler, queue, .. } = self;
        let Self { dead_lettered, redelivered, cancelled, malformed, message_calls, reconnects, blocked, .. } = self;
        let at_client =
            [client_calls, attempts, retries, hedges, retry_delay, in_flight, rejected, cache, policies, breakers];
        let at_server = [server_calls, server_rejected, active, handler, queue];
        let Self { queue_messages, queue_consumers, .. } = self;
        let queues = [queue_messages, queue_consumers];
        let others = [dead_lettered, redelivered, cancelled, malformed, message_calls, reconnects, blocked];
        at_client.into_iter().chain(at_server).chain(queues).chain(others).filter(|family| !family.series.is_empty())
    }

    /// Adds what a client has counted.
    pub(super) fn add_client(&mut self, client: &ClientCounts) {
        let methods = client.methods.told();
        let named: BTreeSet<_> = methods.iter().filter_map(|told| told.name.as_ref()).collect();
        for breaker in client.breakers() {
            let name = breaker.method.rsplit_once('.').map(|(service, method)| (service.into(), method.into()));
            self.add_breaker(name.as_ref().filter(|name| named.contains(name)), breaker.state);
        }
        methods.into_iter().for_each(|method| self.add_called(method));
        self.add_link("client", &client.link);
    }

    fn add_called(&mut self, told: CalledMethodTold) {
        let Some((service, method)) = told.name.clone().or_else(|| others(&told)) else { return };
        let is_other = *method == *OTHER;
        let name = if is_other { OTHER.to_owned() } else { format!("{service}/{method}") };
        for (end, times) in told.ends {
            let mut labels = of_end(&name, end);
            if !is_other {
                labels.push(label("server_address", &*service));
            }
            self.client_calls.add(labels, SeriesValue::times(&BOUNDS, times));
        }
        for (kind, count) in told.attempts {
            let labels = vec![label(METHOD, &*name), label("hopline_attempt_kind", kind)];
            self.attempts.add(labels, SeriesValue::Count(count));
        }
        for (reason, count) in told.rejected {
            let labels = vec![label(METHOD, &*name), label("reason", reason)];
            self.rejected.add(labels, SeriesValue::Count(count));
        }
        self.cache.add_used(&name, "result", told.cache);
        self.policies.add_used(&name, "event", told.policies);
        let times = SeriesValue::times(&BOUNDS, TimesTold { exemplars: Vec::new(), ..told.retry_delay });
        let spreads = [
            (&mut self.retries, SeriesValue::spread(told.retries)),
            (&mut self.hedges, SeriesValue::spread(told.hedges)),
            (&mut self.retry_delay, times),
        ];
        for (family, value) in spreads.into_iter().filter(|(_, value)| !value.is_empty()) {
            family.add(vec![label(METHOD, &*name)], value);
        }
        self.in_flight.add(vec![label(METHOD, name)], level(told.in_flight));
    }

    /// Adds a breaker. One of a method without series of its own is counted with the others.
    fn add_breaker(&mut self, name: Option<&(Arc<str>, Arc<str>)>, state: BreakerState) {
        let name = name.map_or_else(|| OTHER.to_owned(), |(service, method)| format!("{service}/{method}"));
        let is = match state {
            BreakerState::Closed => "closed",
            BreakerState::Open(_) => "open",
            BreakerState::HalfOpen => "half_open",
        };
        for state in ["closed", "open", "half_open"] {
            let labels = vec![label(METHOD, &*name), label("state", state)];
            self.breakers.add(labels, level(u64::from(state == is)));
        }
    }

    /// Adds what a server has counted. Returns whether it still runs.
    pub(super) fn add_server(&mut self, server: &MeasuredServer) -> bool {
        let Some(services) = server.told(|link| self.add_link("server", link)) else { return false };
        services.into_iter().for_each(|service| self.add_service(service));
        true
    }

    fn add_service(&mut self, told: ServiceTold) {
        let service = &*told.name;
        for method in told.methods {
            let name = format!("{service}/{}", method.stats.name);
            let labels = || vec![label(METHOD, &*name)];
            for (end, times) in method.ends {
                self.server_calls.add(of_end(&name, end), SeriesValue::times(&BOUNDS, times));
            }
            self.add_rejected(&name, method.refused);
            self.active.add(labels(), level(method.stats.running));
            self.handler.add(labels(), SeriesValue::statistics(method.stats.handler_time));
            self.queue.add(labels(), SeriesValue::times(&BOUNDS, TimesTold { exemplars: Vec::new(), ..method.waits }));
            self.redelivered.add(labels(), SeriesValue::Count(method.stats.redelivered));
            for (reason, count) in [("stopped", method.stats.cancelled), ("not_run", method.stats.expired)] {
                let labels = vec![label(METHOD, &*name), label("reason", reason)];
                self.cancelled.add(labels, SeriesValue::Count(count));
            }
        }
        for (end, times) in told.others {
            self.server_calls.add(of_end(OTHER, end), SeriesValue::times(&BOUNDS, times));
        }
        if told.others_refused.iter().any(|(_, count)| *count > 0) {
            self.add_rejected(OTHER, told.others_refused);
        }
        for (reason, count) in told.letters {
            let labels = vec![label("rpc_service", service), label("reason", reason)];
            self.dead_lettered.add(labels, SeriesValue::Count(count));
        }
        self.malformed.add(vec![label("rpc_service", service)], SeriesValue::Count(told.malformed));
    }

    /// Adds what the broker has told of a queue.
    pub(super) fn add_queue(&mut self, queue: &QueueTold) {
        let QueueTold { service, kind, count } = queue;
        for (family, value) in
            [(&mut self.queue_messages, count.waiting), (&mut self.queue_consumers, count.consumers.into())]
        {
            family.add(vec![label("rpc_service", service.to_string()), label("kind", *kind)], level(value));
        }
    }

    fn add_rejected(&mut self, method: &str, refused: [(&'static str, u64); RefusedBy::ALL.len()]) {
        for (reason, count) in refused {
            self.server_rejected.add(vec![label(METHOD, method), label("reason", reason)], SeriesValue::Count(count));
        }
    }

    fn add_link(&mut self, role: &'static str, link: &LinkCounts) {
        for (direction, spread) in [("sent", &link.sent), ("received", &link.received)] {
            let labels = vec![label("role", role), label("direction", direction)];
            self.message_calls.add(labels, SeriesValue::spread(spread.told()));
        }
        self.reconnects.add(vec![label("role", role)], SeriesValue::Count(link.reconnects()));
        self.blocked.add(vec![label("role", role)], SeriesValue::Seconds(link.blocked_time().as_secs_f64()));
    }
}

/// The name of those methods that have no series of their own, if there are any.
fn others(told: &CalledMethodTold) -> Option<(Arc<str>, Arc<str>)> {
    let is_used = told.attempts.iter().chain(&told.rejected).any(|(_, count)| *count > 0) || !told.ends.is_empty();
    is_used.then(|| (Arc::default(), OTHER.into()))
}

fn level(count: u64) -> SeriesValue {
    SeriesValue::Level(i64::try_from(count).unwrap_or(i64::MAX))
}
