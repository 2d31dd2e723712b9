//! Keeps the queues of dead letters, which nobody consumes, and has the catalogue name the services that have one.

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
use super::worker::Worker;
use crate::dead;
use crate::error::Error;
use crate::topology::ServiceId;
use crate::transport::{Transport, is_end};

/// The pause before a queue of dead letters is looked for again, when it is there.
const AGAIN: Duration = Duration::from_secs(30);
/// After a refusal.
const SOON: Duration = Duration::from_secs(5);
/// The pause before the catalogue is read again, when it names what it should.
const READ_AGAIN: Duration = Duration::from_secs(600);
/// How long a dead letter waits for the catalogue to name its service.
const PATIENCE: Duration = Duration::from_secs(3);

/// The queue of a service's dead letters, which many calls may find missing at once.
#[derive(Default)]
pub(super) struct DeadQueue {
    /// Why it could not be declared, and when; whoever declares it holds this.
    refused: Mutex<Option<(Instant, Arc<Error>)>>,
    /// How often it has been declared.
    declared: AtomicU64,
    /// It has been there.
    known: AtomicBool,
}

impl DeadQueue {
    /// The queue of a service that has one in any case, or only once there is a dead letter.
    pub(super) fn new(in_any_case: bool) -> Self {
        Self { known: in_any_case.into(), ..Self::default() }
    }

    /// Declares it, unless somebody else does at this moment or was refused a moment ago: each refusal costs a channel.
    /// Tells whether it was `declaring` that did.
    async fn declare(&self, declaring: impl Future<Output = Result<(), Error>>) -> Result<bool, Arc<Error>> {
        let before = self.declared.load(Ordering::SeqCst);
        let mut refused = self.refused.lock().await;
        if self.declared.load(Ordering::SeqCst) != before {
            return Ok(false);
        }
        if let Some((_, error)) = refused.as_ref().filter(|(when, _)| when.elapsed() < SOON) {
            return Err(error.clone());
        }
        let Err(error) = declaring.await else {
            *refused = None;
            self.declared.fetch_add(1, Ordering::SeqCst);
            self.known.store(true, Ordering::SeqCst);
            return Ok(true);
        };
        let error = Arc::new(error);
        // The next connection has to be asked.
        *refused = Some((Instant::now(), error.clone())).filter(|_| !is_disconnected(&error));
        Err(error)
    }

    fn is_known(&self) -> bool {
        self.known.load(Ordering::SeqCst)
    }
}

impl Worker {
    /// Declares the queue of dead letters that is missing, and has the catalogue name the service.
    pub(super) async fn declare_dead_letters(&self, transport: &Transport) -> Result<(), Arc<Error>> {
        let namespace = &self.site.namespace;
        let queue = [namespace.dead(&self.id)];
        if !self.dead_queue.declare(transport.declare(&queue)).await? {
            return Ok(());
        }
        // A service that ends after its first dead letter is to be found nevertheless.
        let entering = dead::enter(transport, namespace, slice::from_ref(&self.id));
        if !matches!(tokio::time::timeout(PATIENCE, entering).await, Ok(Ok(()))) {
            self.site.unentered.notify_one();
        }
        Ok(())
    }
}

/// Keeps the queue of a service's dead letters until the server drains or the connection ends.
pub(super) async fn keep_dead_letters(worker: Arc<Worker>, transport: Transport) {
    let Worker { site, id, name, .. } = &*worker;
    let trouble = Trouble::DeadLetters(name.clone());
    loop {
        let declared = match transport.count(&site.namespace.dead_queue(id)).await {
            Ok(None) => worker.declare_dead_letters(&transport).await,
            // Somebody else's queue is told by how it differs.
            _ => transport.declare(&[site.namespace.dead(id)]).await.map_err(Arc::new),
        };
        let pause = match declared {
            Ok(()) => {
                site.health.cured(&trouble);
                AGAIN
            }
            Err(error) if is_disconnected(&error) => return,
            Err(error) => {
                site.health.suffers(trouble.clone(), format!("the dead letters of `{id}` have no queue: {error}"));
                SOON
            }
        };
        tokio::select! {
            () = site.draining.cancelled() => return,
            () = tokio::time::sleep(pause) => {}
        }
    }
}

/// Keeps the services with dead letters in the catalogue, until the server drains or the connection ends. Their calls do
/// not depend on it.
pub(super) async fn keep_entered(site: Arc<Site>, transport: Transport, workers: Vec<Arc<Worker>>) {
    let mut events = transport.events();
    let ended = async { while !is_end(&events.recv().await) {} };
    let entering = async {
        look_for_queues(&site, &transport, &workers).await;
        let (mut pause, mut told) = (SOON, None);
        loop {
            let known = workers.iter().filter(|worker| worker.dead_queue.is_known());
            let services: Vec<_> = known.map(|worker| worker.id.clone()).collect();
            let wait = match dead::enter(&transport, &site.namespace, &services).await {
                Ok(()) => {
                    (pause, told) = (SOON, None);
                    READ_AGAIN
                }
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
        () = ended => {}
        () = entering => {}
    }
}

/// Finds out which services have a queue of dead letters of an earlier time: once for a connection, since the broker's log
/// has a line for each that is missing.
async fn look_for_queues(site: &Site, transport: &Transport, workers: &[Arc<Worker>]) {
    for worker in workers.iter().filter(|worker| !worker.dead_queue.is_known()) {
        // What cannot be counted is there.
        if !matches!(transport.count(&site.namespace.dead_queue(&worker.id)).await, Ok(None)) {
            worker.dead_queue.known.store(true, Ordering::SeqCst);
        }
    }
}

/// Says why the catalogue lacks services, unless that was said the last time.
fn tell_once(site: &Site, services: &[ServiceId], error: &Error, told: &mut Option<String>) {
    let why = error.to_string();
    if is_disconnected(error) || told.as_ref() == Some(&why) {
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
    use std::sync::atomic::AtomicUsize;

    use futures::future::join_all;

    use super::*;

    fn refusal() -> Error {
        Error::Broker { operation: "declare a queue".to_owned(), reason: "the test refuses".to_owned() }
    }

    /// How often a queue is declared that a hundred calls find missing at once, with these outcomes one after the other, and
    /// how many of them were told that it is there.
    async fn declared(queue: &DeadQueue, outcome: impl Fn() -> Result<(), Error>) -> (usize, usize) {
        let times = AtomicUsize::new(0);
        let calls = (0..100).map(|_| {
            queue.declare(async {
                times.fetch_add(1, Ordering::SeqCst);
                tokio::task::yield_now().await;
                outcome()
            })
        });
        let told = join_all(calls).await.into_iter().filter(Result::is_ok).count();
        (times.into_inner(), told)
    }

    #[tokio::test(start_paused = true)]
    async fn a_queue_that_many_calls_find_missing_is_declared_once() {
        let queue = DeadQueue::new(false);
        assert_eq!(declared(&queue, || Ok(())).await, (1, 100));
        assert!(queue.is_known());
        // It may be deleted again.
        assert_eq!(declared(&queue, || Ok(())).await, (1, 100));
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
