//! Taps: whoever asks is told for a while which calls this instance runs. A tap reads what a call leaves behind when it
//! ends, and never a queue. Without one, a call pays for a look at a number.

use std::mem;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use super::about::written;
use super::message::Message;
use super::replies::Audience;
use super::reply::OutgoingReply;
use super::served_method::RunEnd;
use super::worker::Worker;
use crate::clock::unix_millis;
use crate::codec::Codec;
use crate::compression::Compression;
use crate::context::Context;
use crate::document::{Tapped, TappedCall};
use crate::error::{Code, Fault};
use crate::frame::{Frame, micros};
use crate::headers::cut;
use crate::service::Answer;

/// How many taps a service may have on an instance at once.
const MOST_TAPS: usize = 4;
/// How long a tap may take.
const MOST_TIME: Duration = Duration::from_secs(600);
/// How many calls a second it may tell of.
const MOST_PER_SECOND: usize = 1000;
/// How often what has been tapped is sent.
const PAUSE: Duration = Duration::from_millis(250);
/// How long the broker's confirm of the last documents is awaited.
const CONFIRMED: Duration = Duration::from_secs(1);
/// How many calls a document has at most.
const IN_DOCUMENT: usize = 100;
/// How much is kept of a name, in bytes.
const MAX_NAME: usize = 256;

/// The taps of one service on this instance.
#[derive(Default)]
pub(super) struct Taps {
    /// How many there are: all that a call looks at without one.
    count: AtomicUsize,
    taps: Mutex<Vec<Arc<Tap>>>,
}

/// Somebody is told of calls.
struct Tap {
    /// The id of the request that asked for it.
    id: Uuid,
    /// How many calls a second it is told of.
    per_second: usize,
    kept: Mutex<Kept>,
    /// Cancelled when nobody wants it any more.
    unwanted: CancellationToken,
    /// The documents that the broker does not have yet.
    under_way: TaskTracker,
}

/// The calls that are to be sent.
struct Kept {
    calls: Vec<TappedCall>,
    left_out: u64,
    /// When the second began in which calls are counted, and how many it has had.
    second: (Instant, usize),
}

impl Tap {
    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().expect("no panic while holding tapped calls")
    }

    /// Keeps a call, if it is not one too many.
    fn keep(&self, call: &TappedCall, now: Instant) {
        let mut kept = self.kept();
        if now.saturating_duration_since(kept.second.0) >= Duration::from_secs(1) {
            kept.second = (now, 0);
        }
        if kept.second.1 < self.per_second && kept.calls.len() < self.per_second {
            kept.second.1 += 1;
            kept.calls.push(call.clone());
        } else {
            kept.left_out += 1;
        }
    }

    /// Takes out what is to be sent: the calls, and how many were left out.
    fn take(&self) -> (Vec<TappedCall>, u64) {
        let mut kept = self.kept();
        (mem::take(&mut kept.calls), mem::take(&mut kept.left_out))
    }
}

impl Taps {
    fn taps(&self) -> MutexGuard<'_, Vec<Arc<Tap>>> {
        self.taps.lock().expect("no panic while holding the taps")
    }

    /// Tells the taps of a call that has ended.
    pub(super) fn see(&self, call: impl FnOnce() -> TappedCall) {
        if self.count.load(Ordering::Relaxed) == 0 {
            return;
        }
        let (call, now) = (call(), Instant::now());
        self.taps().iter().for_each(|tap| tap.keep(&call, now));
    }

    /// Ends the tap that this request has asked for. Returns whether there is one.
    pub(super) fn cancel(&self, id: Uuid) -> bool {
        let is_one = |tap: &&Arc<Tap>| tap.id == id;
        self.count.load(Ordering::Relaxed) > 0
            && self.taps().iter().find(is_one).map(|tap| tap.unwanted.cancel()).is_some()
    }

    /// Adds a tap. `None` if there are too many, or if there is one with this id.
    fn begin(&self, id: Uuid, per_second: usize) -> Option<Arc<Tap>> {
        let mut taps = self.taps();
        if taps.len() >= MOST_TAPS || taps.iter().any(|tap| tap.id == id) {
            return None;
        }
        let kept = Kept { calls: Vec::new(), left_out: 0, second: (Instant::now(), 0) };
        let tap = Arc::new(Tap {
            id,
            per_second,
            kept: Mutex::new(kept),
            unwanted: CancellationToken::new(),
            under_way: TaskTracker::new(),
        });
        taps.push(tap.clone());
        self.count.store(taps.len(), Ordering::Relaxed);
        Some(tap)
    }

    fn end(&self, id: Uuid) {
        let mut taps = self.taps();
        taps.retain(|tap| tap.id != id);
        self.count.store(taps.len(), Ordering::Relaxed);
    }
}

