//! A tap: which calls the instances of a service run, told by themselves as it happens.

use std::collections::BTreeSet;
use std::time::Duration;

use futures::{Stream, StreamExt as _, stream};

use super::{Registry, read};
use crate::client::{Answers, ArgumentWriter, Request};
use crate::codec::CodecError;
use crate::document::{Document as _, TAP, Tapped};
use crate::error::Error;
use crate::exchanges::Recipients;
use crate::topology::ServiceId;

/// How long the last documents are waited for after the time of a tap.
const LATE: Duration = Duration::from_secs(1);

/// The replies to a tap.
struct Tapping {
    answers: Answers,
    /// The instances that have begun, and have not sent their last document.
    open: BTreeSet<String>,
}

impl Registry {
    /// Which calls of `service` its instances run, for this time, as they tell it themselves. It takes nothing from their
    /// queues. The stream ends when the time is over or all instances have ended; dropping it ends the tap.
    ///
    /// Each instance first sends a [`Tapped`] without calls: from then on it tells, four times a second, of calls that
    /// have ended after they ran. It tells of at most `per_second` calls a second, and says how many it leaves out. A
    /// oneway call is told once for each attempt. Events are not told, nor calls that were refused or given up before
    /// they ran. Of a call only names, times and sizes are told. Instances that come later are not asked.
    ///
    /// An instance does so for no longer than 10 minutes, for at most 1000 calls a second, and for four taps of a service
    /// at once. An item that is an error is the fault of an instance that refuses, or says that the connection is lost,
    /// and is the last then. What an instance could not send since it had no connection is lost.
    ///
    /// ```
    /// # use std::time::Duration;
    /// use futures::StreamExt;
    ///
    /// # async fn example(client: hopline::Client) -> Result<(), hopline::Error> {
    /// let mut tapped = client.registry().tap("demo", Duration::from_secs(30), 100).await?;
    /// while let Some(tapped) = tapped.next().await {
    ///     for call in tapped?.calls {
    ///         println!("{} by {}: {} after {:?}", call.method, call.caller, call.code, call.handler_time());
    ///     }
    /// }
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// `NoService` if there is no instance, `Invalid` for a name that no service can have, `Disconnected`, `Blocked`, and
    /// `Timeout` if the broker has not confirmed the question in time.
    pub async fn tap(
        &self,
        service: &str,
        time: Duration,
        per_second: u32,
    ) -> Result<impl Stream<Item = Result<Tapped, Error>> + Send + Unpin + use<>, Error> {
        let time_ms = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let arguments: ArgumentWriter = Box::new(move |codec, payload| codec.write(&(time_ms, per_second), payload));
        let request = self.request_with(TAP, arguments, ServiceId::parse(service), Recipients::All);
        let timeout = Some(time.saturating_add(LATE));
        let answers = self.client.ask(Request { timeout, ..request }).await?;
        let tapping = Some(Tapping { answers, open: BTreeSet::new() });
        Ok(stream::unfold(tapping, |tapping| async { tapping?.next().await }).boxed())
    }
}

impl Tapping {
    /// The next item, and the rest. No rest if it was the last.
    async fn next(mut self) -> Option<(Result<Tapped, Error>, Option<Self>)> {
        let (_, reply) = match self.answers.next().await? {
            Ok(answer) => answer,
            Err(lost) => return Some((Err(lost), None)),
        };
        let unreadable = || Error::UnreadableReply(CodecError(format!("the reply is no `{}`", Tapped::TYPE)));
        let tapped = match reply.and_then(|reply| read::<Tapped>(&reply).ok_or_else(unreadable)) {
            Ok(tapped) => tapped,
            Err(refused) => return Some((Err(refused), Some(self))),
        };
        let is_over = if tapped.last {
            self.open.remove(&tapped.instance);
            self.open.is_empty()
        } else {
            self.open.insert(tapped.instance.clone());
            false
        };
        Some((Ok(tapped), Some(self).filter(|_| !is_over)))
    }
}
