//! A queue that a server consumes: what it is for, how it is declared and consumed, and what people call it.
//!
//! Each service and each subscription has a list of them. A new kind of queue is a new [`Purpose`].

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::Site;
use super::message::Source;
use super::worker::Worker;
use crate::service::{ReplaySettings, Service};
use crate::topology::{CallsQueue, Declaration, GroupQueue, Namespace, QueueKind, ServiceId};
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
    /// Cancelled when the queue is not to be consumed any more, over whichever connection.
    pub(super) end: CancellationToken,
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
    /// The events of a group, to any instance.
    Group { group: ServiceId, queue: GroupQueue },
    /// The events that match a pattern, to this instance.
    Subscription { pattern: String },
    /// The events that match a pattern, out of a stream. A [`Replayer`](super::replay::Replayer) reads it.
    Replay { settings: ReplaySettings },
}

impl Purpose {
    /// What the queues of a service or group are for. A service without oneway methods has no queue for oneway calls.
    pub(super) fn of_service(id: &ServiceId, service: &Service) -> Vec<Self> {
        let calls = service.calls;
        if id.is_group() {
            let pattern = service.pattern.clone().filter(|_| service.replay.is_none());
            let in_order = service.order.is_some() && service.replay.is_none();
            let queue = GroupQueue { pattern, max_length: calls.max_length, in_order };
            return vec![Self::Instance { service: id.clone(), calls }, Self::Group { group: id.clone(), queue }];
        }
        let mut purposes =
            vec![Self::Instance { service: id.clone(), calls }, Self::Calls { service: id.clone(), calls }];
        let oneway = service.methods.values().filter(|(method, _)| method.oneway);
        let methods: Vec<_> = oneway.map(|(method, _)| method.name.clone()).collect();
        if !methods.is_empty() {
            purposes.push(Self::Work { service: id.clone(), methods });
        }
        purposes
    }

    /// What the messages of such a queue can be.
    pub(super) fn source(&self) -> Source {
        match self {
            Self::Instance { .. } => Source::Instance,
            Self::Calls { .. } => Source::Calls,
            Self::Work { .. } | Self::Group { .. } => Source::Work,
            Self::Subscription { .. } | Self::Replay { .. } => Source::Events,
        }
    }
}

impl ServedQueue {
    pub(super) fn new(number: usize, purpose: Purpose, end: CancellationToken) -> Self {
        Self { number, purpose, end }
    }

    /// What its messages can be.
    pub(super) fn source(&self) -> Source {
        self.purpose.source()
    }

    /// Whether it belongs to this server's connection: nobody else consumes it, and it ends with the connection.
    pub(super) fn is_own(&self) -> bool {
        match self.purpose {
            Purpose::Instance { .. } | Purpose::Subscription { .. } => true,
            Purpose::Calls { .. } | Purpose::Work { .. } | Purpose::Group { .. } | Purpose::Replay { .. } => false,
        }
    }

    pub(super) fn is_quorum(&self) -> bool {
        match &self.purpose {
            Purpose::Work { .. } | Purpose::Group { .. } => true,
            Purpose::Calls { calls, .. } => calls.kind == QueueKind::Quorum,
            Purpose::Instance { .. } | Purpose::Subscription { .. } | Purpose::Replay { .. } => false,
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
            Purpose::Group { group, queue } => (namespace.work_queue(group), namespace.group(group, queue)),
            Purpose::Replay { settings } => {
                let stream = namespace.kept_stream(&settings.pattern);
                (stream, namespace.kept(&settings.pattern, settings.keep_for, settings.keep_bytes))
            }
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
            Purpose::Work { service, .. } | Purpose::Group { group: service, .. } => {
                format!("the queue `{}`", namespace.work_queue(service))
            }
            Purpose::Replay { settings } => format!("the stream `{}`", namespace.kept_stream(&settings.pattern)),
            Purpose::Subscription { pattern } => format!("the queue of the subscription to `{pattern}`"),
        }
    }
}
