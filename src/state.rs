//! The state of a connection to the broker, and the attempts to get one.
//!
//! Clients and servers publish a [`State`] that programs can watch. A client's session and a server's supervisor use
//! [`Attempts`] while they connect.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use tracing::field::display;
use tracing::{debug, info, warn};

use crate::clock::later;
use crate::error::Error;
use crate::transport::{Transport, pause_before_next};

/// How long nothing is logged at `WARN` after the first failed attempt of an outage.
const FIRST_SILENCE: Duration = Duration::from_secs(30);
/// The silence doubles after each warning, up to this.
const LONGEST_SILENCE: Duration = Duration::from_secs(600);

/// What the connection of a [`Client`](crate::Client) or of a [`Running`](crate::Running) server is doing.
///
/// ```
/// use hopline::{Client, State};
///
/// /// What a probe of Kubernetes asks for.
/// fn is_ready(client: &Client) -> bool {
///     matches!(*client.state().borrow(), State::Ready | State::Degraded { .. })
/// }
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum State {
    /// There has been no connection yet.
    Connecting {
        /// Why the last attempt failed. `None` if none has failed yet.
        reason: Option<Arc<str>>,
    },
    /// There is a connection: calls can be made and are served.
    Ready,
    /// The broker is short of memory or disk, and accepts no messages for now.
    ///
    /// Calls that it has not accepted wait, and fail with [`Error::Blocked`] after
    /// [`blocked_wait`](crate::ClientBuilder::blocked_wait). Replies wait until the broker accepts messages again;
    /// their callers wait until their deadlines.
    Blocked {
        /// The reason in the broker's words.
        reason: Arc<str>,
        /// When the broker said so.
        since: Instant,
    },
    /// There is a connection, but a part of the work is not possible.
    ///
    /// A server: it cannot serve everything that it should. For example, a queue cannot be consumed, or a permission is
    /// missing. It serves what it can, and tries the rest again until that works.
    ///
    /// A client: for more than 5 s the broker has not confirmed something that it was sent, for example because a queue
    /// has lost its node. Other calls are sent as usual.
    Degraded {
        /// What is wrong, and what helps. If several things are wrong: the one that has been wrong for the longest
        /// time.
        reason: Arc<str>,
        /// When it went wrong.
        since: Instant,
    },
    /// The connection was lost. It is opened again, however many attempts that takes. Calls wait until their deadlines.
    Reconnecting {
        /// The number of the attempt that is being made, or of the last one. The first is 1.
        attempt: u32,
        /// When the connection was lost.
        since: Instant,
        /// Why the connection was lost, or why the last attempt failed.
        reason: Arc<str>,
    },
    /// This program has closed it, or the runtime in which it was started has ended. This state is final.
    Closed,
}

impl State {
    /// Why there is no connection; `None` if there is one. Errors of calls that could not be sent show this.
    pub(crate) fn missing(&self) -> Option<Arc<str>> {
        match self {
            Self::Ready | Self::Blocked { .. } | Self::Degraded { .. } => None,
            Self::Connecting { reason } => Some(reason.clone().unwrap_or_else(|| "not connected yet".into())),
            Self::Reconnecting { reason, .. } => Some(reason.clone()),
            Self::Closed => Some("it was closed".into()),
        }
    }
}

/// The attempts to open one connection. They tell the state and the log what happens.
#[derive(Debug)]
pub(crate) struct Attempts {
    /// Where whoever watches the client or the server reads the state.
    state: Arc<watch::Sender<State>>,
    /// The connection's name in the log.
    name: String,
    /// When the attempts began.
    since: Instant,
    /// Why the connection was lost before; `None` if there has not been one.
    lost: Option<Arc<str>>,
    /// Why the last attempt failed; before that, the same as `lost`.
    reason: Option<Arc<str>>,
    /// The number of the attempt that is being made, from 1.
    number: u32,
    /// Until when failed attempts are not logged at `WARN`.
    silent_until: Instant,
    /// How long the silence after the next warning is.
    silence: Duration,
}

