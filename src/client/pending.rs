//! Waiting for what comes back: one reply to a call, several to a broadcast.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::Stream;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, Sleep, sleep_until};
use uuid::Uuid;

use super::{Client, no_service};
use crate::call::Target;
use crate::error::Error;
use crate::frame::Frame;
use crate::transport::{Confirm, Receipt};

/// A request on its way. Dropping it before its end cancels the call.
pub(crate) struct Dispatched {
    client: Client,
    target: Target,
    instance: Option<String>,
    id: Uuid,
    deadline: Pin<Box<Sleep>>,
    timeout: Duration,
    /// Until the broker has said what became of the request.
    receipt: Option<Receipt>,
    /// Until it is known that no reply will come.
    reply: Option<oneshot::Receiver<Frame>>,
    ended: bool,
}

impl Dispatched {
    #[allow(clippy::too_many_arguments, reason = "each is a part of the request that just left")]
    pub(super) fn new(
        client: Client,
        target: Target,
        instance: Option<String>,
        id: Uuid,
        deadline: Instant,
        timeout: Duration,
        receipt: Receipt,
        reply: oneshot::Receiver<Frame>,
    ) -> Self {
        let deadline = Box::pin(sleep_until(deadline));
        Self {
            client,
            target,
            instance,
            id,
            deadline,
            timeout,
            receipt: Some(receipt),
            reply: Some(reply),
            ended: false,
        }
    }

    pub(crate) fn timed_out(&self) -> Error {
        Error::Timeout { method: self.target.to_string(), after: self.timeout }
    }

    /// What the broker said of the request, where that ends the call.
    fn poll_receipt(&mut self, context: &mut Context<'_>) -> Option<Error> {
        let Poll::Ready(said) = Pin::new(self.receipt.as_mut()?).poll(context) else { return None };
        self.receipt = None;
        match said {
            Ok(Confirm::Accepted) => None,
            Ok(Confirm::Returned) => Some(no_service(&self.target, self.instance.as_deref())),
            // An instance's queue is never full: the broker refuses for a moment what it returns after it.
            Ok(Confirm::Refused) if self.instance.is_some() => Some(no_service(&self.target, self.instance.as_deref())),
            Ok(Confirm::Refused) => Some(Error::Overloaded { service: self.target.service.to_string() }),
            Err(lost) => Some(lost.into()),
        }
    }

    fn disconnected(&self) -> Error {
        let reason = self.client.lost().unwrap_or_else(|| "no more replies".into());
        Error::Disconnected { may_have_run: true, reason: reason.to_string() }
    }
}

impl Future for Dispatched {
    type Output = Result<Frame, Error>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        if let Some(reply) = &mut self.reply
            && let Poll::Ready(reply) = Pin::new(reply).poll(context)
        {
            self.reply = None;
            if let Ok(reply) = reply {
                self.ended = true;
                return Poll::Ready(Ok(reply));
            }
        }
        if let Some(error) = self.poll_receipt(context) {
            self.ended = true;
            return Poll::Ready(Err(error));
        }
        // No reply can come. Whether the request left is what the receipt, still to come or come, says.
        if self.reply.is_none() && self.receipt.is_none() {
            self.ended = true;
            return Poll::Ready(Err(self.disconnected()));
        }
        // Ending by the deadline is giving up: dropping `self` tells the server.
        self.deadline.as_mut().poll(context).map(|()| Err(self.timed_out()))
    }
}

impl Drop for Dispatched {
    fn drop(&mut self) {
        self.client.forget(self.id);
        if self.ended {
            return;
        }
        let (client, target, instance) = (self.client.clone(), self.target.clone(), self.instance.take());
        let (id, deadline) = (self.id, self.deadline.deadline());
        match self.receipt.take() {
            None => client.cancel(id, &target, instance.as_deref(), deadline),
            // Only a request that some queue has taken can be cancelled.
            Some(receipt) => {
                self.client.runtime().spawn(async move {
                    if receipt.await == Ok(Confirm::Accepted) {
                        client.cancel(id, &target, instance.as_deref(), deadline);
                    }
                });
            }
        }
    }
}

impl fmt::Debug for Dispatched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Dispatched").field("target", &self.target).field("id", &self.id).finish_non_exhaustive()
    }
}

/// Replies to a broadcast as they arrive, until its deadline.
pub(crate) struct Gathering {
    client: Client,
    target: Target,
    id: Uuid,
    deadline: Pin<Box<Sleep>>,
    replies: mpsc::UnboundedReceiver<Frame>,
    cancels: bool,
}

impl Gathering {
    pub(super) fn new(
        client: Client,
        target: Target,
        id: Uuid,
        deadline: Instant,
        replies: mpsc::UnboundedReceiver<Frame>,
    ) -> Self {
        Self { client, target, id, deadline: Box::pin(sleep_until(deadline)), replies, cancels: false }
    }

    /// From now on, dropping it before its deadline cancels the call.
    pub(super) fn cancel_when_dropped(&mut self) {
        self.cancels = true;
    }
}

impl Stream for Gathering {
    type Item = Frame;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Frame>> {
        if let Poll::Ready(reply) = self.replies.poll_recv(context) {
            return Poll::Ready(reply);
        }
        self.deadline.as_mut().poll(context).map(|()| None)
    }
}

impl Drop for Gathering {
    fn drop(&mut self) {
        self.client.forget(self.id);
        if self.cancels && !self.deadline.is_elapsed() {
            self.client.cancel(self.id, &self.target, None, self.deadline.deadline());
        }
    }
}
