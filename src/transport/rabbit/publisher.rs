//! Publishing: one task for each publishing channel, which owns what is in flight and says what became of it.

use std::collections::VecDeque;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::types::ShortString;
use lapin::{BasicProperties, Channel, Confirmation, ErrorKind};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::connection::{CLOSE_TIMEOUT, Link, Refusal, words};
use super::exchanges::{Admitted, Exchanges, Known};
use super::returns::{Returns, all_ended, ended_so_far};
use super::user::User;
use super::{declare, properties};
use crate::transport::{Confirm, Loss, Lost, Publication, Receipt};

/// How many waiting publications are started before confirms are looked at again.
const BATCH: usize = 256;
/// How long the ends of publications may trickle in after their channel or connection has ended.
const TRICKLE: Duration = Duration::from_secs(1);

/// How late the ends of publications may be told that nobody waits for.
const IN_PASSING: Duration = Duration::from_millis(1);

/// Why publications are given up when the connection is closed.
const UNCONFIRMED: &str = "the broker did not confirm in time before the connection was closed";

type Outcome = oneshot::Sender<Result<Confirm, Lost>>;

/// When the end of a publication is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Told {
    /// As soon as it is known.
    AtOnce,
    /// When the task is at work anyway, or a little later: the confirm alone does not wake it, nor the end of sending.
    InPassing,
}

/// Where publications are handed in.
#[derive(Debug)]
pub(super) struct Publisher {
    waiting: mpsc::UnboundedSender<Handed>,
    link: Arc<Link>,
}

impl Publisher {
    /// Gives the task that publishes on `channel`, which confirms, until its connection ends or `closing`. The `user` is
    /// asked for `introduced_within` that time, or when there is something to publish.
    pub(super) async fn open(
        link: Arc<Link>,
        mut channel: Channel,
        user: Arc<User>,
        introduced_within: Option<Duration>,
        known: Known,
        closing: CancellationToken,
    ) -> Result<(Self, impl Future<Output = ()> + Send), Refusal> {
        let (waiting, queue) = mpsc::unbounded_channel();
        if let Some(within) = introduced_within
            && let Ok(asked) = tokio::time::timeout(within, user.ask(&link, &channel)).await
            && !asked?
        {
            channel = confirming(&link).await?;
        }
        let (unsent, exchanges, questions) = (VecDeque::new(), Exchanges::new(known), FuturesUnordered::new());
        let writer = Writer { link: link.clone(), user, closing, queue, unsent, exchanges, questions };
        Ok((Self { waiting, link }, writer.run(channel)))
    }

    /// Hands a publication in; those handed in before it leave before it.
    pub(super) fn publish(&self, publication: Publication, told: Told) -> Receipt {
        let (outcome, receipt) = Receipt::new();
        if let Err(mpsc::error::SendError((.., outcome))) = self.waiting.send((publication, told, outcome)) {
            let reason = self.link.ended().unwrap_or_else(|| "the connection is closing".into());
            lose(outcome, false, &reason);
        }
        receipt
    }
}

/// A channel that confirms what is published on it.
pub(super) async fn confirming(link: &Link) -> Result<Channel, Refusal> {
    let channel = link.channel().await?;
    link.ask(channel.confirm_select(ConfirmSelectOptions::default())).await?;
    Ok(channel)
}

fn tell(outcome: Outcome, what: Result<Confirm, Lost>) {
    // Whoever dropped the receipt does not want to know.
    let _ = outcome.send(what);
}

/// Tells of the connection's end.
fn lose(outcome: Outcome, handed_over: bool, reason: &Arc<str>) {
    tell(outcome, Err(Lost::connection(handed_over, reason.clone())));
}

/// A publication on its way, with the number it has on its channel.
struct Flight {
    number: u64,
    told: Told,
    outcome: Outcome,
    fate: Fate,
}

/// How a flight ended.
enum Fate {
    /// The broker confirmed it; lapin attached the return of the publication with this number.
    Confirmed { acked: bool, returned: Option<u64> },
    /// It left, and the channel or connection ended before the confirm.
    Unknown { exchange: String, key: String, size: usize, error: lapin::Error },
    /// It did not leave whole, so the broker has not got it.
    Unsent { publication: Box<Publication>, error: lapin::Error },
}

