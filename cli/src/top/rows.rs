//! The numbers of `hopline top`: what instances say, as rows. Nothing here asks or draws.

use std::cmp::Ordering;
use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use hopline::{Histogram, Instance, InstanceStats, MethodStats};

/// The time that a chart shows.
pub(super) const MINUTE: Duration = Duration::from_secs(60);
/// For how long an instance is shown that has not replied. It may have been slow once.
const SHOWN: Duration = Duration::from_secs(3);

/// What rows are sorted by.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Column {
    Name,
    #[default]
    Calls,
    Errors,
    Running,
    P99,
}

impl Column {
    /// The column after this one, and the first after the last.
    pub(super) fn next(self) -> Self {
        match self {
            Self::Name => Self::Calls,
            Self::Calls => Self::Errors,
            Self::Errors => Self::Running,
            Self::Running => Self::P99,
            Self::P99 => Self::Name,
        }
    }

    /// The greatest first, and names in their order.
    fn order(self, (name, one): (&str, &Load), (other_name, other): (&str, &Load)) -> Ordering {
        let rate = |rate: Option<f64>| rate.unwrap_or(-1.0);
        let ordering = match self {
            Self::Name => Ordering::Equal,
            Self::Calls => rate(other.calls_per_s).total_cmp(&rate(one.calls_per_s)),
            Self::Errors => rate(other.errors_per_s).total_cmp(&rate(one.errors_per_s)),
            Self::Running => other.running.cmp(&one.running),
            Self::P99 => other.times.quantile(0.99).cmp(&one.times.quantile(0.99)),
        };
        ordering.then_with(|| name.cmp(other_name))
    }
}

/// How busy something is.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Load {
    /// `None` until an instance has replied twice.
    pub(super) calls_per_s: Option<f64>,
    pub(super) errors_per_s: Option<f64>,
    pub(super) running: u64,
    /// How long the handlers ran of the calls that have ended since the reply before.
    pub(super) times: Histogram,
}

impl Load {
    /// The load of a method between two replies of its instance.
    fn of(method: &MethodStats, before: Option<&MethodStats>, lasted: Option<Duration>) -> Self {
        let load = Self { running: method.running, ..Self::default() };
        let Some(lasted) = lasted else { return load };
        let before = before.cloned().unwrap_or_default();
        Self {
            calls_per_s: Some(rate(method.finished, before.finished, lasted)),
            errors_per_s: Some(rate(method.errors(), before.errors(), lasted)),
            times: since(&method.handler_time, &before.handler_time),
            ..load
        }
    }

    fn add(&mut self, other: &Self) {
        let sum = |one: Option<f64>, other: Option<f64>| match (one, other) {
            (Some(one), Some(other)) => Some(one + other),
            (one, other) => one.or(other),
        };
        self.calls_per_s = sum(self.calls_per_s, other.calls_per_s);
        self.errors_per_s = sum(self.errors_per_s, other.errors_per_s);
        self.running = self.running.saturating_add(other.running);
        self.times = self.times.with(&other.times);
    }
}

/// How much a number grows in a second.
fn rate(now: u64, before: u64, lasted: Duration) -> f64 {
    now.saturating_sub(before) as f64 / lasted.as_secs_f64()
}

/// What was counted after `before`.
fn since(times: &Histogram, before: &Histogram) -> Histogram {
    let mut since = Histogram::default();
    since.count = times.count.saturating_sub(before.count);
    since.sum_micros = times.sum_micros.saturating_sub(before.sum_micros);
    let earlier = |bucket: usize| before.buckets.get(bucket).copied().unwrap_or_default();
    let buckets = times.buckets.iter().enumerate();
    since.buckets = buckets.map(|(bucket, count)| count.saturating_sub(earlier(bucket))).collect();
    since
}

#[derive(Debug, PartialEq)]
pub(super) struct ServiceRow {
    pub(super) service: String,
    pub(super) instances: usize,
    pub(super) load: Load,
}

#[derive(Debug, PartialEq)]
pub(super) struct MethodRow {
    pub(super) method: String,
    pub(super) load: Load,
}

