//! Locating: before a call that the broker delivers again is run, or refused since it may have run, the other instances
//! are asked whether they run it (`locate` on the wire). An instance that runs the call says so.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::time::Instant;
use uuid::Uuid;

use super::claims::{Claims, Heard};
use super::dispatch::Job;
use super::message::{Message, MessageEnd, Source};
use super::worker::Worker;
use crate::codec::Codec;
use crate::error::{Code, Fault};
use crate::exchanges::Recipients;
use crate::frame::{CONTENT_TYPE, Frame, Kind, Metadata};
use crate::transport::{Confirm, Properties};

/// How long instances may take to say that they run a request, whose caller waits.
const CALLER_WAITS: Duration = Duration::from_millis(250);
/// The same for a oneway call. Nobody waits for its result, so this is longer.
const NOBODY_WAITS: Duration = Duration::from_secs(1);
/// How often an instance that runs a oneway call is asked again.
const ASK_EVERY: Duration = Duration::from_secs(5);
/// After this time without an answer, the instance counts as gone.
const SILENCE: Duration = Duration::from_secs(15);
/// Receives what other instances say about one call, until it is dropped.
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

/// A oneway call whose handler has ended. If its outcome was told to nobody when this is dropped, those who wait are
/// told that it failed: it is requeued, and this instance does not look after it any more.
pub(super) struct Ended {
    worker: Arc<Worker>,
    id: Uuid,
}

impl Ended {
    pub(super) fn of(worker: &Arc<Worker>, id: Uuid) -> Self {
        Self { worker: worker.clone(), id }
    }
}

impl Drop for Ended {
    fn drop(&mut self) {
        let Self { worker, id } = self;
        let mut claims = worker.claims();
        if !claims.is_ending(*id) {
            return;
        }
        let others = claims.end(*id, &Heard::Failed, false);
        drop(claims);
        others.into_iter().for_each(|queue| worker.say(*id, &Heard::Failed, queue));
    }
}

impl Worker {
    /// Answers another instance that asks whether a call runs here.
    pub(super) fn locate(&self, id: Uuid, message: &Message) {
        let Some(queue) = message.reply_to.clone() else { return };
        let heard = {
            let mut claims = self.claims();
            let source = self.source(&claims, id);
            claims.asked(id, queue.clone(), source)
        };
        if let Some(heard) = heard {
            self.say(id, &heard, queue);
        }
    }

    /// Whether a call runs here, or its outcome has not reached the broker yet.
    pub(super) fn runs(&self, id: Uuid) -> bool {
        self.source(&self.claims(), id).is_some()
    }

    /// The queue that such a call came from. The caller holds the claims, so the call cannot end in between.
    fn source(&self, claims: &Claims, id: Uuid) -> Option<Source> {
        self.calls().source(id).or_else(|| claims.is_ending(id).then_some(Source::Work))
    }

    /// A oneway call, or something else from its queue, is done and must not run again.
    pub(super) fn done(&self, id: Uuid, end: MessageEnd, message: &Message) {
        if message.source == Source::Work {
            if message.frames > 1 {
                message.note_done(id, end);
            }
            self.tell_holders(id, &Heard::Ended(end), message);
            if message.frames > 1 && message.is_taken_back() {
                let mut claims = self.claims();
                message.done().iter().for_each(|&(id, end)| claims.remember(id, end));
            }
        }
        message.finish();
    }

    /// A oneway call has failed. If another instance has a delivery of it, that instance looks after the next attempt.
    /// Returns whether there is one; otherwise the call is still this instance's task.
    pub(super) fn hand_over(&self, id: Uuid, message: &Message) -> bool {
        let is_held = message.is_taken_back() || self.claims().is_held(id);
        if is_held {
            self.tell_holders(id, &Heard::Failed, message);
        }
        is_held
    }

    /// Tells the instances that have another delivery of a oneway call how it has ended.
    fn tell_holders(&self, id: Uuid, heard: &Heard, message: &Message) {
        let lost = message.is_taken_back();
        let others = self.claims().end(id, heard, lost);
        others.into_iter().for_each(|queue| self.say(id, heard, queue));
    }

