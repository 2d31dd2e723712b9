//! What the system says of this process, and of the machine that it runs on.

use std::time::Duration;

use crate::clock::unix_millis;

/// What an instance tells of its process, and what does not change while it runs.
#[derive(Debug)]
pub(super) struct ProcessFacts {
    /// The name of the machine. Empty if the system does not tell.
    pub(super) host: String,
    /// When the instance started, in milliseconds since 1970.
    pub(super) started_at_ms: u64,
}

impl ProcessFacts {
    /// Of an instance that starts now.
    pub(super) fn now() -> Self {
        Self { host: host(), started_at_ms: unix_millis() }
    }
}

#[cfg(unix)]
fn host() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

#[cfg(not(unix))]
fn host() -> String {
    std::env::var("COMPUTERNAME").unwrap_or_default()
}

/// User and system time of this process since it began, where the system tells it.
#[cfg(unix)]
pub(super) fn cpu_time() -> Option<Duration> {
    use rustix::time::{ClockId, clock_gettime};

    Duration::try_from(clock_gettime(ClockId::ProcessCPUTime)).ok()
}

/// User and system time of this process since it began, where the system tells it.
#[cfg(not(unix))]
pub(super) fn cpu_time() -> Option<Duration> {
    None
}

/// The resident memory of this process in bytes, where the system tells it as Linux does.
pub(super) fn memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let kibibytes = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    kibibytes.trim().strip_suffix(" kB")?.parse::<u64>().ok().map(|kibibytes| kibibytes * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(target_os = "linux")]
    #[test]
    fn linux_tells_all_of_it() {
        let facts = ProcessFacts::now();
        let name = std::fs::read_to_string("/proc/sys/kernel/hostname").expect("there is a name");
        assert_eq!(facts.host, name.trim());
        assert!(facts.started_at_ms > 0);
        assert!(cpu_time().is_some_and(|time| time > Duration::ZERO));
        assert!(memory().is_some_and(|bytes| bytes > 100_000), "{:?}", memory());
    }
}
