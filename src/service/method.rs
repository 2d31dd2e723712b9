//! What a service says of one of its methods: its name, how its calls are treated, and when a failed oneway call is
//! tried again.

use std::time::Duration;

use super::dispatch::Dispatch;
#[cfg(feature = "schema")]
use super::schema::Types;
use crate::document::MethodInfo;
use crate::frame::millis;

/// The description of a method: its name, and how its calls are treated. [`Service::method`](crate::Service::method)
/// takes one together with the handler.
///
/// The macro `#[hopline::service]` makes it from the options in `#[rpc(...)]`. Without further settings a method
/// answers calls, is not idempotent, and its handler is dropped when the caller gives up.
///
/// ```
/// use std::time::Duration;
///
/// use hopline::Method;
///
/// let method = Method::new("import").idempotent().dedup(Duration::from_secs(60));
/// # let _ = method;
/// ```
#[derive(Debug, Clone)]
pub struct Method {
    pub(crate) name: String,
    pub(crate) signature: String,
    pub(crate) oneway: bool,
    pub(crate) idempotent: bool,
    pub(crate) finishes: bool,
    pub(crate) dedup: Option<Duration>,
    pub(crate) timeout: Option<Duration>,
    pub(crate) retry: Retry,
    /// `None`: where the service's handlers run.
    pub(crate) dispatch: Option<Dispatch>,
    /// `None`: it shares the places of the service, unless it has a pool.
    pub(crate) concurrency: Option<usize>,
    /// What is wrong with its schema.
    #[cfg(feature = "schema")]
    pub(super) problem: Option<String>,
    /// `None`: its types have no schema.
    #[cfg(feature = "schema")]
    pub(super) types: Option<Types>,
}

/// When a oneway call that failed is tried again.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Retry {
    /// How many attempts there are in all. 0 counts as 1.
    attempts: u32,
    /// The pause after the first attempt.
    pub(super) pause: Duration,
}

/// The longest pause between two attempts, unless the first is set to a longer one.
const LONG_PAUSE: Duration = Duration::from_secs(30);
/// The longest first pause that can be set. A message's time to live cannot be longer at the broker.
pub(super) const MAX_PAUSE: Duration = Duration::from_secs(40 * 24 * 3600);

impl Default for Retry {
    fn default() -> Self {
        Self { attempts: 8, pause: Duration::from_millis(500) }
    }
}

impl Retry {
    /// The pause after a failed attempt; the first attempt has the number 1. `None` if there is no further attempt.
    pub(crate) fn pause_after(self, attempt: u64) -> Option<Duration> {
        let doublings = u32::try_from(attempt.saturating_sub(1)).unwrap_or(u32::MAX);
        let pause = self.pause.saturating_mul(2_u32.saturating_pow(doublings)).min(LONG_PAUSE.max(self.pause));
        (attempt < self.attempts.into()).then_some(pause)
    }
}

impl Method {
    /// A method that is called by `name`: 1 to 64 characters out of `[A-Za-z0-9_-]`. A server that serves another name
    /// does not start.
    #[must_use]
    pub fn new(name: impl Into<String>) -> Self {
        let name = name.into();
        Self {
            signature: name.clone(),
            name,
            oneway: false,
            idempotent: false,
            finishes: false,
            dedup: None,
            timeout: None,
            retry: Retry::default(),
            dispatch: None,
            concurrency: None,
            #[cfg(feature = "schema")]
            problem: None,
            #[cfg(feature = "schema")]
            types: None,
        }
    }

    /// Sets how the method is written, for error messages about arguments that do not fit, and for
    /// whoever asks the [registry](crate::Client::registry). Default: the name.
    #[must_use]
    pub fn signature(mut self, signature: impl Into<String>) -> Self {
        self.signature = signature.into();
        self
    }

    /// The method accepts oneway calls. The broker keeps them until they have run.
    ///
    /// The service gets two more queues: one for its oneway calls, and one for those that fail for good. Both stay,
    /// with what is in them, when the last server has gone. The method can still be called for an answer.
    ///
    /// Without this setting, a oneway call for any instance fails with [`NoService`](crate::Error::NoService). A oneway
    /// call for a given instance, or for all, needs no queue of its own and arrives in any case.
    ///
    /// ```
    /// use hopline::{Context, Fault, Method, Service};
    ///
    /// let note = |_: Context, (text,): (String,)| async move { Ok::<_, Fault>(println!("{text}")) };
    /// let service = Service::new("notes", 1).method(Method::new("note").oneway(), note);
    /// # let _ = service;
    /// ```
    #[must_use]
    pub fn oneway(mut self) -> Self {
        self.oneway = true;
        self
    }

