//! Watching the instances: what they announce comes to the reply queue, and is handed to whoever watches.

use std::sync::Arc;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use tokio::sync::mpsc;

use super::LineTask;
use crate::client::line::InstanceNews;
use crate::document::{ANNOUNCED, Announcement};
use crate::error::Error;
use crate::frame::Frame;

/// Who watches the instances.
pub(super) struct Watcher {
    news: mpsc::Sender<InstanceNews>,
    /// Whether it knows whether it hears the instances of this session.
    is_told: bool,
}

/// The binding of the reply queue that is being declared, for the session with this reply queue.
pub(super) type Listening = Option<BoxFuture<'static, (String, Result<(), Error>)>>;

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
        self.listening = None;
        self.watchers.iter_mut().for_each(|watcher| watcher.is_told = false);
        self.listen();
    }

    /// Has the reply queue of the session get what instances announce, if anybody wants to hear it.
    fn listen(&mut self) {
        self.watchers.retain(|watcher| !watcher.news.is_closed());
        let Some(session) = self.session.as_ref().filter(|_| !self.watchers.is_empty()) else { return };
        if self.listening.is_none() {
            let (transport, queue) = (session.transport.clone(), session.reply_queue.clone());
            let binding = self.sessions.namespace.announcements(&queue);
            self.listening = Some(async move { (queue, transport.declare(&[binding]).await) }.boxed());
        }
    }

    /// The binding was declared, or the broker has refused it.
    pub(super) fn listens(&mut self, queue: &str, declared: Result<(), Error>) {
        self.listening = None;
        if self.session.as_ref().is_none_or(|session| session.reply_queue != queue) {
            return;
        }
        let news = match declared {
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
            let said = Arc::new(said);
            // Who does not keep up has to ask all instances, and begins anew.
            self.watchers.retain(|watcher| watcher.news.try_send(InstanceNews::Said(said.clone())).is_ok());
            self.deafen();
        }
        is_announcement
    }

    /// Nobody watches any more, so the reply queue need not get it.
    fn deafen(&mut self) {
        if let Some(session) = self.session.as_ref().filter(|_| self.watchers.is_empty()) {
            let (transport, queue) = (session.transport.clone(), session.reply_queue.clone());
            let binding = self.sessions.namespace.announced_to(&queue);
            // What is not unbound is unbound with the queue.
            tokio::spawn(async move { drop(transport.unbind(&[binding]).await) });
        }
    }
}

/// What comes of the declaration that is going on. Never resolves if none is.
pub(super) async fn listening(listening: &mut Listening) -> (String, Result<(), Error>) {
    match listening {
        Some(declared) => declared.await,
        None => std::future::pending().await,
    }
}
