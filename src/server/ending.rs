//! The drain of a server, whoever wants it: it happens once, and everybody waits for the same end.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::Site;
use crate::document::LifeState;
use crate::state::{State, blocked_for};
use crate::topology::Binding;

/// How long a drain waits for declarations that are going on.
const DECLARED: Duration = Duration::from_secs(3);
/// How long a drain waits for a broker that accepts no messages.
const BLOCKED_DRAIN: Duration = Duration::from_secs(10);

impl Site {
    /// Drains, or waits for the drain that goes on.
    pub(super) async fn drain(self: &Arc<Self>) {
        self.end.get_or_init(|| self.drain_and_tell()).await;
    }

    async fn drain_and_tell(&self) {
        let (name, begun) = (&*self.name, Instant::now());
        let (running, before) = self.tally();
        info!(name, running, "draining");
        self.finish().await;
        let (after, given_back) = (begun.elapsed(), self.given_back().len());
        let (cut_off, finished) = self.tally();
        let ended = finished - before;
        if cut_off == 0 {
            info!(name, ?after, ended, given_back, "drained");
        } else {
            warn!(name, ?after, ended, given_back, cut_off, "drained, but what still ran is cut off");
        }
    }

    /// The drain itself.
    async fn finish(&self) {
        self.draining.cancel();
        self.shared.close();
        let takes_no_calls = async {
            // A declaration that is going on would bind again what is unbound here, so this waits for it. It does not
            // wait for ever, since the broker may be asked about a queue whose node is down.
            let _ = tokio::time::timeout(DECLARED, self.declaring.write()).await;
            self.unbind(|binding| self.is_presence(binding)).await;
            self.shared.wait().await;
        };
        self.unless_blocked(takes_no_calls).await;
        // Calls to this instance send signs of life until `drained`. Their cancels arrive in its own queues.
        self.addressed.close();
        self.unless_blocked(self.addressed.wait()).await;
        // From here on the broker tells callers of this instance that it is not there.
        self.unbind(|_| true).await;
        self.drained.cancel();
        self.own.close();
        self.unless_blocked(self.own.wait()).await;
        self.tell(LifeState::Down).await;
        self.transport().close().await;
        self.health.enter(State::Closed);
    }

    /// Deletes those bindings of this instance's own queues for which `meant` is true.
    async fn unbind(&self, meant: impl Fn(&Binding) -> bool) {
        let bindings: Vec<_> = self.topology().own_bindings().into_iter().filter(meant).collect();
        if let Err(error) = self.transport().unbind(&bindings).await {
            debug!(name = &*self.name, %error, "the instance's queues stay bound until they are gone");
        }
    }

    /// Waits for something that a blocked broker could hold up. If the broker is blocked, this does not wait for long.
    async fn unless_blocked(&self, waiting: impl Future<Output = ()>) {
        tokio::select! {
            () = waiting => {}
            () = blocked_for(self.health.state.subscribe(), BLOCKED_DRAIN) => {
                warn!(name = &*self.name, "a drain ends early: the broker has taken nothing for {BLOCKED_DRAIN:?}");
            }
        }
    }
}
