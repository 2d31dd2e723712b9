//! Groups of subscribers, for operators: which there are, what waits for each, and an end to those that nobody needs.

mod builder;
mod group;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use futures::stream::{self, StreamExt as _};

pub use self::builder::GroupsBuilder;
pub use self::group::{Group, GroupCounts, ReplayPosition};
use crate::dead::{self, CatalogueEntry, answered};
use crate::error::Error;
use crate::topology::{Binding, Declaration, Namespace, ServiceId};
use crate::transport::{Delivery, Dial, Mode, QueueCount, Role, Settle, Transport};

/// How many groups are looked at at the same time, so that one whose queues do not answer holds up few others.
const AT_ONCE: usize = 32;
/// How long each of the offsets that a group has kept may take to come.
const NEXT: Duration = Duration::from_secs(2);

/// The groups of subscribers of a namespace: [`Subscription::shared`](crate::Subscription::shared).
///
/// The broker keeps the events of a group whether an instance of it is up or not, and so also for a group that will never
/// come back. Here an operator sees them, and [removes](Groups::remove) such a group. Groups are found by the catalogue, the
/// queue `NAMESPACE.services`, where every server enters its own.
///
/// ```
/// use hopline::{Context, Groups, Server, Subscription};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), hopline::Error> {
/// let bill = |_: Context, order: u64| async move { println!("{order}") };
/// let server = Server::connect("memory://").await?.subscribe(Subscription::to("order.*").shared("billing"), bill);
/// let server = server.start().await?;
/// let groups = Groups::connect("memory://").await?;
/// for group in groups.list().await? {
///     println!("{} {:?}: {} events wait", group.name, group.patterns, group.counts?.waiting);
/// }
/// # server.drain().await;
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct Groups {
    dial: Dial,
    transport: Transport,
    namespace: Namespace,
    /// How long a queue may take for each answer.
    timeout: Duration,
}

impl Groups {
    /// Connects with default settings to the broker that `url` names.
    ///
    /// # Errors
    /// As [`GroupsBuilder::connect`].
    pub async fn connect(url: impl AsRef<str>) -> Result<Self, Error> {
        Self::builder().connect(url).await
    }

    /// Connects as the environment says: `HOPLINE_URL`, and the other variables of [`environment`](crate::environment).
    ///
    /// # Errors
    /// As [`GroupsBuilder::connect_env`].
    pub async fn connect_env() -> Result<Self, Error> {
        Self::builder().connect_env().await
    }

    /// Settings to change before connecting.
    #[must_use]
    pub fn builder() -> GroupsBuilder {
        GroupsBuilder::default()
    }

    /// All groups, in the order of their names, whether an instance of them is up or not. One whose queues do not answer,
    /// since their nodes are down, has the error in place of the numbers.
    ///
    /// To see how far a group has read its stream, this takes a message out of a queue for a moment, over a connection of
    /// its own for each such group.
    ///
    /// # Errors
    /// `Broker` if the catalogue cannot be read, since the permission is missing or its node is down. `Disconnected`.
    pub async fn list(&self) -> Result<Vec<Group>, Error> {
        let looked_at = stream::iter(self.known().await?).map(|(group, patterns)| async move {
            let counts = self.counts(&group, &patterns).await;
            Group { name: group.name().to_owned(), patterns: patterns.into_iter().collect(), counts }
        });
        Ok(looked_at.buffered(AT_ONCE).collect().await)
    }

    /// The group of this name.
    ///
    /// # Errors
    /// As [`Groups::list`], and `Invalid` if there is none.
    pub async fn get(&self, name: &str) -> Result<Group, Error> {
        let (group, patterns) = self.named(name).await?;
        let counts = self.counts(&group, &patterns).await;
        Ok(Group { name: group.name().to_owned(), patterns: patterns.into_iter().collect(), counts })
    }

    /// Ends a group that no instance is subscribed as any more: no more events are kept for it, and its queues are
    /// deleted. Returns how many messages were deleted with them. With `force`, events that wait for it, and its dead
    /// letters, are deleted with it. If this breaks off half-way, call it again.
    ///
    /// An instance that starts while this goes on, or later, makes the group anew.
    ///
    /// # Errors
    /// - `Invalid` if there is no such group, if an instance of it is up, or if it has events or dead letters and this is
    ///   not to `force` it. Then nothing has changed.
    /// - `Broker` if a queue does not answer or this user may not delete it, `Disconnected`.
    pub async fn remove(&self, name: &str, force: bool) -> Result<u64, Error> {
        let (group, patterns) = self.named(name).await?;
        self.may_be_removed(&group, force).await?;
        let bindings: Vec<_> = patterns.iter().map(|pattern| self.binding(&group, pattern)).collect();
        self.unbind_all(&group, &bindings).await?;
        // An event may have come before the pattern was unbound.
        if let Err(refused) = self.may_be_removed(&group, force).await {
            if self.look_at(&self.namespace.offset_queue(&group)).await?.is_none() {
                let bound: Vec<_> = bindings.into_iter().map(Declaration::Binding).collect();
                self.transport.declare(&bound).await?;
            }
            return Err(refused);
        }
        let mut deleted = 0;
        for queue in self.of_events(&group) {
            deleted += self.delete(&queue).await?.unwrap_or(0);
        }
        for queue in [self.namespace.offset_queue(&group), self.namespace.turn_queue(&group)] {
            self.delete(&queue).await?;
        }
        // The entries go last: by them the group is found again if something before has failed.
        self.leave(|entry| entry.service == group).await?;
        Ok(deleted)
    }

