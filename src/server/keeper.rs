//! Keepers: a keeper is the task that looks after one queue of a server, over one connection.
//!
//! It declares the queue and its bindings, has a worker consume it, and does both again when the queue is deleted or
//! the broker closes its channel. It waits for no other queue. What is wrong, it tells
//! [`Health`](super::health::Health).

use std::future::Future;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

use super::Site;
use super::health::Trouble;
use super::message::Source;
use super::reading::{Declared, Reading};
use super::served_queue::ServedQueue;
use super::worker::Worker;
use crate::error::Error;
use crate::topology::{Declaration, short_id};
use crate::transport::{Consumer, ConsumerEnd, forbids};

/// How long a drain waits for the broker's answer about a consumer. About a queue whose node is down, the answer comes
/// after a minute.
const DRAIN_PATIENCE: Duration = Duration::from_secs(10);
/// The pause after the first failed attempt. It doubles each time.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// The longest pause between two attempts.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// How long the state says that the broker has requeued deliveries that were not acknowledged in time, unless it
/// happens again.
const TAKEN_BACK_TOLD: Duration = Duration::from_secs(300);
/// How long a quorum queue may take to be deleted after its consumers were told. If it is declared too early, it is
/// found once more. Binding it then fails, or makes RabbitMQ 4.3 close the connection.
const DELETION: Duration = Duration::from_secs(1);
/// Where the answer about a queue is told: `Ok` if it is declared or its keeper goes on trying, or the broker's
/// refusal.
pub(super) type StartReport = oneshot::Sender<Result<(), Error>>;

/// What a keeper does about a queue that is unreachable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unreachable {
    /// It goes on trying.
    Kept,
    /// It gives up, as if the broker had refused the queue.
    Refused,
}

/// What a server that starts, or moves, has to know of a queue.
pub(super) struct Start {
    /// Tells that the queue is declared.
    pub(super) declared: StartReport,
    /// Cancelled when all queues are declared. No queue is consumed before that.
    pub(super) all_declared: CancellationToken,
    /// Tells that the queue is consumed.
    pub(super) consumed: StartReport,
    /// What to do if the queue is unreachable.
    pub(super) unreachable: Unreachable,
}

/// The keeper of one queue over one connection.
pub(super) struct Keeper {
    pub(super) site: Arc<Site>,
    /// The connection.
    reading: Arc<Reading>,
    /// Runs what is delivered.
    pub(super) worker: Arc<Worker>,
    pub(super) queue: Arc<ServedQueue>,
    /// The end of the name of a queue that belongs to this connection. It changes after a failed attempt, since the
    /// broker may have problems with the queue of that attempt.
    suffix: Mutex<String>,
}

impl Keeper {
    pub(super) fn new(
        site: &Arc<Site>,
        reading: &Arc<Reading>,
        worker: &Arc<Worker>,
        queue: &Arc<ServedQueue>,
    ) -> Self {
        let (site, reading, worker, queue) = (site.clone(), reading.clone(), worker.clone(), queue.clone());
        Self { site, reading, worker, queue, suffix: Mutex::new(short_id()) }
    }

    /// Declares the queue and its bindings. Returns the queue's name.
    async fn declare(&self) -> Result<String, Error> {
        let _declaring = self.site.declaring.read().await;
        if self.worker.has_left() {
            return Err(Error::Invalid("this server has unsubscribed".to_owned()));
        }
        let (name, mut parts) = self.queue.declarations(&self.site, &self.suffix());
        if self.queue.source() == Source::Instance {
            self.worker.answers_at(&name);
        }
        let declared = Declared { queue: self.queue.clone(), parts: parts.clone(), is_read: false };
        let earlier = self.reading.topology.lock().insert(self.queue.number, declared);
        if self.site.draining.is_cancelled() {
            // A draining server accepts no new calls, so it does not bind the keys that say that it is there.
            parts.retain(|part| !matches!(part, Declaration::Binding(binding) if self.site.is_presence(binding)));
        }
        if self.queue.is_own() {
            // The queue of a failed attempt may still be bound, but nobody consumes it.
            let mut earlier = earlier.as_ref().map(Declared::bindings).unwrap_or_default();
            earlier.retain(|binding| binding.queue != name);
            if !earlier.is_empty() {
                let transport = self.reading.transport.clone();
                tokio::spawn(async move { transport.unbind(&earlier).await });
            }
        }
        // There is no time-out: a second attempt would wait at the broker beside the first.
        self.reading.transport.declare_however_long(&parts).await?;
        Ok(name)
    }

