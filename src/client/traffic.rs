//! Counters of what a client sends and receives.

/// What a client has sent and received since it connected, from [`Client::traffic`](crate::Client::traffic): calls, and
/// the messages that they shared. The counters never go down.
///
/// ```
/// # async fn example(client: hopline::Client) -> Result<(), hopline::Error> {
/// let before = client.traffic();
/// let total: u64 = client.call("shop", "total", ()).await?;
/// let sent = client.traffic().since(before);
/// println!("{} calls in {} messages", sent.calls_sent, sent.messages_sent);
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Traffic {
    /// How many messages it has published, with requests, oneway calls, events and cancels.
    pub messages_sent: u64,
    /// How many requests, oneway calls, events and cancels were in these messages.
    pub calls_sent: u64,
    /// How many messages have arrived on its reply queue.
    pub messages_received: u64,
    /// How many replies were in these messages.
    pub replies_received: u64,
    /// How many frames on the reply queue were of no use: replies that nobody waits for, since they are late, second or
    /// forged; frames that are not replies; and what cannot be read.
    pub replies_ignored: u64,
}

impl Traffic {
    /// What was sent and received since the counters were `before`. A counter that is lower than before, as that of
    /// another client, counts as 0.
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
