//! A session: one life of a client's connection, with its own reply queue.
//!
//! When a connection is lost, the client's line opens another session. A reply queue is exclusive, so it dies with its
//! connection, and each session has one with a new name.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::broadcast;
use tokio::time::Instant;

use crate::clock::at;
use crate::error::Error;
use crate::state::Attempts;
use crate::topology::{Declaration, Namespace, Queue, QueueKind, short_id};
use crate::transport::{ConnectionEvent, Consumer, Delivery, Dial, Mode, Role, Transport};

/// A consumer may end a moment before its connection reports the reason. This is how long the reason is awaited.
const LATE: Duration = Duration::from_millis(50);

/// How long reading what arrived before the end of a connection may take.
const REST: Duration = Duration::from_secs(1);

/// Opens the sessions of a client.
#[derive(Debug)]
pub(super) struct Sessions {
    pub(super) dial: Dial,
    pub(super) namespace: Namespace,
    pub(super) instance: Arc<str>,
}

/// A connection with a reply queue.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) transport: Transport,
    pub(super) reply_queue: String,
    events: broadcast::Receiver<ConnectionEvent>,
    /// Delivers replies.
    replies: Consumer,
    /// Until when the reason is awaited, after the consumer of replies has ended.
    over_at: Option<Instant>,
}

/// What happens on a connection.
#[expect(clippy::large_enum_variant, reason = "it is taken apart where it is made, and most are deliveries")]
pub(super) enum Happening {
    /// A message has arrived on the reply queue.
    Delivered(Delivery),
    /// The broker accepts no messages, for this reason.
    Blocked(Arc<str>),
    /// The broker accepts messages again.
    Unblocked,
    /// The connection or its reply queue is lost, for this reason.
    Over(Arc<str>),
}

impl Sessions {
    /// Opens a session at the first address that answers.
    ///
    /// # Errors
    /// `Connect` if no broker answers, `Mismatch` or `Broker` for what the broker refuses.
    pub(super) async fn open(&self) -> Result<Session, Error> {
        self.begin(self.dial.connect(Role::Client).await?).await
    }

    /// Opens a session at the first of the client's addresses, to move back there.
    ///
    /// # Errors
    /// As [`Sessions::open`].
    pub(super) async fn open_first(self: Arc<Self>) -> Result<Session, Error> {
        self.begin(self.dial.connect_to_first(Role::Client).await?).await
    }

    /// Opens a session, however many attempts that takes. If only the reply queue was lost, `transport` is the
    /// connection, which is used again if possible.
    pub(super) async fn open_again(
        self: Arc<Self>,
        mut attempts: Attempts,
        mut transport: Option<Transport>,
    ) -> Session {
        loop {
            let opened = match transport.take() {
                Some(transport) => match self.begin(transport).await {
                    Ok(session) => Ok(session),
                    Err(_) => self.open().await,
                },
                None => self.open().await,
            };
            match opened {
                Ok(session) => {
                    attempts.succeeded(&session.transport);
                    return session;
                }
                Err(error) => attempts.after(&error).await,
            }
        }
    }

    /// Declares the exchanges and a reply queue, and consumes the queue.
    async fn begin(&self, transport: Transport) -> Result<Session, Error> {
        let reply_queue = self.namespace.reply_queue(&self.instance, &short_id());
        let mut topology = self.namespace.exchanges();
        topology.push(Declaration::Queue(Queue::new(&reply_queue, QueueKind::Exclusive)));
        let begun = async {
            let events = transport.events();
            transport.declare(&topology).await?;
            let replies = transport.consume(&reply_queue, Mode::NoAck).await?;
            Ok((events, replies))
        };
        match begun.await {
            Ok((events, replies)) => Ok(Session { transport, reply_queue, events, replies, over_at: None }),
            Err(error) => {
                transport.close().await;
                Err(error)
            }
        }
    }
}

impl Session {
    /// Waits for the next thing that happens. It is cancel safe: if the future is dropped, nothing is lost.
    pub(super) async fn next(&mut self) -> Happening {
        loop {
            tokio::select! {
                event = self.events.recv() => match event {
                    Ok(ConnectionEvent::Blocked(reason)) => return Happening::Blocked(reason),
                    Ok(ConnectionEvent::Unblocked) => return Happening::Unblocked,
                    Ok(ConnectionEvent::Lost(reason)) => return Happening::Over(reason),
                    Err(broadcast::error::RecvError::Lagged(_)) => {}
                    Err(broadcast::error::RecvError::Closed) => return Happening::Over("the connection was closed".into()),
                },
                delivery = self.replies.next(), if self.over_at.is_none() => match delivery {
                    Some(delivery) => return Happening::Delivered(delivery),
                    // If the connection has ended, it will tell why in a moment.
                    None => self.over_at = Some(Instant::now() + LATE),
                },
                () = at(self.over_at) => return Happening::Over("its reply queue is gone".into()),
            }
        }
    }

    /// The next message on the reply queue, if it has arrived already.
    pub(super) fn try_next(&mut self) -> Option<Delivery> {
        self.replies.try_next()
    }

    /// Ends the session. Returns the connection, and what has arrived on the reply queue and was not read.
    pub(super) fn end(self) -> (Transport, Rest) {
        (self.transport, Rest { replies: self.replies, until: Instant::now() + REST })
    }
}

/// The messages that arrived before the end of a session.
#[derive(Debug)]
pub(super) struct Rest {
    replies: Consumer,
    until: Instant,
}

