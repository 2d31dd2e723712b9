//! For programs that are not async: waits for anything of this crate on a thread that has no runtime.
//!
//! ```
//! use hopline::{Client, blocking};
//!
//! # fn example() -> Result<(), hopline::Error> {
//! let client = blocking::wait(Client::connect("amqp://localhost"))?;
//! let sum: i64 = blocking::wait(client.call("calculator.v1", "add", (2, 3)))?;
//! blocking::wait(client.publish("sum.done", &sum).required())?;
//! # Ok(()) }
//! ```

use std::future::IntoFuture;
use std::sync::LazyLock;

use tokio::runtime::{Builder, Runtime};

/// The runtime in which [`wait`] runs everything. It has one thread, which reads and writes for connections that were
/// made in [`wait`], also while nothing waits.
static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| {
    let runtime = Builder::new_multi_thread().worker_threads(1).thread_name("hopline-blocking").enable_all().build();
    runtime.expect("the system gives one thread and one poll descriptor")
});

/// Blocks the calling thread until `operation` is done: a call, a `connect`, a `send`, a `gather`. Returns its result.
///
/// # Panics
/// When a task of a tokio runtime calls it. There, `.await` the operation.
pub fn wait<F: IntoFuture>(operation: F) -> F::Output {
    RUNTIME.block_on(async { operation.await })
}