/// Who is told, and how.
struct TapAsker {
    id: Uuid,
    /// The queue for replies.
    queue: Arc<str>,
    codec: Codec,
    compression: Option<Compression>,
}

impl Worker {
    /// Begins a tap. The answer to its question is the first document, which has no calls.
    pub(super) fn begin_tap(self: &Arc<Self>, request: &Frame, message: &Message) -> Answer {
        let refused = |code, why: &str| Answer::Fault(Fault::new(code, why));
        let Some(queue) = message.reply_to.clone() else {
            return refused(Code::InvalidArgument, "a tap without `reply_to`: nobody can be told");
        };
        let arguments = request.plain_payload(self.site.max_size).ok();
        let arguments = arguments.and_then(|payload| request.codec.decode::<(u64, u64)>(&payload).ok());
        let Some((time_ms, per_second)) = arguments else {
            let why = "a tap takes its time in milliseconds, and the most calls per second";
            return refused(Code::InvalidArgument, why);
        };
        let first = written(request.codec, &self.document(Vec::new(), 0, false));
        if matches!(first, Answer::Fault(_)) {
            return first;
        }
        let time = Duration::from_millis(time_ms).min(MOST_TIME);
        let per_second = usize::try_from(per_second).unwrap_or(MOST_PER_SECOND).clamp(1, MOST_PER_SECOND);
        let Some(tap) = self.taps.begin(request.id, per_second) else {
            let why = format!("`{}` has {MOST_TAPS} taps on this instance already: try again later", self.name);
            return refused(Code::ResourceExhausted, &why);
        };
        let compression = self.site.compression.filter(|one| request.metadata.accepts.includes(*one));
        let asker = TapAsker { id: request.id, queue, codec: request.codec, compression };
        self.site.own.spawn(self.clone().tell_tapped(tap, asker, Instant::now() + time));
        first
    }

    /// Sends what is tapped, until the time is over, nobody wants it any more, or the server has drained.
    async fn tell_tapped(self: Arc<Self>, tap: Arc<Tap>, asker: TapAsker, until: Instant) {
        let mut tick = interval(PAUSE);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let last = tokio::select! {
                biased;
                () = tap.unwanted.cancelled() => break,
                () = sleep_until(until) => true,
                () = self.site.drained.cancelled() => true,
                _ = tick.tick() => false,
            };
            if last {
                // What ends from now on is not told.
                self.taps.end(tap.id);
            }
            self.send_tapped(&tap, &asker, last);
            if last {
                tap.under_way.close();
                // A drain waits for this task, and the connection ends with it.
                let _ = timeout(CONFIRMED, tap.under_way.wait()).await;
                return;
            }
        }
        self.taps.end(tap.id);
    }

    /// Sends the calls that a tap has kept.
    fn send_tapped(&self, tap: &Tap, asker: &TapAsker, last: bool) {
        let (calls, mut left_out) = tap.take();
        if calls.is_empty() && left_out == 0 && !last {
            return;
        }
        let mut calls = calls.into_iter().peekable();
        loop {
            let some: Vec<_> = calls.by_ref().take(IN_DOCUMENT).collect();
            let is_end = calls.peek().is_none();
            let document = self.document(some, mem::take(&mut left_out), last && is_end);
            let TapAsker { id, ref queue, codec, compression } = *asker;
            let reply = OutgoingReply {
                id,
                codec,
                instance: &self.site.instance,
                compression,
                handler_time: None,
                running: None,
            };
            let frame = reply.body(written(codec, &document), self.site.max_size);
            let audience = Audience { gone: tap.unwanted.clone(), _under_way: tap.under_way.token() };
            self.site.replies.tell_audience(queue.clone(), id, frame, audience);
            if is_end {
                return;
            }
        }
    }

    fn document(&self, calls: Vec<TappedCall>, left_out: u64, last: bool) -> Tapped {
        let (service, instance) = (self.name.to_string(), self.site.instance.to_string());
        Tapped { service, instance, calls, left_out, last }
    }
}

