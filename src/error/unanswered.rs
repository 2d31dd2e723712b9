//! What is known of a call that got no reply in its time.

use std::fmt;

/// What is known of a call that got no reply in its time.
///
/// ```
/// use hopline::{Client, Error, Unanswered};
///
/// # async fn example(client: Client) {
/// match client.call::<u64>("shop", "total", ()).await {
///     Err(Error::Timeout { why: Unanswered::Unserved, .. }) => eprintln!("no instance came back in time"),
///     Err(Error::Timeout { why, .. }) if why.may_have_run() => eprintln!("it may have run"),
///     outcome => println!("{outcome:?}"),
/// }
/// # }
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Unanswered {
    /// The call was not sent. No time was left when it was made, or, with [`Absent::Fail`](crate::Absent::Fail), the broker
    /// did not say in time whether an instance is there.
    Unsent,
    /// The call was not sent. There was more to send than the connection to the broker carries in that time, or the queue did
    /// not confirm earlier messages.
    Congested,
    /// The call waited for an instance of its service to come back, and none came. Calls wait so for the
    /// [grace period](crate::Service::grace) (default: 60 s). After one second without a sign of life the client asks the
    /// broker again and again whether an instance is there. So the call has run only if an instance took it and died
    /// within that first second, or came and went between two questions.
    Unserved,
    /// A handler made the call to a service of its own server, which drains, and no other instance of that service is there.
    /// The drain does not wait for such a call. It runs if an instance comes before its deadline.
    Draining,
    /// The call was sent, and at its deadline no instance takes calls. If an instance has taken the call, that one has died
    /// or drains. Until another instance starts, more time does not help.
    Gone,
    /// A middleware of the client was still running at the deadline.
    Middleware {
        /// Whether an attempt of the call may have run.
        may_have_run: bool,
    },
    /// Nothing is known: the call may have run, may still run, or may wait behind others.
    Unknown,
}

impl Unanswered {
    /// Whether the call may have run. It is `false` only for a call that was not sent, or whose attempts were all refused.
    #[must_use]
    pub fn may_have_run(self) -> bool {
        match self {
            Self::Unsent | Self::Congested => false,
            Self::Middleware { may_have_run } => may_have_run,
            Self::Unserved | Self::Draining | Self::Gone | Self::Unknown => true,
        }
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
            Self::Gone => {
                "it may have run, and nobody serves it now: if an instance took it, that one has died or drains; start an \
                 instance"
            }
            Self::Middleware { may_have_run: false } => {
                "it has not run: a middleware of this client was still running at the deadline"
            }
            Self::Middleware { may_have_run: true } => {
                "it may have run: a middleware of this client was still running at the deadline"
            }
            Self::Unknown => "it may have run; allow more time with `.timeout()`",
        })
    }
}
