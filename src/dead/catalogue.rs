//! The catalogue: which services have dead letters. The broker tells no client what queues there are, and a service that does
//! not run is the one whose dead letters matter most.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::Bytes;
use futures::stream::{self, StreamExt as _};
use tokio::time::Instant;
use uuid::Uuid;

use super::{Held, answered, take};
use crate::error::Error;
use crate::route::to_queue;
use crate::topology::{Namespace, ServiceId};
use crate::transport::{Confirm, Delivery, Dial, Properties, Publication, Role, Settle, Transport, forbids};

/// How many queues are counted at once: those that do not answer hold up few others. Each takes a channel or two.
const AT_ONCE: usize = 128;
/// The catalogue is read until it is twice the same, so long apart: what another reader has out is back then.
const APART: Duration = Duration::from_millis(300);
/// An entry is never taken out for good: a catalogue without any is one that somebody reads, for so long at least.
const HELD: Duration = Duration::from_secs(3);
/// How long closing may take.
const CLOSING: Duration = Duration::from_secs(1);

/// How many dead letters services have, or why their queues do not say.
type Counts = Vec<(String, Result<u64, Error>)>;

/// Sees to it that the catalogue names `services`.
pub(crate) async fn enter(transport: &Transport, namespace: &Namespace, services: &[ServiceId]) -> Result<(), Error> {
    if services.is_empty() {
        return Ok(());
    }
    // Its node may be away: another attempt meanwhile would stay at the broker as well.
    transport.declare_however_long(&[namespace.catalogue()]).await?;
    // Entries that somebody else has out at this moment are not seen: whoever reads next drops one of the two. Those that
    // are seen go back at once, since an alarm may hold up what is published for long.
    let entered = read(transport, namespace).await?.into_keys().collect::<BTreeSet<_>>();
    for service in services.iter().filter(|service| !entered.contains(service)) {
        match transport.publish(entry(namespace, service)).await? {
            Confirm::Accepted => {}
            confirm => {
                let (operation, reason) = ("take an entry of the catalogue".to_owned(), format!("{confirm:?}"));
                return Err(Error::Broker { operation, reason });
            }
        }
    }
    Ok(())
}

/// How many dead letters each service in the catalogue has, or why its queue does not say. A service whose queue of them is
/// not there is left out; it stays in the catalogue, since the queue may be declared again.
pub(super) async fn counts(dial: &Dial, namespace: &Namespace, timeout: Duration) -> Result<Counts, Error> {
    let transport = dial.connect(Role::Operator).await?;
    let catalogue = namespace.catalogue_queue();
    let operation = format!("say whether there is the catalogue `{catalogue}`");
    if answered(timeout, &operation, transport.count(&catalogue)).await?.is_none() {
        close(&transport).await;
        return Ok(Vec::new());
    }
    let services = named(&transport, namespace, timeout).await?;
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

/// RabbitMQ may say 0 of a queue most of whose nodes are away. Only one that is empty says that it has no message to give.
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
                // It has come in the meantime, and goes back at once.
                Ok(Some(delivery)) => {
                    delivery.settle(Settle::GiveBack);
                    entry.1 = Ok(1);
                }
                // Whoever may not read it has to believe what the broker says.
                Err(Error::Broker { reason, .. }) if forbids(&reason) => {}
                // Another queue has taken the connection along.
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

/// Closes a connection, unless that takes long: the broker does not confirm it while a queue owes an answer.
async fn close(transport: &Transport) {
    let _ = tokio::time::timeout(CLOSING, transport.close()).await;
}

/// The services that the catalogue names, though others read it at the same time.
async fn named(transport: &Transport, namespace: &Namespace, timeout: Duration) -> Result<BTreeSet<ServiceId>, Error> {
    let (begun, operation) = (Instant::now(), format!("read the catalogue `{}`", namespace.catalogue_queue()));
    let (mut all, mut last) = (BTreeSet::new(), None);
    loop {
        let left = timeout.saturating_sub(begun.elapsed());
        let read: BTreeSet<_> = match answered(left, &operation, read(transport, namespace)).await {
            Ok(read) => read.into_keys().collect(),
            // What has been read is worth more than that the rest came late.
            Err(Error::Broker { .. }) if !all.is_empty() => return Ok(all),
            Err(error) => return Err(error),
        };
        all.extend(read.iter().cloned());
        let is_settled = !all.is_empty() || begun.elapsed() >= HELD;
        // Those who never stop reading are not waited for without end.
        let is_late = begun.elapsed() + APART >= timeout;
        if last.is_some() && (is_late || is_settled && last.as_ref() == Some(&read)) {
            return Ok(all);
        }
        last = Some(read);
        // Two that read together do not do so again.
        let [random, ..] = Uuid::new_v4().into_bytes();
        let apart = APART.mul_f64(1.0 + f64::from(random) / 256.0);
        tokio::time::sleep(apart.min(timeout.saturating_sub(begun.elapsed()) / 2)).await;
    }
}

/// One entry of each service, to be put back when it is dropped. What is in the catalogue besides is gone.
async fn read(transport: &Transport, namespace: &Namespace) -> Result<BTreeMap<ServiceId, Held>, Error> {
    let mut entries = BTreeMap::<ServiceId, Held>::new();
    while let Some(delivery) = transport.get(&namespace.catalogue_queue()).await? {
        match service(&delivery) {
            Some(service) if !entries.contains_key(&service) => entries.entry(service).or_default().keep(delivery),
            _ => delivery.settle(Settle::Ack),
        }
    }
    Ok(entries)
}

fn service(entry: &Delivery) -> Option<ServiceId> {
    ServiceId::parse(std::str::from_utf8(&entry.body).ok()?).ok()
}

fn entry(namespace: &Namespace, service: &ServiceId) -> Publication {
    let properties =
        Properties { persistent: true, content_type: Some("text/plain".to_owned()), ..Properties::default() };
    let body = Bytes::from(service.to_string());
    to_queue(namespace.catalogue_queue(), properties, body)
}
