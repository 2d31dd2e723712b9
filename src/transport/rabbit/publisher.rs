//! Publishing: one task for each connection that publishes. It owns everything in flight, and tells the outcome of each
//! publication.

use std::collections::VecDeque;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use lapin::options::ConfirmSelectOptions;
use lapin::{Channel, ErrorKind};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::connection::{CLOSE_TIMEOUT, Link, Refusal};
use super::exchanges::{Admitted, ExchangeChecks, KnownExchanges};
use super::flight::{Flight, Outcome, PublishFate, Told, fly, lose, on_the_wire, said, tell};
use super::returns::{Returns, all_ended, ended_so_far};
use super::user::User;
use super::words::{forbidden_exchange, largest_message};
use super::{declare, words};
use crate::transport::{Confirm, Loss, Lost, Publication, Receipt};

/// The most publications that are started before the task looks at confirms again.
const BATCH: usize = 256;
/// How long the task waits for the outcomes of publications after their channel or connection has ended.
const TRICKLE: Duration = Duration::from_secs(1);

/// How late the outcome of a publication may be told if its caller is in no hurry.
const IN_PASSING: Duration = Duration::from_millis(1);

/// The reason for publications that are given up when the connection is closed.
const UNCONFIRMED: &str = "the broker did not confirm in time before the connection was closed";

/// Where publications are handed in.
#[derive(Debug)]
pub(super) struct Publisher {
    waiting: mpsc::UnboundedSender<Handed>,
    link: Arc<Link>,
}

impl Publisher {
    /// Makes a publisher, and the task that publishes for it. The caller has to spawn the task. It runs until the
    /// connection ends, or until `closing` is cancelled and everything is confirmed.
    ///
    /// `channel` has to be in confirm mode. If `introduced_within` is given, the broker is asked for the `user` now,
    /// for this long at most. Otherwise it is asked before the first publication.
    pub(super) async fn open(
        link: Arc<Link>,
        mut channel: Channel,
        user: Arc<User>,
        introduced_within: Option<Duration>,
        known: KnownExchanges,
        closing: CancellationToken,
    ) -> Result<(Self, impl Future<Output = ()> + Send), Refusal> {
        let (waiting, queue) = mpsc::unbounded_channel();
        if let Some(within) = introduced_within
            && let Ok(asked) = tokio::time::timeout(within, user.ask(&link, &channel)).await
            && !asked?
        {
            channel = confirming(&link).await?;
        }
        let (unsent, exchanges, questions) = (VecDeque::new(), ExchangeChecks::new(known), FuturesUnordered::new());
        let writer = Writer { link: link.clone(), user, closing, queue, unsent, exchanges, questions };
        Ok((Self { waiting, link }, writer.run(channel)))
    }

    /// Hands a publication in. Publications are sent in the order in which they were handed in.
    pub(super) fn publish(&self, publication: Publication, told: Told) -> Receipt {
        let (outcome, receipt) = Receipt::new();
        if let Err(mpsc::error::SendError((.., outcome))) = self.waiting.send((publication, told, outcome)) {
            let reason = self.link.ended().unwrap_or_else(|| "the connection is closing".into());
            lose(outcome, false, &reason);
        }
        receipt
    }
}

/// Opens a channel in confirm mode: the broker confirms each message that is published on it.
pub(super) async fn confirming(link: &Link) -> Result<Channel, Refusal> {
    let channel = link.channel().await?;
    link.ask(channel.confirm_select(ConfirmSelectOptions::default())).await?;
    Ok(channel)
}

/// A publication that was handed in.
type Handed = (Publication, Told, Outcome);

/// The task behind a [`Publisher`].
struct Writer {
    link: Arc<Link>,
    user: Arc<User>,
    closing: CancellationToken,
    /// What was handed in.
    queue: mpsc::UnboundedReceiver<Handed>,
    /// What is published before `queue`: publications that a channel has not sent before it ended, and those that had
    /// to wait until it was known whether their exchange exists.
    unsent: VecDeque<Handed>,
    /// The publications that wait until it is known whether their exchange exists.
    exchanges: ExchangeChecks<Handed>,
    /// The questions to the broker whether an exchange exists.
    questions: FuturesUnordered<BoxFuture<'static, (String, bool)>>,
}

/// Why a channel is not used any more.
enum Over {
    /// Everything is confirmed, and nothing more will be handed in.
    Done,
    /// The broker has closed the channel. The connection goes on.
    Channel,
    /// The connection has ended.
    Connection(Arc<str>),
}

