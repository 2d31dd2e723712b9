//! Discovery from the client's side: a client asks over the discovery exchange, and every instance that is up replies
//! for itself. Nothing keeps a list of the instances.

use std::sync::Arc;
use std::time::Duration;

use futures::TryStreamExt;

use crate::client::{Arguments, Client, Request, Target};
use crate::document::{Document, Instance, InstanceStats, Typed};
use crate::error::{Code, Error};
use crate::frame::Frame;
use crate::topology::ServiceId;

impl Client {
    /// The instances that are up and what they serve, sorted by service and instance.
    ///
    /// Waits for the whole of `window` and collects the replies that arrive in it. The list is empty if nobody replies.
    ///
    /// # Errors
    /// `Disconnected`, `Blocked`.
    pub async fn instances(&self, window: Duration) -> Result<Vec<Instance>, Error> {
        ask(self, window).await
    }

    /// How busy the instances are that reply within `window`, sorted by service and instance.
    ///
    /// # Errors
    /// As [`Client::instances`].
    pub async fn stats(&self, window: Duration) -> Result<Vec<InstanceStats>, Error> {
        ask(self, window).await
    }
}

/// Asks all instances for their document `D`, and returns the documents of those that reply within `window`.
async fn ask<D: Document>(client: &Client, window: Duration) -> Result<Vec<D>, Error> {
    let service = ServiceId::new("hopline", 1).map_err(Error::Invalid)?;
    let arguments: Arguments = Box::new(|codec, payload| codec.write::<[(); 0]>(&[], payload));
    let target = Arc::new(Target::new(service, D::QUESTION));
    let request = Request { timeout: Some(window), ..Request::new(Ok(target), arguments) };
    let replies = match client.discover(request).await {
        Err(Error::NoService { .. }) => return Ok(Vec::new()),
        replies => replies?.try_collect::<Vec<Frame>>().await?,
    };
    // An instance of another version may not know the question and reply with a fault. The others' replies count.
    let known = replies.iter().filter(|reply| reply.status == Code::Ok);
    let mut documents: Vec<D> = known.filter_map(|reply| read(reply, client.max_payload())).collect();
    documents.sort_by(|one, other| one.source().cmp(&other.source()));
    Ok(documents)
}

/// The document in a reply whose payload is at most `most` bytes. `None` if it is another document than `D`, or
/// unreadable.
fn read<D: Document>(reply: &Frame, most: usize) -> Option<D> {
    let payload = reply.plain_payload(most).ok()?;
    let typed: Typed = reply.codec.decode(&payload).ok()?;
    typed.is::<D>().then(|| reply.codec.decode(&payload).ok())?
}
