//! Late confirms: when the broker confirms nothing, or not all, although the connection stands, the client's state says
//! so.

use std::time::Duration;

use tokio::time::Instant;

use super::{LOOK, LineTask};
use crate::state::State;

/// How long a confirm may take until the state says that it is late.
const LATE: Duration = Duration::from_secs(5);
/// How many keys the state names at most.
const NAMED: usize = 3;

impl LineTask {
    /// Looks for late confirms, and sets the state to `Degraded` or back to `Ready`.
    pub(super) fn look_for_confirms(&mut self, now: Instant) {
        if self.is_held() {
            return;
        }
        if !self.takes() {
            self.late_since = None;
            return;
        }
        if self.window.waits_since().is_some_and(|since| since + LOOK <= now) {
            // The broker confirms a probe at once. So if the probe is confirmed and a message is not, its queue is
            // slow, and not the connection.
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

    /// What is late, as a sentence. `None` if nothing is.
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
