//! What callers tell the task to do: to send a frame, to forget a call, or to close the client.

use futures::future::join_all;

use super::LineTask;
use super::ends::closed;
use super::moving::Move;
use crate::client::in_flight::{CallEnd, Waiter};
use crate::client::line::Order;
use crate::client::line::places::Entrance;
use crate::document::PING;
use crate::state::State;
use crate::transport::Transport;

impl LineTask {
    /// Follows an order of a caller.
    pub(super) fn follow(&mut self, order: Order) {
        match order {
            Order::Post(address, mut parcel) => {
                // A question whether an instance is there takes no place from calls, and needs none.
                let needs_place = match &parcel.token.reply {
                    Some((Waiter::One(_), target)) => *target.method != *PING,
                    _ => false,
                };
                if needs_place {
                    if self.places.is_full() {
                        // Parcels that are not wanted any more return their places.
                        self.publish();
                        self.vacate();
                    }
                    match self.places.enter(parcel.token.deadline) {
                        Entrance::In(place) => parcel.token.place = place,
                        Entrance::Waits => {
                            let until = self.patience(&address, &parcel);
                            return self.places.wait(parcel.id, until, (address, parcel));
                        }
                        Entrance::Full(limit) => return parcel.token.end(&CallEnd::Full(limit)),
                    }
                }
                self.route(address, parcel);
            }
            Order::Forget(id, cancel) => self.forget(id, cancel.map(|cancel| *cancel)),
            Order::Overdue(id) => self.overdue(id),
            Order::Count(queue, answer) => {
                // Without a connection, dropping it says so.
                if let Some(transport) = self.session.as_ref().map(|session| session.transport.clone()) {
                    // An error means that nobody waits for it.
                    tokio::spawn(async move { drop(answer.send(transport.look_at(&queue).await)) });
                }
            }
            Order::Watch(watcher) => self.watch(watcher),
            Order::Close(done) => {
                let sessions = self.session.iter().chain(self.former.as_ref().map(|former| &former.session));
                let transports: Vec<_> = sessions.map(|session| session.transport.clone()).collect();
                // Everything that was posted before is sent, as far as that is possible at once.
                self.stay();
                self.publish();
                self.close("the client was closed");
                // The calls have ended. The connection still waits for the confirms of what was sent.
                tokio::spawn(async move {
                    join_all(transports.iter().map(Transport::close)).await;
                    // An error means that nobody waits for the end.
                    let _ = done.send(());
                });
            }
        }
    }

    /// Ends all calls and closes the client for good.
    pub(super) fn close(&mut self, reason: &str) {
        // The first reason is kept.
        let _ = self.shared.over.set(reason.into());
        self.enter(State::Closed);
        (self.session, self.opening, self.former, self.moving) = (None, None, None, Move::None);
        self.watchers.clear();
        self.first = self.number + 1;
        let mut parcels: Vec<_> = self.outbox.clear().collect();
        let waiting = [&mut self.places.crowd, &mut self.unsent, &mut self.unheard].into_iter();
        for waiting in waiting.chain(self.asking.values_mut()).chain(self.stuck.values_mut()) {
            parcels.extend(waiting.clear());
        }
        self.kept.clear();
        self.end_unclear();
        for (_, parcel) in parcels {
            let handed_over = parcel.token.attempts > 0;
            parcel.token.end(&CallEnd::Lost(closed(&self.shared, handed_over)));
        }
        self.left();
    }
}
