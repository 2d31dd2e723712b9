//! The calling side: connects, addresses calls, and waits for what comes back.

mod builder;
mod events;
mod line;
mod pending;
pub(crate) mod presence;
pub(crate) mod replies;
mod sending;
mod session;
mod target;
mod traffic;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::info_span;
use tracing::level_filters::LevelFilter;
use uuid::Uuid;

pub(crate) use self::builder::BLOCKED_WAIT;
pub use self::builder::{Absent, ClientBuilder, Coalesce, WhenFull};
pub use self::events::Published;
use self::line::{Address, Line, Token};
use self::pending::Ticket;
pub(crate) use self::pending::{Dispatched, Gathering};
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
use crate::topology::{MAX_PRIORITY, Namespace, check_name};

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
    /// How it says who it is: the name that people chose for it, if they did, and its id.
    caller: Arc<str>,
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
    /// Cancelled when the server drains that serves the call itself, and one of whose handlers makes it.
    leaving: Option<CancellationToken>,
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

    /// A oneway call without a service trait, to be [sent](Call::send).
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
        let id = Uuid::new_v4();
        let span = info_span!(
            "call",
            otel.kind = "client",
            rpc.system = "hopline",
            rpc.service = %target.service,
            rpc.method = &*target.method,
            id = %id,
            traceparent = trace.map(tracing::field::display),
        );
        let user = request.metadata;
        // A call's first request has the call's id as its own.
        let call_id = request.call_id;
        let has_more = !user.is_empty() || call_id.is_some();
        let more = has_more.then(|| Box::new(More { user, call_id, ..More::default() }));
        let metadata = Metadata {
            method: Some(target.method.clone()),
            remaining: (kind == Kind::Request).then_some(timeout),
            // Only what is answered can be answered compressed.
            accepts: if kind == Kind::Request { Readable::HERE } else { Readable::default() },
            more,
            ..self.metadata(trace)
        };
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
        let leaving = current.and_then(|context| context.leaving(&ticket.target.service_text));
        Ok(Outgoing { ticket, frame, priority, idempotent: request.idempotent, absent, leaving })
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
            instance: Some(self.0.caller.clone()),
            ..Metadata::default()
        }
    }

    fn sized(&self, what: &'static str, body: Bytes) -> Result<Bytes, Error> {
        let limit = self.0.settings.max_message_size;
        if body.len() > limit { Err(Error::TooLarge { what, size: body.len(), limit }) } else { Ok(body) }
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
            .field("caller", &self.0.caller)
            .field("settings", &self.0.settings)
            .finish_non_exhaustive()
    }
}
