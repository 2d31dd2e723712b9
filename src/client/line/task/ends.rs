//! How calls end that do not get a reply: the broker returns or refuses them, the connection is lost, the broker is
//! blocked, their instance is silent, or their deadline passes. Some are sent again instead.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tracing::{debug, warn};
use uuid::Uuid;

use super::LineTask;
use super::again::renew;
use crate::client::in_flight::{CallEnd, PendingCall, Waiter};
use crate::client::line::unconfirmed::MessageUnderWay;
use crate::client::line::{Addressed, Shared, Token};
use crate::clock::later;
use crate::error::Unanswered;
use crate::exchanges::Address;
use crate::frame::Kind;
use crate::outgoing::{Bundle, Parcel, Share, Window};
use crate::state::State;
use crate::topology::Declaration;
use crate::transport::{Confirm, Loss, Lost};

/// How long an instance that runs a long call may send no sign of life.
const SILENCE: Duration = Duration::from_secs(15);
/// How many times a message is sent whose channel ends, while the connection stays.
const ATTEMPTS_ON_A_CONNECTION: u32 = 5;

impl LineTask {
    /// The outcome of a message is known: `said` is what the broker has said, or how the message was lost. Each of its
    /// calls goes on, ends, or is sent again.
    pub(super) fn concluded(&mut self, number: u64, said: Result<Confirm, Lost>) {
        let now = Instant::now();
        self.window.arrived(number, now);
        self.kept.retain(|(message, _)| !self.window.has_arrived(*message));
        let Some(MessageUnderWay { bundle: Bundle { address, parcels }, given_up, .. }) =
            self.unconfirmed.remove(number)
        else {
            return;
        };
        let lane = address.lane();
        self.lanes.concluded(lane, now);
        if !self.stuck.is_empty() {
            self.unstick(lane);
        }
        // If one queue has refused a broadcast, others may have it. And a message that was lost on its way may have
        // arrived. So their cancels are sent.
        let may_run = Ok(Confirm::Accepted) == said || Ok(Confirm::Refused) == said;
        if may_run || said.as_ref().is_err_and(Lost::may_have_arrived) {
            given_up.into_iter().for_each(|(address, cancel)| self.route(address, cancel));
        }
        let has_no_exchange = !address.is_mandatory() || !self.is_there(address.exchange());
        if address.kind() == Kind::Event && said == Ok(Confirm::Returned) && has_no_exchange {
            return self.restore(address.exchange().clone(), parcels);
        }
        let too_large_together = matches!(said, Ok(Confirm::TooLarge(_))) && parcels.len() > 1;
        // The message names a reply queue that is gone with its session.
        let answerless = address.is_answered() && number < self.first;
        if said == Ok(Confirm::Accepted) && !answerless {
            // The usual outcome: the calls wait for their replies.
            return parcels.into_iter().for_each(|parcel| parcel.token.end(&CallEnd::Said(Confirm::Accepted)));
        }
        let came_back = match &said {
            Ok(confirm) => matches!(confirm, Confirm::TooLarge(_)),
            Err(lost) => !lost.may_have_arrived(),
        };
        for mut parcel in parcels {
            if came_back {
                // It was not sent, or not accepted.
                parcel.token.attempts -= 1;
            }
            if too_large_together {
                if self.call_back(&address, &mut parcel) {
                    parcel.share = Share::ALL;
                    self.route(address.clone(), parcel);
                }
            } else if self.leaves_again(&said, answerless, &parcel) {
                // If its caller has given up, it is not sent again.
                if self.call_back(&address, &mut parcel) {
                    renew(&mut parcel);
                    self.route(address.clone(), parcel);
                }
            } else if address.kind() == Kind::Cancel && said == Ok(Confirm::Returned) {
                self.keep_cancel(address.clone(), parcel);
            } else if answerless && said == Ok(Confirm::Accepted) {
                if self.call_back(&address, &mut parcel) {
                    parcel.token.end(&CallEnd::Lost(self.lost(true)));
                }
            } else {
                // If one queue has refused a broadcast, replies from others may still arrive.
                if said != Ok(Confirm::Accepted)
                    && let Some(PendingCall { waiter: waiter @ Waiter::One(_), target, .. }) =
                        self.in_flight.forget_one(parcel.id)
                {
                    parcel.token.reply = Some((waiter, target));
                }
                if said.is_err() {
                    // A broadcast that was lost gets no replies.
                    self.in_flight.forget(parcel.id);
                }
                let left_before = parcel.token.attempts > u32::from(!came_back);
                let unclear = match &said {
                    Ok(confirm) if !left_before => self.find_out(&address, parcel, confirm),
                    _ => Some(parcel),
                };
                if let Some(parcel) = unclear {
                    // An event that comes back may have had a subscriber when it was sent before.
                    let is_doubtful = address.kind() != Kind::Event || said == Ok(Confirm::Returned);
                    parcel.token.end(&end_of(&said, left_before && is_doubtful));
                }
            }
        }
    }

