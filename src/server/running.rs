//! A running server, until it is drained or dropped.

use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::Site;
use super::signals::Signals;
use crate::document::LifeState;
use crate::state::{State, blocked_for};
use crate::topology::Binding;

/// How long a drain waits for declarations that are going on.
const DECLARED: Duration = Duration::from_secs(3);
/// How long a drain waits for a broker that accepts no messages.
const BLOCKED_DRAIN: Duration = Duration::from_secs(10);

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

    /// The state of the server, now and from now on: whether there is a connection and all queues are consumed.
    #[must_use]
    pub fn state(&self) -> watch::Receiver<State> {
        self.site.health.state.subscribe()
    }

    /// Serves until the process is told to end, by SIGINT (Ctrl-C) or SIGTERM, or by Ctrl-C on systems without signals.
    /// Then it [drains](Self::drain). A second signal ends the drain, and calls that still run are cut off. From when
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
        signals.next().await;
        tokio::select! {
            () = self.drain() => {}
            () = signals.next() => warn!(name = &*name, "a second signal: the drain is broken off"),
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
        let (site, name, begun) = (&self.site, &*self.site.name, Instant::now());
        let (running, before) = site.tally();
        info!(name, running, "draining");
        tokio::select! {
            () = self.finish() => {}
            () = self.ended.cancelled() => debug!(name, "the server has ended with its runtime"),
        }
        let (after, given_back) = (begun.elapsed(), site.given_back().len());
        let (cut_off, finished) = site.tally();
        let ended = finished - before;
        if cut_off == 0 {
            info!(name, ?after, ended, given_back, "drained");
        } else {
            warn!(name, ?after, ended, given_back, cut_off, "drained, but what still ran is cut off");
        }
    }

    /// The drain itself.
    async fn finish(&self) {
        let site = &self.site;
        site.draining.cancel();
        site.shared.close();
        let takes_no_calls = async {
            // A declaration that is going on would bind again what is unbound here, so this waits for it. It does not
            // wait for ever, since the broker may be asked about a queue whose node is down.
            let _ = tokio::time::timeout(DECLARED, site.declaring.write()).await;
            self.unbind(|binding| site.is_presence(binding)).await;
            site.shared.wait().await;
        };
        self.unless_blocked(takes_no_calls).await;
        // Calls to this instance send signs of life until `drained`. Their cancels arrive in its own queues.
        site.addressed.close();
        self.unless_blocked(site.addressed.wait()).await;
        // From here on the broker tells callers of this instance that it is not there.
        self.unbind(|_| true).await;
        site.drained.cancel();
        site.own.close();
        self.unless_blocked(site.own.wait()).await;
        site.tell(LifeState::Down).await;
        site.transport().close().await;
        site.health.enter(State::Closed);
    }

    /// Deletes those bindings of this instance's own queues for which `meant` is true.
    async fn unbind(&self, meant: impl Fn(&Binding) -> bool) {
        let bindings: Vec<_> = self.site.topology().own_bindings().into_iter().filter(meant).collect();
        if let Err(error) = self.site.transport().unbind(&bindings).await {
            debug!(name = &*self.site.name, %error, "the instance's queues stay bound until they are gone");
        }
    }

    /// Waits for something that a blocked broker could hold up. If the broker is blocked, this does not wait for long.
    async fn unless_blocked(&self, waiting: impl Future<Output = ()>) {
        tokio::select! {
            () = waiting => {}
            () = blocked_for(self.state(), BLOCKED_DRAIN) => {
                warn!(name = &*self.site.name, "a drain ends early: the broker has taken nothing for {BLOCKED_DRAIN:?}");
            }
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
