//! The thread on which a connection's tasks run, so that a frame crosses threads as seldom as possible.

use std::io;

use tokio::runtime::{Builder, Handle};
use tokio_util::sync::{CancellationToken, DropGuard};

/// A thread with a runtime. It ends, with what still runs there, when this is dropped.
#[derive(Debug)]
pub(super) struct IoThread {
    pub(super) runtime: Handle,
    _stop: DropGuard,
}

impl IoThread {
    pub(super) fn start() -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let stop = CancellationToken::new();
        let (handle, stopped) = (runtime.handle().clone(), stop.clone());
        std::thread::Builder::new()
            .name("hopline-io".to_owned())
            .spawn(move || runtime.block_on(stopped.cancelled_owned()))?;
        Ok(Self { runtime: handle, _stop: stop.drop_guard() })
    }
}
