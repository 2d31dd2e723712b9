//! What a caller waits on: [`Dispatched`] for one reply, [`Gathering`] for the replies to a broadcast.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures::Stream;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, Sleep};
use uuid::Uuid;

use super::Client;
use super::in_flight::CallEnd;
use super::target::Target;
use crate::codec::CodecError;
use crate::compression::CompressionRefusal;
use crate::error::{Code, Error, Fault, RefusedBy, Unanswered};
use crate::exchanges::Recipients;
use crate::frame::Frame;
#[cfg(feature = "metrics")]
use crate::frame::Trace;
use crate::middleware::Reply;
use crate::outcome_span::OutcomeSpan;
use crate::topology::instance_key;
use crate::transport::{Confirm, Lost};

/// How long a call waits after its deadline until the line tells what is known of it. The line tells it at once, unless
/// the machine is busy.
pub(super) const OVERDUE: Duration = Duration::from_millis(200);

/// What a caller keeps of a request that was handed to the line.
#[derive(Debug)]
pub(crate) struct Ticket {
    pub(super) target: Arc<Target>,
    pub(super) recipients: Recipients,
    pub(super) id: Uuid,
    /// The size of the frame, in bytes, for the error `TooLarge`.
    pub(super) size: usize,
    pub(super) deadline: Instant,
    pub(super) timeout: Duration,
    /// The span of the call, or of this attempt. It is entered when the caller polls.
    pub(super) span: OutcomeSpan,
    #[cfg(feature = "metrics")]
    pub(super) trace: Option<Trace>,
}

impl Ticket {
    /// The error for a call that has timed out.
    pub(super) fn timed_out(&self, why: Unanswered) -> Error {
        let left = match why {
            Unanswered::Draining => self.deadline.saturating_duration_since(Instant::now()),
            _ => Duration::ZERO,
        };
        Error::Timeout { method: self.target.to_string(), after: self.timeout.saturating_sub(left), why }
    }

    /// The error for a call that nobody serves.
    fn no_service(&self) -> Error {
        let service = match self.recipients.instance() {
            Some(instance) => instance_key(&self.target.service_text, instance),
            None => self.target.service_text.to_string(),
        };
        Error::NoService { service, method: None }
    }

    /// The error for the end of a request, or `Ok` if the call goes on, since the broker has accepted it.
    pub(super) fn outcome(&self, end: CallEnd) -> Result<(), Error> {
        match end {
            CallEnd::Said(Confirm::Accepted) => Ok(()),
            CallEnd::Said(Confirm::Returned) => Err(self.no_service()),
            // An instance's own queue has no limit. The broker may refuse for a moment before it returns, when the
            // queue is being deleted.
            CallEnd::Said(Confirm::Refused) if self.recipients.instance().is_some() => Err(self.no_service()),
            CallEnd::Said(Confirm::Refused) => Err(queue_full(&self.target.service)),
            CallEnd::Said(Confirm::TooLarge(limit)) => {
                Err(Error::TooLarge { what: "request", size: self.size, limit, whose: "broker's" })
            }
            CallEnd::Lost(lost) => Err(lost_with(self.target.to_string(), lost)),
            CallEnd::Blocked { reason, after, may_have_run } => {
                let method = Some(self.target.to_string());
                Err(Error::Blocked { method, reason: reason.to_string(), after, may_have_run })
            }
            CallEnd::TimedOut(why) => Err(self.timed_out(why)),
            CallEnd::Unreachable(queue) => {
                Err(Error::Unreachable { method: self.target.to_string(), queue: queue.to_string() })
            }
            CallEnd::NoExchange { exchange, why } => Err(no_exchange(&exchange, why)),
            CallEnd::Full(limit) => {
                #[cfg(feature = "metrics")]
                self.target.counted.counts.is_crowded_out();
                Err(Error::Overloaded { what: format!("this client has {limit} calls in flight, its limit") })
            }
            CallEnd::Silent { instance, after } => {
                let why = format!(
                    "instance {instance}, which ran `{}`, has not reported in for {after:?}: it may have run",
                    self.target
                );
                Err(Error::Fault(Fault::new(Code::Aborted, why)))
            }
        }
    }
}

/// The error for a call or an event that was lost with its connection, or not accepted by it.
pub(super) fn lost_with(method: String, lost: Lost) -> Error {
    match lost.into() {
        Error::Disconnected { may_have_run, reason, .. } => {
            Error::Disconnected { method: Some(method), may_have_run, reason }
        }
        other => other,
    }
}