/// Publishes and waits for the confirm. lapin queues the frames at the first poll.
async fn fly(
    channel: Channel,
    number: u64,
    properties: BasicProperties,
    names: (ShortString, ShortString),
    publication: Publication,
    told: Told,
    outcome: Outcome,
) -> Flight {
    let options = BasicPublishOptions { mandatory: publication.mandatory, immediate: false };
    let (exchange, key) = names;
    let sent = channel.basic_publish(exchange, key, options, &publication.body, properties).await;
    let fate = match sent {
        Err(error) => Fate::Unsent { publication: Box::new(publication), error },
        Ok(confirm) => {
            let Publication { exchange, key, body, .. } = publication;
            match confirm.await {
                Ok(confirmation) => {
                    Fate::Confirmed { acked: !confirmation.is_nack(), returned: returned_number(confirmation) }
                }
                Err(error) => Fate::Unknown { exchange, key, size: body.len(), error },
            }
        }
    };
    Flight { number, told, outcome, fate }
}

fn returned_number(confirmation: Confirmation) -> Option<u64> {
    let message = confirmation.take_message()?;
    message.delivery.properties.message_id().as_ref()?.as_str().parse().ok()
}

/// A publication that was handed in.
type Handed = (Publication, Told, Outcome);

/// The task behind a [`Publisher`].
struct Writer {
    link: Arc<Link>,
    user: Arc<User>,
    closing: CancellationToken,
    queue: mpsc::UnboundedReceiver<Handed>,
    /// What a channel that ended has not sent, and what has waited to hear of its exchange: it goes first.
    unsent: VecDeque<Handed>,
    exchanges: Exchanges<Handed>,
    /// Whether exchanges are there, asked of the broker.
    questions: FuturesUnordered<BoxFuture<'static, (String, bool)>>,
}

/// Why a channel is no longer published on.
enum Over {
    /// All is confirmed, and nothing more will come.
    Done,
    /// The broker closed the channel; the connection lives.
    Channel,
    /// The connection ended.
    Connection(Arc<str>),
}

impl Writer {
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
            // Without a channel to publish on, the connection is of no use.
            self.link.give_up(reason.clone());
        }
        self.queue.close();
        self.unsent.extend(self.exchanges.drain());
        while let Some((.., outcome)) = self.unsent.pop_front().or_else(|| self.queue.try_recv().ok()) {
            lose(outcome, false, &reason);
        }
    }

    /// Publishes on `channel` until it is of no more use.
    async fn publish_on(&mut self, channel: &Channel) -> Over {
        let mut flights = FuturesUnordered::new();
        let mut returns = Returns::default();
        let mut number = 0;
        let mut waiting = Vec::with_capacity(BATCH);
        let mut draining = None;
        // How many of the flights are waited for.
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
            // Polled in the order they were pushed: that is the order in which they leave.
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
                // This sends what is new, and finds what has ended without being woken for it.
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

    /// Has the broker say who publishes here. Tells what has ended by that, if anything has.
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

    /// Gives a publication back whose exchange is there. Others wait until the broker has said so of theirs.
    fn admit(&mut self, handed: Handed) -> Option<Handed> {
        let exchange = handed.0.exchange.clone();
        match self.exchanges.admit(&exchange, handed) {
            Admitted::Goes(handed) => return Some(handed),
            Admitted::Waits { ask: false } => {}
            Admitted::Waits { ask: true } => {
                let link = self.link.clone();
                self.questions.push(Box::pin(async move {
                    // Where the broker does not say, publishing will tell.
                    let there = declare::exchange_exists(&link, &exchange).await.unwrap_or(true);
                    (exchange, there)
                }));
            }
        }
        None
    }

    fn answered(&mut self, exchange: &str, there: bool) {
        let waited = self.exchanges.answered(exchange, there);
        if there {
            return self.unsent.extend(waited);
        }
        waited.into_iter().for_each(|(.., outcome)| tell(outcome, Ok(Confirm::Returned)));
    }

    /// Settles what was in flight on a channel that has ended.
    async fn give_up<F>(
        &mut self,
        mut flights: FuturesUnordered<F>,
        mut returns: Returns<Outcome>,
        mut failed: Vec<Flight>,
    ) -> Over
    where
        F: Future<Output = Flight>,
    {
        // The rest fails as well, each telling how far it got. What does not, drops its receipt: it may have been sent.
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
                Fate::Unsent { publication, .. } => self.unsent.push_back((*publication, told, outcome)),
                Fate::Unknown { .. } if returns.ahead.contains(&number) => tell(outcome, Ok(Confirm::Returned)),
                Fate::Unknown { size, .. } if largest.is_some_and(|largest| size > largest) => {
                    tell(outcome, Ok(Confirm::TooLarge(largest.unwrap_or_default())));
                }
                // Once it has let something through there, the broker does not ask again: this, too, it has not taken.
                Fate::Unknown { exchange, key, .. }
                    if forbidden
                        .is_some_and(|(name, topic)| name == exchange && topic.is_none_or(|topic| topic == key)) =>
                {
                    let loss = if connected { Loss::Refused } else { Loss::Unsent };
                    tell(outcome, Err(Lost { loss, reason: reason.clone() }));
                }
                Fate::Unknown { .. } | Fate::Confirmed { .. } => {
                    tell(outcome, Err(Lost { loss, reason: reason.clone() }));
                }
            }
        }
        for (_, _, outcome) in returns.held {
            tell(outcome, Err(Lost { loss, reason: reason.clone() }));
        }
        over
    }

    /// Whether the channel or the whole connection has ended.
    fn cause(&self, failed: &[Flight]) -> Over {
        if let Some(reason) = self.link.ended() {
            return Over::Connection(reason);
        }
        let of_connection = failed.iter().find_map(|flight| match &flight.fate {
            Fate::Unknown { error, .. } | Fate::Unsent { error, .. } => {
                let of_channel =
                    error.is_amqp_soft_error() || matches!(error.kind(), ErrorKind::InvalidChannelState(..));
                (!of_channel).then(|| words(error))
            }
            Fate::Confirmed { .. } => None,
        });
        of_connection.map_or(Over::Channel, |reason| Over::Connection(reason.into()))
    }
}