    /// Tells another instance what is known of a call.
    fn say(&self, id: Uuid, heard: &Heard, queue: Arc<str>) {
        let (kind, status) = match heard {
            Heard::Runs(_) => (Kind::KeepAlive, Code::Ok),
            Heard::Ended(MessageEnd::Over) => (Kind::Reply, Code::Ok),
            Heard::Ended(MessageEnd::Moved(_)) => (Kind::Reply, Code::Cancelled),
            Heard::Failed => (Kind::Reply, Code::Unknown),
        };
        let mut metadata = Metadata { instance: Some(self.site.instance.clone()), ..Metadata::default() };
        if let Heard::Ended(MessageEnd::Moved(attempt)) = heard {
            metadata.more_mut().attempt = Some(*attempt);
        }
        let frame = Frame { status, ..Frame::new(kind, id, Codec::Raw, metadata, Bytes::new()) };
        self.site.replies.tell(queue, id, frame.to_body());
    }

    /// Asks the other instances whether they run these redelivered calls, and then decides about each.
    pub(super) async fn ask_first(self: Arc<Self>, jobs: Vec<Job>) {
        let Some(message) = jobs.first().map(|job| job.message.clone()) else { return };
        let ids: Vec<Uuid> = jobs.iter().map(|job| job.frame.id).collect();
        let listening = jobs.into_iter().map(|job| (Listener::of(&self, job.frame.id), job)).collect::<Vec<_>>();
        self.ask(&ids, &Recipients::All, &message).await;
        let asked_at = Instant::now();
        let deciding = listening.into_iter().map(|(heard, job)| self.clone().decide(job, heard, asked_at));
        futures::future::join_all(deciding).await;
    }

    /// Publishes the question who runs these calls. Returns whether it certainly reached nobody.
    async fn ask(&self, ids: &[Uuid], recipients: &Recipients, message: &Message) -> bool {
        let mut body = Vec::new();
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
        let asked = self.site.exchanges.locate(recipients, &self.name);
        let asking = message.transport.publish(asked.publication(properties, body.into()));
        // A blocked broker does not answer.
        let said = tokio::time::timeout(NOBODY_WAITS, asking).await;
        matches!(said, Ok(Ok(Confirm::Returned | Confirm::Refused)))
    }

    /// Decides about a redelivered call by what is heard of it in time.
    async fn decide(self: Arc<Self>, job: Job, mut heard: Listener, asked_at: Instant) {
        let is_request = job.frame.kind == Kind::Request;
        let patience = if is_request { CALLER_WAITS } else { NOBODY_WAITS };
        let told = tokio::time::timeout_at(asked_at + patience, async {
            loop {
                match heard.next().await {
                    // This delivery is the copy that was published then, and another instance may run it.
                    Some(Heard::Ended(end)) if !end.ends(&job.frame, job.message.frames) => {}
                    told => return told,
                }
            }
        });
        match told.await {
            Ok(Some(Heard::Ended(_))) => job.message.finish(),
            // The instance that runs it will answer.
            Ok(Some(Heard::Runs(_))) if is_request => job.message.finish(),
            Ok(Some(Heard::Runs(instance))) => self.hold(job, heard, instance).await,
            Ok(Some(Heard::Failed) | None) | Err(_) => self.run_again(job).await,
        }
    }

    /// Keeps another delivery of a oneway call that runs on this instance, until it has ended.
    pub(super) async fn hold_here(self: Arc<Self>, job: Job) {
        let id = job.frame.id;
        let heard = Listener::of(&self, id);
        if self.runs(id) {
            let instance = self.site.instance.clone();
            return self.hold(job, heard, instance).await;
        }
        // The call has ended at this moment.
        let is_done = self.claims().is_done(&job.frame, job.message.frames);
        match is_done {
            true => job.message.finish(),
            false => self.run_again(job).await,
        }
    }

