//! Events: what a type says of those that it is, how they are read, and which subscribers have got one.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::codec::Codec;
use crate::context::Context;

/// An event with a type of its own, on which publishers and subscribers agree: it has a key and a version.
/// [`#[hopline::event]`](macro@crate::event) implements it, and [`Client::emit`](crate::Client::emit) publishes it.
///
/// ```
/// use hopline::{Client, Error, Event};
/// use serde::{Deserialize, Serialize};
///
/// #[hopline::event(key = "order.created")]
/// #[derive(Serialize, Deserialize)]
/// struct OrderCreated {
///     id: u64,
/// }
///
/// # async fn example(client: Client) -> Result<(), Error> {
/// assert_eq!((OrderCreated::KEY, OrderCreated::VERSION), ("order.created", 1));
/// client.emit(&OrderCreated { id: 7 }).await?;
/// # Ok(()) }
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not an event",
    label = "it has no key and no version",
    note = "write `#[hopline::event(key = \"order.created\")]` on the type, or publish it by a key: `client.publish(key, &event)`"
)]
pub trait Event: Serialize + DeserializeOwned {
    /// What has happened: words with dots between them.
    const KEY: &'static str;
    /// Which form of the event this is, from 1. A subscriber takes one version, and refuses all others.
    const VERSION: u32 = 1;
}

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

/// Reads an event for a handler. Its type is of this `version`; `None` takes any. The error names the key, the version,
/// the sender, and the place that does not fit.
pub(crate) fn read_event<T: DeserializeOwned>(
    context: &Context,
    version: Option<u32>,
    codec: Codec,
    payload: &[u8],
) -> Result<T, String> {
    let (key, sent) = (context.method(), context.event_version());
    let sender = context.caller().unwrap_or("a sender without a name");
    if let Some(version) = version.filter(|version| u64::from(*version) != sent) {
        return Err(format!("version {sent} of `{key}`, from `{sender}`, and this subscriber takes version {version}"));
    }
    codec.decode(payload).map_err(|error| format!("the event `{key}` of version {sent}, from `{sender}`, {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::context::tests::of_event;

    #[test]
    fn an_event_of_another_version_is_not_read() {
        let payload = Codec::Json.encode(&7).expect("writes");
        for (sent, takes) in [(2, 1), (1, 2), (u64::from(u32::MAX) + 2, 1)] {
            let context = of_event("order.created", Some("shop a1"), sent);
            let read = read_event::<u64>(&context, Some(takes), Codec::Json, &payload);
            let said =
                format!("version {sent} of `order.created`, from `shop a1`, and this subscriber takes version {takes}");
            assert_eq!(read, Err(said));
            assert_eq!(read_event(&context, None, Codec::Json, &payload), Ok(7), "whoever takes any");
        }
        let context = of_event("order.created", None, 3);
        assert_eq!(read_event(&context, Some(3), Codec::Json, &payload), Ok(7));
    }

    #[test]
    fn an_event_that_does_not_fit_is_told_with_key_version_sender_and_place() {
        let payload = Codec::Json.encode(&[1, -1]).expect("writes");
        let context = of_event("order.created", Some("shop a1"), 1);
        let said = read_event::<Vec<u8>>(&context, Some(1), Codec::Json, &payload).expect_err("no byte is below 0");
        let begins =
            "the event `order.created` of version 1, from `shop a1`, cannot be read as JSON: [1]: invalid value";
        assert!(said.starts_with(begins), "{said}");
    }
}
