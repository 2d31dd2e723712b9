//! The serving side: connects, declares what it serves, runs it, and drains.

mod calls;
mod handling;
mod message;
mod outcome;
mod replies;
mod worker;

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::runtime::Handle;
use tokio::sync::{broadcast, mpsc};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, info};

use self::message::Source;
use self::replies::Replies;
use self::worker::{EVENT, Worker};
use crate::client::{MAX_MESSAGE_SIZE, short_id};
use crate::context::Context;
use crate::error::Error;
use crate::service::{Dispatch, Failure, Method, Service};
use crate::topology::{Binding, Declaration, Namespace, ServiceId};
use crate::transport::{Consumer, Event, Mode, Role, Transport};

/// How many events an instance holds unsettled, of each subscription.
const EVENTS_PREFETCH: u16 = 64;

/// Serves any number of services over one connection for each direction.
///
/// ```
/// use hopline::{Context, Fault, Server};
///
/// # async fn example() -> Result<(), hopline::Error> {
/// let server = Server::connect("memory://").await?
///     .method("calculator.v1", "add", |_: Context, (a, b): (i64, i64)| async move { Ok::<_, Fault>(a + b) });
/// server.run_until(std::future::ready(())).await?;
/// # Ok(()) }
/// ```
pub struct Server {
    transport: Transport,
    settings: ServerBuilder,
    instance: Arc<str>,
    services: Vec<Service>,
    subscriptions: Vec<(String, Service)>,
}

/// What a server may be told before it connects.
#[derive(Debug, Clone)]
pub struct ServerBuilder {
    namespace: Result<Namespace, String>,
    max_message_size: usize,
}

impl Default for ServerBuilder {
    fn default() -> Self {
        Self { namespace: Ok(Namespace::default()), max_message_size: MAX_MESSAGE_SIZE }
    }
}

impl ServerBuilder {
    /// The prefix of every name on the broker, `[A-Za-z0-9_-]+`: clients of other namespaces do not see this server.
    /// Default `hopline`.
    #[must_use]
    pub fn namespace(mut self, name: &str) -> Self {
        self.namespace = Namespace::new(name);
        self
    }

    /// The largest message to accept or send, in bytes. Default 16 MiB.
    #[must_use]
    pub fn max_message_size(mut self, bytes: usize) -> Self {
        self.max_message_size = bytes;
        self
    }

    /// Connects to the broker that `url` names: `memory://`, `amqp://` or `amqps://`.
    ///
    /// # Errors
    /// `Invalid` for an address or a setting that cannot be used, `Connect` when the broker does not answer or refuses.
    pub async fn connect(self, url: &str) -> Result<Server, Error> {
        self.namespace.clone().map_err(Error::Invalid)?;
        let transport = Transport::connect(url, Role::Server).await?;
        let instance = short_id().into();
        Ok(Server { transport, settings: self, instance, services: Vec::new(), subscriptions: Vec::new() })
    }
}

impl Server {
    /// Connects with default settings.
    ///
    /// # Errors
    /// As [`ServerBuilder::connect`].
    pub async fn connect(url: &str) -> Result<Self, Error> {
        Self::builder().connect(url).await
    }

    /// Settings to change before connecting.
    #[must_use]
    pub fn builder() -> ServerBuilder {
        ServerBuilder::default()
    }

    /// The id of this server on the broker, the same for all its services: what [`Call::to`](crate::Call::to) takes.
    #[must_use]
    pub fn instance(&self) -> &str {
        &self.instance
    }

    /// Serves a service; several, and several versions of one, stand side by side.
    #[must_use]
    pub fn serve(mut self, service: Service) -> Self {
        self.services.push(service);
        self
    }

    /// Serves one method without a service trait: `service` is `name` or `name.vMAJOR`. Methods of the same service are
    /// served together, with default settings; [`Service`] has others.
    #[must_use]
    pub fn method<A, R, E, F, Fut>(mut self, service: &str, name: &str, handler: F) -> Self
    where
        F: Fn(Context, A) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<R, E>> + Send + 'static,
        A: DeserializeOwned + Send + 'static,
        R: Serialize + Send + 'static,
        E: Failure + Send + 'static,
    {
        let id = ServiceId::parse(service);
        let known = self.services.iter().position(|known| id.is_ok() && known.id == id);
        let service = match known {
            Some(at) => self.services.remove(at),
            None => Service::with_id(id),
        };
        self.services.push(service.method(Method::new(name), handler));
        self
    }