impl Writer {
    /// Publishes on one channel after the other, until everything is done or the connection ends.
    async fn run(mut self, mut channel: Channel) {
        let reason = loop {
            match self.publish_on(&channel).await {
                Over::Done => return declare::close(&self.link, &channel).await,
                Over::Connection(reason) => break reason,
                Over::Channel => match confirming(&self.link).await {
                    Ok(fresh) => channel = fresh,
                    Err(Refusal::Ended(reason)) => break reason,
                    Err(refusal) => break refusal.during("open a channel").to_string().into(),
                },
            }
        };
        if self.link.ended().is_none() && !self.closing.is_cancelled() {
            // A connection on which no channel can be opened is of no use.
            self.link.give_up(reason.clone());
        }
        self.queue.close();
        self.unsent.extend(self.exchanges.drain());
        while let Some((.., outcome)) = self.unsent.pop_front().or_else(|| self.queue.try_recv().ok()) {
            lose(outcome, false, &reason);
        }
    }

    /// Publishes on `channel` until it is not used any more.
    async fn publish_on(&mut self, channel: &Channel) -> Over {
        let mut flights = FuturesUnordered::new();
        let mut returns = Returns::default();
        let mut number = 0;
        let mut waiting = Vec::with_capacity(BATCH);
        let mut draining = None;
        // How many of the publications in flight have callers in a hurry.
        let mut hurried = 0;
        let mut look = std::pin::pin!(tokio::time::sleep(IN_PASSING));
        let (link, closing) = (self.link.clone(), self.closing.clone());
        let mut end = std::pin::pin!(link.end());
        let mut asked_to_close = std::pin::pin!(closing.cancelled());
        loop {
            if flights.is_empty() {
                look.as_mut().reset(Instant::now() + IN_PASSING);
            }
            let idle = waiting.is_empty() && self.unsent.is_empty();
            if !idle && !self.user.is_known() {
                self.unsent.extend(waiting.drain(..));
                if let Some(over) = self.introduce(channel).await {
                    return over;
                }
            }
            // `FuturesUnordered` polls new futures in the order in which they were pushed, so they are sent in this
            // order.
            for handed in std::mem::take(&mut self.unsent).into_iter().chain(waiting.drain(..)) {
                let Some((publication, told, outcome)) = self.admit(handed) else { continue };
                number += 1;
                match on_the_wire(&publication, self.user.name(), number) {
                    Ok((properties, names)) => {
                        hurried += usize::from(told == Told::AtOnce);
                        flights.push(fly(channel.clone(), number, properties, names, publication, told, outcome));
                    }
                    Err(reason) => {
                        let reason = reason.into();
                        tell(outcome, Err(Lost { loss: Loss::Refused, reason }));
                    }
                }
            }
            let quiet = hurried == 0;
            if quiet {
                // This poll sends new publications, and finds those that have ended without waking the task.
                let ended = ended_so_far(&mut flights);
                let failed = decide(&mut returns, ended);
                if !failed.is_empty() {
                    return self.give_up(flights, returns, failed).await;
                }
            }
            let no_more = self.queue.is_closed() && self.queue.is_empty();
            if no_more && flights.is_empty() && !self.exchanges.is_waited_for() {
                return Over::Done;
            }
            tokio::select! {
                ended = all_ended(&mut flights), if !quiet => {
                    hurried -= ended.iter().filter(|flight| flight.told == Told::AtOnce).count();
                    let failed = decide(&mut returns, ended);
                    if !failed.is_empty() {
                        return self.give_up(flights, returns, failed).await;
                    }
                }
                () = &mut look, if quiet && !flights.is_empty() => look.as_mut().reset(Instant::now() + IN_PASSING),
                taken = self.queue.recv_many(&mut waiting, BATCH), if !no_more => {
                    if taken == 0 {
                        self.queue.close();
                    }
                }
                Some((exchange, there)) = self.questions.next(), if !self.questions.is_empty() => {
                    self.answered(&exchange, there);
                }
                reason = &mut end => {
                    debug!(name = self.link.name(), %reason, in_flight = flights.len(), "publishing ends with its connection");
                    return self.give_up(flights, returns, Vec::new()).await;
                }
                () = &mut asked_to_close, if draining.is_none() => {
                    self.queue.close();
                    draining = Some(Instant::now() + CLOSE_TIMEOUT);
                }
                () = tokio::time::sleep_until(draining.unwrap_or_else(Instant::now)), if draining.is_some() => {
                    return Over::Connection(UNCONFIRMED.into());
                }
            }
        }
    }

    /// Asks the broker for the user. Returns what has ended, if the channel or the connection has.
    async fn introduce(&mut self, channel: &Channel) -> Option<Over> {
        let too_late = async {
            self.closing.cancelled().await;
            tokio::time::sleep(CLOSE_TIMEOUT).await;
        };
        let over = tokio::select! {
            asked = self.user.ask(&self.link, channel) => match asked {
                Ok(true) => return None,
                Ok(false) => return Some(Over::Channel),
                Err(Refusal::Ended(reason)) => reason,
                Err(refusal) => refusal.during("tell who this user is").to_string().into(),
            },
            reason = self.link.end() => reason,
            () = too_late => UNCONFIRMED.into(),
        };
        Some(Over::Connection(over))
    }