/// What the broker said when it closed the channel.
fn said(failed: &[Flight]) -> Option<String> {
    failed.iter().find_map(|flight| match &flight.fate {
        Fate::Unknown { error, .. } | Fate::Unsent { error, .. } if error.is_amqp_soft_error() => Some(words(error)),
        _ => None,
    })
}

/// The exchange, and the key if it is that one, which the user may not publish to in the broker's "ACCESS_REFUSED - access
/// to topic 'key' in exchange 'x' in vhost '/' refused for user 'u'".
fn forbidden_exchange(reason: &str) -> Option<(&str, Option<&str>)> {
    let (_, rest) = reason.split_once("ACCESS_REFUSED")?;
    let (about, rest) = rest.split_once("exchange '")?;
    let (exchange, _) = rest.split_once("' in vhost")?;
    let topic = about.split_once("topic '").and_then(|(_, rest)| rest.strip_suffix("' in "));
    Some((if exchange == "amq.default" { "" } else { exchange }, topic))
}

/// The cap in the broker's "message size 20971520 is larger than configured max size 16777216".
fn largest_message(reason: &str) -> Option<usize> {
    let (_, rest) = reason.split_once("configured max size ")?;
    let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
    rest[..digits].parse().ok()
}

type Names = (ShortString, ShortString);

/// A publication as lapin takes it. Its number travels as `message_id`, by which a return is known again.
pub(super) fn on_the_wire(
    publication: &Publication,
    user: Option<&ShortString>,
    number: u64,
) -> Result<(BasicProperties, Names), String> {
    let mut properties = properties::written(&publication.properties)?.with_message_id(number.to_string().into());
    if let Some(user) = user {
        properties = properties.with_user_id(user.clone());
    }
    Ok((properties, (properties::short(&publication.exchange)?, properties::short(&publication.key)?)))
}

/// Tells those whose outcome is known; gives back those that failed.
fn decide(returns: &mut Returns<Outcome>, ended: Vec<Flight>) -> Vec<Flight> {
    let mut failed = Vec::new();
    let mut confirmed = Vec::with_capacity(ended.len());
    for flight in ended {
        match flight.fate {
            Fate::Confirmed { acked, returned } => {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_message_is_read_from_the_brokers_words() {
        let words = "PRECONDITION_FAILED - message size 20971520 is larger than configured max size 16777216";
        assert_eq!(largest_message(words), Some(16_777_216));
        assert_eq!(largest_message("NOT_FOUND - no exchange 'a' in vhost '/'"), None);
    }

    #[test]
    fn the_forbidden_exchange_is_read_from_the_brokers_words() {
        let words = "ACCESS_REFUSED - write access to exchange 'a.b' in vhost '/' refused for user 'u'";
        assert_eq!(forbidden_exchange(words), Some(("a.b", None)));
        let words = "ACCESS_REFUSED - access to exchange 'amq.default' in vhost '/' refused for user 'u'";
        assert_eq!(forbidden_exchange(words), Some(("", None)));
        let words = "ACCESS_REFUSED - access to topic 'k.l' in exchange 'a' in vhost '/' refused for user 'u'";
        assert_eq!(forbidden_exchange(words), Some(("a", Some("k.l"))));
        assert_eq!(forbidden_exchange("NOT_FOUND - no exchange 'a' in vhost '/'"), None);
    }
}
