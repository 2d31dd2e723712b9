//! Looks after the queues of dead letters, which no server consumes, and enters the services that have one into the
//! catalogue.

use std::collections::BTreeSet;
use std::future::Future;
use std::slice;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::time::Instant;
use tracing::warn;

use super::Site;
use super::health::Trouble;
use super::keeper::{StartReport, Unreachable, unless_refused};
use super::worker::Worker;
use crate::dead::{self, CatalogueEntry};
use crate::error::Error;
use crate::transport::{Transport, forbids};

/// The pause until a queue of dead letters is checked again.
const AGAIN: Duration = Duration::from_secs(30);
/// The pause after a refusal.
const SOON: Duration = Duration::from_secs(5);
/// The pause until the catalogue is read again.
const READ_AGAIN: Duration = Duration::from_secs(600);
/// The same, while it is not known for all services whether they have a queue of dead letters.
const LOOK_AGAIN: Duration = Duration::from_secs(60);
/// How many missing queues one round may find. Each costs a channel number.
const MOST_MISSING: usize = 8;
/// How long a dead letter waits until the catalogue names its service.
const PATIENCE: Duration = Duration::from_secs(3);
/// How long the broker may take about a queue of dead letters until the state says so. A drain does not wait longer.
pub(super) const SILENCE: Duration = Duration::from_secs(3);

/// When the broker refused something, and why.
type Refused = Option<(Instant, Arc<Error>)>;

/// The queue of dead letters of one service. Many calls may find it missing at the same time.
#[derive(Default)]
pub(super) struct DeadQueue {
    /// Why it could not be declared, and when. It is locked while the broker owes an answer.
    refused: Arc<Mutex<Refused>>,
    /// How many times it was declared.
    declared: Arc<AtomicU64>,
    /// Whether the queue has existed at some time.
    known: Arc<AtomicBool>,
    /// Whether the server has checked if there is a queue from an earlier time.
    looked_for: AtomicBool,
}

impl DeadQueue {
    /// The queue of a service with oneway methods, which has one in any case; other services get it with their first
    /// dead letter.
    pub(super) fn new(in_any_case: bool) -> Self {
        Self { known: Arc::new(in_any_case.into()), ..Self::default() }
    }

    /// Declares the queue with `declaring`, unless another task does so at this moment, or was refused less than 5 s
    /// ago: each refusal costs a channel. Returns whether it was `declaring` that did it. The declaration goes on if
    /// nobody waits for it any more, since the broker may take more than a minute, and must not be asked twice.
    async fn declare(
        &self,
        declaring: impl Future<Output = Result<(), Error>> + Send + 'static,
    ) -> Result<bool, Arc<Error>> {
        let before = self.declared.load(Ordering::SeqCst);
        let mut refused = self.refused.clone().lock_owned().await;
        if self.declared.load(Ordering::SeqCst) != before {
            return Ok(false);
        }
        if let Some((_, error)) = refused.as_ref().filter(|(when, _)| when.elapsed() < SOON) {
            return Err(error.clone());
        }
        let (declared, known) = (self.declared.clone(), self.known.clone());
        let declaring = tokio::spawn(async move {
            let Err(error) = declaring.await else {
                *refused = None;
                declared.fetch_add(1, Ordering::SeqCst);
                known.store(true, Ordering::SeqCst);
                return Ok(true);
            };
            let error = Arc::new(error);
            // A lost connection is no refusal: the next one has to be asked.
            *refused = Some((Instant::now(), error.clone())).filter(|_| !is_disconnected(&error));
            Err(error)
        });
        declaring.await.unwrap_or_else(|_| {
            let reason = "its runtime has ended".to_owned();
            Err(Arc::new(Error::Disconnected { method: None, may_have_run: false, reason }))
        })
    }

    fn is_known(&self) -> bool {
        self.known.load(Ordering::SeqCst)
    }
}

impl Worker {
    /// The trouble if the queue of dead letters is missing.
    pub(super) fn dead_trouble(&self) -> Trouble {
        Trouble::DeadLetters(self.name.clone())
    }

    pub(super) fn dead_title(&self) -> String {
        format!("the queue `{}`", self.site.namespace.dead_queue(&self.id))
    }

    /// Declares the missing queue of dead letters, and enters the service into the catalogue.
    pub(super) async fn declare_dead_letters(&self, transport: &Transport) -> Result<(), Arc<Error>> {
        if !self.declare_dead_queue(transport).await? {
            return Ok(());
        }
        let namespace = &self.site.namespace;
        // The service is entered at once: if it ends after its first dead letter, that one must be found all the same.
        let entry = self.entry();
        let entering = dead::enter(transport, namespace, slice::from_ref(&entry));
        if !matches!(tokio::time::timeout(PATIENCE, entering).await, Ok(Ok(_))) {
            self.site.unentered.notify_one();
        }
        Ok(())
    }

    /// What the catalogue says of it.
    fn entry(&self) -> CatalogueEntry {
        CatalogueEntry { service: self.id.clone(), pattern: self.service.pattern.clone() }
    }

