//! Keeps a server connected: connects again when the connection is lost, with a keeper for each of its queues.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use futures::stream::{self, StreamExt as _, TryStreamExt as _};
use tokio::sync::{broadcast, oneshot};
use tokio_util::sync::CancellationToken;

use super::Site;
use super::dead_letters::{keep_dead_letters, keep_entered};
use super::keeper::{Keeper, Origin};
use super::message::Source;
use super::repair::keep_repaired;
use super::worker::Worker;
use crate::error::Error;
use crate::service::Service;
use crate::state::Attempts;
use crate::topology::ServiceId;
use crate::transport::{Dial, Event, Role};

/// How long a new connection may take to have all queues consumed before it counts as ready: a queue that takes longer is
/// told by its keeper.
const PATIENCE: Duration = Duration::from_secs(3);
/// How long a queue is waited for when a server starts: without those that take longer it begins to serve.
const START_PATIENCE: Duration = Duration::from_secs(10);
/// How many queues are declared or consumed at once when a server starts.
const AT_ONCE: usize = 16;

/// A worker, and where its messages come from.
struct Served {
    worker: Arc<Worker>,
    origin: Arc<Origin>,
}

pub(super) struct Supervisor {
    site: Arc<Site>,
    dial: Dial,
    events: broadcast::Receiver<Event>,
    served: Vec<Served>,
    /// The end of what looks after the connection that there is.
    lost: CancellationToken,
}

impl Supervisor {
    pub(super) fn new(site: Arc<Site>, dial: Dial) -> Self {
        let events = site.transport().events();
        Self { site, dial, events, served: Vec::new(), lost: CancellationToken::new() }
    }

    pub(super) fn serve(&mut self, id: ServiceId, service: Service) -> Result<(), Error> {
        let oneway =
            service.methods.values().filter(|(method, _)| method.oneway).map(|(method, _)| method.name.clone());
        let oneway = oneway.collect();
        self.add(Origin::Service { id: id.clone(), calls: service.calls, oneway }, &id, service)
    }

    pub(super) fn subscribe(&mut self, pattern: String, id: ServiceId, service: Service) -> Result<(), Error> {
        self.add(Origin::Subscription(pattern), &id, service)
    }

    fn add(&mut self, origin: Origin, id: &ServiceId, service: Service) -> Result<(), Error> {
        let name = match &origin {
            Origin::Service { .. } => id.to_string().into(),
            Origin::Subscription(_) => "events".into(),
        };
        let worker = Arc::new(Worker::new(id, name, service, self.site.clone())?);
        // Nobody waits for what becomes of an event.
        if matches!(origin, Origin::Service { .. }) {
            tokio::spawn(worker.clone().report_in());
        }
        self.served.push(Served { worker, origin: Arc::new(origin) });
        Ok(())
    }

