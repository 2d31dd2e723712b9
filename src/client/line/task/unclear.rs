//! Finding out why no queue has taken a call. The broker does not say it, but the instances of its service do, by what they
//! have bound: a question to nobody in particular comes back when there is none for whom it is so.
//!
//! A queue that refuses calls is full, or out of reach, as when its node is away: the latter, where the queue has no limit.
//! What is returned has no queue: it is out of reach, where the service has an instance.

use std::collections::hash_map::Entry;

use uuid::Uuid;

use super::Task;
use crate::client::line::Token;
use crate::client::replies::End;
use crate::client::target::Target;
use crate::outbox::{Parcel, UnderWay};
use crate::route::{Address, Question};
use crate::transport::{Confirm, Lost};
use crate::waiting::{Waiting, Weight};

/// Why a call is not in its queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Cause {
    Refused,
    Returned,
}

impl Cause {
    /// What is asked, to which the answer is yes if the queue is out of reach.
    fn question(self) -> Question {
        match self {
            Self::Refused => Question::HasNoLimit,
            Self::Returned => Question::IsThere,
        }
    }

    /// What is said of the call if nobody is.
    pub(super) fn end(self) -> End {
        End::Said(match self {
            Self::Refused => Confirm::Refused,
            Self::Returned => Confirm::Returned,
        })
    }
}

impl Task {
    /// Has a call that no queue has taken end once it is known why; gives it back when there is nothing to find out.
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
            // A queue of oneway calls has no limit.
            parcel.token.end(&End::Unreachable(namespace.work_queue(service).into()));
            return None;
        }
        // An instance's own queue is another matter, and an alarm keeps questions from being answered.
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

    /// The broker has said whether there is an instance for which it is so, or will not say it any more.
    pub(super) fn found(&mut self, target: &Target, cause: Cause, said: &Result<Confirm, Lost>) {
        let is_out_of_reach = matches!(said, Ok(Confirm::Accepted | Confirm::Refused));
        let mut waiting = self.unclear.remove(&(target.service_text.clone(), cause)).unwrap_or_default();
        for parcel in waiting.clear() {
            parcel.token.end(&match is_out_of_reach {
                true => End::Unreachable(self.sessions.namespace.calls_queue(&target.service).into()),
                false => cause.end(),
            });
        }
    }

    /// Ends what waits for an answer that does not come.
    pub(super) fn end_unclear(&mut self) {
        for ((_, cause), mut waiting) in std::mem::take(&mut self.unclear) {
            for parcel in waiting.clear() {
                parcel.token.end(&cause.end());
            }
        }
    }

    /// Takes out a call while it is not known why no queue has taken it.
    pub(super) fn unfound(&mut self, id: Uuid) -> Option<(Parcel<Token>, Cause)> {
        self.unclear.iter_mut().find_map(|((_, cause), waiting)| Some((waiting.remove(id)?, *cause)))
    }
}
