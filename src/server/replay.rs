//! Replay: a subscription that begins in the past reads the events of its pattern from a stream, and goes on with those that
//! come.
//!
//! In a group one instance at a time reads the stream: the one that holds the group's baton, a message of which there is one.
//! It keeps how far the group has come in a queue of its own, after the handlers have ended. What fails is tried again and
//! kept as any other event of a group.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use tokio::sync::mpsc::{self, UnboundedReceiver};
use tokio_util::task::TaskTracker;
use tracing::{debug, info, warn};

use super::Site;
use super::health::Trouble;
use super::reading::Reading;
use super::served_queue::ServedQueue;
use super::worker::Worker;
use crate::error::Error;
use crate::exchanges::to_queue;
use crate::frame;
use crate::limits::ANSWER_TIMEOUT;
use crate::service::{Replay, ReplaySettings};
use crate::topology::Binding;
use crate::transport::{
    Confirm, Consumer, Delivery, Dial, Mode, Properties, Role, Settle, Settler, StreamStart, Transport,
};

/// How often it is kept how far a group has come.
const KEEP_EVERY: Duration = Duration::from_millis(250);
/// How often the stream and its binding are declared anew, since somebody may have deleted the binding.
const DECLARE_EVERY: Duration = Duration::from_secs(10);
/// The pause before the stream is read again. It doubles each time.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
/// The longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// The pause while somebody else has taken out how far a group has come.
const LOOKED_INTO: Duration = Duration::from_millis(50);
/// How far the clocks of publishers may be behind the broker's: so much earlier a replay by time begins to look.
const CLOCKS: Duration = Duration::from_secs(60);

/// Reads the stream of one subscription, for as long as the server serves.
pub(super) struct Replayer {
    site: Arc<Site>,
    dial: Dial,
    worker: Arc<Worker>,
    queue: Arc<ServedQueue>,
    settings: ReplaySettings,
    /// Where it goes on, if it has begun. A group keeps that at the broker.
    next: Option<u64>,
    /// The position behind all events that were ever delivered here.
    seen: u64,
    /// The position of the next event, if it is known before that comes.
    expected: Option<u64>,
}

/// What has been read of a stream and what of it is handled.
#[derive(Default)]
struct Progress {
    /// The events that are not handled yet, by their position.
    open: BTreeMap<u64, Option<Settler>>,
    /// The position behind the last one that was read.
    read: u64,
}

impl Progress {
    fn reads(&mut self, position: u64, settler: Option<Settler>) {
        self.open.insert(position, settler);
        self.read = self.read.max(position + 1);
    }

    /// One is handled. What is read before it may still be open.
    fn ends(&mut self, position: u64) {
        if let Some(settler) = self.open.remove(&position).flatten() {
            settler.settle(Settle::Ack);
        }
    }

    /// All before this position is handled.
    fn done(&self) -> u64 {
        self.open.keys().next().copied().unwrap_or(self.read)
    }
}

impl Replayer {
    pub(super) fn new(site: Arc<Site>, dial: Dial, worker: Arc<Worker>, queue: Arc<ServedQueue>) -> Option<Self> {
        let settings = worker.service.replay.clone()?;
        Some(Self { site, dial, worker, queue, settings, next: None, seen: 0, expected: None })
    }

    /// Reads until the server drains, or has unsubscribed. What is handled then is waited for.
    pub(super) async fn run(mut self) {
        let ending = self.worker.ending.clone();
        let trouble = Trouble::Replay(self.worker.name.clone());
        let mut pause = FIRST_PAUSE;
        while !ending.is_cancelled() {
            let seen = self.seen;
            if let Err(error) = self.read().await {
                let pattern = self.worker.service.pattern.as_deref().unwrap_or_default();
                let stream = self.site.namespace.kept_stream(pattern);
                self.site.health.suffers(trouble.clone(), format!("the stream `{stream}` is not read: {error}"));
            }
            pause = if self.seen > seen { FIRST_PAUSE } else { (pause * 2).min(LONGEST_PAUSE) };
            tokio::select! {
                () = ending.cancelled() => {}
                () = tokio::time::sleep(pause) => {}
            }
        }
        self.site.health.cured(&trouble);
    }

