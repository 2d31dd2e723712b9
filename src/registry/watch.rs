//! Watching the instances: a stream of what changes among them.
//!
//! Instances announce that they come, drain and go. One that was killed announces nothing, so each from which nothing
//! was heard for a while is asked. The broker answers at once if its queue is gone.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use futures::future::join_all;
use futures::{Stream, StreamExt as _, stream};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tracing::{debug, warn};

use super::Registry;
use crate::client::InstanceNews;
use crate::document::{Announcement, Instance, LifeState, PING};
use crate::error::Error;

/// How long nothing may be heard of an instance until it is asked whether it is there.
const CHECK: Duration = Duration::from_secs(10);
/// How long an instance may give no reply until it counts as gone, although its queue is there.
const SILENT: Duration = Duration::from_secs(95);
/// The pause before the next try, when the instances could not be asked.
const RETRY: Duration = Duration::from_secs(1);

/// What has changed among the instances.
///
/// ```
/// use futures::StreamExt;
/// use hopline::Change;
///
/// # async fn example(client: hopline::Client) {
/// let mut changes = client.registry().watch();
/// while let Some(change) = changes.next().await {
///     match change {
///         Change::Up(instance) => println!("{} serves {}", instance.instance, instance.service),
///         Change::Down { service, instance } => println!("{instance} serves {service} no more"),
///         _ => {}
///     }
/// }
/// # }
/// ```
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Change {
    /// An instance is there. At first, each that is there already is told.
    Up(Instance),
    /// What an instance says of itself has changed: above all, it drains.
    Changed(Instance),
    /// An instance is not there any more.
    Down {
        /// The service, as `name.vMAJOR`.
        service: String,
        /// The instance's id.
        instance: String,
    },
}

impl Registry {
    /// What changes among the instances of all services, for as long as the stream lives. It begins with all that are
    /// there. The stream ends when the client is closed.
    ///
    /// An instance that ends cleanly is told at once. One that was killed is told within 10 s, when its connection is
    /// gone at the broker. One that hangs, or whose machine is gone, is told when the broker has given it up (by its
    /// heartbeat), and in any case after 95 s of silence. While the client has no connection, nothing is told; when it
    /// has one again, what has changed meanwhile is.
    ///
    /// The client needs the permission to read from the exchange of discovery and to write to its own reply queue. If it
    /// lacks it, all instances are asked every 10 s.
    pub fn watch(&self) -> impl Stream<Item = Change> + Send + Unpin + use<> {
        let watch = InstanceWatch {
            heard: self.client.watch(),
            registry: self.clone(),
            known: BTreeMap::new(),
            changes: VecDeque::new(),
            ask_at: None,
            check_at: Instant::now() + CHECK,
            is_deaf: false,
        };
        stream::unfold(watch, |mut watch| async { Some((watch.next().await?, watch)) }).boxed()
    }
}

/// A service and an instance of it.
type Name = (String, String);

/// What is known of an instance.
struct KnownInstance {
    info: Instance,
    heard: Instant,
}

struct InstanceWatch {
    registry: Registry,
    heard: mpsc::UnboundedReceiver<InstanceNews>,
    known: BTreeMap<Name, KnownInstance>,
    /// What is to be told next.
    changes: VecDeque<Change>,
    /// When all are asked again.
    ask_at: Option<Instant>,
    /// When those are asked of which nothing was heard.
    check_at: Instant,
    /// Whether it does not hear what instances announce.
    is_deaf: bool,
}

impl InstanceWatch {
    /// The next change. `None` when the client is closed.
    async fn next(&mut self) -> Option<Change> {
        loop {
            if let Some(change) = self.changes.pop_front() {
                return Some(change);
            }
            tokio::select! {
                heard = self.heard.recv() => match heard? {
                    InstanceNews::Listening => {
                        self.is_deaf = false;
                        self.ask_all().await;
                    }
                    InstanceNews::Deaf(reason) => {
                        if !self.is_deaf {
                            warn!(%reason, "what instances announce is not heard: all are asked now and then");
                        }
                        self.is_deaf = true;
                        self.ask_all().await;
                    }
                    InstanceNews::Said(announcement) => self.said(announcement).await,
                },
                () = self.registry.wait_until(self.ask_at) => self.ask_all().await,
                () = self.registry.wait_until(Some(self.check_at)) => self.check().await,
            }
        }
    }

