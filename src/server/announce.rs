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
        let (mut state, mut tick) = (self.health.state.subscribe(), interval(HERE));
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut is_up = false;
        loop {
            let connected = matches!(*state.borrow_and_update(), State::Ready | State::Degraded { .. });
            let news = connected && !is_up;
            is_up = connected;
            if news {
                tick.reset();
                if !self.tell(LifeState::Up).await {
                    return;
                }
            }
            tokio::select! {
                () = self.draining.cancelled() => break,
                changed = state.changed() => if changed.is_err() {
                    return;
                },
                _ = tick.tick(), if is_up => if !self.tell(LifeState::Here).await {
                    return;
                },
            }
        }
        self.tell(LifeState::Draining).await;
    }

    /// Announces something. Returns whether the broker lets this user announce anything.
    pub(super) async fn tell(&self, state: LifeState) -> bool {
        if self.services.is_empty() {
            return true;
        }
        let services = self.services.iter().map(ToString::to_string).collect();
        let announcement = Announcement { state, instance: self.instance.to_string(), services };
        let Ok(payload) = Codec::Json.encode(&announcement) else { return true };
        let metadata =
            Metadata { method: Some(ANNOUNCED.into()), instance: Some(self.instance.clone()), ..Metadata::default() };
        let frame = Frame::new(Kind::Event, Uuid::new_v4(), Codec::Json, metadata, Bytes::from(payload));
        let receipt = self.transport().publish(self.exchanges.announcement(frame.to_body()));
        match tokio::time::timeout(CONFIRMED, receipt).await {
            Ok(Err(Lost { loss: Loss::Refused, reason })) => {
                warn!(name = &*self.name, %reason, "who watches the instances learns of this one late: its user needs the permission to write to the exchange of discovery");
                false
            }
            _ => true,
        }
    }
}
