//! Calls in flight: which id is waited for, and by whom.

use std::collections::HashMap;
use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};
use tracing::debug;
use uuid::Uuid;

use super::target::Target;
use crate::frame::Frame;
use crate::transport::{Confirm, Lost};

/// What the broker said of a message, or why it will say nothing.
pub(crate) type Said = Result<Confirm, Lost>;

/// Who waits for an id.
#[derive(Debug)]
pub(crate) enum Waiter {
    /// A call: the first reply is its only one. In its place, what the broker said, if no reply can come.
    One(oneshot::Sender<Result<Frame, Said>>),
    /// A broadcast: each instance replies.
    Many(mpsc::UnboundedSender<Frame>),
}

/// A call that has left.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) waiter: Waiter,
    pub(crate) target: Arc<Target>,
    /// The number of the message that took it.
    pub(crate) message: u64,
}

/// The calls of one client that wait for a reply.
#[derive(Debug, Default)]
pub(crate) struct Replies(HashMap<Uuid, Call>);

impl Replies {
    /// From now on replies to `id` go to its waiter.
    pub(crate) fn expect(&mut self, id: Uuid, call: Call) {
        self.0.insert(id, call);
    }

    /// Nobody waits for `id` any more, or nothing can come.
    pub(crate) fn forget(&mut self, id: Uuid) -> Option<Call> {
        self.0.remove(&id)
    }

    /// Nothing can come for `id` any more, if it is a call to one.
    pub(crate) fn forget_one(&mut self, id: Uuid) -> Option<Call> {
        let is_one = self.0.get(&id).is_some_and(|call| matches!(call.waiter, Waiter::One(_)));
        if is_one { self.0.remove(&id) } else { None }
    }

    /// Hands a reply to whoever waits for it. One that nobody waits for is late, or not for us: not an error.
    pub(crate) fn deliver(&mut self, reply: Frame) {
        let Some(call) = self.0.get(&reply.id) else {
            return debug!(id = %reply.id, "a reply that nobody waits for");
        };
        if let Some(time) = reply.metadata.handler_time {
            call.target.pace.report(time);
        }
        if let Waiter::Many(waiter) = &call.waiter {
            // A gatherer that has gone forgets its id itself.
            let _ = waiter.send(reply);
        } else if let Some(Call { waiter: Waiter::One(waiter), .. }) = self.0.remove(&reply.id) {
            // The caller gave up at this very moment.
            let _ = waiter.send(Ok(reply));
        }
    }

    /// Forgets the calls whose message is no longer under way, and gives them back.
    pub(crate) fn forget_all(&mut self, under_way: impl Fn(u64) -> bool) -> Vec<Call> {
        self.0.extract_if(|_, call| !under_way(call.message)).map(|(_, call)| call).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use bytes::Bytes;

    use super::*;
    use crate::codec::Codec;
    use crate::frame::{Kind, Metadata};
    use crate::topology::ServiceId;

    fn reply(id: Uuid) -> Frame {
        let metadata = Metadata { handler_time: Some(Duration::from_micros(7)), ..Metadata::default() };
        Frame::new(Kind::Reply, id, Codec::Cbor, metadata, Bytes::new())
    }

    fn call(waiter: Waiter, message: u64) -> Call {
        let target = Arc::new(Target::new(ServiceId::new("demo", 1).expect("a good name"), "add"));
        Call { waiter, target, message }
    }

    #[test]
    fn a_second_reply_to_the_same_call_is_ignored() {
        let mut replies = Replies::default();
        let id = Uuid::new_v4();
        let (sender, mut receiver) = oneshot::channel();
        replies.expect(id, call(Waiter::One(sender), 1));
        replies.deliver(reply(id));
        replies.deliver(reply(id));
        assert_eq!(receiver.try_recv().expect("one").expect("a reply").id, id);
    }

    #[test]
    fn a_reply_tells_how_long_its_method_takes() {
        let mut replies = Replies::default();
        let id = Uuid::new_v4();
        let (sender, _receiver) = oneshot::channel();
        let waiting = call(Waiter::One(sender), 1);
        let target = waiting.target.clone();
        replies.expect(id, waiting);
        replies.deliver(reply(id));
        assert_eq!(target.pace.average(), Some(Duration::from_micros(7)));
    }

    #[test]
    fn a_broadcast_takes_every_reply_until_it_is_forgotten() {
        let mut replies = Replies::default();
        let id = Uuid::new_v4();
        let (sender, mut receiver) = mpsc::unbounded_channel();
        replies.expect(id, call(Waiter::Many(sender), 1));
        replies.deliver(reply(id));
        replies.deliver(reply(id));
        replies.forget(id);
        replies.deliver(reply(id));
        assert_eq!(receiver.len(), 2);
        receiver.close();
    }

    #[test]
    fn calls_of_messages_that_are_still_under_way_are_kept() {
        let mut replies = Replies::default();
        let (sender, mut receiver) = oneshot::channel();
        replies.expect(Uuid::new_v4(), call(Waiter::One(sender), 1));
        assert!(replies.forget_all(|message| message == 1).is_empty());
        assert_eq!(replies.forget_all(|message| message == 2).len(), 1);
        receiver.try_recv().expect_err("nobody will send");
    }
}