    /// Reads over a connection of its own: while a stream is not ready, as after a restart, RabbitMQ ends the connection of
    /// who asks for it, which must not be that of calls.
    async fn read(&mut self) -> Result<(), Error> {
        let ending = self.worker.ending.clone();
        let connecting = self.dial.connect(Role::Client);
        let transport = tokio::select! {
            () = ending.cancelled() => return Ok(()),
            transport = connecting => transport?,
        };
        let read = self.read_over(&transport).await;
        transport.close().await;
        read
    }

    async fn read_over(&mut self, transport: &Transport) -> Result<(), Error> {
        let ending = self.worker.ending.clone();
        let beginning = async {
            transport.declare(&self.site.namespace.exchanges()).await?;
            transport.declare(&self.settings.declarations(&self.site.namespace, &self.worker.id)).await?;
            let baton = if self.worker.id.is_group() { Some(self.baton(transport).await?) } else { None };
            Ok::<_, Error>((baton, self.begin(transport).await?))
        };
        let (baton, (start, since)) = tokio::select! {
            () = ending.cancelled() => return Ok(()),
            begun = beginning => begun?,
        };
        let pattern = self.worker.service.pattern.clone().unwrap_or_default();
        let mode = Mode::Stream { from: start, prefetch: self.worker.prefetch() };
        let mut stream = transport.consume(&self.site.namespace.kept_stream(&pattern), mode).await?;
        info!(name = &*self.site.name, subscription = &*self.worker.name, pattern, from = ?start, "reads events from their stream");
        self.site.health.cured(&Trouble::Replay(self.worker.name.clone()));
        self.expected = if let StreamStart::Offset(offset) = start { Some(offset) } else { None };
        self.follow(transport, &mut stream, baton.as_ref(), since).await
    }

    /// Waits until this instance is the one of its group that reads, and so until no other is.
    async fn baton(&self, transport: &Transport) -> Result<Consumer, Error> {
        let Site { namespace, .. } = &*self.site;
        let (group, turn) = (&self.worker.id, namespace.turn_queue(&self.worker.id));
        // A release before this one may have had the group's queue get the events.
        if let Some(pattern) = &self.worker.service.pattern {
            let (exchange, key) = (namespace.events(), pattern.clone());
            transport.unbind(&[Binding { exchange, key, queue: namespace.work_queue(group) }]).await?;
        }
        let mut consumer = transport.consume(&turn, Mode::SettleAnyTime { prefetch: 1 }).await?;
        // If there is one already, this is refused, or is one more that nobody minds: only one consumer gets any.
        let baton = to_queue(turn, Properties { persistent: true, ..Properties::default() }, Bytes::new());
        published(transport, baton).await?;
        // It is never settled: whoever has it has it until the connection ends.
        match consumer.next().await {
            Some(_) => Ok(consumer),
            None => Err(Error::refused("give the group's turn to this instance", "the consumer has ended")),
        }
    }

