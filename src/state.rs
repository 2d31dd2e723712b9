//! Whether there is a connection to the broker, and what becomes of it.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use tracing::field::display;
use tracing::{debug, info, warn};

use crate::clock::later;
use crate::error::Error;
use crate::transport::{Transport, pause_before_next};

/// How long nothing more is said of attempts that fail: after the first for the one, and twice as long after each other, up
/// to the other.
const FIRST_SILENCE: Duration = Duration::from_secs(30);
const LONGEST_SILENCE: Duration = Duration::from_secs(600);

/// What the connection of a [`Client`](crate::Client) or of a [`Running`](crate::Running) server is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum State {
    /// There has been no connection yet; why not, if an attempt has failed.
    Connecting {
        /// What the last attempt ended with.
        reason: Option<Arc<str>>,
    },
    /// Calls can be made and are served.
    Ready,
    /// The broker takes nothing for now, being short of memory or disk. What it has not taken
    /// waits, and then ends as [`Error::Blocked`]; replies wait for the end of it, and their callers until their deadline.
    Blocked {
        /// The broker's words.
        reason: Arc<str>,
        /// Since when.
        since: Instant,
    },
    /// Of a server: it is connected, and something keeps it from serving all that it should, such as a queue that cannot be
    /// consumed or a permission that is missing. It serves what it can, and what is wrong is tried again for as long as it
    /// takes. Of a client: it is connected, and for more than 5 s the broker has not confirmed what it was sent, or some of
    /// it, as when a queue has lost its node. What else is called is sent as ever.
    Degraded {
        /// What is wrong, and what helps; of several things, the one that has been wrong for the longest time.
        reason: Arc<str>,
        /// Since when.
        since: Instant,
    },
    /// The connection was lost, and is being made again, for as long as it takes. Calls wait until their deadline.
    Reconnecting {
        /// Which attempt is under way, or was the last, from 1.
        attempt: u32,
        /// Since when there is no connection.
        since: Instant,
        /// What ended the connection, or the last attempt.
        reason: Arc<str>,
    },
    /// Closed by this program, or ended with the runtime in which it was begun; nothing follows.
    Closed,
}

impl State {
    /// Why there is no connection, if there is none.
    pub(crate) fn missing(&self) -> Option<Arc<str>> {
        match self {
            Self::Ready | Self::Blocked { .. } | Self::Degraded { .. } => None,
            Self::Connecting { reason } => Some(reason.clone().unwrap_or_else(|| "not connected yet".into())),
            Self::Reconnecting { reason, .. } => Some(reason.clone()),
            Self::Closed => Some("it was closed".into()),
        }
    }
}

/// Attempts to connect, told to whoever watches the state.
#[derive(Debug)]
pub(crate) struct Attempts {
    state: Arc<watch::Sender<State>>,
    /// What the connection is called.
    name: String,
    since: Instant,
    /// What ended the connection, if there has been one.
    lost: Option<Arc<str>>,
    /// What ended it, or the last attempt.
    reason: Option<Arc<str>>,
    number: u32,
    /// Until when nothing is said of attempts that fail, and for how long then.
    silent_until: Instant,
    silence: Duration,
}

impl Attempts {
    /// For the connection called `name`. `reason` is what ended it; none if there has not been one.
    pub(crate) fn new(state: Arc<watch::Sender<State>>, name: String, reason: Option<Arc<str>>) -> Self {
        let (since, lost) = (Instant::now(), reason.clone());
        let mut attempts =
            Self { state, name, since, lost, reason, number: 1, silent_until: since, silence: FIRST_SILENCE };
        attempts.tell();
        attempts
    }

    /// Waits before the next attempt, for a time that grows.
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

    /// Whether an attempt that fails now is worth a warning: hundreds of an outage say no more than some of them.
    fn is_news(&mut self) -> bool {
        let now = Instant::now();
        let is_news = self.silent_until <= now;
        if is_news {
            self.silent_until = later(now, self.silence);
            self.silence = (self.silence * 2).min(LONGEST_SILENCE);
        }
        is_news
    }

    /// There is a connection, which is `transport`.
    pub(crate) fn succeeded(&self, transport: &Transport) {
        let (name, broker, attempts, after) =
            (&self.name, transport.broker().map(display), self.number, self.since.elapsed());
        match &self.lost {
            Some(reason) => info!(name, broker, attempts, ?after, was = %reason, "connected again"),
            None => info!(name, broker, attempts, ?after, "connected"),
        }
    }

    fn tell(&mut self) {
        let reason = self.reason.clone();
        let new = match (&self.lost, reason) {
            (Some(_), Some(reason)) => State::Reconnecting { attempt: self.number, since: self.since, reason },
            (_, reason) => State::Connecting { reason },
        };
        self.state.send_if_modified(|state| enter(state, new));
    }
}

/// Resolves when the broker has taken nothing for so long.
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

/// Replaces a state, unless it is final; tells whether it has changed.
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
        // At the first attempt, and after 30 s and 1, 2, 4, 8 and 10 minutes, or some seconds more, the last of these again
        // and again.
        assert!((135..150).contains(&until(Duration::from_secs(24 * 3600)).await));
    }
}
