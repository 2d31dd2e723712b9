//! The worker of one service. It takes each message apart, and brings its calls on their way. The steps are in files of
//! their own: admit, dispatch, handling, outcome.

use std::collections::BTreeMap;
use std::fmt;
use std::mem;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::Site;
use super::admit::Taken;
use super::bulkhead::Bulkhead;
use super::calls::Calls;
use super::claims::Claims;
use super::copies::Copies;
use super::dead_letters::DeadQueue;
use super::dedup::Dedup;
#[cfg(feature = "metrics")]
use super::measured::MeasuredService;
use super::message::{Message, Source};
use super::reading::Reading;
use super::served_method::ServedMethod;
use super::served_queue::ServedQueue;
use super::tap::Taps;
use super::turns::EventTurns;
use super::ward::Ward;
use crate::error::Error;
use crate::frame::{self, Frame, Kind};
use crate::middleware::{Chain, ServerPolicy};
use crate::outgoing::{MAX_BYTES, Share};
use crate::service::{EVENT, Service};
use crate::topology::{ServiceId, check_name};
use crate::transport::{Consumer, Delivery};

/// Runs the calls of one service, whichever queue they come from. A subscription has a worker too.
pub(super) struct Worker {
    pub(super) id: ServiceId,
    /// The service's name for handlers and in the log: `name.vMAJOR`, `group:NAME`, or `events` for a subscription without a
    /// group.
    pub(super) name: Arc<str>,
    pub(super) service: Service,
    pub(super) site: Arc<Site>,
    /// The middleware of the server, and inside of it that of the service.
    pub(super) middleware: Chain,
    /// Whether there are policies among the middleware.
    pub(super) is_governed: bool,
    /// `Some` with a quarantine.
    pub(super) ward: Option<Ward>,
    /// Where the calls of methods run that have no bulkhead of their own.
    pub(super) bulkhead: Bulkhead,
    prefetch: AtomicU16,
    /// How many calls run at once at most, of all methods.
    runs: usize,
    /// The instance's own queue, where it is asked and told.
    own_queue: Mutex<Arc<str>>,
    calls: Arc<Mutex<Calls>>,
    /// The calls of methods that run a call once, and reply to it again without running it.
    dedup: Mutex<Dedup<(Frame, Arc<Message>)>>,
    claims: Mutex<Claims>,
    /// The turns of events that are ordered.
    turns: Mutex<EventTurns>,
    /// `Some` once the server has moved to another connection.
    copies: Mutex<Option<Copies>>,
    pub(super) dead_queue: DeadQueue,
    /// Cancelled when the server drains or has unsubscribed from these events: no more are taken.
    pub(super) ending: CancellationToken,
    /// Cancelled when the server has drained, or what was taken before it unsubscribed has ended.
    pub(super) ended: CancellationToken,
    /// The tasks that read queues of its service, but the instance's own. Each waits for the calls that it started.
    pub(super) read: TaskTracker,
    /// Who is told of the calls that run here.
    pub(super) taps: Taps,
    pub(super) methods: BTreeMap<String, Arc<ServedMethod>>,
    /// What answers the calls of all other methods.
    pub(super) fallback: Option<Arc<ServedMethod>>,
    #[cfg(feature = "schema")]
    pub(super) schema: std::sync::OnceLock<crate::document::ServiceSchema>,
    #[cfg(feature = "metrics")]
    pub(super) measured: MeasuredService,
}