    /// Begins to serve over the first connection, without the queues that cannot be reached, as those whose node is away:
    /// the state says so until their keepers have them.
    ///
    /// # Errors
    /// What the broker refuses. Nothing is consumed before all is declared: what differs from the broker's is told before
    /// any call is taken.
    pub(super) async fn start(&mut self) -> Result<(), Error> {
        let transport = self.site.transport();
        let keepers = self.keepers();
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
            return Err(Error::Broker { operation: "take replies from this server".to_owned(), reason });
        }
        transport.declare(&self.site.namespace.exchanges()).await?;
        let dead: Vec<_> = self.with_oneway_methods().map(|worker| [self.site.namespace.dead(&worker.id)]).collect();
        let dead = stream::iter(dead).map(|queue| {
            let transport = transport.clone();
            async move { reached(transport.declare(&queue)).await }
        });
        // Of those that are away tells who keeps them.
        let _: Vec<_> = dead.buffered(AT_ONCE).try_collect().await?;
        let declared = stream::iter(keepers).map(|keeper| async move {
            let queue = reached(keeper.declare()).await?;
            Ok::<_, Error>((keeper, queue))
        });
        let declared: Vec<_> = declared.buffered(AT_ONCE).try_collect().await?;
        let consumed = stream::iter(declared).map(|(keeper, queue)| async move {
            let consumer = match queue {
                Ok(queue) => reached(keeper.consume(&queue)).await?,
                Err(away) => Err(away),
            };
            Ok::<_, Error>((keeper, consumer))
        });
        // In their order, since whoever is told of an instance has to reach it.
        let consumed: Vec<_> = consumed.buffered(AT_ONCE).try_collect().await?;
        self.site.health.connected();
        for (keeper, consumer) in consumed {
            let consumer = consumer.map_err(|away| keeper.is_away(&away)).ok();
            self.while_connected(keeper.keep(consumer, None));
        }
        self.look_after();
        self.enter_ready();
        Ok(())
    }

    /// Runs until the server has drained. From the beginning of that, nothing is restored any more.
    pub(super) async fn run(mut self) {
        let (draining, drained) = (self.site.draining.clone(), self.site.drained.clone());
        loop {
            let event = tokio::select! {
                () = drained.cancelled() => return,
                event = self.events.recv() => event,
            };
            let reason = match event {
                Ok(Event::Lost(reason)) => reason,
                Err(broadcast::error::RecvError::Closed) => "it was closed".into(),
                Ok(Event::Blocked(reason)) => {
                    self.site.health.blocked(Some(reason));
                    continue;
                }
                Ok(Event::Unblocked) => {
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

    async fn reconnect(&mut self, reason: Arc<str>) {
        // What they find out from now on concerns no other connection.
        std::mem::take(&mut self.lost).cancel();
        self.site.health.disconnected();
        let lost = self.site.transport();
        tokio::spawn(async move { lost.close().await });
        let name = self.dial.label(Role::Server);
        let mut attempts = Attempts::new(self.site.health.state.clone(), name, Some(reason));
        while let Err(error) = self.connect().await {
            attempts.after(&error).await;
        }
        attempts.succeeded(&self.site.transport());
        self.enter_ready();
    }

    async fn connect(&mut self) -> Result<(), Error> {
        let transport = self.dial.connect(Role::Server).await?;
        self.events = transport.events();
        // The queues that they lead to went with the last connection.
        self.site.topology().clear();
        self.site.transports.send_replace(transport.clone());
        if let Err(error) = transport.declare(&self.site.namespace.exchanges()).await {
            transport.close().await;
            return Err(error);
        }
        self.site.health.connected();
        let (own, shared) = self.keepers().into_iter().partition(|keeper| keeper.source == Source::Instance);
        // In this order, since whoever is told of an instance has to reach it.
        for keepers in [own, shared] {
            self.first_attempts(keepers).await;
        }
        self.look_after();
        Ok(())
    }

    /// What the broker said before anybody listened counts as well.
    fn enter_ready(&self) {
        self.site.health.blocked(self.site.transport().blocked());
    }

    /// A keeper for each queue, over the connection that there is. The instances' own queues come first.
    fn keepers(&self) -> Vec<Keeper> {
        let transport = self.site.transport();
        let keeper = |at: usize, served: &Served, source: Source| {
            Keeper::new(&self.site, &transport, &served.worker, &served.origin, (at, source))
        };
        let sources = |served: &Served| match &*served.origin {
            Origin::Service { oneway, .. } if oneway.is_empty() => &[Source::Instance, Source::Calls][..],
            Origin::Service { .. } => &[Source::Instance, Source::Calls, Source::Work],
            Origin::Subscription(_) => &[Source::Events],
        };
        let mut keepers: Vec<_> = self
            .served
            .iter()
            .enumerate()
            .flat_map(|(at, served)| sources(served).iter().map(move |&source| (at, served, source)))
            .map(|(at, served, source)| keeper(at, served, source))
            .collect();
        keepers.sort_by_key(|keeper| keeper.source != Source::Instance);
        keepers
    }

    /// Looks after what is not consumed, until the connection ends.
    fn look_after(&self) {
        let transport = self.site.transport();
        self.while_connected(keep_repaired(self.site.clone(), transport.clone()));
        for worker in self.with_oneway_methods() {
            self.while_connected(keep_dead_letters(worker.clone(), transport.clone()));
        }
        let services = self.served.iter().filter(|served| matches!(*served.origin, Origin::Service { .. }));
        let workers = services.map(|served| served.worker.clone()).collect();
        self.while_connected(keep_entered(self.site.clone(), transport, workers));
    }

    /// The services that always have a queue of dead letters: those with oneway methods.
    fn with_oneway_methods(&self) -> impl Iterator<Item = &Arc<Worker>> {
        self.served.iter().filter_map(|served| match &*served.origin {
            Origin::Service { oneway, .. } if !oneway.is_empty() => Some(&served.worker),
            Origin::Service { .. } | Origin::Subscription(_) => None,
        })
    }

    /// Starts keepers, and waits for the ends of their first attempts, but not for long.
    async fn first_attempts(&self, keepers: Vec<Keeper>) {
        let attempts = keepers.into_iter().map(|keeper| {
            let (first, attempted) = oneshot::channel();
            self.while_connected(keeper.keep(None, Some(first)));
            attempted
        });
        // Whoever takes longer says so itself.
        let _ = tokio::time::timeout(PATIENCE, join_all(attempts)).await;
    }

    /// Has this go on until it has ended, or the connection is lost.
    fn while_connected(&self, looking: impl Future<Output = ()> + Send + 'static) {
        let lost = self.lost.clone();
        tokio::spawn(async move {
            tokio::select! {
                // Not one step more once it is lost.
                biased;
                () = lost.cancelled() => {}
                () = looking => {}
            }
        });
    }
}

/// What the broker answers about a queue, or why that cannot be reached now.
async fn reached<T>(answer: impl Future<Output = Result<T, Error>>) -> Result<Result<T, String>, Error> {
    match tokio::time::timeout(START_PATIENCE, answer).await {
        Ok(Ok(answer)) => Ok(Ok(answer)),
        // RabbitMQ's word for a queue whose node is away, or that has no majority.
        Ok(Err(Error::Broker { operation, reason })) if reason.starts_with("NOT_FOUND") => {
            Ok(Err(format!("could not {operation}: {reason}")))
        }
        Ok(Err(error)) => Err(error),
        Err(_) => Ok(Err(format!("no answer within {START_PATIENCE:?}"))),
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::server::Server;

    #[tokio::test]
    async fn what_looks_after_a_connection_ends_before_there_is_another() {
        let url = format!("memory://{}", Uuid::new_v4());
        let running = Server::connect(&url).await.expect("in memory").start().await.expect("it serves nothing");
        let mut supervisor = Supervisor::new(running.site.clone(), Dial::parse(&url).expect("a good address"));
        let looking = || {
            let (looks, ended) = oneshot::channel::<()>();
            (async move { drop((std::future::pending::<()>().await, looks)) }, ended)
        };
        let (first, first_ended) = looking();
        supervisor.while_connected(first);
        supervisor.reconnect("the test has it lost".into()).await;
        let (second, mut second_ended) = looking();
        supervisor.while_connected(second);
        let first_ended = tokio::time::timeout(PATIENCE, first_ended).await.expect("it has ended");
        assert!(first_ended.is_err(), "it has not come to its end");
        assert!(second_ended.try_recv().is_err_and(|error| error == oneshot::error::TryRecvError::Empty));
    }
}