    /// Handles the events whose key matches `pattern`, where `*` is one word between dots and `#` any number of them.
    /// [`Context::method`] is the event's key. Events reach every subscribing server that is up when they are published;
    /// each subscription handles them one after the other, in the order of one publisher.
    #[must_use]
    pub fn subscribe<T, F, Fut>(mut self, pattern: &str, handler: F) -> Self
    where
        F: Fn(Context, T) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = ()> + Send + 'static,
        T: DeserializeOwned + Send + 'static,
    {
        let handled = move |context: Context, event: T| {
            let handling = handler(context, event);
            async move {
                handling.await;
                Ok::<(), ()>(())
            }
        };
        let service = Service::new("events", 1).method(Method::new(EVENT), handled);
        let service = service.prefetch(EVENTS_PREFETCH).dispatch(Dispatch::Inline);
        self.subscriptions.push((pattern.to_owned(), service));
        self
    }

    /// Starts to serve: when this returns, the services can be called.
    ///
    /// # Errors
    /// `Invalid` for bad names and for services or methods that are there twice, `Mismatch` where a queue exists with
    /// other arguments, `Broker` for what the broker refuses, `Disconnected`.
    pub async fn start(self) -> Result<Running, Error> {
        let Self { transport, settings, instance, services, subscriptions } = self;
        let namespace = settings.namespace.map_err(Error::Invalid)?;
        let mut served = BTreeMap::new();
        for service in services {
            let id = checked(&service)?;
            if served.insert(id.clone(), service).is_some() {
                return Err(Error::Invalid(format!("the service `{id}` is served twice")));
            }
        }

        let (gone, queues_gone) = mpsc::unbounded_channel();
        transport.declare(&namespace.exchanges()).await?;
        let site = Site {
            replies: Replies::start(transport.clone(), instance.clone(), settings.max_message_size),
            transport,
            namespace,
            instance,
            max_size: settings.max_message_size,
            draining: CancellationToken::new(),
        };
        let mut running = Running {
            site: Arc::new(site),
            gone,
            queues_gone,
            shared: TaskTracker::new(),
            drained: CancellationToken::new(),
            bindings: Vec::new(),
            own: TaskTracker::new(),
            runtime: Handle::current(),
        };
        let names: Vec<String> = served.keys().map(ToString::to_string).collect();
        for (id, service) in served {
            running.serve(&id, service).await?;
        }
        for (pattern, service) in subscriptions {
            running.subscribe(&pattern, service).await?;
        }
        info!(instance = running.instance(), services = ?names, "serving");
        Ok(running)
    }

    /// Serves until `stop` resolves, then drains: running calls finish and reply, what has not started goes back to the
    /// queue, and the connection closes.
    ///
    /// # Errors
    /// As [`Server::start`], and before `stop` `Disconnected` when the connection is lost, `Broker` when a queue is.
    pub async fn run_until<S: Future>(self, stop: S) -> Result<(), Error> {
        let mut running = self.start().await?;
        tokio::select! {
            _ = stop => {
                running.drain().await;
                Ok(())
            }
            lost = running.lost() => Err(lost),
        }
    }
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server")
            .field("instance", &self.instance)
            .field("services", &self.services)
            .finish_non_exhaustive()
    }
}

fn checked(service: &Service) -> Result<ServiceId, Error> {
    let id = service.id.clone().map_err(Error::Invalid)?;
    if service.problems.is_empty() {
        return Ok(id);
    }
    Err(Error::Invalid(format!("`{id}` cannot be served: {}", service.problems.join("; "))))
}

/// A server that serves. Dropping it closes the connection at once; [`Running::drain`] is the polite way.
#[must_use = "dropping a running server ends it"]
pub struct Running {
    site: Arc<Site>,
    /// Where the tasks that read queues report one that is gone.
    gone: mpsc::UnboundedSender<String>,
    queues_gone: mpsc::UnboundedReceiver<String>,
    /// The tasks that read the shared queues; each waits for the calls it started.
    shared: TaskTracker,
    /// Those calls are done.
    drained: CancellationToken,
    /// What leads to this instance's own queues.
    bindings: Vec<Binding>,
    /// The tasks that read this instance's own queues, which tell callers until the end that it is leaving.
    own: TaskTracker,
    runtime: Handle,
}

/// What all services of a server share.
struct Site {
    transport: Transport,
    replies: Replies,
    namespace: Namespace,
    instance: Arc<str>,
    max_size: usize,
    /// No more calls are taken.
    draining: CancellationToken,
}

impl Running {
    /// The id of this server on the broker.
    #[must_use]
    pub fn instance(&self) -> &str {
        &self.site.instance
    }

    /// Takes no more calls, lets running ones finish and reply, gives back what has not started, and closes.
    ///
    /// A request has at most the time of its caller; an oneway call or an event whose handler does not end is waited for
    /// without limit, and a process that must end puts a timeout around this.
    pub async fn drain(self) {
        debug!(instance = self.instance(), "draining");
        self.site.draining.cancel();
        self.shared.close();
        self.shared.wait().await;
        // From here on, who calls this instance hears from the broker that it is not there.
        if let Err(error) = self.site.transport.unbind(&self.bindings).await {
            debug!(instance = self.instance(), %error, "the instance's queues stay bound until they are gone");
        }
        self.drained.cancel();
        self.own.close();
        self.own.wait().await;
        self.site.transport.close().await;
    }

