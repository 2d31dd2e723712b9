//! Moving: a server that is connected to another than its first address returns there when it can, while calls run.
//!
//! Everything is declared and consumed over the new connection first. If that fails, the new connection is closed, and
//! the server stays where it is. Otherwise replies are sent over the new connection. The old one is closed when
//! everything that it has delivered is done.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt as _;
use futures::future::join_all;
use tokio::sync::oneshot;
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};
use tracing::{debug, info};
use uuid::Uuid;

use super::Site;
use super::copies::Copies;
use super::keeper::{Start, Unreachable};
use super::message::Source;
use super::reading::Reading;
use super::served_queue::{Served, ServedQueue};
use super::supervisor::{Answers, Supervisor};
use super::worker::Worker;
use crate::codec::Codec;
use crate::error::Error;
use crate::exchanges::to_queue;
use crate::frame::{Frame, Kind, Metadata};
use crate::state::State;
use crate::transport::{Properties, Publication, Role, Transport, next_look_back};

/// How long the broker may take to declare all queues, and then to begin all consumers. If it takes longer, the server
/// stays where it is. This is shorter than the time after which the state would tell of it.
const PATIENCE: Duration = Duration::from_secs(2);
/// How often the server checks whether an instance's own queue on the old connection is empty.
const LOOK: Duration = Duration::from_millis(100);

/// A move that is going on. If it is given up, the new connection is left in the same way as the old one is after a
/// success.
struct ServerMove {
    site: Arc<Site>,
    served: Vec<Served>,
    /// The connection to move to.
    new: Arc<Reading>,
    /// Ends the tasks of the new connection, unless the move succeeds.
    lost: CancellationToken,
    /// One for each subscription's queue, by its number. It is cancelled when all events of the old connection are
    /// handled; only then are those of the new one consumed, so that events stay in order.
    old_events_are_read: BTreeMap<usize, CancellationToken>,
    /// The instance's own queues on the old connection. `None` after a success.
    before: Option<Vec<Arc<str>>>,
}

impl ServerMove {
    /// Begins a move. From now on calls may arrive over both connections, so copies are looked for.
    fn between(old: &Reading, new: Arc<Reading>, site: Arc<Site>, served: Vec<Served>) -> Self {
        let before = Some(served.iter().map(|served| served.worker.own_queue()).collect());
        for Served { worker, .. } in &served {
            *worker.copies() = Some(Copies::of(old.connection, new.connection));
        }
        let queues = served.iter().flat_map(|served| served.queues.iter());
        let of_events = queues.filter(|queue| queue.source() == Source::Events);
        let old_events_are_read = of_events.map(|queue| (queue.number, CancellationToken::new())).collect();
        let lost = CancellationToken::new();
        Self { site, served, new, lost, old_events_are_read, before }
    }

    /// The move has succeeded: leaves the old connection. Returns what ends the tasks of the new one.
    fn succeeded(mut self, old: Arc<Reading>) -> CancellationToken {
        self.before = None;
        self.leave(old);
        self.lost.clone()
    }

    /// Leaves a connection on a task.
    fn leave(&self, reading: Arc<Reading>) {
        let guarded = |(number, read): (&usize, &CancellationToken)| (*number, read.clone().drop_guard());
        let events_are_read = self.old_events_are_read.iter().map(guarded).collect();
        let leaving = LeftConnection { reading, served: self.served.clone() };
        self.site.own.spawn(leaving.leave(events_are_read));
    }
}

impl Drop for ServerMove {
    /// Gives the move up, unless it has succeeded.
    fn drop(&mut self) {
        let Some(own_queues) = self.before.take() else { return };
        self.lost.cancel();
        for (served, queue) in self.served.iter().zip(&own_queues) {
            served.worker.answers_at(queue);
        }
        self.leave(self.new.clone());
    }
}

impl Supervisor {
    /// Moves to the first address if it can be reached and everything can be served there. Otherwise, and if this
    /// future is dropped, the server stays where it is.
    pub(super) async fn go_back(&mut self) {
        let site = self.site.clone();
        self.look_at = next_look_back();
        // This is not the time to move if something is wrong.
        if !self.dial.is_elsewhere(&self.reading.transport) || *site.health.state.borrow() != State::Ready {
            return;
        }
        let moved = match self.dial.connect_to_first(Role::Server).await {
            Ok(transport) => self.move_to(transport).await,
            Err(error) => Err(error),
        };
        match moved {
            Ok(()) => info!(name = &*site.name, broker = site.transport().broker(), "moved back to the first address"),
            Err(error) => debug!(name = &*site.name, %error, "the first address is not used yet"),
        }
    }

    /// Moves to this connection.
    async fn move_to(&mut self, transport: Transport) -> Result<(), Error> {
        let site = self.site.clone();
        let events = transport.events();
        if let Some(reason) = transport.blocked() {
            return Err(Error::refused("take messages", &*reason));
        }
        transport.declare(&site.namespace.exchanges()).await?;
        // A drain unbinds everything that is in the topology. So it must not begin while this declares.
        let declaring = site.declaring.read().await;
        let new = self.reading_over(transport);
        // They are declared before the move, so they are dropped after it. The move's drop ends the keepers first.
        // Otherwise a keeper would see that nobody waits for its answer, and go on.
        let (mut declared, mut consumed) = (Answers::new(), Answers::new());
        let moving = ServerMove::between(&self.reading, new.clone(), site.clone(), self.served.clone());

        let heard = |answers: &Answers| {
            let (heard, answer) = oneshot::channel();
            answers.push(answer);
            heard
        };
        let all_declared = CancellationToken::new();
        for keeper in self.keepers(&new) {
            let (all_declared, consumed) = match moving.old_events_are_read.get(&keeper.queue.number) {
                Some(old_events_are_read) => (old_events_are_read.clone(), oneshot::channel().0),
                None => (all_declared.clone(), heard(&consumed)),
            };
            let start = Start { declared: heard(&declared), all_declared, consumed, unreachable: Unreachable::Refused };
            Self::until(&moving.lost, keeper.start(start));
        }
        all(&mut declared).await?;
        all_declared.cancel();
        all(&mut consumed).await?;

        // From here on the server serves over the new connection.
        self.events = events;
        let old = std::mem::replace(&mut self.reading, new);
        std::mem::replace(&mut self.lost, moving.succeeded(old)).cancel();
        site.serves_over(&self.reading);
        drop(declaring);
        self.keep_all_dead_letters();
        self.look_after();
        self.enter_ready();
        Ok(())
    }
}

