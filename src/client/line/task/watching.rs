//! Watching the instances: what they announce comes to the reply queue, and is handed to whoever watches.

use futures::FutureExt as _;
use futures::future::BoxFuture;
use tokio::sync::mpsc;

use super::LineTask;
use crate::client::line::InstanceNews;
use crate::document::{ANNOUNCED, Announcement};
use crate::error::Error;
use crate::frame::Frame;

/// The binding of the reply queue that is being declared, for the session with this reply queue.
pub(super) type Listening = Option<BoxFuture<'static, (String, Result<(), Error>)>>;

impl LineTask {
    /// Somebody begins to watch.
    pub(super) fn watch(&mut self, watcher: mpsc::UnboundedSender<InstanceNews>) {
        // A client that is closed tells it by dropping this.
        if self.shared.over.get().is_none() {
            self.watchers.push(watcher);
            self.listen();
        }
    }

    /// Has the reply queue of the session get what instances announce, if anybody wants to hear it.
    pub(super) fn listen(&mut self) {
        self.watchers.retain(|watcher| !watcher.is_closed());
        let Some(session) = self.session.as_ref().filter(|_| !self.watchers.is_empty()) else { return };
        let (transport, queue) = (session.transport.clone(), session.reply_queue.clone());
        let binding = self.sessions.namespace.announcements(&queue);
        self.listening = Some(async move { (queue, transport.declare(&[binding]).await) }.boxed());
    }

    /// The binding was declared, or the broker has refused it.
    pub(super) fn listens(&mut self, queue: &str, declared: Result<(), Error>) {
        self.listening = None;
        if self.session.as_ref().is_some_and(|session| session.reply_queue == queue) {
            self.tell_watchers(&match declared {
                Ok(()) => InstanceNews::Listening,
                Err(error) => InstanceNews::Deaf(error.to_string().into()),
            });
        }
    }

    /// Hands on what an instance has announced. Returns whether it was an announcement.
    pub(super) fn hear(&mut self, frame: &Frame) -> bool {
        let is_announcement = frame.metadata.method.as_deref() == Some(ANNOUNCED);
        if let Some(said) = frame.codec.decode::<Announcement>(&frame.payload).ok().filter(|_| is_announcement) {
            self.tell_watchers(&InstanceNews::Said(said));
        }
        is_announcement
    }

    fn tell_watchers(&mut self, heard: &InstanceNews) {
        self.watchers.retain(|watcher| watcher.send(heard.clone()).is_ok());
    }
}

/// What comes of the declaration that is going on. Never resolves if none is.
pub(super) async fn listening(listening: &mut Listening) -> (String, Result<(), Error>) {
    match listening {
        Some(declared) => declared.await,
        None => std::future::pending().await,
    }
}