    /// Ends a pattern by which a group gets events, when no instance subscribes to it any more: the pattern of an older
    /// release. Events that wait already stay.
    ///
    /// # Errors
    /// `Invalid` if there is no such group, or it does not have this pattern, or no other one. `Broker` if the broker
    /// refuses, `Disconnected`.
    pub async fn unbind(&self, name: &str, pattern: &str) -> Result<(), Error> {
        let (group, patterns) = self.named(name).await?;
        let group_name = group.name();
        if !patterns.contains(pattern) {
            let those = listed(&patterns);
            return Err(Error::Invalid(format!("the group `{group_name}` has no pattern `{pattern}`: it has {those}")));
        }
        if patterns.len() == 1 {
            return Err(Error::Invalid(format!(
                "the group `{group_name}` has no pattern but `{pattern}`: remove the group to end it"
            )));
        }
        self.unbind_all(&group, &[self.binding(&group, pattern)]).await?;
        self.leave(|entry| entry.service == group && entry.pattern.as_deref() == Some(pattern)).await
    }

    /// Deletes the stream that keeps the events of a pattern, with all events in it. Returns whether there was one. With
    /// `force`, it is deleted though a group reads it. Subscriptions without a group that read it are not known here. A
    /// server that reads it makes it anew, without the events, when it notices.
    ///
    /// # Errors
    /// `Invalid` if a group reads it and this is not to `force` it. `Broker` if the broker refuses, `Disconnected`.
    pub async fn remove_kept(&self, pattern: &str, force: bool) -> Result<bool, Error> {
        let mut readers = BTreeSet::new();
        for (group, patterns) in self.known().await? {
            if patterns.contains(pattern) && self.look_at(&self.namespace.offset_queue(&group)).await?.is_some() {
                readers.insert(group.name().to_owned());
            }
        }
        if !readers.is_empty() && !force {
            let those = listed(&readers);
            return Err(Error::Invalid(format!(
                "the events of `{pattern}` are kept for {those}: remove the groups before, or force it"
            )));
        }
        Ok(self.delete(&self.namespace.kept_stream(pattern)).await?.is_some())
    }

    /// Closes the connection.
    pub async fn close(&self) {
        self.transport.close().await;
    }

    /// The groups in the catalogue, each with its patterns.
    async fn known(&self) -> Result<BTreeMap<ServiceId, BTreeSet<String>>, Error> {
        let catalogue = self.namespace.catalogue_queue();
        if self.look_at(&catalogue).await?.is_none() {
            return Ok(BTreeMap::new());
        }
        let mut groups = BTreeMap::<_, BTreeSet<_>>::new();
        for CatalogueEntry { service, pattern } in dead::named(&self.transport, &self.namespace, self.timeout).await? {
            if let Some(pattern) = pattern {
                groups.entry(service).or_default().insert(pattern);
            }
        }
        Ok(groups)
    }

    /// The group of this name in the catalogue, with its patterns.
    async fn named(&self, name: &str) -> Result<(ServiceId, BTreeSet<String>), Error> {
        let group = ServiceId::parse(name).ok().filter(ServiceId::is_group);
        let group = group.map_or_else(|| ServiceId::group(name), Ok).map_err(Error::Invalid)?;
        let mut known = self.known().await?;
        known.remove_entry(&group).ok_or_else(|| {
            let those = match known.keys().map(|group| group.name().to_owned()).collect::<BTreeSet<_>>() {
                none if none.is_empty() => "there are none".to_owned(),
                names => format!("there are {}", listed(&names)),
            };
            Error::Invalid(format!("there is no group `{}`: {those}", group.name()))
        })
    }

    /// The queues that have events of a group, in the order of their way.
    fn of_events(&self, group: &ServiceId) -> [String; 3] {
        [self.namespace.work_queue(group), self.namespace.retry_queue(group), self.namespace.dead_queue(group)]
    }

    async fn counts(&self, group: &ServiceId, patterns: &BTreeSet<String>) -> Result<GroupCounts, Error> {
        let [work, retry, dead] = self.of_events(group);
        let QueueCount { waiting, consumers } = self.look_at(&work).await?.unwrap_or_default();
        let retrying = self.look_at(&retry).await?.unwrap_or_default().waiting;
        let dead = self.look_at(&dead).await?.unwrap_or_default().waiting;
        let replay = match self.look_at(&self.namespace.offset_queue(group)).await? {
            Some(offsets) => Some(self.position(group, patterns, offsets.waiting).await?),
            None => None,
        };
        Ok(GroupCounts { waiting, retrying, dead, consumers, replay })
    }

