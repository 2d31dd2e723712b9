//! What is known of a call that got no reply in its time.

use std::fmt;

/// What is known of a call that got no reply in its time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Unanswered {
    /// It was not sent: no time was left for it when it was made, or, with [`Absent::Fail`](crate::Absent::Fail), the broker
    /// did not say in time whether an instance is there.
    Unsent,
    /// It was not sent: more was to be sent in its time than the connection to the broker carries, or its queue did not confirm
    /// what it had got before.
    Congested,
    /// No instance of its service was there whenever the broker was asked, as it is after a second without a sign of life.
    /// It waited for one to come back, as calls do for the [grace period](crate::Service::grace) of 60 s unless set. It
    /// has run only if an instance took it and died within that first second, or came between two questions.
    Unserved,
    /// A handler made it, of a server that drains and served it itself, and no other instance was there when the broker was
    /// asked: the drain would have waited for it. It runs if an instance comes in the rest of its time.
    Draining,
    /// It may have run, or run still, or wait behind others.
    Unknown,
}

impl Unanswered {
    /// Whether the call may have run: certain it is only of one that was not sent.
    #[must_use]
    pub fn may_have_run(self) -> bool {
        !matches!(self, Self::Unsent | Self::Congested)
    }
}

impl fmt::Display for Unanswered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unsent => "it was not sent, since no time was left",
            Self::Congested => {
                "it was not sent: the connection to the broker, or the queue, takes less than there is to send; send less, \
                 or allow more time with `.timeout()`"
            }
            Self::Unserved => {
                "nobody served it whenever the broker was asked: start an instance, for which calls wait as long as \
                 `Service::grace` says (60 s unless set); it has run only if an instance took it and died at once, or came in between"
            }
            Self::Draining => {
                "the server that made it drains, and no other instance of the service is there: it runs if one comes in \
                 the rest of its time"
            }
            Self::Unknown => "it may have run; allow more time with `.timeout()`",
        })
    }
}
