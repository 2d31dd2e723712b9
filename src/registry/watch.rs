//! Watching the instances: a stream of what changes among them.
//!
//! Instances announce that they come, drain and go. One that was killed announces nothing, so each of which nothing was
//! heard for a while is asked. The broker answers at once if its queue is gone. And now and then all are asked, since
//! not every instance announces itself.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt as _, Stream, StreamExt as _, stream};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};
use tracing::{debug, warn};

use super::Registry;
use crate::client::{Client, InstanceNews, WeakClient};
use crate::document::{Announcement, Instance, LifeState, PING};
use crate::error::{Error, Unanswered};
use crate::middleware::Reply;
use crate::topology::ServiceId;

/// How often the instances are asked of which nothing was heard for so long.
const CHECK: Duration = Duration::from_secs(5);
/// How often all instances are asked, if what they announce is heard. Otherwise twice in a [`CHECK`].
const ALL: Duration = Duration::from_secs(60);
/// How long an instance may leave questions unanswered until it counts as gone, although its queue is there.
const SILENT: Duration = Duration::from_secs(95);
/// The pause before the next try, when nobody could be asked.
const RETRY: Duration = Duration::from_secs(1);
/// How many instances are asked at once that have announced themselves.
const AT_ONCE: usize = 16;
/// How many services of an announcement are read, and how many unknown instances wait to be asked.
const MOST: usize = 10_000;

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
    /// An instance is not there any more. One that has lost its connection for more than some seconds is told as down, and
    /// as up again when it is back.
    Down {
        /// The service, as `name.vMAJOR`.
        service: String,
        /// The instance's id.
        instance: String,
    },
}

impl Registry {
    /// What changes among the instances of all services, for as long as the stream lives. It begins with all that are
    /// there. The stream ends when the client is closed. The times and the count of the registry do not matter here.
    ///
    /// An instance that ends cleanly is told at once. One that was killed is told within 10 s, when its connection is
    /// gone at the broker. One that hangs, or whose machine is gone, is told when the broker has given it up (by its
    /// heartbeat), and in any case when it has left questions unanswered for 95 s. While the client has no connection,
    /// nothing is told; what has changed meanwhile is told when it has one again.
    ///
    /// The client needs the permission to read from the exchange of discovery and to write to its own reply queue. If it
    /// lacks it, all instances are asked every 10 s.
    pub fn watch(&self) -> impl Stream<Item = Change> + Send + Unpin + use<> {
        let watch = (InstanceWatch::new(&self.client), self.client.clone());
        stream::unfold(watch, |(mut watch, client)| async { Some((watch.next().await?, (watch, client))) })
            .boxed()
            .fuse()
    }
}

/// A service and an instance of it.
pub(super) type Name = (String, String);

/// What is known of an instance.
struct KnownInstance {
    info: Instance,
    heard: Instant,
    /// Since when it leaves questions unanswered.
    silent_since: Option<Instant>,
}

/// What comes of a question.
enum WatchAnswer {
    All(Result<BTreeMap<String, Vec<Instance>>, Error>),
    /// An instance that is known.
    Checked(Name, Result<Reply, Error>),
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
    changes: VecDeque<Change>,
    /// Instances that have announced themselves and are to be asked.
    unknown: BTreeSet<Name>,
    /// How many of them are being asked.
    meeting: usize,
    questions: FuturesUnordered<BoxFuture<'static, WatchAnswer>>,
    /// When it begins to watch anew, and asks all.
    all_at: Option<Instant>,
    /// When those are asked of which nothing was heard.
    check_at: Instant,
    /// Whether it does not hear what instances announce.
    is_deaf: bool,
}

impl InstanceWatch {
    pub(super) fn new(client: &Client) -> Self {
        Self {
            client: client.downgrade(),
            runtime: client.runtime().clone(),
            news: client.watch(),
            known: BTreeMap::new(),
            changes: VecDeque::new(),
            unknown: BTreeSet::new(),
            meeting: 0,
            questions: FuturesUnordered::new(),
            all_at: None,
            check_at: Instant::now() + CHECK,
            is_deaf: false,
        }
    }

