//! What the broker leaves unconfirmed though the connection stands, which the client's state tells.

use std::time::Duration;

use tokio::time::Instant;

use super::{LOOK, Task};
use crate::state::State;

/// How long a confirm may take before the state tells that it has not come.
const LATE: Duration = Duration::from_secs(5);
/// How many of the services are named that this concerns.
const NAMED: usize = 3;

impl Task {
    /// Tells in the state whether the broker confirms what it gets.
    pub(super) fn look_for_confirms(&mut self, now: Instant) {
        if self.is_held() {
            return;
        }
        if !self.takes() {
            self.late_since = None;
            return;
        }
        if self.window.waits_since().is_some_and(|since| since + LOOK <= now) {
            // Whether it is the way to the broker, or a queue that takes its time, is told by what becomes of this.
            self.send_probe(now);
        }
        let Some(reason) = self.late(now) else {
            if self.late_since.take().is_some() {
                self.enter(State::Ready);
            }
            return;
        };
        let since = *self.late_since.get_or_insert(now);
        self.enter(State::Degraded { reason: reason.into(), since });
    }

    /// What the broker has not confirmed for long, if there is anything.
    fn late(&self, now: Instant) -> Option<String> {
        let is_late = |since: Instant| since + LATE <= now;
        if self.window.probing_since().is_some() && self.window.waits_since().is_some_and(is_late) {
            return Some(format!(
                "the broker has confirmed nothing for more than {LATE:?}, though the connection stands: the network or \
                 the broker is slow, or stuck"
            ));
        }
        let mut keys: Vec<_> = self.unconfirmed.keys_before(now - LATE).collect();
        keys.sort_unstable();
        keys.dedup();
        let more = if keys.len() > NAMED { " and others" } else { "" };
        keys.truncate(NAMED);
        (!keys.is_empty()).then(|| {
            format!(
                "the broker has not confirmed what was sent to `{}`{more} for more than {LATE:?}: a queue that is to take \
                 it is out of reach, as when its node or most nodes of the cluster are away; see `rabbitmqctl cluster_status`",
                keys.join("`, `")
            )
        })
    }
}