    /// Keeps a delivery of a oneway call that another instance runs, until it has ended there.
    async fn hold(self: Arc<Self>, job: Job, mut heard: Listener, mut instance: Arc<str>) {
        // This adds up pauses and does not look at the clock. After this process was suspended, answers may have
        // arrived that it has not read.
        let mut silent = Duration::ZERO;
        loop {
            tokio::select! {
                told = heard.next() => match told {
                    Some(Heard::Runs(by)) => (instance, silent) = (by, Duration::ZERO),
                    Some(Heard::Ended(end)) if end.ends(&job.frame, job.message.frames) => return job.message.finish(),
                    Some(Heard::Ended(_)) => {}
                    Some(Heard::Failed) | None => return self.run_again(job).await,
                },
                () = self.site.draining.cancelled() => return self.give_back(job).await,
                () = tokio::time::sleep(ASK_EVERY) => {
                    if job.message.is_taken_back() {
                        // The broker delivers it again, to any instance.
                        return;
                    }
                    if job.message.transport.blocked().is_some() {
                        // Under an alarm nobody can answer.
                        silent = Duration::ZERO;
                        continue;
                    }
                    silent += ASK_EVERY;
                    let gone = self.ask(&[job.frame.id], &Recipients::One(instance.to_string()), &job.message).await;
                    if gone || silent >= SILENCE {
                        return self.run_again(job).await;
                    }
                }
            }
        }
    }

