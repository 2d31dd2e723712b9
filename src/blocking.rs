//! For programs that are not async: waits for anything of this crate on a thread that has no runtime.
//!
//! ```
//! use hopline::{Client, blocking};
//!
//! # fn example() -> Result<(), hopline::Error> {
//! let client = blocking::wait(Client::connect("amqp://localhost"))?;
//! let sum: i64 = blocking::wait(client.call("calculator.v1", "add", (2, 3)))?;
//! # Ok(()) }
//! ```

use std::future::IntoFuture;
use std::sync::LazyLock;

use tokio::runtime::{Builder, Runtime};

/// Connections made in [`wait`] live here: one thread reads and writes for them between the calls.
static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| {
    let runtime = Builder::new_multi_thread().worker_threads(1).thread_name("hopline-blocking").enable_all().build();
    runtime.expect("the system gives one thread and one poll descriptor")
});

/// Blocks the calling thread until `operation` is done: a call, a `connect`, a `send`, a `gather`.
///
/// # Panics
/// When called where a tokio runtime already runs tasks: `.await` the operation there.
pub fn wait<F: IntoFuture>(operation: F) -> F::Output {
    RUNTIME.block_on(async { operation.await })
}
