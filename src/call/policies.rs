//! What a call asks of the client's policies.

use std::time::Duration;

use super::{Answered, Call};

impl<T, E> Call<T, E> {
    /// Sets how many more attempts the call has if it fails. Default: the [client's](crate::ClientBuilder::retry), 0
    /// unless set.
    ///
    /// A call that **has not run** is tried again, whatever its method is: after `NoService`, `Overloaded`, `Unreachable`
    /// and `CircuitOpen`, after any other error that [may not have run](Error::may_have_run), and after the faults
    /// `RESOURCE_EXHAUSTED` and `UNAVAILABLE` if the server says that no handler ran. A call that **may have run**, as
    /// after `ABORTED`, is tried again only if it is [idempotent](Call::idempotent). It is never tried again after its
    /// deadline or `DEADLINE_EXCEEDED`, after the method's own error, after what is the caller's fault, and after a
    /// fault that is [permanent](Fault::permanent).
    ///
    /// Before each further attempt there is a pause: as long as the server asked for ([`Fault::retry_after`]), or else
    /// a random time of up to 50 ms, 100 ms and so on up to 1 s; after an overload up to 1 s, 2 s and so on up to 5 s. All
    /// attempts share the call's time-out. Each has an id of its own, and goes to another instance than the one that
    /// reported the fault, if there is another.
    ///
    /// Further attempts have a **budget**, for each client and service: ten in each second, and beyond that one for five
    /// calls of the last 10 s. When it is empty, the call fails with its last error, so that a service that cannot keep up
    /// does not get several times the calls.
    ///
    /// ```
    /// # async fn example(client: hopline::Client) -> Result<(), hopline::Error> {
    /// let sum: i64 = client.call("calculator.v1", "add", (2, 3)).idempotent().retry(2).await?;
    /// # Ok(()) }
    /// ```
    pub fn retry(self, retries: u32) -> Self {
        self.with(|request| request.asked.retries = retries)
    }

    /// Keeps the result, and takes one that is not older than `time`. Default: the
    /// [client's](crate::ClientBuilder::cache), no cache unless set. A time of zero means no cache for this call.
    ///
    /// It concerns [idempotent](Call::idempotent) calls that any instance may answer: not one
    /// [to an instance](Call::to), or along [`Route::One`](crate::Route::One) or [`Route::Key`](crate::Route::Key). It
    /// changes nothing for any other call, and for oneway calls and broadcasts.
    ///
    /// A result is that of the same service and version, method, arguments, codec and
    /// [metadata](Call::metadata), with what middleware has set. So a call for one tenant, or with one token, never gets
    /// the result of another; and metadata that is new in each call makes the cache useless. What else a method answers
    /// by has to be in its arguments. All clones of a client have one cache, and each client has its own.
    ///
    /// Only results are kept: no error, and not the method's own error. Calls for the same that are made **at the same
    /// time share** one, and its outcome, whatever it is; one whose time-out is over ends alone. The shared call goes on
    /// while anybody waits for it. A call that is answered from the cache is sent nowhere, and counts as one that has
    /// not run.
    ///
    /// The client keeps 1 000 results and 16 MiB, unless it is [set otherwise](crate::ClientBuilder::cache_size). Those
    /// that were not asked for the longest go first. [`Client::forget_results`](crate::Client::forget_results) forgets all.
    ///
    /// ```
    /// use std::time::Duration;
    ///
    /// # async fn example(client: hopline::Client) -> Result<(), hopline::Error> {
    /// let price = client.call::<u64>("shop.v1", "price", ("pen",)).idempotent();
    /// println!("{} cents", price.cache(Duration::from_secs(5)).await?);
    /// # Ok(()) }
    /// ```
    pub fn cache(self, time: Duration) -> Self
    where
        T: Answered,
    {
        self.with(|request| request.asked.cache = time)
    }

    /// For how long after its [time](Call::cache) a result is still taken, while one call in the background brings a
    /// new one. Default: the [client's](crate::ClientBuilder::stale), zero unless set. Without `cache` it changes nothing.
    ///
    /// So nobody waits for a result that is asked for often. The call in the background has what is left of the time
    /// of the call that makes it. If it fails, the next call makes another.
    ///
    /// ```
    /// use std::time::Duration;
    ///
    /// # async fn example(client: hopline::Client) -> Result<(), hopline::Error> {
    /// let price = client.call::<u64>("shop.v1", "price", ("pen",)).idempotent();
    /// // For 5 s as it is; for 30 s more with a new one on its way.
    /// println!("{} cents", price.cache(Duration::from_secs(5)).stale(Duration::from_secs(30)).await?);
    /// # Ok(()) }
    /// ```
    pub fn stale(self, time: Duration) -> Self
    where
        T: Answered,
    {
        self.with(|request| request.asked.stale = time)
    }
}
