//! Broadcasts: calls to every instance of a service, and their replies.

use std::fmt;
use std::time::Duration;

use futures::{Stream, StreamExt};

use super::{Answered, Call, Oneway, outcome};
use crate::client::Request;
use crate::error::{Error, Fault};
use crate::exchanges::Recipients;
use crate::service::Failure;

/// A call to every instance of a service. It does nothing until its replies are [gathered](Broadcast::gather) or
/// [read as they come](Broadcast::replies), or until it is [sent](Broadcast::send), if the call is oneway.
///
/// ```
/// # use std::time::Duration;
/// # async fn example(client: hopline::Client) -> Result<(), hopline::Error> {
/// let whoami = client.call::<String>("demo.v1", "whoami", [(); 0]);
/// for reply in whoami.all().gather(Duration::from_millis(200)).await? {
///     println!("{} says {:?}", reply.instance, reply.outcome);
/// }
/// client.oneway("demo.v1", "log", ("hello",)).all().send().await?;
/// # Ok(()) }
/// ```
#[must_use = "a broadcast does nothing until it is sent, or its replies are gathered"]
pub struct Broadcast<T, E = Fault>(Call<T, E>);

/// The reply of one instance to a broadcast.
///
/// ```
/// # async fn example(client: hopline::Client) -> Result<(), hopline::Error> {
/// let window = std::time::Duration::from_millis(200);
/// for reply in client.call::<String>("demo", "whoami", ()).all().gather(window).await? {
///     match reply.outcome {
///         Ok(answer) => println!("{} answers {answer}", reply.instance),
///         Err(error) => println!("{} has failed: {error}", reply.instance),
///     }
/// }
/// # Ok(()) }
/// ```
#[derive(Debug)]
#[non_exhaustive]
pub struct BroadcastReply<T, E = Fault>
where
    E: Failure,
{
    /// The instance that replied.
    pub instance: String,
    /// The result or the error of this instance.
    pub outcome: Result<T, E::Error>,
}

impl<T, E> Broadcast<T, E> {
    pub(super) fn new(call: Call<T, E>) -> Self {
        Self(call)
    }
}

impl<T, E: Failure> Broadcast<T, E> {
    /// Collects the replies that arrive within `window`, in the order in which they arrive. `window` replaces the
    /// call's time-out.
    ///
    /// # Errors
    /// - `NoService` if there is no instance,
    /// - `Disconnected` if the connection is lost meanwhile,
    /// - the errors of [`Call::start`], which are known before anything is sent.
    pub async fn gather(self, window: Duration) -> Result<Vec<BroadcastReply<T, E>>, Error>
    where
        T: Answered,
    {
        let mut stream = self.ask(window).await?;
        let mut replies = Vec::new();
        while let Some(reply) = stream.next().await {
            replies.push(reply?);
        }
        Ok(replies)
    }

    /// Returns the replies one by one as they arrive, until `window` is over. `window` replaces the call's time-out.
    ///
    /// Dropping the stream cancels the call on the instances that still run it. If the connection is lost, the last
    /// item says so, and its `instance` is empty.
    ///
    /// ```
    /// # use std::time::Duration;
    /// use futures::StreamExt;
    ///
    /// # async fn example(client: hopline::Client) -> Result<(), hopline::Error> {
    /// let whoami = client.call::<String>("demo.v1", "whoami", [(); 0]);
    /// let mut replies = whoami.all().replies(Duration::from_secs(1)).await?;
    /// while let Some(reply) = replies.next().await {
    ///     println!("{} says {:?}", reply.instance, reply.outcome);
    /// }
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// - `NoService` if there is no instance,
    /// - the errors of [`Call::start`], which are known before anything is sent.
    pub async fn replies(
        self,
        window: Duration,
    ) -> Result<impl Stream<Item = BroadcastReply<T, E>> + Send + Unpin + use<T, E>, Error>
    where
        T: Answered,
    {
        let replies = self.ask(window).await?;
        Ok(replies.map(|reply| {
            reply.unwrap_or_else(|lost| BroadcastReply { instance: String::new(), outcome: Err(lost.into()) })
        }))
    }

    /// Sends the call to all instances. If the connection is lost, that is the last item.
    async fn ask(
        self,
        window: Duration,
    ) -> Result<impl Stream<Item = Result<BroadcastReply<T, E>, Error>> + Send + Unpin + use<T, E>, Error> {
        let Call { client, stage, read, .. } = self.0.timeout(window);
        let request = Request { recipients: Recipients::All, ..Call::<T, E>::unsent(stage)? };
        Ok(client.ask(request).await?.map(move |answer| {
            let (instance, reply) = answer?;
            let instance = instance.as_deref().unwrap_or_default().to_owned();
            let outcome = reply.map_err(E::Error::from).and_then(|reply| outcome::<T, E>(&reply, read));
            Ok(BroadcastReply { instance, outcome })
        }))
    }
}

impl Broadcast<Oneway> {
    /// Sends a oneway call to every instance that is up. Returns when the broker has confirmed it. Each instance runs
    /// the method once, as soon as it can.
    ///
    /// # Errors
    /// As [`Call::send`].
    pub async fn send(self) -> Result<(), Error> {
        let Call { client, stage, .. } = self.0;
        client.send(Request { recipients: Recipients::All, ..Call::<Oneway>::unsent(stage)? }).await
    }
}

impl<T, E> fmt::Debug for Broadcast<T, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Broadcast").field(&self.0).finish()
    }
}
