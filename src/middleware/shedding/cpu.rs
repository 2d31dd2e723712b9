//! How busy the processors are that this process may use, as Linux tells.

use std::fs;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// How much of a new reading goes into the load: one busy moment is no overload.
const SMOOTHING: f64 = 0.3;

/// The load of the machine, or of the control group if that has a limit, from 0 to 1.
#[derive(Debug, Default)]
pub(super) struct CpuLoad(Mutex<CpuReadings>);

#[derive(Debug, Default)]
struct CpuReadings {
    /// The ticks of all processors, and those in which they had nothing to do.
    machine: Option<(u64, u64)>,
    /// When the control group was asked, and how much time it had used then.
    group: Option<(Instant, Duration)>,
    load: Option<f64>,
}

impl CpuLoad {
    /// The load since it was read before, smoothed. `None` the first time, and on other systems than Linux.
    pub(super) fn read(&self) -> Option<f64> {
        let mut readings = self.0.lock().expect("no panic while holding the readings");
        let machine = fs::read_to_string("/proc/stat").ok().and_then(|text| ticks(&text));
        let used = fs::read_to_string("/sys/fs/cgroup/cpu.stat").ok().and_then(|text| used(&text));
        let group = used.map(|used| (Instant::now(), used));
        let processors = fs::read_to_string("/sys/fs/cgroup/cpu.max").ok().and_then(|text| limit(&text));
        let of_machine = readings.machine.zip(machine).and_then(|(before, now)| share_of_ticks(before, now));
        let of_group = readings.group.zip(group).zip(processors).and_then(|((before, now), processors)| {
            share_of_time(now.1.saturating_sub(before.1), now.0 - before.0, processors)
        });
        (readings.machine, readings.group) = (machine, group);
        let now = of_machine.into_iter().chain(of_group).reduce(f64::max);
        if let Some(now) = now {
            let before = readings.load.unwrap_or(now);
            readings.load = Some(before + SMOOTHING * (now - before));
        }
        readings.load
    }
}

/// All ticks and the idle ones, from `/proc/stat`.
fn ticks(stat: &str) -> Option<(u64, u64)> {
    let first = stat.lines().next()?.strip_prefix("cpu ")?;
    // The time of guests is in that of users already.
    let ticks: Vec<u64> = first.split_whitespace().take(8).map_while(|number| number.parse().ok()).collect();
    let idle = ticks.get(3)? + ticks.get(4)?;
    Some((ticks.iter().sum(), idle))
}

/// How much time a control group has used, from its `cpu.stat`.
fn used(stat: &str) -> Option<Duration> {
    let micros = stat.lines().find_map(|line| line.strip_prefix("usage_usec "))?;
    Some(Duration::from_micros(micros.trim().parse().ok()?))
}

/// How many processors a control group may use, from its `cpu.max`. `None` without a limit.
fn limit(max: &str) -> Option<f64> {
    let (quota, period) = max.trim().split_once(' ')?;
    let (quota, period): (f64, f64) = (quota.parse().ok()?, period.parse().ok()?);
    Some(quota / period).filter(|processors| *processors > 0.0)
}

#[expect(clippy::cast_precision_loss, reason = "ticks of less than a second")]
fn share_of_ticks(before: (u64, u64), now: (u64, u64)) -> Option<f64> {
    let (all, idle) = (now.0.saturating_sub(before.0), now.1.saturating_sub(before.1));
    (all > 0).then(|| 1.0 - idle as f64 / all as f64)
}

fn share_of_time(used: Duration, passed: Duration, processors: f64) -> Option<f64> {
    (!passed.is_zero()).then(|| used.as_secs_f64() / (passed.as_secs_f64() * processors))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_load_is_the_share_of_ticks_in_which_there_was_work() {
        let before = ticks("cpu  100 0 50 800 50 0 0 0 0 0\ncpu0 1 2").expect("it is read");
        let now = ticks("cpu  190 0 50 805 55 0 0 0 0 0\n").expect("it is read");
        assert_eq!((before, now), ((1000, 850), (1100, 860)));
        assert_eq!(share_of_ticks(before, now), Some(0.9));
        assert_eq!((share_of_ticks(now, now), ticks("intr 5")), (None, None));
    }

    #[test]
    fn a_control_group_has_as_much_as_its_limit_says() {
        assert_eq!((limit("150000 100000\n"), limit("max 100000"), limit("")), (Some(1.5), None, None));
        let time = used("usage_usec 1500000\nuser_usec 1").expect("it is read");
        assert_eq!(share_of_time(time, Duration::from_secs(2), 1.5), Some(0.5));
    }
}