impl Worker {
    pub(super) fn new(id: &ServiceId, name: Arc<str>, mut service: Service, site: Arc<Site>) -> Result<Self, Error> {
        let has_oneway = service.methods.values().any(|(method, _)| method.oneway);
        let calls = Arc::<Mutex<Calls>>::default();
        site.calls.lock().expect("no panic while holding what is served").push(calls.clone());
        let middleware = site.middleware.around(&service.middleware);
        let adaptive = middleware.policies().find_map(ServerPolicy::adaptive);
        service.concurrency = adaptive.map_or(service.concurrency, |adaptive| adaptive.range.max);
        let bulkhead = Bulkhead::of_service(id, &service, adaptive, site.rules.is_some())?;
        if let Some(rules) = &site.rules {
            rules.govern(&name, &bulkhead.places, usize::MAX);
        }
        let served = |method, handler, bulkhead| Arc::new(ServedMethod::new(method, handler, bulkhead));
        let fallback = service.fallback.take().map(|(method, handler)| served(method, handler, None));
        let (mut methods, mut runs, mut beside) = (BTreeMap::new(), service.concurrency, 0_usize);
        for (method_name, (method, handler)) in mem::take(&mut service.methods) {
            let own = bulkhead.of_method(id, &service, &method, site.rules.is_some())?;
            if let (Some(rules), Some(own)) = (&site.rules, own.as_ref().filter(|own| own.runs_beside() > 0)) {
                rules.govern(&name, &own.places, own.runs_beside());
            }
            runs = runs.saturating_add(own.as_ref().map_or(0, Bulkhead::runs_beside));
            beside = beside.saturating_add(own.as_ref().map_or(0, Bulkhead::holds_beside));
            methods.insert(method_name, served(method, handler, own));
        }
        let quarantine = middleware.policies().find_map(ServerPolicy::quarantine).filter(|_| !id.is_group());
        let ward = quarantine.map(Ward::of);
        let (ending, ended) = (site.draining.child_token(), site.drained.child_token());
        let is_governed = middleware.policies().next().is_some();
        let looks_ahead = middleware.policies().any(ServerPolicy::looks_ahead);
        Ok(Self {
            id: id.clone(),
            name,
            prefetch: AtomicU16::new(messages(service.prefetched(looks_ahead).saturating_add(beside))),
            runs,
            own_queue: Mutex::new(Arc::default()),
            bulkhead,
            methods,
            fallback,
            middleware,
            is_governed,
            ward,
            service,
            site,
            calls,
            dedup: Mutex::default(),
            claims: Mutex::default(),
            turns: Mutex::default(),
            copies: Mutex::default(),
            dead_queue: DeadQueue::new(has_oneway),
            ending,
            ended,
            read: TaskTracker::new(),
            #[cfg(feature = "schema")]
            schema: std::sync::OnceLock::new(),
            taps: Taps::default(),
            #[cfg(feature = "metrics")]
            measured: MeasuredService::default(),
        })
    }

    /// How many messages of each queue may be unacknowledged at once.
    pub(super) fn prefetch(&self) -> u16 {
        self.prefetch.load(Ordering::Relaxed)
    }

    /// Lowers the prefetch to the number of calls that run at once. Called when the broker has taken messages back that
    /// waited here for too long.
    pub(super) fn holds_no_more_than_it_runs(&self) {
        self.prefetch.fetch_min(messages(self.runs), Ordering::Relaxed);
    }

    /// What is cancelled when a queue with such messages is not to be consumed any more. An instance's own queue is
    /// consumed until the drain has ended, since cancels arrive there.
    pub(super) fn end_of(&self, source: Source) -> CancellationToken {
        match source {
            Source::Calls | Source::Work | Source::Events => self.ending.clone(),
            Source::Instance => self.ended.clone(),
        }
    }

    /// Whether the server has unsubscribed from its events.
    pub(super) fn has_left(&self) -> bool {
        self.ending.is_cancelled() && !self.site.draining.is_cancelled()
    }

    /// Sets the name of the instance's own queue. The queue has a new name on each connection.
    pub(super) fn answers_at(&self, queue: &str) {
        *self.own_queue.lock().expect("no panic while holding a name") = queue.into();
    }

    /// Reads one queue until it is told to stop or the queue is gone. Then it waits for the calls that it has started.
    pub(super) async fn run(
        self: Arc<Self>,
        mut consumer: Consumer,
        reading: Arc<Reading>,
        queue: Arc<ServedQueue>,
        stop: CancellationToken,
    ) {
        // Whoever waits for that hears of it, be it by a panic.
        let reader = consumer.life.reader();
        let tasks = TaskTracker::new();
        let mut stopped = false;
        loop {
            let delivery = tokio::select! {
                biased;
                () = stop.cancelled(), if !stopped => {
                    if self.leaves_in_order(queue.source()) && self.site.draining.is_cancelled() {
                        // The broker gives the next instance what is here when the connection ends. If the consumer ended
                        // before, the next one would get later events before these, and while earlier ones run.
                        break;
                    }
                    if queue.source() == Source::Calls && queue.is_quorum() {
                        consumer.cancel_when_full();
                        tasks.spawn(self.clone().fill(reading.transport.clone(), consumer.life.clone()));
                    } else {
                        consumer.cancel();
                    }
                    stopped = true;
                    continue;
                }
                delivery = consumer.next() => delivery,
            };
            let Some(delivery) = delivery else { break };
            self.deliver(delivery, &reading, &queue, &tasks).await;
        }
        drop(reader);
        tasks.close();
        tasks.wait().await;
        if self.leaves_in_order(queue.source()) {
            tokio::spawn(async move { consumer.ended().await });
        }
    }

