//! What a server's state says: whether it is connected, and what is wrong though it is.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use tracing::{info, warn};

use super::message::Source;
use crate::state::{State, enter};

/// How long the broker may take over an answer before the state says so.
const PATIENCE: Duration = Duration::from_secs(3);

/// Something that keeps a connected server from serving all that it should.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Trouble {
    /// A queue is not consumed, of the service or subscription in this place.
    Queue(usize, Source),
    /// Exchanges that lead to its queues cannot be declared again.
    Exchanges,
    /// Dead letters of a service have no queue that takes them.
    DeadLetters(Arc<str>),
    /// The broker does not let this user reply.
    Replies,
    /// The broker has taken back what was not settled in time, of this queue.
    TakenBack(Arc<str>),
}

/// What is wrong, since when, and until when it is told if it does not come again.
#[derive(Debug)]
struct Noted {
    since: Instant,
    reason: Arc<str>,
    until: Option<Instant>,
}

#[derive(Debug, Default)]
struct Condition {
    /// Why the broker takes no publications, and since when.
    blocked: Option<(Arc<str>, Instant)>,
    connected: bool,
    troubles: BTreeMap<Trouble, Noted>,
}

/// The condition of a server, and whoever watches it.
#[derive(Debug)]
pub(super) struct Health {
    pub(super) state: Arc<watch::Sender<State>>,
    condition: Mutex<Condition>,
    /// What the server is called in the log.
    name: Arc<str>,
}

impl Health {
    pub(super) fn new(name: Arc<str>) -> Self {
        let state = Arc::new(watch::channel(State::Connecting { reason: None }).0);
        Self { state, condition: Mutex::default(), name }
    }

    /// There is a connection; what was wrong with the last one is no more.
    pub(super) fn connected(&self) {
        *self.condition() = Condition { connected: true, ..Condition::default() };
    }

    /// There is none: whoever tries to connect tells the state meanwhile.
    pub(super) fn disconnected(&self) {
        self.condition().connected = false;
    }

    /// The broker takes nothing, for this reason; or takes messages again. It may be told twice.
    pub(super) fn blocked(&self, reason: Option<Arc<str>>) {
        let mut condition = self.condition();
        let since = condition.blocked.as_ref().map_or_else(Instant::now, |(_, since)| *since);
        condition.blocked = reason.map(|reason| (reason, since));
        drop(condition);
        self.tell();
    }

    /// Something is wrong, until it is [`cured`](Self::cured). Says so in the log when it is new.
    pub(super) fn suffers(&self, trouble: Trouble, reason: impl Into<Arc<str>>) {
        self.note(trouble, reason.into(), None);
    }

    /// Something went wrong that may come again: it is told for so long.
    pub(super) fn suffered(&self, trouble: Trouble, reason: impl Into<Arc<str>>, told_for: Duration) {
        self.note(trouble, reason.into(), Some(Instant::now() + told_for));
    }

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

    /// Waits for the broker's answer about `what`, such as "the queue `x`", for as long as it takes: what is given up half-way
    /// stays at the broker, and the next attempt would come beside it. When it takes long, the state says so.
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

    pub(super) fn cured(&self, trouble: &Trouble) {
        let Some(cured) = self.condition().troubles.remove(trouble) else { return };
        info!(name = &*self.name, was = %cured.reason, after = ?cured.since.elapsed(), "the server serves it again");
        self.tell();
    }

    /// Forgets what has not come again in its time.
    pub(super) fn look(&self) {
        let now = Instant::now();
        self.condition().troubles.retain(|_, noted| noted.until.is_none_or(|until| until > now));
        self.tell();
    }

    /// Says how it is, unless there is no connection: of several troubles, the one that has been there for the longest time.
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

    pub(super) fn enter(&self, new: State) {
        self.state.send_if_modified(|state| enter(state, new));
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
            waiting.sees_through(&Trouble::Queue(0, Source::Calls), "the queue `books.v1.calls`", answered).await
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
