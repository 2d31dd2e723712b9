//! What all parts of a server share: its identity and settings, its connection, and what runs.

use std::collections::{BTreeMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::Duration;

use tokio::sync::{Notify, OnceCell, RwLock, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use super::allow::Allow;
use super::calls::Calls;
use super::health::Health;
use super::process::ProcessFacts;
use super::reading::{Reading, Topology};
use super::replies::Replier;
use super::rules::ServerRules;
#[cfg(feature = "metrics")]
use super::sender_clocks::SenderClocks;
use super::worker::Worker;
use crate::compression::Compression;
use crate::exchanges::Exchanges;
use crate::middleware::Chain;
use crate::topology::{Binding, Namespace, is_presence_key};
use crate::transport::Transport;

/// What all workers of a server share.
pub(super) struct Site {
    /// The current connection. While there is none, the last one.
    pub(super) transports: Arc<watch::Sender<Transport>>,
    pub(super) replies: Replier,
    pub(super) namespace: Namespace,
    /// `Some` if the server heeds rules.
    pub(super) rules: Option<ServerRules>,
    pub(super) instance: Arc<str>,
    /// The name of the server's connections, which the log uses too.
    pub(super) name: Arc<str>,
    /// Whether the broker does not let this user announce anything.
    pub(super) muted: AtomicBool,
    pub(super) process: ProcessFacts,
    /// What its program says about it.
    pub(super) attributes: BTreeMap<String, String>,
    /// The services it serves, each written `name.vMAJOR`.
    pub(super) services: Arc<[Arc<str>]>,
    pub(super) max_size: usize,
    /// How results are compressed.
    pub(super) compression: Option<Compression>,
    pub(super) middleware: Chain,
    pub(super) exchanges: Exchanges,
    pub(super) allow: Allow,
    /// Who may have this server drained from afar. Without a rule, nobody.
    pub(super) allow_drain: Allow,
    /// Cancelled when the server begins to drain: it starts no more calls.
    pub(super) draining: CancellationToken,
    /// The drain. Whoever wants it, it happens once.
    pub(super) end: OnceCell<()>,
    /// The tasks that read the queues of services. Each waits for the calls that it started.
    pub(super) shared: TaskTracker,
    /// The running calls that came through this instance's own queues. While there are any, these queues are read,
    /// since a cancel may come.
    pub(super) addressed: TaskTracker,
    /// Cancelled when all those calls have ended.
    pub(super) drained: CancellationToken,
    /// The tasks that read this instance's own queues. They run until the end, to tell callers that the instance is
    /// leaving.
    pub(super) own: TaskTracker,
    /// The running calls of each service and subscription.
    pub(super) calls: Mutex<Vec<Arc<Mutex<Calls>>>>,
    /// The calls that had not started when the server began to drain, and were requeued. The broker may deliver one of
    /// them to this server again until it knows that the server takes no more.
    pub(super) given_back: Mutex<HashSet<Uuid>>,
    /// What is declared over the current connection.
    pub(super) topology: Mutex<Topology>,
    /// Notified when the catalogue has no entry for a service that has dead letters.
    pub(super) unentered: Notify,
    /// Held for reading while bindings of an instance's queues are declared. A drain waits for that before it removes
    /// bindings.
    pub(super) declaring: RwLock<()>,
    pub(super) health: Arc<Health>,
    /// Who runs the calls of its services and handles events, as long as it does.
    pub(super) workers: Mutex<Vec<Weak<Worker>>>,
    /// The clocks of those who call.
    #[cfg(feature = "metrics")]
    pub(super) clocks: SenderClocks,
}

impl Site {
    /// Whether this binding makes clients' questions whether the service takes calls reach this server.
    pub(super) fn is_presence(&self, binding: &Binding) -> bool {
        binding.exchange == self.namespace.rpc() && is_presence_key(&binding.key)
    }

    /// Who runs the calls of its services and handles events.
    pub(super) fn workers(&self) -> Vec<Arc<Worker>> {
        let workers = self.workers.lock().expect("no panic while holding the workers");
        workers.iter().filter_map(Weak::upgrade).collect()
    }

    pub(super) fn is_mute(&self) -> bool {
        self.muted.load(Ordering::Relaxed)
    }

    /// Announces nothing any more.
    pub(super) fn mute(&self) {
        self.muted.store(true, Ordering::Relaxed);
    }

    /// Resolves when the server has been draining for `time`.
    pub(super) async fn has_drained_for(&self, time: Duration) {
        self.draining.cancelled().await;
        tokio::time::sleep(time).await;
    }

    pub(super) fn transport(&self) -> Transport {
        self.transports.borrow().clone()
    }

    /// How many calls are running now, and how many have finished, in all services and subscriptions.
    pub(super) fn tally(&self) -> (usize, u64) {
        let calls = self.calls.lock().expect("no panic while holding what is served");
        let tallies = calls.iter().map(|calls| calls.lock().expect("no panic while holding the calls").tally());
        tallies.fold((0, 0), |(running, finished), (r, f)| (running + r, finished + f))
    }

    pub(super) fn given_back(&self) -> MutexGuard<'_, HashSet<Uuid>> {
        self.given_back.lock().expect("no panic while holding what was given back")
    }

    pub(super) fn topology(&self) -> Topology {
        self.topology.lock().expect("no panic while holding the topology").clone()
    }

    /// Makes the connection of `reading` the current one.
    pub(super) fn serves_over(&self, reading: &Reading) {
        *self.topology.lock().expect("no panic while holding the topology") = reading.topology.clone();
        self.transports.send_replace(reading.transport.clone());
    }
}
