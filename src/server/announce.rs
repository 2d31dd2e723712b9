//! What an instance tells whoever watches: that it is up, that it is still here, that it drains, and that it is down.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::{MissedTickBehavior, interval};
use tracing::warn;
use uuid::Uuid;

use super::Site;
use crate::codec::Codec;
use crate::document::{ANNOUNCED, Announcement, LifeState};
use crate::frame::{Frame, Kind, Metadata};
use crate::state::State;
use crate::transport::{Loss, Lost};

/// How often an instance says that it is still here.
const HERE: Duration = Duration::from_secs(30);
/// How long the broker's confirm of an announcement is awaited.
const CONFIRMED: Duration = Duration::from_secs(1);

impl Site {
    /// Announces this instance until it drains.
    pub(super) async fn announce(self: Arc<Self>) {
        let (mut state, mut transports) = (self.health.state.subscribe(), self.transports.subscribe());
        let mut tick = interval(HERE);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // Whether it was ready over this connection at the last look.
        let (mut was_ready, mut was_up) = (false, false);
        loop {
            let is_ready = matches!(*state.borrow_and_update(), State::Ready | State::Degraded { .. });
            if is_ready && !was_ready {
                was_up = true;
                tick.reset();
                self.tell(LifeState::Up).await;
            }
            was_ready = is_ready;
            tokio::select! {
                () = self.draining.cancelled() => break,
                changed = state.changed() => if changed.is_err() {
                    return;
                },
                // Over another connection it is up again, though this task may not have seen it down.
                Ok(()) = transports.changed() => was_ready = false,
                _ = tick.tick(), if was_ready => self.tell(LifeState::Here).await,
            }
        }
        if was_up && *state.borrow() != State::Closed {
            self.tell(LifeState::Draining).await;
        }
    }

    /// Announces something, if the broker takes it.
    pub(super) async fn tell(&self, state: LifeState) {
        let transport = self.transport();
        if self.services.is_empty() || transport.blocked().is_some() || self.is_mute() {
            return;
        }
        let left: Vec<_> = self.workers().into_iter().filter(|worker| worker.has_left()).collect();
        let services = self.services.iter().filter(|service| left.iter().all(|worker| worker.name != **service));
        let services = services.map(ToString::to_string).collect();
        let announcement = Announcement { state, instance: self.instance.to_string(), services };
        let Ok(payload) = Codec::Json.encode(&announcement) else { return };
        let metadata =
            Metadata { method: Some(ANNOUNCED.into()), instance: Some(self.instance.clone()), ..Metadata::default() };
        let frame = Frame::new(Kind::Event, Uuid::new_v4(), Codec::Json, metadata, Bytes::from(payload));
        let receipt = transport.publish(self.exchanges.announcement(frame.to_body()));
        if let Ok(Err(Lost { loss: Loss::Refused, reason })) = tokio::time::timeout(CONFIRMED, receipt).await {
            self.mute();
            warn!(name = &*self.name, %reason, "who watches the instances learns of this one late: its user needs the permission to write to the exchange of discovery");
        }
    }
}