/// The error for a publication whose exchange was deleted.
pub(super) fn no_exchange(exchange: &str, reason: String) -> Error {
    Error::refused(format!("publish to the exchange `{exchange}`"), reason)
}

/// The error for a call that its queue has refused.
pub(super) fn queue_full(name: impl fmt::Display) -> Error {
    Error::Overloaded { what: format!("the queue of `{name}` is full") }
}

/// A request that was handed to the line. It is a future that resolves with the reply. Dropping it before that cancels
/// the call.
pub(crate) struct Dispatched {
    client: Client,
    ticket: Ticket,
    /// A timer for the deadline. It is made at the first poll that has to wait.
    deadline: Option<Pin<Box<Sleep>>>,
    reply: oneshot::Receiver<Result<Frame, CallEnd>>,
    /// Whether the deadline has passed, and the line was asked what is known of the call.
    overdue: bool,
    /// Whether it has resolved, and no cancel is needed.
    ended: bool,
    said: SaidOfItself,
}

/// What an instance has said of itself with its reply.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct SaidOfItself {
    /// It is leaving, and has not run the call.
    pub(super) is_leaving: bool,
    /// How many calls run there.
    pub(super) running: Option<u64>,
}

impl SaidOfItself {
    fn with(reply: &Frame) -> Self {
        let has_run = reply.service_error || reply.metadata.handler_time.is_some();
        let is_leaving = reply.status == Code::Unavailable && !has_run;
        Self { is_leaving, running: reply.metadata.more().running }
    }
}

impl Dispatched {
    pub(super) fn new(client: Client, ticket: Ticket, reply: oneshot::Receiver<Result<Frame, CallEnd>>) -> Self {
        Self { client, ticket, deadline: None, reply, overdue: false, ended: false, said: SaidOfItself::default() }
    }

    /// The trace that the call was sent with.
    #[cfg(feature = "metrics")]
    pub(super) fn trace(&self) -> Option<Trace> {
        self.ticket.trace
    }

    /// What the instance has said of itself, once it has replied.
    pub(super) fn said(&self) -> SaidOfItself {
        self.said
    }

    /// The result for what the line has told.
    fn end(&self, end: Result<Result<Frame, CallEnd>, oneshot::error::RecvError>) -> Result<Reply, Error> {
        match end {
            // A handler may say so too, before the deadline.
            Ok(Ok(reply)) if reply.status == Code::DeadlineExceeded && self.ticket.deadline <= Instant::now() => {
                return Err(self.ticket.timed_out(Unanswered::Unknown));
            }
            Ok(Ok(reply)) => return read(reply, self.client.max_payload()),
            Ok(Err(end)) => self.ticket.outcome(end)?,
            Err(_) => {}
        }
        Err(self.client.disconnected(&self.ticket.target, true))
    }
}

impl Future for Dispatched {
    type Output = Result<Reply, Error>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let span = self.ticket.span.span().clone();
        let _entered = span.enter();
        loop {
            if let Poll::Ready(end) = Pin::new(&mut self.reply).poll(context) {
                // A call that has timed out, or waits at a blocked broker, may still run. Then dropping `self` sends a
                // cancel.
                let may_run =
                    matches!(end, Ok(Err(CallEnd::TimedOut(_) | CallEnd::Blocked { may_have_run: true, .. })));
                self.ended = !may_run;
                if let Ok(Ok(reply)) = &end {
                    self.said = SaidOfItself::with(reply);
                }
                let outcome = self.end(end);
                self.ticket.span.ends(&outcome);
                return Poll::Ready(outcome);
            }
            let Self { client, ticket, deadline, .. } = &mut *self;
            let deadline = deadline.get_or_insert_with(|| Box::pin(client.timer(ticket.deadline)));
            ready!(deadline.as_mut().poll(context));
            deadline.as_mut().reset(Instant::now() + OVERDUE);
            if self.overdue {
                let outcome = Err(self.ticket.timed_out(Unanswered::Unknown));
                self.ticket.span.ends(&outcome);
                return Poll::Ready(outcome);
            }
            self.overdue = true;
            self.client.overdue(self.ticket.id);
        }
    }
}

impl Drop for Dispatched {
    fn drop(&mut self) {
        if !self.ended {
            // The line sees by this that a parcel that was not sent yet is not wanted any more.
            self.reply.close();
            self.client.forget(self.ticket.id, Some(&self.ticket));
        }
    }
}

