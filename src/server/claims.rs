//! Who runs a call that the broker delivers again: its instance may be alive, and have lost only the delivery.
//!
//! The broker delivers a message again when the channel or connection ends over which it was out, whatever the instance does
//! that has it. So before such a call is run, or refused as perhaps run, the other instances are asked. One that runs it
//! says so; a call that ended there, after its delivery was lost, is not run again.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::time::Instant;
use uuid::Uuid;

use super::message::{End, Message, Source};
use super::worker::{Job, Worker};
use crate::codec::Codec;
use crate::error::{Code, Fault};
use crate::frame::{CONTENT_TYPE, Frame, Kind, Metadata};
use crate::topology::{all_key, instance_key};
use crate::transport::{Confirm, Properties, Publication};

/// How long instances have to say that they run a call: of one whose caller waits for the answer, and of a oneway call.
const CALLER_WAITS: Duration = Duration::from_millis(250);
const NOBODY_WAITS: Duration = Duration::from_secs(1);
/// How often an instance that runs a oneway call is asked again, and after which silence it counts as gone.
const ASK_EVERY: Duration = Duration::from_secs(5);
const SILENCE: Duration = Duration::from_secs(15);
/// How many oneway calls an instance remembers that ended after their delivery was lost, and for how long.
const MAX_REMEMBERED: usize = 65_536;
const MEMORY: Duration = Duration::from_secs(3600);

/// What is heard of a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Heard {
    /// This instance runs it.
    Runs(Arc<str>),
    /// It is over, and not to run again.
    Over,
    /// It was in a message with others, and has been published again, alone: that copy is to run.
    Moved,
    /// It failed, and is to be tried again.
    Failed,
}

/// What one instance knows of calls of a service that were delivered more than once.
#[derive(Debug, Default)]
pub(super) struct Claims {
    /// Who waits here to hear of a call.
    listeners: HashMap<Uuid, Vec<mpsc::UnboundedSender<Heard>>>,
    /// Who else wants to hear how a call ends that runs here: their queues.
    wanted: HashMap<Uuid, HashSet<Arc<str>>>,
    /// Oneway calls that are done with here though their delivery was lost.
    done: HashMap<Uuid, End>,
    forgettable: VecDeque<(Instant, Uuid)>,
    /// Messages of several oneway calls, of which some may be done with while others run.
    shared: Vec<Weak<Message>>,
}

impl Claims {
    /// From now on what is heard of a call comes here.
    fn listen(&mut self, id: Uuid) -> mpsc::UnboundedReceiver<Heard> {
        let (listener, heard) = mpsc::unbounded_channel();
        self.listeners.entry(id).or_default().push(listener);
        heard
    }

    /// Somebody who listened for a call has gone.
    fn forget(&mut self, id: Uuid) {
        if let Some(listeners) = self.listeners.get_mut(&id) {
            listeners.retain(|listener| !listener.is_closed());
            if listeners.is_empty() {
                self.listeners.remove(&id);
            }
        }
    }

    /// Passes on what is heard of a call.
    pub(super) fn hear(&self, id: Uuid, heard: &Heard) {
        for listener in self.listeners.get(&id).into_iter().flatten() {
            // One that has gone does not want to know.
            let _ = listener.send(heard.clone());
        }
    }

    /// Several oneway calls have come in one message.
    pub(super) fn share(&mut self, message: &Arc<Message>) {
        if self.shared.len() == self.shared.capacity() {
            self.shared.retain(|message| message.strong_count() > 0);
        }
        self.shared.push(Arc::downgrade(message));
    }

    /// Somebody at `queue` wants to know of a call, which runs here if `runs` says so. Tells what there is to say.
    fn asked(&mut self, id: Uuid, queue: Arc<str>, runs: bool) -> Option<Heard> {
        if runs {
            self.wanted.entry(id).or_default().insert(queue);
            return Some(Heard::Runs(Arc::default()));
        }
        self.end_of(id).map(|end| match end {
            End::Over => Heard::Over,
            End::Moved => Heard::Moved,
        })
    }