impl Rest {
    /// The next message, or `None` after the last. It is cancel safe.
    pub(super) async fn next(&mut self) -> Option<Delivery> {
        tokio::time::timeout_at(self.until, self.replies.next()).await.ok().flatten()
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use tokio::sync::{mpsc, oneshot};
    use uuid::Uuid;

    use super::*;
    use crate::client::in_flight::{CallEnd, Waiter};
    use crate::client::line::{Line, LineSettings, Token};
    use crate::client::target::Target;
    use crate::codec::Codec;
    use crate::exchanges::Address;
    use crate::frame::{Frame, Kind, Metadata};
    use crate::outgoing::{Parcel, Share};
    use crate::state::State;
    use crate::topology::ServiceId;
    use crate::transport::{Confirm, Properties};

    /// Puts something on its way to the queue `there`, and tells its id.
    fn post(line: &Line, token: Token) -> Uuid {
        let kind = if token.reply.is_some() { Kind::Request } else { Kind::Oneway };
        let address = Address::queue("there", kind);
        let (id, frame) = (Uuid::new_v4(), Bytes::new());
        line.post(address, Parcel { id, frame, share: Share::ALL, kind: None, expiration: None, token });
        id
    }

    fn delivery(body: Bytes) -> Delivery {
        let (exchange, key, properties) = (String::new(), String::new(), Properties::default());
        let received = Instant::now();
        Delivery {
            body,
            properties,
            exchange,
            key,
            redelivered: false,
            failures: 0,
            death: None,
            offset: None,
            received,
            settler: None,
        }
    }

    async fn session(name: &str) -> Session {
        let dial = Dial::parse(&format!("memory://{name}")).expect("a good address");
        let sessions = Sessions { dial, namespace: Namespace::default(), instance: "caller".into() };
        sessions.open().await.expect("it is in this process")
    }

    #[tokio::test(start_paused = true)]
    async fn the_loss_of_a_reply_queue_is_noticed_by_a_client_that_is_never_idle() {
        let mut session = session("busy").await;
        let (deliver, deliveries) = mpsc::unbounded_channel();
        session.replies = Consumer { deliveries, cancel: None, life: Arc::default() };
        drop(deliver);
        let since = Instant::now();
        let reason = loop {
            tokio::select! {
                biased;
                happening = session.next() => match happening {
                    Happening::Over(reason) => break reason,
                    _ => panic!("nothing else happens"),
                },
                // This message arrives at the moment of the end.
                () = tokio::time::sleep(LATE / 4) => assert!(since.elapsed() < 10 * LATE, "it is never noticed"),
            }
        };
        assert_eq!(&*reason, "its reply queue is gone");
    }

    #[tokio::test(start_paused = true)]
    async fn while_the_rest_of_a_lost_connection_is_read_calls_go_on_over_the_next() {
        let dial = Dial::parse("memory://cut").expect("a good address");
        let sessions = Sessions { dial, namespace: Namespace::default(), instance: "caller".into() };
        let mut session = sessions.open().await.expect("it is in this process");
        let there = Declaration::Queue(Queue::new("there", QueueKind::Exclusive));
        session.transport.declare(&[there]).await.expect("a new queue");
        let (deliver, deliveries) = mpsc::unbounded_channel();
        let (news, events) = broadcast::channel(1);
        (session.replies, session.events) = (Consumer { deliveries, cancel: None, life: Arc::default() }, events);
        let rules = LineSettings { max_message_size: 1024, blocked_wait: Duration::ZERO, max_in_flight: None };
        let line = Line::start(sessions, Some(session), rules);
        let mut state = line.state();
        let target = Arc::new(Target::new(ServiceId::new("demo", 1).expect("a good name"), "add"));
        let token = || Token::until(Instant::now() + 10 * REST);
        let (reply, answered) = oneshot::channel();
        let (said, confirmed) = oneshot::channel();
        let id = post(&line, Token { reply: Some((Waiter::One(reply), target)), ..token() });
        post(&line, Token { said: Some(said), ..token() });
        assert!(matches!(confirmed.await, Ok(CallEnd::Said(Confirm::Accepted))), "both have left");

        let since = Instant::now();
        state.borrow_and_update();
        news.send(ConnectionEvent::Lost("it was cut".into())).expect("it listens");
        state.changed().await.expect("it is told");
        state.wait_for(|state| *state == State::Ready).await.expect("it is told");
        let (said, confirmed) = oneshot::channel();
        post(&line, Token { said: Some(said), ..token() });
        assert!(matches!(confirmed.await, Ok(CallEnd::Said(Confirm::Accepted))));
        assert_eq!(since.elapsed(), Duration::ZERO, "the line was held");
        // These had arrived before the end, and are read only now.
        let reply = Frame::new(Kind::Reply, id, Codec::Raw, Metadata::default(), Bytes::new());
        deliver.send(delivery(reply.to_body())).expect("it is read");
        assert_eq!(answered.await.expect("it is told").expect("a reply").id, id);
    }

    #[tokio::test(start_paused = true)]
    async fn the_end_of_a_connection_is_told_as_the_reason_when_its_consumer_ends_first() {
        let mut session = session("ending").await;
        let (deliver, deliveries) = mpsc::unbounded_channel();
        let (news, events) = broadcast::channel(1);
        (session.replies, session.events) = (Consumer { deliveries, cancel: None, life: Arc::default() }, events);
        drop(deliver);
        let late = async {
            tokio::time::sleep(LATE / 2).await;
            news.send(ConnectionEvent::Lost("it was cut".into())).expect("somebody listens");
        };
        let (happening, ()) = tokio::join!(session.next(), late);
        assert!(matches!(happening, Happening::Over(reason) if &*reason == "it was cut"));
    }
}
