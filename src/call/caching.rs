//! What a call asks of the client's cache.

use std::time::Duration;

use super::{Answered, Call};

impl<T, E> Call<T, E> {
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