    /// How a oneway call is done with here, whatever became of its delivery.
    fn end_of(&self, id: Uuid) -> Option<End> {
        let shared = self.shared.iter().filter_map(Weak::upgrade);
        let in_shared = shared.filter_map(|message| message.done().iter().find(|done| done.0 == id).map(|done| done.1));
        let ends: Vec<End> = self.done.get(&id).copied().into_iter().chain(in_shared).collect();
        // What has been moved may have come back and run.
        ends.iter().find(|end| **end == End::Over).or(ends.first()).copied()
    }

    /// Whether another delivery of a oneway call, in a message of so many, is not to run: it is done with here.
    pub(super) fn is_done(&self, id: Uuid, frames: usize) -> bool {
        match self.end_of(id) {
            Some(End::Over) => true,
            Some(End::Moved) => frames > 1,
            None => false,
        }
    }

    /// A oneway call has ended; its delivery was lost meanwhile if `lost` says so. Tells whether somebody here has another one,
    /// and gives out who else wants to know.
    fn end(&mut self, id: Uuid, heard: &Heard, lost: bool) -> (bool, HashSet<Arc<str>>) {
        let held = self.listeners.contains_key(&id);
        self.hear(id, heard);
        if lost && *heard == Heard::Over {
            self.remember(id, End::Over);
        }
        (held, self.wanted.remove(&id).unwrap_or_default())
    }

    /// Remembers how a call is done with.
    fn remember(&mut self, id: Uuid, end: End) {
        let now = Instant::now();
        while let Some(&(until, oldest)) = self.forgettable.front()
            && (until <= now || self.forgettable.len() >= MAX_REMEMBERED)
        {
            self.forgettable.pop_front();
            self.done.remove(&oldest);
        }
        match self.done.entry(id) {
            Entry::Vacant(new) => {
                new.insert(end);
                self.forgettable.push_back((now + MEMORY, id));
            }
            Entry::Occupied(mut known) if end == End::Over => _ = known.insert(end),
            Entry::Occupied(_) => {}
        }
    }
}

/// Hears of one call.
struct Listener {
    worker: Arc<Worker>,
    id: Uuid,
    heard: mpsc::UnboundedReceiver<Heard>,
}

impl Listener {
    fn of(worker: &Arc<Worker>, id: Uuid) -> Self {
        let heard = worker.claims().listen(id);
        Self { worker: worker.clone(), id, heard }
    }

    async fn next(&mut self) -> Option<Heard> {
        self.heard.recv().await
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.heard.close();
        self.worker.claims().forget(self.id);
    }
}

impl Worker {
    /// Answers somebody who wants to know whether a call runs here.
    pub(super) fn locate(&self, id: Uuid, message: &Message) {
        let Some(queue) = message.reply_to.clone() else { return };
        let runs = self.calls().runs(id);
        if let Some(heard) = self.claims().asked(id, queue.clone(), runs) {
            self.say(id, &heard, queue);
        }
    }

    /// A oneway call, or what else came by such a queue, is done with: it is not to run again.
    pub(super) fn done(&self, id: Uuid, end: End, message: &Message) {
        if message.source == Source::Work {
            if message.frames > 1 {
                message.note_done(id, end);
            }
            if end == End::Over {
                self.tell_holders(id, &Heard::Over, message);
            }
            if message.frames > 1 && message.is_taken_back() {
                let mut claims = self.claims();
                message.done().iter().for_each(|&(id, end)| claims.remember(id, end));
            }
        }
        message.finish();
    }

    /// Tells whoever holds another delivery of a oneway call that it has ended. Tells whether there is one, as far as is known.
    pub(super) fn tell_holders(&self, id: Uuid, heard: &Heard, message: &Message) -> bool {
        let lost = message.is_taken_back();
        let (held, others) = self.claims().end(id, heard, lost);
        let wanted = !others.is_empty();
        others.into_iter().for_each(|queue| self.say(id, heard, queue));
        lost || held || wanted
    }

