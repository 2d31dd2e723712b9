//! The calling side: connects, addresses calls, and waits for what comes back.

mod builder;
mod events;
mod line;
mod pending;
mod presence;
pub(crate) mod replies;
mod session;
mod target;
mod traffic;
mod waiting;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, Sleep, sleep_until};
use tracing::level_filters::LevelFilter;
use tracing::{Instrument, info_span};
use uuid::Uuid;

pub(crate) use self::builder::BLOCKED_WAIT;
pub use self::builder::{Absent, ClientBuilder, Coalesce, WhenFull};
use self::line::{Address, Addressed, Line, Token};
pub(crate) use self::pending::{Dispatched, Gathering};
use self::pending::{OVERDUE, Ticket};
use self::replies::{End, Waiter};
pub(crate) use self::target::Target;
use self::target::Targets;
pub use self::traffic::Traffic;
use crate::call::{Call, Oneway, Request};
use crate::codec::{Codec, CodecError};
use crate::compression::Readable;
use crate::context::{Context, unix_millis};
use crate::error::{Error, Unanswered};
use crate::frame::{self, Frame, Kind, MAX_USER_ENTRIES, Metadata, More, Trace};
use crate::outbox::{Parcel, Share};
use crate::state::State;
use crate::topology::{MAX_PRIORITY, Namespace, all_key, check_name, instance_key};
use crate::transport::Lost;

/// The largest message that is sent or accepted unless set otherwise: what RabbitMQ 4 takes by default.
pub(crate) const MAX_MESSAGE_SIZE: usize = 16 * 1024 * 1024;
/// A frame's metadata ends at 64 KiB; this is the user's part of it, in bytes.
const MAX_USER_METADATA: usize = 60 * 1024;
/// The broker counts a message's time in 32 bits of milliseconds, which is a little more than this.
pub(crate) const MAX_TIMEOUT: Duration = Duration::from_secs(40 * 24 * 3600);

/// Makes calls. Cloning is cheap, and the clones share one connection; it closes with the last of them.
///
/// ```
/// # async fn example() -> Result<(), hopline::Error> {
/// let client = hopline::Client::connect("amqp://localhost").await?;
/// let sum: i64 = client.call("calculator.v1", "add", (2, 3)).await?;
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct Client(Arc<Inner>);

struct Inner {
    settings: ClientBuilder,
    line: Line,
    instance: Arc<str>,
    /// The exchanges of calls and of oneway calls.
    rpc: Arc<str>,
    oneway: Arc<str>,
    targets: Targets,
    runtime: Handle,
}

/// Why there is no connection any more to a client whose runtime has gone.
pub(crate) const RUNTIME_ENDED: &str = "the runtime in which the client connected has ended";

/// How much sooner than the call itself its request ends in a queue: the broker begins to count when it arrives there,
/// and a call that has timed out is not to be run.
const HEAD_START: Duration = Duration::from_millis(5);

/// How long after its call's deadline a cancel may still be sent: servers count from when the call came to them.
const CANCEL_LATE: Duration = Duration::from_secs(30);

/// A request that is ready to leave.
struct Outgoing {
    ticket: Ticket,
    frame: Bytes,
    priority: Option<u8>,
    idempotent: bool,
    absent: Absent,
}

impl Client {
    /// Connects with default settings.
    ///
    /// # Errors
    /// As [`ClientBuilder::connect`].
    pub async fn connect(url: &str) -> Result<Self, Error> {
        Self::builder().connect(url).await
    }

    /// Settings to change before connecting.
    #[must_use]
    pub fn builder() -> ClientBuilder {
        ClientBuilder::default()
    }

