//! Keeps a server connected: connects again when the connection is lost, and consumes again what is lost of it alone.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{broadcast, mpsc};
use tokio::time::Instant;
use tracing::{debug, warn};

use super::Site;
use super::message::Source;
use super::worker::Worker;
use crate::client::short_id;
use crate::error::Error;
use crate::service::Service;
use crate::state::{Attempts, State};
use crate::topology::{CallsQueue, Declaration, ServiceId};
use crate::transport::{Dial, Event, Mode, Role};

/// How long after a queue that cannot be consumed again it is tried once more.
const RETRY: Duration = Duration::from_secs(1);

/// How long the broker may take over one that is to be consumed again, while others wait for their turn.
const PATIENCE: Duration = Duration::from_secs(3);

/// A worker, and where its messages come from.
struct Served {
    worker: Arc<Worker>,
    from: From,
    prefetch: u16,
    /// Its own queue, which has another name each time.
    own_queue: String,
}

enum From {
    Service(ServiceId, CallsQueue),
    Subscription(String),
}

/// A queue of which no more comes, though nobody said so.
#[derive(Clone, Copy)]
struct Ended {
    /// The number of its connection.
    connection: u64,
    served: usize,
    source: Source,
    /// Its connection was new, and the queue may take longer than that to come back, while calls are served.
    may_take_longer: bool,
}

/// A queue that could not be consumed again, so far.
struct Missing {
    attempts: u32,
    since: Instant,
    reason: Arc<str>,
}

pub(super) struct Supervisor {
    site: Arc<Site>,
    dial: Dial,
    events: broadcast::Receiver<Event>,
    served: Vec<Served>,
    /// Counts the connections.
    connection: u64,
    /// Queues of this connection of which nothing is served for now.
    missing: BTreeMap<(usize, Source), Missing>,
    end: mpsc::UnboundedSender<Ended>,
    ends: mpsc::UnboundedReceiver<Ended>,
}

impl Supervisor {
    pub(super) fn new(site: Arc<Site>, dial: Dial) -> Self {
        let (end, ends) = mpsc::unbounded_channel();
        let events = site.transport().events();
        Self { site, dial, events, served: Vec::new(), connection: 0, missing: BTreeMap::new(), end, ends }
    }

    pub(super) fn serve(&mut self, id: ServiceId, service: Service) -> Result<(), Error> {
        self.add(From::Service(id.clone(), service.calls), &id, service)
    }

    pub(super) fn subscribe(&mut self, pattern: String, id: ServiceId, service: Service) -> Result<(), Error> {
        self.add(From::Subscription(pattern), &id, service)
    }

    fn add(&mut self, from: From, id: &ServiceId, service: Service) -> Result<(), Error> {
        let prefetch = service.prefetch;
        let worker = Arc::new(Worker::new(id, service, self.site.clone())?);
        // Nobody waits for what becomes of an event.
        if matches!(from, From::Service(..)) {
            tokio::spawn(worker.clone().report_in());
        }
        self.served.push(Served { worker, from, prefetch, own_queue: String::new() });
        Ok(())
    }

    /// Begins to serve over the first connection.
    pub(super) async fn start(&mut self) -> Result<(), Error> {
        self.attach_all().await?;
        self.enter_ready();
        Ok(())
    }

