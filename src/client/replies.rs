//! Calls in flight: which id is waited for, and by whom.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::debug;
use uuid::Uuid;

use super::presence::Moment;
use super::target::Target;
use crate::error::Unanswered;
use crate::frame::Frame;
use crate::transport::{Confirm, Lost};

/// How late a look at who is silent may be: one that is later comes of a process that was suspended, or of a runtime that was
/// blocked, and has yet to read what was said meanwhile.
const LATE: Duration = Duration::from_secs(3);

/// What a call comes to in the place of a reply; a oneway call, to what the broker said of it.
#[derive(Debug, Clone)]
pub(crate) enum End {
    /// The broker has seen to the message.
    Said(Confirm),
    /// The connection ended before it did, or before the reply.
    Lost(Lost),
    /// The broker takes nothing, for this reason, and did not for so long.
    Blocked { reason: Arc<str>, after: Duration, may_have_run: bool },
    /// As many calls are in flight as may be.
    Full(usize),
    /// Its time is over.
    TimedOut(Unanswered),
    /// Its queue has not taken it, and cannot be reached.
    Unreachable(Arc<str>),
    /// Its exchange is gone, and what that means.
    NoExchange { exchange: Arc<str>, why: String },
    /// The instance that runs the call has not reported in for so long.
    Silent { instance: Arc<str>, after: Duration },
}

/// Who waits for an id.
#[derive(Debug)]
pub(crate) enum Waiter {
    /// A call: the first reply is its only one.
    One(oneshot::Sender<Result<Frame, End>>),
    /// A broadcast: each instance replies.
    Many(mpsc::UnboundedSender<Frame>),
}

/// A place among the calls in flight, where they are limited.
#[derive(Debug)]
pub(crate) struct Place {
    /// Given back when this is dropped.
    _permit: OwnedSemaphorePermit,
    /// When nothing can come for its call any more.
    until: Instant,
}

impl Place {
    pub(crate) fn new(permit: OwnedSemaphorePermit, until: Instant) -> Self {
        Self { _permit: permit, until }
    }
}

/// A call that has left.
#[derive(Debug)]
pub(crate) struct Call<A> {
    pub(crate) waiter: Waiter,
    pub(crate) target: Arc<Target>,
    /// The number of the message that took it.
    pub(crate) message: u64,
    /// Whether any instance may run it, and not one alone.
    pub(crate) for_any: bool,
    /// Whether an earlier message took it that may have arrived.
    pub(crate) left_before: bool,
    /// Cancelled when the server drains that serves the call itself, and one of whose handlers made it.
    pub(crate) leaving: Option<CancellationToken>,
    pub(crate) place: Option<Place>,
    /// What is sent again if the connection or the instance is lost; none for a call that may not run twice.
    pub(crate) again: Option<Box<A>>,
}

impl<A> Call<A> {
    /// Whether one reply is waited for, from whichever instance.
    fn awaits_any(&self) -> bool {
        self.for_any && matches!(self.waiter, Waiter::One(_))
    }

    /// Whether a drain waits for its end.
    fn is_leaving(&self) -> bool {
        self.leaving.as_ref().is_some_and(CancellationToken::is_cancelled)
    }
}

/// The method of a call that no instance can be seen to have, and the number of the message that took it.
pub(crate) type Nobodys = (Arc<Target>, u64);

/// The calls of one client that wait for a reply. What is sent again of them is its owner's business.
#[derive(Debug)]
pub(crate) struct Replies<A> {
    calls: HashMap<Uuid, Call<A>>,
    /// Who runs the calls that take long, and when it last said so.
    reports: HashMap<Uuid, (Arc<str>, Instant)>,
    /// When it was last looked who is silent, or began to be.
    looked_at: Instant,
}

impl<A> Default for Replies<A> {
    fn default() -> Self {
        Self { calls: HashMap::new(), reports: HashMap::new(), looked_at: Instant::now() }
    }
}

impl<A> Replies<A> {
    /// From now on replies to `id` go to its waiter.
    pub(crate) fn expect(&mut self, id: Uuid, call: Call<A>) {
        self.calls.insert(id, call);
    }

