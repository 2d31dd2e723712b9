//! How much waits in the queues of the services that are measured. The broker is asked in the background, and only while
//! metrics are read, so that whoever reads them waits for nobody.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, timeout};

use crate::client::{Client, WeakClient};
use crate::topology::ServiceId;
use crate::transport::QueueCount;

/// How often the broker is asked at most.
const PAUSE: Duration = Duration::from_secs(5);
/// How long it may take to answer for one service.
const PATIENCE: Duration = Duration::from_secs(5);
/// For how long an answer is told.
const BELIEVED: Duration = Duration::from_secs(60);

/// What the broker has told of queues, and whom to ask it through.
pub(super) struct Queues {
    client: WeakClient,
    told: Arc<Mutex<QueuesTold>>,
}

#[derive(Default)]
struct QueuesTold {
    asked: Option<Instant>,
    answered: Option<Instant>,
    queues: Vec<QueueTold>,
}

/// A queue of a service, by what it is for.
#[derive(Debug, Clone)]
pub(super) struct QueueTold {
    pub(super) service: ServiceId,
    pub(super) kind: &'static str,
    pub(super) count: QueueCount,
}

impl Queues {
    pub(super) fn of(client: &Client) -> Self {
        Self { client: client.downgrade(), told: Arc::default() }
    }

    /// What was told last of these services, each of which comes with whether it has oneway methods. Asks about them again,
    /// unless that was done just now.
    pub(super) fn told(&self, services: BTreeMap<ServiceId, bool>) -> Vec<QueueTold> {
        let Some(client) = self.client.upgrade() else { return Vec::new() };
        let served: BTreeSet<_> = services.keys().cloned().collect();
        let mut told = lock(&self.told);
        if told.asked.is_none_or(|asked| asked.elapsed() >= PAUSE) {
            told.asked = Some(Instant::now());
            let (runtime, kept) = (client.runtime().clone(), self.told.clone());
            runtime.spawn(ask(client, services, kept));
        }
        let is_known = told.answered.is_some_and(|at| at.elapsed() < BELIEVED);
        told.queues.iter().filter(|queue| is_known && served.contains(&queue.service)).cloned().collect()
    }
}

async fn ask(client: Client, services: BTreeMap<ServiceId, bool>, kept: Arc<Mutex<QueuesTold>>) {
    let mut queues = Vec::new();
    for (service, has_oneway) in services {
        let Ok(Ok(counts)) = timeout(PATIENCE, client.queues(&service, has_oneway)).await else { continue };
        let kinds = ["calls", "work", "dead"].into_iter().zip(counts);
        queues.extend(
            kinds.filter_map(|(kind, count)| Some(QueueTold { service: service.clone(), kind, count: count? })),
        );
    }
    let mut told = lock(&kept);
    (told.answered, told.queues) = (Some(Instant::now()), queues);
}

fn lock(told: &Mutex<QueuesTold>) -> MutexGuard<'_, QueuesTold> {
    told.lock().unwrap_or_else(PoisonError::into_inner)
}