#[derive(Debug, PartialEq)]
pub(super) struct InstanceRow {
    pub(super) instance: String,
    /// What it says of itself, once it has been asked.
    pub(super) info: Option<Instance>,
    pub(super) load: Load,
    /// How much of a processor its process takes: 1 is all of one.
    pub(super) cpu: Option<f64>,
    pub(super) memory: Option<u64>,
}

/// What an instance said last.
struct Heard {
    at: Instant,
    stats: InstanceStats,
    methods: BTreeMap<String, Load>,
    cpu: Option<f64>,
}

impl Heard {
    fn new(stats: InstanceStats, at: Instant, before: Option<&Self>) -> Self {
        let lasted = before.map(|before| at - before.at).filter(|lasted| !lasted.is_zero());
        let earlier = |name: &str| before?.stats.methods.iter().find(|method| method.name == name);
        let load = |method: &MethodStats| (method.name.clone(), Load::of(method, earlier(&method.name), lasted));
        let methods = stats.methods.iter().map(load).collect();
        let cpu = before.and_then(|before| {
            let used = stats.cpu_micros?.saturating_sub(before.stats.cpu_micros?);
            Some(Duration::from_micros(used).as_secs_f64() / lasted?.as_secs_f64())
        });
        Self { at, stats, methods, cpu }
    }

    fn load(&self) -> Load {
        let mut load = Load::default();
        self.methods.values().for_each(|method| load.add(method));
        load
    }
}

/// A service and an instance of it.
type Name = (String, String);

/// What all instances have said.
#[derive(Default)]
pub(super) struct Numbers {
    heard: BTreeMap<Name, Heard>,
    infos: BTreeMap<Name, Instance>,
    /// The calls per second of each service, in the last minute.
    minutes: BTreeMap<String, VecDeque<(Instant, f64)>>,
    /// When the instances replied last.
    pub(super) at: Option<Instant>,
}

impl Numbers {
    /// Takes what the instances have counted until `at`.
    pub(super) fn count(&mut self, stats: Vec<InstanceStats>, at: Instant) {
        for stats in stats {
            let name = (stats.service.clone(), stats.instance.clone());
            let heard = Heard::new(stats, at, self.heard.get(&name));
            self.heard.insert(name, heard);
        }
        self.heard.retain(|_, heard| at - heard.at < MINUTE);
        self.infos.retain(|name, _| self.heard.contains_key(name));
        self.at = Some(at);
        for ServiceRow { service, load, .. } in self.services(Column::Name) {
            if let Some(calls_per_s) = load.calls_per_s {
                self.minutes.entry(service).or_default().push_back((at, calls_per_s));
            }
        }
        self.minutes.retain(|_, minute| {
            minute.retain(|(then, _)| at - *then < MINUTE);
            !minute.is_empty()
        });
    }

    /// Takes what instances say of themselves.
    pub(super) fn know(&mut self, infos: Vec<Instance>) {
        self.infos.extend(infos.into_iter().map(|info| ((info.service.clone(), info.instance.clone()), info)));
    }

    fn shown(&self) -> impl Iterator<Item = (&Name, &Heard)> {
        self.heard.iter().filter(|(_, heard)| self.at.is_some_and(|at| at - heard.at < SHOWN))
    }

    pub(super) fn services(&self, by: Column) -> Vec<ServiceRow> {
        let mut services = BTreeMap::<_, (usize, Load)>::new();
        for ((service, _), heard) in self.shown() {
            let (instances, load) = services.entry(service).or_default();
            *instances += 1;
            load.add(&heard.load());
        }
        let row = |(service, (instances, load)): (&String, _)| ServiceRow { service: service.clone(), instances, load };
        let mut rows: Vec<_> = services.into_iter().map(row).collect();
        rows.sort_by(|a, b| by.order((&a.service, &a.load), (&b.service, &b.load)));
        rows
    }

