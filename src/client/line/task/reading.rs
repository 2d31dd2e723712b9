//! What arrives on the reply queue: replies, and signs of life of the instances that run calls.

use std::collections::VecDeque;

use tracing::{debug, warn};

use super::{LineTask, add};
use crate::client::in_flight::HeldReply;
use crate::client::session::{Happening, Rest, Session};
use crate::frame::{self, Kind};
use crate::outgoing::BATCH;
use crate::transport::{Confirm, Delivery, Lost};

/// Lost sessions. Everything that has arrived on them is read before their calls fail.
#[derive(Default)]
pub(super) struct LostSessions {
    /// What has arrived and was not read.
    pub(super) rests: VecDeque<Rest>,
    /// What became of their messages in the meantime. This is handled after the rest was read.
    pub(super) concluded: Vec<(u64, Result<Confirm, Lost>)>,
}

impl LineTask {
    /// Reads a message on the reply queue, and gives its replies to their callers.
    pub(super) fn read(&mut self, delivery: Delivery) {
        add(&self.shared.messages_received, 1);
        if self.hear_deletion(&delivery) {
            return;
        }
        let moment = self.moment(delivery.received);
        #[cfg(feature = "metrics")]
        let mut replies = 0;
        for frame in frame::decode(delivery.body) {
            let awaited = match frame {
                Ok(frame) if frame.kind == Kind::Reply => {
                    add(&self.shared.replies_received, 1);
                    #[cfg(feature = "metrics")]
                    (replies += 1);
                    let answered = self.in_flight.deliver(frame, moment);
                    let is_awaited = answered.is_some();
                    self.answered.extend(answered);
                    is_awaited
                }
                Ok(frame) if frame.kind == Kind::KeepAlive => {
                    self.in_flight.report(frame.id, frame.metadata.instance.unwrap_or_default(), moment)
                }
                Ok(frame) if frame.kind == Kind::Event && self.hear(&frame) => true,
                Ok(frame) => {
                    debug!(name = self.name(), kind = ?frame.kind, id = %frame.id, "not a reply, on the reply queue");
                    false
                }
                Err(error) => {
                    warn!(name = self.name(), id = error.id.map(tracing::field::display), %error, "a malformed message on the reply queue");
                    false
                }
            };
            if !awaited {
                add(&self.shared.replies_ignored, 1);
            }
        }
        #[cfg(feature = "metrics")]
        if replies > 0 {
            self.shared.link.received.add(replies);
        }
        // All callers are woken together. One after the other, each of them would wake another thread.
        self.answered.drain(..).for_each(HeldReply::tell);
        self.answered.shrink_to(BATCH);
    }
}

/// The next thing that happens on a session. Never resolves without one.
pub(super) async fn next_of(session: Option<&mut Session>) -> Happening {
    match session {
        Some(session) => session.next().await,
        None => std::future::pending().await,
    }
}

/// The next message that arrived on a lost session. `None` after the last.
pub(super) async fn rest_of(leaving: &mut Option<LostSessions>) -> Option<Delivery> {
    let Some(leaving) = leaving else { return std::future::pending().await };
    while let Some(rest) = leaving.rests.front_mut() {
        if let Some(delivery) = rest.next().await {
            return Some(delivery);
        }
        leaving.rests.pop_front();
    }
    None
}