    fn say(&self, id: Uuid, heard: &Heard, queue: Arc<str>) {
        let (kind, status) = match heard {
            Heard::Runs(_) => (Kind::KeepAlive, Code::Ok),
            Heard::Over => (Kind::Reply, Code::Ok),
            Heard::Moved => (Kind::Reply, Code::Cancelled),
            Heard::Failed => (Kind::Reply, Code::Unknown),
        };
        let metadata = Metadata { instance: Some(self.site.instance.clone()), ..Metadata::default() };
        let frame = Frame { status, ..Frame::new(kind, id, Codec::Raw, metadata, Bytes::new()) };
        self.site.replies.tell(queue, id, frame.to_body());
    }

    /// Asks the other instances whether they run calls that were delivered again, and then sees to each.
    pub(super) async fn ask_first(self: Arc<Self>, jobs: Vec<Job>) {
        let Some(message) = jobs.first().map(|job| job.message.clone()) else { return };
        let ids: Vec<Uuid> = jobs.iter().map(|job| job.frame.id).collect();
        let listening = jobs.into_iter().map(|job| (Listener::of(&self, job.frame.id), job)).collect::<Vec<_>>();
        self.ask(&ids, all_key(&self.id), &message).await;
        let asked_at = Instant::now();
        let deciding = listening.into_iter().map(|(heard, job)| self.clone().decide(job, heard, asked_at));
        futures::future::join_all(deciding).await;
    }

    /// Publishes the question who runs these calls. Tells whether it is certain that it reached nobody.
    async fn ask(&self, ids: &[Uuid], key: String, message: &Message) -> bool {
        let (exchange, mut body) = (self.site.namespace.rpc(), Vec::new());
        for &id in ids {
            let metadata = Metadata { instance: Some(self.site.instance.clone()), ..Metadata::default() };
            Frame::new(Kind::Locate, id, Codec::Raw, metadata, Bytes::new()).encode(&mut body);
        }
        let properties = Properties {
            reply_to: Some(self.own_queue().to_string()),
            content_type: Some(CONTENT_TYPE.to_owned()),
            app_id: Some(self.site.instance.to_string()),
            ..Properties::default()
        };
        let asking =
            message.transport.publish(Publication { exchange, key, mandatory: true, properties, body: body.into() });
        // A broker that takes nothing is asked in vain.
        let said = tokio::time::timeout(NOBODY_WAITS, asking).await;
        matches!(said, Ok(Ok(Confirm::Returned | Confirm::Refused)))
    }

    /// Sees to a call that was delivered again, by what is heard of it in time.
    async fn decide(self: Arc<Self>, job: Job, mut heard: Listener, asked_at: Instant) {
        let is_request = job.frame.kind == Kind::Request;
        let patience = if is_request { CALLER_WAITS } else { NOBODY_WAITS };
        let told = tokio::time::timeout_at(asked_at + patience, async {
            loop {
                match heard.next().await {
                    // This is what was published then, and another instance may run it.
                    Some(Heard::Moved) if job.message.frames == 1 => {}
                    told => return told,
                }
            }
        });
        match told.await {
            Ok(Some(Heard::Over | Heard::Moved)) => job.message.finish(),
            // Who runs it answers its caller.
            Ok(Some(Heard::Runs(_))) if is_request => job.message.finish(),
            Ok(Some(Heard::Runs(instance))) => self.hold(job, heard, instance).await,
            Ok(Some(Heard::Failed) | None) | Err(_) => self.run_again(job).await,
        }
    }

    /// Keeps another delivery of a oneway call that runs here until that has ended.
    pub(super) async fn hold_here(self: Arc<Self>, job: Job) {
        let id = job.frame.id;
        let heard = Listener::of(&self, id);
        if self.calls().runs(id) {
            let instance = self.site.instance.clone();
            return self.hold(job, heard, instance).await;
        }
        // It has ended at this very moment.
        let is_done = self.claims().is_done(id, job.message.frames);
        match is_done {
            true => job.message.finish(),
            false => self.run_again(job).await,
        }
    }

