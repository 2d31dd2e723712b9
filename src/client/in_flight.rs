//! The calls that were sent and wait for replies: which ids are awaited, and by whom.
//!
//! The line gives each frame that arrives to [`CallsInFlight`], which finds the caller by the id.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
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
use crate::map::FastMap;
use crate::transport::{Confirm, Lost};

/// How late a check for silent instances may be. If it is later, this process was suspended or its runtime was blocked,
/// and signs of life may have arrived that were not read yet.
const LATE: Duration = Duration::from_secs(3);

/// How a call ends without a reply. For oneway calls and events it is what the broker has said.
#[derive(Debug, Clone)]
pub(crate) enum CallEnd {
    /// The broker has confirmed, returned or refused the message.
    Said(Confirm),
    /// The connection was lost before that, or before the reply.
    Lost(Lost),
    /// The broker has accepted no messages for the time `after`, for this reason.
    Blocked { reason: Arc<str>, after: Duration, may_have_run: bool },
    /// This many calls are in flight, which is the limit.
    Full(usize),
    /// The deadline has passed.
    TimedOut(Unanswered),
    /// This queue has not accepted the call, and cannot be reached.
    Unreachable(Arc<str>),
    /// The exchange was deleted. `why` says what that means for the publisher.
    NoExchange { exchange: Arc<str>, why: String },
    /// The instance that runs the call has sent no sign of life for the time `after`.
    Silent { instance: Arc<str>, after: Duration },
}

/// Who waits for replies to an id.
#[derive(Debug)]
pub(crate) enum Waiter {
    /// A call. Its first reply is the only one.
    One(oneshot::Sender<Result<Frame, CallEnd>>),
    /// A broadcast. Each instance replies.
    Many(mpsc::UnboundedSender<Frame>),
}

/// A place among the calls in flight. Dropping it returns it.
#[derive(Debug)]
pub(crate) struct Place {
    /// Given back when this is dropped.
    _permit: OwnedSemaphorePermit,
    /// The deadline of the call that has it. After that it may be taken back.
    until: Instant,
}

impl Place {
    pub(crate) fn new(permit: OwnedSemaphorePermit, until: Instant) -> Self {
        Self { _permit: permit, until }
    }
}

/// A call that was sent. `A` is what is needed to send it again.
#[derive(Debug)]
pub(crate) struct PendingCall<A> {
    pub(crate) waiter: Waiter,
    pub(crate) target: Arc<Target>,
    /// The number of the message in which it was sent.
    pub(crate) message: u64,
    /// Whether any instance may run it. Otherwise it is for one given instance, or for all.
    pub(crate) for_any: bool,
    /// Whether it was also sent in an earlier message that may have arrived.
    pub(crate) left_before: bool,
    /// For a call that a handler made to a service of its own server: cancelled when that server drains.
    pub(crate) leaving: Option<CancellationToken>,
    pub(crate) place: Option<Place>,
    /// What is sent again if the connection or the instance is lost. `None` if the call must not run twice.
    pub(crate) again: Option<Box<A>>,
}

impl<A> PendingCall<A> {
    /// Whether it waits for one reply from any instance.
    fn awaits_any(&self) -> bool {
        self.for_any && matches!(self.waiter, Waiter::One(_))
    }

    /// Whether a server that drains waits for this call to end.
    fn is_leaving(&self) -> bool {
        self.leaving.as_ref().is_some_and(CancellationToken::is_cancelled)
    }
}

/// The method of a call that perhaps nobody runs, and the number of its message.
pub(crate) type Nobodys = (Arc<Target>, u64);

/// A reply, and who waits for it.
#[derive(Debug)]
pub(crate) struct HeldReply {
    waiter: Waiter,
    reply: Frame,
}

impl HeldReply {
    /// Gives the reply to whoever waits for it.
    pub(crate) fn tell(self) {
        // An error means that they have given up at this moment.
        match self.waiter {
            Waiter::One(waiter) => _ = waiter.send(Ok(self.reply)),
            Waiter::Many(waiter) => _ = waiter.send(self.reply),
        }
    }
}

/// The calls of one client that wait for replies.
#[derive(Debug)]
pub(crate) struct CallsInFlight<A> {
    calls: FastMap<Uuid, PendingCall<A>>,
    /// The calls whose instances have sent a sign of life: which instance, and when it did so last.
    reports: HashMap<Uuid, (Arc<str>, Instant)>,
    /// When silent instances were last looked for.
    looked_at: Instant,
}

impl<A> Default for CallsInFlight<A> {
    fn default() -> Self {
        Self { calls: FastMap::default(), reports: HashMap::new(), looked_at: Instant::now() }
    }
}