    /// No instance is known to run a redelivered call. A request fails, since it may have run; a oneway call runs
    /// again.
    async fn run_again(self: Arc<Self>, job: Job) {
        match job.frame.kind {
            Kind::Request => {
                let method = job.frame.metadata.method.as_deref().unwrap_or_default();
                let why = format!("the instance that took `{}.{method}` went away: it may have run", self.name);
                self.refuse(job.frame, Fault::new(Code::Aborted, why), job.message).await;
            }
            // One of the message's calls may have killed the instance that had it. Each call is published again alone,
            // so that it cannot harm the others.
            _ if job.message.frames > 1 && job.turn.is_none() => self.give_back(job).await,
            _ => self.start_when_free(job, None).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::context::Context;
    use crate::exchanges::to_queue;
    use crate::frame;
    use crate::server::reading::Reading;
    use crate::server::served_queue::{Purpose, ServedQueue};
    use crate::server::{Running, Server};
    use crate::service::{Method, Service};
    use crate::topology::{Declaration, Queue, QueueKind, ServiceId};
    use crate::transport::{Consumer, Mode, Role, Settle, Transport};

    /// A worker that reads three queues, `work`, `calls` and `own`, and whoever asks it, at `asker`. Its dead letters, and its
    /// calls that are to run again, have no room yet.
    struct Asked {
        running: Running,
        worker: Arc<Worker>,
        transport: Transport,
        full: [String; 2],
        asker: Consumer,
    }

    impl Asked {
        async fn new() -> Self {
            let url = format!("memory://{}", Uuid::new_v4());
            let running = Server::connect(&url).await.expect("in memory").start().await.expect("it serves nothing");
            let refuse = |_: Context, _: (u64,)| async { Err::<(), _>(Fault::new(Code::InvalidArgument, "never")) };
            let fail = |_: Context, _: (u64,)| async { Err::<(), _>(Fault::new(Code::Internal, "not yet")) };
            let wait = |_: Context, _: (u64,)| std::future::pending::<Result<(), Fault>>();
            let service = Service::new("work", 1).method(Method::new("refuse").oneway(), refuse);
            let service = service.method(Method::new("fail").oneway(), fail).method("wait", wait);
            let id = ServiceId::parse("work").expect("a name");
            let (site, purposes) = (running.site.clone(), Purpose::of_service(&id, &service));
            let worker = Worker::new(&id, "work.v1".into(), service, site).expect("no threads of its own");
            let namespace = &running.site.namespace;
            let (worker, full) = (Arc::new(worker), [namespace.dead_queue(&id), namespace.retry_queue(&id)]);
            let transport = Transport::connect(&url, Role::Client).await.expect("in memory");
            let of_one = |name: &String| Queue { max_length: Some(1), ..Queue::new(name, QueueKind::Classic) };
            let queues = ["work", "calls", "own", "asker"].map(|name| Queue::new(name, QueueKind::Classic));
            let queues: Vec<_> = queues.into_iter().chain(full.iter().map(of_one)).map(Declaration::Queue).collect();
            transport.declare(&queues).await.expect("new queues");
            let reading = Arc::new(Reading::over(1, transport.clone()));
            for (number, (name, purpose)) in ["own", "calls", "work"].into_iter().zip(purposes).enumerate() {
                let consumer = transport.consume(name, Mode::Settle { prefetch: 8 }).await.expect("it is there");
                let queue = Arc::new({
                    let end = worker.end_of(purpose.source());
                    ServedQueue::new(number, purpose, end)
                });
                let stop = reading.part(&queue).stop;
                tokio::spawn(worker.clone().run(consumer, reading.clone(), queue, stop));
            }
            let asker = transport.consume("asker", Mode::NoAck).await.expect("it is there");
            let asked = Self { running, worker, transport, full, asker };
            for queue in &asked.full {
                asked.publish(queue, Bytes::new()).await;
            }
            asked
        }

        async fn publish(&self, queue: &str, body: Bytes) {
            let properties = Properties { reply_to: Some("asker".to_owned()), ..Properties::default() };
            assert_eq!(
                self.transport.publish(to_queue(queue.to_owned(), properties, body)).await,
                Ok(Confirm::Accepted)
            );
        }

        /// Sends a frame, and lets what comes of it happen.
        async fn send(&self, queue: &str, kind: Kind, id: Uuid, method: &str) {
            let metadata = Metadata { method: Some(method.into()), ..Metadata::default() };
            let frame = Frame::new(kind, id, Codec::Json, metadata, Bytes::from_static(b"[1]"));
            self.publish(queue, frame.to_body()).await;
            tokio::time::sleep(Duration::from_millis(1)).await;
        }

        /// What the asker is told next: the kind of frame, its status, and for which attempt.
        async fn told(&mut self) -> (Kind, Code, u64) {
            let told = tokio::time::timeout(Duration::from_secs(60), self.asker.next());
            let body = told.await.expect("it is told something").expect("it is connected").body;
            let frame = frame::decode(body).next().expect("a frame").expect("a good one");
            (frame.kind, frame.status, frame.metadata.attempt())
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_whose_dead_letter_or_copy_waits_for_the_broker_counts_as_running_until_it_is_taken_or_goes_back() {
        let refused = ("refuse", 0, (Kind::Reply, Code::Ok, 1));
        let failed = ("fail", 1, (Kind::Reply, Code::Cancelled, 2));
        for ((method, full, end), goes_back) in [(refused, false), (refused, true), (failed, false), (failed, true)] {
            let (mut asked, id) = (Asked::new().await, Uuid::new_v4());
            asked.send("work", Kind::Oneway, id, method).await;
            assert_eq!(asked.worker.calls().tally(), (0, 1), "its handler has ended");
            asked.send("own", Kind::Locate, id, "").await;
            assert_eq!(asked.told().await, (Kind::KeepAlive, Code::Ok, 1), "{method}");
            if goes_back {
                asked.running.site.draining.cancel();
                assert_eq!(asked.told().await, (Kind::Reply, Code::Unknown, 1), "{method}");
            } else {
                let first = asked.transport.get(&asked.full[full]).await.expect("an answer").expect("what fills it");
                first.settle(Settle::Ack);
                assert_eq!(asked.told().await, end, "{method}");
            }
            let claims = asked.worker.claims();
            assert!(claims.are_quiet(), "{claims:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_asks_for_a_call_whose_end_nobody_is_told_leaves_nothing_behind() {
        let (mut asked, id) = (Asked::new().await, Uuid::new_v4());
        asked.send("calls", Kind::Request, id, "wait").await;
        asked.send("own", Kind::Locate, id, "").await;
        assert_eq!(asked.told().await, (Kind::KeepAlive, Code::Ok, 1));
        assert!(asked.worker.claims().are_quiet());
    }
}