    /// What asks the instances. `None` when nobody has the client any more.
    fn registry(&self) -> Option<Registry> {
        self.client.upgrade().map(|client| client.registry())
    }

    /// A change that is known already.
    pub(super) fn known_change(&mut self) -> Option<Change> {
        self.changes.pop_front()
    }

    /// The next change. `None` when the client is closed. Nothing is lost if this is dropped before it resolves.
    pub(super) async fn next(&mut self) -> Option<Change> {
        loop {
            if let Some(change) = self.known_change() {
                return Some(change);
            }
            self.meet();
            let (all, check) = (timer(&self.runtime, self.all_at), timer(&self.runtime, Some(self.check_at)));
            tokio::select! {
                news = self.news.recv() => match news {
                    Some(InstanceNews::Listening) => {
                        self.is_deaf = false;
                        self.ask_all();
                    }
                    Some(InstanceNews::Deaf(reason)) => {
                        if !self.is_deaf {
                            warn!(%reason, "what instances announce is not heard: all are asked now and then");
                        }
                        self.is_deaf = true;
                        self.ask_all();
                    }
                    Some(InstanceNews::Said(announcement)) => self.said(&announcement),
                    None => {
                        let client = self.client.upgrade().filter(|client| !client.is_closed())?;
                        // It did not keep up.
                        self.news = client.watch();
                    }
                },
                Some(answered) = self.questions.next(), if !self.questions.is_empty() => match answered {
                    WatchAnswer::All(services) => self.all(services),
                    WatchAnswer::Checked(name, replied) => self.checked(&name, replied),
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
        self.questions.push(async move { WatchAnswer::All(registry.services().await) }.boxed());
    }

    fn all(&mut self, services: Result<BTreeMap<String, Vec<Instance>>, Error>) {
        let pause = match services {
            Ok(services) => {
                services.into_values().flatten().for_each(|info| self.is_there(info));
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

    /// An instance has replied.
    pub(super) fn is_there(&mut self, info: Instance) {
        let known = KnownInstance { info: info.clone(), heard: Instant::now(), silent_since: None };
        match self.known.entry((info.service.clone(), info.instance.clone())) {
            Entry::Vacant(entry) => {
                entry.insert(known);
                self.changes.push_back(Change::Up(info));
            }
            Entry::Occupied(mut entry) => {
                if entry.insert(known).info != info {
                    self.changes.push_back(Change::Changed(info));
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
                    (known.heard, known.silent_since) = (Instant::now(), None)
                }
                (LifeState::Down, Some(_)) => self.ask_whether_there(name),
                (LifeState::Up | LifeState::Here | LifeState::Draining, _) if self.unknown.len() < MOST => {
                    self.unknown.insert(name);
                }
                _ => {}
            }
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

    pub(super) fn ask_whether_there(&mut self, name: Name) {
        let Some(registry) = self.registry() else { return };
        let checked = async move {
            let replied = registry.ask_one(PING, &name.0, &name.1).await;
            WatchAnswer::Checked(name, replied)
        };
        self.questions.push(checked.boxed());
    }

    fn checked(&mut self, name: &Name, replied: Result<Reply, Error>) {
        let Some(known) = self.known.get_mut(name) else { return };
        let is_gone = match replied {
            Ok(_) | Err(Error::Fault(_)) => {
                (known.heard, known.silent_since) = (Instant::now(), None);
                false
            }
            Err(Error::NoService { .. }) => true,
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
            let (service, instance) = name.clone();
            self.changes.push_back(Change::Down { service, instance });
        }
    }
}

/// Resolves at this time. Never resolves without one.
fn timer(runtime: &Handle, at: Option<Instant>) -> impl Future<Output = ()> + use<> {
    let sleep = at.map(|at| {
        let _entered = Handle::try_current().is_err().then(|| runtime.enter());
        sleep_until(at)
    });
    async {
        match sleep {
            Some(sleep) => sleep.await,
            None => std::future::pending().await,
        }
    }
}
