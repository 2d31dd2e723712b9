//! How much a client sends and receives.

/// How much a client has sent and received since it connected: calls, and the messages they shared.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Traffic {
    /// Messages published: requests, oneway calls, events and cancels.
    pub messages_sent: u64,
    /// Calls, events and cancels in them.
    pub calls_sent: u64,
    /// Messages that brought replies.
    pub messages_received: u64,
    /// Replies in them.
    pub replies_received: u64,
    /// What came to the reply queue in vain: replies that nobody waits for, be they late, second or forged, frames that
    /// are no replies, and what cannot be read.
    pub replies_ignored: u64,
}

impl Traffic {
    /// What has been sent and received since it was `before`; nothing, where that is of another client or came later.
    #[must_use]
    pub fn since(self, before: Self) -> Self {
        Self {
            messages_sent: self.messages_sent.saturating_sub(before.messages_sent),
            calls_sent: self.calls_sent.saturating_sub(before.calls_sent),
            messages_received: self.messages_received.saturating_sub(before.messages_received),
            replies_received: self.replies_received.saturating_sub(before.replies_received),
            replies_ignored: self.replies_ignored.saturating_sub(before.replies_ignored),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_was_sent_since_a_later_time() {
        let (earlier, later) =
            (Traffic { calls_sent: 2, ..Traffic::default() }, Traffic { calls_sent: 5, ..Traffic::default() });
        assert_eq!(later.since(earlier).calls_sent, 3);
        assert_eq!(earlier.since(later), Traffic::default());
    }
}
