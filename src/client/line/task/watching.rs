//! Watching the instances: what they announce comes to the reply queue, and is handed to whoever watches. Where the
//! broker tells which queues are deleted, that comes there, too: an instance that is killed announces nothing, but its
//! queue goes with its connection.

use std::sync::Arc;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use tokio::sync::mpsc;
use tracing::debug;

use super::LineTask;
use crate::client::line::InstanceNews;
use crate::document::{ANNOUNCED, Announcement};
use crate::error::Error;
use crate::frame::Frame;
use crate::topology::{Declaration, deletion};
use crate::transport::Delivery;

/// Who watches the instances.
pub(super) struct Watcher {
    news: mpsc::Sender<InstanceNews>,
    /// Whether it knows whether it hears the instances of this session.
    is_told: bool,
}

/// The bindings of the reply queue of this session.
#[derive(Default)]
pub(super) struct Listening {
    /// Those that are being declared.
    declaring: Option<BoxFuture<'static, Listened>>,
    /// Whether the broker does not tell which queues are deleted. Each refusal is a line in its log, so a session asks
    /// once.
    is_refused: bool,
}

/// What has come of declaring the bindings.
pub(super) struct Listened {
    /// The reply queue that they are of.
    queue: String,
    /// Whether announcements come.
    announcements: Result<(), Error>,
    /// Whether the broker does not tell which queues are deleted.
    is_refused: bool,
}

impl LineTask {
    /// Somebody begins to watch.
    pub(super) fn watch(&mut self, news: mpsc::Sender<InstanceNews>) {
        // A client that is closed tells it by dropping this.
        if self.shared.over.get().is_none() {
            self.watchers.push(Watcher { news, is_told: false });
            self.listen();
        }
    }

    /// There is a new session, whose reply queue does not get yet what instances announce.
    pub(super) fn listen_anew(&mut self) {
        self.listening = Listening::default();
        self.watchers.iter_mut().for_each(|watcher| watcher.is_told = false);
        self.listen();
    }

    /// Has the reply queue of the session get what instances announce, and which queues are deleted, if anybody wants to
    /// hear it.
    fn listen(&mut self) {
        self.watchers.retain(|watcher| !watcher.news.is_closed());
        let Some(session) = self.session.as_ref().filter(|_| !self.watchers.is_empty()) else { return };
        if self.listening.declaring.is_none() {
            let (transport, queue) = (session.transport.clone(), session.reply_queue.clone());
            let binding = self.sessions.namespace.announcements(&queue);
            let mut is_refused = self.listening.is_refused;
            let declaring = async move {
                let announcements = transport.declare(&[binding]).await;
                if !is_refused {
                    // The broker closes the channel if it refuses, and this has one of its own.
                    let told = transport.declare(&[Declaration::Binding(deletion::told_to(&queue))]).await;
                    let refused = |error| debug!(%error, "the broker does not tell which queues are deleted");
                    is_refused = told.map_err(refused).is_err();
                }
                Listened { queue, announcements, is_refused }
            };
            self.listening.declaring = Some(declaring.boxed());
        }
    }

    /// The bindings were declared, or the broker has refused them.
    pub(super) fn listens(&mut self, listened: Listened) {
        let Listened { queue, announcements, is_refused } = listened;
        self.listening.declaring = None;
        if self.session.as_ref().is_none_or(|session| session.reply_queue != queue) {
            return;
        }
        self.listening.is_refused = is_refused;
        let news = match announcements {
            Ok(()) => InstanceNews::Listening,
            Err(error) => InstanceNews::Deaf(error.to_string().into()),
        };
        self.watchers.retain_mut(|watcher| {
            std::mem::replace(&mut watcher.is_told, true) || watcher.news.try_send(news.clone()).is_ok()
        });
    }

    /// Hands on what an instance has announced. Returns whether it was an announcement.
    pub(super) fn hear(&mut self, frame: &Frame) -> bool {
        let is_announcement = frame.metadata.method.as_deref() == Some(ANNOUNCED);
        if is_announcement
            && !self.watchers.is_empty()
            && let Ok(said) = frame.codec.decode::<Announcement>(&frame.payload)
        {
            self.tell(&InstanceNews::Said(Arc::new(said)));
        }
        is_announcement
    }

    /// Hands on that the broker has deleted the queue of an instance. Returns whether the message tells of a queue.
    pub(super) fn hear_deletion(&mut self, delivery: &Delivery) -> bool {
        let is_deletion = delivery.exchange == deletion::EXCHANGE;
        if is_deletion
            && !self.watchers.is_empty()
            && let Some(queue) = deletion::queue(&delivery.properties.headers)
            && let Some((service, instance)) = self.sessions.namespace.owner(queue)
        {
            self.tell(&InstanceNews::Deleted { service: service.to_string(), instance: instance.to_owned() });
        }
        is_deletion
    }

    fn tell(&mut self, news: &InstanceNews) {
        // Who does not keep up has to ask all instances, and begins anew.
        self.watchers.retain(|watcher| watcher.news.try_send(news.clone()).is_ok());
        self.deafen();
    }

    /// Nobody watches any more, so the reply queue need not get it.
    fn deafen(&mut self) {
        if let Some(session) = self.session.as_ref().filter(|_| self.watchers.is_empty()) {
            let (transport, queue) = (session.transport.clone(), session.reply_queue.clone());
            let mut bindings = vec![self.sessions.namespace.announced_to(&queue)];
            bindings.extend((!self.listening.is_refused).then(|| deletion::told_to(&queue)));
            // What is not unbound is unbound with the queue.
            tokio::spawn(async move { drop(transport.unbind(&bindings).await) });
        }
    }
}

/// What comes of the declarations that are going on. Never resolves if none are.
pub(super) async fn listened(listening: &mut Listening) -> Listened {
    match &mut listening.declaring {
        Some(declared) => declared.await,
        None => std::future::pending().await,
    }
}
