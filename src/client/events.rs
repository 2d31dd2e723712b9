//! Publishing events: a client publishes one, and every subscriber gets it.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context as TaskContext, Poll};

use bytes::Bytes;
use futures::future::{BoxFuture, FutureExt as _};
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
use crate::event::{Event, Published};
use crate::frame::{Frame, Kind, Metadata};
use crate::limits::MAX_TIMEOUT;
use crate::middleware::{Invocation, Reply, Style};
use crate::outgoing::Parcel;
use crate::topology::check_event_key;
use crate::transport::Confirm;

/// An event that is published when this is awaited. [`Client::publish`] and [`Client::emit`] make it.
///
/// Awaited as it is, it returns when the broker has the event. It is no error if nobody subscribes. Options say more:
///
/// ```
/// use hopline::{Client, Error, Published};
///
/// # async fn example(client: Client) -> Result<(), Error> {
/// if client.publish("order.created", &7).confirmed().await? == Published::ToNobody {
///     eprintln!("nobody subscribes to orders");
/// }
/// # Ok(()) }
/// ```
///
/// It is a future and borrows nothing: `join_all` publishes several at once, and `tokio::spawn` takes one. What is
/// published at once may leave in another order, so await an event before you publish the next one if their order matters.
#[must_use = "an event is published when it is awaited"]
pub struct Publish {
    client: Client,
    /// Until it is awaited: the event, or why it cannot be published.
    event: Option<Result<OutgoingEvent, Error>>,
    /// From then on.
    running: Option<BoxFuture<'static, Result<Published, Error>>>,
}

/// What its publisher is told of an event that no queue takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum IfNobody {
    /// Nothing.
    Unsaid,
    /// That it went to nobody.
    Told,
    /// An error.
    Fails,
}

/// An event that is to be published.
#[derive(Debug, Clone)]
struct OutgoingEvent {
    key: Arc<str>,
    version: u32,
    payload: Bytes,
    if_nobody: IfNobody,
    metadata: Vec<(String, String)>,
    /// The context of the handler that publishes it.
    context: Option<Context>,
}

impl Client {
    /// Publishes an event to everybody who subscribes to its key, such as `order.created`. It is no error if nobody
    /// does, unless [`Publish::required`] says so. Returns after the broker has confirmed it.
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
    /// Awaiting it fails with:
    /// - `Invalid` for a key that cannot be used. A key has 1 to 255 bytes: words with single dots between them,
    ///   without `*` and `#`.
    /// - `Codec` for an event that cannot be written, `TooLarge` for one that is too large.
    /// - `Timeout` if the broker does not confirm within the client's time-out.
    /// - `Blocked` while the broker accepts no messages, `Disconnected` without a connection.
    /// - `NoSubscriber` if it is [`required`](Publish::required), and nobody gets it.
    /// - `Broker` if somebody has deleted the exchange for events. It is declared again, but reaches nobody until the
    ///   subscribers have bound their queues again, which takes seconds.
    pub fn publish<E: Serialize + ?Sized>(&self, key: &str, event: &E) -> Publish {
        self.publishing(key, 1, event)
    }

    /// Publishes an event by the key and the version of its [type](Event). Otherwise as [`publish`](Self::publish).
    ///
    /// ```
    /// use hopline::{Client, Error};
    /// use serde::{Deserialize, Serialize};
    ///
    /// #[hopline::event(key = "order.created", version = 2)]
    /// #[derive(Serialize, Deserialize)]
    /// struct OrderCreated {
    ///     id: u64,
    /// }
    ///
    /// # async fn example(client: Client) -> Result<(), Error> {
    /// client.emit(&OrderCreated { id: 7 }).required().await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// As [`publish`](Self::publish).
    pub fn emit<E: Event>(&self, event: &E) -> Publish {
        self.publishing(E::KEY, E::VERSION, event)
    }

    /// Encodes the event now, so that nothing of it is borrowed.
    fn publishing<E: Serialize + ?Sized>(&self, key: &str, version: u32, event: &E) -> Publish {
        let settings = &self.0.settings;
        let encoded = check_event_key(key).map_err(Error::Invalid).and_then(|()| {
            settings.codec.encode(&event).map_err(|error| CodecError(format!("the event {}", error.0)).into())
        });
        let event = encoded.map(|payload| OutgoingEvent {
            key: key.into(),
            version,
            payload: payload.into(),
            if_nobody: IfNobody::Unsaid,
            metadata: settings.metadata.clone(),
            context: Context::current(),
        });
        Publish { client: self.clone(), event: Some(event), running: None }
    }

