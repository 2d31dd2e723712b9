//! Which subscribers have got an event.

/// Which subscribers and groups have got an event.
///
/// ```
/// use hopline::{Client, Published};
///
/// # async fn example(client: Client) -> Result<(), hopline::Error> {
/// match client.publish("order.created", &7).confirmed().await? {
///     Published::ToAll => {}
///     Published::ToNobody => eprintln!("nobody subscribes to orders"),
///     _ => eprintln!("somebody has not got it"),
/// }
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Published {
    /// All that exist. Without [`Publish::confirmed`](crate::Publish::confirmed) there may be none.
    ToAll,
    /// Not all. The broker could not put the event into the queue of at least one subscriber, since the queue is full
    /// or unreachable, for example while a node of the cluster is down. Publishing the event again would give it to the
    /// others twice.
    NotToAll,
    /// Nobody, and it is gone: no subscriber and no group has a queue for this key. It is told only of an event that is
    /// published [`confirmed`](crate::Publish::confirmed).
    ToNobody,
}