    /// Running the method twice has the same effect as running it once. So if an instance dies or its connection is
    /// lost, another instance runs the call again. Default: the call fails, and its error says that it may have run.
    #[must_use]
    pub fn idempotent(mut self) -> Self {
        self.idempotent = true;
        self
    }

    /// A handler that has begun runs to its end, even when the caller gives up or the deadline passes. Default: its
    /// future is dropped where it waits, and that is logged: at `WARN`, since something may be half done, or at `DEBUG`
    /// if the method is [`idempotent`](Method::idempotent).
    ///
    /// [`Context::cancelled`](crate::Context::cancelled) tells the handler that nobody waits any more. A drain waits
    /// for the handler, and its result is dropped. Calls that it makes do not inherit its deadline, but have their own
    /// time from the beginning: what undoes a step is needed most when the time is over.
    ///
    /// A call that has not begun by then is not run. Handlers of oneway calls and of events always run to their end.
    ///
    /// ```
    /// use hopline::{Client, Context, Fault, Method, Service};
    ///
    /// fn shop(stock: Client) -> Service {
    ///     let order = move |ctx: Context, (item,): (u64,)| {
    ///         let stock = stock.clone();
    ///         async move {
    ///             let reserved: Result<u64, _> = stock.call("stock", "reserve", (item,)).await;
    ///             // ... and when the caller has gone meanwhile, it is given back.
    ///             if let (Ok(number), true) = (&reserved, ctx.is_cancelled()) {
    ///                 let _: Result<(), _> = stock.call("stock", "release", (*number,)).await;
    ///             }
    ///             reserved.map_err(|error| error.to_string())
    ///         }
    ///     };
    ///     Service::new("shop", 1).method(Method::new("order").finishes(), order)
    /// }
    /// ```
    #[must_use]
    pub fn finishes(mut self) -> Self {
        self.finishes = true;
        self
    }

    /// Sets how many attempts a oneway call has before it becomes a dead letter, with the first one. Default: 8. 0
    /// counts as 1. Calls to one instance or to all, and events, have only one.
    ///
    /// An attempt fails when the handler returns an error or panics. A [`Fault`](crate::Fault) with the code
    /// `INVALID_ARGUMENT` or `UNIMPLEMENTED` says that no other attempt can help: the call becomes a dead letter at
    /// once.
    ///
    /// ```
    /// use std::time::Duration;
    ///
    /// use hopline::{Code, Context, Fault, Method, Service};
    ///
    /// let send = |_: Context, (to,): (String,)| async move { Err::<(), _>(Fault::new(Code::Unavailable, to)) };
    /// // After 1 s, 2 s, 4 s, 8 s and 16 s.
    /// let method = Method::new("send").oneway().attempts(6).pause(Duration::from_secs(1));
    /// let service = Service::new("mail", 1).method(method, send);
    /// # let _ = service;
    /// ```
    #[must_use]
    pub fn attempts(mut self, attempts: u32) -> Self {
        self.retry.attempts = attempts;
        self
    }

    /// Sets how long a oneway call waits after its first failed attempt. Each further pause is twice as long, up to 30
    /// s, or up to this if it is longer. Default: 500 ms, which adds up to 61.5 s with 8 attempts. At most 40 days.
    ///
    /// The call waits in a queue at the broker, behind others that have failed. It comes later if one of these waits
    /// for longer. After that any instance may get it.
    #[must_use]
    pub fn pause(mut self, pause: Duration) -> Self {
        self.retry.pause = pause;
        self
    }

    /// Remembers how calls have ended for `time`, so that a call that comes again to the same instance does not run again. It
    /// gets the first reply. While the first run goes on, it waits for its end. This also holds for a redelivered call that
    /// would otherwise be refused as `ABORTED`. Default: nothing is remembered.
    ///
    /// It is the same call if its [`call_id`](crate::Context::call_id) and the caller's [user](crate::Context::user) are the
    /// same; callers whose user is not known count as one user. It comes again either because the same request is delivered
    /// again, or because the caller sends another request for it. A result and the method's own error answer both. A fault, for
    /// example after a panic or at the deadline, answers only the request that met it: another request runs, since the caller
    /// sends it to try again. It also runs if the first request was dropped because its caller gave up. If the method
    /// [`finishes`](Method::finishes), there is a reply even then.
    ///
    /// A oneway call that has ended well is acknowledged without running again. One that has failed is tried again as
    /// usual.
    ///
    /// Each instance remembers in memory what it ran itself: up to 65 536 answers and 64 MiB for a service, and forgets
    /// the oldest when there are more. Other instances know nothing of them, nor does this one after a restart. So what
    /// must never happen twice needs a record where it happens, such as a unique key in a database:
    /// [`Context::call_id`](crate::Context::call_id) is the same whenever the call comes.
    ///
    /// ```
    /// use std::time::Duration;
    ///
    /// use hopline::{Context, Fault, Method, Service};
    ///
    /// let charge = |_: Context, (cents,): (u64,)| async move { Ok::<_, Fault>(format!("charged {cents}")) };
    /// let service = Service::new("billing", 1).method(Method::new("charge").dedup(Duration::from_secs(600)), charge);
    /// # let _ = service;
    /// ```
    #[must_use]
    pub fn dedup(mut self, time: Duration) -> Self {
        self.dedup = Some(time);
        self
    }

