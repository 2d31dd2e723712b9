//! A server that serves, until it is drained or dropped.

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
use super::keeper::bindings;
use super::message::Source;
use super::signals::Signals;
use crate::state::{State, blocked_for};
use crate::topology::Binding;

/// How long a drain waits for what is being declared.
const DECLARED: Duration = Duration::from_secs(3);
/// How long a drain waits for a broker that takes nothing.
const BLOCKED_DRAIN: Duration = Duration::from_secs(10);

/// A server that serves, and connects again whenever it has to. Dropping it closes the connection at once;
/// [`Running::drain`] is the polite way.
#[must_use = "dropping a running server ends it"]
pub struct Running {
    pub(super) site: Arc<Site>,
    runtime: Handle,
    /// Cancelled when the runtime has ended in which the server was started.
    ended: CancellationToken,
}

/// Held by a task for as long as its runtime lives and the server is not closed.
struct Life {
    site: Arc<Site>,
    ended: CancellationToken,
}

impl Drop for Life {
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
        let life = Life { site: site.clone(), ended: ended.clone() };
        tokio::spawn(async move {
            // The sender is in the site, which this holds.
            let _ = life.site.health.state.subscribe().wait_for(|state| *state == State::Closed).await;
        });
        Self { site, runtime: Handle::current(), ended }
    }

    /// The id of this server on the broker.
    #[must_use]
    pub fn instance(&self) -> &str {
        &self.site.instance
    }

    /// Whether there is a connection to the broker and all queues are served, now and from now on.
    #[must_use]
    pub fn state(&self) -> watch::Receiver<State> {
        self.site.health.state.subscribe()
    }

    /// Serves until the process is told to end, by SIGINT (Ctrl-C) or SIGTERM, or by Ctrl-C where there are no signals; then
    /// [drains](Self::drain). A second signal breaks off the drain: what still runs is cut off then. From when this is called,
    /// these signals do not end the process by themselves, also after it has returned.
    ///
    /// ```no_run
    /// # use hopline::{Server, Service};
    /// # async fn example(calculator: Service) -> Result<(), hopline::Error> {
    /// let server = Server::connect("amqp://localhost").await?.serve(calculator).start().await?;
    /// println!("ready, as {}", server.instance());
    /// server.run_until_signal().await;
    /// # Ok(()) }
    /// ```
    pub async fn run_until_signal(self) {
        self.run_until(Signals::listen()).await;
    }

    pub(super) async fn run_until(self, mut signals: Signals) {
        let name = self.site.name.clone();
        signals.next().await;
        tokio::select! {
            () = self.drain() => {}
            () = signals.next() => warn!(name = &*name, "a second signal: the drain is broken off"),
        }
    }

    /// Takes no more calls, lets running ones finish and reply, gives back what has not started, and closes.
    ///
    /// A handler does not wait for a call to a service of this very server that no other instance takes: after some seconds,
    /// that ends as [`Timeout`](crate::Error::Timeout) with [`Draining`](crate::Unanswered::Draining). A call to another
    /// server is waited for: two servers whose handlers call each other drain one after the other, or wait for the
    /// deadlines of those calls.
    ///
    /// A request has at most the time of its caller; one of a method that [`finishes`](crate::Method::finishes), a oneway call
    /// or an event whose handler does not end is waited for without limit, and a process that must end puts a timeout
    /// around this. A broker that takes no answers, being short of memory or disk, is waited for 10 s: what is left then
    /// goes back to the queue. A queue that does not answer, as one whose nodes are away, is waited for 30 s: calls that were
    /// given back to it are ABORTED then, since they may run. A connection that is lost meanwhile is not made again: handlers
    /// finish, but their results are lost. Another instance then runs idempotent and oneway calls again, and answers the
    /// others ABORTED.
    ///
    /// Once the runtime has ended in which the server was started, nothing is left to drain: what ran there has ended with it.
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

    async fn finish(&self) {
        let site = &self.site;
        site.draining.cancel();
        site.shared.close();
        let takes_no_calls = async {
            // What is being declared would bind again what is unbound here; none of it is declared any more. A broker that
            // does not answer is not waited for: it may be asked about a queue whose node is away.
            let _ = tokio::time::timeout(DECLARED, site.declaring.write()).await;
            self.unbind(|binding| site.is_presence(binding)).await;
            site.shared.wait().await;
        };
        self.unless_blocked(takes_no_calls).await;
        // Calls to this instance report in until `drained`, and are cancelled by its own queues.
        site.addressed.close();
        self.unless_blocked(site.addressed.wait()).await;
        // From here on, who calls this instance hears from the broker that it is not there.
        self.unbind(|_| true).await;
        site.drained.cancel();
        site.own.close();
        self.unless_blocked(site.own.wait()).await;
        site.transport().close().await;
        site.health.enter(State::Closed);
    }

    /// Takes away those bindings of this instance's own queues that are meant.
    async fn unbind(&self, meant: impl Fn(&Binding) -> bool) {
        let is_own = |source: &Source| matches!(source, Source::Instance | Source::Events);
        let bindings: Vec<_> = {
            let topology = self.site.topology();
            let declared = topology.lock();
            let own = declared.iter().filter(|((_, source), _)| is_own(source));
            bindings(own.flat_map(|(_, declared)| &declared.parts)).into_iter().filter(meant).collect()
        };
        if let Err(error) = self.site.transport().unbind(&bindings).await {
            debug!(name = &*self.site.name, %error, "the instance's queues stay bound until they are gone");
        }
    }

    /// Waits for what a blocked broker would keep from ending, but not for long then.
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
