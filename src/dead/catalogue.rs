//! The catalogue: a queue that names every service with dead letters, and every group with each of its patterns.
//!
//! Operators need it, since AMQP can list neither queues nor bindings, and since the dead letters of a service that does not
//! run matter most. Servers enter their services with [`enter`]; [`DeadLettersBuilder::counts`](crate::DeadLettersBuilder::counts)
//! reads them.
//!
//! The catalogue is a queue with one message for each entry. To read it, all messages are taken out and put back.
//! Several readers can do that at the same time, so each may see only a part.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use futures::stream::{self, StreamExt as _};
use tokio::time::Instant;
use uuid::Uuid;

use super::held::{HeldLetters, answered, take};
use crate::error::Error;
use crate::exchanges::to_queue;
use crate::topology::{Namespace, ServiceId};
use crate::transport::{Confirm, Delivery, Dial, Properties, Publication, Role, Settle, Transport, forbids};

/// How many queues are counted at the same time. With many, a queue that does not answer holds up few others. Each
/// question takes one channel or two.
const AT_ONCE: usize = 128;
/// The catalogue is read until it was twice the same. This is the pause in between: by then, another reader has put
/// back what it had taken out.
const APART: Duration = Duration::from_millis(300);
/// Entries are seldom removed for good. So if the catalogue is empty, somebody else may be reading it: it is read again
/// for this long before it counts as empty.
const HELD: Duration = Duration::from_secs(3);
/// How long closing the connection may take.
const CLOSING: Duration = Duration::from_secs(1);

/// The number of dead letters of each service, or why its queue did not tell.
type Counts = Vec<(String, Result<u64, Error>)>;

/// An entry of the catalogue, written `name.vMAJOR`, or `group:NAME PATTERN`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct CatalogueEntry {
    pub(crate) service: ServiceId,
    /// Of a group: a pattern by which it gets events.
    pub(crate) pattern: Option<String>,
}

impl CatalogueEntry {
    /// `None` if the message is not an entry.
    fn read(entry: &Delivery) -> Option<Self> {
        let text = std::str::from_utf8(&entry.body).ok()?;
        let (service, pattern) = match text.split_once(' ') {
            Some((group, pattern)) => (group, Some(pattern.to_owned())),
            None => (text, None),
        };
        let service = ServiceId::parse(service).ok()?;
        (service.is_group() == pattern.is_some()).then_some(Self { service, pattern })
    }

    /// The message that enters it into the catalogue.
    fn message(&self, namespace: &Namespace) -> Publication {
        let properties =
            Properties { persistent: true, content_type: Some("text/plain".to_owned()), ..Properties::default() };
        to_queue(namespace.catalogue_queue(), properties, Bytes::from(self.to_string()))
    }
}

impl fmt::Display for CatalogueEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.pattern {
            Some(pattern) => write!(f, "{} {pattern}", self.service),
            None => self.service.fmt(f),
        }
    }
}

/// Enters `entries` into the catalogue, if they are not in it. Servers call this before the first letter can come. Returns
/// all that were in it before.
///
/// # Errors
/// `Broker` if the queue refuses an entry, `Disconnected`. The server tries again.
pub(crate) async fn enter(
    transport: &Transport,
    namespace: &Namespace,
    entries: &[CatalogueEntry],
) -> Result<BTreeSet<CatalogueEntry>, Error> {
    if entries.is_empty() {
        return Ok(BTreeSet::new());
    }
    // The queue's node may be down. A second declaration would wait at the broker beside this one, so this one is
    // awaited.
    transport.declare_however_long(&[namespace.catalogue()]).await?;
    // An entry that another reader has taken out at this moment is not seen, and is entered a second time. The next
    // reader drops one of the two. The entries that were taken out are put back at once, since publishing may be held
    // up by an alarm.
    let entered = read(transport, namespace).await?.into_keys().collect::<BTreeSet<_>>();
    for entry in entries.iter().filter(|entry| !entered.contains(entry)) {
        match transport.publish(entry.message(namespace)).await? {
            Confirm::Accepted => {}
            confirm => {
                return Err(Error::refused("take an entry of the catalogue", format!("{confirm:?}")));
            }
        }
    }
    Ok(entered)
}

/// Counts the dead letters of every service in the catalogue. Each queue has `timeout` to answer.
///
/// A service is left out if its queue of dead letters does not exist. It stays in the catalogue, since the queue may be
/// declared again.
pub(super) async fn counts(dial: &Dial, namespace: &Namespace, timeout: Duration) -> Result<Counts, Error> {
    let transport = dial.connect(Role::Operator).await?;
    let catalogue = namespace.catalogue_queue();
    let operation = format!("say whether there is the catalogue `{catalogue}`");
    if answered(timeout, &operation, transport.count(&catalogue)).await?.is_none() {
        close(&transport).await;
        return Ok(Vec::new());
    }
    let services: BTreeSet<_> =
        named(&transport, namespace, timeout).await?.into_iter().map(|entry| entry.service).collect();
    let counted = stream::iter(services).map(|service| async {
        let queue = namespace.dead_queue(&service);
        let operation = format!("count the dead letters in `{queue}`");
        let count = answered(timeout, &operation, transport.count(&queue)).await.transpose()?;
        Some((service, count))
    });
    let mut counts: Vec<_> = counted.buffered(AT_ONCE).filter_map(std::future::ready).collect().await;
    look_into_empty(&mut counts, dial, transport, namespace, timeout).await?;
    Ok(counts.into_iter().map(|(service, count)| (service.to_string(), count)).collect())
}

