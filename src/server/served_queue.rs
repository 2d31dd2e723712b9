//! A queue that a server consumes: what it is for, how it is declared and consumed, and what people call it.
//!
//! Each service and each subscription has a list of them. A new kind of queue is a new [`Purpose`].

use std::sync::Arc;

use super::Site;
use super::message::Source;
use super::worker::Worker;
use crate::service::Service;
use crate::topology::{CallsQueue, Declaration, Namespace, QueueKind, ServiceId};
use crate::transport::Mode;

/// The prefetch of an instance's own queue. Cancels arrive there, and they must not wait behind more than this many
/// calls.
const OWN_PREFETCH: u16 = 1024;

/// A service or a subscription that is served: its worker, and the queues that it consumes.
#[derive(Clone)]
pub(super) struct Served {
    pub(super) worker: Arc<Worker>,
    pub(super) queues: Arc<[Arc<ServedQueue>]>,
}

/// A queue that a server consumes.
#[derive(Debug)]
pub(super) struct ServedQueue {
    /// Its number among all queues of the server.
    pub(super) number: usize,
    purpose: Purpose,
}

/// What a queue is for.
#[derive(Debug)]
pub(super) enum Purpose {
    /// Calls to this instance of a service, broadcasts, and cancels.
    Instance { service: ServiceId, calls: CallsQueue },
    /// Calls to any instance of a service.
    Calls { service: ServiceId, calls: CallsQueue },
    /// Oneway calls of these methods, to any instance of a service.
    Work { service: ServiceId, methods: Vec<String> },
    /// The events that match a pattern.
    Subscription { pattern: String },
}

impl Purpose {
    /// What the queues of a service are for. A service without oneway methods has no queue for oneway calls.
    pub(super) fn of_service(id: &ServiceId, service: &Service) -> Vec<Self> {
        let calls = service.calls;
        let mut purposes =
            vec![Self::Instance { service: id.clone(), calls }, Self::Calls { service: id.clone(), calls }];
        let oneway = service.methods.values().filter(|(method, _)| method.oneway);
        let methods: Vec<_> = oneway.map(|(method, _)| method.name.clone()).collect();
        if !methods.is_empty() {
            purposes.push(Self::Work { service: id.clone(), methods });
        }
        purposes
    }
}

impl ServedQueue {
    pub(super) fn new(number: usize, purpose: Purpose) -> Self {
        Self { number, purpose }
    }

    /// What its messages can be.
    pub(super) fn source(&self) -> Source {
        match self.purpose {
            Purpose::Instance { .. } => Source::Instance,
            Purpose::Calls { .. } => Source::Calls,
            Purpose::Work { .. } => Source::Work,
            Purpose::Subscription { .. } => Source::Events,
        }
    }

    /// Whether it belongs to this server's connection: nobody else consumes it, and it ends with the connection.
    pub(super) fn is_own(&self) -> bool {
        match self.purpose {
            Purpose::Instance { .. } | Purpose::Subscription { .. } => true,
            Purpose::Calls { .. } | Purpose::Work { .. } => false,
        }
    }

    pub(super) fn is_quorum(&self) -> bool {
        match &self.purpose {
            Purpose::Work { .. } => true,
            Purpose::Calls { calls, .. } => calls.kind == QueueKind::Quorum,
            Purpose::Instance { .. } | Purpose::Subscription { .. } => false,
        }
    }

    /// How it is consumed by a worker with this prefetch.
    pub(super) fn mode(&self, prefetch: u16) -> Mode {
        match self.purpose {
            Purpose::Instance { .. } => Mode::Settle { prefetch: OWN_PREFETCH.max(prefetch.saturating_mul(2)) },
            _ if self.is_quorum() => Mode::SettleAnyTime { prefetch },
            _ => Mode::Settle { prefetch },
        }
    }

    /// Its name, and everything that has to be declared for it. The name of an own queue ends in `suffix`.
    pub(super) fn declarations(&self, site: &Site, suffix: &str) -> (String, Vec<Declaration>) {
        let Site { namespace, instance, .. } = site;
        match &self.purpose {
            Purpose::Instance { service, calls } => {
                let queue = namespace.instance_queue(service, instance, suffix);
                let parts = namespace.instance(service, &queue, instance, *calls);
                (queue, parts)
            }
            Purpose::Calls { service, calls } => (namespace.calls_queue(service), namespace.calls(service, *calls)),
            Purpose::Work { service, methods } => (namespace.work_queue(service), namespace.work(service, methods)),
            Purpose::Subscription { pattern } => {
                let queue = namespace.events_queue(instance, suffix);
                let parts = namespace.subscription(&queue, pattern);
                (queue, parts)
            }
        }
    }

    /// The queue in words, for the state. Queues whose names are new each time are described by their purpose.
    pub(super) fn title(&self, namespace: &Namespace) -> String {
        match &self.purpose {
            Purpose::Instance { service, .. } => format!("the queue of this instance of `{service}`"),
            Purpose::Calls { service, .. } => format!("the queue `{}`", namespace.calls_queue(service)),
            Purpose::Work { service, .. } => format!("the queue `{}`", namespace.work_queue(service)),
            Purpose::Subscription { pattern } => format!("the queue of the subscription to `{pattern}`"),
        }
    }
}
