//! What a handler may know of the call it handles; calls made inside it inherit its deadline and its trace.

use std::fmt;
use std::future::Future;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::frame::{Trace, Traceparent};

tokio::task_local! {
    static CURRENT: Context;
}

/// The call being handled. Cloning is cheap; a clone may outlive the handler.
///
/// A method of a service trait may take `ctx: &Context` as its first argument; it is not part of the call's arguments.
#[derive(Clone)]
pub struct Context(Arc<Inner>);

pub(crate) struct Inner {
    pub(crate) service: Arc<str>,
    pub(crate) method: Arc<str>,
    pub(crate) instance: Arc<str>,
    pub(crate) id: Uuid,
    pub(crate) call_id: Uuid,
    pub(crate) caller: Option<Arc<str>>,
    pub(crate) user: Option<Arc<str>>,
    pub(crate) deadline: Option<Instant>,
    pub(crate) finishes: bool,
    pub(crate) redelivered: bool,
    pub(crate) attempt: u64,
    pub(crate) metadata: Vec<(String, String)>,
    /// The caller's span, and this call's, once somebody asks for it.
    pub(crate) parent: Option<Traceparent>,
    pub(crate) trace: OnceLock<Trace>,
    pub(crate) cancelled: CancellationToken,
    pub(crate) draining: CancellationToken,
    /// What the server serves, each as `name.vMAJOR`.
    pub(crate) services: Arc<[Arc<str>]>,
}

impl Context {
    pub(crate) fn new(inner: Inner) -> Self {
        Self(Arc::new(inner))
    }

    /// The context of the handler that runs this task, if one does. A task that the handler spawned has none, unless
    /// [`Context::spawn`] or [`Context::scope`] gave it one.
    #[must_use]
    pub fn current() -> Option<Self> {
        CURRENT.try_with(Self::clone).ok()
    }

    /// `future` as a part of the handling of this call, wherever it runs: calls made in it inherit the deadline and the
    /// trace, and [`Context::current`] is this. For what runs on tasks and threads of its own:
    ///
    /// ```
    /// use hopline::{Client, Context};
    /// use tokio::task::JoinSet;
    ///
    /// async fn all_of(ctx: &Context, client: &Client, ids: Vec<u64>) -> Vec<Result<String, hopline::Error>> {
    ///     // Dropped with the handler, it ends its tasks.
    ///     let mut tasks = JoinSet::new();
    ///     for id in ids {
    ///         let client = client.clone();
    ///         tasks.spawn(ctx.scope(async move { client.call("users", "name", (id,)).await }));
    ///     }
    ///     tasks.join_all().await
    /// }
    /// ```
    ///
    /// On a thread that blocks, it is [`blocking::wait(context.scope(...))`](crate::blocking::wait).
    pub fn scope<F: Future>(&self, future: F) -> impl Future<Output = F::Output> + use<F> {
        CURRENT.scope(self.clone(), future)
    }

