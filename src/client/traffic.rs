//! How much a client sends and receives.

/// How much a client has sent and received since it connected: calls, and the messages they shared.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
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
    /// What has been sent and received since it was `before`.
    #[must_use]
    pub fn since(self, before: Self) -> Self {
        Self {
            messages_sent: self.messages_sent - before.messages_sent,
            calls_sent: self.calls_sent - before.calls_sent,
            messages_received: self.messages_received - before.messages_received,
            replies_received: self.replies_received - before.replies_received,
            replies_ignored: self.replies_ignored - before.replies_ignored,
        }
    }
}