    /// A call without a service trait: `service` is `name` or `name.vMAJOR`, `args` whatever serializes as an array: a
    /// tuple, an array, a `Vec`.
    pub fn call<R>(&self, service: &str, method: &str, args: impl Serialize + Send + 'static) -> Call<R>
    where
        // `DeserializeOwned` spelled out: of this, rustc tells what to derive.
        R: for<'de> Deserialize<'de> + Send + 'static,
    {
        Call::new(self.clone(), self.0.targets.find(service, method), args, Codec::decode)
    }

    /// An oneway call without a service trait, to be [sent](Call::send).
    pub fn oneway(&self, service: &str, method: &str, args: impl Serialize + Send + 'static) -> Call<Oneway> {
        let no_result = |_: Codec, _: &[u8]| Err(CodecError("a oneway call has no result".to_owned()));
        Call::new(self.clone(), self.0.targets.find(service, method), args, no_result)
    }

    /// Whether there is a connection to the broker, now and from now on.
    ///
    /// ```
    /// # async fn example(client: hopline::Client) {
    /// let mut state = client.state();
    /// while state.changed().await.is_ok() {
    ///     println!("{:?}", *state.borrow_and_update());
    /// }
    /// # }
    /// ```
    #[must_use]
    pub fn state(&self) -> watch::Receiver<State> {
        self.0.line.state()
    }

    /// Closes the connection; calls in flight end as `Disconnected`. Dropping the last clone does the same, later.
    pub async fn close(&self) {
        self.0.line.close().await;
    }

    /// What has been sent and received so far.
    #[must_use]
    pub fn traffic(&self) -> Traffic {
        self.0.line.traffic()
    }

    /// How many calls and broadcasts wait at this moment, for replies or to leave at all; and, while there is no connection or
    /// the broker is blocked, oneway calls, events and cancels that wait to leave.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.0.line.in_flight()
    }

    /// The largest payload that is read, in bytes, if it comes compressed.
    pub(crate) fn max_payload(&self) -> usize {
        self.0.settings.max_message_size
    }

    pub(crate) fn runtime(&self) -> &Handle {
        &self.0.runtime
    }

    /// Puts a request on its way.
    pub(crate) fn dispatch(&self, request: Request) -> Result<Dispatched, Error> {
        let outgoing = self.prepare(request, Kind::Request)?;
        let (sender, replied) = oneshot::channel();
        let Ticket { target, instance, .. } = &outgoing.ticket;
        // Who calls one instance hears at once if that is not there.
        let (key, absent) = match instance {
            Some(instance) => (instance_key(&target.service, instance).into(), Absent::Wait),
            None => (target.service_text.clone(), outgoing.absent),
        };
        let address = self.address(Kind::Request, self.0.rpc.clone(), key);
        let reply = Some((Waiter::One(sender), target.clone()));
        let token = Token { reply, repeatable: outgoing.idempotent, absent, ..self.token(&outgoing) };
        let share = self.0.settings.coalesce.share_of(target);
        let ticket = self.post(outgoing, address, share, token);
        Ok(Dispatched::new(self.clone(), ticket, replied))
    }

    /// Puts a request on its way to every instance of its service.
    pub(crate) async fn broadcast(&self, request: Request) -> Result<Gathering, Error> {
        let outgoing = self.prepare(request, Kind::Request)?;
        let key = all_key(&outgoing.ticket.target.service);
        self.gather(outgoing, self.address(Kind::Request, self.0.rpc.clone(), key.into()), true).await
    }

    /// Puts a request on its way to every instance of every service.
    pub(crate) async fn discover(&self, request: Request) -> Result<Gathering, Error> {
        let outgoing = self.prepare(request, Kind::Request)?;
        let address = self.address(Kind::Request, self.namespace().discovery().into(), "".into());
        self.gather(outgoing, address, false).await
    }

    async fn gather(&self, outgoing: Outgoing, address: Address, cancels: bool) -> Result<Gathering, Error> {
        let (sender, replies) = mpsc::unbounded_channel();
        let target = outgoing.ticket.target.clone();
        let (confirm, said) = oneshot::channel();
        let reply = Some((Waiter::Many(sender), target.clone()));
        let token = Token { said: Some(confirm), reply, ..self.token(&outgoing) };
        let ticket = self.post(outgoing, address, self.0.settings.coalesce.share_of(&target), token);
        let gathering = Gathering::new(self.clone(), ticket, replies, cancels);
        match self.confirmed(gathering.ticket(), said).await {
            // One instance is going at this moment; the others have it.
            Ok(()) | Err(Error::Overloaded { .. }) => Ok(gathering),
            Err(error) => Err(error),
        }
    }

    /// Hands an oneway call to the broker, for some instance or for all.
    pub(crate) async fn send(&self, request: Request, to_all: bool) -> Result<(), Error> {
        let outgoing = self.prepare(request, Kind::Oneway)?;
        let Ticket { target, instance, .. } = &outgoing.ticket;
        let (exchange, key) = match instance {
            _ if to_all => (self.0.rpc.clone(), all_key(&target.service).into()),
            Some(instance) => (self.0.rpc.clone(), instance_key(&target.service, instance).into()),
            None => (self.0.oneway.clone(), target.text.clone()),
        };
        let address = self.address(Kind::Oneway, exchange, key);
        let (confirm, said) = oneshot::channel();
        let token = Token { said: Some(confirm), repeatable: true, ..self.token(&outgoing) };
        let ticket = self.post(outgoing, address, self.0.settings.coalesce.share(), token);
        match self.confirmed(&ticket, said).await {
            Err(Error::Overloaded { .. }) if to_all => Ok(()),
            confirmed => confirmed,
        }
    }