/// What is told of a call that has ended.
pub(super) fn tapped(frame: &Frame, context: &Context, end: RunEnd<'_>, ran: Duration) -> TappedCall {
    let (code, own_error, returned) = match end {
        RunEnd::Result(bytes) => (Code::Ok, false, bytes),
        RunEnd::ServiceError(bytes) => (Code::Unknown, true, bytes),
        RunEnd::Fault(fault) => (fault.code, false, 0),
        RunEnd::Cancelled => (Code::Cancelled, false, 0),
    };
    TappedCall {
        method: cut(context.method(), MAX_NAME).to_owned(),
        caller: cut(context.caller().unwrap_or_default(), MAX_NAME).to_owned(),
        at_ms: unix_millis(),
        queue_micros: context.queue_time().map(micros),
        handler_micros: micros(ran),
        code: code.name().to_owned(),
        own_error,
        received_bytes: frame.payload.len() as u64,
        returned_bytes: returned as u64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call() -> TappedCall {
        TappedCall { method: "add".to_owned(), ..TappedCall::default() }
    }

    #[test]
    fn nothing_is_made_of_a_call_without_a_tap() {
        Taps::default().see(|| panic!("nobody asks for it"));
    }

    #[test]
    fn a_second_has_no_more_calls_than_were_asked_for_and_the_rest_is_counted() {
        let taps = Taps::default();
        let tap = taps.begin(Uuid::new_v4(), 2).expect("it is the first");
        let now = tap.kept().second.0;
        (0..5).for_each(|_| tap.keep(&call(), now));
        let (calls, left_out) = tap.take();
        assert_eq!((calls.len(), left_out), (2, 3));
        tap.keep(&call(), now + Duration::from_millis(999));
        assert_eq!(tap.take(), (vec![], 1));
        (0..3).for_each(|_| tap.keep(&call(), now + Duration::from_secs(1)));
        (0..3).for_each(|_| tap.keep(&call(), now + Duration::from_secs(2)));
        assert_eq!(tap.take(), (vec![call(), call()], 4), "no more are kept than two, however late they are sent");
    }

    #[test]
    fn taps_are_few_and_end() {
        let taps = Taps::default();
        let ids: Vec<_> = (0..MOST_TAPS).map(|_| Uuid::new_v4()).collect();
        let begun: Vec<_> = ids.iter().filter_map(|id| taps.begin(*id, 1)).collect();
        assert_eq!(begun.len(), MOST_TAPS);
        assert!(taps.begin(Uuid::new_v4(), 1).is_none(), "there are enough");
        assert!(taps.cancel(ids[0]) && begun[0].unwanted.is_cancelled() && !begun[1].unwanted.is_cancelled());
        assert!(!taps.cancel(Uuid::new_v4()));
        taps.end(ids[0]);
        assert!(taps.begin(ids[1], 1).is_none(), "the same request came twice");
        assert!(taps.begin(ids[0], 1).is_some());
        ids.iter().for_each(|id| taps.end(*id));
        assert_eq!(taps.count.load(Ordering::Relaxed), 0);
    }
}