    pub(crate) fn len(&self) -> usize {
        self.calls.len()
    }

    /// Nobody waits for `id` any more, or nothing can come.
    pub(crate) fn forget(&mut self, id: Uuid) -> Option<Call<A>> {
        if !self.reports.is_empty() {
            self.reports.remove(&id);
        }
        self.calls.remove(&id)
    }

    /// Nothing can come for `id` any more, if it is a call to one.
    pub(crate) fn forget_one(&mut self, id: Uuid) -> Option<Call<A>> {
        let is_one = self.calls.get(&id).is_some_and(|call| matches!(call.waiter, Waiter::One(_)));
        if is_one { self.forget(id) } else { None }
    }

    /// Hands a reply to whoever waits for it; tells whether anybody did. One that nobody waits for is late, or not for us:
    /// not an error.
    pub(crate) fn deliver(&mut self, reply: Frame, moment: Moment) -> bool {
        let Some(call) = self.calls.get(&reply.id) else {
            debug!(id = %reply.id, instance = reply.metadata.instance.as_deref(), "a reply that nobody waits for");
            return false;
        };
        call.target.presence().heard(call.message, moment);
        call.target.said_to_read(reply.metadata.accepts);
        if let Some(time) = reply.metadata.handler_time {
            call.target.pace.report(time);
        }
        if let Waiter::Many(waiter) = &call.waiter {
            // A gatherer that has gone forgets its id itself.
            let _ = waiter.send(reply);
        } else if let Some(Call { waiter: Waiter::One(waiter), .. }) = self.forget(reply.id) {
            // The caller gave up at this very moment.
            let _ = waiter.send(Ok(reply));
        }
        true
    }

    /// An instance says that it runs the call `id`; tells whether anybody waits for that.
    pub(crate) fn report(&mut self, id: Uuid, instance: Arc<str>, moment: Moment) -> bool {
        let Some(call) = self.calls.get(&id) else { return false };
        call.target.presence().heard(call.message, moment);
        // A broadcast runs on many.
        if matches!(call.waiter, Waiter::One(_)) {
            if self.reports.is_empty() {
                self.looked_at = moment.now;
            }
            self.reports.insert(id, (instance, moment.now));
        }
        true
    }

    /// Who runs the call `id`, if it has said so.
    pub(crate) fn runs_on(&self, id: Uuid) -> Option<&Arc<str>> {
        self.reports.get(&id).map(|(instance, _)| instance)
    }

    pub(crate) fn has_reports(&self) -> bool {
        !self.reports.is_empty()
    }

    /// Whether an instance has said nothing for as long as `time`.
    pub(crate) fn is_silent(&self, time: Duration) -> bool {
        self.reports.values().any(|(_, last)| last.elapsed() >= time)
    }

    /// Whoever has reported in has until now to do it again.
    pub(crate) fn excuse(&mut self) {
        self.reports.values_mut().for_each(|(_, last)| *last = Instant::now());
    }

    /// The calls whose instance has said nothing for as long as `patience`, no longer waited for. It is asked about every second.
    pub(crate) fn forget_silent(&mut self, patience: Duration) -> Vec<(Uuid, Arc<str>, Call<A>)> {
        if self.looked_at.elapsed() > LATE {
            self.excuse();
        }
        self.looked_at = Instant::now();
        let calls = &mut self.calls;
        let silent = self.reports.extract_if(|_, (_, last)| last.elapsed() >= patience);
        silent.filter_map(|(id, (instance, _))| Some((id, instance, calls.remove(&id)?))).collect()
    }

    /// Whether a reply is waited for to what one of these messages took.
    pub(crate) fn awaits(&self, is_one: impl Fn(u64) -> bool) -> bool {
        self.calls.values().any(|call| is_one(call.message))
    }

    /// Forgets the calls whose message is no longer under way, and gives them back.
    pub(crate) fn forget_all(&mut self, under_way: impl Fn(u64) -> bool) -> Vec<(Uuid, Call<A>)> {
        let forgotten: Vec<_> = self.calls.extract_if(|_, call| !under_way(call.message)).collect();
        self.reports.retain(|id, _| self.calls.contains_key(id));
        forgotten
    }