    /// What tells whoever may run a call that nobody waits for it any more.
    fn cancel(&self, ticket: &Ticket) -> Addressed {
        let Ticket { target, instance, id, deadline, .. } = ticket;
        let remaining = deadline.saturating_duration_since(Instant::now());
        let metadata = Metadata { remaining: Some(remaining), ..self.metadata(traced(Context::current().as_ref())) };
        let parcel = Parcel {
            id: *id,
            frame: Frame::new(Kind::Cancel, *id, Codec::Raw, metadata, Bytes::new()).to_body(),
            share: self.0.settings.coalesce.share(),
            kind: Some(target.text.clone()),
            expiration: None,
            // Nobody waits to hear what becomes of it, and twice is as good as once.
            token: Token { repeatable: true, ..Token::until(*deadline + CANCEL_LATE) },
        };
        let key = match instance {
            Some(instance) => instance_key(&target.service, instance),
            None => all_key(&target.service),
        };
        (self.address(Kind::Cancel, self.0.rpc.clone(), key.into()), parcel)
    }

    /// Nobody waits for a call any more; with its ticket, whoever runs it is told.
    fn forget(&self, id: Uuid, ticket: Option<&Ticket>) {
        self.0.line.forget(id, ticket.map(|ticket| self.cancel(ticket)));
    }

    /// The error of a call whose reply cannot come any more.
    fn disconnected(&self, target: &Target, may_have_run: bool) -> Error {
        Error::Disconnected { method: Some(target.to_string()), may_have_run, reason: self.0.line.reason().to_string() }
    }

    fn prepare(&self, request: Request, kind: Kind) -> Result<Outgoing, Error> {
        let settings = &self.0.settings;
        let target = request.target.map_err(Error::Invalid)?;
        if self.0.line.is_closed() {
            return Err(self.disconnected(&target, false));
        }
        if let Some(instance) = &request.instance {
            check_name("instance", instance).map_err(Error::Invalid)?;
        }
        let user_bytes: usize = request.metadata.iter().map(|(name, value)| name.len() + value.len() + 10).sum();
        if user_bytes > MAX_USER_METADATA {
            return Err(Error::TooLarge { what: "metadata", size: user_bytes, limit: MAX_USER_METADATA });
        }
        if request.metadata.len() > MAX_USER_ENTRIES {
            let entries = request.metadata.len();
            return Err(Error::Invalid(format!(
                "{entries} entries of metadata, where a call has {MAX_USER_ENTRIES} at most"
            )));
        }
        let current = request.context.or_else(Context::current);
        let own = request.timeout.unwrap_or(settings.timeout).min(MAX_TIMEOUT);
        let inherited = current.as_ref().and_then(Context::inherited);
        let timeout = inherited.map_or(own, |remaining| own.min(remaining));
        if timeout.is_zero() {
            return Err(Error::Timeout { method: target.to_string(), after: timeout, why: Unanswered::Unsent });
        }
        let deadline = Instant::now() + timeout;
        let codec = request.codec.unwrap_or(settings.codec);
        let trace = traced(current.as_ref());
        let span = info_span!(
            "call",
            otel.kind = "client",
            rpc.system = "hopline",
            rpc.service = %target.service,
            rpc.method = &*target.method,
            traceparent = trace.map(tracing::field::display),
        );
        let user = request.metadata;
        let more = (!user.is_empty()).then(|| Box::new(More { user, ..More::default() }));
        let metadata = Metadata {
            method: Some(target.method.clone()),
            remaining: (kind == Kind::Request).then_some(timeout),
            // Only what is answered can be answered compressed.
            accepts: if kind == Kind::Request { Readable::HERE } else { Readable::default() },
            more,
            ..self.metadata(trace)
        };
        let id = Uuid::new_v4();
        let frame = Frame { idempotent: request.idempotent, ..Frame::new(kind, id, codec, metadata, Bytes::new()) };
        let body = frame
            .to_body_with(|payload| (request.arguments)(codec, payload))
            .map_err(|error| CodecError(format!("the arguments of `{target}` {}", error.0)))?;
        let body = match settings.compression {
            Some(compression) if target.reads(compression) => frame::compressed(body, compression),
            _ => body,
        };
        let frame = self.sized("request", body)?;
        let priority = request.priority.map(|priority| priority.min(MAX_PRIORITY));
        let ticket = Ticket { target, instance: request.instance, id, size: frame.len(), deadline, timeout, span };
        let absent = request.absent.unwrap_or(settings.absent);
        Ok(Outgoing { ticket, frame, priority, idempotent: request.idempotent, absent })
    }