    /// Asks all instances, and compares them with what is known.
    async fn ask_all(&mut self) {
        self.ask_at = self.is_deaf.then(|| Instant::now() + CHECK);
        let services = match self.registry.services().await {
            Ok(services) => services,
            Err(error) => {
                debug!(%error, "the instances cannot be asked: they are asked again");
                self.ask_at = Some(Instant::now() + RETRY);
                return;
            }
        };
        let mut missing: BTreeSet<_> = self.known.keys().cloned().collect();
        for info in services.into_values().flatten() {
            missing.remove(&(info.service.clone(), info.instance.clone()));
            self.is_there(info);
        }
        self.check_these(missing).await;
    }

    /// An instance has replied.
    fn is_there(&mut self, info: Instance) {
        let heard = Instant::now();
        match self.known.entry((info.service.clone(), info.instance.clone())) {
            Entry::Vacant(entry) => {
                entry.insert(KnownInstance { info: info.clone(), heard });
                self.changes.push_back(Change::Up(info));
            }
            Entry::Occupied(mut entry) => {
                if entry.get().info != info {
                    self.changes.push_back(Change::Changed(info.clone()));
                }
                entry.insert(KnownInstance { info, heard });
            }
        }
    }

    /// An instance has announced something.
    async fn said(&mut self, Announcement { state, instance, services }: Announcement) {
        for service in services {
            let name = (service, instance.clone());
            match (state, self.known.get_mut(&name)) {
                (LifeState::Down, Some(_)) => self.is_gone(&name),
                (LifeState::Draining, Some(known)) if !known.info.draining => {
                    known.info.draining = true;
                    self.changes.push_back(Change::Changed(known.info.clone()));
                }
                (LifeState::Up | LifeState::Here, Some(known)) => known.heard = Instant::now(),
                (LifeState::Up | LifeState::Here, None) => self.meet(&name).await,
                _ => {}
            }
        }
    }

    /// Asks an instance that is not known yet what it serves.
    async fn meet(&mut self, (service, instance): &Name) {
        match self.registry.one::<Instance>(service, instance).await {
            Ok(info) => self.is_there(info),
            Err(Error::NoService { .. }) => {}
            Err(error) => {
                debug!(%error, service, instance, "an instance has announced itself, and cannot be asked: all are asked soon");
                self.ask_at = Some(Instant::now() + RETRY);
            }
        }
    }

    fn is_gone(&mut self, name: &Name) {
        if self.known.remove(name).is_some() {
            let (service, instance) = name.clone();
            self.changes.push_back(Change::Down { service, instance });
        }
    }

    /// Asks those of which nothing was heard for a while.
    async fn check(&mut self) {
        self.check_at = Instant::now() + CHECK;
        let silent = self.known.iter().filter(|(_, known)| known.heard.elapsed() >= CHECK);
        let silent = silent.map(|(name, _)| name.clone()).collect();
        self.check_these(silent).await;
    }

    async fn check_these(&mut self, names: BTreeSet<Name>) {
        let registry = &self.registry;
        let asked = names.into_iter().map(|name| async move {
            let replied = registry.ask_one(PING, &name.0, &name.1).await;
            (name, replied)
        });
        for (name, replied) in join_all(asked).await {
            let Some(known) = self.known.get_mut(&name) else { continue };
            match replied {
                Ok(_) => known.heard = Instant::now(),
                Err(Error::NoService { .. }) => self.is_gone(&name),
                // The connection of this client says nothing about the instance.
                Err(Error::Timeout { .. }) if known.heard.elapsed() >= SILENT => self.is_gone(&name),
                Err(_) => {}
            }
        }
    }
}
