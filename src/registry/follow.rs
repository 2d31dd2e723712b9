//! Following the instances for routes: what a [watch](super::instance_watch) tells becomes the candidates of the services that
//! calls are sent to along routes.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt as _, StreamExt as _};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tracing::debug;

use super::Change;
use super::instance_watch::{InstanceWatch, Watched};
use crate::client::{Client, RoutedService, Wanted, WeakClient};
use crate::document::Instance;
use crate::error::Error;
use crate::route::Candidate;

/// How long the instances of a service are waited for when its first call comes. The call waits no longer than 200 ms.
const FIRST: Duration = Duration::from_millis(180);
/// How long the next of them is waited for after one has replied.
const FIRST_STALL: Duration = Duration::from_millis(50);

/// Follows the instances for the routes of a client, unless somebody does already.
pub(crate) fn follow(client: &Client) {
    if let Some(wanted) = client.router().begin() {
        let _entered = client.runtime().enter();
        let follower = Follower {
            client: client.downgrade(),
            watch: InstanceWatch::new(client),
            wanted,
            known: BTreeMap::new(),
            routed: HashMap::new(),
            asking: FuturesUnordered::new(),
            asked: HashSet::new(),
        };
        client.runtime().spawn(follower.run());
    }
}

/// The answer for a service.
type Asked = (Arc<str>, Instant, Result<Vec<Instance>, Error>);

struct Follower {
    client: WeakClient,
    watch: InstanceWatch,
    wanted: mpsc::UnboundedReceiver<Wanted>,
    /// The instances of each service, by their ids.
    known: BTreeMap<String, BTreeMap<String, Candidate>>,
    /// The services that calls are sent to along routes.
    routed: HashMap<Arc<str>, Arc<RoutedService>>,
    /// Which instances a service has: asked for its first call.
    asking: FuturesUnordered<BoxFuture<'static, Asked>>,
    /// The names of the services that are asked.
    asked: HashSet<Arc<str>>,
}

impl Follower {
    /// Runs until the client is closed or dropped.
    async fn run(mut self) {
        loop {
            tokio::select! {
                watched = self.watch.next() => {
                    let Some(watched) = watched else { return };
                    let changed = BTreeSet::from([self.take(watched)]);
                    self.publish_with(changed);
                }
                wanted = self.wanted.recv() => match wanted {
                    Some(Wanted::Service(service)) => self.want(service),
                    Some(Wanted::Instance { service, instance }) => {
                        self.watch.ask_whether_there((service.to_string(), instance.to_string()));
                    }
                    None => return,
                },
                Some((service, asked_at, instances)) = self.asking.next(), if !self.asking.is_empty() => {
                    self.answered(&service, asked_at, instances);
                }
            }
        }
    }

    /// Takes what has changed. Returns the service that it concerns.
    fn take(&mut self, watched: Watched) -> String {
        match watched {
            Watched::Returned((service, instance)) => {
                let known = self.known.get_mut(&service).and_then(|instances| instances.get_mut(&instance));
                if let Some(candidate) = known {
                    *candidate = candidate.anew();
                }
                service
            }
            Watched::Changed(Change::Up(info) | Change::Changed(info)) => {
                let instances = self.known.entry(info.service.clone()).or_default();
                let candidate = Candidate::new(&info, instances.get(&info.instance));
                instances.insert(info.instance, candidate);
                info.service
            }
            Watched::Changed(Change::Down { service, instance }) => {
                if let Some(instances) = self.known.get_mut(&service) {
                    if let Some(gone) = instances.remove(&instance) {
                        gone.leaves();
                    }
                    if instances.is_empty() {
                        self.known.remove(&service);
                    }
                }
                service
            }
        }
    }

    /// Takes what else has changed, and tells it all: a key must not go to another instance since one is told first.
    fn publish_with(&mut self, mut changed: BTreeSet<String>) {
        while let Some(watched) = self.watch.known_change() {
            changed.insert(self.take(watched));
        }
        changed.iter().for_each(|service| self.publish(service));
    }

    /// Tells the calls of a service which instances it has, unless it is being asked.
    fn publish(&self, service: &str) {
        if let Some(routed) = self.routed.get(service).filter(|_| !self.asked.contains(service)) {
            let instances = self.known.get(service).into_iter().flat_map(BTreeMap::values);
            routed.has(instances.cloned().collect());
        }
    }

    /// A call does not know the instances of its service.
    fn want(&mut self, service: Arc<RoutedService>) {
        let name = service.name.clone();
        self.routed.insert(name.clone(), service);
        if self.watch.has_all && self.known.contains_key(&*name) {
            return self.publish(&name);
        }
        // Many calls may begin at the same moment.
        if !self.asked.insert(name.clone()) {
            return;
        }
        let Some(client) = self.client.upgrade() else { return };
        let registry = client.registry().total(FIRST).stall(FIRST_STALL);
        let asked_at = Instant::now();
        let asked = async move {
            let instances = registry.instances(&name).await;
            (name, asked_at, instances)
        };
        self.asking.push(asked.boxed());
    }

    /// The instances of a service have replied. Calls choose among all of them, and not among the first.
    fn answered(&mut self, service: &str, asked_at: Instant, instances: Result<Vec<Instance>, Error>) {
        self.asked.remove(service);
        match instances {
            Ok(instances) => instances.into_iter().for_each(|info| self.watch.has_replied(info, asked_at)),
            Err(error) => debug!(%error, service, "the instances of a service cannot be asked"),
        }
        self.publish_with(BTreeSet::from([service.to_owned()]));
    }
}