    /// Warns of the patterns by which a group gets events and that are not the one of this instance. Each is told once.
    fn tell_other_patterns(&self, entered: &BTreeSet<CatalogueEntry>, told: &mut BTreeSet<CatalogueEntry>) {
        let Some(pattern) = self.service.pattern.as_deref() else { return };
        let others =
            entered.iter().filter(|entry| entry.service == self.id && entry.pattern.as_deref() != Some(pattern));
        for entry in others {
            if told.insert(entry.clone()) {
                let (group, other) = (self.id.name(), entry.pattern.as_deref());
                warn!(
                    name = &*self.site.name,
                    group,
                    pattern,
                    other,
                    "the group gets events by the pattern of another release, too: when no instance subscribes to it any more, end it by `hopline groups unbind`"
                );
            }
        }
    }

    async fn declare_dead_queue(&self, transport: &Transport) -> Result<bool, Arc<Error>> {
        let (transport, queue) = (transport.clone(), [self.site.namespace.dead(&self.id)]);
        let declaring = self.dead_queue.declare(async move { transport.declare_however_long(&queue).await });
        self.site.health.sees_through(&self.dead_trouble(), &self.dead_title(), declaring).await
    }
}

/// Declares the queue of dead letters of a service that starts, and then keeps it. `heard` is told the result. Ends if
/// the broker refuses it.
pub(super) async fn start_dead_letters(worker: Arc<Worker>, transport: Transport, heard: StartReport) {
    let queue = [worker.site.namespace.dead(&worker.id)];
    let declaring = transport.declare_however_long(&queue);
    let declared = worker.site.health.sees_through(&worker.dead_trouble(), &worker.dead_title(), declaring).await;
    if unless_refused(declared, heard, Unreachable::Kept).is_some() {
        keep_dead_letters(worker, transport).await;
    }
}

/// Keeps a queue of dead letters until the server drains or the connection ends.
pub(super) async fn keep_dead_letters(worker: Arc<Worker>, transport: Transport) {
    let Worker { site, id, .. } = &*worker;
    let trouble = worker.dead_trouble();
    let mut refused = false;
    loop {
        // After a refusal the queue is only declared. To ask whether it exists would cost a channel each time.
        let there = if refused { Ok(None) } else { transport.count(&site.namespace.dead_queue(id)).await };
        let declared = match there {
            Ok(None) => worker.declare_dead_letters(&transport).await,
            // Declaring also finds out whether the existing queue has other arguments.
            _ => worker.declare_dead_queue(&transport).await.map(drop),
        };
        refused = declared.is_err();
        let pause = match declared {
            Ok(()) => {
                site.health.cured(&trouble);
                AGAIN
            }
            Err(error) if is_disconnected(&error) => return,
            Err(error) => {
                site.health.suffers(
                    trouble.clone(),
                    format!("the dead letters of `{id}` have no queue, and are held until they have: {error}"),
                );
                SOON
            }
        };
        tokio::select! {
            () = worker.ending.cancelled() => return,
            () = tokio::time::sleep(pause) => {}
        }
    }
}

/// Keeps the services with dead letters in the catalogue, until the server drains or the connection ends. Calls do not
/// depend on it.
pub(super) async fn keep_entered(site: Arc<Site>, transport: Transport, workers: Vec<Arc<Worker>>) {
    let entering = async {
        let (mut pause, mut told, mut told_patterns) = (SOON, None, BTreeSet::new());
        loop {
            let all_looked_for = look_for_queues(&site, &transport, &workers).await;
            let known = workers.iter().filter(|worker| worker.dead_queue.is_known() && !worker.has_left());
            let services: Vec<_> = known.map(|worker| worker.entry()).collect();
            let wait = match dead::enter(&transport, &site.namespace, &services).await {
                Ok(entered) => {
                    (pause, told) = (SOON, None);
                    workers.iter().for_each(|worker| worker.tell_other_patterns(&entered, &mut told_patterns));
                    if all_looked_for { READ_AGAIN } else { LOOK_AGAIN }
                }
                Err(error) if is_disconnected(&error) => return,
                Err(error) => {
                    tell_once(&site, &services, &error, &mut told);
                    let wait = pause;
                    pause = (pause * 2).min(READ_AGAIN);
                    wait
                }
            };
            tokio::select! {
                () = site.unentered.notified() => {}
                () = tokio::time::sleep(wait) => {}
            }
        }
    };
    tokio::select! {
        () = site.draining.cancelled() => {}
        () = entering => {}
    }
}

/// Finds out which services have a queue of dead letters from an earlier time. Each is looked for once, and only a few
/// in one round: a missing queue costs a channel number and a line in the broker's log. Returns whether all were looked
/// for.
async fn look_for_queues(site: &Site, transport: &Transport, workers: &[Arc<Worker>]) -> bool {
    let mut missing = 0;
    for worker in workers {
        let queue = &worker.dead_queue;
        if queue.is_known() || queue.looked_for.load(Ordering::SeqCst) {
            continue;
        }
        if missing == MOST_MISSING {
            return false;
        }
        match transport.count(&site.namespace.dead_queue(&worker.id)).await {
            Ok(Some(_)) => queue.known.store(true, Ordering::SeqCst),
            Ok(None) => missing += 1,
            // This user may not ask. There may be a queue, so the service is entered.
            Err(Error::Broker { reason, .. }) if forbids(&reason) => queue.known.store(true, Ordering::SeqCst),
            // The broker has not answered.
            Err(_) => return false,
        }
        queue.looked_for.store(true, Ordering::SeqCst);
    }
    true
}

