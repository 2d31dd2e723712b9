//! What is told of a group.

use crate::error::Error;

/// A group of subscribers.
///
/// ```
/// # fn example(group: hopline::Group) {
/// match group.counts {
///     Ok(counts) => println!("{} events wait for {}", counts.waiting, group.name),
///     Err(error) => println!("{} does not tell: {error}", group.name),
/// }
/// # }
/// ```
#[derive(Debug)]
#[non_exhaustive]
pub struct Group {
    /// Its name.
    pub name: String,
    /// The patterns by which it gets events, or has got them in an earlier release.
    pub patterns: Vec<String>,
    /// What is in its queues, or the error if one of them does not answer.
    pub counts: Result<GroupCounts, Error>,
}

/// What is in the queues of a group, in messages. Several events that were published together may share a message.
///
/// ```
/// # fn example(counts: hopline::GroupCounts) {
/// if counts.consumers == 0 && counts.waiting > 0 {
///     println!("{} messages wait, and no instance of the group is up", counts.waiting);
/// }
/// # }
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct GroupCounts {
    /// Those that no instance has yet. For a group that replays these are not its new events: see
    /// [`ReplayPosition::lag`].
    pub waiting: u64,
    /// Those that failed and wait for their next attempt.
    pub retrying: u64,
    /// Its [dead letters](crate::DeadLetters).
    pub dead: u64,
    /// How many instances are subscribed.
    pub consumers: u32,
    /// `Some` if the group replays: [`Subscription::from`](crate::Subscription::from).
    pub replay: Option<ReplayPosition>,
}

/// How far a group has read its stream.
///
/// ```
/// # fn example(counts: hopline::GroupCounts) {
/// if let Some(position) = counts.replay {
///     println!("it has read up to {:?}, and the stream ends at {:?}", position.next, position.last);
/// }
/// # }
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ReplayPosition {
    /// The offset of the first event that it has not handled. `None` if it has not begun.
    pub next: Option<u64>,
    /// The offset of the last event in the stream. `None` if there never was one.
    pub last: Option<u64>,
}

impl ReplayPosition {
    /// How many messages it has still to read. If it has not begun, all that were ever in the stream, though it may be to
    /// begin later than with the first, and the oldest may be deleted.
    #[must_use]
    pub fn lag(&self) -> u64 {
        self.last.map_or(0, |last| (last + 1).saturating_sub(self.next.unwrap_or(0)))
    }
}
