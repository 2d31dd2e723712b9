//! The context of a call: what its handler can know about it. Calls that are made in a handler inherit its deadline and
//! trace.
//!
//! The server makes a [`Context`] for each call and runs the handler in its scope.

use std::fmt;
use std::future::Future;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};
use uuid::Uuid;

use crate::frame::{Entries, Trace, Traceparent};

tokio::task_local! {
    static CURRENT: Context;
}

/// The call that is being handled. Cloning is cheap, and a clone may outlive the handler.
///
/// A method of a service trait may take `ctx: &Context` as its first argument. It is not one of the call's arguments:
/// the server passes it.
///
/// ```
/// use hopline::{Context, Fault, Method, Service};
///
/// let whoami = |ctx: Context, _: [(); 0]| async move {
///     Ok::<_, Fault>(format!("{} calls {}.{}", ctx.user().unwrap_or("somebody"), ctx.service(), ctx.method()))
/// };
/// let service = Service::new("demo", 1).method(Method::new("whoami"), whoami);
/// # let _ = service;
/// ```
#[derive(Clone)]
pub struct Context(Arc<Inner>);

#[derive(Clone)]
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
    pub(crate) queue_time: Option<Duration>,
    pub(crate) metadata: Entries,
    /// Of an event: its version.
    pub(crate) event_version: u64,
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

    /// The context of the handler that runs on this task. `None` outside of a handler, and on a task that a handler has
    /// spawned, unless it used [`Context::spawn`] or [`Context::scope`].
    #[must_use]
    pub fn current() -> Option<Self> {
        CURRENT.try_with(Self::clone).ok()
    }

    /// Makes `future` a part of this call, on whatever task or thread it runs: calls made in it inherit the deadline
    /// and the trace, and [`Context::current`] returns this context. Use it for work on tasks and threads of its own:
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
    /// On a blocking thread, write [`blocking::wait(context.scope(...))`](crate::blocking::wait).
    pub fn scope<F: Future>(&self, future: F) -> impl Future<Output = F::Output> + use<F> {
        CURRENT.scope(self.clone(), future)
    }

    /// Runs `future` on a task of its own, as [`tokio::spawn`] does, within this call's [scope](Context::scope).
    ///
    /// The task goes on after the handler has ended or was dropped, and a drain does not wait for it. Calls that it
    /// makes have what is left of the caller's time, also after the reply. It can end itself by [`Context::cancelled`]
    /// when its work is of no more use. A task that is to end with the handler belongs in a
    /// [`JoinSet`](tokio::task::JoinSet), with [`Context::scope`].
    pub fn spawn<F>(&self, future: F) -> tokio::task::JoinHandle<F::Output>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        tokio::spawn(self.scope(future))
    }

    /// The same as [`Context::scope`], for code that does not wait.
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

    /// The id of the server instance that handles the call. [`Call::to`](crate::Call::to) accepts it.
    #[must_use]
    pub fn instance(&self) -> &str {
        &self.0.instance
    }

    /// The id of this request. It is the id of the frame that the caller sent; the reply, a cancel and the log refer to
    /// it.
    ///
    /// The id stays the same when the frame is delivered again: by the broker, by a client that lost its connection and
    /// sends it once more, or as the next [attempt](Context::attempt) of a oneway call that failed. A caller that makes
    /// the call again, since the first request failed or is slow, sends a request with another id and the same
    /// [`call_id`](Context::call_id).
    #[must_use]
    pub fn request_id(&self) -> Uuid {
        self.0.id
    }

    /// The id of the call. It is the same in all requests that a caller sends for this one call, and in every delivery
    /// of each. The first request of a call has the same id as its [`request_id`](Context::request_id).
    ///
    /// Use it as a key to record work that must not be done twice, for example as a unique key in a database. The
    /// caller chooses the id: if users must not get at each other's records, make the key of this id and
    /// [`Context::user`].
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

    /// The calling client, as it names itself; `None` if it does not. It is the [name](crate::ClientBuilder::name) that
    /// people gave it, if they did, a space, and its id: for example `billing-web a1b2c3d4e5f6`. The client could say
    /// anything here, so do not use it as a proof of who called.
    #[must_use]
    pub fn caller(&self) -> Option<&str> {
        self.0.caller.as_deref()
    }

    /// The user with whom the caller is logged in at the broker, verified by the broker. `None` if the message does not
    /// carry it: clients other than Hopline may leave it out. All callers that log in as the same user look the same
    /// here.
    #[must_use]
    pub fn user(&self) -> Option<&str> {
        self.0.user.as_deref()
    }

    /// How long the caller still waits for the reply. `None` if the call has no deadline, as with oneway calls and
    /// events.
    #[must_use]
    pub fn remaining(&self) -> Option<Duration> {
        self.deadline().map(|deadline| deadline.saturating_duration_since(Instant::now()))
    }

    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.0.deadline
    }

    /// The time that calls have which are made in this handler. `None` if they have their client's own: the call has no
    /// deadline, or its method [finishes](crate::Method::finishes).
    pub(crate) fn inherited(&self) -> Option<Duration> {
        self.remaining().filter(|_| !self.finishes())
    }

    /// The token that is cancelled when this handler's server drains, if that server serves `service`. The drain waits
    /// for this handler, and this server may have been the last with the service. So the client asks then whether there
    /// is still an instance, and otherwise ends the call.
    pub(crate) fn leaving(&self, service: &str) -> Option<CancellationToken> {
        let Inner { draining, services, .. } = &*self.0;
        services.iter().any(|own| **own == *service).then(|| draining.clone())
    }

    /// Whether the handler runs to its end even when nobody waits for it any more.
    pub(crate) fn finishes(&self) -> bool {
        self.0.finishes
    }

    /// Whether the broker has delivered the call before. Then it may have run already, completely or in part.
    ///
    /// A oneway call that shared its message with others is published again when another attempt is needed. It is a new
    /// message then, so this is `false`; [`Context::attempt`] counts such attempts as well.
    #[must_use]
    pub fn redelivered(&self) -> bool {
        self.0.redelivered
    }

    /// Which attempt to run the call this is; the first is 1. How many there are for a oneway call that fails is set
    /// with [`Method::attempts`](crate::Method::attempts). An attempt whose instance died counts as well. On RabbitMQ
    /// before 4.0, so does each time that a draining instance gave the call back.
    #[must_use]
    pub fn attempt(&self) -> u64 {
        self.0.attempt
    }

    /// How long the call waited between being sent first and the start of this handler, in whole milliseconds. `None`
    /// if the caller does not say when it sent the call.
    ///
    /// The time is the difference of two machines' clocks, and is wrong by as much as these differ. It is zero if the
    /// caller's clock is ahead. Use it for logs and statistics, and [`remaining`](Context::remaining) to decide
    /// anything.
    ///
    /// If the call was [redelivered](Context::redelivered) or is not the first [attempt](Context::attempt), it may have
    /// run elsewhere in this time.
    #[must_use]
    pub fn queue_time(&self) -> Option<Duration> {
        self.0.queue_time
    }

    /// The version of the event: 1 unless its publisher has set another. Of anything else it means nothing.
    pub(crate) fn event_version(&self) -> u64 {
        self.0.event_version
    }

    /// The value that the caller set under `name` with [`Call::metadata`](crate::Call::metadata).
    #[must_use]
    pub fn metadata(&self, name: &str) -> Option<&str> {
        self.0.metadata.get(name)
    }

    /// All metadata of the call, as names and texts in the order in which the caller set them.
    ///
    /// ```
    /// use hopline::{Context, Fault, Service};
    ///
    /// let names = |ctx: Context, (): ()| async move {
    ///     Ok::<_, Fault>(ctx.metadata_entries().map(|(name, _)| name.to_owned()).collect::<Vec<_>>())
    /// };
    /// let service = Service::new("demo", 1).method("names", names);
    /// # let _ = service;
    /// ```
    pub fn metadata_entries(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.metadata.iter()
    }

    /// The same context with the metadata that middleware has set.
    pub(crate) fn with_metadata(&self, metadata: &Entries) -> Self {
        if self.0.metadata.is_same(metadata) {
            return self.clone();
        }
        // Both are in one span, which gets its id now if it has none.
        self.trace();
        Self(Arc::new(Inner { metadata: metadata.clone(), ..Inner::clone(&self.0) }))
    }

    /// The same call, for a run that others wait for too: it is cancelled when the guard is dropped, and not with this one.
    pub(crate) fn apart(&self) -> (Self, DropGuard) {
        // Both are in one span, which gets its id now if it has none.
        self.trace();
        let cancelled = CancellationToken::new();
        let apart = Inner { cancelled: cancelled.clone(), ..Inner::clone(&self.0) };
        (Self(Arc::new(apart)), cancelled.drop_guard())
    }

    /// The W3C `traceparent` of this call's span, for headers of requests that the handler sends elsewhere.
    #[must_use]
    pub fn traceparent(&self) -> String {
        self.trace().to_string()
    }

    /// The trace of this call: a new span under the caller's. Its ids are made the first time that somebody asks.
    pub(crate) fn trace(&self) -> Trace {
        let parent = || self.0.parent.as_ref().and_then(|parent| Trace::parse(parent.as_str()));
        *self.0.trace.get_or_init(|| Trace::under(parent()))
    }

    /// Resolves [`Context::cancelled`].
    pub(crate) fn cancel(&self) {
        self.0.cancelled.cancel();
    }

    /// Whether somebody else holds this context, such as a task that the handler spawned. The server then has to tell
    /// it that the handler has ended.
    pub(crate) fn is_shared(&self) -> bool {
        Arc::strong_count(&self.0) > 1
    }

    /// Resolves when the work is of no more use: the caller gave up, the deadline passed, or the handler has ended,
    /// with or without a result. It is for work that was handed to other tasks or threads.
    ///
    /// The handler's own future is dropped in the first two cases, without hearing of it here, unless its method
    /// [finishes](crate::Method::finishes): that is told here and goes on. Handlers of oneway calls and events are
    /// never cancelled.
    pub async fn cancelled(&self) {
        self.0.cancelled.cancelled().await;
    }

    /// Whether [`Context::cancelled`] has resolved, for code that runs without awaiting. Such code hears here that its
    /// caller gave up, but not that the deadline passes: for that, look at [`Context::remaining`].
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

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// The context of an event, as its handler gets it.
    pub(crate) fn of_event(key: &str, caller: Option<&str>, event_version: u64) -> Context {
        Context::new(Inner {
            service: "events".into(),
            method: key.into(),
            instance: "b2".into(),
            id: Uuid::nil(),
            call_id: Uuid::nil(),
            caller: caller.map(Arc::from),
            user: None,
            deadline: None,
            finishes: false,
            redelivered: false,
            attempt: 1,
            queue_time: None,
            metadata: Entries::default(),
            event_version,
            parent: None,
            trace: OnceLock::new(),
            cancelled: CancellationToken::new(),
            draining: CancellationToken::new(),
            services: Arc::from([]),
        })
    }
}
