//! The instances that are known to a watch, and how it is known that they are there.
//!
//! Instances announce that they come, drain and go. One that was killed announces nothing, so each of which nothing was
//! heard for a while is asked. The broker answers at once if its queue is gone. Where the broker tells which queues it
//! deletes, the instance is asked as soon as its own is. And now and then all are asked, since not every instance
//! announces itself.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt as _, StreamExt as _};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tracing::{debug, warn};

use super::{Change, Registry};
use crate::client::{Client, InstanceNews, WeakClient};
use crate::clock::timer;
use crate::document::{Announcement, Instance, LifeState};
use crate::error::{Error, Unanswered};
use crate::middleware::Reply;
use crate::topology::{ServiceId, check_name};

/// How often the instances are asked of which nothing was heard for so long.
const CHECK: Duration = Duration::from_secs(5);
/// How often all instances are asked, if what they announce is heard. Otherwise twice in a [`CHECK`].
const ALL: Duration = Duration::from_secs(60);
/// How long an instance may leave questions unanswered until it counts as gone, although its queue is there.
const SILENT: Duration = Duration::from_secs(95);
/// The pause before the next try, when nobody could be asked.
const RETRY: Duration = Duration::from_secs(1);
/// How many instances are asked at once that have announced themselves, and how many whether they are there.
const AT_ONCE: usize = 16;
/// How many services of an announcement are read, and how many unknown instances wait to be asked.
const MOST: usize = 10_000;

/// A service and an instance of it.
pub(super) type Name = (String, String);

/// What a watch tells.
pub(super) enum Watched {
    Changed(Change),
    /// An instance has lost its connection, and what waited for it there, and is back.
    Returned(Name),
}

/// What is known of an instance.
struct KnownInstance {
    info: Instance,
    heard: Instant,
    /// Since when it leaves questions unanswered.
    silent_since: Option<Instant>,
}

/// What comes of a question.
enum WatchAnswer {
    /// What was asked at this time.
    All(Instant, Result<BTreeMap<String, Vec<Instance>>, Error>),
    /// An instance that is known, and was asked at this time.
    Checked(Name, Instant, Result<Reply, Error>),
    /// An instance that has announced itself.
    Met(Name, Result<Instance, Error>),
}

/// The instances that are known, and the questions about them. It does not keep the client's connection open.
pub(super) struct InstanceWatch {
    client: WeakClient,
    runtime: Handle,
    news: mpsc::Receiver<InstanceNews>,
    known: BTreeMap<Name, KnownInstance>,
    /// What is to be told next.
    changes: VecDeque<Watched>,
    /// Instances that have gone, and when. An answer may be older than that.
    gone: BTreeMap<Name, Instant>,
    /// Instances that have announced themselves and are to be asked.
    unknown: BTreeSet<Name>,
    /// How many of them are being asked.
    meeting: usize,
    /// Instances that are to be asked whether they are there.
    doubted: BTreeSet<Name>,
    /// Those of them that are being asked.
    checking: BTreeSet<Name>,
    /// Those of them whose queue was deleted meanwhile. The question may have been lost in it, so they are asked again.
    deleted: BTreeSet<Name>,
    /// Since when there is a connection. What was asked before may have left over it before the instances were back.
    connected_at: Instant,
    questions: FuturesUnordered<BoxFuture<'static, WatchAnswer>>,
    /// When it begins to watch anew, and asks all.
    all_at: Option<Instant>,
    /// When those are asked of which nothing was heard.
    check_at: Instant,
    /// Whether it does not hear what instances announce.
    is_deaf: bool,
    /// Whether all instances have replied once.
    pub(super) has_all: bool,
}

impl InstanceWatch {
    pub(super) fn new(client: &Client) -> Self {
        Self {
            client: client.downgrade(),
            runtime: client.runtime().clone(),
            news: client.watch(),
            known: BTreeMap::new(),
            changes: VecDeque::new(),
            gone: BTreeMap::new(),
            unknown: BTreeSet::new(),
            meeting: 0,
            doubted: BTreeSet::new(),
            checking: BTreeSet::new(),
            deleted: BTreeSet::new(),
            connected_at: Instant::now(),
            questions: FuturesUnordered::new(),
            all_at: None,
            check_at: Instant::now() + CHECK,
            is_deaf: false,
            has_all: false,
        }
    }

    /// What asks the instances. `None` when nobody has the client any more.
    fn registry(&self) -> Option<Registry> {
        self.client.upgrade().map(|client| client.registry())
    }

    /// A change that is known already.
    pub(super) fn known_change(&mut self) -> Option<Watched> {
        self.changes.pop_front()
    }