    /// Where the handlers of this method run. Default: where those of the [service](crate::Service::dispatch) run.
    ///
    /// A method with a pool also has [places of its own](Self::concurrency), so that its calls do not take those of the
    /// other methods. A slow method, or one that keeps a processor busy, holds up nobody else then.
    ///
    /// ```
    /// use hopline::{Context, Dispatch, Fault, Method, Service};
    ///
    /// let find = |_: Context, (word,): (String,)| async move { Ok::<_, Fault>(word.len()) };
    /// let service = Service::new("books", 1)
    ///     .method("find", find)
    ///     .method(Method::new("report").dispatch(Dispatch::Pool(2)), find);
    /// # let _ = service;
    /// ```
    #[must_use]
    pub fn dispatch(mut self, dispatch: Dispatch) -> Self {
        self.dispatch = Some(dispatch);
        self
    }

    /// Gives the method places of its own: so many of its calls run at once in an instance, and they take none of the
    /// [service's](crate::Service::concurrency). Default: the method shares these, or with a
    /// [pool](Self::dispatch) of its own it has as many as the service. 0 counts as 1.
    ///
    /// All methods share the queue at the broker. So a call that finds all places of its method taken cannot wait there: it
    /// would hold up the calls behind it. It waits in the instance if the method has a
    /// [bounded queue](crate::Dispatch::BoundedPool) with room, and is answered with `RESOURCE_EXHAUSTED` otherwise, or what
    /// [`QueueFull`](crate::QueueFull) says. It has not run, and may be tried again.
    ///
    /// Oneway calls wait in the instance until there is a place. As many as the
    /// [prefetch](crate::Service::prefetch) allows wait there, and then further oneway calls of the service wait behind
    /// them at the broker. Calls with an answer do not: they have another queue.
    #[must_use]
    pub fn concurrency(mut self, calls: usize) -> Self {
        self.concurrency = Some(calls.max(1));
        self
    }

    /// Sets the time-out that callers usually give the method. `#[rpc(timeout = "2s")]` sets it here and in the client
    /// that the macro makes. The [registry](crate::Client::registry) tells it, for clients that have no trait. A server
    /// does not enforce it: a call has the time that its caller gives it.
    ///
    /// ```
    /// use std::time::Duration;
    ///
    /// let method = hopline::Method::new("import").timeout(Duration::from_secs(300));
    /// # let _ = method;
    /// ```
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// What the registry tells of the method.
    pub(crate) fn info(&self) -> MethodInfo {
        MethodInfo {
            name: self.name.clone(),
            signature: self.signature.clone(),
            oneway: self.oneway,
            idempotent: self.idempotent,
            finishes: self.finishes,
            dedup_ms: self.dedup.map(millis),
            timeout_ms: self.timeout.map(millis),
            #[cfg(feature = "schema")]
            schema: self.types.is_some(),
            #[cfg(not(feature = "schema"))]
            schema: false,
        }
    }
}

/// A method with this name and the default settings.
impl From<&str> for Method {
    fn from(name: &str) -> Self {
        Self::new(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_pause_is_twice_the_one_before_up_to_a_limit_and_after_the_last_attempt_there_is_none() {
        let millis = |retry: Retry, attempts: &[u64]| -> Vec<Option<u128>> {
            attempts.iter().map(|attempt| retry.pause_after(*attempt).map(|pause| pause.as_millis())).collect()
        };
        let pauses = millis(Retry::default(), &[1, 2, 3, 4, 5, 6, 7, 8, 9, u64::MAX]);
        let expected = [500, 1000, 2000, 4000, 8000, 16_000, 30_000].map(Some);
        assert_eq!(pauses[..7], expected);
        assert_eq!(pauses[7..], [None; 3]);
        assert_eq!(expected.into_iter().flatten().sum::<u128>(), 61_500, "as the documentation says");
        let slow = Retry { attempts: u32::MAX, pause: Duration::from_secs(60) };
        assert_eq!(millis(slow, &[1, 2, 1_000_000]), [Some(60_000); 3]);
        assert_eq!(Retry { attempts: 0, ..slow }.pause_after(1), None);
        assert_eq!(Retry { pause: Duration::ZERO, ..slow }.pause_after(9), Some(Duration::ZERO));
    }
}
