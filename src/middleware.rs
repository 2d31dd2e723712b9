//! What goes around calls, the same on both sides: access logs, authentication, retries, limits.

mod chain;
mod invocation;
mod reply;

use std::future::Future;
use std::time::Duration;

pub(crate) use self::chain::Chain;
pub use self::chain::Next;
pub use self::invocation::{Invocation, Style};
pub use self::reply::Reply;
use crate::error::{Code, Error, Fault};

/// What goes around each call of a client, a service, or a whole server. All three methods have a default that changes nothing.
///
/// One is given to a client by [`ClientBuilder::with`](crate::ClientBuilder::with), to a service by
/// [`Service::with`](crate::Service::with), and to all services and subscriptions of a server by
/// [`ServerBuilder::with`](crate::ServerBuilder::with). Of several, the first that was added is the outermost; those of a
/// server are around those of its services.
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
    /// Goes around a call: on the client around sending it and waiting for what comes back, on the server around its handler.
    /// By default it runs what is inside, and nothing else.
    ///
    /// `next.run(call).await` runs what is inside. It may be run several times, one after the other or at once, since an
    /// `Invocation` can be cloned: on a client each run is an attempt with a request id of its own, and with the same
    /// [`call_id`](Invocation::call_id). Dropping the future of a run cancels that attempt: on a client its server hears of
    /// it, on a server the handler is dropped where it waits. Without a run the handler does not run, and what this
    /// returns is the outcome.
    ///
    /// What comes back depends on the [style](Invocation::style). Of a call it is the reply. Of a oneway call, a broadcast and
    /// an event a client has an empty reply as soon as the broker has the message; the replies to a broadcast go past the
    /// middleware to whoever gathers them. On a server all have a reply, which is sent only if the style has one.
    ///
    /// An error of the method's own is an `Ok(Reply)`, of which [`Reply::is_own_error`] is true: the method has run and said so.
    /// `Err` is everything else. A server sends it as a [`Fault`]: the one of an [`Error::Fault`], or one with the
    /// [`code`](Error::code) and the text of any other. A panic is a fault with the code `INTERNAL`, and logged.
    ///
    /// On a server this runs in the [`Context`](crate::Context) of the call: `Context::current()` is there, and calls that it
    /// makes inherit the deadline.
    fn handle(&self, call: Invocation, next: Next) -> impl Future<Output = Result<Reply, Error>> + Send {
        next.run(call)
    }

    /// Says whether a server takes a call: `Err` refuses it. By default it takes all. A client does not ask this.
    ///
    /// It is asked as soon as the call has come, before it takes up a place among the calls that run and before its arguments
    /// are decompressed, so refusing costs little: the [payload](Invocation::payload) is empty here. It must not wait.
    /// Questions of discovery are asked about too: their methods are `hopline.ping`, `hopline.info` and `hopline.stats`.
    ///
    /// The caller of a refused request gets the fault. A refused oneway call is kept with the dead letters, a refused event is
    /// dropped and logged. A panic refuses with the code `INTERNAL`, and is logged.
    fn admit(&self, call: &Invocation) -> Result<(), Fault> {
        let _ = call;
        Ok(())
    }

    /// Is told how a call ended, once, when all is over: of those that ran, and of those that were refused, cancelled or
    /// timed out before. By default it does nothing. It must not wait; a panic is logged.
    ///
    /// On a server it is told at each end of a handler, so a oneway call that fails and is tried again ends several times. What
    /// a server gives back to its queue as it drains has not ended. On a client it is told once a call, however many attempts
    /// that took; a call that its caller dropped has ended as `CANCELLED`.
    fn finished(&self, done: &Finished<'_>) {
        let _ = done;
    }
}

/// How a call ended.
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
    /// What it came to: `OK` for a result, `UNKNOWN` for the method's own error, otherwise the code of the fault or the
    /// [error](Error::code). `CANCELLED` and `DEADLINE_EXCEEDED` say that nobody waited for the outcome any more.
    pub code: Code,
    /// Whether the method returned its own error.
    pub own_error: bool,
    /// On a server, whether the handler was started; on a client, whether it may have been.
    pub ran: bool,
    /// On a server, how long the call waited before it was started, as [`Context::queue_time`](crate::Context::queue_time).
    /// `None` if it was not started, and on a client.
    pub queue_time: Option<Duration>,
    /// How long the handler ran: on a server with the middleware around it, on a client as the reply says. `None` if it was not
    /// started, or if a client does not know.
    pub handler_time: Option<Duration>,
    /// From beginning to end: on a client since the call was made, on a server since it was delivered.
    pub took: Duration,
}