    /// Gives back the places of calls whose time is over, though nobody has collected what they came to.
    pub(crate) fn vacate(&mut self, now: Instant) {
        for call in self.calls.values_mut() {
            call.place.take_if(|place| place.until <= now);
        }
    }

    /// The methods of calls that left with a message up to this number, that any instance may run, and that none has
    /// reported to run: those of which it is `wanted`, which is told whether a drain waits for the call.
    pub(crate) fn unanswered(&self, message: u64, wanted: impl Fn(&Target, bool) -> bool) -> Vec<Arc<Target>> {
        let left = self.calls.iter().filter(|(_, call)| call.message <= message && call.awaits_any());
        let unanswered =
            left.filter(|(id, call)| !self.reports.contains_key(id) && wanted(&call.target, call.is_leaving()));
        unanswered.map(|(_, call)| call.target.clone()).collect()
    }

    /// Takes out who waits for a call, and leaves the call to be forgotten. Where any instance may run it, and none has
    /// reported to, nor can have run it earlier, its method and the number of its message come along.
    pub(crate) fn release_one(&mut self, id: Uuid) -> Option<(Waiter, Option<Nobodys>)> {
        let call = self.calls.get_mut(&id).filter(|call| matches!(call.waiter, Waiter::One(_)))?;
        let unanswered = call.awaits_any() && !call.left_before && !self.reports.contains_key(&id);
        let waiter = std::mem::replace(&mut call.waiter, Waiter::One(oneshot::channel().0));
        Some((waiter, unanswered.then(|| (call.target.clone(), call.message))))
    }

    /// Takes out who waits for calls to a service that nobody serves, and that the draining server served from which they come:
    /// it would wait for their ends. Those are meant that left with a message up to this number. It leaves the calls to be
    /// forgotten.
    pub(crate) fn release_hopeless(&mut self, service: &str, message: u64) -> Vec<oneshot::Sender<Result<Frame, End>>> {
        let reports = &self.reports;
        let hopeless = self.calls.iter_mut().filter(|(id, call)| {
            call.is_leaving()
                && call.message <= message
                && &*call.target.service_text == service
                && call.awaits_any()
                && !reports.contains_key(id)
        });
        let waiters = hopeless.map(|(_, call)| std::mem::replace(&mut call.waiter, Waiter::One(oneshot::channel().0)));
        let one = |waiter| match waiter {
            Waiter::One(waiter) => Some(waiter),
            Waiter::Many(_) => None,
        };
        waiters.filter_map(one).collect()
    }