    /// How far a group has read. This has a connection of its own, since the broker may end that of who asks for a stream
    /// that is not ready. What is taken out of the queue comes back when that ends, at the latest.
    async fn position(
        &self,
        group: &ServiceId,
        patterns: &BTreeSet<String>,
        offsets: u64,
    ) -> Result<ReplayPosition, Error> {
        let transport = self.dial.connect(Role::Client).await?;
        let asked = async {
            let next = self.next(&transport, group, offsets).await?;
            let mut last = None;
            for pattern in patterns {
                let stream = self.namespace.kept_stream(pattern);
                // Of an older release the group may have patterns that have no stream.
                let operation = format!("find the end of the stream `{stream}`");
                if answered(self.timeout, &operation, transport.look_at(&stream)).await?.is_some() {
                    last = last.max(answered(self.timeout, &operation, transport.last_offset(&stream)).await?);
                }
            }
            Ok(ReplayPosition { next, last })
        };
        let position = asked.await;
        dead::close(&transport).await;
        position
    }

    /// The offset that a group has kept. It consumes the queue, by which a server that begins sees that somebody has taken
    /// the offset out and brings it back.
    async fn next(&self, transport: &Transport, group: &ServiceId, offsets: u64) -> Result<Option<u64>, Error> {
        if offsets == 0 {
            return Ok(None);
        }
        let queue = self.namespace.offset_queue(group);
        let mut consumer = transport.consume(&queue, Mode::SettleAnyTime { prefetch: 16 }).await?;
        let (mut latest, mut earlier): (Option<(u64, Delivery)>, Vec<Delivery>) = (None, Vec::new());
        for _ in 0..offsets {
            // The group may have replaced one in the meantime, or somebody else looks at them.
            let Ok(Some(delivery)) = tokio::time::timeout(self.timeout.min(NEXT), consumer.next()).await else { break };
            match (offset(&delivery), &latest) {
                (Some(offset), Some((before, _))) if offset <= *before => earlier.push(delivery),
                (Some(offset), _) => earlier.extend(latest.replace((offset, delivery)).map(|(_, before)| before)),
                (None, _) => earlier.push(delivery),
            }
        }
        earlier.into_iter().for_each(|earlier| earlier.settle(Settle::Ack));
        Ok(latest.map(|(offset, delivery)| {
            delivery.settle(Settle::GiveBack);
            offset
        }))
    }

    /// Whether a group may go.
    async fn may_be_removed(&self, group: &ServiceId, force: bool) -> Result<(), Error> {
        let ([work, retry, dead], name) = (self.of_events(group), group.name());
        let QueueCount { waiting, mut consumers } = self.look_at(&work).await?.unwrap_or_default();
        if consumers == 0 {
            consumers = self.look_at(&self.namespace.turn_queue(group)).await?.unwrap_or_default().consumers;
        }
        if consumers > 0 {
            return Err(Error::Invalid(format!(
                "{consumers} instances are subscribed as the group `{name}`: end them, or have them unsubscribe, and try again"
            )));
        }
        let retrying = self.look_at(&retry).await?.unwrap_or_default().waiting;
        let dead = self.look_at(&dead).await?.unwrap_or_default().waiting;
        if waiting + retrying + dead > 0 && !force {
            return Err(Error::Invalid(format!(
                "for the group `{name}` {} events wait, and there are {dead} dead letters: have them handled, or force it (`hopline groups rm --force`), which \
                 deletes them",
                waiting + retrying
            )));
        }
        Ok(())
    }

    fn binding(&self, group: &ServiceId, pattern: &str) -> Binding {
        let (exchange, key) = (self.namespace.events(), pattern.to_owned());
        Binding { exchange, key, queue: self.namespace.work_queue(group) }
    }

    /// Unbinds a group's queue, if it is there.
    async fn unbind_all(&self, group: &ServiceId, bindings: &[Binding]) -> Result<(), Error> {
        if self.look_at(&self.namespace.work_queue(group)).await?.is_none() {
            return Ok(());
        }
        answered(self.timeout, "unbind the queue of a group", self.transport.unbind(bindings)).await
    }

    async fn leave(&self, is_meant: impl Fn(&CatalogueEntry) -> bool) -> Result<(), Error> {
        dead::leave(&self.transport, &self.namespace, self.timeout, is_meant).await
    }

    async fn look_at(&self, queue: &str) -> Result<Option<QueueCount>, Error> {
        answered(self.timeout, &format!("count what is in `{queue}`"), self.transport.look_at(queue)).await
    }

    async fn delete(&self, queue: &str) -> Result<Option<u64>, Error> {
        answered(self.timeout, &format!("delete the queue `{queue}`"), self.transport.delete(queue)).await
    }
}

impl fmt::Debug for Groups {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Groups").field("namespace", &self.namespace).finish_non_exhaustive()
    }
}

fn offset(delivery: &Delivery) -> Option<u64> {
    std::str::from_utf8(&delivery.body).ok()?.parse().ok()
}

/// Names or patterns, as a sentence has them.
fn listed(names: &BTreeSet<String>) -> String {
    names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}