impl Attempts {
    /// Begins to connect. `name` is the connection's name in the log. `reason` tells why the connection before was
    /// lost; `None` means that there has not been one.
    pub(crate) fn new(state: Arc<watch::Sender<State>>, name: String, reason: Option<Arc<str>>) -> Self {
        let (since, lost) = (Instant::now(), reason.clone());
        let mut attempts =
            Self { state, name, since, lost, reason, number: 1, silent_until: since, silence: FIRST_SILENCE };
        attempts.tell();
        attempts
    }

    /// Waits after an attempt that failed with `error`. The pause grows with the time without a connection.
    pub(crate) async fn after(&mut self, error: &Error) {
        let pause = pause_before_next(self.since);
        let (attempt, after) = (self.number, self.since.elapsed());
        if self.is_news() {
            warn!(name = self.name, attempt, ?after, %error, "no connection to the broker: it is tried again for as long as it takes");
        } else {
            debug!(name = self.name, attempt, ?after, %error, ?pause, "still no connection to the broker");
        }
        self.reason = Some(error.to_string().into());
        self.tell();
        tokio::time::sleep(pause).await;
        self.number = self.number.saturating_add(1);
        self.tell();
    }

    /// Whether an attempt that fails now is worth a warning. In a long outage hundreds of attempts fail, and some
    /// warnings tell as much as all of them.
    fn is_news(&mut self) -> bool {
        let now = Instant::now();
        let is_news = self.silent_until <= now;
        if is_news {
            self.silent_until = later(now, self.silence);
            self.silence = (self.silence * 2).min(LONGEST_SILENCE);
        }
        is_news
    }

    /// Logs that `transport` is connected. The caller sets the state, since more may have to be done before it is
    /// `Ready`.
    pub(crate) fn succeeded(&self, transport: &Transport) {
        let (name, broker, attempts, after) =
            (&self.name, transport.broker().map(display), self.number, self.since.elapsed());
        match &self.lost {
            Some(reason) => info!(name, broker, attempts, ?after, was = %reason, "connected again"),
            None => info!(name, broker, attempts, ?after, "connected"),
        }
    }

    /// Publishes the state of the attempts.
    fn tell(&mut self) {
        let reason = self.reason.clone();
        let new = match (&self.lost, reason) {
            (Some(_), Some(reason)) => State::Reconnecting { attempt: self.number, since: self.since, reason },
            (_, reason) => State::Connecting { reason },
        };
        self.state.send_if_modified(|state| enter(state, new));
    }
}

/// Resolves when the broker has been blocked for `long` without a break. Never resolves if the state can change no
/// more.
pub(crate) async fn blocked_for(mut state: watch::Receiver<State>, long: Duration) {
    loop {
        let blocked = state.wait_for(|state| matches!(state, State::Blocked { .. })).await;
        let Ok(State::Blocked { since, .. }) = blocked.map(|state| state.clone()) else {
            return std::future::pending().await;
        };
        let over = state.wait_for(|state| !matches!(state, State::Blocked { .. }));
        if tokio::time::timeout_at(later(since, long), over).await.is_err() {
            return;
        }
    }
}

/// Replaces `state` by `new`, unless it is `Closed`, which is final. Returns whether it has changed: a watcher is told
/// only then.
pub(crate) fn enter(state: &mut State, new: State) -> bool {
    let changes = *state != State::Closed && *state != new;
    if changes {
        *state = new;
    }
    changes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn an_outage_of_18_s_is_worth_one_warning_and_one_of_a_day_some_more() {
        let state = Arc::new(watch::channel(State::Ready).0);
        let mut attempts = Attempts::new(state, "billing-web client 1".to_owned(), Some("it was cut".into()));
        let mut warnings = 0;
        let mut until = async |time: Duration| {
            while attempts.since.elapsed() < time {
                warnings += u32::from(attempts.is_news());
                tokio::time::sleep(pause_before_next(attempts.since)).await;
            }
            warnings
        };
        assert_eq!(until(Duration::from_secs(18)).await, 1);
        // At the first attempt, after 30 s, after 1, 2, 4 and 8 minutes more, and then every 10 minutes, each time some
        // seconds later.
        assert!((135..150).contains(&until(Duration::from_secs(24 * 3600)).await));
    }
}