impl fmt::Debug for Dispatched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Dispatched").field(&self.ticket).finish()
    }
}

/// The reply of one instance to a broadcast, with the id of the instance if the reply tells it.
pub(crate) type Answer = (Option<Arc<str>>, Result<Reply, Error>);

/// The replies to a broadcast, as a stream that ends at the deadline. If the connection is lost, that error is the last
/// item.
pub(crate) struct Gathering {
    client: Client,
    ticket: Ticket,
    /// A timer for the deadline. It is made at the first poll that has to wait.
    deadline: Option<Pin<Box<Sleep>>>,
    replies: mpsc::UnboundedReceiver<Frame>,
    /// Whether dropping it before its deadline cancels the call.
    cancels: bool,
    ended: bool,
}

impl Gathering {
    pub(super) fn new(client: Client, ticket: Ticket, replies: mpsc::UnboundedReceiver<Frame>, cancels: bool) -> Self {
        Self { client, ticket, deadline: None, replies, cancels, ended: false }
    }

    pub(super) fn ticket(&mut self) -> &mut Ticket {
        &mut self.ticket
    }
}

impl Stream for Gathering {
    type Item = Result<Answer, Error>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.ended {
            return Poll::Ready(None);
        }
        match self.replies.poll_recv(context) {
            Poll::Ready(Some(reply)) => {
                let instance = reply.metadata.instance.clone();
                Poll::Ready(Some(Ok((instance, read(reply, self.client.max_payload())))))
            }
            Poll::Ready(None) => {
                self.ended = true;
                Poll::Ready(Some(Err(self.client.disconnected(&self.ticket.target, true))))
            }
            Poll::Pending => {
                let Self { client, ticket, deadline, .. } = &mut *self;
                let deadline = deadline.get_or_insert_with(|| Box::pin(client.timer(ticket.deadline)));
                ready!(deadline.as_mut().poll(context));
                self.ended = true;
                Poll::Ready(None)
            }
        }
    }
}

impl Drop for Gathering {
    fn drop(&mut self) {
        let cancel = (self.cancels && !self.ended).then_some(&self.ticket);
        self.client.forget(self.ticket.id, cancel);
    }
}

/// Turns the frame of a reply into a reply or an error. A compressed payload may decompress to at most `max_payload`
/// bytes.
fn read(mut frame: Frame, max_payload: usize) -> Result<Reply, Error> {
    let more = frame.metadata.more();
    if !frame.service_error {
        if let Some((size, limit)) = more.too_large {
            let bytes = |number| usize::try_from(number).unwrap_or(usize::MAX);
            return Err(Error::TooLarge {
                what: "reply",
                size: bytes(size),
                limit: bytes(limit),
                whose: "server's or broker's",
            });
        }
        if frame.status != Code::Ok || more.error.is_some() {
            return Err(Error::Fault(fault(&frame)));
        }
    }
    let payload = frame.plain_payload(max_payload).map_err(|refusal| match refusal {
        CompressionRefusal::TooLarge { size, cap } => {
            Error::TooLarge { what: "reply", size, limit: cap, whose: "client's" }
        }
        refusal => Error::UnreadableReply(CodecError(format!("the reply cannot be read: {refusal}"))),
    })?;
    Ok(Reply {
        payload,
        own_error: frame.service_error,
        instance: frame.metadata.instance.take(),
        handler_time: frame.metadata.handler_time,
        metadata: frame.metadata.more.take().map(|more| more.user.into()).unwrap_or_default(),
        ..Reply::empty(frame.codec)
    })
}

/// The fault in the frame of a reply.
fn fault(reply: &Frame) -> Fault {
    let more = reply.metadata.more();
    let reason = more.error.clone().filter(|reason| !reason.is_empty());
    Fault {
        // A reply with the text of an error is an error, whatever its status says.
        code: if reply.status == Code::Ok { Code::Unknown } else { reply.status },
        message: reason.unwrap_or_else(|| "the server gave no reason".to_owned()),
        retry_after: more.retry_after,
        is_permanent: more.is_permanent,
        // A reply tells how long the handler took, if one ran. Of a call that was broken off, nobody knows.
        has_not_run: reply.metadata.handler_time.is_none()
            && matches!(reply.status, Code::Unavailable | Code::ResourceExhausted),
        instance: reply.metadata.instance.clone(),
        refused_by: RefusedBy::Other,
    }
}
