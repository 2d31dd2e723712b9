//! Asking the broker whether a service has an instance: about calls that nobody has answered, and for those that are not to
//! wait for one.
//!
//! The question is a cancel of no call at all, to every instance that does not drain. When it is returned, there is none. To
//! look at the queue of calls instead would begin its grace period anew, and RabbitMQ 4 allows it to few.

use std::sync::Arc;

use bytes::Bytes;
use tokio::time::Instant;
use uuid::Uuid;

use super::Task;
use super::ends::renew;
use crate::client::Absent;
use crate::client::line::{Addressed, Token};
use crate::client::presence::Moment;
use crate::client::replies::End;
use crate::client::target::Target;
use crate::codec::Codec;
use crate::error::Unanswered;
use crate::frame::{CONTENT_TYPE, Frame, Kind, Metadata};
use crate::outbox::{Parcel, UnderWay};
use crate::route::{Address, Question};
use crate::transport::{Confirm, Lost, Properties, Publication};
use crate::waiting::Weight;

impl Task {
    /// Lets a parcel leave with the next messages; one that is not to wait for an instance when there is one.
    pub(super) fn leave(&mut self, address: Address, parcel: Parcel<Token>) {
        let (Absent::Fail, 0, Some((_, target))) = (parcel.token.absent, parcel.token.attempts, &parcel.token.reply)
        else {
            return self.outbox.push(address, parcel);
        };
        if target.presence().is_fresh(Instant::now()) {
            return self.outbox.push(address, parcel);
        }
        let target = target.clone();
        let asking = self.asking.entry(target.service_text.clone()).or_default();
        asking.push(parcel.id, parcel.token.deadline, Weight::default(), (address, parcel));
        if asking.len() == 1 {
            self.ask(target);
        }
    }

    /// Asks about the services of calls that left before the last look, and of which nothing has been heard.
    pub(super) fn ask_about_unanswered(&mut self, now: Instant) {
        let looked = std::mem::replace(&mut self.looked, self.number);
        if self.session.is_none() || self.blocked.is_some() {
            return;
        }
        for target in self.replies.unanswered(looked, |target, for_drain| target.presence().asks(for_drain, now)) {
            self.ask(target);
        }
    }

    /// Whether nobody was there for a call of a method that left with this message and has not been answered; if that is not
    /// known, who calls next may hear it.
    pub(super) fn is_unserved(&mut self, target: &Arc<Target>, message: u64, now: Instant) -> bool {
        if self.session.is_some() && self.blocked.is_none() && target.presence().asks(false, now) {
            self.ask(target.clone());
        }
        target.presence().is_absent_since(message, now)
    }

    /// Now, with what has left by now.
    pub(super) fn moment(&self, now: Instant) -> Moment {
        Moment { now, last: self.number, earlier: self.looked }
    }

    fn ask(&mut self, target: Arc<Target>) {
        let Some(session) = &self.session else { return };
        let receipt = session.transport.publish(self.question(Question::IsThere, &target));
        self.questions.push(UnderWay::new((target, self.number), receipt));
    }

    /// A question about a service, which the broker answers by returning it or not.
    pub(super) fn question(&self, question: Question, target: &Target) -> Publication {
        let instance = &self.sessions.instance;
        let metadata = Metadata { instance: Some(instance.clone()), ..Metadata::default() };
        let properties = Properties {
            content_type: Some(CONTENT_TYPE.to_owned()),
            app_id: Some(instance.to_string()),
            ..Properties::default()
        };
        let body = Frame::new(Kind::Cancel, Uuid::nil(), Codec::Raw, metadata, Bytes::new()).to_body();
        self.exchanges.question(question, &target.service_text).publication(properties, body)
    }

    /// The broker has said whether a service has an instance, or will not say it any more. It was asked when this message was
    /// the last that had left.
    pub(super) fn answered(&mut self, target: &Arc<Target>, last: u64, said: &Result<Confirm, Lost>) {
        let now = Instant::now();
        match said {
            Ok(Confirm::Returned) => {
                target.presence().is_gone(last, now);
                // A call that an instance took before it began to drain, or before it died, has been reported by then.
                if target.presence().is_certainly_absent(now) {
                    for waiter in self.replies.release_hopeless(&target.service_text, last) {
                        // The caller gave up at this very moment.
                        let _ = waiter.send(Err(End::TimedOut(Unanswered::Draining)));
                    }
                }
            }
            Ok(_) => target.presence().is_there(self.moment(now)),
            Err(_) => {}
        }
        let mut asking = self.asking.remove(&target.service_text).unwrap_or_default();
        for (address, mut parcel) in asking.clear() {
            match said {
                Ok(Confirm::Returned) => parcel.token.end(&End::Said(Confirm::Returned)),
                Err(lost) if !lost.is_connected() => self.route(address, parcel),
                // Where the broker does not say it, the call leaves as any other.
                _ => {
                    parcel.token.absent = Absent::Wait;
                    renew(&mut parcel);
                    self.route(address, parcel);
                }
            }
        }
    }

    /// Lets what waits for an answer wait for the broker, which takes no question now.
    pub(super) fn stop_asking(&mut self) {
        for (_, mut asking) in std::mem::take(&mut self.asking) {
            for (address, parcel) in asking.clear() {
                self.route(address, parcel);
            }
        }
    }

    /// Takes out a call that waits for an answer.
    pub(super) fn unasked(&mut self, id: Uuid) -> Option<Addressed> {
        self.asking.values_mut().find_map(|asking| asking.remove(id))
    }
}