impl<A> CallsInFlight<A> {
    /// Adds a call: from now on replies to `id` go to its caller.
    pub(crate) fn expect(&mut self, id: Uuid, call: PendingCall<A>) {
        self.calls.insert(id, call);
    }

    pub(crate) fn len(&self) -> usize {
        self.calls.len()
    }

    /// Takes out the call `id`, since its caller has given up or no reply can come.
    pub(crate) fn forget(&mut self, id: Uuid) -> Option<PendingCall<A>> {
        self.forget_report(id);
        self.calls.remove(&id)
    }

    fn forget_report(&mut self, id: Uuid) {
        if !self.reports.is_empty() {
            self.reports.remove(&id);
        }
    }

    /// Takes out the call `id`, unless it is a broadcast.
    pub(crate) fn forget_one(&mut self, id: Uuid) -> Option<PendingCall<A>> {
        let is_one = self.calls.get(&id).is_some_and(|call| matches!(call.waiter, Waiter::One(_)));
        if is_one { self.forget(id) } else { None }
    }

    /// Takes a reply to a call: who gets it. `None` if nobody waits for it, since it is late or misdirected, which is no
    /// error.
    pub(crate) fn deliver(&mut self, reply: Frame, moment: Moment) -> Option<HeldReply> {
        let Entry::Occupied(entry) = self.calls.entry(reply.id) else {
            debug!(id = %reply.id, instance = reply.metadata.instance.as_deref(), "a reply that nobody waits for");
            return None;
        };
        let call = entry.get();
        call.target.presence().heard(call.message, moment);
        call.target.said_to_read(reply.metadata.accepts);
        if let Some(time) = reply.metadata.handler_time {
            call.target.pace.report(time);
        }
        let waiter = match &call.waiter {
            // The gatherer takes out its id itself.
            Waiter::Many(waiter) => Waiter::Many(waiter.clone()),
            Waiter::One(_) => {
                let call = entry.remove();
                self.forget_report(reply.id);
                call.waiter
            }
        };
        Some(HeldReply { waiter, reply })
    }

    /// An instance has sent a sign of life for the call `id`. Returns whether anybody waits for that call.
    pub(crate) fn report(&mut self, id: Uuid, instance: Arc<str>, moment: Moment) -> bool {
        let Some(call) = self.calls.get(&id) else { return false };
        call.target.presence().heard(call.message, moment);
        // A broadcast runs on several instances, so a single one tells nothing.
        if matches!(call.waiter, Waiter::One(_)) {
            if self.reports.is_empty() {
                self.looked_at = moment.now;
            }
            self.reports.insert(id, (instance, moment.now));
        }
        true
    }

    /// The instance that runs the call `id`, if it has sent a sign of life.
    pub(crate) fn runs_on(&self, id: Uuid) -> Option<&Arc<str>> {
        self.reports.get(&id).map(|(instance, _)| instance)
    }

    pub(crate) fn has_reports(&self) -> bool {
        !self.reports.is_empty()
    }

    /// Whether an instance was silent for at least `time`.
    pub(crate) fn is_silent(&self, time: Duration) -> bool {
        self.reports.values().any(|(_, last)| last.elapsed() >= time)
    }

    /// Gives every instance its full time again, since it could not send signs of life, or they could not be read.
    pub(crate) fn excuse(&mut self) {
        self.reports.values_mut().for_each(|(_, last)| *last = Instant::now());
    }

    /// Takes out the calls whose instances were silent for at least `patience`. The line calls this every second.
    pub(crate) fn forget_silent(&mut self, patience: Duration) -> Vec<(Uuid, Arc<str>, PendingCall<A>)> {
        if self.looked_at.elapsed() > LATE {
            self.excuse();
        }
        self.looked_at = Instant::now();
        let calls = &mut self.calls;
        let silent = self.reports.extract_if(|_, (_, last)| last.elapsed() >= patience);
        silent.filter_map(|(id, (instance, _))| Some((id, instance, calls.remove(&id)?))).collect()
    }

    /// Whether a call in one of these messages waits for a reply.
    pub(crate) fn awaits(&self, is_one: impl Fn(u64) -> bool) -> bool {
        self.calls.values().any(|call| is_one(call.message))
    }

    /// Takes out the calls whose messages are not among those for which `under_way` is true.
    pub(crate) fn forget_all(&mut self, under_way: impl Fn(u64) -> bool) -> Vec<(Uuid, PendingCall<A>)> {
        let forgotten: Vec<_> = self.calls.extract_if(|_, call| !under_way(call.message)).collect();
        self.reports.retain(|id, _| self.calls.contains_key(id));
        forgotten
    }

    /// Takes back the places of calls whose time is over, although their callers have not collected the result.
    pub(crate) fn vacate(&mut self, now: Instant) {
        for call in self.calls.values_mut() {
            call.place.take_if(|place| place.until <= now);
        }
    }