    /// The next change. `None` when the client is closed. Nothing is lost if this is dropped before it resolves.
    pub(super) async fn next(&mut self) -> Option<Watched> {
        loop {
            if let Some(change) = self.known_change() {
                return Some(change);
            }
            self.meet();
            self.doubt();
            let (all, check) = (wait_until(&self.runtime, self.all_at), wait_until(&self.runtime, Some(self.check_at)));
            tokio::select! {
                news = self.news.recv() => match news {
                    Some(InstanceNews::Listening) => {
                        (self.is_deaf, self.connected_at) = (false, Instant::now());
                        self.ask_all();
                    }
                    Some(InstanceNews::Deaf(reason)) => {
                        if !self.is_deaf {
                            warn!(%reason, "what instances announce is not heard: all are asked now and then");
                        }
                        (self.is_deaf, self.connected_at) = (true, Instant::now());
                        self.ask_all();
                    }
                    Some(InstanceNews::Said(announcement)) => self.said(&announcement),
                    Some(InstanceNews::Deleted { service, instance }) => self.has_lost_its_queue((service, instance)),
                    None => {
                        let client = self.client.upgrade().filter(|client| !client.is_closed())?;
                        // It did not keep up.
                        self.news = client.watch();
                    }
                },
                Some(answered) = self.questions.next(), if !self.questions.is_empty() => match answered {
                    WatchAnswer::All(asked_at, services) => self.all(asked_at, services),
                    WatchAnswer::Checked(name, asked_at, replied) => self.checked(&name, asked_at, replied),
                    WatchAnswer::Met(name, info) => self.met(name, info),
                },
                // The binding is declared anew with it, if somebody has deleted it.
                () = all => {
                    self.all_at = None;
                    self.news = self.client.upgrade()?.watch();
                }
                () = check => self.check(),
            }
        }
    }

    /// Asks all instances.
    fn ask_all(&mut self) {
        let Some(registry) = self.registry() else { return };
        self.all_at = None;
        // Those that do not reply get the time until the check to come back.
        self.check_at = Instant::now() + CHECK;
        let asked_at = Instant::now();
        self.questions.push(async move { WatchAnswer::All(asked_at, registry.services().await) }.boxed());
    }

    fn all(&mut self, asked_at: Instant, services: Result<BTreeMap<String, Vec<Instance>>, Error>) {
        let pause = match services {
            Ok(services) => {
                self.has_all = true;
                services.into_values().flatten().for_each(|info| self.has_replied(info, asked_at));
                self.gone.clear();
                if self.is_deaf { 2 * CHECK } else { ALL }
            }
            Err(error @ (Error::Disconnected { .. } | Error::Blocked { .. } | Error::Timeout { .. })) => {
                debug!(%error, "the instances cannot be asked: they are asked again");
                RETRY
            }
            // Another try soon would not help.
            Err(error) => {
                debug!(%error, "the instances cannot be asked");
                ALL
            }
        };
        self.all_at = Some(Instant::now() + pause);
    }

    /// An instance has replied to a question for several, which takes its time. If it has said something else meanwhile,
    /// it is asked anew.
    pub(super) fn has_replied(&mut self, info: Instance, asked_at: Instant) {
        let name = (info.service.clone(), info.instance.clone());
        let has_gone = self.gone.get(&name).is_some_and(|at| *at >= asked_at);
        let has_changed = self.known.get(&name).is_some_and(|known| known.heard >= asked_at && known.info != info);
        if (has_gone || has_changed) && self.unknown.len() < MOST {
            self.unknown.insert(name);
        } else {
            self.is_there(info);
        }
    }

    /// An instance has replied.
    fn is_there(&mut self, info: Instance) {
        if ServiceId::parse(&info.service).is_err() || check_name("instance", &info.instance).is_err() {
            return debug!(service = info.service, instance = info.instance, "no instance can have such a name");
        }
        let known = KnownInstance { info: info.clone(), heard: Instant::now(), silent_since: None };
        match self.known.entry((info.service.clone(), info.instance.clone())) {
            Entry::Vacant(entry) => {
                entry.insert(known);
                self.changes.push_back(Watched::Changed(Change::Up(info)));
            }
            Entry::Occupied(mut entry) => {
                if entry.insert(known).info != info {
                    self.changes.push_back(Watched::Changed(Change::Changed(info)));
                }
            }
        }
    }

