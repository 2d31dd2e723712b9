//! A subscription: which events a handler gets, who shares them, and what becomes of one that cannot be handled.

use std::fmt;
use std::future::Future;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

use serde::de::DeserializeOwned;

use crate::clock::unix_millis;
use crate::codec::Codec;
use crate::context::Context;
use crate::event::Event;
use crate::limits::EVENTS_PREFETCH;
use crate::service::{Dispatch, EVENT, EventOrder, EventResult, Method, Replay, ReplaySettings, Service};
use crate::topology::{ServiceId, check_event_pattern};

/// How many events that are ordered an instance holds for each that it handles at once. Those of one key wait for each
/// other, so it looks for other keys that far ahead.
const LOOKS_AHEAD: usize = 4;
/// The longest pattern, in bytes, whose events can be kept: the stream's name has it in it, behind that of the namespace.
const MAX_KEPT: usize = 180;
/// How long events are kept, unless it is set otherwise.
const KEEP_FOR: Duration = Duration::from_secs(7 * 24 * 3600);
/// How many bytes of events are kept, unless it is set otherwise.
const KEEP_BYTES: u64 = 10 * 1024 * 1024 * 1024;

/// Which events a handler gets, and how. [`Server::subscribe`](crate::Server::subscribe) takes one together with the
/// handler. A pattern alone, such as `"order.*"`, is a subscription with default settings.
///
/// Without a [group](Self::shared), each server that subscribes gets a copy of each event, and what is published while it
/// is away is lost to it. With one, the broker keeps the events for the group, and each is handled by one of its
/// instances.
///
/// ```
/// use hopline::{Context, Fault, Server, Subscription};
///
/// # async fn example() -> Result<(), hopline::Error> {
/// let bill = |ctx: Context, order: u64| async move {
///     println!("{}: order {order}, attempt {}", ctx.method(), ctx.attempt());
///     Ok::<_, Fault>(())
/// };
/// let server = Server::connect("memory://").await?.subscribe(Subscription::to("order.*").shared("billing"), bill);
/// # Ok(()) }
/// ```
#[must_use = "it is given to `Server::subscribe`"]
pub struct Subscription<T> {
    pattern: String,
    /// The version of the events that it takes. `None`: any.
    version: Option<u32>,
    group: Option<String>,
    /// How its events are treated.
    method: Method,
    /// The settings that only a group has, for the error without one.
    of_groups: Vec<&'static str>,
    prefetch: Option<u16>,
    concurrency: Option<usize>,
    dispatch: Option<Dispatch>,
    max_queue: Option<u32>,
    from: Option<Replay>,
    /// When `from` was set, in milliseconds since 1970.
    made_at: u64,
    keep_for: Option<Duration>,
    keep_bytes: Option<u64>,
    order: Option<LineOf<T>>,
}

/// Which line an event waits in.
type LineOf<T> = Arc<dyn Fn(&T) -> u64 + Send + Sync>;

impl<T> Subscription<T> {
    /// A subscription to the events whose key matches `pattern`: words with single dots between them, where `*` stands for
    /// any one word and `#` for any number of words. Another pattern makes [`Server::start`](crate::Server::start) fail.
    pub fn to(pattern: impl Into<String>) -> Self {
        Self {
            pattern: pattern.into(),
            version: None,
            group: None,
            method: Method::new(EVENT),
            of_groups: Vec::new(),
            prefetch: None,
            concurrency: None,
            dispatch: None,
            max_queue: None,
            from: None,
            made_at: 0,
            keep_for: None,
            keep_bytes: None,
            order: None,
        }
    }

    /// Shares the events among all who subscribe as this group: each event goes to one instance of it. The broker keeps the
    /// events in a queue of the group, which stays while no instance is up, until it is
    /// [removed](crate::Groups::remove). Default: no group.
    ///
    /// - An event is handled at least once. It comes again if its instance dies or loses its connection.
    /// - An event whose handler fails is tried again after a [pause](Self::pause). After its last
    ///   [attempt](Self::attempts) it is a [dead letter](crate::DeadLetters) of the group, `group:NAME`. So is one that
    ///   cannot be read, at once. A replayed one goes to this group alone.
    /// - Up to 256 events are handled at once, unless [`concurrency`](Self::concurrency) says otherwise. For events in order
    ///   see [`ordered_by`](Self::ordered_by).
    ///
    /// The group's name has 1 to 64 characters out of `[A-Za-z0-9_-]`. A server can subscribe once as each group.
    pub fn shared(mut self, group: impl Into<String>) -> Self {
        self.group = Some(group.into());
        self
    }

