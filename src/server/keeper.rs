//! Keeps one queue of a server: declares it, with what leads to it, has it read, and does both again when it is lost alone.

use std::future::Future;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

use super::health::Trouble;
use super::message::Source;
use super::reading::{Place, Reading};
use super::worker::Worker;
use super::{Declared, Site};
use crate::client::short_id;
use crate::error::Error;
use crate::topology::{Binding, CallsQueue, Declaration, QueueKind, ServiceId};
use crate::transport::{Consumer, ConsumerEnd, Mode, forbids};

/// How long a drain waits for the broker's answer about a consumer: of a queue whose nodes are away, it comes after a minute.
const DRAIN_PATIENCE: Duration = Duration::from_secs(10);
/// The pause after an attempt that failed grows from one to the other.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// How long a server says that the broker has taken back what took too long, unless it does so again.
const TAKEN_BACK_TOLD: Duration = Duration::from_secs(300);
/// How long a quorum queue may take to be gone once its consumers have heard of its deletion. To declare it meanwhile finds
/// it, and to bind it then fails, or has RabbitMQ 4.3 end the whole connection.
const DELETION: Duration = Duration::from_secs(1);
/// How many messages an instance's own queue has out: cancels among them are to wait for nothing but as many calls.
const OWN_PREFETCH: u16 = 1024;

/// What is served: a service, or the events that match a pattern.
pub(super) enum Origin {
    Service {
        id: ServiceId,
        calls: CallsQueue,
        /// The methods that take oneway calls: without any, there is no queue of them.
        oneway: Vec<String>,
    },
    Subscription(String),
}

/// Whoever waits for an answer about a queue hears of it: fine, or left to its keeper; or what the broker refuses.
pub(super) type Heard = oneshot::Sender<Result<(), Error>>;

/// What becomes of a queue that cannot be reached for now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Away {
    /// Its keeper goes on trying.
    Kept,
    /// It counts as refused.
    Refused,
}

/// What a server that starts, or moves, hears of a queue.
pub(super) struct Start {
    /// It is declared.
    pub(super) declared: Heard,
    /// All queues are: none is consumed before.
    pub(super) all_declared: CancellationToken,
    /// It is consumed.
    pub(super) consumed: Heard,
    /// If it is not.
    pub(super) away: Away,
}

/// What keeps one queue, over one connection.
pub(super) struct Keeper {
    pub(super) site: Arc<Site>,
    reading: Arc<Reading>,
    pub(super) worker: Arc<Worker>,
    pub(super) origin: Arc<Origin>,
    /// The place of what it serves among all that the server does.
    pub(super) at: usize,
    pub(super) source: Source,
    /// What the name of a queue ends in that belongs to this connection: another one when an attempt has failed, since the
    /// broker may have come to grief over the last.
    suffix: Mutex<String>,
}

impl Keeper {
    pub(super) fn new(
        site: &Arc<Site>,
        reading: &Arc<Reading>,
        worker: &Arc<Worker>,
        origin: &Arc<Origin>,
        place: Place,
    ) -> Self {
        let (at, source) = place;
        let (site, reading, worker, origin) = (site.clone(), reading.clone(), worker.clone(), origin.clone());
        Self { site, reading, worker, origin, at, source, suffix: Mutex::new(short_id()) }
    }

    /// Declares the queue and what leads to it.
    async fn declare(&self) -> Result<String, Error> {
        let _declaring = self.site.declaring.read().await;
        let (queue, mut parts) = self.topology();
        if self.source == Source::Instance {
            self.worker.answers_at(&queue);
        }
        let declared = Declared { parts: parts.clone(), is_read: false };
        let earlier = self.reading.topology.lock().insert(self.place(), declared);
        if self.site.draining.is_cancelled() {
            // Whoever drains is not there for new calls.
            parts.retain(|part| !matches!(part, Declaration::Binding(binding) if self.site.is_presence(binding)));
        }
        if matches!(self.source, Source::Instance | Source::Events) {
            // To a queue of an attempt that failed half-way: nobody reads it.
            let mut earlier = bindings(earlier.iter().flat_map(|earlier| &earlier.parts));
            earlier.retain(|binding| binding.queue != queue);
            if !earlier.is_empty() {
                let transport = self.reading.transport.clone();
                tokio::spawn(async move { transport.unbind(&earlier).await });
            }
        }
        // Another attempt meanwhile would stay at the broker as well.
        self.reading.transport.declare_however_long(&parts).await?;
        Ok(queue)
    }