    /// What becomes of a request that cannot leave, until shortly before its caller's own time is over.
    fn token(&self, outgoing: &Outgoing) -> Token {
        let Ticket { deadline, timeout, .. } = outgoing.ticket;
        Token::until(deadline - head_start(timeout))
    }

    /// Puts a frame among those that wait to leave.
    fn post(&self, outgoing: Outgoing, address: Address, share: Share, token: Token) -> Ticket {
        let Outgoing { ticket, frame, priority, .. } = outgoing;
        let parcel = Parcel {
            id: ticket.id,
            frame,
            share,
            kind: Some(ticket.target.text.clone()),
            expiration: address.is_answered().then(|| ticket.timeout - head_start(ticket.timeout)),
            token,
        };
        self.0.line.post(Address { priority, ..address }, parcel);
        ticket
    }

    fn address(&self, kind: Kind, exchange: Arc<str>, key: Arc<str>) -> Address {
        Address { exchange, key, kind, priority: None }
    }

    fn namespace(&self) -> &Namespace {
        self.0.settings.namespace.as_ref().expect("checked when the client connected")
    }

    fn metadata(&self, trace: Option<Trace>) -> Metadata {
        Metadata {
            sent_at: Some(unix_millis()),
            traceparent: trace.map(|trace| trace.text()),
            instance: Some(self.0.instance.clone()),
            ..Metadata::default()
        }
    }

    fn sized(&self, what: &'static str, body: Bytes) -> Result<Bytes, Error> {
        let limit = self.0.settings.max_message_size;
        if body.len() > limit { Err(Error::TooLarge { what, size: body.len(), limit }) } else { Ok(body) }
    }

    /// Waits until the broker has a request, or its deadline.
    async fn confirmed(&self, ticket: &Ticket, said: oneshot::Receiver<End>) -> Result<(), Error> {
        ticket.outcome(self.end_of(ticket.id, ticket.deadline, said).instrument(ticket.span.clone()).await)
    }

    /// What the broker said of `id`, or what else it came to by its deadline.
    async fn end_of(&self, id: Uuid, deadline: Instant, mut said: oneshot::Receiver<End>) -> End {
        let in_time = tokio::select! {
            biased;
            said = &mut said => Some(said),
            () = self.timer(deadline) => None,
        };
        let said = match in_time {
            Some(said) => said,
            None => {
                self.overdue(id);
                tokio::select! {
                    biased;
                    said = said => said,
                    () = self.timer(Instant::now() + OVERDUE) => Ok(End::TimedOut(Unanswered::Unknown)),
                }
            }
        };
        let gone = || Lost { handed_over: true, connected: false, reason: self.0.line.reason() };
        said.unwrap_or_else(|_| End::Lost(gone()))
    }

    /// A timer that can be waited for anywhere: in the runtime that waits, or where that is none of tokio's, in the one in
    /// which the client connected.
    fn timer(&self, at: Instant) -> Sleep {
        let _entered = Handle::try_current().is_err().then(|| self.0.runtime.enter());
        sleep_until(at)
    }

    /// The time of a call is over: it is to be told whether it has left.
    fn overdue(&self, id: Uuid) {
        self.0.line.overdue(id);
    }
}

fn head_start(timeout: Duration) -> Duration {
    HEAD_START.min(timeout / 8)
}

/// Where a call made here stands in its trace: under the call being handled, or at its root, if anybody listens.
fn traced(parent: Option<&Context>) -> Option<Trace> {
    match parent {
        Some(parent) => Some(Trace::under(Some(parent.trace()))),
        None => (LevelFilter::current() >= LevelFilter::INFO).then(|| Trace::under(None)),
    }
}

/// 48 random bits as text: enough to tell the instances of one namespace apart, short enough to read aloud.
pub(crate) fn short_id() -> String {
    let mut id = Uuid::new_v4().simple().to_string();
    id.truncate(12);
    id
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("instance", &self.0.instance)
            .field("settings", &self.0.settings)
            .finish_non_exhaustive()
    }
}
