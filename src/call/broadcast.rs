//! Broadcast style: a call to every instance, and what each answers.

use std::fmt;
use std::time::Duration;

use futures::{Stream, StreamExt};

use super::{Answered, Call, Oneway, outcome};
use crate::client::Request;
use crate::error::{Error, Fault};
use crate::route::Route;
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

/// One instance's answer to a broadcast.
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
    /// The instance that answered.
    pub instance: String,
    /// What it answered.
    pub outcome: Result<T, E::Error>,
}

impl<T, E> Broadcast<T, E> {
    pub(super) fn new(call: Call<T, E>) -> Self {
        Self(call)
    }
}

impl<T, E: Failure> Broadcast<T, E> {
    /// The replies that arrive within `window`, in the order they arrive. `window` replaces the call's timeout.
    ///
    /// # Errors
    /// `NoService` when no instance is there, `Disconnected` when the connection is lost meanwhile, and what can be said
    /// at once, as for [`Call::start`].
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

    /// The replies as they arrive, until `window` is over, which replaces the call's timeout. Dropping the stream cancels the
    /// call on instances that still run it. When the connection is lost, the last item says so, and its instance is
    /// empty.
    ///
    /// # Errors
    /// What is known before any reply can come: `NoService` when no instance is there, and what can be said at once, as for
    /// [`Call::start`].
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

    /// Asks all. A lost connection is the last of the replies.
    async fn ask(
        self,
        window: Duration,
    ) -> Result<impl Stream<Item = Result<BroadcastReply<T, E>, Error>> + Send + Unpin + use<T, E>, Error> {
        let Call { client, stage, read, .. } = self.0.timeout(window);
        let request = Request { route: Route::All, ..Call::<T, E>::unsent(stage)? };
        Ok(client.ask(request).await?.map(move |answer| {
            let (instance, reply) = answer?;
            let instance = instance.as_deref().unwrap_or_default().to_owned();
            let outcome = reply.map_err(E::Error::from).and_then(|reply| outcome::<T, E>(&reply, read));
            Ok(BroadcastReply { instance, outcome })
        }))
    }
}

impl Broadcast<Oneway> {
    /// Oneway style: returns when the broker has the call. Every instance that is up runs the method once, as soon as it
    /// can.
    ///
    /// # Errors
    /// As [`Call::send`].
    pub async fn send(self) -> Result<(), Error> {
        let Call { client, stage, .. } = self.0;
        client.send(Request { route: Route::All, ..Call::<Oneway>::unsent(stage)? }).await
    }
}

impl<T, E> fmt::Debug for Broadcast<T, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Broadcast").field(&self.0).finish()
    }
}