/// Logs why the catalogue lacks services, unless the reason is the same as the last time.
fn tell_once(site: &Site, services: &[CatalogueEntry], error: &Error, told: &mut Option<String>) {
    let why = error.to_string();
    if told.as_ref() == Some(&why) {
        return;
    }
    let services: Vec<_> = services.iter().map(ToString::to_string).collect();
    warn!(name = &*site.name, ?services, %error, "a list of all dead letters will lack those of these services");
    *told = Some(why);
}

fn is_disconnected(error: &Error) -> bool {
    matches!(error, Error::Disconnected { .. })
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::sync::atomic::AtomicUsize;

    use futures::future::join_all;
    use uuid::Uuid;

    use super::*;
    use crate::server::Server;
    use crate::service::Service;
    use crate::topology::ServiceId;

    #[tokio::test(start_paused = true)]
    async fn queues_are_looked_for_once_and_few_that_are_missing_at_a_time() {
        let url = format!("memory://{}", Uuid::new_v4());
        let running = Server::connect(&url).await.expect("in memory").start().await.expect("it serves nothing");
        let (site, transport) = (running.site.clone(), running.site.transport());
        let worker = |number| {
            let id = ServiceId::new(&format!("s{number}"), 1).expect("a name");
            let (service, name) = (Service::new(&format!("s{number}"), 1), id.to_string().into());
            Arc::new(Worker::new(&id, name, service, site.clone()).expect("no threads of its own"))
        };
        let workers: Vec<_> = (0..2 * MOST_MISSING + 2).map(worker).collect();
        let last = workers.last().expect("there are some");
        transport.declare(&[site.namespace.dead(&last.id)]).await.expect("it is new");
        let looks = async || look_for_queues(&site, &transport, &workers).await;
        assert_eq!([looks().await, looks().await], [false, false]);
        assert!(!last.dead_queue.is_known());
        assert!(looks().await && last.dead_queue.is_known());
        assert_eq!(workers.iter().filter(|worker| worker.dead_queue.is_known()).count(), 1);
        // A connection that has ended does not tell whether the queue exists.
        let others: Vec<_> = (100..103).map(worker).collect();
        transport.close().await;
        assert!(!look_for_queues(&site, &transport, &others).await);
        assert!(others.iter().all(|worker| !worker.dead_queue.is_known()));
    }

    fn refusal() -> Error {
        Error::refused("declare a queue", "the test refuses")
    }

    /// How often a queue is declared that a hundred calls find missing at once, with these outcomes one after the other, and
    /// how many of them were told that it is there.
    async fn declared(queue: &DeadQueue, outcome: fn() -> Result<(), Error>) -> (usize, usize) {
        let times = Arc::new(AtomicUsize::new(0));
        let calls = (0..100).map(|_| {
            let times = times.clone();
            queue.declare(async move {
                times.fetch_add(1, Ordering::SeqCst);
                tokio::task::yield_now().await;
                outcome()
            })
        });
        let told = join_all(calls).await.into_iter().filter(Result::is_ok).count();
        (times.load(Ordering::SeqCst), told)
    }

    #[tokio::test(start_paused = true)]
    async fn a_queue_that_many_calls_find_missing_is_declared_once() {
        let queue = DeadQueue::new(false);
        assert_eq!(declared(&queue, || Ok(())).await, (1, 100));
        assert!(queue.is_known());
        // The queue may have been deleted again.
        assert_eq!(declared(&queue, || Ok(())).await, (1, 100));
    }

    #[tokio::test(start_paused = true)]
    async fn a_queue_about_which_the_broker_says_nothing_is_not_asked_for_again_meanwhile() {
        let queue = DeadQueue::new(false);
        let (answer, answered) = tokio::sync::oneshot::channel();
        let silent = queue.declare(async { answered.await.expect("the test answers") });
        assert!(tokio::time::timeout(SILENCE, silent).await.is_err(), "nobody waits for it any more");
        let mut next = pin!(queue.declare(async { panic!("the broker owes an answer") }));
        assert!(tokio::time::timeout(AGAIN, &mut next).await.is_err());
        answer.send(Ok(())).expect("it is seen through");
        assert!(!next.await.expect("it is there"), "the first one has declared it");
    }

    #[tokio::test(start_paused = true)]
    async fn a_queue_that_is_refused_is_declared_again_after_a_pause() {
        let queue = DeadQueue::new(false);
        assert_eq!(declared(&queue, || Err(refusal())).await, (1, 0));
        assert_eq!(declared(&queue, || Ok(())).await, (0, 0));
        tokio::time::advance(SOON).await;
        assert_eq!(declared(&queue, || Ok(())).await, (1, 100));
    }
}