    /// Where to begin, and the earliest time of an event that is meant, in milliseconds since 1970.
    async fn begin(&self, transport: &Transport) -> Result<(StreamStart, Option<u64>), Error> {
        let kept = if self.worker.id.is_group() { self.kept(transport).await? } else { self.next };
        let pattern = self.worker.service.pattern.as_deref().unwrap_or_default();
        let stream = self.site.namespace.kept_stream(pattern);
        if let Some(next) = kept {
            let last = transport.last_offset(&stream).await?;
            if next <= last.map_or(0, |last| last + 1) {
                return Ok((StreamStart::Offset(next), None));
            }
            let (name, subscription) = (&*self.site.name, &*self.worker.name);
            warn!(
                name,
                subscription,
                stream,
                next,
                last,
                "the stream ends before where it was read to, as one that was deleted: it is read from its start"
            );
            return Ok((StreamStart::First, None));
        }
        Ok(match self.settings.from {
            Replay::Start => (StreamStart::First, None),
            Replay::Offset(offset) => (StreamStart::Offset(offset), None),
            Replay::Ago(time) => {
                let since = self.settings.made_at.saturating_sub(u64::try_from(time.as_millis()).unwrap_or(u64::MAX));
                let look = SystemTime::UNIX_EPOCH + Duration::from_millis(since).saturating_sub(CLOCKS);
                (StreamStart::Time(look), Some(since))
            }
            Replay::Last => match transport.last_offset(&stream).await? {
                Some(last) => (StreamStart::Offset(last), None),
                None => (StreamStart::First, None),
            },
        })
    }

    /// How far the group has come: the position of the first event that is not handled.
    async fn kept(&self, transport: &Transport) -> Result<Option<u64>, Error> {
        let queue = self.site.namespace.offset_queue(&self.worker.id);
        // Who looks after groups may have taken it out for a moment. It consumes the queue until it has brought it back.
        let is_looked_into =
            async || Ok::<_, Error>(transport.look_at(&queue).await?.is_some_and(|offsets| offsets.consumers > 0));
        loop {
            let before = is_looked_into().await?;
            let kept = self.taken(transport, &queue).await?;
            if kept.is_some() || !(before || is_looked_into().await?) {
                return Ok(kept);
            }
            tokio::time::sleep(LOOKED_INTO).await;
        }
    }

    /// The latest of the offsets in this queue.
    async fn taken(&self, transport: &Transport, queue: &str) -> Result<Option<u64>, Error> {
        let mut latest: Option<(u64, Delivery)> = None;
        while let Some(delivery) = transport.get(queue).await? {
            let offset = std::str::from_utf8(&delivery.body).ok().and_then(|text| text.parse().ok());
            let earlier = match (offset, &latest) {
                (Some(offset), None) => {
                    latest = Some((offset, delivery));
                    continue;
                }
                (Some(offset), Some((before, _))) if offset > *before => {
                    latest.replace((offset, delivery)).map(|(_, before)| before)
                }
                _ => Some(delivery),
            };
            earlier.into_iter().for_each(|earlier| earlier.settle(Settle::Ack));
        }
        Ok(latest.map(|(offset, delivery)| {
            delivery.settle(Settle::GiveBack);
            offset
        }))
    }

    /// Handles what the stream has, until it ends or the server drains or has unsubscribed.
    async fn follow(
        &mut self,
        transport: &Transport,
        stream: &mut Consumer,
        baton: Option<&Consumer>,
        mut since: Option<u64>,
    ) -> Result<(), Error> {
        let worker = self.worker.clone();
        let reading = Reading::over(0, transport.clone());
        let (settler, mut settled) = mpsc::unbounded_channel();
        let (tasks, mut progress) = (TaskTracker::new(), Progress::default());
        let mut kept = self.next;
        let mut tick = tokio::time::interval(KEEP_EVERY);
        let mut again = tokio::time::interval(DECLARE_EVERY);
        let lost = |what| Err(Error::refused("deliver the events of a stream", what));
        let baton_is_lost = async {
            match baton {
                Some(baton) => drop(baton.ended().await),
                None => std::future::pending().await,
            }
        };
        tokio::pin!(baton_is_lost);
        loop {
            tokio::select! {
                biased;
                () = worker.ending.cancelled() => break,
                () = &mut baton_is_lost => return lost("another instance of the group may read it now"),
                Some((position, settle)) = settled.recv() => match settle {
                    Settle::Ack | Settle::Discard => progress.ends(position),
                    // It could neither be handled nor put elsewhere. From there on the stream is read again.
                    Settle::GiveBack | Settle::Failed => return lost("an event has to come again"),
                },
                _ = tick.tick() => self.keep(transport, &progress, &mut kept).await?,
                _ = again.tick() => {
                    transport.declare(&self.settings.declarations(&self.site.namespace, &worker.id)).await?;
                }
                delivery = stream.next() => {
                    let Some(mut delivery) = delivery else { return lost("the consumer has ended") };
                    let Some(position) = delivery.offset else { return lost("the broker does not tell its position") };
                    if since.is_some_and(|since| is_before(&delivery, since)) {
                        delivery.settle(Settle::Ack);
                        continue;
                    }
                    since = None;
                    if let Some(missed) = self.expected.take().and_then(|expected| position.checked_sub(expected)).filter(|missed| *missed > 0) {
                        warn!(name = &*self.site.name, subscription = &*worker.name, missed, position, "the broker has deleted messages of events before they were read: have them kept for longer by `keep_for` or `keep_bytes`");
                    }
                    progress.reads(position, delivery.settler.take());
                    delivery.settler =
                        Some(Settler::Channel { tag: position, channel: settler.clone(), life: stream.life.clone() });
                    // It may still run here, or have run.
                    delivery.redelivered = position < self.seen;
                    self.seen = self.seen.max(position + 1);
                    worker.deliver(delivery, &reading, &self.queue, &tasks).await;
                }
            }
        }
        tasks.close();
        tasks.wait().await;
        drop(settler);
        self.end(&mut progress, &mut settled);
        self.keep(transport, &progress, &mut kept).await
    }