    /// Begins to consume the queue.
    async fn consume(&self, queue: &str) -> Result<Consumer, Error> {
        let prefetch = self.worker.prefetch();
        let mode = match self.source {
            Source::Calls | Source::Work if self.is_quorum() => Mode::SettleAnyTime { prefetch },
            Source::Calls | Source::Work | Source::Events => Mode::Settle { prefetch },
            Source::Instance => Mode::Settle { prefetch: OWN_PREFETCH.max(prefetch.saturating_mul(2)) },
        };
        // A drain that begins meanwhile waits, so that what comes at once is given back as it has to be.
        let waited_for = self.tasks().token();
        let mut consuming = pin!(self.reading.transport.consume_however_long(queue, mode));
        tokio::select! {
            consumer = &mut consuming => return consumer,
            () = self.site.has_drained_for(DRAIN_PATIENCE) => drop(waited_for),
        }
        consuming.await
    }

    /// Keeps the queue of a server that starts, unless the broker refuses it.
    pub(super) async fn start(self, start: Start) {
        let Start { declared, all_declared, consumed, away } = start;
        let declaring = self.seen_through(self.declare()).await;
        let Some(queue) = unless_refused(declaring, declared, away) else { return };
        let attached = match queue {
            Ok(queue) => {
                tokio::select! {
                    () = all_declared.cancelled() => {}
                    () = self.site.draining.cancelled() => return,
                }
                unless_refused(self.seen_through(self.consume(&queue)).await, consumed, away)
            }
            Err(error) => Some(Err(error)),
        };
        if let Some(attached) = attached {
            self.keep(attached).await;
        }
    }

    /// Keeps the queue over a new connection. Whoever waits for the end of the first attempt is told.
    pub(super) async fn start_again(self, attempted: oneshot::Sender<()>) {
        let attached = self.attach().await;
        // Whoever waited may have lost patience.
        let _ = attempted.send(());
        self.keep(attached).await;
    }

