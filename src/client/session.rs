//! One life of a client's connection, and the reply queue that is new in each.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::broadcast;

use super::short_id;
use crate::error::Error;
use crate::state::Attempts;
use crate::topology::{Declaration, Namespace, Queue, QueueKind};
use crate::transport::{Consumer, Delivery, Dial, Event, Mode, Role, Transport};

/// How much later than its consumer the end of a connection is heard of.
const LATE: Duration = Duration::from_millis(50);

/// What every session of a client has in common.
#[derive(Debug)]
pub(super) struct Sessions {
    pub(super) dial: Dial,
    pub(super) namespace: Namespace,
    pub(super) instance: Arc<str>,
}

/// A connection, and what comes over it.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) transport: Transport,
    pub(super) reply_queue: String,
    events: broadcast::Receiver<Event>,
    replies: Consumer,
}

/// What comes over a connection.
#[expect(clippy::large_enum_variant, reason = "it is taken apart where it is made, and most are deliveries")]
pub(super) enum Happening {
    Delivered(Delivery),
    Blocked(Arc<str>),
    Unblocked,
    /// Nothing more comes, and why.
    Over(Arc<str>),
}

impl Sessions {
    /// # Errors
    /// `Connect` when no broker answers, `Mismatch` or `Broker` for what it refuses.
    pub(super) async fn open(&self) -> Result<Session, Error> {
        self.begin(self.dial.connect(Role::Client).await?).await
    }

    /// Opens a session, for as long as it takes: on `transport`, if that is still good, of which only the reply queue was
    /// lost.
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
                    attempts.succeeded();
                    return session;
                }
                Err(error) => attempts.after(&error).await,
            }
        }
    }

    /// Declares what a client needs, which is the reply queue most of all.
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
            Ok((events, replies)) => Ok(Session { transport, reply_queue, events, replies }),
            Err(error) => {
                transport.close().await;
                Err(error)
            }
        }
    }
}

impl Session {
    /// The next of what happens. Cancelled, it has taken nothing.
    pub(super) async fn next(&mut self) -> Happening {
        loop {
            tokio::select! {
                event = self.events.recv() => match event {
                    Ok(Event::Blocked(reason)) => return Happening::Blocked(reason),
                    Ok(Event::Unblocked) => return Happening::Unblocked,
                    Ok(Event::Lost(reason)) => return Happening::Over(reason),
                    Err(broadcast::error::RecvError::Lagged(_)) => {}
                    Err(broadcast::error::RecvError::Closed) => return Happening::Over("the connection was closed".into()),
                },
                delivery = self.replies.next() => return match delivery {
                    Some(delivery) => Happening::Delivered(delivery),
                    None => Happening::Over(self.why().await),
                },
            }
        }
    }

    /// Why no replies come any more. The end of a connection may be heard of after that of the consumer.
    async fn why(&mut self) -> Arc<str> {
        let lost = async {
            loop {
                match self.events.recv().await {
                    Ok(Event::Lost(reason)) => return reason,
                    Err(broadcast::error::RecvError::Closed) => return "the connection was closed".into(),
                    Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => {}
                }
            }
        };
        tokio::time::timeout(LATE, lost).await.unwrap_or_else(|_| "its reply queue is gone".into())
    }

    /// A delivery that is there already.
    pub(super) fn try_next(&mut self) -> Option<Delivery> {
        self.replies.try_next()
    }

    /// What is delivered before the end.
    pub(super) async fn rest(&mut self) -> Option<Delivery> {
        self.replies.next().await
    }
}
