//! Events: a client publishes one, and every subscriber gets it.

use std::sync::Arc;

use bytes::Bytes;
use serde::Serialize;
use tokio::sync::oneshot;

use super::Client;
use super::attempt::{Attempt, more};
use super::in_flight::CallEnd;
use super::line::Token;
use super::pending::{lost_with, no_exchange};
use super::request::{check_metadata, head_start};
use crate::codec::CodecError;
use crate::context::Context;
use crate::error::Error;
use crate::frame::{Frame, Kind, Metadata};
use crate::limits::MAX_TIMEOUT;
use crate::middleware::{Invocation, Reply, Style};
use crate::outgoing::Parcel;
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

/// One attempt to publish an event.
struct OutgoingEvent {
    key: Arc<str>,
    metadata: Vec<(String, String)>,
    /// The context of the handler that publishes it.
    context: Option<Context>,
    attempt: Attempt,
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
        let settings = &self.0.settings;
        let codec = settings.codec;
        let write = |payload: &mut Vec<u8>| {
            codec.write(&event, payload).map_err(|error| CodecError(format!("the event {}", error.0)))
        };
        let event = OutgoingEvent {
            key: key.into(),
            metadata: settings.metadata.clone(),
            context: Context::current(),
            attempt: Attempt::first(settings.timeout.min(MAX_TIMEOUT)),
        };
        if settings.middleware.is_empty() {
            return self.announce(&event, write).await;
        }
        let mut payload = Vec::new();
        write(&mut payload)?;
        self.announce_through(event, payload.into()).await
    }

    /// Publishes an event with the middleware around it.
    async fn announce_through(&self, event: OutgoingEvent, payload: Bytes) -> Result<Published, Error> {
        let codec = self.0.settings.codec;
        let call = Invocation {
            caller: Some(self.0.caller.clone()),
            deadline: Some(event.attempt.deadline),
            metadata: event.metadata.into(),
            codec,
            payload,
            ..Invocation::new(Style::Event, "events".into(), event.key.clone(), event.attempt.call_id)
        };
        let (key, context) = (event.key, event.context);
        let announcing = self.through(call, event.attempt, move |client, call, attempt| {
            let (key, context, metadata) = (key.clone(), context.clone(), call.metadata.clone().into_vec());
            let attempt = Attempt { set_trace: call.set_trace(), ..attempt };
            let event = OutgoingEvent { key, metadata, context, attempt };
            async move {
                let published = client.announce(&event, |body: &mut Vec<u8>| {
                    body.extend_from_slice(&call.payload);
                    Ok(())
                });
                Ok(Reply { missed: published.await? == Published::NotToAll, ..Reply::empty(codec) })
            }
        });
        Ok(if announcing.await?.missed { Published::NotToAll } else { Published::ToAll })
    }

    /// Publishes an event and waits until the broker has confirmed it.
    async fn announce(
        &self,
        event: &OutgoingEvent,
        write: impl FnOnce(&mut Vec<u8>) -> Result<(), CodecError>,
    ) -> Result<Published, Error> {
        let OutgoingEvent { key, metadata: user, context, attempt } = event;
        check_metadata(user)?;
        let more = more(Some(attempt), user.clone());
        let metadata = Metadata { method: Some(key.clone()), more, ..self.metadata(attempt.traced(context.as_ref())) };
        let frame = Frame::new(Kind::Event, attempt.id(), self.0.settings.codec, metadata, Bytes::new());
        let body = self.sized("event", frame.to_body_with(write)?)?;
        let size = body.len();
        let Attempt { deadline, timeout: after, .. } = *attempt;
        let (sender, said) = oneshot::channel();
        let token = Token { said: Some(sender), repeatable: true, ..Token::until(deadline - head_start(after)) };
        let parcel = Parcel {
            id: frame.id,
            frame: body,
            share: self.0.settings.coalesce.share(),
            kind: Some(key.clone()),
            expiration: None,
            token,
        };
        self.0.line.post(self.0.exchanges.event(key.clone()), parcel);
        match self.end_of(frame.id, deadline, said).await {
            CallEnd::Said(Confirm::Accepted | Confirm::Returned) => Ok(Published::ToAll),
            CallEnd::Said(Confirm::Refused) => Ok(Published::NotToAll),
            CallEnd::NoExchange { exchange, why } => Err(no_exchange(&exchange, why)),
            CallEnd::Said(Confirm::TooLarge(limit)) => {
                Err(Error::TooLarge { what: "event", size, limit, whose: "broker's" })
            }
            CallEnd::Lost(lost) => Err(lost_with(key.to_string(), lost)),
            CallEnd::Blocked { reason, after, may_have_run } => {
                Err(Error::Blocked { method: Some(key.to_string()), reason: reason.to_string(), after, may_have_run })
            }
            CallEnd::TimedOut(why) => Err(Error::Timeout { method: key.to_string(), after, why }),
            CallEnd::Full(_) | CallEnd::Silent { .. } | CallEnd::Unreachable(_) => unreachable!("this is no call"),
        }
    }
}