    /// Resolves when the connection or one of the queues is lost, with the error to report: the server then takes no
    /// more calls, or not all of them.
    pub async fn lost(&mut self) -> Error {
        // Who subscribes after the end is told of it as well.
        let mut events = self.site.transport.events();
        tokio::select! {
            biased;
            error = connection_lost(&mut events) => error,
            Some(queue) = self.queues_gone.recv() => {
                // Whoever asks again is to hear it again.
                let _ = self.gone.send(queue.clone());
                // A lost connection takes the queues along, and may be heard of after them.
                let connection = connection_lost(&mut events);
                tokio::time::timeout(Duration::from_secs(1), connection).await.unwrap_or_else(|_| Error::Broker {
                    operation: format!("deliver from `{queue}`"),
                    reason: "the queue was deleted, or its consumer cancelled".to_owned(),
                })
            }
        }
    }

    async fn serve(&mut self, id: &ServiceId, service: Service) -> Result<(), Error> {
        let Site { transport, namespace, instance, .. } = &*self.site;
        let instance_queue = namespace.instance_queue(id, instance, &short_id());
        let calls_queue = namespace.calls_queue(id);
        let work_queue = namespace.work_queue(id);
        let topology = namespace.service(id, &instance_queue, instance, service.calls);
        transport.declare(&topology).await?;
        self.bindings.extend(topology.into_iter().filter_map(|part| match part {
            Declaration::Binding(binding) if binding.queue == instance_queue => Some(binding),
            _ => None,
        }));

        let settled = Mode::Settle { prefetch: service.prefetch };
        let worker = Arc::new(Worker::new(id, service, self.site.clone())?);
        // The instance's queue dies with it: nothing there could be redelivered, and cancels must not wait.
        for (queue, mode, source) in [
            (instance_queue, Mode::NoAck, Source::Instance),
            (work_queue, settled, Source::Work),
            (calls_queue, settled, Source::Calls),
        ] {
            let consumer = transport.consume(&queue, mode).await?;
            self.read(&worker, queue, consumer, source);
        }
        Ok(())
    }

    async fn subscribe(&self, pattern: &str, service: Service) -> Result<(), Error> {
        let Site { transport, namespace, instance, .. } = &*self.site;
        let queue = namespace.events_queue(instance, &short_id());
        transport.declare(&namespace.subscription(&queue, pattern)).await?;
        let consumer = transport.consume(&queue, Mode::Settle { prefetch: service.prefetch }).await?;
        let worker = Arc::new(Worker::new(&checked(&service)?, service, self.site.clone())?);
        self.read(&worker, queue, consumer, Source::Events);
        Ok(())
    }

    /// Runs a worker on one queue.
    fn read(&self, worker: &Arc<Worker>, queue: String, consumer: Consumer, source: Source) {
        let (tasks, stop) = match source {
            Source::Instance => (&self.own, &self.drained),
            Source::Calls | Source::Work | Source::Events => (&self.shared, &self.site.draining),
        };
        let reading = worker.clone().run(consumer, source, stop.clone());
        let gone = Gone { told: false, queue, report: self.gone.clone() };
        let reading = async move {
            let mut gone = gone;
            gone.told = reading.await;
        };
        tasks.spawn(reading);
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.site.draining.cancel();
        self.drained.cancel();
        let transport = self.site.transport.clone();
        self.runtime.spawn(async move { transport.close().await });
    }
}

/// Reports a queue when the task that reads it ends without having been told to, be it by a panic.
struct Gone {
    told: bool,
    queue: String,
    report: mpsc::UnboundedSender<String>,
}

impl Drop for Gone {
    fn drop(&mut self) {
        if !self.told {
            // Nobody listens once the server is dropped.
            let _ = self.report.send(std::mem::take(&mut self.queue));
        }
    }
}

/// Resolves when the connection is lost.
async fn connection_lost(events: &mut broadcast::Receiver<Event>) -> Error {
    let reason = loop {
        match events.recv().await {
            Ok(Event::Lost(reason)) => break reason,
            Ok(Event::Blocked(_) | Event::Unblocked) | Err(broadcast::error::RecvError::Lagged(_)) => {}
            Err(broadcast::error::RecvError::Closed) => break "the connection was closed".into(),
        }
    };
    Error::Disconnected { may_have_run: false, reason: reason.to_string() }
}

impl fmt::Debug for Running {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Running").field("instance", &self.instance()).finish_non_exhaustive()
    }
}
