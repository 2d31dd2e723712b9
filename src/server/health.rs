//! Health: what the state of a server says. It knows whether there is a connection, and what is wrong although there is
//! one.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use tracing::{info, warn};

#[cfg(feature = "metrics")]
use crate::counting::LinkCounts;
use crate::state::{State, enter};

/// How long the broker may take for an answer until the state says so.
const PATIENCE: Duration = Duration::from_secs(3);

/// A reason why a connected server does not serve everything that it should.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Trouble {
    /// The queue with this number among those of the server is not consumed.
    Queue(usize),
    /// The exchanges for its queues cannot be declared again.
    Exchanges,
    /// The queue of dead letters of this service accepts none.
    DeadLetters(Arc<str>),
    /// The broker does not let this user send replies.
    Replies,
    /// The broker has requeued deliveries of this queue that were not acknowledged in time.
    TakenBack(Arc<str>),
    /// This subscription does not read its stream.
    Replay(Arc<str>),
    /// This service takes no calls for a while, since too many have failed.
    Quarantine(Arc<str>),
}

/// A trouble that was noted.
#[derive(Debug)]
struct Noted {
    /// When it was first noted.
    since: Instant,
    /// The sentence for the state.
    reason: Arc<str>,
    /// Until when the state tells it, for a trouble that happens at one moment. `None` for one that lasts until it is
    /// cured.
    until: Option<Instant>,
}

/// Everything that decides about the state.
#[derive(Debug, Default)]
struct Condition {
    /// The broker's reason for accepting no messages, and since when.
    blocked: Option<(Arc<str>, Instant)>,
    connected: bool,
    troubles: BTreeMap<Trouble, Noted>,
}

/// The condition of a server, and the state that it publishes.
#[derive(Debug)]
pub(super) struct Health {
    pub(super) state: Arc<watch::Sender<State>>,
    condition: Mutex<Condition>,
    /// The server's name in the log.
    name: Arc<str>,
    /// What is counted of the connection.
    #[cfg(feature = "metrics")]
    pub(super) link: LinkCounts,
}

impl Health {
    pub(super) fn new(name: Arc<str>) -> Self {
        let state = Arc::new(watch::channel(State::Connecting { reason: None }).0);
        Self {
            state,
            condition: Mutex::default(),
            name,
            #[cfg(feature = "metrics")]
            link: LinkCounts::default(),
        }
    }

    /// There is a new connection. The troubles of the last one are forgotten.
    pub(super) fn connected(&self) {
        *self.condition() = Condition { connected: true, ..Condition::default() };
    }

    /// There is no connection. Until there is one, the attempts to connect set the state.
    pub(super) fn disconnected(&self) {
        self.condition().connected = false;
        #[cfg(feature = "metrics")]
        self.link.is_lost();
    }

    /// The broker accepts no messages for this reason, or accepts messages again. It may be told twice.
    pub(super) fn blocked(&self, reason: Option<Arc<str>>) {
        let mut condition = self.condition();
        let since = condition.blocked.as_ref().map_or_else(Instant::now, |(_, since)| *since);
        condition.blocked = reason.map(|reason| (reason, since));
        drop(condition);
        self.tell();
    }

    /// Notes a trouble that lasts until it is [`cured`](Self::cured). A new one is logged.
    pub(super) fn suffers(&self, trouble: Trouble, reason: impl Into<Arc<str>>) {
        self.note(trouble, reason.into(), None);
    }

    /// Notes a trouble that happened at this moment. The state tells it for `told_for`.
    pub(super) fn suffered(&self, trouble: Trouble, reason: impl Into<Arc<str>>, told_for: Duration) {
        self.note(trouble, reason.into(), Some(Instant::now() + told_for));
    }

    /// Notes a trouble, and publishes the state.
    fn note(&self, trouble: Trouble, reason: Arc<str>, until: Option<Instant>) {
        let mut condition = self.condition();
        let known = condition.troubles.get(&trouble);
        if known.is_none_or(|known| known.reason != reason) {
            warn!(name = &*self.name, %reason, "the server does not serve all that it should");
        }
        let since = known.map_or_else(Instant::now, |known| known.since);
        condition.troubles.insert(trouble, Noted { since, reason, until });
        drop(condition);
        self.tell();
    }

    /// Waits for the broker's answer about `what`, such as "the queue `x`", without a time-out. A question that is
    /// given up stays at the broker, and the next one would wait beside it. If it takes longer than 3 s, the state says
    /// so.
    pub(super) async fn sees_through<T>(&self, trouble: &Trouble, what: &str, answer: impl Future<Output = T>) -> T {
        let mut answer = pin!(answer);
        tokio::select! {
            biased;
            answer = &mut answer => return answer,
            () = tokio::time::sleep(PATIENCE) => {}
        }
        let why = format!(
            "the broker has not answered for {PATIENCE:?} about {what}, and is waited for: the node that has it may be away, as \
             `rabbitmqctl cluster_status` tells"
        );
        self.suffers(trouble.clone(), why);
        answer.await
    }

