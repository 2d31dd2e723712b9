//! Publishing on one connection: in order, on one channel in confirm mode.
//!
//! Whoever publishes writes to the socket itself, as long as nothing has to wait. A task does what has to wait: it asks
//! the broker who this user is and whether an exchange exists, opens another channel when the broker has closed one,
//! and finds the outcome of what was in flight.

use std::collections::VecDeque;
use std::future::Future;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::StreamExt as _;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use lapin::Channel;
use lapin::options::ConfirmSelectOptions;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::connection::{CLOSE_TIMEOUT, Link, Refusal};
use super::declare;
use super::exchanges::{Admitted, ExchangeChecks, KnownExchanges};
use super::user::User;
use super::wire::{ChannelClosed, Submitted, Unfinished};
use super::words::{forbidden_exchange, largest_message};
use crate::transport::{Confirm, Loss, Lost, Publication, ReceiptSender};

/// The most publications that the task takes at once.
const BATCH: usize = 256;

/// The reason for publications that are given up when the connection is closed.
const UNCONFIRMED: &str = "the broker did not confirm in time before the connection was closed";

/// Where publications are handed in.
#[derive(Debug)]
pub(super) struct Publisher {
    link: Arc<Link>,
    user: Arc<User>,
    known: KnownExchanges,
    entry: Arc<Mutex<Entry>>,
}

/// How publications get in. Whoever publishes holds the lock, so they leave in the order in which they were handed in.
#[derive(Debug)]
struct Entry {
    /// The channel on which they are published at once. `None` while something waits: then they go to the task.
    open: Option<u16>,
    /// To the task.
    waiting: mpsc::UnboundedSender<Submitted>,
}

impl Publisher {
    /// Makes a publisher, and the task that does for it what has to wait. The caller has to spawn the task. It runs
    /// until the connection ends, or until `closing` is cancelled and everything is confirmed.
    ///
    /// `channel` has to be in confirm mode. If `introduced_within` is given, the broker is asked for the `user` now,
    /// for this long at most. Otherwise it is asked before the first publication.
    pub(super) async fn open(
        link: Arc<Link>,
        channel: Channel,
        user: Arc<User>,
        introduced_within: Option<Duration>,
        known: KnownExchanges,
        closing: CancellationToken,
    ) -> Result<(Self, impl Future<Output = ()> + Send), Refusal> {
        let (waiting, queue) = mpsc::unbounded_channel();
        let mut lane = PublishChannel { channel, published: 0 };
        if let Some(within) = introduced_within
            && let Ok(asked) = tokio::time::timeout(within, lane.ask(&link, &user)).await
            && !asked?
        {
            lane = PublishChannel::open(&link).await?;
        }
        let entry = Arc::new(Mutex::new(Entry { open: None, waiting }));
        let (unsent, questions) = (VecDeque::new(), FuturesUnordered::new());
        let (exchanges, out) = (ExchangeChecks::new(known.clone()), entry.clone());
        let task = PublisherTask {
            link: link.clone(),
            user: user.clone(),
            closing,
            entry: out,
            queue,
            unsent,
            exchanges,
            questions,
        };
        Ok((Self { link, user, known, entry }, task.run(lane)))
    }

    /// Hands a publication in. Publications are sent in the order in which they were handed in.
    pub(super) fn submit(&self, publication: Publication, outcome: ReceiptSender) {
        let mut handed = Submitted { publication, outcome };
        let mut entry = self.entry.lock().expect("no panic while holding the entry");
        if let Some(channel) = entry.open
            && self.known.has(&handed.publication.exchange)
        {
            match self.link.wire().push(channel, self.user.name(), handed) {
                Ok(()) => {
                    drop(entry);
                    return self.link.wire().write();
                }
                Err(back) => handed = *back,
            }
        }
        entry.open = None;
        if let Err(mpsc::error::SendError(handed)) = entry.waiting.send(handed) {
            let reason = self.link.ended().unwrap_or_else(|| "the connection is closing".into());
            handed.tell(Err(Lost::connection(false, reason)));
        }
    }
}

/// A channel in confirm mode, and how many messages were published on it before the wire knew of it.
struct PublishChannel {
    channel: Channel,
    published: u64,
}

impl PublishChannel {
    async fn open(link: &Link) -> Result<Self, Refusal> {
        Ok(Self { channel: confirming(link).await?, published: 0 })
    }

    /// Asks the broker who this user is. Returns whether the channel is still open.
    async fn ask(&mut self, link: &Link, user: &User) -> Result<bool, Refusal> {
        self.published += 1;
        user.ask(link, &self.channel).await
    }
}