    /// Keeps a oneway call that an instance runs until it has ended there.
    async fn hold(self: Arc<Self>, job: Job, mut heard: Listener, mut instance: Arc<str>) {
        let mut last = Instant::now();
        loop {
            tokio::select! {
                told = heard.next() => match told {
                    Some(Heard::Runs(by)) => (instance, last) = (by, Instant::now()),
                    Some(Heard::Over) => return job.message.finish(),
                    Some(Heard::Moved) => {}
                    Some(Heard::Failed) | None => return self.run_again(job).await,
                },
                () = self.site.draining.cancelled() => return self.give_back(job).await,
                () = tokio::time::sleep(ASK_EVERY) => {
                    if job.message.is_taken_back() {
                        // It is delivered once more, to whomever.
                        return;
                    }
                    if job.message.transport.blocked().is_some() {
                        // Nobody can answer.
                        last = Instant::now();
                        continue;
                    }
                    let gone = self.ask(&[job.frame.id], instance_key(&self.id, &instance), &job.message).await;
                    if gone || last.elapsed() >= SILENCE {
                        return self.run_again(job).await;
                    }
                }
            }
        }
    }

    /// Nobody who could be asked runs a call that was delivered again.
    async fn run_again(self: Arc<Self>, job: Job) {
        match job.frame.kind {
            Kind::Request => {
                let method = job.frame.metadata.method.as_deref().unwrap_or_default();
                let why = format!("the instance that took `{}.{method}` went away: it may have run", self.name);
                self.refuse(job.frame, Fault::new(Code::Aborted, why), job.message).await;
            }
            // One of its calls may have killed the instance that had it: it is not to take the others along again.
            _ if job.message.frames > 1 => self.give_back(job).await,
            _ => self.start_when_free(job).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn who_asks_for_a_call_that_runs_hears_of_its_end_and_later_only_if_its_delivery_was_lost() {
        let mut claims = Claims::default();
        let (id, other) = (Uuid::new_v4(), Uuid::new_v4());
        let queue: Arc<str> = "asker".into();
        assert_eq!(claims.asked(id, queue.clone(), false), None);
        assert_eq!(claims.asked(id, queue.clone(), true), Some(Heard::Runs("".into())));
        let mut heard = claims.listen(id);
        assert_eq!(claims.end(id, &Heard::Over, true), (true, HashSet::from([queue.clone()])));
        assert_eq!(heard.recv().await, Some(Heard::Over));
        assert_eq!(claims.asked(id, queue.clone(), false), Some(Heard::Over));
        assert_eq!(claims.end(other, &Heard::Over, false), (false, HashSet::new()));
        assert_eq!(claims.asked(other, queue.clone(), false), None);
        tokio::time::advance(MEMORY).await;
        claims.end(other, &Heard::Failed, true);
        claims.end(other, &Heard::Over, true);
        assert_eq!(claims.asked(id, queue, false), None, "it has had its time");
    }

    #[test]
    fn of_a_call_that_was_moved_only_the_copy_among_others_is_done_with_until_it_is_over() {
        let mut claims = Claims::default();
        let id = Uuid::new_v4();
        claims.remember(id, End::Moved);
        assert!(claims.is_done(id, 2) && !claims.is_done(id, 1));
        assert_eq!(claims.asked(id, "asker".into(), false), Some(Heard::Moved));
        claims.remember(id, End::Over);
        claims.remember(id, End::Moved);
        assert!(claims.is_done(id, 1));
    }

    #[test]
    fn listeners_that_have_gone_leave_nothing_behind() {
        let mut claims = Claims::default();
        let id = Uuid::new_v4();
        let (gone, stays) = (claims.listen(id), claims.listen(id));
        drop(gone);
        claims.forget(id);
        assert_eq!(claims.listeners[&id].len(), 1);
        drop(stays);
        claims.forget(id);
        assert!(claims.listeners.is_empty());
    }
}