/// Takes a message from each queue that is said to be empty, and puts it back. RabbitMQ may report 0 for a queue most
/// of whose nodes are down; but only a queue that is really empty answers that it has no message.
async fn look_into_empty(
    counts: &mut [(ServiceId, Result<u64, Error>)],
    dial: &Dial,
    mut transport: Transport,
    namespace: &Namespace,
    timeout: Duration,
) -> Result<(), Error> {
    let mut unsure: Vec<_> = counts.iter_mut().filter(|(_, count)| matches!(count, Ok(0))).collect();
    loop {
        let asked = unsure.len();
        let asking = stream::iter(unsure).map(|entry| async {
            let queue = namespace.dead_queue(&entry.0);
            (take(&transport, &queue, timeout).await, entry)
        });
        let answers: Vec<_> = asking.buffered(AT_ONCE).collect().await;
        let mut error = None;
        unsure = Vec::new();
        for (answer, entry) in answers {
            match answer {
                Ok(None) => {}
                // A letter has come in the meantime. It is put back at once.
                Ok(Some(delivery)) => {
                    delivery.settle(Settle::GiveBack);
                    entry.1 = Ok(1);
                }
                // This user may not read the queue, so the broker's number has to do.
                Err(Error::Broker { reason, .. }) if forbids(&reason) => {}
                // The broker closes the connection over a queue that has lost its leader. The other queues are asked
                // again.
                Err(lost @ Error::Disconnected { .. }) => {
                    error = Some(lost);
                    unsure.push(entry);
                }
                Err(unreachable) => entry.1 = Err(unreachable),
            }
        }
        close(&transport).await;
        match error {
            None => return Ok(()),
            Some(error) if unsure.len() == asked => return Err(error),
            Some(_) => transport = dial.connect(Role::Operator).await?,
        }
    }
}

/// Closes a connection, but waits for at most [`CLOSING`]: the broker does not confirm it while a queue owes an answer.
pub(crate) async fn close(transport: &Transport) {
    let _ = tokio::time::timeout(CLOSING, transport.close()).await;
}

/// All entries of the catalogue. Reads it until it has been twice the same, since others may read it at the
/// same time.
pub(crate) async fn named(
    transport: &Transport,
    namespace: &Namespace,
    timeout: Duration,
) -> Result<BTreeSet<CatalogueEntry>, Error> {
    let (begun, operation) = (Instant::now(), format!("read the catalogue `{}`", namespace.catalogue_queue()));
    let (mut all, mut last) = (BTreeSet::new(), None);
    loop {
        let left = timeout.saturating_sub(begun.elapsed());
        let read: BTreeSet<_> = match answered(left, &operation, read(transport, namespace)).await {
            Ok(read) => read.into_keys().collect(),
            // The services that were read so far are worth more than an error.
            Err(Error::Broker { .. }) if !all.is_empty() => return Ok(all),
            Err(error) => return Err(error),
        };
        all.extend(read.iter().cloned());
        let is_settled = !all.is_empty() || begun.elapsed() >= HELD;
        // Other readers may never stop, so this ends with the time-out.
        let is_late = begun.elapsed() + APART >= timeout;
        if last.is_some() && (is_late || is_settled && last.as_ref() == Some(&read)) {
            return Ok(all);
        }
        last = Some(read);
        // The pause is random, so that two readers that met once do not meet again.
        let [random, ..] = Uuid::new_v4().into_bytes();
        let apart = APART.mul_f64(1.0 + f64::from(random) / 256.0);
        tokio::time::sleep(apart.min(timeout.saturating_sub(begun.elapsed()) / 2)).await;
    }
}

/// Removes the entries that are meant for good. Somebody else may have taken one out at the same time to read it, so this
/// looks until it has twice seen none.
///
/// # Errors
/// `Broker` if that takes longer than `timeout`, `Disconnected`.
pub(crate) async fn leave(
    transport: &Transport,
    namespace: &Namespace,
    timeout: Duration,
    is_meant: impl Fn(&CatalogueEntry) -> bool,
) -> Result<(), Error> {
    let (begun, operation) = (Instant::now(), format!("read the catalogue `{}`", namespace.catalogue_queue()));
    let mut seen_none = 0;
    loop {
        let left = timeout.saturating_sub(begun.elapsed());
        let entries = answered(left, &operation, read(transport, namespace)).await?;
        seen_none += 1;
        for (_, mut held) in entries.into_iter().filter(|(entry, _)| is_meant(entry)) {
            held.remove_last();
            seen_none = 0;
        }
        if seen_none == 2 {
            return Ok(());
        }
        tokio::time::sleep(APART).await;
    }
}

/// Takes out all entries. They are put back when the result is dropped. Duplicates, and messages that are not entries, are
/// removed for good.
async fn read(transport: &Transport, namespace: &Namespace) -> Result<BTreeMap<CatalogueEntry, HeldLetters>, Error> {
    let mut entries = BTreeMap::<CatalogueEntry, HeldLetters>::new();
    while let Some(delivery) = transport.get(&namespace.catalogue_queue()).await? {
        match CatalogueEntry::read(&delivery) {
            Some(entry) if !entries.contains_key(&entry) => entries.entry(entry).or_default().keep(delivery),
            _ => delivery.settle(Settle::Ack),
        }
    }
    Ok(entries)
}