    /// Takes out who waits for the calls of messages that are under way, and leaves the calls to be forgotten.
    pub(crate) fn release(&mut self, under_way: impl Fn(u64) -> bool) -> Vec<Waiter> {
        let stuck = self.calls.values_mut().filter(|call| under_way(call.message));
        let ones = stuck.filter(|call| matches!(call.waiter, Waiter::One(_)));
        ones.map(|call| std::mem::replace(&mut call.waiter, Waiter::One(oneshot::channel().0))).collect()
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

    fn moment() -> Moment {
        Moment { now: Instant::now(), last: 3, earlier: 0 }
    }

    fn call(waiter: Waiter, message: u64) -> Call<()> {
        let target = Arc::new(Target::new(ServiceId::new("demo", 1).expect("a good name"), "add"));
        Call { waiter, target, message, for_any: true, left_before: false, leaving: None, place: None, again: None }
    }

    #[test]
    fn a_second_reply_to_the_same_call_is_ignored() {
        let mut replies = Replies::default();
        let id = Uuid::new_v4();
        let (sender, mut receiver) = oneshot::channel();
        replies.expect(id, call(Waiter::One(sender), 1));
        assert!(replies.deliver(reply(id), moment()));
        assert!(!replies.deliver(reply(id), moment()));
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
        replies.deliver(reply(id), moment());
        assert_eq!(target.pace.average(), Some(Duration::from_micros(7)));
    }

    #[test]
    fn a_broadcast_takes_every_reply_until_it_is_forgotten() {
        let mut replies = Replies::default();
        let id = Uuid::new_v4();
        let (sender, mut receiver) = mpsc::unbounded_channel();
        replies.expect(id, call(Waiter::Many(sender), 1));
        replies.deliver(reply(id), moment());
        replies.deliver(reply(id), moment());
        replies.forget(id);
        replies.deliver(reply(id), moment());
        assert_eq!(receiver.len(), 2);
        receiver.close();
    }

    #[test]
    fn calls_of_messages_that_are_still_under_way_are_kept() {
        let mut replies = Replies::default();
        let (id, (sender, mut receiver)) = (Uuid::new_v4(), oneshot::channel());
        replies.expect(id, call(Waiter::One(sender), 1));
        replies.report(id, "there".into(), moment());
        assert!(replies.forget_all(|message| message == 1).is_empty() && replies.has_reports());
        assert_eq!(replies.forget_all(|message| message == 2).len(), 1);
        assert!(!replies.has_reports());
        receiver.try_recv().expect_err("nobody will send");
    }

    #[test]
    fn calls_that_nobody_runs_are_known_a_while_after_they_left() {
        let mut replies = Replies::default();
        let [reported, quiet, late, addressed] = [(); 4].map(|()| Uuid::new_v4());
        for (id, message) in [(reported, 1), (quiet, 2), (late, 3), (addressed, 1)] {
            replies.expect(id, Call { for_any: id != addressed, ..call(Waiter::One(oneshot::channel().0), message) });
        }
        replies.expect(Uuid::new_v4(), call(Waiter::Many(mpsc::unbounded_channel().0), 1));
        replies.report(reported, "there".into(), moment());
        assert_eq!(replies.unanswered(2, |_, _| true).len(), 1);
        assert_eq!(replies.unanswered(3, |_, _| true).len(), 2);
        assert!(replies.unanswered(3, |_, _| false).is_empty());
        let is_unanswered =
            |replies: &mut Replies<()>, id| replies.release_one(id).is_some_and(|(_, who)| who.is_some());
        assert_eq!([quiet, reported, addressed].map(|id| is_unanswered(&mut replies, id)), [true, false, false]);
    }

    #[tokio::test(start_paused = true)]
    async fn an_instance_that_stops_reporting_in_is_silent() {
        let mut replies = Replies::default();
        let (busy, dead) = (Uuid::new_v4(), Uuid::new_v4());
        for id in [busy, dead] {
            replies.expect(id, call(Waiter::One(oneshot::channel().0), 1));
            assert!(replies.report(id, "there".into(), moment()));
        }
        assert!(!replies.report(Uuid::new_v4(), "there".into(), moment()));
        let patience = Duration::from_secs(10);
        for second in 1..10 {
            tokio::time::advance(Duration::from_secs(1)).await;
            assert!(replies.forget_silent(patience).is_empty(), "{second}");
        }
        replies.report(busy, "elsewhere".into(), moment());
        tokio::time::advance(Duration::from_secs(1)).await;
        let silent: Vec<_> = replies.forget_silent(patience).into_iter().map(|(id, ..)| id).collect();
        assert_eq!(silent, [dead]);
        assert_eq!(replies.runs_on(busy).map(|instance| &**instance), Some("elsewhere"));
        assert!(replies.forget(busy).is_some() && !replies.has_reports());
    }

    #[tokio::test(start_paused = true)]
    async fn who_was_suspended_first_reads_what_was_said_meanwhile() {
        let mut replies = Replies::default();
        let id = Uuid::new_v4();
        replies.expect(id, call(Waiter::One(oneshot::channel().0), 1));
        replies.report(id, "there".into(), moment());
        let patience = Duration::from_secs(10);
        tokio::time::advance(3 * patience).await;
        assert!(replies.forget_silent(patience).is_empty(), "nobody has looked for so long");
        for second in 1..10 {
            tokio::time::advance(Duration::from_secs(1)).await;
            assert!(replies.forget_silent(patience).is_empty(), "{second}");
        }
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(replies.forget_silent(patience).len(), 1);
    }
}
