//! Readiness: whether a server takes calls, in a word and with the reason, for probes.

use std::fmt;
use std::sync::Arc;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::Running;
use crate::state::State;

/// Tells how a server is: [`Running::health`]. It can be cloned, and tells it also while the server drains and after its
/// end.
///
/// ```no_run
/// use hopline::{Running, ServerHealth};
///
/// /// The status of a probe by HTTP, and what it says.
/// fn ready(health: &ServerHealth) -> (u16, String) {
///     let now = health.now();
///     (if now.is_ready() { 200 } else { 503 }, now.to_string())
/// }
///
/// async fn serve(running: Running) {
///     let health = running.health();
///     println!("{:?}", ready(&health));
///     running.run_until_signal().await;
///     // (503, "closed")
///     println!("{:?}", ready(&health));
/// }
/// # let _ = serve;
/// ```
#[derive(Clone)]
pub struct ServerHealth {
    state: watch::Receiver<State>,
    draining: CancellationToken,
}

/// How a server is at a moment. As text it is a word, and the reason behind a colon if there is one.
///
/// ```
/// use hopline::{Readiness, Running};
///
/// fn log(server: &Running) {
///     match server.health().now() {
///         Readiness::Ready => println!("all is well"),
///         Readiness::Degraded { reason } => println!("some calls are not served: {reason}"),
///         other => println!("no calls are taken: {other}"),
///     }
/// }
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Readiness {
    /// It takes calls, and all is well.
    Ready,
    /// It takes calls, but not all that it should, or not for long: for example, one of its queues cannot be consumed.
    Degraded {
        /// What is wrong, and what helps.
        reason: Arc<str>,
    },
    /// It takes no calls, or cannot answer them: it has no connection, or the broker accepts no messages. It goes on by
    /// itself when that is over, so there is no use in starting it anew.
    Away {
        /// Why.
        reason: Arc<str>,
    },
    /// It drains: it takes no more calls, and ends when those that run have ended.
    Draining,
    /// It has ended.
    Closed,
}

impl Readiness {
    /// Whether it takes calls: what a readiness probe asks. One that is degraded serves what it can, which is better than
    /// nothing.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        matches!(self, Self::Ready | Self::Degraded { .. })
    }

    /// Why not all is well. `None` if all is, and of a server that drains or has ended, as it was told to.
    #[must_use]
    pub fn reason(&self) -> Option<&str> {
        match self {
            Self::Degraded { reason } | Self::Away { reason } => Some(reason),
            Self::Ready | Self::Draining | Self::Closed => None,
        }
    }
}

impl fmt::Display for Readiness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = match self {
            Self::Ready => "ready",
            Self::Degraded { .. } => "degraded",
            Self::Away { .. } => "away",
            Self::Draining => "draining",
            Self::Closed => "closed",
        };
        match self.reason() {
            Some(reason) => write!(f, "{word}: {reason}"),
            None => f.write_str(word),
        }
    }
}

impl Running {
    /// Tells how this server is, from now on.
    ///
    /// ```
    /// # use hopline::{Context, Fault, Server, Service};
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), hopline::Error> {
    /// # let ping = Service::new("ping", 1).method("ping", |_: Context, (): ()| async { Ok::<_, Fault>("pong") });
    /// let running = Server::connect("memory://").await?.serve(ping).start().await?;
    /// let health = running.health();
    /// assert!(health.now().is_ready());
    /// running.drain().await;
    /// assert_eq!(health.now().to_string(), "closed");
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn health(&self) -> ServerHealth {
        ServerHealth { state: self.state(), draining: self.site.draining.clone() }
    }
}

impl ServerHealth {
    /// How the server is now.
    #[must_use]
    pub fn now(&self) -> Readiness {
        let state = self.state.borrow();
        match &*state {
            State::Closed => Readiness::Closed,
            _ if self.draining.is_cancelled() => Readiness::Draining,
            State::Ready => Readiness::Ready,
            State::Degraded { reason, .. } => Readiness::Degraded { reason: reason.clone() },
            State::Blocked { reason, .. } => {
                Readiness::Away { reason: format!("the broker accepts no messages: {reason}").into() }
            }
            state @ (State::Connecting { .. } | State::Reconnecting { .. }) => {
                Readiness::Away { reason: state.missing().unwrap_or_default() }
            }
        }
    }
}

impl fmt::Debug for ServerHealth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ServerHealth").field(&self.now()).finish()
    }
}