    async fn deliver_event(self, event: OutgoingEvent) -> Result<Published, Error> {
        let settings = &self.0.settings;
        let attempt = Attempt::first(settings.timeout.min(MAX_TIMEOUT));
        if settings.middleware.is_empty() {
            return self.announce(event, attempt).await;
        }
        self.announce_through(event, attempt).await
    }

    /// Publishes an event with the middleware around it.
    async fn announce_through(&self, event: OutgoingEvent, attempt: Attempt) -> Result<Published, Error> {
        let codec = self.0.settings.codec;
        let call = Invocation {
            caller: Some(self.0.caller.clone()),
            deadline: Some(attempt.deadline),
            metadata: event.metadata.clone().into(),
            codec,
            payload: event.payload.clone(),
            ..Invocation::new(Style::Event, "events".into(), event.key.clone(), attempt.call_id)
        };
        let announcing = self.through(call, attempt, move |client, call, attempt| {
            let attempt = Attempt { set_trace: call.set_trace(), ..attempt };
            let Invocation { payload, metadata, .. } = call;
            let event = OutgoingEvent { payload, metadata: metadata.into_vec(), ..event.clone() };
            async move { Ok(Reply { published: client.announce(event, attempt).await?, ..Reply::empty(codec) }) }
        });
        Ok(announcing.await?.published)
    }

    /// Publishes an event and waits until the broker has confirmed it.
    async fn announce(&self, event: OutgoingEvent, attempt: Attempt) -> Result<Published, Error> {
        let OutgoingEvent { key, version, payload, if_nobody, metadata: user, context } = event;
        check_metadata(&user)?;
        let mut metadata = self.metadata(attempt.traced(context.as_ref()));
        metadata = Metadata { method: Some(key.clone()), more: more(Some(&attempt), user), ..metadata };
        if version != 1 {
            metadata.more_mut().event_version = Some(version.into());
        }
        let frame = Frame::new(Kind::Event, attempt.id(), self.0.settings.codec, metadata, payload);
        let body = self.sized("event", frame.to_body())?;
        let size = body.len();
        let Attempt { deadline, timeout: after, .. } = attempt;
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
        self.0.line.post(self.0.exchanges.event(key.clone(), if_nobody != IfNobody::Unsaid), parcel);
        match self.end_of(frame.id, deadline, said).await {
            CallEnd::Said(Confirm::Accepted) => Ok(Published::ToAll),
            CallEnd::Said(Confirm::Returned) if if_nobody == IfNobody::Fails => {
                Err(Error::NoSubscriber { key: key.to_string() })
            }
            CallEnd::Said(Confirm::Returned) => Ok(Published::ToNobody),
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

impl Publish {
    /// Says [`Published::ToNobody`] of an event that no queue of a subscriber or group takes. Without this it is
    /// [`Published::ToAll`], as if somebody had it.
    ///
    /// The broker sends such an event back whole. An event that some have got and others not is
    /// [`Published::NotToAll`] in any case.
    pub fn confirmed(self) -> Self {
        self.if_nobody(IfNobody::Told)
    }

    /// Fails with [`Error::NoSubscriber`] if no queue of a subscriber or group takes the event. Otherwise it is
    /// [`confirmed`](Self::confirmed).
    ///
    /// ```
    /// use hopline::{Client, Error};
    ///
    /// # async fn example(client: Client) -> Result<(), Error> {
    /// match client.publish("order.created", &7).required().await {
    ///     Err(Error::NoSubscriber { key, .. }) => eprintln!("is the group of `{key}` not set up yet?"),
    ///     outcome => println!("{:?}", outcome?),
    /// }
    /// # Ok(()) }
    /// ```
    pub fn required(self) -> Self {
        self.if_nobody(IfNobody::Fails)
    }

    fn if_nobody(mut self, if_nobody: IfNobody) -> Self {
        if let Some(Ok(event)) = &mut self.event {
            event.if_nobody = if_nobody;
        }
        self
    }
}

impl Future for Publish {
    type Output = Result<Published, Error>;

    fn poll(mut self: Pin<&mut Self>, task: &mut TaskContext<'_>) -> Poll<Self::Output> {
        if let Some(event) = self.event.take() {
            let event = match event {
                Ok(event) => event,
                Err(error) => return Poll::Ready(Err(error)),
            };
            self.running = Some(self.client.clone().deliver_event(event).boxed());
        }
        self.running.as_mut().expect("polled until it is ready, and no more").poll_unpin(task)
    }
}

impl fmt::Debug for Publish {
    /// Without what may be secret: the event and its metadata.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let key = self.event.as_ref().and_then(|event| event.as_ref().ok()).map(|event| &event.key);
        f.debug_struct("Publish").field("key", &key).finish_non_exhaustive()
    }
}
