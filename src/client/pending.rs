//! Waiting for what comes back: one reply to a call, several to a broadcast.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::Stream;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, Sleep, sleep_until};
use tracing::Span;
use uuid::Uuid;

use super::Client;
use crate::call::Target;
use crate::error::Error;
use crate::frame::Frame;
use crate::topology::instance_key;
use crate::transport::{Confirm, Lost, Receipt};

/// What stays behind of a request that leaves.
#[derive(Debug)]
pub(crate) struct Ticket {
    pub(super) target: Target,
    pub(super) instance: Option<String>,
    pub(super) id: Uuid,
    pub(super) size: usize,
    pub(super) deadline: Instant,
    pub(super) timeout: Duration,
    pub(super) span: Span,
}

impl Ticket {
    pub(super) fn timed_out(&self) -> Error {
        Error::Timeout { method: self.target.to_string(), after: self.timeout }
    }

    fn no_service(&self) -> Error {
        let Target { service, .. } = &self.target;
        let service = match &self.instance {
            Some(instance) => instance_key(service, instance),
            None => service.to_string(),
        };
        Error::NoService { service }
    }

    /// What the broker said of the request, where that ends the call.
    pub(super) fn outcome(&self, said: Result<Confirm, Lost>) -> Result<(), Error> {
        match said {
            Ok(Confirm::Accepted) => Ok(()),
            Ok(Confirm::Returned) => Err(self.no_service()),
            // An instance's queue is never full: the broker refuses for a moment what it returns after it.
            Ok(Confirm::Refused) if self.instance.is_some() => Err(self.no_service()),
            Ok(Confirm::Refused) => Err(Error::Overloaded { service: self.target.service.to_string() }),
            Ok(Confirm::TooLarge(limit)) => Err(Error::TooLarge { what: "request", size: self.size, limit }),
            Err(lost) => Err(lost.into()),
        }
    }
}

/// A request on its way. Dropping it before its end cancels the call.
pub(crate) struct Dispatched {
    client: Client,
    /// Taken when it is dropped.
    ticket: Option<Ticket>,
    deadline: Pin<Box<Sleep>>,
    /// Until the broker has said what became of the request.
    receipt: Option<Receipt>,
    /// Until it is known that no reply will come.
    reply: Option<oneshot::Receiver<Frame>>,
    ended: bool,
}

impl Dispatched {
    pub(super) fn new(client: Client, ticket: Ticket, receipt: Receipt, reply: oneshot::Receiver<Frame>) -> Self {
        let deadline = Box::pin(sleep_until(ticket.deadline));
        Self { client, ticket: Some(ticket), deadline, receipt: Some(receipt), reply: Some(reply), ended: false }
    }

    fn ticket(&self) -> &Ticket {
        self.ticket.as_ref().expect("taken only when dropped")
    }

    /// The error of a reply that says that the deadline passed; none if it did not, and the handler just says so.
    pub(crate) fn timed_out(&self) -> Option<Error> {
        (self.ticket().deadline <= Instant::now()).then(|| self.ticket().timed_out())
    }

    /// The reply, or what makes sure that none will come.
    fn poll_end(&mut self, context: &mut Context<'_>) -> Poll<Result<Frame, Error>> {
        if let Some(reply) = &mut self.reply
            && let Poll::Ready(reply) = Pin::new(reply).poll(context)
        {
            self.reply = None;
            if let Ok(reply) = reply {
                return Poll::Ready(Ok(reply));
            }
        }
        if let Some(receipt) = &mut self.receipt
            && let Poll::Ready(said) = Pin::new(receipt).poll(context)
        {
            self.receipt = None;
            self.ticket().outcome(said)?;
        }
        // Without a reply to come, whether the request left is what the receipt says, or has said.
        if self.reply.is_none() && self.receipt.is_none() {
            return Poll::Ready(Err(self.client.disconnected()));
        }
        Poll::Pending
    }
}

impl Future for Dispatched {
    type Output = Result<Frame, Error>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let span = self.ticket().span.clone();
        let _entered = span.enter();
        if let Poll::Ready(end) = self.poll_end(context) {
            self.ended = true;
            return Poll::Ready(end);
        }
        // Ending by the deadline is giving up: dropping `self` tells the server.
        self.deadline.as_mut().poll(context).map(|()| Err(self.ticket().timed_out()))
    }
}

impl Drop for Dispatched {
    fn drop(&mut self) {
        let Some(ticket) = self.ticket.take() else { return };
        self.client.forget(ticket.id);
        if self.ended {
            return;
        }
        match self.receipt.take() {
            None => self.client.cancel(&ticket),
            // Only a request that some queue has taken can be cancelled.
            Some(receipt) => {
                let client = self.client.clone();
                self.client.runtime().spawn(async move {
                    if receipt.await == Ok(Confirm::Accepted) {
                        client.cancel(&ticket);
                    }
                });
            }
        }
    }
}

impl fmt::Debug for Dispatched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Dispatched").field(&self.ticket).finish()
    }
}

/// Replies to a broadcast as they arrive, until its deadline; a lost connection is the last item.
pub(crate) struct Gathering {
    client: Client,
    ticket: Ticket,
    deadline: Pin<Box<Sleep>>,
    replies: mpsc::UnboundedReceiver<Frame>,
    /// Whether dropping it before its deadline cancels the call.
    cancels: bool,
    ended: bool,
}

impl Gathering {
    pub(super) fn new(client: Client, ticket: Ticket, replies: mpsc::UnboundedReceiver<Frame>, cancels: bool) -> Self {
        let deadline = Box::pin(sleep_until(ticket.deadline));
        Self { client, ticket, deadline, replies, cancels, ended: false }
    }

    pub(super) fn ticket(&self) -> &Ticket {
        &self.ticket
    }
}

impl Stream for Gathering {
    type Item = Result<Frame, Error>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.ended {
            return Poll::Ready(None);
        }
        match self.replies.poll_recv(context) {
            Poll::Ready(Some(reply)) => Poll::Ready(Some(Ok(reply))),
            Poll::Ready(None) => {
                self.ended = true;
                Poll::Ready(Some(Err(self.client.disconnected())))
            }
            Poll::Pending => {
                std::task::ready!(self.deadline.as_mut().poll(context));
                self.ended = true;
                Poll::Ready(None)
            }
        }
    }
}

impl Drop for Gathering {
    fn drop(&mut self) {
        self.client.forget(self.ticket.id);
        if self.cancels && !self.ended {
            self.client.cancel(&self.ticket);
        }
    }
}