    /// Begins to consume the queue.
    async fn consume(&self, queue: &str) -> Result<Consumer, Error> {
        let mode = self.queue.mode(self.worker.prefetch());
        // A drain that begins now waits for this, since deliveries may arrive at once, which have to be given back
        // properly.
        let waited_for = (self.tasks().token(), self.worker.read.token());
        let mut consuming = pin!(self.reading.transport.consume_however_long(queue, mode));
        tokio::select! {
            consumer = &mut consuming => return consumer,
            () = self.site.has_drained_for(DRAIN_PATIENCE) => drop(waited_for),
        }
        consuming.await
    }

    /// Declares and consumes the queue of a server that starts or moves, and then keeps it. Ends if the broker refuses
    /// the queue.
    pub(super) async fn start(self, start: Start) {
        let Start { declared, all_declared, consumed, unreachable } = start;
        let declaring = self.seen_through(self.declare()).await;
        let Some(queue) = unless_refused(declaring, declared, unreachable) else { return };
        let attached = match queue {
            Ok(queue) => {
                tokio::select! {
                    () = all_declared.cancelled() => {}
                    () = self.site.draining.cancelled() => return,
                }
                unless_refused(self.seen_through(self.consume(&queue)).await, consumed, unreachable)
            }
            Err(error) => Some(Err(error)),
        };
        if let Some(attached) = attached {
            self.keep(attached).await;
        }
    }

    /// Keeps the queue over a new connection. `attempted` is told when the first attempt has ended.
    pub(super) async fn start_again(self, attempted: oneshot::Sender<()>) {
        let attached = self.attach().await;
        // An error means that nobody waits for it any more.
        let _ = attempted.send(());
        self.keep(attached).await;
    }

    /// Has the queue consumed until the server drains or the connection ends. `attached` is the result of the first
    /// attempt.
    async fn keep(self, mut attached: Result<Consumer, Error>) {
        let mut pause = FIRST_PAUSE;
        loop {
            match attached {
                Ok(consumer) => {
                    pause = FIRST_PAUSE;
                    self.site.health.cured(&self.trouble());
                    self.is_read(true);
                    if self.has_read(consumer).await {
                        return;
                    }
                    self.is_read(false);
                    if self.queue.is_quorum() {
                        // The queue may be being deleted.
                        tokio::time::sleep(DELETION).await;
                    }
                }
                Err(Error::Disconnected { .. }) => return,
                Err(_) if self.worker.has_left() => return,
                Err(error) => {
                    self.site.health.suffers(self.trouble(), self.refusal(&error));
                    *self.suffix() = short_id();
                    tokio::select! {
                        () = self.worker.ending.cancelled() => {}
                        () = tokio::time::sleep(pause) => pause = (pause * 2).min(LONGEST_PAUSE),
                    }
                }
            }
            if self.worker.ending.is_cancelled() {
                return;
            }
            attached = self.attach().await;
        }
    }

    /// Declares and consumes the queue.
    async fn attach(&self) -> Result<Consumer, Error> {
        let attaching = async {
            let queue = self.declare().await?;
            self.consume(&queue).await
        };
        self.seen_through(attaching).await
    }

    /// Waits for an answer without a time-out. The state says so if it takes long.
    async fn seen_through<T>(&self, answer: impl Future<Output = T>) -> T {
        self.site.health.sees_through(&self.trouble(), &self.title(), answer).await
    }

    /// Why the queue is not consumed, as a sentence for the state.
    fn refusal(&self, error: &Error) -> String {
        match error {
            error if is_away(error) => {
                format!("{} cannot be reached: start the node that has it ({error})", self.title())
            }
            Error::Broker { reason, .. } if forbids(reason) => {
                format!("{} is not read: give its user the permission that it lacks ({error})", self.title())
            }
            error => format!("{} is not read: {error}", self.title()),
        }
    }