    /// An instance has announced something. It is believed only that it is still here: the rest is asked.
    fn said(&mut self, announcement: &Arc<Announcement>) {
        let Announcement { state, instance, services } = &**announcement;
        for service in services.iter().take(MOST).filter(|service| ServiceId::parse(service).is_ok()) {
            let name = (service.clone(), instance.clone());
            match (state, self.known.get_mut(&name)) {
                (LifeState::Up | LifeState::Here, Some(known)) => {
                    (known.heard, known.silent_since) = (Instant::now(), None);
                    if *state == LifeState::Up {
                        self.changes.push_back(Watched::Returned(name));
                    }
                }
                (LifeState::Down, Some(_)) => self.ask_whether_there(name),
                (LifeState::Up | LifeState::Here | LifeState::Draining, _) if self.unknown.len() < MOST => {
                    self.unknown.insert(name);
                }
                _ => {}
            }
        }
    }

    /// The queue of an instance is deleted. The instance may be back with another one, so it is asked.
    fn has_lost_its_queue(&mut self, name: Name) {
        if !self.known.contains_key(&name) {
            // Its reply may be under way.
            if self.gone.len() < MOST {
                self.gone.insert(name, Instant::now());
            }
            return;
        }
        debug!(service = name.0, instance = name.1, "the broker has deleted the queue of an instance: it is asked");
        if self.checking.contains(&name) {
            self.deleted.insert(name);
        } else {
            self.doubted.insert(name);
        }
    }

    /// Asks instances that have announced something of themselves.
    fn meet(&mut self) {
        while self.meeting < AT_ONCE
            && let Some(name) = self.unknown.pop_first()
        {
            let Some(registry) = self.registry() else { return };
            self.meeting += 1;
            let met = async move {
                let info = registry.one::<Instance>(&name.0, &name.1).await;
                WatchAnswer::Met(name, info)
            };
            self.questions.push(met.boxed());
        }
    }

    fn met(&mut self, name: Name, info: Result<Instance, Error>) {
        self.meeting -= 1;
        match info {
            Ok(info) if (&info.service, &info.instance) == (&name.0, &name.1) => self.is_there(info),
            Ok(_) => debug!(service = name.0, instance = name.1, "an instance says that it is another"),
            Err(error) => debug!(%error, service = name.0, instance = name.1, "an instance cannot be asked"),
        }
    }

    /// Asks those of which nothing was heard for a while.
    fn check(&mut self) {
        self.check_at = Instant::now() + CHECK;
        let silent = self.known.iter().filter(|(_, known)| known.heard.elapsed() >= CHECK);
        let silent: Vec<_> = silent.map(|(name, _)| name.clone()).collect();
        silent.into_iter().for_each(|name| self.ask_whether_there(name));
    }

    /// Asks an instance soon whether it is there.
    pub(super) fn ask_whether_there(&mut self, name: Name) {
        if !self.checking.contains(&name) {
            self.doubted.insert(name);
        }
    }

    /// Asks the instances that may not be there any more.
    fn doubt(&mut self) {
        while self.checking.len() < AT_ONCE
            && let Some(name) = self.doubted.pop_first()
        {
            let Some(registry) = self.registry() else { return };
            self.checking.insert(name.clone());
            let asked_at = Instant::now();
            let checked = async move {
                let replied = registry.is_there(&name.0, &name.1).await;
                WatchAnswer::Checked(name, asked_at, replied)
            };
            self.questions.push(checked.boxed());
        }
    }

    fn checked(&mut self, name: &Name, asked_at: Instant, replied: Result<Reply, Error>) {
        self.checking.remove(name);
        let is_deleted = self.deleted.remove(name);
        let Some(known) = self.known.get_mut(name) else { return };
        let is_gone = match replied {
            Ok(_) | Err(Error::Fault(_)) => {
                (known.heard, known.silent_since) = (Instant::now(), None);
                false
            }
            // If it was asked before this connection, it may not be back yet.
            Err(Error::NoService { .. }) => asked_at >= self.connected_at,
            // It has not left this client.
            Err(Error::Timeout { why: Unanswered::Unsent | Unanswered::Congested, .. }) => false,
            Err(Error::Timeout { .. }) => known.silent_since.get_or_insert_with(Instant::now).elapsed() >= SILENT,
            // The connection of this client says nothing about the instance.
            Err(_) => {
                known.silent_since = None;
                false
            }
        };
        if is_gone {
            self.known.remove(name);
            self.gone.insert(name.clone(), Instant::now());
            let (service, instance) = name.clone();
            self.changes.push_back(Watched::Changed(Change::Down { service, instance }));
        } else if is_deleted {
            self.doubted.insert(name.clone());
        }
    }
}

/// Resolves at this time. Never resolves without one.
fn wait_until(runtime: &Handle, at: Option<Instant>) -> impl Future<Output = ()> + use<> {
    let timer = at.map(|at| timer(runtime, at));
    async {
        match timer {
            Some(timer) => timer.await,
            None => std::future::pending().await,
        }
    }
}
