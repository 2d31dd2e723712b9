//! Calls in flight: which id is waited for, and by whom.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{broadcast, mpsc, oneshot};
use tracing::{debug, warn};
use uuid::Uuid;

use crate::frame::{self, Frame, Kind};
use crate::transport::{Consumer, Event};

/// Who waits for an id.
#[derive(Debug)]
pub(crate) enum Waiter {
    /// A call: the first reply is its only one.
    One(oneshot::Sender<Frame>),
    /// A broadcast: each instance replies.
    Many(mpsc::UnboundedSender<Frame>),
}

/// The calls of one client that wait for a reply.
#[derive(Debug, Default)]
pub(crate) struct Replies(Mutex<InFlight>);

#[derive(Debug, Default)]
struct InFlight {
    waiting: HashMap<Uuid, Waiter>,
    /// Why no reply can come any more.
    lost: Option<Arc<str>>,
}

impl Replies {
    fn in_flight(&self) -> MutexGuard<'_, InFlight> {
        self.0.lock().expect("no panic while holding the map")
    }

    /// From now on replies to `id` go to `waiter`.
    ///
    /// # Errors
    /// Why no reply can come any more.
    pub(crate) fn expect(&self, id: Uuid, waiter: Waiter) -> Result<(), Arc<str>> {
        let mut in_flight = self.in_flight();
        if let Some(reason) = &in_flight.lost {
            return Err(reason.clone());
        }
        in_flight.waiting.insert(id, waiter);
        Ok(())
    }

    /// Nobody waits for `id` any more.
    pub(crate) fn forget(&self, id: Uuid) {
        self.in_flight().waiting.remove(&id);
    }

    /// Hands a reply to whoever waits for it. One that nobody waits for is late, or not for us: not an error.
    pub(crate) fn deliver(&self, reply: Frame) {
        let mut in_flight = self.in_flight();
        match in_flight.waiting.get(&reply.id) {
            Some(Waiter::Many(waiter)) => {
                // A gatherer that has gone forgets its id itself.
                let _ = waiter.send(reply);
            }
            Some(Waiter::One(_)) => {
                if let Some(Waiter::One(waiter)) = in_flight.waiting.remove(&reply.id) {
                    // The caller gave up at this very moment.
                    let _ = waiter.send(reply);
                }
            }
            None => debug!(id = %reply.id, "a reply that nobody waits for"),
        }
    }

    /// Every waiting call is told that no reply will come, and every later one.
    pub(crate) fn lose(&self, reason: Arc<str>) {
        let mut in_flight = self.in_flight();
        in_flight.lost = Some(reason);
        in_flight.waiting.clear();
    }

    /// Why no reply can come any more.
    pub(crate) fn lost(&self) -> Option<Arc<str>> {
        self.in_flight().lost.clone()
    }
}

/// Reads the reply queue until it is gone.
pub(crate) async fn receive(replies: Arc<Replies>, mut queue: Consumer, mut events: broadcast::Receiver<Event>) {
    let reason = loop {
        tokio::select! {
            biased;
            Ok(event) = events.recv() => {
                if let Event::Lost(reason) = event {
                    // What arrived before the end is read before the end is told.
                    let rest = async { while let Some(delivery) = queue.next().await { read(&replies, delivery.body) } };
                    let _ = tokio::time::timeout(Duration::from_secs(1), rest).await;
                    break reason;
                }
            }
            delivery = queue.next() => match delivery {
                Some(delivery) => read(&replies, delivery.body),
                None => break "the connection or its reply queue is gone".into(),
            },
        }
    };
    replies.lose(reason);
}

fn read(replies: &Replies, body: Bytes) {
    for frame in frame::decode(body) {
        match frame {
            Ok(frame) if frame.kind == Kind::Reply => replies.deliver(frame),
            Ok(frame) => debug!(kind = ?frame.kind, "not a reply, on the reply queue"),
            Err(error) => warn!(%error, "a malformed message on the reply queue"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::Codec;
    use crate::frame::Metadata;

    fn reply(id: Uuid) -> Frame {
        Frame::new(Kind::Reply, id, Codec::Cbor, Metadata::default(), Bytes::new())
    }

    #[test]
    fn a_second_reply_to_the_same_call_is_ignored() {
        let replies = Replies::default();
        let id = Uuid::new_v4();
        let (sender, mut receiver) = oneshot::channel();
        replies.expect(id, Waiter::One(sender)).expect("not lost");
        replies.deliver(reply(id));
        replies.deliver(reply(id));
        assert_eq!(receiver.try_recv().expect("the first").id, id);
    }

    #[test]
    fn a_broadcast_takes_every_reply_until_it_is_forgotten() {
        let replies = Replies::default();
        let id = Uuid::new_v4();
        let (sender, mut receiver) = mpsc::unbounded_channel();
        replies.expect(id, Waiter::Many(sender)).expect("not lost");
        replies.deliver(reply(id));
        replies.deliver(reply(id));
        replies.forget(id);
        replies.deliver(reply(id));
        assert_eq!(receiver.len(), 2);
        receiver.close();
    }

    #[test]
    fn a_lost_connection_ends_the_waiting_and_refuses_more() {
        let replies = Replies::default();
        let (sender, mut receiver) = oneshot::channel();
        replies.expect(Uuid::new_v4(), Waiter::One(sender)).expect("not lost");
        replies.lose("gone".into());
        receiver.try_recv().expect_err("nobody will send");
        let (sender, _receiver) = oneshot::channel();
        assert_eq!(replies.expect(Uuid::new_v4(), Waiter::One(sender)), Err("gone".into()));
    }
}