    /// Has the queue consumed until that ends. Returns whether it ends for good; otherwise the queue has to be consumed
    /// again.
    async fn has_read(&self, consumer: Consumer) -> bool {
        let part = self.reading.part(&self.queue);
        let life = consumer.life.clone();
        let stop = part.stop.child_token();
        let running = self.worker.clone().run(consumer, self.reading.clone(), self.queue.clone(), stop.clone());
        let running = part.tasks.track_future(running);
        match self.queue.source() {
            Source::Instance => self.tasks().spawn(running),
            Source::Calls | Source::Work | Source::Events => self.tasks().spawn(self.worker.read.track_future(running)),
        };
        let end = tokio::select! {
            () = part.stop.cancelled() => return true,
            // This does not wait for the worker: if it is busy with its calls, it reads on later.
            end = life.ended() => end,
            () = self.worker.leaves(self.queue.source()) => {
                stop.cancel();
                tokio::select! {
                    () = part.stop.cancelled() => return true,
                    () = self.worker.comes_back() => return matches!(life.ended().await, Some(ConsumerEnd::Connection)),
                }
            }
        };
        match end {
            Some(ConsumerEnd::Connection) => return true,
            Some(ConsumerEnd::TimedOut(limit)) => {
                self.worker.holds_no_more_than_it_runs();
                let why = format!(
                    "the broker took back what {} had not settled within {limit:?}, its consumer_timeout: raise \
                     `consumer_timeout` in rabbitmq.conf above the longest handler, or use RabbitMQ 4.3 or later, where it \
                     does not hold for Hopline",
                    self.title()
                );
                self.site.health.suffered(Trouble::TakenBack(self.title().into()), why, TAKEN_BACK_TOLD);
            }
            Some(ConsumerEnd::Channel(reason)) => {
                warn!(name = &*self.site.name, queue = self.title(), %reason, "the broker closed a consumer's channel: the queue is consumed again");
            }
            Some(ConsumerEnd::Cancelled) | None => {
                debug!(
                    name = &*self.site.name,
                    queue = self.title(),
                    "the broker ended a consumer: the queue is declared and consumed again"
                );
            }
        }
        false
    }

    /// Notes whether the queue is consumed. The bindings of a queue that is not are not repaired separately.
    fn is_read(&self, is_read: bool) {
        if let Some(declared) = self.reading.topology.lock().get_mut(&self.queue.number) {
            declared.is_read = is_read;
        }
    }

    fn tasks(&self) -> &TaskTracker {
        match self.queue.source() {
            Source::Instance => &self.site.own,
            Source::Calls | Source::Work | Source::Events => &self.site.shared,
        }
    }

    fn suffix(&self) -> MutexGuard<'_, String> {
        self.suffix.lock().expect("no panic while holding the suffix")
    }

    fn trouble(&self) -> Trouble {
        Trouble::Queue(self.queue.number)
    }

    fn title(&self) -> String {
        self.queue.title(&self.site.namespace)
    }
}

/// Whether a queue is unreachable: RabbitMQ says NOT_FOUND of a queue whose node is down, or that has no majority.
fn is_away(error: &Error) -> bool {
    matches!(error, Error::Broker { reason, .. } if reason.starts_with("NOT_FOUND"))
}

/// Tells the answer to whoever waits for it. Returns what to go on with; `None` after a refusal, since those who wait
/// end with it.
pub(super) fn unless_refused<T>(
    answer: Result<T, Error>,
    heard: StartReport,
    unreachable: Unreachable,
) -> Option<Result<T, Error>> {
    let (said, answer) = match answer {
        Err(error) if unreachable == Unreachable::Refused || !is_away(&error) => (Err(error), None),
        answer => (Ok(()), Some(answer)),
    };
    // If nobody waits any more, a refusal is handled like any other failed attempt.
    match heard.send(said) {
        Err(Err(late)) => Some(Err(late)),
        _ => answer,
    }
}
