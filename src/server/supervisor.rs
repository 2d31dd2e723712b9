//! The supervisor keeps a server connected. It has a keeper for each queue, and reconnects when the connection is lost.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use futures::future::join_all;
use futures::stream::FuturesUnordered;
use tokio::sync::{broadcast, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::Site;
use super::dead_letters::{keep_dead_letters, keep_entered, start_dead_letters};
use super::health::Health;
use super::keeper::{Keeper, Start, Unreachable};
use super::message::Source;
use super::reading::Reading;
use super::repair::keep_repaired;
use super::replay::Replayer;
use super::served_queue::{Purpose, Served, ServedQueue};
use super::worker::Worker;
use crate::error::Error;
use crate::service::Service;
use crate::state::Attempts;
use crate::topology::ServiceId;
use crate::transport::{ConnectionEvent, Dial, Role, Transport, next_look_back};

/// How long a new connection may take until all queues are consumed and it counts as ready. If a queue takes longer,
/// its keeper tells the state.
const PATIENCE: Duration = Duration::from_secs(3);
/// How long a server that starts waits for the first answer about any of its queues. If none comes, it serves without
/// those queues at first.
const START_PATIENCE: Duration = Duration::from_secs(10);

/// The answers about queues that a server waits for.
pub(super) type Answers = FuturesUnordered<oneshot::Receiver<Result<(), Error>>>;

/// The supervisor of one server.
pub(super) struct Supervisor {
    pub(super) site: Arc<Site>,
    pub(super) dial: Dial,
    pub(super) events: broadcast::Receiver<ConnectionEvent>,
    pub(super) served: Vec<Served>,
    /// The connection that is used now.
    pub(super) reading: Arc<Reading>,
    /// How many connections there have been, with those of moves that were given up.
    connections: u64,
    /// Cancelled when the connection is lost: ends all tasks that look after it.
    pub(super) lost: CancellationToken,
    /// When the first address is tried again, if the server is connected to another one.
    pub(super) look_at: Instant,
}

impl Supervisor {
    pub(super) fn new(site: Arc<Site>, dial: Dial) -> Self {
        let transport = site.transport();
        let events = transport.events();
        let mut reading = Reading::over(1, transport);
        reading.topology = site.topology();
        let (lost, look_at) = (CancellationToken::new(), next_look_back());
        Self { site, dial, events, served: Vec::new(), reading: Arc::new(reading), connections: 1, lost, look_at }
    }

    /// Counts a new connection.
    pub(super) fn reading_over(&mut self, transport: Transport) -> Arc<Reading> {
        self.connections += 1;
        Arc::new(Reading::over(self.connections, transport))
    }

    pub(super) fn serve(&mut self, id: ServiceId, service: Service) -> Result<(), Error> {
        let purposes = Purpose::of_service(&id, &service);
        let worker = self.add(&id, id.to_string().into(), service, purposes)?;
        // Signs of life are for callers who wait, which events do not have.
        tokio::spawn(worker.clone().report_in());
        if worker.ward.is_some() {
            tokio::spawn(worker.keep_ward());
        }
        Ok(())
    }

    pub(super) fn subscribe(&mut self, id: ServiceId, service: Service) -> Result<(), Error> {
        let pattern = service.pattern.clone().unwrap_or_default();
        let purposes = if service.replay.is_some() { Vec::new() } else { vec![Purpose::Subscription { pattern }] };
        self.add(&id, "events".into(), service, purposes).map(drop)
    }

    /// Declares the streams that are read, so that what is wrong with one is told at the start.
    async fn declare_streams(&self, transport: &Transport) -> Result<(), Error> {
        for worker in self.workers() {
            if let Some(replay) = &worker.service.replay {
                transport.declare(&replay.declarations(&self.site.namespace, &worker.id)).await?;
            }
        }
        Ok(())
    }

    /// Has the streams of subscriptions read until the server has drained.
    fn replay(&self) {
        for served in &self.served {
            let Some(settings) = served.worker.service.replay.clone() else { continue };
            let of_group = served.queues.iter().find(|queue| queue.source() == Source::Work).cloned();
            let end = served.worker.ending.clone();
            let queue =
                of_group.unwrap_or_else(|| Arc::new(ServedQueue::new(usize::MAX, Purpose::Replay { settings }, end)));
            let replayer = Replayer::new(self.site.clone(), self.dial.clone(), served.worker.clone(), queue);
            self.site.shared.spawn(served.worker.read.track_future(async move {
                if let Some(replayer) = replayer {
                    replayer.run().await;
                }
            }));
        }
    }

    /// Adds a worker for a service or a subscription, which consumes queues for these purposes.
    fn add(
        &mut self,
        id: &ServiceId,
        name: Arc<str>,
        service: Service,
        purposes: Vec<Purpose>,
    ) -> Result<Arc<Worker>, Error> {
        let worker = Arc::new(Worker::new(id, name, service, self.site.clone())?);
        self.site.workers.lock().expect("no panic while holding the workers").push(Arc::downgrade(&worker));
        let first = self.served.iter().map(|served| served.queues.len()).sum();
        let queue = |(number, purpose): (usize, Purpose)| {
            let end = worker.end_of(purpose.source());
            Arc::new(ServedQueue::new(number, purpose, end))
        };
        let queues = (first..).zip(purposes).map(queue).collect();
        self.served.push(Served { worker: worker.clone(), queues });
        Ok(worker)
    }

    /// Begins to serve over the first connection. If a queue is unreachable, for example since its node is down, the
    /// server begins without it, and the state says so until its keeper has it.
    ///
    /// # Errors
    /// What the broker refuses. All queues are declared before the first is consumed. So if a queue exists with other
    /// arguments, this fails before any call is accepted.
    pub(super) async fn start(&mut self) -> Result<(), Error> {
        let transport = self.site.transport();
        let keepers = self.keepers(&self.reading);
        if let Some(most) = transport.max_consumers().filter(|most| *most < keepers.len()) {
            return Err(Error::Invalid(format!(
                "{} services and subscriptions take {} channels, and the broker allows {most} for them on one connection \
                 (its `channel_max`): serve some of them by another `Server`",
                self.served.len(),
                keepers.len(),
            )));
        }
        if let Some(reason) = transport.replies_refused().filter(|_| !self.site.services.is_empty()) {
            let reason =
                format!("its user needs the permission to write to `amq.default`, where replies leave: {reason}");
            return Err(Error::refused("take replies from this server", reason));
        }
        self.site.heed().await?;
        transport.declare(&self.site.namespace.exchanges()).await?;
        self.declare_streams(&transport).await?;
        self.site.health.connected();
        let (dead, declared, consumed) = (Answers::new(), Answers::new(), Answers::new());
        let heard = |answers: &Answers| {
            let (heard, answer) = oneshot::channel();
            answers.push(answer);
            heard
        };
        for worker in self.with_oneway_methods() {
            self.while_connected(start_dead_letters(worker.clone(), transport.clone(), heard(&dead)));
        }
        let patience = answered(dead, START_PATIENCE).await?;
        let all_declared = CancellationToken::new();
        for keeper in keepers {
            let (declared, consumed) = (heard(&declared), heard(&consumed));
            let (all_declared, unreachable) = (all_declared.clone(), Unreachable::Kept);
            self.while_connected(keeper.start(Start { declared, all_declared, consumed, unreachable }));
        }
        let patience = answered(declared, patience).await?;
        all_declared.cancel();
        answered(consumed, patience).await?;
        self.look_after();
        self.enter_ready();
        Ok(())
    }

    /// Opens the first connection, however many attempts that takes, and then [runs](Self::run). If something is wrong
    /// with a queue, its keeper tells the state.
    pub(super) async fn start_lazily(mut self) {
        let draining = self.site.draining.clone();
        tokio::select! {
            biased;
            () = draining.cancelled() => return,
            () = self.connect_at_last(None) => {}
        }
        self.run().await;
    }

    /// Runs until the server has drained. During a drain, a lost connection is not opened again.
    pub(super) async fn run(mut self) {
        self.replay();
        let (draining, drained) = (self.site.draining.clone(), self.site.drained.clone());
        loop {
            let event = tokio::select! {
                () = drained.cancelled() => return,
                event = self.events.recv() => event,
                // A drain may begin during a move. So this ends at once then, to hear what happens to the connection.
                () = tokio::time::sleep_until(self.look_at), if !draining.is_cancelled() => {
                    let (old, site) = (self.reading.transport.events(), self.site.clone());
                    tokio::select! {
                        biased;
                        () = draining.cancelled() => {}
                        () = ended(old, &site.health) => {}
                        () = self.go_back() => {}
                    }
                    continue;
                }
            };
            let reason = match event {
                Ok(ConnectionEvent::Lost(reason)) => reason,
                Err(broadcast::error::RecvError::Closed) => "it was closed".into(),
                Ok(ConnectionEvent::Blocked(reason)) => {
                    self.site.health.blocked(Some(reason));
                    continue;
                }
                Ok(ConnectionEvent::Unblocked) => {
                    self.site.health.blocked(None);
                    continue;
                }
                Err(broadcast::error::RecvError::Lagged(_)) => continue,
            };
            tokio::select! {
                biased;
                () = draining.cancelled() => return,
                () = self.reconnect(reason) => {}
            }
        }
    }

    /// Reconnects, however many attempts that takes.
    async fn reconnect(&mut self, reason: Arc<str>) {
        // From now on, what these tasks find out does not concern the new connection.
        std::mem::take(&mut self.lost).cancel();
        self.site.health.disconnected();
        let lost = self.site.transport();
        tokio::spawn(async move { lost.close().await });
        self.connect_at_last(Some(reason)).await;
    }

    /// Connects and serves all, for as long as it takes. `lost` is what ended the last connection, if there has been one.
    async fn connect_at_last(&mut self, lost: Option<Arc<str>>) {
        let name = self.dial.label(Role::Server);
        let mut attempts = Attempts::new(self.site.health.state.clone(), name, lost);
        while let Err(error) = self.connect().await {
            attempts.after(&error).await;
        }
        attempts.succeeded(&self.site.transport());
        self.enter_ready();
    }

    /// Opens a connection, declares everything, and consumes it.
    async fn connect(&mut self) -> Result<(), Error> {
        let transport = self.dial.connect(Role::Server).await?;
        self.events = transport.events();
        // What was declared over the last connection has gone with it.
        self.reading = self.reading_over(transport.clone());
        self.site.serves_over(&self.reading);
        self.look_at = next_look_back();
        let declared = async {
            transport.declare(&self.site.namespace.exchanges()).await?;
            self.site.heed_if_allowed().await
        };
        if let Err(error) = declared.await {
            transport.close().await;
            return Err(error);
        }
        self.site.health.connected();
        let (own, shared) =
            self.keepers(&self.reading).into_iter().partition(|keeper| keeper.queue.source() == Source::Instance);
        // The own queue comes first: callers who learn of an instance have to reach it.
        for keepers in [own, shared] {
            self.first_attempts(keepers).await;
        }
        self.keep_all_dead_letters();
        self.look_after();
        Ok(())
    }

    /// Sets the state to `Ready`, or to `Blocked` if the broker has said so before anybody listened.
    pub(super) fn enter_ready(&self) {
        self.site.health.blocked(self.site.transport().blocked());
    }

    /// A keeper for each queue that is to be consumed, over this connection. Those of the instance's own queues come first.
    pub(super) fn keepers(&self, reading: &Arc<Reading>) -> Vec<Keeper> {
        let of = |served: &Served| {
            let keeper = |queue| Keeper::new(&self.site, reading, &served.worker, queue);
            served.queues.iter().map(keeper).collect::<Vec<_>>()
        };
        let served = self.served.iter().filter(|served| !served.worker.has_left());
        let mut keepers: Vec<_> = served.flat_map(of).collect();
        keepers.sort_by_key(|keeper| keeper.queue.source() != Source::Instance);
        keepers
    }

    /// Starts the tasks that look after exchanges, bindings and the catalogue, until the connection ends.
    pub(super) fn look_after(&self) {
        let transport = self.site.transport();
        self.while_connected(keep_repaired(self.site.clone(), self.reading.clone()));
        let lasting = |worker: &Arc<Worker>| worker.service.pattern.is_none() || worker.id.is_group();
        let workers = self.workers().into_iter().filter(lasting).collect();
        self.while_connected(keep_entered(self.site.clone(), transport, workers));
    }

    /// Starts the tasks that keep the queues of dead letters, until the connection ends.
    pub(super) fn keep_all_dead_letters(&self) {
        for worker in self.with_oneway_methods() {
            self.while_connected(keep_dead_letters(worker.clone(), self.site.transport()));
        }
    }

    pub(super) fn workers(&self) -> Vec<Arc<Worker>> {
        self.served.iter().map(|served| served.worker.clone()).collect()
    }

    /// The services with oneway methods. They always have a queue of dead letters.
    fn with_oneway_methods(&self) -> impl Iterator<Item = &Arc<Worker>> {
        let has_work = |served: &&Served| served.queues.iter().any(|queue| queue.source() == Source::Work);
        self.served.iter().filter(has_work).map(|served| &served.worker).filter(|worker| !worker.has_left())
    }

    /// Starts keepers, and waits for their first attempts, but not for long.
    async fn first_attempts(&self, keepers: Vec<Keeper>) {
        let attempts = keepers.into_iter().map(|keeper| {
            let (first, attempted) = oneshot::channel();
            self.while_connected(keeper.start_again(first));
            attempted
        });
        // A keeper that takes longer tells the state.
        let _ = tokio::time::timeout(PATIENCE, join_all(attempts)).await;
    }

    /// Runs a task until it ends or the connection is lost.
    fn while_connected(&self, looking: impl Future<Output = ()> + Send + 'static) {
        Self::until(&self.lost, looking);
    }

    /// The same, until `lost` is cancelled.
    pub(super) fn until(lost: &CancellationToken, looking: impl Future<Output = ()> + Send + 'static) {
        let lost = lost.clone();
        tokio::spawn(async move {
            tokio::select! {
                // After the loss, the task must not take another step.
                biased;
                () = lost.cancelled() => {}
                () = looking => {}
            }
        });
    }
}

/// Waits until a connection has ended. In the meantime, the state tells whether the broker is blocked.
async fn ended(mut events: broadcast::Receiver<ConnectionEvent>, health: &Health) {
    loop {
        match events.recv().await {
            Ok(ConnectionEvent::Lost(_)) | Err(broadcast::error::RecvError::Closed) => return,
            Ok(ConnectionEvent::Blocked(reason)) => health.blocked(Some(reason)),
            Ok(ConnectionEvent::Unblocked) => health.blocked(None),
            Err(broadcast::error::RecvError::Lagged(_)) => {}
        }
    }
}

/// Waits for answers about queues, but at most `patience` for each. Returns how long to wait for others after that.
async fn answered(mut answers: Answers, patience: Duration) -> Result<Duration, Error> {
    loop {
        match tokio::time::timeout(patience, answers.next()).await {
            // A keeper that tells nothing leaves it to the state.
            Ok(Some(answer)) => answer.unwrap_or(Ok(()))?,
            Ok(None) => return Ok(patience),
            Err(_) => return Ok(PATIENCE),
        }
    }
}

#[cfg(test)]
mod tests;
