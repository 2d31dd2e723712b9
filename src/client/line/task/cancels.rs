//! Cancels: sent once a queue has the call, and again when nobody has heard them.

use std::time::Duration;

use tokio::time::Instant;
use tracing::debug;
use uuid::Uuid;

use super::{PARTING, Task};
use crate::client::line::{Addressed, Token};
use crate::outbox::Parcel;
use crate::route::Address;
use crate::waiting::Weight;

/// How long after a cancel that nobody has heard the next is sent, and twice as long after each other: a server that has
/// lost its bindings has them again within seconds, and one that starts takes what waits for it.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const MAX_PAUSE: Duration = Duration::from_secs(16);
/// How many cancels wait to be sent again: without them, a call ends by its deadline.
const MAX_UNHEARD: usize = 10_000;

impl Task {
    /// Nobody waits for the call `id` any more. Where a queue may have it, those who run it are told.
    pub(super) fn forget(&mut self, id: Uuid, cancel: Option<Addressed>) {
        let waiting = self.places.crowd.remove(id).or_else(|| self.unsent.remove(id)).or_else(|| self.unasked(id));
        let waiting = waiting.or_else(|| self.stuck.values_mut().find_map(|stuck| stuck.remove(id)));
        if let Some((_, parcel)) = waiting {
            // It had left, was lost, and was to leave again.
            if let Some((address, cancel)) = cancel.filter(|_| parcel.token.attempts > 0) {
                self.route(address, cancel);
            }
            return;
        }
        if self.unfound(id).is_some() {
            return;
        }
        let instance = self.replies.runs_on(id).cloned();
        // What has not left will not; what has been answered has ended.
        let Some(mut call) = self.replies.forget(id) else { return };
        if let Some(place) = call.place.take().filter(|_| !self.window.has_arrived(call.message)) {
            // It is free when the bytes of the call are no longer on their way.
            self.kept.push((call.message, place));
        }
        let Some((mut address, cancel)) = cancel else { return };
        if let Some(instance) = instance.filter(|_| call.for_any) {
            address = address.at(&call.target.service_text, &instance);
        }
        // Only a request that some queue has taken can be cancelled.
        if let Some((address, cancel)) = self.unconfirmed.give_up(call.message, (address, cancel)) {
            self.route(address, cancel);
        }
    }

    /// Keeps a cancel that no queue has taken, to send it again.
    pub(super) fn keep_cancel(&mut self, address: Address, cancel: Parcel<Token>) {
        let doublings = cancel.token.attempts.saturating_sub(1).min(MAX_PAUSE.as_secs().ilog2());
        let again = Instant::now() + FIRST_PAUSE * 2u32.pow(doublings);
        if again < cancel.token.deadline && self.unheard.len() < MAX_UNHEARD {
            self.unheard.push(cancel.id, again, Weight::default(), (address, cancel));
        } else {
            debug!(id = %cancel.id, key = &**address.key(), "nobody has heard a cancel: the deadline ends the call");
        }
    }

    /// Sends the cancels again whose pause is over.
    pub(super) fn cancel_again(&mut self, now: Instant) {
        while let Some((address, cancel)) = self.unheard.pop_ended(now) {
            self.route(address, cancel);
        }
    }

    /// What the clients sent without waiting for it still leaves: cancels whose calls are only now found to be in a queue.
    /// A broker that does not say so is not waited for for long.
    pub(super) async fn part(&mut self) {
        let confirmed = async {
            while (self.unconfirmed.keeps_cancels() || !self.unsent.is_empty())
                && let Some((number, said)) = futures::StreamExt::next(&mut self.receipts).await
            {
                self.concluded(number, said);
                self.publish();
            }
        };
        if tokio::time::timeout(PARTING, confirmed).await.is_err() {
            debug!(name = self.name(), "the client ends before the broker has confirmed what it has given up");
        }
    }
}