    /// Returns the publication if its exchange is known to exist. Otherwise keeps it, and asks the broker.
    fn admit(&mut self, handed: Handed) -> Option<Handed> {
        let exchange = handed.0.exchange.clone();
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
        waited.into_iter().for_each(|(.., outcome)| tell(outcome, Ok(Confirm::Returned)));
    }

    /// Finds the outcome of every publication that was in flight on a channel that has ended. Those that were not sent
    /// are kept for the next channel.
    async fn give_up<F>(
        &mut self,
        mut flights: FuturesUnordered<F>,
        mut returns: Returns<Outcome>,
        mut failed: Vec<Flight>,
    ) -> Over
    where
        F: Future<Output = Flight>,
    {
        // The others fail as well, and each tells how far it got. A publication that does not end in time drops its
        // receipt, which counts as "may have been sent".
        let _ = tokio::time::timeout(TRICKLE, async {
            while !flights.is_empty() {
                failed.extend(decide(&mut returns, all_ended(&mut flights).await));
            }
        })
        .await;
        failed.sort_by_key(|flight| flight.number);
        let over = self.cause(&failed);
        let reason: Arc<str> = match &over {
            Over::Connection(reason) => reason.clone(),
            Over::Channel | Over::Done => {
                said(&failed).unwrap_or_else(|| "the broker closed the channel".into()).into()
            }
        };
        let (largest, forbidden) = (largest_message(&reason), forbidden_exchange(&reason));
        let connected = matches!(over, Over::Channel);
        let loss = if connected { Loss::Channel } else { Loss::Connection };
        if connected {
            warn!(name = self.link.name(), %reason, failed = failed.len(), "the broker closed a publishing channel");
            self.exchanges.channel_closed(&reason);
        }
        for Flight { number, told, outcome, fate } in failed {
            match fate {
                PublishFate::Unsent { publication, .. } => self.unsent.push_back((*publication, told, outcome)),
                PublishFate::Unknown { .. } if returns.ahead.contains(&number) => tell(outcome, Ok(Confirm::Returned)),
                PublishFate::Unknown { size, .. } if largest.is_some_and(|largest| size > largest) => {
                    tell(outcome, Ok(Confirm::TooLarge(largest.unwrap_or_default())));
                }
                // After a first permitted message, the broker checks the permission later and does not confirm. So it
                // has not accepted this one.
                PublishFate::Unknown { exchange, key, .. }
                    if forbidden
                        .is_some_and(|(name, topic)| name == exchange && topic.is_none_or(|topic| topic == key)) =>
                {
                    let loss = if connected { Loss::Refused } else { Loss::Unsent };
                    tell(outcome, Err(Lost { loss, reason: reason.clone() }));
                }
                PublishFate::Unknown { .. } | PublishFate::Confirmed { .. } => {
                    tell(outcome, Err(Lost { loss, reason: reason.clone() }));
                }
            }
        }
        for (_, _, outcome) in returns.held {
            tell(outcome, Err(Lost { loss, reason: reason.clone() }));
        }
        over
    }

    /// Whether the channel or the whole connection has ended, as the errors tell.
    fn cause(&self, failed: &[Flight]) -> Over {
        if let Some(reason) = self.link.ended() {
            return Over::Connection(reason);
        }
        let of_connection = failed.iter().find_map(|flight| match &flight.fate {
            PublishFate::Unknown { error, .. } | PublishFate::Unsent { error, .. } => {
                let of_channel =
                    error.is_amqp_soft_error() || matches!(error.kind(), ErrorKind::InvalidChannelState(..));
                (!of_channel).then(|| words::of(error))
            }
            PublishFate::Confirmed { .. } => None,
        });
        of_connection.map_or(Over::Channel, |reason| Over::Connection(reason.into()))
    }
}

/// Tells the outcomes that are certain now. Returns the publications that failed.
fn decide(returns: &mut Returns<Outcome>, ended: Vec<Flight>) -> Vec<Flight> {
    let mut failed = Vec::new();
    let mut confirmed = Vec::with_capacity(ended.len());
    for flight in ended {
        match flight.fate {
            PublishFate::Confirmed { acked, returned } => {
                confirmed.push((flight.number, acked, returned, flight.outcome));
            }
            _ => failed.push(flight),
        }
    }
    for (outcome, confirm) in returns.decide(confirmed) {
        tell(outcome, Ok(confirm));
    }
    failed
}
