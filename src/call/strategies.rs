//! What a call does beside a retry so that it ends well: strategies that are set on it.

use std::sync::Arc;

use super::{Answered, Call, ReadResult, Stage, outcome};
use crate::error::{CallError, Error};
use crate::middleware::{Reply, RetryOn};
use crate::service::Failure;

/// To how many instances a call goes at once at most.
const MAX_FORKS: u32 = 64;

/// A value in place of an error. It is made only if it is needed, so that a call is `Send` whatever its result is.
pub(super) type SafeValue<T> = Box<dyn FnOnce() -> T + Send>;

impl<T, E> Call<T, E> {
    /// Sets how many more attempts the call has if it fails. Default: the [client's](crate::ClientBuilder::retry), 0
    /// unless set.
    ///
    /// A call that **has not run** is tried again, whatever its method is: after `NoService`, `Overloaded`, `Unreachable`
    /// and `CircuitOpen`, after any other error that [may not have run](Error::may_have_run), and after the faults
    /// `RESOURCE_EXHAUSTED` and `UNAVAILABLE` if the server says that no handler ran. A call that **may have run**, as
    /// after `ABORTED`, is tried again only if it is [idempotent](Call::idempotent). It is never tried again after its
    /// deadline or `DEADLINE_EXCEEDED`, after the method's own error (but see [`retry_on`](Call::retry_on)), after what is the caller's fault, and after a
    /// fault that is [permanent](crate::Fault::permanent).
    ///
    /// Before each further attempt there is a pause: as long as the server asked for ([`Fault::retry_after`](crate::Fault::retry_after)), or else
    /// a random time of up to 50 ms, 100 ms and so on up to 1 s; after an overload up to 1 s, 2 s and so on up to 5 s. All
    /// attempts share the call's time-out. Each has an id of its own, and goes to another instance than the one that
    /// reported the fault, if there is another.
    ///
    /// Further attempts have a **budget**, for each client and service: ten in each second, and beyond that one for five
    /// calls of the last 10 s. When it is empty, the call fails with its last error, so that a service that cannot keep up does not
    /// get several times the calls.
    ///
    /// ```
    /// # async fn example(client: hopline::Client) -> Result<(), hopline::Error> {
    /// let sum: i64 = client.call("calculator.v1", "add", (2, 3)).idempotent().retry(2).await?;
    /// # Ok(()) }
    /// ```
    pub fn retry(self, retries: u32) -> Self {
        self.with(|request| request.asked.retries = retries)
    }

    /// Gives the call a **second attempt at another instance** if it is late. The first good reply wins, and the other
    /// attempt is cancelled, also on the server. Default: the [client's setting](crate::ClientBuilder::hedge), off unless
    /// set.
    ///
    /// A call is late after the time that 95 % of the last 500 calls of the method through this client took, but not
    /// before 10 ms. This is known after 50 replies; before, no call is late. If the first attempt fails with an error after
    /// which the call may be [tried again](Call::retry), the second is sent at once. It goes to one of the instances
    /// that the client knows: of two that are drawn, the one that will take less time, as by
    /// [`Route::LeastInFlight`](crate::Route::LeastInFlight), and rather one that has replied within the last 10 s.
    ///
    /// There is no second attempt while
    /// - the [budget](Call::retry) of the service is empty, which hedges and retries share,
    /// - the [breaker](crate::Breaker) of the method is not closed,
    /// - the service was `Overloaded` or answered `RESOURCE_EXHAUSTED` within the last second,
    /// - no other instance is known.
    ///
    /// The method's own error is a good reply, unless [`retry_on`](Call::retry_on) names it.
    ///
    /// **Only idempotent calls are hedged**, since both attempts may run. Others, calls to [one instance](Call::to) and
    /// those along [`Route::Key`](crate::Route::Key) go as if this was not set. A call that is
    /// [forked](Call::fork) is not hedged as well. With [`retry`](Call::retry), each attempt may have its hedge. If both
    /// fail, the error is that of the last.
    ///
    /// ```
    /// # async fn example(client: hopline::Client) -> Result<(), hopline::Error> {
    /// let price: u32 = client.call("prices", "of", ("pen",)).idempotent().hedge().await?;
    /// println!("{} second attempts, {} were quicker", client.policies().hedges, client.policies().hedges_won);
    /// # Ok(()) }
    /// ```
    pub fn hedge(self) -> Self
    where
        T: Answered,
    {
        self.with(|request| request.asked.hedges = true)
    }

