//! How a client sends requests, broadcasts, oneway calls and cancels, and what it does with the broker's confirms.

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, Sleep};
use tracing::Instrument as _;
use uuid::Uuid;

use super::in_flight::{CallEnd, Waiter};
use super::line::{Addressed, Token};
use super::pending::{Dispatched, Gathering, OVERDUE, Ticket};
use super::request::{Payload, Request};
use super::target::Target;
use super::{Absent, CANCEL_LATE, Client};
use crate::clock::timer;
use crate::codec::Codec;
use crate::document::TAP;
use crate::error::{Error, Unanswered};
use crate::exchanges::Recipients;
use crate::frame::{Frame, Kind, Metadata};
use crate::outgoing::Parcel;
use crate::transport::Lost;

impl Client {
    /// Sends a request. The reply comes through what this returns.
    pub(crate) fn dispatch<P: Payload>(&self, request: Request<P>) -> Result<Dispatched, Error> {
        let outgoing = self.prepare(request, Kind::Request)?;
        outgoing.counts();
        let (sender, replied) = oneshot::channel();
        let Ticket { target, recipients, .. } = &outgoing.ticket;
        let address = self.0.exchanges.request(recipients, &target.service_text);
        // Who calls one instance hears at once if that is not there.
        let absent = if *recipients == Recipients::Any { outgoing.absent } else { Absent::Wait };
        let reply = Some((Waiter::One(sender), target.clone()));
        let leaving = outgoing.leaving.clone();
        let token = Token { reply, repeatable: outgoing.idempotent, absent, leaving, ..outgoing.token() };
        let share = self.0.settings.coalesce.share_of(target);
        let ticket = self.post(outgoing, address, share, token);
        Ok(Dispatched::new(self.clone(), ticket, replied))
    }

    /// Sends a request to all instances on its recipients, of one service or of all services. Returns when the broker has
    /// confirmed it.
    pub(super) async fn gather<P: Payload>(&self, request: Request<P>) -> Result<Gathering, Error> {
        let outgoing = self.prepare(request, Kind::Request)?;
        let Ticket { target, recipients, .. } = &outgoing.ticket;
        let address = self.0.exchanges.request(recipients, &target.service_text);
        // A question of discovery takes no time, except for a tap.
        let cancels = !target.is_question() || *target.method == *TAP;
        let (sender, replies) = mpsc::unbounded_channel();
        let target = outgoing.ticket.target.clone();
        let (confirm, said) = oneshot::channel();
        let reply = Some((Waiter::Many(sender), target.clone()));
        let token = Token { said: Some(confirm), reply, ..outgoing.token() };
        let ticket = self.post(outgoing, address, self.0.settings.coalesce.share_of(&target), token);
        let mut gathering = Gathering::new(self.clone(), ticket, replies, cancels);
        let outcome = match self.confirmed(gathering.ticket(), said).await {
            // One instance is going at this moment; the others have it.
            Err(Error::Overloaded { .. }) => Ok(()),
            confirmed => confirmed,
        };
        gathering.ticket().span.ends(&outcome);
        outcome.map(|()| gathering)
    }

    /// Publishes a oneway call. Returns when the broker has confirmed it.
    pub(super) async fn hand_over<P: Payload>(&self, request: Request<P>) -> Result<(), Error> {
        let outgoing = self.prepare(request, Kind::Oneway)?;
        outgoing.counts();
        let Ticket { target, recipients, .. } = &outgoing.ticket;
        let address = self.0.exchanges.oneway(recipients, &target.service_text, &target.text);
        let (confirm, said) = oneshot::channel();
        let token = Token { said: Some(confirm), repeatable: true, ..outgoing.token() };
        let mut ticket = self.post(outgoing, address, self.0.settings.coalesce.share(), token);
        let outcome = match (self.confirmed(&ticket, said).await, &ticket.recipients) {
            (Err(Error::Overloaded { .. }), Recipients::All) => Ok(()),
            (Err(Error::NoService { service, .. }), Recipients::Any) => {
                Err(Error::NoService { service, method: Some(ticket.target.method.to_string()) })
            }
            (confirmed, _) => confirmed,
        };
        ticket.span.ends(&outcome);
        outcome
    }

    /// The cancel of a call, addressed to the instances that may be running it.
    fn cancel(&self, ticket: &Ticket) -> Addressed {
        let Ticket { target, recipients, id, deadline, .. } = ticket;
        let remaining = deadline.saturating_duration_since(Instant::now());
        let caller = Some(self.0.caller.clone());
        let metadata = Metadata { remaining: Some(remaining), instance: caller, ..Metadata::default() };
        let parcel = Parcel {
            id: *id,
            frame: Frame::new(Kind::Cancel, *id, Codec::Raw, metadata, Bytes::new()).to_body(),
            share: self.0.settings.coalesce.share(),
            kind: Some(target.text.clone()),
            expiration: None,
            // Nobody waits to hear what becomes of it, and twice is as good as once.
            token: Token { repeatable: true, ..Token::until(*deadline + CANCEL_LATE) },
        };
        (self.0.exchanges.cancel(recipients, &target.service_text), parcel)
    }

    /// Stops waiting for a call. With a ticket, this also sends a cancel to the instance that runs it.
    pub(super) fn forget(&self, id: Uuid, ticket: Option<&Ticket>) {
        self.0.line.forget(id, ticket.map(|ticket| self.cancel(ticket)));
    }

    /// The error of a call whose reply cannot come any more.
    pub(super) fn disconnected(&self, target: &Target, may_have_run: bool) -> Error {
        Error::Disconnected { method: Some(target.to_string()), may_have_run, reason: self.0.line.reason().to_string() }
    }

    /// Waits until the broker has confirmed a request, or until the deadline.
    async fn confirmed(&self, ticket: &Ticket, said: oneshot::Receiver<CallEnd>) -> Result<(), Error> {
        ticket.outcome(self.end_of(ticket.id, ticket.deadline, said).instrument(ticket.span.span().clone()).await)
    }

    /// What the broker said about the frame `id`, or what else happened to it by its deadline.
    pub(super) async fn end_of(&self, id: Uuid, deadline: Instant, mut said: oneshot::Receiver<CallEnd>) -> CallEnd {
        let in_time = tokio::select! {
            biased;
            said = &mut said => Some(said),
            () = self.timer(deadline) => None,
        };
        let said = match in_time {
            Some(said) => said,
            None => {
                self.overdue(id);
                tokio::select! {
                    biased;
                    said = said => said,
                    () = self.timer(Instant::now() + OVERDUE) => Ok(CallEnd::TimedOut(Unanswered::Unknown)),
                }
            }
        };
        let gone = || Lost::connection(true, self.0.line.reason());
        said.unwrap_or_else(|_| CallEnd::Lost(gone()))
    }

    /// A timer that works on any thread. It uses the tokio runtime of the thread that waits, or if there is none, the
    /// one in which the client connected.
    pub(crate) fn timer(&self, at: Instant) -> Sleep {
        timer(&self.0.runtime, at)
    }

    /// Tells the line that the time of a call is over. The line then says whether the call was sent.
    pub(super) fn overdue(&self, id: Uuid) {
        self.0.line.overdue(id);
    }
}
