//! Cancels: a cancel is sent after a queue has accepted its call, and again if no instance has received it.

use std::time::Duration;

use tokio::time::Instant;
use tracing::debug;
use uuid::Uuid;

use super::{LineTask, PARTING};
use crate::client::line::{Addressed, Token};
use crate::exchanges::Address;
use crate::outgoing::{Parcel, Weight};

/// The pause before a cancel is sent again that no instance has received. It doubles each time. In the meantime a
/// server may bind its queues again, or start and get the call.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// The longest pause.
const MAX_PAUSE: Duration = Duration::from_secs(16);
/// How many cancels wait to be sent again. Without a cancel, the deadline ends the call.
const MAX_UNHEARD: usize = 10_000;

impl LineTask {
    /// The caller of the call `id` has given up. If an instance may have the call, the cancel is sent.
    pub(super) fn forget(&mut self, id: Uuid, cancel: Option<Addressed>) {
        let waiting = self.places.crowd.remove(id).or_else(|| self.unsent.remove(id)).or_else(|| self.unasked(id));
        let waiting = waiting.or_else(|| self.stuck.values_mut().find_map(|stuck| stuck.remove(id)));
        if let Some((_, parcel)) = waiting {
            // The call was sent before, was lost, and waited to be sent again. So the first one may run.
            if let Some((address, cancel)) = cancel.filter(|_| parcel.token.attempts > 0) {
                self.route(address, cancel);
            }
            return;
        }
        if self.unfound(id).is_some() {
            return;
        }
        let instance = self.in_flight.runs_on(id).cloned();
        // If the call is not here, it was not sent, or it has ended.
        let Some(mut call) = self.in_flight.forget(id) else { return };
        if let Some(place) = call.place.take().filter(|_| !self.window.has_arrived(call.message)) {
            // The place is free when the bytes of the call have arrived. Otherwise calls that are given up at once
            // would fill the connection.
            self.kept.push((call.message, place));
        }
        let Some((mut address, cancel)) = cancel else { return };
        if let Some(instance) = instance.filter(|_| call.for_any) {
            address = address.at(&call.target.service_text, &instance);
        }
        // A cancel makes sense only after a queue has accepted the call.
        if let Some((address, cancel)) = self.unconfirmed.give_up(call.message, (address, cancel)) {
            self.route(address, cancel);
        }
    }

    /// Keeps a cancel that no instance has received, to send it again.
    pub(super) fn keep_cancel(&mut self, address: Address, cancel: Parcel<Token>) {
        let doublings = cancel.token.attempts.saturating_sub(1).min(MAX_PAUSE.as_secs().ilog2());
        let again = Instant::now() + FIRST_PAUSE * 2u32.pow(doublings);
        if again < cancel.token.deadline && self.unheard.len() < MAX_UNHEARD {
            self.unheard.push(cancel.id, again, Weight::default(), (address, cancel));
        } else {
            debug!(id = %cancel.id, key = &**address.key(), "nobody has heard a cancel: the deadline ends the call");
        }
    }

    /// Sends those cancels again whose pause is over.
    pub(super) fn cancel_again(&mut self, now: Instant) {
        while let Some((address, cancel)) = self.unheard.pop_ended(now) {
            self.route(address, cancel);
        }
    }

    /// Before the task ends: waits for the confirms of calls that were given up, and sends their cancels. Waits for at
    /// most [`PARTING`].
    pub(super) async fn part(&mut self) {
        let confirmed = async {
            while (self.unconfirmed.keeps_cancels() || !self.unsent.is_empty()) && !self.receipts.is_empty() {
                let (number, said) = self.receipts.next().await;
                self.concluded(number, said);
                self.publish();
            }
        };
        if tokio::time::timeout(PARTING, confirmed).await.is_err() {
            debug!(name = self.name(), "the client ends before the broker has confirmed what it has given up");
        }
    }
}