    /// Runs `future` on a task of its own, as [`tokio::spawn`] does, within this call's [scope](Context::scope).
    ///
    /// The task goes on when the handler has ended, be it dropped, and a drain does not wait for it. Calls made in it have what
    /// is left of the caller's time, also after the reply. What is of no use then ends itself by
    /// [`Context::cancelled`]; what is to end with the handler is a [`JoinSet`](tokio::task::JoinSet) with
    /// [`Context::scope`].
    pub fn spawn<F>(&self, future: F) -> tokio::task::JoinHandle<F::Output>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        tokio::spawn(self.scope(future))
    }

    /// The same for what does not wait.
    pub(crate) fn scope_of<T>(self, part: impl FnOnce() -> T) -> T {
        CURRENT.sync_scope(self, part)
    }

    /// The service, as `name.vMAJOR`; `events` for an event.
    #[must_use]
    pub fn service(&self) -> &str {
        &self.0.service
    }

    /// The method, or the key of an event.
    #[must_use]
    pub fn method(&self) -> &str {
        &self.0.method
    }

    /// The id of the server instance that handles the call: what [`Call::to`](crate::Call::to) takes.
    #[must_use]
    pub fn instance(&self) -> &str {
        &self.0.instance
    }

    /// The id of this request: of the frame that the caller sent, to which the reply, a cancel and the log refer.
    ///
    /// It stays the same when that frame is delivered again: by the broker, by a client that lost its connection and sends it once
    /// more, or as the next [attempt](Context::attempt) of a oneway call that failed. A caller that makes the call anew, since
    /// the first request failed or is slow, sends a request with another id, and with the same [`call_id`](Context::call_id).
    #[must_use]
    pub fn request_id(&self) -> Uuid {
        self.0.id
    }

    /// The id of the call: the same in all requests that a caller sends to get this one call done, and in every delivery of
    /// each. The first request of a call has it as its own [`request_id`](Context::request_id).
    ///
    /// What must not happen twice is recorded under this id where it happens, such as by a unique key in a database. The caller
    /// chooses it: where users must not get at each other's records, the key is this and [`Context::user`].
    ///
    /// ```
    /// use hopline::{Context, Fault, Service};
    ///
    /// let charge = |ctx: Context, (cents,): (u64,)| async move {
    ///     let key = format!("{} {}", ctx.user().unwrap_or("-"), ctx.call_id());
    ///     // insert into charges (key, cents) values (...) on conflict do nothing
    ///     Ok::<_, Fault>(format!("{key}: {cents}"))
    /// };
    /// let service = Service::new("billing", 1).method("charge", charge);
    /// # let _ = service;
    /// ```
    #[must_use]
    pub fn call_id(&self) -> Uuid {
        self.0.call_id
    }

    /// The calling client, if it says who it is: the [name](crate::ClientBuilder::name) that people chose for it, if they did,
    /// a space, and the id that it gave itself, such as `billing-web a1b2c3d4e5f6`. It is what the client says, not proof.
    #[must_use]
    pub fn caller(&self) -> Option<&str> {
        self.0.caller.as_deref()
    }

    /// The user that the caller is to the broker, as the broker has verified; `None` where its message carries none, as
    /// those of clients that are not Hopline's may. Everybody who logs in as the same user is the same here.
    #[must_use]
    pub fn user(&self) -> Option<&str> {
        self.0.user.as_deref()
    }

    /// Time left until nobody waits for the reply; `None` when the call has no deadline, as oneway calls and events.
    #[must_use]
    pub fn remaining(&self) -> Option<Duration> {
        self.deadline().map(|deadline| deadline.saturating_duration_since(Instant::now()))
    }

    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.0.deadline
    }

    /// The time that calls have which are made in the handler; none if they have their own.
    pub(crate) fn inherited(&self) -> Option<Duration> {
        self.remaining().filter(|_| !self.finishes())
    }

    /// What is cancelled when the server drains that runs this handler, if it serves `service`.
    pub(crate) fn leaving(&self, service: &str) -> Option<CancellationToken> {
        let Inner { draining, services, .. } = &*self.0;
        services.iter().any(|own| **own == *service).then(|| draining.clone())
    }

    /// Whether the handler runs to its end though nobody waits any more.
    pub(crate) fn finishes(&self) -> bool {
        self.0.finishes
    }

    /// Whether the broker delivered the call before: it may have run, in whole or in part. A oneway call that shared its
    /// message with others is published anew when it has to be tried again, and then does not say so;
    /// [`Context::attempt`] does.
    #[must_use]
    pub fn redelivered(&self) -> bool {
        self.0.redelivered
    }

    /// Which attempt to run the call this is: 1 for the first. A oneway call that fails has
    /// [`Method::attempts`](crate::Method::attempts). One whose instance died counts too, and on RabbitMQ before 4.0 so does
    /// each time that a draining instance gave the call back.
    #[must_use]
    pub fn attempt(&self) -> u64 {
        self.0.attempt
    }

    /// What the caller set with [`Call::metadata`](crate::Call::metadata) under `name`.
    #[must_use]
    pub fn metadata(&self, name: &str) -> Option<&str> {
        self.0.metadata.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// The W3C `traceparent` of this call's span.
    #[must_use]
    pub fn traceparent(&self) -> String {
        self.trace().to_string()
    }

    pub(crate) fn trace(&self) -> Trace {
        let parent = || self.0.parent.as_ref().and_then(|parent| Trace::parse(parent.as_str()));
        *self.0.trace.get_or_init(|| Trace::under(parent()))
    }

    /// Whether anybody else has it.
    pub(crate) fn is_shared(&self) -> bool {
        Arc::strong_count(&self.0) > 1
    }

    /// Resolves when the caller gave up, the deadline passed, or the handler has ended, with a result too: for work handed
    /// to other tasks or threads that is of no use after it. The handler's own future is dropped by itself, unless its
    /// method [`finishes`](crate::Method::finishes): then it hears of it here and goes on. Handlers of oneway calls and events
    /// are never cancelled.
    pub async fn cancelled(&self) {
        self.0.cancelled.cancelled().await;
    }

    /// Whether that has happened. Code that runs without awaiting hears here that its caller gave up, but not of the deadline
    /// itself: that is in [`Context::remaining`].
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.0.cancelled.is_cancelled()
    }
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context")
            .field("service", &self.service())
            .field("method", &self.method())
            .field("request_id", &self.request_id())
            .field("call_id", &self.call_id())
            .field("remaining", &self.remaining())
            .finish_non_exhaustive()
    }
}

/// Resolves at an instant, if there is one.
pub(crate) async fn at(instant: Option<Instant>) {
    match instant {
        Some(instant) => tokio::time::sleep_until(instant).await,
        None => std::future::pending().await,
    }
}

/// This machine's clock, in milliseconds since 1970.
pub(crate) fn unix_millis() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