    /// The methods of calls up to the message with this number that any instance may run and that none has reported.
    /// `wanted` chooses among them; it is told whether a drain waits for the call.
    pub(crate) fn unanswered(&self, message: u64, wanted: impl Fn(&Target, bool) -> bool) -> Vec<Arc<Target>> {
        let left = self.calls.iter().filter(|(_, call)| call.message <= message && call.awaits_any());
        let unanswered =
            left.filter(|(id, call)| !self.reports.contains_key(id) && wanted(&call.target, call.is_leaving()));
        unanswered.map(|(_, call)| call.target.clone()).collect()
    }

    /// The number of the message in which a call was sent.
    pub(crate) fn message_of(&self, id: Uuid) -> Option<u64> {
        self.calls.get(&id).map(|call| call.message)
    }

    /// Takes out the caller of a call, and leaves the call itself until the caller drops it. If perhaps nobody runs the
    /// call, its method and the number of its message are returned as well.
    pub(crate) fn release_one(&mut self, id: Uuid) -> Option<(Waiter, Option<Nobodys>)> {
        let call = self.calls.get_mut(&id).filter(|call| matches!(call.waiter, Waiter::One(_)))?;
        let unanswered = call.awaits_any() && !call.left_before && !self.reports.contains_key(&id);
        let waiter = std::mem::replace(&mut call.waiter, Waiter::One(oneshot::channel().0));
        Some((waiter, unanswered.then(|| (call.target.clone(), call.message))))
    }

    /// Takes out the callers of calls to a service without an instance, if a draining server waits for them: it was the
    /// last that served them. Only calls up to the message with this number are taken.
    pub(crate) fn release_hopeless(
        &mut self,
        service: &str,
        message: u64,
    ) -> Vec<oneshot::Sender<Result<Frame, CallEnd>>> {
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

    /// Takes out the callers of calls in those messages for which `under_way` is true.
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

    fn call(waiter: Waiter, message: u64) -> PendingCall<()> {
        let target = Arc::new(Target::new(ServiceId::new("demo", 1).expect("a good name"), "add"));
        PendingCall {
            waiter,
            target,
            message,
            for_any: true,
            left_before: false,
            leaving: None,
            place: None,
            again: None,
        }
    }

    #[test]
    fn a_second_reply_to_the_same_call_is_ignored() {
        let mut replies = CallsInFlight::default();
        let id = Uuid::new_v4();
        let (sender, mut receiver) = oneshot::channel();
        replies.expect(id, call(Waiter::One(sender), 1));
        replies.deliver(reply(id), moment()).expect("somebody waits").tell();
        assert!(replies.deliver(reply(id), moment()).is_none());
        assert_eq!(receiver.try_recv().expect("one").expect("a reply").id, id);
    }

    #[test]
    fn a_reply_tells_how_long_its_method_takes() {
        let mut replies = CallsInFlight::default();
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
        let mut replies = CallsInFlight::default();
        let id = Uuid::new_v4();
        let (sender, mut receiver) = mpsc::unbounded_channel();
        replies.expect(id, call(Waiter::Many(sender), 1));
        for _ in 0..2 {
            replies.deliver(reply(id), moment()).expect("somebody waits").tell();
        }
        replies.forget(id);
        assert!(replies.deliver(reply(id), moment()).is_none());
        assert_eq!(receiver.len(), 2);
        receiver.close();
    }

    #[test]
    fn calls_of_messages_that_are_still_under_way_are_kept() {
        let mut replies = CallsInFlight::default();
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
        let mut replies = CallsInFlight::default();
        let [reported, quiet, late, addressed] = [(); 4].map(|()| Uuid::new_v4());
        for (id, message) in [(reported, 1), (quiet, 2), (late, 3), (addressed, 1)] {
            replies.expect(
                id,
                PendingCall { for_any: id != addressed, ..call(Waiter::One(oneshot::channel().0), message) },
            );
        }
        replies.expect(Uuid::new_v4(), call(Waiter::Many(mpsc::unbounded_channel().0), 1));
        replies.report(reported, "there".into(), moment());
        assert_eq!(replies.unanswered(2, |_, _| true).len(), 1);
        assert_eq!(replies.unanswered(3, |_, _| true).len(), 2);
        assert!(replies.unanswered(3, |_, _| false).is_empty());
        let is_unanswered =
            |replies: &mut CallsInFlight<()>, id| replies.release_one(id).is_some_and(|(_, who)| who.is_some());
        assert_eq!([quiet, reported, addressed].map(|id| is_unanswered(&mut replies, id)), [true, false, false]);
    }

    #[tokio::test(start_paused = true)]
    async fn an_instance_that_stops_reporting_in_is_silent() {
        let mut replies = CallsInFlight::default();
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
        let mut replies = CallsInFlight::default();
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
