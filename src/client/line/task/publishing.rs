//! Sending: a parcel is published with the next message, or it waits for a connection, a place, or room on the way to
//! the broker.

use tokio::time::Instant;

use super::again::{copy, renew};
use super::ends::closed;
use super::{LOOK, LineTask, add};
use crate::client::Absent;
use crate::client::in_flight::{CallEnd, PendingCall};
use crate::client::line::Token;
use crate::client::session::Session;
use crate::clock::later;
use crate::exchanges::Address;
use crate::frame::{CONTENT_TYPE, Kind};
use crate::outgoing::{AROUND, Bundle, Lane, Parcel, Weight};
use crate::transport::{Properties, Publication};

impl LineTask {
    /// Lets a parcel be published with the next messages if that is possible now. Otherwise it waits, or fails if the
    /// client is closed.
    pub(super) fn route(&mut self, address: Address, parcel: Parcel<Token>) {
        self.stay_for(parcel.token.deadline);
        if !self.stuck.is_empty() && self.stuck.contains_key(&address.lane()) {
            return self.stick(address, parcel);
        }
        if self.takes() && self.unsent.is_empty() && self.window.room() > 0 {
            self.leave(address, parcel);
        } else if self.session.is_some() || self.opening.is_some() {
            self.hold(address, parcel);
        } else {
            let handed_over = parcel.token.attempts > 0;
            parcel.token.end(&CallEnd::Lost(closed(&self.shared, handed_over)));
        }
    }

    /// Puts a parcel into the outbox. If it must not wait for an instance, and none was known within the last second, the
    /// broker is asked first.
    fn leave(&mut self, address: Address, parcel: Parcel<Token>) {
        match (parcel.token.absent, parcel.token.attempts, &parcel.token.reply) {
            (Absent::Fail, 0, Some((_, target))) if !target.presence().is_fresh(Instant::now()) => {
                self.ask_before(target.clone(), address, parcel);
            }
            _ => self.outbox.push(address, parcel),
        }
    }

    /// Whether messages can be published now: there is a session, no alarm, and no move that holds them back.
    pub(super) fn takes(&self) -> bool {
        self.session.is_some() && self.blocked.is_none() && !self.is_held()
    }

    /// Lets a parcel wait until it can be published.
    fn hold(&mut self, address: Address, parcel: Parcel<Token>) {
        self.unsent.push(parcel.id, self.patience(&address, &parcel), weight(&address, &parcel), (address, parcel));
    }

    /// Lets a parcel wait until its queue confirms something.
    fn stick(&mut self, address: Address, parcel: Parcel<Token>) {
        let stuck = self.stuck.entry(address.lane()).or_default();
        stuck.push(parcel.id, parcel.token.deadline, weight(&address, &parcel), (address, parcel));
    }

    /// A queue has confirmed something, so what waits for it is published.
    pub(super) fn unstick(&mut self, lane: Lane) {
        let mut stuck = self.stuck.remove(&lane).unwrap_or_default();
        for (address, mut parcel) in stuck.clear() {
            renew(&mut parcel);
            self.route(address, parcel);
        }
    }

    /// Until when a parcel waits that cannot be published now. Under an alarm calls wait for `blocked_wait` only.
    /// Cancels wait for their deadline, since nobody waits for them and they are useful later, too.
    pub(super) fn patience(&self, address: &Address, parcel: &Parcel<Token>) -> Instant {
        let deadline = parcel.token.deadline;
        match self.blocked {
            Some(_) if address.kind() != Kind::Cancel => deadline.min(later(Instant::now(), self.rules.blocked_wait)),
            _ => deadline,
        }
    }

    /// Returns the places of calls whose time is over, although their callers have not collected the result. This
    /// happens at most once a second.
    pub(super) fn vacate(&mut self) {
        let now = Instant::now();
        if self.vacate_at <= now {
            self.vacate_at = now + LOOK;
            self.in_flight.vacate(now);
        }
    }

    /// Gives free places to calls that wait for one. Returns whether it has given any. Under an alarm it gives none,
    /// since calls wait for the end of the alarm just as well without a place.
    pub(super) fn seat(&mut self) -> bool {
        let mut seated = false;
        while self.blocked.is_none()
            && let Some((place, (address, mut parcel))) =
                self.places.seat(Instant::now(), |(_, parcel)| parcel.token.deadline)
        {
            seated = true;
            if parcel.token.is_wanted() {
                parcel.token.place = Some(place);
                renew(&mut parcel);
                self.route(address, parcel);
            }
        }
        seated
    }

    /// Publishes the outbox and what waits, as far as there is room on the way to the broker.
    pub(super) fn publish(&mut self) {
        if !self.takes() || self.outbox.is_empty() && self.unsent.is_empty() {
            return;
        }
        let now = Instant::now();
        self.probe(now);
        let mut room = self.window.room();
        while room > 0 {
            self.publish_outbox(now);
            room = self.window.room();
            if !self.take_unsent(room, now) {
                break;
            }
        }
        let left_over: Vec<_> = self.outbox.clear().collect();
        left_over.into_iter().for_each(|(address, parcel)| self.hold(address, parcel));
        if !self.unsent.is_empty() {
            self.window.hold();
            self.probe(now);
        }
    }

    /// Sends a probe if the window needs one.
    fn probe(&mut self, now: Instant) {
        if self.window.is_to_probe(now) {
            self.send_probe(now);
        }
    }