    /// Decodes a message, and decides about each of its frames.
    pub(super) async fn deliver(
        self: &Arc<Self>,
        delivery: Delivery,
        reading: &Reading,
        queue: &ServedQueue,
        tasks: &TaskTracker,
    ) {
        let (max_size, source) = (self.site.max_size, queue.source());
        let too_large = || vec![Err(frame::too_large(&delivery.body, max_size))];
        // Its sender may put frames together that are small enough each.
        let mut frames: Vec<_> = match delivery.body.len() {
            size if size > max_size.max(MAX_BYTES) => too_large(),
            _ => {
                let mut frames = Vec::with_capacity(frame::likely_count(&delivery.body));
                frames.extend(frame::decode(delivery.body.clone()));
                frames
            }
        };
        if frames.len() == 1 && delivery.body.len() > max_size {
            frames = too_large();
        }
        let (transport, token) = (reading.transport.clone(), tasks.token());
        let message = Arc::new(Message::new(delivery, transport, source, frames.len(), token));
        if source == Source::Work && message.frames > 1 {
            self.claims().share(&message);
        }
        #[cfg(feature = "metrics")]
        self.site.health.link.received.add(message.frames);
        // The calls that have a place start together.
        let (mut together, mut asked) = (Vec::with_capacity(frames.len()), Vec::new());
        let mut work = Share::default();
        for frame in frames {
            match frame {
                Ok(frame) if self.takes_turns(&frame, &message, tasks) => {}
                Ok(frame) if queue.is_own() && self.is_copy(&frame, &message, reading) => message.finish(),
                Ok(frame) => match self.take(frame, &message, None, tasks) {
                    Some(Taken::Run(job)) if self.is_too_much(&job, &mut work) => {
                        tasks.spawn(self.clone().give_back(job));
                    }
                    Some(Taken::Run(job)) => match self.place_at_once(&job) {
                        Some(place) if job.served.bulkhead.is_none() && !self.bulkhead.is_inline() => {
                            together.push((job, place));
                        }
                        place => self.dispatch(job, place, &mut together, tasks).await,
                    },
                    Some(Taken::Ask(job)) => asked.push(job),
                    None => {}
                },
                Err(error) => drop(tasks.spawn(self.clone().refuse_rest(error, message.clone()))),
            }
        }
        self.start(together, tasks);
        if !asked.is_empty() {
            tasks.spawn(self.clone().ask_first(asked));
        }
    }

    /// Whether this frame has already come over another connection. While a server moves it reads both connections, and
    /// a message through an exchange reaches its queues on both. This also notices the mark that no more copies come.
    fn is_copy(&self, frame: &Frame, message: &Message, reading: &Reading) -> bool {
        self.copies().as_mut().is_some_and(|copies| match message.exchange.is_empty() {
            true => copies.is_last(frame.id),
            false => copies.is_copy(reading.connection, frame.kind, frame.id),
        })
    }

    /// The method that a frame calls. `None` if the service has no such method.
    pub(super) fn method(&self, frame: &Frame) -> Option<&Arc<ServedMethod>> {
        let name = match (frame.kind, &self.service.pattern) {
            (Kind::Event, _) => EVENT,
            // Nobody calls a subscription.
            (_, Some(_)) => return None,
            (_, None) => frame.metadata.method.as_deref()?,
        };
        // The questions of discovery have names that no method can have.
        let fallback = || self.fallback.as_ref().filter(|_| check_name("method", name).is_ok());
        self.methods.get(name).or_else(fallback)
    }

    /// All methods, and what answers the calls of others.
    pub(super) fn all_methods(&self) -> impl Iterator<Item = &Arc<ServedMethod>> {
        self.methods.values().chain(&self.fallback)
    }

    pub(super) fn dedup(&self) -> MutexGuard<'_, Dedup<(Frame, Arc<Message>)>> {
        self.dedup.lock().expect("no panic while holding the answers")
    }

    pub(super) fn claims(&self) -> MutexGuard<'_, Claims> {
        self.claims.lock().expect("no panic while holding the claims")
    }

    pub(super) fn turns(&self) -> MutexGuard<'_, EventTurns> {
        self.turns.lock().expect("no panic while holding the turns")
    }

    pub(super) fn copies(&self) -> MutexGuard<'_, Option<Copies>> {
        self.copies.lock().expect("no panic while holding the copies")
    }

    /// The name of the instance's own queue.
    pub(super) fn own_queue(&self) -> Arc<str> {
        self.own_queue.lock().expect("no panic while holding a name").clone()
    }

    pub(super) fn calls(&self) -> MutexGuard<'_, Calls> {
        self.calls.lock().expect("no panic while holding the calls")
    }
}

impl fmt::Debug for Worker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Worker").field("service", &self.service).finish_non_exhaustive()
    }
}

/// So many messages, as the broker counts them.
fn messages(count: usize) -> u16 {
    u16::try_from(count).unwrap_or(u16::MAX)
}