    /// Whether the broker is known to have an exchange. Without a connection, none is.
    fn is_there(&self, exchange: &str) -> bool {
        self.session.as_ref().is_some_and(|session| session.transport.knows(exchange))
    }

    /// The exchange of an event was deleted. Declares it again, and tells the publishers that their events have reached
    /// nobody.
    fn restore(&self, exchange: Arc<str>, parcels: Vec<Parcel<Token>>) {
        let Some(transport) = self.session.as_ref().map(|session| session.transport.clone()) else {
            return parcels.into_iter().for_each(|parcel| parcel.token.end(&CallEnd::Lost(self.lost(false))));
        };
        let mut topology = self.sessions.namespace.exchanges();
        topology.retain(|part| matches!(part, Declaration::Exchange(one) if *one.name == *exchange));
        let name = self.name();
        tokio::spawn(async move {
            let why = match transport.declare(&topology).await {
                Ok(()) => {
                    "it had been deleted, and is declared again: events reach nobody until subscribers have bound \
                           their queues again, within seconds"
                        .to_owned()
                }
                Err(error) => format!("it has been deleted, and cannot be declared again: {error}"),
            };
            warn!(name, %exchange, events = parcels.len(), why, "events reach nobody");
            for parcel in parcels {
                parcel.token.end(&CallEnd::NoExchange { exchange: exchange.clone(), why: why.clone() });
            }
        });
    }

    /// Whether a parcel is sent again: it has not arrived, or it may arrive twice.
    pub(super) fn leaves_again(&self, said: &Result<Confirm, Lost>, answerless: bool, parcel: &Parcel<Token>) -> bool {
        let possible = self.opening.is_some() || self.session.is_some();
        possible
            && match said {
                Err(lost) => match lost.loss {
                    Loss::Unsent => true,
                    Loss::Connection => parcel.token.repeatable,
                    // If channels end again and again, this message may be the reason.
                    Loss::Channel => parcel.token.repeatable && parcel.token.attempts < ATTEMPTS_ON_A_CONNECTION,
                    Loss::Refused => false,
                },
                Ok(Confirm::Accepted) => answerless && parcel.token.repeatable,
                Ok(_) => false,
            }
    }

    /// Takes the caller of a parcel back from the calls that wait for a reply. Returns `false` if the caller has given
    /// up.
    pub(super) fn call_back(&mut self, address: &Address, parcel: &mut Parcel<Token>) -> bool {
        if !address.is_answered() {
            return true;
        }
        let Some(call) = self.in_flight.forget(parcel.id) else { return false };
        parcel.token.take_back(call);
        true
    }

    /// The session is lost. A new one is opened. The calls in flight are decided about after the rest of the session
    /// was read.
    pub(super) fn lose(&mut self, reason: &Arc<str>) {
        let Some(session) = self.session.take() else { return };
        self.stay();
        self.window = Window::default();
        self.kept.clear();
        (self.blocked, self.stuck_at) = (None, None);
        self.first = self.number + 1;
        // Parcels that waited for the end of an alarm now wait for a connection.
        self.retime();
        let (transport, rest) = session.end();
        self.open(Some(reason.clone()), Some(transport));
        // Replies that arrived before the end are read before the calls fail.
        self.leaving.get_or_insert_default().rests.push_back(rest);
    }

    /// Everything that arrived on lost sessions has been read, or is not awaited any more. Now their calls are decided
    /// about.
    pub(super) fn left(&mut self) {
        let concluded = self.leaving.take().map(|leaving| leaving.concluded).unwrap_or_default();
        concluded.into_iter().for_each(|(number, said)| self.concluded(number, said));
        self.end_answerless();
    }

