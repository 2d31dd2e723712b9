//! Keeps a server connected: connects again when the connection is lost, and consumes again what is lost of it alone.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{broadcast, mpsc};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
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
}

pub(super) struct Supervisor {
    site: Arc<Site>,
    dial: Dial,
    events: broadcast::Receiver<Event>,
    served: Vec<Served>,
    /// Counts the connections.
    connection: u64,
    end: mpsc::UnboundedSender<Ended>,
    ends: mpsc::UnboundedReceiver<Ended>,
}

impl Supervisor {
    pub(super) fn new(site: Arc<Site>, dial: Dial) -> Self {
        let (end, ends) = mpsc::unbounded_channel();
        let events = site.transport().events();
        Self { site, dial, events, served: Vec::new(), connection: 0, end, ends }
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
        tokio::spawn(worker.clone().report_in());
        self.served.push(Served { worker, from, prefetch, own_queue: String::new() });
        Ok(())
    }

    /// Begins to serve over the first connection.
    pub(super) async fn start(&mut self) -> Result<(), Error> {
        self.attach_all().await?;
        self.site.enter(State::Ready);
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
                            self.site.enter(State::Ready);
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
        let mut attempts = Attempts::new(self.site.state.clone(), Some(reason));
        while let Err(error) = self.connect().await {
            attempts.after(&error).await;
        }
        attempts.succeeded();
        self.site.enter(State::Ready);
    }

    async fn connect(&mut self) -> Result<(), Error> {
        let transport = self.dial.connect(Role::Server).await?;
        self.events = transport.events();
        self.connection += 1;
        self.site.transports.send_replace(transport.clone());
        let attached = self.attach_all().await;
        if attached.is_err() {
            transport.close().await;
        }
        attached
    }

    async fn attach_all(&mut self) -> Result<(), Error> {
        self.site.transport().declare(&self.site.namespace.exchanges()).await?;
        for at in 0..self.served.len() {
            for &source in self.sources(at) {
                self.attach(at, source).await?;
            }
        }
        Ok(())
    }

    /// The instance's own queue first: who is told of an instance can reach it.
    fn sources(&self, at: usize) -> &'static [Source] {
        match self.served[at].from {
            From::Service(..) => &[Source::Instance, Source::Work, Source::Calls],
            From::Subscription(_) => &[Source::Events],
        }
    }

    /// Declares a queue, with all that leads to it, and starts to read it.
    async fn attach(&mut self, at: usize, source: Source) -> Result<(), Error> {
        let site = self.site.clone();
        let (namespace, instance, transport) = (&site.namespace, &*site.instance, site.transport());
        let served = &mut self.served[at];
        let (topology, queue) = match &served.from {
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
        transport.declare(&topology).await?;
        let own = topology.into_iter().filter_map(|part| match part {
            Declaration::Binding(binding) if binding.queue == served.own_queue => Some(binding),
            _ => None,
        });
        if source == Source::Instance {
            site.bindings.lock().expect("no panic while holding the bindings").insert(at, own.collect());
        }
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
        let ended = Ended { connection: self.connection, served: at, source };
        let report = Report { ended, queue, to: self.end.clone(), stop: stop.clone() };
        tasks.spawn(served.worker.clone().run(consumer, transport, source, stop.clone(), report));
        Ok(())
    }

    /// Consumes a queue again that is gone, or that the broker has ended the consumer of.
    async fn repair(&mut self, ended: Ended) {
        match self.attach(ended.served, ended.source).await {
            Ok(()) => {}
            // Another connection is on its way, or tried with the next event.
            Err(Error::Disconnected { .. }) => {}
            Err(error) => {
                warn!(%error, "a queue that is gone cannot be consumed again yet");
                let again = self.end.clone();
                tokio::spawn(async move {
                    tokio::time::sleep(RETRY).await;
                    // Nobody listens once the server is gone.
                    let _ = again.send(ended);
                });
            }
        }
    }
}

/// Reports the end of a queue when it is dropped, be it by a panic of the task that reads it, unless that was told to stop.
pub(super) struct Report {
    ended: Ended,
    queue: String,
    to: mpsc::UnboundedSender<Ended>,
    stop: CancellationToken,
}

impl Drop for Report {
    fn drop(&mut self) {
        if !self.stop.is_cancelled() {
            debug!(queue = self.queue, "no more comes from a queue");
            // Nobody listens once the server is gone.
            let _ = self.to.send(self.ended);
        }
    }
}
