//! Events: a client publishes one, and every subscriber gets it.

use bytes::Bytes;
use serde::Serialize;
use tokio::sync::oneshot;
use tokio::time::Instant;
use uuid::Uuid;

use super::line::Token;
use super::pending::{lost_with, no_exchange};
use super::replies::End;
use super::request::{head_start, traced};
use super::{Client, MAX_TIMEOUT};
use crate::codec::CodecError;
use crate::context::Context;
use crate::error::Error;
use crate::frame::{Frame, Kind, Metadata};
use crate::outbox::Parcel;
use crate::topology::check_event_key;
use crate::transport::Confirm;

/// Which subscribers have got an event.
///
/// ```
/// use hopline::{Client, Published};
///
/// # async fn example(client: Client) -> Result<(), hopline::Error> {
/// match client.publish("order.created", &7).await? {
///     Published::ToAll => {}
///     _ => eprintln!("somebody has not got it"),
/// }
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Published {
    /// All that exist, which may be none.
    ToAll,
    /// Not all. The broker could not put the event into the queue of at least one subscriber, since the queue is full
    /// or unreachable, for example while a node of the cluster is down. Publishing the event again would give it to the
    /// others twice.
    NotToAll,
}

impl Client {
    /// Publishes an event to everybody who subscribes to its key, such as `order.created`. It is no error if nobody
    /// does. Returns after the broker has confirmed it.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), hopline::Error> {
    /// # let client = hopline::Client::connect("memory://").await?;
    /// if client.publish("order.created", &7).await? == hopline::Published::NotToAll {
    ///     eprintln!("a subscriber has missed an order");
    /// }
    /// # Ok(()) }
    /// ```
    ///
    /// If the connection is lost, the event is sent again, and may arrive twice.
    ///
    /// # Errors
    /// - `Invalid` for a key that cannot be used. A key has 1 to 255 bytes: words with single dots between them,
    ///   without `*` and `#`.
    /// - `Codec` for an event that cannot be written, `TooLarge` for one that is too large.
    /// - `Timeout` if the broker does not confirm within the client's time-out.
    /// - `Blocked` while the broker accepts no messages, `Disconnected` without a connection.
    /// - `Broker` if somebody has deleted the exchange for events. It is declared again, but reaches nobody until the
    ///   subscribers have bound their queues again, which takes seconds.
    pub async fn publish<E: Serialize + ?Sized>(&self, key: &str, event: &E) -> Result<Published, Error> {
        check_event_key(key).map_err(Error::Invalid)?;
        let codec = self.0.settings.codec;
        let metadata = Metadata { method: Some(key.into()), ..self.metadata(traced(Context::current().as_ref())) };
        let frame = Frame::new(Kind::Event, Uuid::new_v4(), codec, metadata, Bytes::new());
        let body = frame
            .to_body_with(|payload| codec.write(&event, payload))
            .map_err(|error| CodecError(format!("the event {}", error.0)))?;
        let body = self.sized("event", body)?;
        let size = body.len();
        let address = self.0.exchanges.event(key);
        let after = self.0.settings.timeout;
        let deadline = Instant::now() + after.min(MAX_TIMEOUT);
        let (sender, said) = oneshot::channel();
        let token = Token { said: Some(sender), repeatable: true, ..Token::until(deadline - head_start(after)) };
        let parcel = Parcel {
            id: frame.id,
            frame: body,
            share: self.0.settings.coalesce.share(),
            kind: Some(address.key().clone()),
            expiration: None,
            token,
        };
        self.0.line.post(address, parcel);
        match self.end_of(frame.id, deadline, said).await {
            End::Said(Confirm::Accepted | Confirm::Returned) => Ok(Published::ToAll),
            End::Said(Confirm::Refused) => Ok(Published::NotToAll),
            End::NoExchange { exchange, why } => Err(no_exchange(&exchange, why)),
            End::Said(Confirm::TooLarge(limit)) => Err(Error::TooLarge { what: "event", size, limit }),
            End::Lost(lost) => Err(lost_with(key.to_owned(), lost)),
            End::Blocked { reason, after, may_have_run } => {
                Err(Error::Blocked { method: Some(key.to_owned()), reason: reason.to_string(), after, may_have_run })
            }
            End::TimedOut(why) => Err(Error::Timeout { method: key.to_owned(), after, why }),
            End::Full(_) | End::Silent { .. } | End::Unreachable(_) => unreachable!("this is no call"),
        }
    }
}
