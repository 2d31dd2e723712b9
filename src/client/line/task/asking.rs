//! Asks the broker whether a service has an instance: about calls that nobody has answered, and before calls that must
//! not wait for one.
//!
//! The question is a cancel of no call, to a key that every instance binds that accepts calls. If the broker returns
//! it, there is no instance. A passive declaration of the queue for calls would not do: it starts the queue's grace
//! period anew, and RabbitMQ 4 allows it to few users.

use std::sync::Arc;

use bytes::Bytes;
use tokio::time::Instant;
use uuid::Uuid;

use super::LineTask;
use super::again::renew;
use crate::client::Absent;
use crate::client::in_flight::CallEnd;
use crate::client::line::{Addressed, Token};
use crate::client::presence::Moment;
use crate::client::target::Target;
use crate::codec::Codec;
use crate::error::Unanswered;
use crate::exchanges::{Address, Question};
use crate::frame::{CONTENT_TYPE, Frame, Kind, Metadata};
use crate::outgoing::{Parcel, UnderWay, Weight};
use crate::transport::{Confirm, Lost, Properties, Publication};

impl LineTask {
    /// Lets a call wait that must not wait for an instance, until the broker has told whether there is one.
    pub(super) fn ask_before(&mut self, target: Arc<Target>, address: Address, parcel: Parcel<Token>) {
        let asking = self.asking.entry(target.service_text.clone()).or_default();
        asking.push(parcel.id, parcel.token.deadline, Weight::default(), (address, parcel));
        if asking.len() == 1 {
            self.ask(target);
        }
    }

    /// Asks about the services of calls that were sent before the last look and of which nothing was heard.
    pub(super) fn ask_about_unanswered(&mut self, now: Instant) {
        let looked = std::mem::replace(&mut self.looked, self.number);
        if self.session.is_none() || self.blocked.is_some() {
            return;
        }
        for target in self.in_flight.unanswered(looked, |target, for_drain| target.presence().asks(for_drain, now)) {
            self.ask(target);
        }
    }

    /// Whether certainly nobody runs the unanswered call of this method that was sent in this message. If that is not
    /// known, the broker is asked, so that the next call may know it.
    pub(super) fn is_unserved(&mut self, target: &Arc<Target>, message: u64, now: Instant) -> bool {
        if self.session.is_some() && self.blocked.is_none() && target.presence().asks(false, now) {
            self.ask(target.clone());
        }
        target.presence().is_absent_since(message, now)
    }

    /// This moment, and which messages were sent by now.
    pub(super) fn moment(&self, now: Instant) -> Moment {
        Moment { now, last: self.number, earlier: self.looked }
    }

    /// Asks whether the service of `target` has an instance.
    fn ask(&mut self, target: Arc<Target>) {
        let Some(session) = &self.session else { return };
        let receipt = session.transport.publish(self.question(Question::IsThere, &target));
        self.questions.push(UnderWay::new((target, self.number), receipt));
    }

    /// The message that asks a question about a service. The broker answers by returning it or not.
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

    /// The broker has told whether a service has an instance, or cannot tell any more. `last` is the last message that
    /// had been sent when it was asked.
    pub(super) fn answered(&mut self, target: &Arc<Target>, last: u64, said: &Result<Confirm, Lost>) {
        let now = Instant::now();
        match said {
            Ok(Confirm::Returned) => {
                target.presence().is_gone(last, now);
                // An instance that got the call before it began to drain, or before it died, would have reported it by
                // now.
                if target.presence().is_certainly_absent(now) {
                    for waiter in self.in_flight.release_hopeless(&target.service_text, last) {
                        // An error means that the caller gave up at this moment.
                        let _ = waiter.send(Err(CallEnd::TimedOut(Unanswered::Draining)));
                    }
                }
            }
            Ok(_) => target.presence().is_there(self.moment(now)),
            Err(_) => {}
        }
        let mut asking = self.asking.remove(&target.service_text).unwrap_or_default();
        for (address, mut parcel) in asking.clear() {
            match said {
                Ok(Confirm::Returned) => parcel.token.end(&CallEnd::Said(Confirm::Returned)),
                Err(lost) if !lost.is_connected() => self.route(address, parcel),
                _ => {
                    // The broker has not told, so the call is sent like any other.
                    parcel.token.absent = Absent::Wait;
                    renew(&mut parcel);
                    self.route(address, parcel);
                }
            }
        }
    }

    /// The broker accepts no questions now. The calls that wait for an answer wait for the end of the alarm instead.
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