/// Opens a channel in confirm mode: the broker confirms each message that is published on it.
pub(super) async fn confirming(link: &Link) -> Result<Channel, Refusal> {
    let channel = link.channel().await?;
    link.ask(channel.confirm_select(ConfirmSelectOptions::default())).await?;
    Ok(channel)
}

/// The task behind a [`Publisher`].
struct PublisherTask {
    link: Arc<Link>,
    user: Arc<User>,
    closing: CancellationToken,
    entry: Arc<Mutex<Entry>>,
    /// What was handed in and has to wait.
    queue: mpsc::UnboundedReceiver<Submitted>,
    /// What is published before `queue`: publications that had not left when their channel ended, and those that had
    /// to wait until it was known whether their exchange exists.
    unsent: VecDeque<Submitted>,
    /// The publications that wait until it is known whether their exchange exists.
    exchanges: ExchangeChecks<Submitted>,
    /// The questions to the broker whether an exchange exists.
    questions: FuturesUnordered<BoxFuture<'static, (String, bool)>>,
}

/// Why a channel is not used any more.
enum Over {
    /// Everything is confirmed, and nothing more will be handed in.
    Done,
    /// The broker has closed the channel, with these words. The connection goes on.
    Channel(Arc<str>),
    /// The same, when it was asked who this user is. Nothing was published before.
    Question,
    /// The connection has ended.
    Connection(Arc<str>),
}

impl PublisherTask {
    /// Publishes on one channel after the other, until everything is done or the connection ends.
    async fn run(mut self, mut lane: PublishChannel) {
        let reason = loop {
            let over = self.publish_on(&mut lane).await;
            self.entry.lock().expect("no panic while holding the entry").open = None;
            let unfinished = self.link.wire().take_unfinished(lane.channel.id()).await;
            match over {
                Over::Question => {}
                Over::Done => return declare::close(&self.link, &lane.channel).await,
                Over::Connection(reason) => {
                    self.find_outcomes(unfinished, &reason, Loss::Connection);
                    break reason;
                }
                Over::Channel(reason) => {
                    warn!(name = self.link.name(), %reason, failed = unfinished.len(), "the broker closed a publishing channel");
                    self.exchanges.channel_closed(&reason);
                    self.find_outcomes(unfinished, &reason, Loss::Channel);
                }
            }
            match PublishChannel::open(&self.link).await {
                Ok(fresh) => lane = fresh,
                Err(Refusal::Ended(reason)) => break reason,
                Err(refusal) => break refusal.during("open a channel").to_string().into(),
            }
        };
        if self.link.ended().is_none() && !self.closing.is_cancelled() {
            // A connection on which no channel can be opened is of no use.
            self.link.give_up(reason.clone());
        }
        self.queue.close();
        self.unsent.extend(self.exchanges.drain());
        while let Some(handed) = self.unsent.pop_front().or_else(|| self.queue.try_recv().ok()) {
            handed.tell(Err(Lost::connection(false, reason.clone())));
        }
    }

    /// Lets messages be published on a channel, until it is not used any more.
    async fn publish_on(&mut self, lane: &mut PublishChannel) -> Over {
        let (link, closing) = (self.link.clone(), self.closing.clone());
        let channel = lane.channel.id();
        let mut closed = self.user.is_known().then(|| link.wire().publish_on(channel, lane.published));
        let mut waiting = Vec::new();
        let mut end = std::pin::pin!(link.end());
        let mut last = std::pin::pin!(async {
            closing.cancelled().await;
            tokio::time::sleep(CLOSE_TIMEOUT).await;
        });
        loop {
            if !self.unsent.is_empty() && closed.is_none() {
                if let Some(over) = self.introduce(lane).await {
                    return over;
                }
                closed = Some(link.wire().publish_on(channel, lane.published));
            }
            self.publish_waiting(channel, closed.is_some());
            let no_more = self.queue.is_closed() && self.queue.is_empty();
            let is_done = no_more && self.unsent.is_empty() && !self.exchanges.is_waited_for();
            tokio::select! {
                biased;
                told = told(&mut closed) => {
                    let ChannelClosed { text, .. } = told;
                    return match link.ended() {
                        Some(reason) => Over::Connection(reason),
                        None if text.is_empty() => Over::Channel("the broker closed the channel".into()),
                        None => Over::Channel(text.into()),
                    };
                }
                reason = &mut end => {
                    debug!(name = link.name(), %reason, "publishing ends with its connection");
                    return Over::Connection(reason);
                }
                () = &mut last => return Over::Connection(UNCONFIRMED.into()),
                Some((exchange, there)) = self.questions.next(), if !self.questions.is_empty() => {
                    self.answered(&exchange, there);
                }
                taken = self.queue.recv_many(&mut waiting, BATCH), if !no_more => {
                    if taken == 0 {
                        self.queue.close();
                    }
                    self.unsent.extend(waiting.drain(..));
                }
                () = closing.cancelled(), if !self.queue.is_closed() => {
                    self.entry.lock().expect("no panic while holding the entry").open = None;
                    self.queue.close();
                }
                () = link.wire().all_confirmed(channel), if is_done => return Over::Done,
            }
        }
    }