    /// Takes what was settled at the end. What goes back comes again to the next instance.
    fn end(&self, progress: &mut Progress, settled: &mut UnboundedReceiver<(u64, Settle)>) {
        while let Ok((position, settle)) = settled.try_recv() {
            if matches!(settle, Settle::Ack | Settle::Discard) {
                progress.ends(position);
            }
        }
        debug!(name = &*self.site.name, subscription = &*self.worker.name, next = progress.done(), "has read events");
    }

    /// Keeps how far it has come, if that has changed.
    async fn keep(&mut self, transport: &Transport, progress: &Progress, kept: &mut Option<u64>) -> Result<(), Error> {
        let done = progress.done();
        if progress.read == 0 || *kept == Some(done) {
            return Ok(());
        }
        if self.worker.id.is_group() {
            let properties = Properties { persistent: true, ..Properties::default() };
            let queue = self.site.namespace.offset_queue(&self.worker.id);
            match published(transport, to_queue(queue, properties, Bytes::from(done.to_string()))).await? {
                Confirm::Accepted => {}
                confirm => return Err(Error::refused("keep how far a group has come", format!("{confirm:?}"))),
            }
        }
        (*kept, self.next) = (Some(done), Some(done));
        Ok(())
    }
}

/// Publishes over a connection that publishes nothing else, and waits for what becomes of it.
async fn published(transport: &Transport, publication: crate::transport::Publication) -> Result<Confirm, Error> {
    match tokio::time::timeout(ANSWER_TIMEOUT, transport.publish(publication)).await {
        Ok(confirm) => Ok(confirm?),
        Err(_) => Err(Error::silent("confirm a message", ANSWER_TIMEOUT)),
    }
}

/// Whether all events of a message were published before this time, in milliseconds since 1970, by the clocks of their
/// publishers.
fn is_before(delivery: &Delivery, since: u64) -> bool {
    let frames = frame::decode(delivery.body.clone());
    frames.last().is_some_and(|last| last.is_ok_and(|frame| frame.metadata.sent_at.is_some_and(|sent| sent < since)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_done_ends_before_the_first_event_that_is_open() {
        let mut progress = Progress::default();
        assert_eq!(progress.done(), 0);
        for position in [5, 6, 7] {
            progress.reads(position, None);
        }
        progress.ends(6);
        assert_eq!(progress.done(), 5);
        progress.ends(5);
        assert_eq!(progress.done(), 7);
        progress.ends(7);
        assert_eq!(progress.done(), 8);
    }
}
