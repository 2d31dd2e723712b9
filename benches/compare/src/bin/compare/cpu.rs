//! The CPU time of the processes that are not the client, as the kernel counts it.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::Context;

/// How much the server and the broker have used until some moment.
pub(crate) struct Reading {
    at: Instant,
    server: Duration,
    broker: Option<Duration>,
}

/// CPU seconds in a second.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Used {
    pub(crate) server: f64,
    pub(crate) broker: Option<f64>,
}

impl Reading {
    pub(crate) fn take(server: u32, broker: Option<u32>) -> anyhow::Result<Self> {
        Ok(Self { at: Instant::now(), server: cpu_time(server)?, broker: broker.map(cpu_time).transpose()? })
    }

    /// What was used from this reading to a later one.
    pub(crate) fn until(&self, later: &Self) -> Used {
        let elapsed = (later.at - self.at).as_secs_f64();
        let used = |before: Duration, after: Duration| after.saturating_sub(before).as_secs_f64() / elapsed;
        Used {
            server: used(self.server, later.server),
            broker: self.broker.zip(later.broker).map(|(before, after)| used(before, after)),
        }
    }
}

/// User and system time of all threads of a process, also of those that have ended.
fn cpu_time(pid: u32) -> anyhow::Result<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).with_context(|| format!("process {pid} has ended"))?;
    let ticks = ticks(&stat).with_context(|| format!("/proc/{pid}/stat cannot be read: {stat}"))?;
    Ok(Duration::from_secs_f64(ticks as f64 / rustix::param::clock_ticks_per_second() as f64))
}

/// The fields 14 and 15, utime and stime. The second one is the name, which may have spaces and brackets in it.
fn ticks(stat: &str) -> Option<u64> {
    let (_, after_name) = stat.rsplit_once(") ")?;
    let mut fields = after_name.split(' ').skip(11);
    let (user, system): (u64, u64) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    Some(user + system)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn user_and_system_time_are_found_behind_a_name_with_brackets() {
        let stat = "42 (a (b) c) S 1 42 42 0 -1 4194560 1 2 3 4 700 50 9 9 20 0 12 0 100 0";
        assert_eq!(ticks(stat), Some(750));
        assert_eq!(ticks("42 (a) S 1"), None);
    }

    #[test]
    fn cpu_time_is_told_by_the_second() {
        let at = Instant::now();
        let [before, after] = [(0, 1, 10), (2, 2, 13)].map(|(seconds, server, broker)| Reading {
            at: at + Duration::from_secs(seconds),
            server: Duration::from_secs(server),
            broker: Some(Duration::from_secs(broker)),
        });
        let used = before.until(&after);
        assert_eq!((used.server, used.broker), (0.5, Some(1.5)));
    }
}