    /// Publishes what waits. When nothing waits any more, whoever publishes does it alone again.
    fn publish_waiting(&mut self, channel: u16, is_open: bool) {
        while let Some(handed) = self.unsent.pop_front() {
            let Some(handed) = self.admit(handed) else { continue };
            let published = self.link.wire().publish(channel, self.user.name(), handed);
            if let Err(back) = published {
                // The end of the channel, or of the connection, is about to be seen.
                return self.unsent.push_front(*back);
            }
        }
        let mut entry = self.entry.lock().expect("no panic while holding the entry");
        if is_open && self.queue.is_empty() && !self.queue.is_closed() && !self.exchanges.is_waited_for() {
            entry.open = Some(channel);
        }
    }

    /// Asks the broker for the user. Returns what has ended, if the channel or the connection has.
    async fn introduce(&mut self, lane: &mut PublishChannel) -> Option<Over> {
        let too_late = async {
            self.closing.cancelled().await;
            tokio::time::sleep(CLOSE_TIMEOUT).await;
        };
        let over = tokio::select! {
            asked = lane.ask(&self.link, &self.user) => match asked {
                Ok(true) => return None,
                Ok(false) => return Some(Over::Question),
                Err(Refusal::Ended(reason)) => reason,
                Err(refusal) => refusal.during("tell who this user is").to_string().into(),
            },
            reason = self.link.end() => reason,
            () = too_late => UNCONFIRMED.into(),
        };
        Some(Over::Connection(over))
    }

    /// Returns the publication if its exchange is known to exist. Otherwise keeps it, and asks the broker.
    fn admit(&mut self, handed: Submitted) -> Option<Submitted> {
        let exchange = handed.publication.exchange.clone();
        match self.exchanges.admit(&exchange, handed) {
            Admitted::Goes(handed) => return Some(handed),
            Admitted::Waits { ask: false } => {}
            Admitted::Waits { ask: true } => {
                let link = self.link.clone();
                self.questions.push(Box::pin(async move {
                    // If the broker does not tell, publishing will.
                    let there = declare::exchange_exists(&link, &exchange).await.unwrap_or(true);
                    (exchange, there)
                }));
            }
        }
        None
    }

    /// Publishes what has waited for an exchange that exists. If it does not exist, its publications are returned.
    fn answered(&mut self, exchange: &str, there: bool) {
        let waited = self.exchanges.answered(exchange, there);
        if there {
            return self.unsent.extend(waited);
        }
        waited.into_iter().for_each(|handed| handed.tell(Ok(Confirm::Returned)));
    }

    /// Tells the outcome of what was in flight when a channel or the connection ended. What has not left is published
    /// on the next channel.
    fn find_outcomes(&mut self, unfinished: Vec<Unfinished>, reason: &Arc<str>, loss: Loss) {
        let (largest, forbidden) = (largest_message(reason), forbidden_exchange(reason));
        let is_forbidden = |publication: &Publication| {
            forbidden.is_some_and(|(exchange, key)| {
                publication.exchange == exchange && key.is_none_or(|key| publication.key == key)
            })
        };
        let is_connected = loss == Loss::Channel;
        let mut unsent = VecDeque::new();
        for Unfinished { handed, has_left, returned } in unfinished {
            let what = match largest {
                _ if returned => Ok(Confirm::Returned),
                _ if !has_left => {
                    unsent.push_back(handed);
                    continue;
                }
                Some(largest) if handed.publication.body.len() > largest => Ok(Confirm::TooLarge(largest)),
                // After a first permitted message, the broker checks the permission later and does not confirm. So it
                // has not accepted this one.
                _ if is_forbidden(&handed.publication) => {
                    let loss = if is_connected { Loss::Refused } else { Loss::Unsent };
                    Err(Lost { loss, reason: reason.clone() })
                }
                _ => Err(Lost { loss, reason: reason.clone() }),
            };
            handed.tell(what);
        }
        unsent.append(&mut self.unsent);
        self.unsent = unsent;
    }
}

/// Waits until the broker closes the channel. Never resolves while the wire does not know of it.
async fn told(closed: &mut Option<oneshot::Receiver<ChannelClosed>>) -> ChannelClosed {
    match closed {
        Some(closed) => closed.await.unwrap_or_default(),
        None => std::future::pending().await,
    }
}
