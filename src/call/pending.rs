//! A call that was sent, and is awaited later.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context as TaskContext, Poll};

use super::{Answered, Call};
use crate::error::Fault;
use crate::service::Failure;

/// A call that was sent. Awaiting it returns the outcome. Dropping it cancels the call, also on the server.
///
/// ```
/// use hopline::{Client, Error, Pending};
///
/// # async fn example(client: Client) -> Result<(), Error> {
/// // Both are on their way before the first is waited for.
/// let one: Pending<u64> = client.call("shop", "price", (1,)).start().await?;
/// let two: Pending<u64> = client.call("shop", "price", (2,)).start().await?;
/// println!("{}", one.await? + two.await?);
/// # Ok(()) }
/// ```
#[must_use = "dropping a pending call cancels it"]
pub struct Pending<T, E = Fault>(Call<T, E>);

impl<T, E> Pending<T, E> {
    pub(super) fn new(call: Call<T, E>) -> Self {
        Self(call)
    }
}

impl<T: Answered, E: Failure> Future for Pending<T, E> {
    type Output = Result<T, E::Error>;

    fn poll(mut self: Pin<&mut Self>, context: &mut TaskContext<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(context)
    }
}

impl<T, E> fmt::Debug for Pending<T, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Pending").field(&self.0.stage).finish()
    }
}
