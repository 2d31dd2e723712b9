//! A running server, until it is drained or dropped.

use std::fmt;
use std::future::Future;
use std::sync::Arc;

use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

#[cfg(feature = "metrics")]
use super::MeasuredServer;
use super::Site;
use super::signals::Signals;
use crate::state::State;

/// A running server. It reconnects whenever the connection is lost. Dropping it closes the connection at once;
/// [`Running::drain`] lets running calls end before.
///
/// ```
/// use hopline::{Context, Fault, Server, Service};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), hopline::Error> {
/// let ping = Service::new("ping", 1).method("ping", |_: Context, (): ()| async { Ok::<_, Fault>("pong") });
/// let running = Server::connect("memory://").await?.serve(ping).start().await?;
/// println!("instance {} is {:?}", running.instance(), *running.state().borrow());
/// running.drain().await;
/// # Ok(()) }
/// ```
#[must_use = "dropping a running server ends it"]
pub struct Running {
    pub(super) site: Arc<Site>,
    runtime: Handle,
    /// Cancelled when the runtime has ended in which the server was started.
    ended: CancellationToken,
}

/// Held by a task as long as its runtime lives and the server is not closed.
struct ServerLife {
    site: Arc<Site>,
    ended: CancellationToken,
}

impl Drop for ServerLife {
    fn drop(&mut self) {
        self.site.draining.cancel();
        self.site.drained.cancel();
        self.site.health.enter(State::Closed);
        self.ended.cancel();
    }
}

impl Running {
    pub(super) fn new(site: Arc<Site>) -> Self {
        let ended = CancellationToken::new();
        let life = ServerLife { site: site.clone(), ended: ended.clone() };
        tokio::spawn(async move {
            // This cannot fail: the sender is in the site, which this task holds.
            let _ = life.site.health.state.subscribe().wait_for(|state| *state == State::Closed).await;
        });
        Self { site, runtime: Handle::current(), ended }
    }

    /// The id of this server on the broker. [`Call::to`](crate::Call::to) accepts it.
    #[must_use]
    pub fn instance(&self) -> &str {
        &self.site.instance
    }

    /// What is counted of it, as long as it runs.
    #[cfg(feature = "metrics")]
    pub(crate) fn measured(&self) -> MeasuredServer {
        MeasuredServer::of(&self.site)
    }

    /// The state of the server, now and from now on: whether there is a connection and all queues are consumed.
    #[must_use]
    pub fn state(&self) -> watch::Receiver<State> {
        self.site.health.state.subscribe()
    }

    /// Serves until the process is told to end, by SIGINT (Ctrl-C) or SIGTERM, or by Ctrl-C on systems without signals,
    /// or until the server is [drained from afar](crate::Server::allow_drain). Then it [drains](Self::drain). A second signal ends the drain, and calls that still run are cut off. From when
    /// this is called, even before it is awaited, these signals do not end the process by themselves, also after it has
    /// returned.
    ///
    /// ```no_run
    /// # use hopline::{Server, Service};
    /// # async fn example(calculator: Service) -> Result<(), hopline::Error> {
    /// let server = Server::connect("amqp://localhost").await?.serve(calculator).start().await?;
    /// let instance = server.instance().to_owned();
    /// // Whoever reads that it is ready may send a signal at once.
    /// let ended = server.run_until_signal();
    /// println!("ready, as {instance}");
    /// ended.await;
    /// # Ok(()) }
    /// ```
    pub fn run_until_signal(self) -> impl Future<Output = ()> + Send {
        let signals = {
            let _entered = self.runtime.enter();
            Signals::listen()
        };
        self.run_until(signals)
    }

    pub(super) async fn run_until(self, mut signals: Signals) {
        let name = self.site.name.clone();
        // From afar it is drained once. After that a signal is the first.
        let is_first = tokio::select! {
            () = signals.next() => false,
            () = self.site.draining.cancelled() => true,
        };
        let broken_off = async {
            if is_first {
                signals.next().await;
            }
            signals.next().await;
        };
        tokio::select! {
            () = self.drain() => {}
            () = broken_off => warn!(name = &*name, "a second signal: the drain is broken off"),
        }
    }

    /// Ends the server without losing a call: it accepts no more calls, lets running ones end and reply, gives back
    /// those that have not begun, and closes.
    ///
    /// A request runs no longer than its caller waits. There is no limit for a request of a method that
    /// [`finishes`](crate::Method::finishes), a oneway call or an event: put a time-out around this if the process must
    /// end.
    ///
    /// A handler may call a service of its own server. If no other instance serves it, that call ends after some
    /// seconds as [`Timeout`](crate::Error::Timeout) with [`Draining`](crate::Unanswered::Draining), so that the drain
    /// does not wait for itself. A call to another server is awaited. If the handlers of two servers call each other,
    /// drain one after the other, or they wait for the deadlines of those calls.
    ///
    /// A drain waits 10 s for a broker that accepts no replies, being short of memory or disk. What is left then is
    /// requeued. It waits 30 s for a queue that does not answer, for example since its nodes are down. Calls that were
    /// given back to that queue are answered `ABORTED` then, since they may run.
    ///
    /// If the connection is lost during a drain, it is not opened again. Handlers run to their end, but their results
    /// are lost. Another instance then runs idempotent and oneway calls again, and answers the others with `ABORTED`.
    ///
    /// If the runtime has ended in which the server was started, there is nothing to drain: what ran there has ended
    /// with it.
    pub async fn drain(self) {
        tokio::select! {
            () = self.site.drain() => {}
            () = self.ended.cancelled() => debug!(name = &*self.site.name, "the server has ended, or its runtime has"),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let (running, _) = self.site.tally();
        if running > 0 && *self.site.health.state.borrow() != State::Closed {
            warn!(name = &*self.site.name, running, "dropped before it had drained: what still runs answers nobody");
        }
        self.site.draining.cancel();
        self.site.drained.cancel();
        self.site.health.enter(State::Closed);
        let transport = self.site.transport();
        self.runtime.spawn(async move { transport.close().await });
    }
}

impl fmt::Debug for Running {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Running").field("instance", &self.instance()).finish_non_exhaustive()
    }
}
