//! Middleware: code that runs around calls, the same trait on clients and servers. It is for access logs,
//! authentication, retries and limits.

mod apart;
mod adaptive;
mod breaker;
mod budget;
mod cache;
mod chain;
mod fork;
mod hedge;
mod fair_share;
mod invocation;
mod outcomes;
mod policies;
mod quarantine;
mod rate;
mod rate_limit;
mod reply;
mod result_cache;
mod retry;
mod server_policy;
mod shedding;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

pub use self::adaptive::{Adaptive, AdaptiveCounts};
pub(crate) use self::adaptive::{AdaptiveGauge, AdaptiveLimit};
pub(crate) use self::apart::{Apart, Beside};
pub use self::breaker::{Breaker, BreakerState};
pub(crate) use self::breaker::{Breakers, Passed};
pub(crate) use self::cache::CacheSize;
pub use self::chain::Next;
pub(crate) use self::chain::{Chain, NotAdmitted};
pub use self::fair_share::{FairShare, FairShareCounts};
pub use self::invocation::{Invocation, Style};
pub(crate) use self::outcomes::OutcomeWindow;
pub use self::policies::PolicyCounts;
pub(crate) use self::policies::{Asked, Policies, PolicyCounters, PolicySettings, TalliedCall};
pub use self::quarantine::{Quarantine, QuarantineCounts};
pub(crate) use self::quarantine::{QuarantineRule, QuarantineTally};
pub(crate) use self::rate::Paced;
pub use self::rate_limit::{RateCounts, RateLimit};
pub use self::reply::Reply;
pub use self::result_cache::{CacheCounts, ResultCache};
pub(crate) use self::retry::RetryOn;
pub(crate) use self::server_policy::{PacedBy, ServerPolicy};
pub use self::shedding::{ShedCounts, Shedding};
use crate::error::{Code, Error, Fault};

/// Code that runs around each call of a client, a service, or a whole server. Each of the three methods has a default
/// that changes nothing.
///
/// [`ClientBuilder::with`](crate::ClientBuilder::with) adds one to a client, [`Service::with`](crate::Service::with) to
/// a service, and [`ServerBuilder::with`](crate::ServerBuilder::with) to all services and subscriptions of a server. If
/// there are several, the first that was added is the outermost. Those of a server are around those of its services.
///
/// ```
/// use hopline::{Client, Error, Finished, Invocation, Middleware, Next, Reply};
///
/// /// Tells the servers which tenant a call is for, and prints how each call ended.
/// struct Tenant(String);
///
/// impl Middleware for Tenant {
///     async fn handle(&self, mut call: Invocation, next: Next) -> Result<Reply, Error> {
///         call.set_metadata("tenant", &self.0);
///         next.run(call).await
///     }
///
///     fn finished(&self, done: &Finished<'_>) {
///         println!("{} {}", done.call.method(), done.code);
///     }
/// }
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Error> {
/// let client = Client::builder().with(Tenant("acme".to_owned())).connect("memory://").await?;
/// # client.close().await;
/// # Ok(()) }
/// ```
pub trait Middleware: Send + Sync + 'static {
    /// Runs around a call. On a client, what is inside sends the call and waits for what comes back. On a server, it is
    /// the handler. The default only runs what is inside.
    ///
    /// `next.run(call).await` runs what is inside. It can be run several times, one after the other or at once, since
    /// an `Invocation` can be cloned. On a client, each run is an attempt with its own request id and the same
    /// [`call_id`](Invocation::call_id). Dropping the future of a run cancels that attempt: a client tells the server,
    /// and a server stops the handler at the point where it waits. If this never runs `next`, the handler does not run,
    /// and what this returns is the outcome.
    ///
    /// What comes back depends on the [style](Invocation::style). A call gives its reply. On a client, a oneway call, a
    /// broadcast and an event give an empty reply as soon as the broker has confirmed the message; the replies to a
    /// broadcast do not pass through the middleware. On a server all styles give a reply, and it is sent only if the
    /// style has one.
    ///
    /// The method's own error is `Ok(reply)` where [`Reply::is_own_error`] is true, since the method has run and
    /// returned it. Everything else is an `Err`. A server sends it as a [`Fault`]: the one in an [`Error::Fault`], or
    /// for any other error one with its [`code`](Error::code) and text. A panic is logged and becomes a fault with the
    /// code `INTERNAL`.
    ///
    /// On a server this runs within the [`Context`](crate::Context) of the call: `Context::current()` returns it, and
    /// calls that this makes inherit the deadline.
    fn handle(&self, call: Invocation, next: Next) -> impl Future<Output = Result<Reply, Error>> + Send {
        next.run(call)
    }

    /// Decides whether a server accepts a call. An `Err` refuses it. The default accepts every call. It is not called
    /// on a client.
    ///
    /// It is called as soon as the call arrives, before the call takes a place among the running calls and before its
    /// arguments are decompressed, so a refusal costs little. The [payload](Invocation::payload) is empty here. It must
    /// not block. It is also called for the questions of discovery, whose methods are `hopline.ping`, `hopline.info`,
    /// `hopline.stats`, `hopline.schema`, `hopline.tap` and `hopline.drain`.
    ///
    /// The caller of a refused request gets the fault. A refused event is dropped and logged. A oneway call that is refused
    /// with a [transient](Fault::is_transient) fault, such as one with the code `RESOURCE_EXHAUSTED`, is tried again as
    /// after an error of its handler, and becomes a dead letter after the last attempt. With any other fault it becomes a
    /// dead letter at once. A oneway call that the broker delivers again cannot be refused for now, since it may be
    /// running. A panic is logged and refuses the call with the code `INTERNAL`.
    fn admit(&self, call: &Invocation) -> Result<(), Fault> {
        let _ = call;
        Ok(())
    }

    /// Is called once when a call has ended, also if it was refused, cancelled or timed out before it ran. The default
    /// does nothing. It must not block. A panic is logged.
    ///
    /// On a server this is called each time a handler ends, so it is called several times for a oneway call that fails,
    /// or is refused for now, and is retried. It is not called for calls that a server requeues while it drains. On a
    /// client it is called once for each call, however many attempts there were. If the caller dropped the call, the
    /// code is `CANCELLED`.
    fn finished(&self, done: &Finished<'_>) {
        let _ = done;
    }

    /// What a policy of this crate does at other steps of a call.
    #[doc(hidden)]
    fn policy(&self) -> Option<&dyn ServerPolicy> {
        None
    }
}

