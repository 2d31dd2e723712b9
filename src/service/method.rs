//! A method's name and nature, and when its oneway calls are tried again.

use std::time::Duration;

use crate::registry::MethodInfo;

/// A method's name and nature.
#[derive(Debug, Clone)]
pub struct Method {
    pub(crate) name: String,
    pub(crate) signature: String,
    pub(crate) oneway: bool,
    pub(crate) idempotent: bool,
    pub(crate) finishes: bool,
    pub(crate) dedup: Option<Duration>,
    pub(crate) retry: Retry,
}

/// When a oneway call that failed is tried again.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Retry {
    attempts: u32,
    pub(super) pause: Duration,
}

/// The longest pause, unless the first is longer.
const LONG_PAUSE: Duration = Duration::from_secs(30);
/// The longest that the first may be: the broker counts no more.
pub(super) const MAX_PAUSE: Duration = Duration::from_secs(40 * 24 * 3600);

impl Default for Retry {
    fn default() -> Self {
        Self { attempts: 8, pause: Duration::from_millis(500) }
    }
}

impl Retry {
    /// The pause after the failed attempt of this number; none after the last.
    pub(crate) fn pause_after(self, attempt: u64) -> Option<Duration> {
        let doublings = u32::try_from(attempt.saturating_sub(1)).unwrap_or(u32::MAX);
        let pause = self.pause.saturating_mul(2_u32.saturating_pow(doublings)).min(LONG_PAUSE.max(self.pause));
        (attempt < self.attempts.into()).then_some(pause)
    }
}

impl Method {
    /// A method that is called as `name`, `[A-Za-z0-9_-]+`.
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
            retry: Retry::default(),
        }
    }

    /// How it is written, for messages about arguments that do not fit. Default: the name.
    #[must_use]
    pub fn signature(mut self, signature: impl Into<String>) -> Self {
        self.signature = signature.into();
        self
    }

    /// It takes oneway calls, which the broker keeps until they have run: the service gets a queue for them, and one for those
    /// that fail for good. Both stay with what is in them when the last server leaves. Without it, a oneway call for any
    /// instance is refused with [`NoService`](crate::Error::NoService); one to a given instance, or to all, needs no queue
    /// and arrives. It can be called for an answer as well.
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

    /// Running it twice does no more than running it once: after a worker's death another instance runs it again.
    #[must_use]
    pub fn idempotent(mut self) -> Self {
        self.idempotent = true;
        self
    }

    /// What has begun is finished: when the caller gives up or the deadline passes, the handler goes on to its end instead of
    /// being dropped half-way. [`Context::cancelled`](crate::Context::cancelled) tells it that nobody waits any more, a drain waits for it, and
    /// its result is dropped. Calls that it makes have time of their own from the beginning, and do not inherit its deadline:
    /// what undoes a step is needed most when the time is over. Default: it is dropped where it waits, and logged: at
    /// `WARN`, since something may be half done, or at `DEBUG` if the method is [`idempotent`](Method::idempotent).
    ///
    /// A call that has not begun to run by then is not run in any case. Handlers of oneway calls and of events always finish.
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

    /// How often a oneway call is tried before it goes to the dead letters, the first time included. Default 8; 0 counts as 1.
    /// Calls to one instance or to all, and events, are not tried again.
    ///
    /// An attempt fails by an error that the handler returns, or by a panic. A [`Fault`](crate::Fault) with the code `INVALID_ARGUMENT` or
    /// `UNIMPLEMENTED` says that no other attempt can help: then there is none.
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

    /// How long a oneway call waits after its first failed attempt: twice as long after each other, but no longer than 30 s, or
    /// this if it is longer. Default 500 ms, which with 8 attempts makes 61.5 s in all; at most 40 days. The call waits
    /// at the broker meanwhile, behind others that have failed: it may come later, where one of these waits for longer. Then
    /// any instance has it, behind what is in the queue.
    #[must_use]
    pub fn pause(mut self, pause: Duration) -> Self {
        self.retry.pause = pause;
        self
    }

    /// Runs a call once though it comes again, as far as one instance can tell. For so long after a call has ended, whatever
    /// comes with its [`call_id`](crate::Context::call_id) from the same [user](crate::Context::user) gets the first reply
    /// without running; while the call still runs, it waits for that reply. So does a redelivered call that would be refused as
    /// `ABORTED`. Default: nothing is remembered.
    ///
    /// What comes again is either another delivery of the same request, or another request that the caller sends for the same
    /// call. A result and the method's own error answer both. A fault, such as of a panic or of a deadline that passed, answers
    /// deliveries of the request that met it; another request runs then, since the caller sends it to try again. It also
    /// runs when the first one was dropped because its caller gave it up. A method that [`finishes`](Method::finishes) has a
    /// reply then too.
    ///
    /// Of a oneway call, another delivery is acknowledged without running if the first ended well; one that failed is tried
    /// again as ever. Callers whose user is not known count as one user.
    ///
    /// Each instance remembers what it ran itself, in memory: at most 65 536 answers and 64 MiB of a service, and beyond
    /// those forgets first what it would forget first anyway. Another instance, and this one after a restart, knows
    /// nothing of it. What must not happen twice needs a record where it happens, such as a unique key in a database:
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

    pub(crate) fn info(&self) -> MethodInfo {
        MethodInfo {
            name: self.name.clone(),
            signature: self.signature.clone(),
            oneway: self.oneway,
            idempotent: self.idempotent,
        }
    }
}

/// A method of this name, and nothing else said of it.
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