/// Waits for the answers about all queues.
///
/// # Errors
/// The first refusal, or `Broker` if an answer does not come in time.
async fn all(answers: &mut Answers) -> Result<(), Error> {
    let late = |_| Error::silent("let a queue be read there", PATIENCE);
    let until = Instant::now() + PATIENCE;
    while let Some(answer) = tokio::time::timeout_at(until, answers.next()).await.map_err(late)? {
        // A keeper that tells nothing has ended with its connection, which is noticed elsewhere.
        answer.unwrap_or(Ok(()))?;
    }
    Ok(())
}

/// A connection that the server leaves.
struct LeftConnection {
    reading: Arc<Reading>,
    served: Vec<Served>,
}

impl LeftConnection {
    /// Reads what is left in queues that only this server consumes, waits for running calls, and closes the connection.
    /// A subscription's events are consumed over the other connection when its guard is dropped.
    async fn leave(self, mut events_are_read: BTreeMap<usize, DropGuard>) {
        let leaving = &self;
        let own = async {
            let bindings = self.reading.topology.own_bindings();
            // If this fails, the queues end with the connection, and so does what is in them.
            let is_unbound = self.reading.transport.unbind(&bindings).await.is_ok();
            let each = leaving.queues().filter(|(_, queue)| queue.is_own()).map(|(worker, queue)| {
                let events_are_read = events_are_read.remove(&queue.number);
                async move {
                    match queue.source() {
                        Source::Events => leaving.leave_events(worker, queue, is_unbound).await,
                        _ => leaving.leave_instance(worker, queue, is_unbound).await,
                    }
                    drop(events_are_read);
                }
            });
            join_all(each).await;
        };
        // The own queue is consumed until the calls have ended, since cancels and questions about these calls arrive
        // there.
        tokio::join!(own, self.end(|queue| !queue.is_own()));
        self.end(|queue| queue.source() == Source::Instance).await;
        self.served.iter().for_each(|served| self.is_left(&served.worker));
        self.reading.transport.close().await;
    }

    /// Reads the rest of a subscription's queue, and ends its consumption.
    async fn leave_events(&self, worker: &Worker, queue: &ServedQueue, is_unbound: bool) {
        if is_unbound {
            self.is_read_empty(queue).await;
        }
        self.reading.part(queue).end().await;
        self.is_left(worker);
    }

    /// Reads the instance's own queue until it is empty. It is then still consumed, for what is sent directly to it.
    async fn leave_instance(&self, worker: &Worker, queue: &ServedQueue, is_unbound: bool) {
        if !is_unbound {
            return;
        }
        let Some(name) = self.is_read_empty(queue).await else { return self.is_left(worker) };
        let last = Uuid::new_v4();
        if let Some(copies) = worker.copies().as_mut() {
            copies.is_left_after(last, self.reading.connection);
        }
        // This message is behind all copies in the queue. When it arrives, all copies have been seen.
        let body = Frame::new(Kind::Cancel, last, Codec::Raw, Metadata::default(), Bytes::new()).to_body();
        // If it is lost, the copies are forgotten when the connection ends.
        let told = Publication { mandatory: false, ..to_queue(name, Properties::default(), body) };
        drop(self.reading.transport.publish(told));
    }

    /// Waits until an instance's own queue is empty, and returns its name. `None` if it is not consumed any more.
    async fn is_read_empty(&self, queue: &ServedQueue) -> Option<String> {
        let name = self.reading.topology.lock().get(&queue.number)?.name()?.to_owned();
        let part = self.reading.part(queue);
        part.tasks.close();
        let is_empty = async {
            while matches!(self.reading.transport.count(&name).await, Ok(Some(1..))) {
                tokio::time::sleep(LOOK).await;
            }
        };
        tokio::select! {
            biased;
            () = part.stop.cancelled() => None,
            () = part.tasks.wait() => None,
            () = is_empty => Some(name),
        }
    }

    /// Ends the consumption of those queues that are meant, and waits until everything from them is done.
    async fn end(&self, is_meant: impl Fn(&ServedQueue) -> bool) {
        let meant = self.queues().filter(|(_, queue)| is_meant(queue));
        join_all(meant.map(async |(_, queue)| self.reading.part(queue).end().await)).await;
    }

    /// All queues, each with its worker.
    fn queues(&self) -> impl Iterator<Item = (&Worker, &ServedQueue)> {
        self.served.iter().flat_map(|served| served.queues.iter().map(|queue| (&*served.worker, &**queue)))
    }

    /// Nothing more arrives over this connection for a worker, so its copies are forgotten.
    fn is_left(&self, worker: &Worker) {
        if let Some(copies) = worker.copies().as_mut() {
            copies.is_left(self.reading.connection);
        }
    }
}

#[cfg(test)]
mod tests;