    /// A trouble is over.
    pub(super) fn cured(&self, trouble: &Trouble) {
        let Some(cured) = self.condition().troubles.remove(trouble) else { return };
        info!(name = &*self.name, was = %cured.reason, after = ?cured.since.elapsed(), "the server serves it again");
        self.tell();
    }

    /// Forgets troubles that have not happened again in their time.
    pub(super) fn look(&self) {
        let now = Instant::now();
        self.condition().troubles.retain(|_, noted| noted.until.is_none_or(|until| until > now));
        self.tell();
    }

    /// Publishes the state, unless there is no connection. Of several troubles it tells the oldest.
    pub(super) fn tell(&self) {
        let condition = self.condition();
        if !condition.connected {
            return;
        }
        let new = match (&condition.blocked, condition.troubles.values().min_by_key(|noted| noted.since)) {
            (Some((reason, since)), _) => State::Blocked { reason: reason.clone(), since: *since },
            (None, Some(noted)) => State::Degraded { reason: noted.reason.clone(), since: noted.since },
            (None, None) => State::Ready,
        };
        self.enter(new);
    }

    /// Sets the state, unless it is `Closed`.
    pub(super) fn enter(&self, new: State) {
        self.state.send_if_modified(|state| {
            #[cfg(feature = "metrics")]
            self.link.changes(state, &new);
            enter(state, new)
        });
    }

    fn condition(&self) -> MutexGuard<'_, Condition> {
        self.condition.lock().expect("no panic while holding the condition")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_oldest_trouble_is_told_until_it_is_cured_and_an_alarm_before_all() {
        let health = Health::new("books server 1".into());
        let state = || health.state.borrow().clone();
        health.suffers(Trouble::Replies, "not connected yet");
        assert_eq!(state(), State::Connecting { reason: None });
        health.connected();
        health.tell();
        assert_eq!(state(), State::Ready);
        let since = Instant::now();
        health.suffers(Trouble::Replies, "no replies");
        tokio::time::advance(Duration::from_secs(1)).await;
        health.suffers(Trouble::Exchanges, "no exchange");
        let later = Instant::now();
        let degraded = |reason: &str, since| State::Degraded { reason: reason.into(), since };
        assert_eq!(state(), degraded("no replies", since));
        health.blocked(Some("low on memory".into()));
        let blocked = state();
        assert!(matches!(blocked, State::Blocked { .. }));
        tokio::time::advance(Duration::from_secs(1)).await;
        health.blocked(Some("low on memory".into()));
        assert_eq!(state(), blocked, "it is the same alarm");
        health.blocked(None);
        health.cured(&Trouble::Replies);
        assert_eq!(state(), degraded("no exchange", later));
        health.cured(&Trouble::Exchanges);
        assert_eq!(state(), State::Ready);
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_takes_long_is_waited_for_and_the_state_names_what_it_is_about() {
        let health = Arc::new(Health::new("books server 1".into()));
        health.connected();
        let mut state = health.state.subscribe();
        let (answer, answered) = tokio::sync::oneshot::channel();
        let waiting = health.clone();
        let waiting = tokio::spawn(async move {
            waiting.sees_through(&Trouble::Queue(0), "the queue `books.v1.calls`", answered).await
        });
        let degraded = state.wait_for(|state| matches!(state, State::Degraded { .. })).await.expect("it is told");
        let State::Degraded { reason, .. } = degraded.clone() else { unreachable!("it was waited for") };
        assert!(reason.contains("the queue `books.v1.calls`") && reason.contains("cluster_status"), "{reason}");
        tokio::time::advance(Duration::from_secs(3600)).await;
        answer.send(7).expect("it is waited for");
        assert_eq!(waiting.await.expect("no panic"), Ok(7));
    }

    #[tokio::test(start_paused = true)]
    async fn what_went_wrong_once_is_told_for_its_time() {
        let health = Health::new("books server 1".into());
        health.connected();
        let minute = Duration::from_secs(60);
        health.suffered(Trouble::TakenBack("queue".into()), "too slow", minute);
        tokio::time::advance(minute / 2).await;
        health.look();
        assert!(matches!(*health.state.borrow(), State::Degraded { .. }));
        tokio::time::advance(minute / 2).await;
        health.look();
        assert_eq!(*health.state.borrow(), State::Ready);
    }
}
