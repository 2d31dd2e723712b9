//! The signals that tell a process to end: SIGINT and SIGTERM on Unix, Ctrl-C elsewhere.

use std::future::pending;

use tracing::warn;

/// Receives the signals from when it is made.
pub(super) struct Signals(Option<SignalSource>);

#[cfg(unix)]
struct SignalSource {
    interrupted: tokio::signal::unix::Signal,
    terminated: tokio::signal::unix::Signal,
}

#[cfg(not(unix))]
struct SignalSource;

impl Signals {
    /// Begins to receive signals. They do not end the process by themselves any more.
    pub(super) fn listen() -> Self {
        Self(
            SignalSource::new()
                .inspect_err(|error| warn!(%error, "the system does not tell of signals: they end the process"))
                .ok(),
        )
    }

    /// Waits for the next signal. Never resolves if the system does not tell of signals.
    pub(super) async fn next(&mut self) {
        match &mut self.0 {
            Some(source) => source.next().await,
            None => pending().await,
        }
    }
}

#[cfg(unix)]
impl SignalSource {
    fn new() -> std::io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};

        Ok(Self { interrupted: signal(SignalKind::interrupt())?, terminated: signal(SignalKind::terminate())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupted.recv() => {}
            _ = self.terminated.recv() => {}
        }
    }
}

#[cfg(not(unix))]
impl SignalSource {
    fn new() -> std::io::Result<Self> {
        Ok(Self)
    }

    async fn next(&mut self) {
        if tokio::signal::ctrl_c().await.is_err() {
            pending().await
        }
    }
}