    /// Handles the events of one key one after the other, in the order in which one publisher sent them, while those of
    /// other keys run beside them. Default: no order.
    ///
    /// In a [group](Self::shared), one instance at a time gets the events, and another one takes over when it ends: by two
    /// instances nothing would stay in order. An event that failed holds up those of its key until it is handled, or is a
    /// dead letter. Every instance of the group must set this, or none.
    ///
    /// ```
    /// use hopline::{Context, Fault, Subscription};
    ///
    /// #[derive(serde::Deserialize)]
    /// struct Order {
    ///     customer: u64,
    /// }
    ///
    /// # fn example(server: hopline::Server) {
    /// let ship = |_: Context, order: Order| async move { Ok::<_, Fault>(println!("{}", order.customer)) };
    /// let in_order = Subscription::to("order.*").shared("shipping").ordered_by(|order: &Order| order.customer);
    /// let server = server.subscribe(in_order.concurrency(16), ship);
    /// # }
    /// ```
    pub fn ordered_by<K: Hash>(mut self, key: impl Fn(&T) -> K + Send + Sync + 'static) -> Self {
        self.order = Some(Arc::new(move |event| {
            let mut line = DefaultHasher::new();
            key(event).hash(&mut line);
            line.finish()
        }));
        self
    }

    /// Begins with events of the past, and goes on with those that come. Default: with those that come.
    ///
    /// The broker keeps the events of the pattern in a stream, `NAMESPACE.kept:PATTERN`, from when somebody first subscribes
    /// with this. All who subscribe to the same pattern read the same stream, and each reads all of it.
    ///
    /// - In a [group](Self::shared) this says where the group begins at first. From then on the broker keeps how far it has
    ///   come, and it goes on from there. One instance at a time reads the stream, and another one takes over when it ends.
    ///   An event that was handled in the last quarter of a second before an instance died may be handled again.
    /// - Without a group, each start of a server begins there.
    /// - Events are handled one after the other in the order of the stream, and one that fails holds up the others until it
    ///   is handled or is a dead letter; those of several keys run beside each other with [`ordered_by`](Self::ordered_by).
    ///   With a [`concurrency`](Self::concurrency) alone, there is no order.
    ///
    /// ```
    /// use hopline::{Context, Fault, Replay, Subscription};
    ///
    /// # fn example(server: hopline::Server) {
    /// let count = |_: Context, order: u64| async move { Ok::<_, Fault>(println!("{order}")) };
    /// let server = server.subscribe(Subscription::to("order.*").shared("reports").from(Replay::Start), count);
    /// # }
    /// ```
    pub fn from(mut self, replay: Replay) -> Self {
        (self.from, self.made_at) = (Some(replay), unix_millis());
        self
    }

    /// How long events are kept for those who [begin in the past](Self::from), in whole seconds. RabbitMQ deletes them in
    /// parts of at most 16 MiB, so some stay for longer. Default: 7 days. Everybody who subscribes to the pattern so must set
    /// the same.
    pub fn keep_for(mut self, time: Duration) -> Self {
        self.keep_for = Some(time);
        self
    }

    /// How many bytes of events are kept for those who [begin in the past](Self::from); the oldest go first. Default: 10
    /// GiB. Everybody who subscribes to the pattern so must set the same.
    pub fn keep_bytes(mut self, bytes: u64) -> Self {
        self.keep_bytes = Some(bytes);
        self
    }

    /// How many events an instance handles at once; 0 counts as 1. Default: 256 in a [group](Self::shared), and otherwise
    /// 1, so that events are handled in the order in which they come; also 1 if they [begin in the past](Self::from).
    pub fn concurrency(mut self, events: usize) -> Self {
        self.concurrency = Some(events.max(1));
        self
    }

    /// How many messages an instance may hold unacknowledged; 0 counts as 1. A message is one event, or up to 64. Default:
    /// 64 without a group. In a group as many as it handles at once, and four times as many, at least 64, if they are
    /// [ordered](Self::ordered_by).
    pub fn prefetch(mut self, messages: u16) -> Self {
        self.prefetch = Some(messages.max(1));
        self
    }

    /// Where handlers run. Default: [`Dispatch::Spawn`] if several run at once, and otherwise [`Dispatch::Inline`].
    pub fn dispatch(mut self, dispatch: Dispatch) -> Self {
        self.dispatch = Some(dispatch);
        self
    }

    /// How many messages may wait in the queue of the group before the broker refuses further events for it:
    /// [`Published::NotToAll`](crate::Published::NotToAll). A message is one event, or up to 64. Default: no limit; at least
    /// 1. Every instance must set the same. Only for a [group](Self::shared).
    pub fn max_queue(mut self, messages: u32) -> Self {
        self.max_queue = Some(messages);
        self.of_groups("max_queue")
    }

    /// How many attempts an event has before it becomes a dead letter, with the first one: see
    /// [`Method::attempts`](crate::Method::attempts). Default: 8. Only for a [group](Self::shared).
    pub fn attempts(mut self, attempts: u32) -> Self {
        self.method = self.method.attempts(attempts);
        self.of_groups("attempts")
    }

    /// How long an event waits after its first failed attempt: see [`Method::pause`](crate::Method::pause). Default:
    /// 500 ms, twice as long each time. Only for a [group](Self::shared).
    pub fn pause(mut self, pause: Duration) -> Self {
        self.method = self.method.pause(pause);
        self.of_groups("pause")
    }

