//! Broadcasts: calls to every instance of a service, and their replies.

use std::fmt;
use std::time::Duration;

use futures::{Stream, StreamExt};

use super::quorum::Votes;
use super::{Answered, Call, Oneway, Quorum, outcome};
use crate::client::Request;
use crate::error::{Error, Fault};
use crate::exchanges::Recipients;
use crate::registry;
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
pub struct Broadcast<T, E = Fault> {
    call: Call<T, E>,
    quorum: Option<Quorum>,
}

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
        Self { call, quorum: None }
    }
}

impl<T, E: Failure> Broadcast<T, E> {
    /// Says how many instances must reply well. [`gather`](Self::gather) then ends as soon as this is decided, either way:
    /// with the replies so far, or with [`NoQuorum`](Error::NoQuorum), which says who has failed. The call is
    /// cancelled where it still runs. Default: `gather` waits for its whole window, and takes every reply.
    ///
    /// The instances are those that the client knows by its [watch](crate::Registry::watch) when it asks, without those that
    /// drain, and any other that replies. One that is known and does not reply within the window has failed, so that
    /// [`Quorum::All`] means all, and not all that are quick. If the client knows none, which it waits 200 ms for, those count
    /// that reply within the window. The method's own error is no good reply.
    ///
    /// ```
    /// # use std::time::Duration;
    /// use hopline::Quorum;
    ///
    /// # async fn example(client: hopline::Client) -> Result<(), hopline::Error> {
    /// let forget = client.call::<()>("prices.v1", "forget", ("pen",)).all();
    /// forget.require(Quorum::All).gather(Duration::from_secs(1)).await?;
    /// # Ok(()) }
    /// ```
    pub fn require(mut self, quorum: Quorum) -> Self
    where
        T: Answered,
    {
        self.quorum = Some(quorum);
        self
    }

    /// Collects the replies that arrive within `window`, in the order in which they arrive. `window` replaces the
    /// call's time-out.
    ///
    /// # Errors
    /// - `NoService` if there is no instance,
    /// - `NoQuorum` if too few instances have replied as it is [required](Self::require),
    /// - `Disconnected` if the connection is lost meanwhile,
    /// - the errors of [`Call::start`], which are known before anything is sent.
    pub async fn gather(self, window: Duration) -> Result<Vec<BroadcastReply<T, E>>, Error>
    where
        T: Answered,
    {
        let Some(quorum) = self.quorum else {
            let mut stream = self.ask(window).await?;
            let mut replies = Vec::new();
            while let Some(reply) = stream.next().await {
                replies.push(reply?);
            }
            return Ok(replies);
        };
        let (client, target) = (self.call.client.clone(), self.call.target()?);
        registry::follow(&client);
        let mut votes = Votes::new(quorum, client.known_instances(&target).await);
        let mut stream = self.ask(window).await?;
        let mut replies: Vec<BroadcastReply<T, E>> = Vec::new();
        while !votes.are_decided()
            && let Some(reply) = stream.next().await
        {
            let reply = reply?;
            votes.count(&reply.instance, reply.outcome.as_ref().err().map(why));
            replies.push(reply);
        }
        votes.end(|| target.service_text.to_string())?;
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
        let Call { client, stage, read, .. } = self.call.timeout(window);
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
        let Call { client, stage, .. } = self.call;
        client.send(Request { recipients: Recipients::All, ..Call::<Oneway>::unsent(stage)? }).await
    }
}

impl<T, E> fmt::Debug for Broadcast<T, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Broadcast").field(&self.call).finish()
    }
}

/// Why a reply is not good.
fn why<X: fmt::Debug>(error: &X) -> String {
    format!("{error:?}")
}
