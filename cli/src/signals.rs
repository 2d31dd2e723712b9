//! The signals that tell this process to end.

use std::future::Future;
use std::io;

use crate::failed::Failed;

/// Resolves at SIGINT or SIGTERM.
///
/// # Errors
/// When the system does not let this process hear of them.
#[cfg(unix)]
pub(crate) fn told_to_end() -> io::Result<impl Future<Output = ()>> {
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
pub(crate) fn told_to_end() -> io::Result<impl Future<Output = ()>> {
    Ok(async {
        // Where Ctrl-C cannot be heard, the system ends the process by itself.
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending().await
        }
    })
}

/// Shows something until it ends, or until this process is told to end: that is no failure.
///
/// # Errors
/// Why it could not be shown.
pub(crate) async fn until_told(showing: impl Future<Output = Result<(), Failed>>) -> Result<(), Failed> {
    let told = told_to_end().map_err(|error| Failed::at("cannot hear of signals", error))?;
    tokio::select! {
        outcome = showing => outcome,
        () = told => Ok(()),
    }
}