    /// Has the queue read until the server drains or the connection ends, after this first attempt.
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
                    if self.is_quorum() {
                        // It may be on its way out.
                        tokio::time::sleep(DELETION).await;
                    }
                }
                Err(Error::Disconnected { .. }) => return,
                Err(error) => {
                    self.site.health.suffers(self.trouble(), self.refusal(&error));
                    *self.suffix() = short_id();
                    tokio::select! {
                        () = self.site.draining.cancelled() => {}
                        () = tokio::time::sleep(pause) => pause = (pause * 2).min(LONGEST_PAUSE),
                    }
                }
            }
            if self.site.draining.is_cancelled() {
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

    /// Waits for as long as the broker takes.
    async fn seen_through<T>(&self, answer: impl Future<Output = T>) -> T {
        self.site.health.sees_through(&self.trouble(), &self.title(), answer).await
    }

    /// Why the queue is not read, in words for people.
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

    /// Has a queue read. Tells whether that was the end; otherwise it is to be consumed again.
    async fn has_read(&self, consumer: Consumer) -> bool {
        let part = self.reading.part(self.place());
        let life = consumer.life.clone();
        let running = self.worker.clone().run(consumer, self.reading.clone(), self.place());
        self.tasks().spawn(part.tasks.track_future(running));
        let end = tokio::select! {
            () = part.stop.cancelled() => return true,
            // A worker whose places are all taken reads on when one is free: it is not waited for.
            end = life.ended() => end,
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

    /// Notes whether the queue is read: what leads to one that is not is seen to with it alone.
    fn is_read(&self, is_read: bool) {
        if let Some(declared) = self.reading.topology.lock().get_mut(&self.place()) {
            declared.is_read = is_read;
        }
    }

    fn place(&self) -> Place {
        (self.at, self.source)
    }

    fn is_quorum(&self) -> bool {
        match (self.source, &*self.origin) {
            (Source::Work, _) => true,
            (Source::Calls, Origin::Service { calls, .. }) => calls.kind == QueueKind::Quorum,
            (Source::Calls | Source::Instance | Source::Events, _) => false,
        }
    }

    fn tasks(&self) -> &TaskTracker {
        match self.source {
            Source::Instance => &self.site.own,
            Source::Calls | Source::Work | Source::Events => &self.site.shared,
        }
    }

    fn suffix(&self) -> MutexGuard<'_, String> {
        self.suffix.lock().expect("no panic while holding the suffix")
    }

    fn trouble(&self) -> Trouble {
        Trouble::Queue(self.at, self.source)
    }

    /// The queue's name, and all that there has to be for it.
    fn topology(&self) -> (String, Vec<Declaration>) {
        let Site { namespace, instance, .. } = &*self.site;
        match (&*self.origin, self.source) {
            (Origin::Service { id, calls, .. }, Source::Calls) => {
                (namespace.calls_queue(id), namespace.calls(id, *calls))
            }
            (Origin::Service { id, oneway, .. }, Source::Work) => {
                (namespace.work_queue(id), namespace.work(id, oneway))
            }
            (Origin::Service { id, calls, .. }, Source::Instance | Source::Events) => {
                let queue = namespace.instance_queue(id, instance, &self.suffix());
                let parts = namespace.instance(id, &queue, instance, *calls);
                (queue, parts)
            }
            (Origin::Subscription(pattern), _) => {
                let queue = namespace.events_queue(instance, &self.suffix());
                let parts = namespace.subscription(&queue, pattern);
                (queue, parts)
            }
        }
    }

    /// The queue, in words for people: those whose names are new each time are told by what they are for.
    fn title(&self) -> String {
        let namespace = &self.site.namespace;
        match (&*self.origin, self.source) {
            (Origin::Service { id, .. }, Source::Calls) => format!("the queue `{}`", namespace.calls_queue(id)),
            (Origin::Service { id, .. }, Source::Work) => format!("the queue `{}`", namespace.work_queue(id)),
            (Origin::Service { id, .. }, Source::Instance | Source::Events) => {
                format!("the queue of this instance of `{id}`")
            }
            (Origin::Subscription(pattern), _) => format!("the queue of the subscription to `{pattern}`"),
        }
    }
}

/// Whether a queue cannot be reached for now: RabbitMQ's word for one whose node is away, or that has no majority.
fn is_away(error: &Error) -> bool {
    matches!(error, Error::Broker { reason, .. } if reason.starts_with("NOT_FOUND"))
}

/// Tells whoever waits for an answer. With a refusal there is nothing to go on with: whoever waits ends with that.
pub(super) fn unless_refused<T>(answer: Result<T, Error>, heard: Heard, away: Away) -> Option<Result<T, Error>> {
    let (said, answer) = match answer {
        Err(error) if away == Away::Refused || !is_away(&error) => (Err(error), None),
        answer => (Ok(()), Some(answer)),
    };
    // Whoever waited may have lost patience: what is refused later is told when it is asked for again.
    match heard.send(said) {
        Err(Err(late)) => Some(Err(late)),
        _ => answer,
    }
}

/// The bindings among what is declared.
pub(super) fn bindings<'a>(parts: impl Iterator<Item = &'a Declaration>) -> Vec<Binding> {
    let bindings = parts.filter_map(|part| match part {
        Declaration::Binding(binding) => Some(binding.clone()),
        Declaration::Queue(_) | Declaration::Exchange(_) => None,
    });
    bindings.collect()
}
