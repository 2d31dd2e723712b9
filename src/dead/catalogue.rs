//! The catalogue: which services have dead letters. The broker tells no client what queues there are, and a service that does
//! not run is the one whose dead letters matter most.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::Bytes;
use futures::stream::{self, StreamExt as _};

use super::{Held, answered};
use crate::error::Error;
use crate::topology::{Namespace, ServiceId};
use crate::transport::{Confirm, Delivery, Properties, Publication, Settle, Transport};

/// How many queues are counted at once.
const AT_ONCE: usize = 16;
/// The catalogue is read until it names nothing new, but no more often than this, and after so long each time.
const MOST_READS: u32 = 5;
const PAUSE: Duration = Duration::from_millis(50);

/// How many dead letters services have, or why their queues do not say.
type Counts = Vec<(String, Result<u64, Error>)>;

/// Sees to it that the catalogue names `services`.
pub(crate) async fn enter(transport: &Transport, namespace: &Namespace, services: &[ServiceId]) -> Result<(), Error> {
    if services.is_empty() {
        return Ok(());
    }
    transport.declare(&[namespace.catalogue()]).await?;
    // Entries that somebody else has out at this moment are not seen: whoever reads next drops one of the two.
    let entered = read(transport, namespace).await?;
    let missing =
        services.iter().filter(|service| !entered.contains_key(service)).map(|service| entry(namespace, service));
    for publication in missing {
        match transport.publish(publication).await? {
            Confirm::Accepted => {}
            confirm => {
                let (operation, reason) = ("take an entry of the catalogue".to_owned(), format!("{confirm:?}"));
                return Err(Error::Broker { operation, reason });
            }
        }
    }
    Ok(())
}

/// How many dead letters each service in the catalogue has, or why its queue does not say. A service whose queue of them was
/// deleted leaves the catalogue.
pub(super) async fn counts(transport: &Transport, namespace: &Namespace, timeout: Duration) -> Result<Counts, Error> {
    if answered(timeout, "count the catalogue", transport.count(&namespace.catalogue_queue())).await?.is_none() {
        return Ok(Vec::new());
    }
    let mut services = BTreeSet::new();
    for _ in 0..MOST_READS {
        let before = services.len();
        let read = answered(timeout, "read the catalogue", read(transport, namespace)).await?;
        services.extend(read.into_keys());
        if services.len() == before {
            break;
        }
        // What somebody else has out at this moment is back then.
        tokio::time::sleep(PAUSE).await;
    }
    let counted = stream::iter(services).map(|service| async move {
        let queue = namespace.dead_queue(&service);
        let count = answered(timeout, "count dead letters", transport.count(&queue)).await;
        (service, count)
    });
    let counted: Vec<_> = counted.buffered(AT_ONCE).collect().await;
    if counted.iter().any(|(_, count)| matches!(count, Ok(None))) {
        let mut entries = answered(timeout, "read the catalogue", read(transport, namespace)).await?;
        let gone = counted.iter().filter(|(_, count)| matches!(count, Ok(None)));
        gone.filter_map(|(service, _)| entries.remove(service)).for_each(|mut entry| entry.remove_last());
    }
    Ok(counted.into_iter().filter_map(|(service, count)| Some((service.to_string(), count.transpose()?))).collect())
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
    Publication { exchange: String::new(), key: namespace.catalogue_queue(), mandatory: true, properties, body }
}
