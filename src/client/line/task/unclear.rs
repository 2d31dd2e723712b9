//! Finds out why a queue has not accepted a call. The broker does not tell, but what the instances of the service have
//! bound does.
//!
//! A queue that refuses a call is full, or it is unreachable, for example since its node is down. If an instance says
//! that the queue has no limit, it is unreachable. A call that is returned has no queue. If the service has an
//! instance, the queue is unreachable. Instances say these things by binding a key: a question to this key is returned
//! if no instance has bound it.

use std::collections::hash_map::Entry;

use uuid::Uuid;

use super::LineTask;
use crate::client::in_flight::CallEnd;
use crate::client::line::Token;
use crate::client::target::Target;
use crate::exchanges::{Address, Question};
use crate::outgoing::{Parcel, UnderWay, Waiting, Weight};
use crate::transport::{Confirm, Lost};

/// What the broker has done with the call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Cause {
    /// Its queue has refused it.
    Refused,
    /// There was no queue for it.
    Returned,
}

impl Cause {
    /// The question whose answer is yes if the queue is unreachable.
    fn question(self) -> Question {
        match self {
            Self::Refused => Question::HasNoLimit,
            Self::Returned => Question::IsThere,
        }
    }

    /// The end of the call if the queue is not known to be unreachable.
    pub(super) fn end(self) -> CallEnd {
        CallEnd::Said(match self {
            Self::Refused => Confirm::Refused,
            Self::Returned => Confirm::Returned,
        })
    }
}

impl LineTask {
    /// Keeps a call that its queue has not accepted until the reason is known. Gives it back if there is nothing to
    /// find out.
    pub(super) fn find_out(
        &mut self,
        address: &Address,
        parcel: Parcel<Token>,
        confirm: &Confirm,
    ) -> Option<Parcel<Token>> {
        let cause = match confirm {
            Confirm::Refused => Cause::Refused,
            Confirm::Returned => Cause::Returned,
            Confirm::Accepted | Confirm::TooLarge(_) => return Some(parcel),
        };
        let namespace = &self.sessions.namespace;
        if cause == Cause::Refused
            && let Some(service) = address.worked_off_by()
        {
            // A queue of oneway calls has no limit, so it cannot be full.
            parcel.token.end(&CallEnd::Unreachable(namespace.work_queue(service).into()));
            return None;
        }
        // Calls to one instance go to its own queue, about which nothing can be asked. Under an alarm no question would
        // be answered.
        let target = parcel.token.reply.as_ref().map(|(_, target)| target.clone());
        let target = target.filter(|target| address.is_for_any(&target.service_text));
        let (Some(target), Some(session), None) = (target, &self.session, &self.blocked) else { return Some(parcel) };
        match self.unclear.entry((target.service_text.clone(), cause)) {
            Entry::Occupied(mut asked) => {
                asked.get_mut().push(parcel.id, parcel.token.deadline, Weight::default(), parcel);
            }
            Entry::Vacant(new) => {
                let (id, until) = (parcel.id, parcel.token.deadline);
                new.insert_entry(Waiting::default()).get_mut().push(id, until, Weight::default(), parcel);
                let receipt = session.transport.publish(self.question(cause.question(), &target));
                self.causes.push(UnderWay::new((target, cause), receipt));
            }
        }
        None
    }

    /// The broker has told whether there is such an instance, or cannot tell any more.
    pub(super) fn found(&mut self, target: &Target, cause: Cause, said: &Result<Confirm, Lost>) {
        let is_out_of_reach = matches!(said, Ok(Confirm::Accepted | Confirm::Refused));
        let mut waiting = self.unclear.remove(&(target.service_text.clone(), cause)).unwrap_or_default();
        for parcel in waiting.clear() {
            parcel.token.end(&match is_out_of_reach {
                true => CallEnd::Unreachable(self.sessions.namespace.calls_queue(&target.service).into()),
                false => cause.end(),
            });
        }
    }

    /// Ends the calls that wait for an answer, since none will come.
    pub(super) fn end_unclear(&mut self) {
        for ((_, cause), mut waiting) in std::mem::take(&mut self.unclear) {
            for parcel in waiting.clear() {
                parcel.token.end(&cause.end());
            }
        }
    }

    /// Takes out a call that waits for an answer.
    pub(super) fn unfound(&mut self, id: Uuid) -> Option<(Parcel<Token>, Cause)> {
        self.unclear.iter_mut().find_map(|((_, cause), waiting)| Some((waiting.remove(id)?, *cause)))
    }
}
