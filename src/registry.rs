//! Who serves what, asked over the discovery exchange: every instance that is up answers for itself.

use std::sync::Arc;
use std::time::Duration;

use futures::TryStreamExt;

use crate::client::{Arguments, Client, Request, Target};
use crate::document::{Document, Instance, InstanceStats, Typed};
use crate::error::{Code, Error};
use crate::frame::Frame;
use crate::topology::ServiceId;

impl Client {
    /// The instances that are up and what they serve, as those tell that answer within `window`; none is fine too.
    /// Sorted by service and instance.
    ///
    /// # Errors
    /// `Disconnected`, `Blocked`.
    pub async fn instances(&self, window: Duration) -> Result<Vec<Instance>, Error> {
        ask(self, window).await
    }

    /// How busy the instances are that answer within `window`. Sorted by service and instance.
    ///
    /// # Errors
    /// As [`Client::instances`].
    pub async fn stats(&self, window: Duration) -> Result<Vec<InstanceStats>, Error> {
        ask(self, window).await
    }
}

/// The documents that instances give out when they are asked for them, by service and instance.
async fn ask<D: Document>(client: &Client, window: Duration) -> Result<Vec<D>, Error> {
    let service = ServiceId::new("hopline", 1).map_err(Error::Invalid)?;
    let arguments: Arguments = Box::new(|codec, payload| codec.write::<[(); 0]>(&[], payload));
    let target = Arc::new(Target::new(service, D::QUESTION));
    let request = Request { timeout: Some(window), ..Request::new(Ok(target), arguments) };
    let replies = match client.discover(request).await {
        Err(Error::NoService { .. }) => return Ok(Vec::new()),
        replies => replies?.try_collect::<Vec<Frame>>().await?,
    };
    // One that does not know the question, being of another make, is no reason to hear none.
    let known = replies.iter().filter(|reply| reply.status == Code::Ok);
    let mut documents: Vec<D> = known.filter_map(|reply| read(reply, client.max_payload())).collect();
    documents.sort_by(|one, other| one.source().cmp(&other.source()));
    Ok(documents)
}

/// The document that a reply has, of at most so many bytes; none if it is another one than was asked for.
fn read<D: Document>(reply: &Frame, most: usize) -> Option<D> {
    let payload = reply.plain_payload(most).ok()?;
    let typed: Typed = reply.codec.decode(&payload).ok()?;
    typed.is::<D>().then(|| reply.codec.decode(&payload).ok())?
}
