//! This process: the signals that end it, and the CPU time that it has used.

use std::future::Future;
use std::io::{self, Read};
use std::time::Duration;

use tokio::sync::oneshot;

/// Resolves at SIGINT or SIGTERM.
///
/// # Errors
/// When the system does not let this process hear of them.
#[cfg(unix)]
pub(super) fn told_to_end() -> io::Result<impl Future<Output = ()>> {
    use tokio::signal::unix::{SignalKind, signal};

    let mut interrupted = signal(SignalKind::interrupt())?;
    let mut terminated = signal(SignalKind::terminate())?;
    Ok(async move {
        tokio::select! {
            _ = interrupted.recv() => {}
            _ = terminated.recv() => {}
        }
    })
}

/// Resolves at Ctrl-C.
///
/// # Errors
/// Never.
#[cfg(not(unix))]
pub(super) fn told_to_end() -> io::Result<impl Future<Output = ()>> {
    Ok(async {
        // Where Ctrl-C cannot be heard, the system ends the process by itself.
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending().await
        }
    })
}

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