    pub(super) fn methods(&self, service: &str, by: Column) -> Vec<MethodRow> {
        let mut methods = BTreeMap::<_, Load>::new();
        for (_, heard) in self.shown().filter(|((name, _), _)| name == service) {
            for (method, load) in &heard.methods {
                methods.entry(method.clone()).or_default().add(load);
            }
        }
        let mut rows: Vec<_> = methods.into_iter().map(|(method, load)| MethodRow { method, load }).collect();
        rows.sort_by(|a, b| by.order((&a.method, &a.load), (&b.method, &b.load)));
        rows
    }

    pub(super) fn instances(&self, service: &str, by: Column) -> Vec<InstanceRow> {
        let of_it = self.shown().filter(|((name, _), _)| name == service);
        let row = |(name, heard): (&Name, &Heard)| InstanceRow {
            instance: name.1.clone(),
            info: self.infos.get(name).cloned(),
            load: heard.load(),
            cpu: heard.cpu,
            memory: heard.stats.memory_bytes,
        };
        let mut rows: Vec<_> = of_it.map(row).collect();
        rows.sort_by(|a, b| by.order((&a.instance, &a.load), (&b.instance, &b.load)));
        rows
    }

    /// The calls per second of a service in the last minute, at so many points. `None` where they are not known.
    pub(super) fn minute(&self, service: &str, points: usize) -> Vec<Option<f64>> {
        let mut minute = vec![None; points];
        let (Some(at), Some(known)) = (self.at, self.minutes.get(service)) else { return minute };
        for (then, calls_per_s) in known {
            let share = 1.0 - (at - *then).as_secs_f64() / MINUTE.as_secs_f64();
            let point = (share * points as f64).ceil() as usize;
            if let Some(point) = minute.get_mut(point.saturating_sub(1)) {
                *point = Some(point.map_or(*calls_per_s, |known: f64| known.max(*calls_per_s)));
            }
        }
        // Rounds of questions are a little more than a second apart.
        let known = minute.clone();
        for point in 1..points {
            minute[point] = known[point].or(known[point - 1]);
        }
        minute
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// What an instance has counted: calls that have ended of the method `add`, which took up to 1 ms each, and errors.
    pub(crate) fn stats(service: &str, instance: &str, finished: u64, errors: u64) -> InstanceStats {
        let mut add = MethodStats::default();
        (add.name, add.finished, add.service_errors, add.running) = ("add".to_owned(), finished, errors, 1);
        add.handler_time.buckets = vec![0, 0, 0, finished];
        let mut stats = InstanceStats::default();
        (stats.service, stats.instance, stats.finished) = (service.to_owned(), instance.to_owned(), finished);
        (stats.cpu_micros, stats.memory_bytes) = (Some(finished * 1000), Some(5 << 20));
        stats.methods = vec![add];
        stats
    }

    #[test]
    fn rates_are_what_has_ended_between_two_replies() {
        let (mut numbers, began) = (Numbers::default(), Instant::now());
        numbers.count(vec![stats("a.v1", "1", 1_000, 7)], began);
        let first = &numbers.services(Column::Calls)[0];
        assert_eq!((first.load.calls_per_s, first.load.running), (None, 1));
        numbers.count(vec![stats("a.v1", "1", 1_100, 9), stats("a.v1", "2", 50, 0)], began + Duration::from_secs(2));
        let row = &numbers.services(Column::Calls)[0];
        assert_eq!((row.instances, row.load.calls_per_s, row.load.errors_per_s), (2, Some(50.0), Some(1.0)));
        assert_eq!((row.load.running, row.load.times.quantile(0.99)), (2, Some(Duration::from_millis(1))));
        assert_eq!(numbers.methods("a.v1", Column::Name)[0].load, row.load);
        let [one, two] = numbers.instances("a.v1", Column::Name).try_into().expect("there are two");
        assert_eq!((one.cpu, one.memory, one.load.calls_per_s), (Some(0.05), Some(5 << 20), Some(50.0)));
        assert_eq!((two.cpu, two.load.calls_per_s), (None, None), "it has replied once");
    }

    #[test]
    fn times_are_those_of_the_calls_since_the_reply_before() {
        let (mut numbers, began) = (Numbers::default(), Instant::now());
        let mut slow = stats("a.v1", "1", 10, 0);
        numbers.count(vec![slow.clone()], began);
        slow.methods[0].handler_time.buckets.push(1);
        numbers.count(vec![slow.clone()], began + Duration::from_secs(1));
        let p50 = |numbers: &Numbers| numbers.services(Column::Name)[0].load.times.quantile(0.5);
        assert_eq!(p50(&numbers), Some(Histogram::BOUNDS[4]));
        numbers.count(vec![slow], began + Duration::from_secs(2));
        assert_eq!(p50(&numbers), None, "nothing has run since");
    }

    #[test]
    fn an_instance_that_is_slow_once_stays_and_one_that_is_gone_goes() {
        let (mut numbers, began) = (Numbers::default(), Instant::now());
        let (one, two) = (stats("a.v1", "1", 10, 0), stats("a.v1", "2", 10, 0));
        numbers.count(vec![one.clone(), two], began);
        numbers.count(vec![one.clone()], began + Duration::from_secs(1));
        assert_eq!(numbers.instances("a.v1", Column::Name).len(), 2);
        numbers.count(vec![one], began + SHOWN);
        assert_eq!(numbers.instances("a.v1", Column::Name).len(), 1);
        numbers.count(vec![], began + 2 * SHOWN);
        assert!(numbers.services(Column::Name).is_empty());
    }

    #[test]
    fn rows_are_sorted_by_each_column_the_greatest_first() {
        let (mut numbers, began) = (Numbers::default(), Instant::now());
        let all = |calls: [u64; 3]| {
            let [a, b, c] = calls;
            vec![stats("a.v1", "1", a, c), stats("b.v1", "1", b, a), stats("c.v1", "1", c, 0)]
        };
        numbers.count(all([0, 0, 0]), began);
        numbers.count(all([1, 5, 3]), began + Duration::from_secs(1));
        let names = |by| numbers.services(by).into_iter().map(|row| row.service).collect::<Vec<_>>().concat();
        let (mut by, mut all) = (Column::Name, Vec::new());
        for _ in 0..5 {
            all.push(names(by));
            by = by.next();
        }
        assert_eq!(all, ["a.v1b.v1c.v1", "b.v1c.v1a.v1", "a.v1b.v1c.v1", "a.v1b.v1c.v1", "a.v1b.v1c.v1"]);
        assert_eq!(by, Column::Name);
    }

    #[test]
    fn the_last_minute_has_a_point_for_each_part_of_it() {
        let (mut numbers, began) = (Numbers::default(), Instant::now());
        for second in 0..=90 {
            let finished = if second < 60 { 0 } else { (second - 60) * 10 };
            numbers.count(vec![stats("a.v1", "1", finished, 0)], began + Duration::from_secs(second));
        }
        assert_eq!(numbers.minute("a.v1", 4), [Some(0.0), Some(0.0), Some(10.0), Some(10.0)]);
        assert_eq!(numbers.minute("b.v1", 2), [None, None]);
        numbers.count(vec![stats("a.v1", "1", 900, 0)], began + Duration::from_secs(100));
        let after = [Some(10.0), None, None, None, None, None, None, None, None, Some(60.0)];
        assert_eq!(numbers.minute("a.v1", 60)[50..], after, "what is not known is left out");
        assert_eq!(numbers.minutes["a.v1"].len(), 51, "what is older is forgotten");
    }

    #[test]
    fn numbers_that_shrink_or_are_absurd_do_no_harm() {
        let (mut numbers, began) = (Numbers::default(), Instant::now());
        let mut absurd = stats("a.v1", "1", 9, u64::MAX);
        absurd.methods[0].handler_time.buckets = vec![u64::MAX; 100];
        numbers.count(vec![absurd.clone(), absurd], began);
        numbers.count(vec![stats("a.v1", "1", 3, 0)], began);
        numbers.count(vec![stats("a.v1", "1", 0, 0)], began + Duration::from_secs(1));
        assert_eq!(numbers.services(Column::P99)[0].load.calls_per_s, Some(0.0));
        assert_eq!(numbers.minute("a.v1", 0), []);
    }
}