    /// Remembers for `time` which events have been handled well, so that one that comes again to the same instance is not
    /// handled again: see [`Method::dedup`](crate::Method::dedup). An event comes again if a connection is lost, its
    /// publisher's or a subscriber's. Default: nothing is remembered. Only for a [group](Self::shared).
    pub fn dedup(mut self, time: Duration) -> Self {
        self.method = self.method.dedup(time);
        self.of_groups("dedup")
    }

    fn of_groups(mut self, setting: &'static str) -> Self {
        self.of_groups.push(setting);
        self
    }
}

impl<T: Event> Subscription<T> {
    /// A subscription to the events of the handler's [type](crate::Event), by their key. An event of another version is not
    /// handled: in a [group](Self::shared) it is a dead letter, which says so, and without one it is logged.
    ///
    /// ```
    /// use hopline::{Context, Subscription};
    /// use serde::{Deserialize, Serialize};
    ///
    /// #[hopline::event(key = "order.created", version = 2)]
    /// #[derive(Serialize, Deserialize)]
    /// struct OrderCreated {
    ///     id: u64,
    /// }
    ///
    /// # fn example(server: hopline::Server) {
    /// let bill = |_: Context, order: OrderCreated| async move { println!("order {}", order.id) };
    /// let server = server.subscribe(Subscription::event().shared("billing"), bill);
    /// # }
    /// ```
    pub fn event() -> Self {
        Self { version: Some(T::VERSION), ..Self::to(T::KEY) }
    }
}

impl<T: DeserializeOwned + Send + 'static> Subscription<T> {
    /// The service that handles its events.
    pub(crate) fn into_service<F, Fut>(self, handler: F) -> Service
    where
        F: Fn(Context, T) -> Fut + Send + Sync + 'static,
        Fut: Future + Send + 'static,
        Fut::Output: EventResult,
    {
        let Self { pattern, group, method, of_groups, prefetch, concurrency, dispatch, max_queue, order, .. } = self;
        let is_group = group.is_some();
        let is_ordered = order.is_some();
        let usual = if is_group && (self.from.is_none() || is_ordered) { 256 } else { 1 };
        let concurrency = concurrency.unwrap_or(usual);
        let usual = if concurrency > 1 { Dispatch::Spawn } else { Dispatch::Inline };
        let id = match &group {
            Some(group) => ServiceId::group(group),
            None => ServiceId::parse("events"),
        };
        let ahead = concurrency.saturating_mul(LOOKS_AHEAD).max(EVENTS_PREFETCH.into());
        let ahead = u16::try_from(ahead).unwrap_or(u16::MAX);
        let prefetch = match (is_group, &order) {
            (true, None) => prefetch,
            (true, Some(_)) => prefetch.or(Some(ahead)),
            (false, _) => prefetch.or(Some(EVENTS_PREFETCH)),
        };
        let in_one_line =
            || (self.from.is_some() && concurrency == 1).then(|| Arc::new(|_, _: &[u8]| Some(0_u64)) as EventOrder);
        let order = order.map(|key| {
            let read = move |codec: Codec, payload: &[u8]| Some(key(&codec.decode::<T>(payload).ok()?));
            Arc::new(read) as EventOrder
        });
        let order = order.or_else(in_one_line);
        let prefetch = if self.from.is_some() { prefetch.or(Some(ahead)) } else { prefetch };
        let method = if is_group { method.oneway().signature(&pattern) } else { method };
        let mut service = Service::of(id).event(method, self.version, handler);
        service.problems.extend(check_event_pattern(&pattern).err());
        if !is_group && !of_groups.is_empty() {
            let settings = of_groups.join("`, `");
            service.problems.push(format!("`{pattern}` has `{settings}`, which is for groups: name one by `shared`"));
        }
        if self.from.is_none() && (self.keep_for.is_some() || self.keep_bytes.is_some()) {
            let what = "which is for those who begin in the past: say where by `from`";
            service.problems.push(format!("`{pattern}` has `keep_for` or `keep_bytes`, {what}"));
        }
        if self.from.is_some() && pattern.len() > MAX_KEPT {
            service
                .problems
                .push(format!("`{pattern}` is longer than {MAX_KEPT} bytes, which a stream's name has room for"));
        }
        let replay = self.from.map(|from| ReplaySettings {
            from,
            made_at: self.made_at,
            pattern: pattern.clone(),
            keep_for: self.keep_for.unwrap_or(KEEP_FOR),
            keep_bytes: self.keep_bytes.unwrap_or(KEEP_BYTES),
        });
        if let Some(max_queue) = max_queue {
            service = service.max_queue(max_queue);
        }
        service = service.concurrency(concurrency).dispatch(dispatch.unwrap_or(usual));
        Service { pattern: Some(pattern), prefetch, order, replay, ..service }
    }
}

impl<T> From<&str> for Subscription<T> {
    fn from(pattern: &str) -> Self {
        Self::to(pattern)
    }
}

impl<T> From<String> for Subscription<T> {
    fn from(pattern: String) -> Self {
        Self::to(pattern)
    }
}

impl<T> fmt::Debug for Subscription<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Subscription")
            .field("pattern", &self.pattern)
            .field("group", &self.group)
            .field("ordered", &self.order.is_some())
            .finish_non_exhaustive()
    }
}