    /// Sends the call to `instances` instances at once, at most 64. The first good reply wins, and the others are cancelled,
    /// also on their servers. The method's own error is a good reply too, unless [`retry_on`](Call::retry_on) names it. If
    /// all fail, the error is that of the last. Default: 1, and then the call goes as usual. If the client knows fewer instances, the call goes to these; without any it waits 200 ms for one, and fails with
    /// [`NoService`](crate::Error::NoService).
    ///
    /// Use it where the time of each single call matters more than the load, which is `instances` times as high: hedging
    /// costs much less. The copies need no budget.
    ///
    /// **Only idempotent calls are forked.** Others, calls to [one instance](Call::to) and those along
    /// [`Route::Key`](crate::Route::Key) go as if this was not set.
    ///
    /// ```
    /// # async fn example(client: hopline::Client) -> Result<(), hopline::Error> {
    /// let price: u32 = client.call("prices", "of", ("pen",)).idempotent().fork(2).await?;
    /// # Ok(()) }
    /// ```
    pub fn fork(self, instances: u32) -> Self
    where
        T: Answered,
    {
        self.with(|request| request.asked.forks = instances.min(MAX_FORKS))
    }

    /// Returns `value` in place of an error. [`PolicyCounts`](crate::PolicyCounts) counts how often, so that the errors are
    /// seen. Default: the error is returned.
    ///
    /// These remain errors: the method's own error, which is an answer, and `Invalid`, `Codec` and `Mismatch`, which are
    /// mistakes in the program. A broadcast ignores this.
    ///
    /// ```
    /// # async fn example(client: hopline::Client) -> Result<(), hopline::Error> {
    /// // Without recommendations the page is still of use.
    /// let also_bought: Vec<String> = client.call("shop", "also_bought", ("pen",)).fail_safe(Vec::new()).await?;
    /// # Ok(()) }
    /// ```
    pub fn fail_safe(mut self, value: T) -> Self
    where
        T: Answered + Send + 'static,
    {
        let counted = self.target().ok().map(|target| target.counted.policies.clone());
        self.safe = Some(Box::new(move || {
            if let Some(counted) = counted {
                counted.values_for_errors.one_more();
            }
            value
        }));
        self
    }

    /// Keeps what a call that cannot be sent has failed with, if a value may stand in its place.
    pub(super) fn keep(&mut self, error: Error) -> Result<(), Error> {
        if self.safe.is_none() || !may_be_replaced(&error) {
            return Err(error);
        }
        self.stage = Stage::Unsent(error);
        Ok(())
    }

    /// What the call that could not be sent has failed with.
    pub(super) fn unsent_error(&mut self) -> Result<Reply, Error> {
        match std::mem::replace(&mut self.stage, Stage::Over) {
            Stage::Unsent(error) => Err(error),
            Stage::Ready(_) | Stage::Sent(_) | Stage::Over => unreachable!("it is asked for only then"),
        }
    }

    /// Sends the call, and makes it run by itself.
    pub(super) fn set_off(&mut self) -> Result<(), Error> {
        let sent = self.dispatch().and_then(|()| match &mut self.stage {
            Stage::Sent(started) => started.go_on(),
            Stage::Ready(_) | Stage::Unsent(_) | Stage::Over => Ok(()),
        });
        sent.or_else(|error| self.keep(error))
    }
}