    /// Ends calls, or sends them again, whose replies would go to a queue that is gone. Calls whose message is not
    /// confirmed are left to `concluded`.
    pub(super) fn end_answerless(&mut self) {
        let end = CallEnd::Lost(self.lost(true));
        let (first, former, unconfirmed) = (self.first, &self.former, &self.unconfirmed);
        let is_answered = |message| {
            message >= first
                || former.as_ref().is_some_and(|former| former.answers(message))
                || unconfirmed.contains(message)
        };
        for (_, call) in self.in_flight.forget_all(is_answered) {
            self.again_or(call, &end);
        }
    }

    /// Sends a call again if that does no harm. Otherwise it ends with `end`.
    pub(super) fn again_or(&mut self, mut call: PendingCall<Addressed>, end: &CallEnd) {
        let again = call.again.take().filter(|_| self.session.is_some() || self.opening.is_some());
        let Some((address, mut parcel)) = again.map(|again| *again) else {
            let mut token = Token::until(Instant::now());
            token.take_back(call);
            return token.end(end);
        };
        parcel.token.take_back(call);
        renew(&mut parcel);
        self.route(address, parcel);
    }

    /// The loss that callers are told while there is no connection. `handed_over` tells whether the call may have
    /// arrived.
    pub(super) fn lost(&self, handed_over: bool) -> Lost {
        let reason = self.shared.state.borrow().missing().unwrap_or_else(|| "the connection was lost".into());
        Lost::connection(handed_over, self.shared.over.get().cloned().unwrap_or(reason))
    }

    /// The broker accepts no messages any more.
    pub(super) fn block(&mut self, reason: Arc<str>) {
        let since = Instant::now();
        self.stay();
        self.stuck_at.get_or_insert(later(since, self.rules.blocked_wait));
        self.enter(State::Blocked { reason: reason.clone(), since });
        self.blocked.get_or_insert((since, reason));
        self.retime();
        self.stop_asking();
        self.end_unclear();
    }

    /// Gives everything that waits its new end: it depends on whether there is an alarm.
    fn retime(&mut self) {
        let mut waiting = [&mut self.unsent, &mut self.places.crowd].map(std::mem::take);
        for waiting in &mut waiting {
            waiting.retime(|(address, parcel)| self.patience(address, parcel));
        }
        [self.unsent, self.places.crowd] = waiting;
    }

    /// The broker accepts messages again.
    pub(super) fn unblock(&mut self) {
        (self.blocked, self.stuck_at) = (None, None);
        self.retime();
        self.enter(State::Ready);
        self.in_flight.excuse();
    }

    /// The deadline of a call or an event has passed. Tells its caller what is known.
    pub(super) fn overdue(&mut self, id: Uuid) {
        let now = Instant::now();
        // Parcels that were not sent end for another reason, which is told here first.
        self.end_waiting(now);
        let is_held_up = self.in_flight.message_of(id).is_some_and(|message| self.unconfirmed.contains(message));
        if let Some((waiter, unserved)) = self.in_flight.release_one(id) {
            if let Waiter::One(waiter) = waiter {
                if let Some((_, reason)) = self.blocked.as_ref().filter(|_| is_held_up) {
                    // An error means that the caller gave up at this moment, here and below.
                    let _ = waiter.send(Err(self.blocked_by(reason, true)));
                    return;
                }
                let why = match unserved {
                    Some((target, message)) if self.is_unserved(&target, message, now) => Unanswered::Unserved,
                    Some((target, _)) if target.presence().is_absent(now) => Unanswered::Gone,
                    _ => Unanswered::Unknown,
                };
                let _ = waiter.send(Err(CallEnd::TimedOut(why)));
            }
        } else if let Some(said) = self.unconfirmed.release_one(id) {
            let unknown = CallEnd::TimedOut(Unanswered::Unknown);
            let _ = said.send(self.blocked.as_ref().map_or(unknown, |(_, reason)| self.blocked_by(reason, true)));
        } else if let Some((parcel, cause)) = self.unfound(id) {
            parcel.token.end(&cause.end());
        } else if let Some((_, parcel)) = self.unasked(id) {
            parcel.token.end(&CallEnd::TimedOut(Unanswered::Unsent));
        }
    }

