//! This process: the end of its input, and the CPU time that it has used.

use std::io::{self, Read};
use std::time::Duration;

use tokio::sync::oneshot;

/// Resolves when the standard input ends.
pub(super) async fn input_ended() {
    let (ended, end) = oneshot::channel();
    // It is a thread of its own: one of tokio's would keep the runtime alive until the input ends.
    std::thread::spawn(move || {
        let mut input = io::stdin().lock();
        let mut read = [0; 64];
        while input.read(&mut read).is_ok_and(|bytes| bytes > 0) {}
        ended.send(())
    });
    let _ = end.await;
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
