//! Discovery from the client's side: a client asks over the discovery exchange, and every instance that is up replies
//! for itself. Nothing keeps a list of the instances.

use std::sync::Arc;
use std::time::Duration;

use futures::TryStreamExt;

use crate::client::{ArgumentWriter, Client, Request, Target};
use crate::document::{Document, Instance, InstanceStats, Typed};
use crate::error::Error;
use crate::middleware::Reply;
use crate::route::Route;
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
    let arguments: ArgumentWriter = Box::new(|codec, payload| codec.write::<[(); 0]>(&[], payload));
    let target = Arc::new(Target::new(service, D::QUESTION));
    let request = Request { timeout: Some(window), route: Route::Everywhere, ..Request::new(Ok(target), arguments) };
    let answers = match client.ask(request).await {
        Err(Error::NoService { .. }) => return Ok(Vec::new()),
        answers => answers?.try_collect::<Vec<_>>().await?,
    };
    // An instance of another version may not know the question and reply with a fault. The others' replies count.
    let known = answers.into_iter().filter_map(|(_, reply)| reply.ok()).filter(|reply| !reply.is_own_error());
    let mut documents: Vec<D> = known.filter_map(|reply| read(&reply)).collect();
    documents.sort_by(|one, other| one.source().cmp(&other.source()));
    Ok(documents)
}

/// The document in a reply. `None` if it is another document than `D`, or unreadable.
fn read<D: Document>(reply: &Reply) -> Option<D> {
    let typed: Typed = reply.codec().decode(reply.payload()).ok()?;
    typed.is::<D>().then(|| reply.codec().decode(reply.payload()).ok())?
}