    /// Runs until the server has drained. From the beginning of that, nothing is restored any more.
    pub(super) async fn run(mut self) {
        let (draining, drained) = (self.site.draining.clone(), self.site.drained.clone());
        loop {
            tokio::select! {
                () = drained.cancelled() => return,
                event = self.events.recv() => {
                    let reason = match event {
                        Ok(Event::Lost(reason)) => reason,
                        Err(broadcast::error::RecvError::Closed) => "it was closed".into(),
                        Ok(Event::Blocked(reason)) => {
                            self.site.enter(State::Blocked { reason, since: Instant::now() });
                            continue;
                        }
                        Ok(Event::Unblocked) => {
                            self.site.enter(self.served_state());
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
                Some(ended) = self.ends.recv() => {
                    if ended.connection == self.connection && !draining.is_cancelled() {
                        self.repair(ended).await;
                    }
                }
            }
        }
    }

    async fn reconnect(&mut self, reason: Arc<str>) {
        let lost = self.site.transport();
        tokio::spawn(async move { lost.close().await });
        let mut attempts = Attempts::new(self.site.state.clone(), self.dial.label(Role::Server), Some(reason));
        while let Err(error) = self.connect().await {
            attempts.after(&error).await;
        }
        attempts.succeeded();
        self.enter_ready();
    }

    /// What the broker said before anybody listened counts as well.
    fn enter_ready(&self) {
        self.site.enter(match self.site.transport().blocked() {
            Some(reason) => State::Blocked { reason, since: Instant::now() },
            None => self.served_state(),
        });
    }

    /// Ready, unless a queue is missing: of several, the one that has been for the longest time is told.
    fn served_state(&self) -> State {
        match self.missing.values().min_by_key(|missing| missing.since) {
            Some(Missing { attempts, since, reason }) => {
                State::Reconnecting { attempt: *attempts, since: *since, reason: reason.clone() }
            }
            None => State::Ready,
        }
    }

    async fn connect(&mut self) -> Result<(), Error> {
        let transport = self.dial.connect(Role::Server).await?;
        self.events = transport.events();
        self.connection += 1;
        self.missing.clear();
        // The queues that they lead to went with the last connection.
        self.site.bindings.lock().expect("no panic while holding the bindings").clear();
        self.site.transports.send_replace(transport.clone());
        let attached = self.attach_what_is_there().await;
        if attached.is_err() {
            transport.close().await;
        }
        attached
    }

    /// The same as [`Self::attach_all`], but for queues that may take longer than their broker to come back: those of
    /// oneway calls, which wait for the leader of their replicas. Calls are not to wait for them.
    async fn attach_what_is_there(&mut self) -> Result<(), Error> {
        self.site.transport().declare(&self.site.namespace.exchanges()).await?;
        let sources = |this: &Self, at: usize| this.sources(at).iter().map(move |&source| (at, source));
        let (work, others): (Vec<_>, Vec<_>) =
            (0..self.served.len()).flat_map(|at| sources(self, at)).partition(|(_, source)| *source == Source::Work);
        for (at, source) in others {
            self.attach(at, source).await?;
        }
        for (served, source) in work {
            self.repair(Ended { connection: self.connection, served, source, may_take_longer: true }).await;
        }
        Ok(())
    }

    async fn attach_all(&mut self) -> Result<(), Error> {
        self.site.transport().declare(&self.site.namespace.exchanges()).await?;
        for at in 0..self.served.len() {
            // What differs from the broker's is told before any call is taken.
            self.site.transport().declare(&self.lasting(at)).await?;
            for &source in self.sources(at) {
                self.attach(at, source).await?;
            }
        }
        Ok(())
    }

    /// What a service has at the broker whichever instances run: all but the instance's own queue.
    fn lasting(&self, at: usize) -> Vec<Declaration> {
        let Site { namespace, instance, .. } = &*self.site;
        match &self.served[at].from {
            From::Service(id, calls) => {
                let mut topology = namespace.service(id, "", instance, *calls);
                topology.retain(|part| queue_of(part) != Some(""));
                topology
            }
            From::Subscription(_) => Vec::new(),
        }
    }

    /// Declares the queue of dead letters again, if its node is there. Nobody waits longer for that: without it oneway
    /// calls run all the same, and where only its node is away it comes back with that.
    async fn restore_dead_letters(&self, at: usize) {
        let From::Service(id, _) = &self.served[at].from else { return };
        let dead = self.site.namespace.dead_queue(id);
        let mut topology = self.lasting(at);
        topology.retain(|part| queue_of(part) == Some(&*dead));
        match tokio::time::timeout(PATIENCE, self.site.transport().declare(&topology)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => warn!(queue = dead, %error, "dead letters have no queue"),
            Err(_) => warn!(queue = dead, "the broker does not say whether dead letters have their queue"),
        }
    }

    /// The instance's own queue first: who is told of an instance can reach it.
    fn sources(&self, at: usize) -> &'static [Source] {
        match self.served[at].from {
            From::Service(..) => &[Source::Instance, Source::Calls, Source::Work],
            From::Subscription(_) => &[Source::Events],
        }
    }

    /// Declares a queue, with all that leads to it, and starts to read it.
    async fn attach(&mut self, at: usize, source: Source) -> Result<(), Error> {
        let site = self.site.clone();
        let (namespace, instance, transport) = (&site.namespace, &*site.instance, site.transport());
        let served = &mut self.served[at];
        let (mut topology, queue) = match &served.from {
            From::Service(id, calls) => {
                if source == Source::Instance {
                    served.own_queue = namespace.instance_queue(id, instance, &short_id());
                }
                let queue = match source {
                    Source::Calls => namespace.calls_queue(id),
                    Source::Work => namespace.work_queue(id),
                    Source::Instance | Source::Events => served.own_queue.clone(),
                };
                (namespace.service(id, &served.own_queue, instance, *calls), queue)
            }
            From::Subscription(pattern) => {
                served.own_queue = namespace.events_queue(instance, &short_id());
                (namespace.subscription(&served.own_queue, pattern), served.own_queue.clone())
            }
        };
        // The service's other queues are another matter: each may be on a node that is away.
        topology.retain(|part| queue_of(part).is_none_or(|name| name == queue));
        if matches!(source, Source::Instance | Source::Events) {
            let own = topology.iter().filter_map(|part| match part {
                Declaration::Binding(binding) if binding.queue == served.own_queue => Some(binding.clone()),
                _ => None,
            });
            let earlier = site.bindings.lock().expect("no panic while holding the bindings").insert(at, own.collect());
            if let Some(earlier) = earlier {
                // To a queue that is gone, or of an attempt that was given up: nobody reads it.
                let transport = transport.clone();
                tokio::spawn(async move { transport.unbind(&earlier).await });
            }
        }
        transport.declare(&topology).await?;
        // The instance's queue dies with it: nothing there could be redelivered, and cancels must not wait.
        let mode = match source {
            Source::Instance => Mode::NoAck,
            Source::Calls | Source::Work | Source::Events => Mode::Settle { prefetch: served.prefetch },
        };
        let consumer = transport.consume(&queue, mode).await?;
        let (tasks, stop) = match source {
            Source::Instance => (&site.own, &site.drained),
            Source::Calls | Source::Work | Source::Events => (&site.shared, &site.draining),
        };
        let ended = Ended { connection: self.connection, served: at, source, may_take_longer: false };
        // A worker whose places are all taken reads on when one is free: it is not to be waited for.
        let (over, told, to) = (consumer.ended.clone(), stop.clone(), self.end.clone());
        tokio::spawn(async move {
            tokio::select! {
                () = told.cancelled() => {}
                () = over.cancelled() => {
                    debug!(queue, "no more comes from a queue");
                    // Nobody listens once the server is gone.
                    let _ = to.send(ended);
                }
            }
        });
        tasks.spawn(served.worker.clone().run(consumer, transport, source, stop.clone()));
        Ok(())
    }

    /// Consumes a queue again that is gone, or that the broker has ended the consumer of.
    async fn repair(&mut self, ended: Ended) {
        let attached = tokio::time::timeout(PATIENCE, self.attach(ended.served, ended.source)).await;
        let silent = || Error::Broker {
            operation: "consume a queue again".to_owned(),
            reason: format!("it gave no answer within {PATIENCE:?}"),
        };
        match attached.unwrap_or_else(|_| Err(silent())) {
            Ok(()) => {
                if self.missing.remove(&(ended.served, ended.source)).is_some() {
                    self.tell();
                }
                if ended.source == Source::Work {
                    self.restore_dead_letters(ended.served).await;
                }
            }
            // Another connection is on its way, or tried with the next event.
            Err(Error::Disconnected { .. }) => {}
            Err(error) => {
                warn!(%error, "a queue cannot be consumed again yet");
                // Time alone does not change a queue's arguments.
                if !ended.may_take_longer || matches!(error, Error::Mismatch { .. }) {
                    self.note_missing(ended, &error);
                }
                let again = self.end.clone();
                tokio::spawn(async move {
                    tokio::time::sleep(RETRY).await;
                    // Nobody listens once the server is gone.
                    let _ = again.send(ended);
                });
            }
        }
    }

    /// Notes that an attempt to consume a queue again has failed.
    fn note_missing(&mut self, queue: Ended, error: &Error) {
        let new = || Missing { attempts: 0, since: Instant::now(), reason: Arc::default() };
        let missing = self.missing.entry((queue.served, queue.source)).or_insert_with(new);
        missing.attempts = missing.attempts.saturating_add(1);
        missing.reason = error.to_string().into();
        self.tell();
    }

    /// Tells whether all is served, unless there is something worse to tell: that the broker takes nothing.
    fn tell(&self) {
        if self.site.transport().blocked().is_none() {
            self.site.enter(self.served_state());
        }
    }
}

/// The queue that a part is, or leads to.
fn queue_of(part: &Declaration) -> Option<&str> {
    match part {
        Declaration::Queue(queue) => Some(&queue.name),
        Declaration::Binding(binding) => Some(&binding.queue),
        Declaration::Exchange(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::{Running, Server};
    use crate::topology::{Queue, QueueKind};
    use crate::transport::{DialSettings, Transport};

    /// A server, the supervisor of a service that it does not serve yet, and their address.
    async fn unserved() -> (Running, Supervisor, String) {
        let url = format!("memory://{}", uuid::Uuid::new_v4());
        let running = Server::connect(&url).await.expect("in memory").start().await.expect("it serves nothing");
        let dial = DialSettings::default().dial(&url).expect("an address");
        let mut supervisor = Supervisor::new(running.site.clone(), dial);
        supervisor.serve(work(), Service::new("work", 1)).expect("no threads of its own");
        (running, supervisor, url)
    }

    fn work() -> ServiceId {
        ServiceId::parse("work").expect("a name")
    }

    const CALLS: Ended = Ended { connection: 0, served: 0, source: Source::Calls, may_take_longer: false };

    #[tokio::test(start_paused = true)]
    async fn a_queue_that_cannot_be_consumed_again_is_told_until_it_can() {
        let (running, supervisor, _) = unserved().await;
        let name = running.site.namespace.calls_queue(work());
        let long = Duration::from_secs(10);
        let other = Queue { expires: Some(long), max_length: Some(7), ..Queue::new(&name, QueueKind::Classic) };
        running.site.transport().declare(&[Declaration::Queue(other)]).await.expect("a new queue");
        supervisor.end.send(CALLS).expect("it listens");
        tokio::spawn(supervisor.run());

        let mut state = running.state();
        let again = state.wait_for(|state| matches!(state, State::Reconnecting { attempt: 3, .. }));
        let again = tokio::time::timeout(long, again).await.expect("it is told").expect("it runs").clone();
        assert!(matches!(again, State::Reconnecting { reason, .. } if reason.contains(&name)));
        let ready = state.wait_for(|state| *state == State::Ready);
        tokio::time::timeout(2 * long, ready).await.expect("the queue is gone").expect("it runs");
    }

    #[tokio::test]
    async fn a_queue_that_is_consumed_again_at_once_is_not_told() {
        let (running, mut supervisor, _) = unserved().await;
        let state = running.state();
        supervisor.repair(CALLS).await;
        let queue = running.site.namespace.calls_queue(work());
        assert_eq!(running.site.transport().count(&queue).await.expect("not closed"), Some(0));
        assert!(!state.has_changed().expect("it runs"), "{:?}", *state.borrow());
    }

    #[tokio::test]
    async fn a_work_queue_that_is_not_back_with_its_connection_is_told_only_if_it_is_another() {
        let (running, mut supervisor, url) = unserved().await;
        let name = running.site.namespace.work_queue(work());
        let ended = Ended { source: Source::Work, may_take_longer: true, ..CALLS };
        // A queue that is locked stands for one without its leader.
        let owner = Transport::connect(&url, Role::Client).await.expect("in memory");
        let locked = Declaration::Queue(Queue::new(&name, QueueKind::Exclusive));
        owner.declare(&[locked]).await.expect("a new queue");
        supervisor.repair(ended).await;
        assert_eq!(*running.state().borrow(), State::Ready);
        owner.close().await;
        let other = Declaration::Queue(Queue { max_length: Some(7), ..Queue::new(&name, QueueKind::Quorum) });
        running.site.transport().declare(&[other]).await.expect("a new queue");
        supervisor.repair(ended).await;
        let state = running.state().borrow().clone();
        assert!(
            matches!(&state, State::Reconnecting { attempt: 1, reason, .. } if reason.contains(&name)),
            "{state:?}"
        );
    }
}