    /// Sends a probe, unless one is on its way: a message to nobody, which the broker confirms as soon as it has read
    /// it.
    pub(super) fn send_probe(&mut self, now: Instant) {
        let Some(session) = self.session.as_ref().filter(|_| self.window.probing_since().is_none()) else { return };
        self.number += 1;
        self.window.probed(self.number, now);
        session.transport.submit(self.exchanges.probe(), self.receipts.keep(self.number));
    }

    /// Moves as many waiting parcels to the outbox as there is room for, in whatever messages they leave. Returns whether
    /// it has moved any.
    fn take_unsent(&mut self, mut room: usize, now: Instant) -> bool {
        let mut has_moved = false;
        while room > 0
            && let Some((address, mut parcel)) = self.unsent.pop(now)
        {
            if parcel.token.is_wanted() {
                has_moved = true;
                room = room.saturating_sub(parcel.frame.len() + AROUND);
                renew(&mut parcel);
                self.leave(address, parcel);
            }
        }
        has_moved
    }

    /// Publishes bundles from the outbox while there is room. Parcels for a queue that confirms nothing go to `stuck`.
    fn publish_outbox(&mut self, now: Instant) {
        while self.window.rest() > 0
            && let Some(mut bundle) = self.outbox.next(self.window.rest(), Token::is_wanted)
        {
            let lane = bundle.address.lane();
            if self.lanes.is_stuck(lane, self.window.round_trip(), now) {
                let Bundle { address, parcels } = bundle;
                parcels.into_iter().for_each(|parcel| self.stick(address.clone(), parcel));
                continue;
            }
            let Some(session) = &self.session else { return };
            self.lanes.sent(lane, now);
            self.number += 1;
            for parcel in &mut bundle.parcels {
                parcel.token.attempts += 1;
                if let Some((waiter, target)) = parcel.token.reply.take() {
                    let again = parcel.token.repeatable.then(|| Box::new((bundle.address.clone(), copy(parcel))));
                    let for_any = bundle.address.is_for_any(&target.service_text);
                    let left_before = parcel.token.attempts > 1;
                    #[cfg(feature = "metrics")]
                    if left_before {
                        target.counted.counts.leaves_again();
                    }
                    let (place, leaving) = (parcel.token.place.take(), parcel.token.leaving.take());
                    let call = PendingCall {
                        waiter,
                        target,
                        message: self.number,
                        for_any,
                        left_before,
                        leaving,
                        place,
                        again,
                    };
                    self.in_flight.expect(parcel.id, call);
                }
            }
            add(&self.shared.messages_sent, 1);
            add(&self.shared.calls_sent, bundle.parcels.len());
            #[cfg(feature = "metrics")]
            self.shared.link.sent.add(bundle.parcels.len());
            let publication = publication(&bundle, session, &self.sessions.instance);
            session.transport.submit(publication, self.receipts.keep(self.number));
            self.window.sent(self.number, bundle.size(), now);
            self.unconfirmed.insert(self.number, bundle, now);
        }
    }
}

/// What decides when a waiting parcel is sent. Cancels are the most urgent, since they spare servers work.
fn weight(address: &Address, parcel: &Parcel<Token>) -> Weight {
    let urgency = if address.kind() == Kind::Cancel { u8::MAX } else { address.priority().unwrap_or(0) };
    Weight { urgency, bytes: parcel.frame.len(), keeps_order: address.kind() == Kind::Event }
}

/// The message of a bundle.
fn publication(bundle: &Bundle<Address, Token>, session: &Session, instance: &str) -> Publication {
    let address = &bundle.address;
    let properties = Properties {
        correlation_id: bundle.correlation_id(),
        reply_to: address.is_answered().then(|| session.reply_queue.clone()),
        expiration: bundle.expiration(),
        kind: bundle.kind(),
        content_type: Some(CONTENT_TYPE.to_owned()),
        app_id: Some(instance.to_owned()),
        ..Properties::default()
    };
    address.publication(properties, bundle.body())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use bytes::Bytes;
    use futures::FutureExt as _;
    use uuid::Uuid;

    use super::super::moving::tests::task;
    use super::*;
    use crate::outgoing::Share;

    #[tokio::test]
    async fn while_something_waits_for_room_a_probe_is_on_its_way() {
        let (mut task, _line) = task("memory://").await;
        let address = Address::queue("away", Kind::Oneway);
        for _ in 0..5 {
            let token = Token::until(Instant::now() + Duration::from_secs(60));
            // Each is larger than the window.
            let frame = Bytes::from(vec![0; 100_000]);
            let kind = Some(Arc::from("demo.v1.add"));
            let parcel = Parcel { id: Uuid::new_v4(), frame, share: Share::ALL, kind, expiration: None, token };
            task.hold(address.clone(), parcel);
        }
        let mut rounds = 0;
        while !task.unsent.is_empty() {
            task.publish();
            let waiting = task.unsent.len();
            assert!(waiting == 0 || task.window.probing_since().is_some(), "round {rounds}: {waiting} wait");
            // The broker has confirmed everything.
            while let Some((number, said)) = task.receipts.next().now_or_never() {
                task.concluded(number, said);
            }
            rounds += 1;
        }
        assert!(rounds > 2, "{rounds} rounds");
    }
}