/// A middleware that is shared: the program keeps one `Arc` and reads there what the middleware has counted.
impl<M: Middleware> Middleware for Arc<M> {
    fn handle(&self, call: Invocation, next: Next) -> impl Future<Output = Result<Reply, Error>> + Send {
        M::handle(self, call, next)
    }

    fn admit(&self, call: &Invocation) -> Result<(), Fault> {
        M::admit(self, call)
    }

    fn finished(&self, done: &Finished<'_>) {
        M::finished(self, done);
    }

    fn policy(&self) -> Option<&dyn ServerPolicy> {
        M::policy(self)
    }
}

/// How a call ended, for [`Middleware::finished`].
///
/// ```
/// use hopline::{Finished, Middleware};
///
/// /// A line for each call that did not run.
/// struct NotRun;
///
/// impl Middleware for NotRun {
///     fn finished(&self, done: &Finished<'_>) {
///         if !done.ran {
///             eprintln!("{} from {:?}: {}", done.call.method(), done.call.caller(), done.code);
///         }
///     }
/// }
/// ```
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct Finished<'a> {
    /// The call, as it was before any middleware changed it.
    pub call: &'a Invocation,
    /// `OK` for a result, `UNKNOWN` for the method's own error, and otherwise the code of the fault or of the
    /// [error](Error::code). `CANCELLED` and `DEADLINE_EXCEEDED` mean that nobody waited for the outcome any more.
    pub code: Code,
    /// Whether the method returned its own error.
    pub own_error: bool,
    /// On a server, whether the handler started. On a client, whether it may have started.
    pub ran: bool,
    /// On a server, how long the call waited before its handler started, as
    /// [`Context::queue_time`](crate::Context::queue_time) tells. `None` if the handler did not start, if the caller
    /// does not say when it sent the call, and on a client.
    pub queue_time: Option<Duration>,
    /// How long the handler ran. On a server this includes the middleware around it, and on a client it is what the
    /// reply says. `None` if the handler did not start, or if a client does not know.
    pub handler_time: Option<Duration>,
    /// How long the call took altogether: on a client since it was made, on a server since it was delivered.
    pub took: Duration,
}