    /// Ends everything that has waited until its end without being sent.
    pub(super) fn end_waiting(&mut self, now: Instant) {
        while let Some((_, parcel)) = self.places.crowd.pop_ended(now) {
            let full = || CallEnd::Full(self.places.limit());
            let end = self.blocked.as_ref().map_or_else(full, |(_, reason)| self.blocked_by(reason, false));
            parcel.token.end(&end);
        }
        self.stuck.retain(|_, stuck| {
            while let Some((_, parcel)) = stuck.pop_ended(now) {
                let may_have_run = parcel.token.attempts > 0;
                parcel.token.end(&CallEnd::TimedOut(if may_have_run {
                    Unanswered::Unknown
                } else {
                    Unanswered::Congested
                }));
            }
            !stuck.is_empty()
        });
        while let Some((_, parcel)) = self.unsent.pop_ended(now) {
            let may_have_run = parcel.token.attempts > 0;
            let end = match (&self.blocked, &self.session) {
                (Some((_, reason)), _) => self.blocked_by(reason, may_have_run),
                (None, None) => CallEnd::Lost(self.lost(may_have_run)),
                (None, Some(_)) if may_have_run => CallEnd::TimedOut(Unanswered::Unknown),
                (None, Some(_)) => CallEnd::TimedOut(Unanswered::Congested),
            };
            parcel.token.end(&end);
        }
    }

    /// The end of a call that the alarm keeps from going on.
    pub(super) fn blocked_by(&self, reason: &Arc<str>, may_have_run: bool) -> CallEnd {
        let waited = self.blocked.as_ref().map_or(Duration::ZERO, |(since, _)| since.elapsed());
        let waited = Duration::from_millis(u64::try_from(waited.as_millis()).unwrap_or(u64::MAX));
        CallEnd::Blocked { reason: reason.clone(), after: waited.min(self.rules.blocked_wait), may_have_run }
    }

    /// Ends the calls that were sent before the alarm began and were not confirmed for `blocked_wait`.
    pub(super) fn end_stuck(&mut self) {
        let Some((_, reason)) = self.blocked.clone() else { return };
        let end = self.blocked_by(&reason, true);
        for said in self.unconfirmed.release() {
            // An error means that the caller gave up at this moment, here and below.
            let _ = said.send(end.clone());
        }
        let unconfirmed = &self.unconfirmed;
        for waiter in self.in_flight.release(|message| unconfirmed.contains(message)) {
            if let Waiter::One(waiter) = waiter {
                let _ = waiter.send(Err(end.clone()));
            }
        }
    }

    /// Gives up instances that run a call and have sent no sign of life for [`SILENCE`]. Their calls are sent again if
    /// that does no harm, and fail otherwise.
    pub(super) fn end_silent(&mut self) {
        if self.session.is_none() || self.blocked.is_some() {
            return self.in_flight.excuse();
        }
        if let Some(session) = self.session.as_ref().filter(|_| self.in_flight.is_silent(SILENCE / 2)) {
            // A blocked broker holds back signs of life. It says that it is blocked only to those who publish
            // something.
            session.transport.publish(self.exchanges.probe());
        }
        let mut silent = BTreeMap::<Arc<str>, usize>::new();
        for (id, instance, call) in self.in_flight.forget_silent(SILENCE) {
            let again = call.again.is_some();
            debug!(method = %call.target, %id, %instance, again, "a call's instance has stopped reporting in");
            *silent.entry(instance.clone()).or_default() += 1;
            self.again_or(call, &CallEnd::Silent { instance, after: SILENCE });
        }
        for (instance, calls) in silent {
            warn!(name = self.name(), %instance, calls, "an instance has said nothing for {SILENCE:?}: its calls run elsewhere if they may, or are aborted");
        }
    }
}

/// The end of a call after the outcome `said` of its message. If it was sent before and lost, it may have run, whatever
/// the last outcome was.
fn end_of(said: &Result<Confirm, Lost>, left_before: bool) -> CallEnd {
    let why = match said {
        Ok(confirm) if !left_before || *confirm == Confirm::Accepted => return CallEnd::Said(*confirm),
        Err(lost) if !left_before || lost.may_have_arrived() => return CallEnd::Lost(lost.clone()),
        Ok(Confirm::Returned) => "no queue took it",
        Ok(Confirm::TooLarge(_)) => "it was too large",
        Ok(_) => "its queue was full or out of reach",
        Err(lost) => &lost.reason,
    };
    CallEnd::Lost(Lost::connection(true, format!("{why} when it was sent again").into()))
}

/// The loss that callers are told after the client was closed.
pub(super) fn closed(shared: &Shared, handed_over: bool) -> Lost {
    Lost::connection(handed_over, shared.reason())
}