impl<T, E: Failure> Call<T, E> {
    /// Says which of the method's own errors are worth another attempt, since what they tell of passes by itself: a lock
    /// that somebody holds, a row that changed meanwhile. Default: none, since the method's own error is an answer.
    ///
    /// It changes nothing without [`retry`](Call::retry), which says how many attempts there are, how long the pauses are
    /// and what budget they have. The method has run, so it changes nothing either unless the call is
    /// [idempotent](Call::idempotent). After the last attempt the call fails with the error of that attempt. A broadcast
    /// ignores this. `#[rpc(retry_on(StockError::Locked))]` sets it for all calls of a method.
    ///
    /// ```
    /// use hopline::{CallError, Client};
    ///
    /// #[derive(Debug, serde::Serialize, serde::Deserialize)]
    /// enum StockError {
    ///     Locked,
    ///     Unknown,
    /// }
    ///
    /// # async fn example(client: Client) -> Result<(), CallError<StockError>> {
    /// let call = client.call::<()>("stock", "set", ("pen", 3)).fails_with::<StockError>().idempotent();
    /// call.retry(2).retry_on(|error| matches!(error, StockError::Locked)).await?;
    /// # Ok(()) }
    /// ```
    pub fn retry_on(self, passes: impl Fn(&E) -> bool + Send + Sync + 'static) -> Self
    where
        T: Answered,
    {
        let passes = move |reply: &Reply| {
            let error: CallError<E> = E::read(reply.codec(), reply.payload()).into();
            matches!(error, CallError::Service(error) if passes(&error))
        };
        self.with(|request| request.retry_on = Some(RetryOn(Arc::new(passes))))
    }

    /// The outcome of a call that has a value for its errors.
    pub(super) fn safely(&self, reply: Result<Reply, Error>, safe: SafeValue<T>) -> Result<T, E::Error> {
        let read: ReadResult<T> = self.read;
        match reply {
            Err(error) if may_be_replaced(&error) => Ok(safe()),
            Err(error) => Err(error.into()),
            Ok(reply) if reply.is_own_error() => outcome::<T, E>(&reply, read),
            Ok(reply) => Ok(outcome::<T, E>(&reply, read).unwrap_or_else(|_| safe())),
        }
    }
}

impl<E> Call<(), E> {
    /// Leaves a call that has failed to the broker: it is published as a **oneway call**, and the call returns `Ok` when the
    /// broker has confirmed it. Some instance then runs it at least once, with the attempts of a oneway call, now or
    /// after a restart, and it becomes a dead letter if all fail. Default: off.
    ///
    /// This happens after the last attempt that [`retry`](Call::retry) allows, if the error is
    /// [transient](crate::Error::is_transient), as are `NoService`, `Overloaded`, `Timeout` and `UNAVAILABLE`. The broker
    /// has 5 s to confirm, which are added to the call's time-out. If it does not, the call fails with its first
    /// error.
    ///
    /// It is for methods that return nothing, and **only for idempotent calls**: the attempts that failed may have run.
    /// Others, and calls to [one instance](Call::to), go as if this was not set. The method needs a queue for oneway calls, so the server declares it with
    /// [`Method::oneway`](crate::Method::oneway); it can be called for an answer all the same. If it is not declared so, the
    /// call fails with its first error.
    ///
    /// ```
    /// use hopline::{Client, Context, Error, Fault, Method, Service};
    ///
    /// fn stock() -> Service {
    ///     let set = |_: Context, (_item, _count): (String, u32)| async move { Ok::<_, Fault>(()) };
    ///     Service::new("stock", 1).method(Method::new("set").idempotent().oneway(), set)
    /// }
    ///
    /// # async fn example(client: Client) -> Result<(), Error> {
    /// client.call::<()>("stock", "set", ("pen", 3)).idempotent().fail_back().await?;
    /// # Ok(()) }
    /// ```
    pub fn fail_back(self) -> Self {
        self.with(|request| request.asked.fails_back = true)
    }
}

/// Whether a value may stand in place of an error.
fn may_be_replaced(error: &Error) -> bool {
    !matches!(error, Error::Invalid(_) | Error::Codec(_) | Error::Mismatch { .. })
}
