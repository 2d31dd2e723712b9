//! What a call asks for, and the frame that is made of it.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::info_span;
use tracing::level_filters::LevelFilter;
use uuid::Uuid;

use super::line::Token;
use super::pending::Ticket;
use super::{Absent, Client, Target};
use crate::clock::unix_millis;
use crate::codec::{Codec, CodecError};
use crate::compression::Readable;
use crate::context::Context;
use crate::error::{Error, Unanswered};
use crate::frame::{self, Frame, Kind, MAX_USER_ENTRIES, Metadata, More, Trace};
use crate::limits::MAX_TIMEOUT;
use crate::outbox::{Parcel, Share};
use crate::route::{Address, Route};
use crate::topology::{MAX_PRIORITY, check_name};

/// A frame's metadata ends at 64 KiB; this is the user's part of it, in bytes.
const MAX_USER_METADATA: usize = 60 * 1024;

/// How much sooner than the call itself its request ends in a queue: the broker begins to count when it arrives there,
/// and a call that has timed out is not to be run.
const HEAD_START: Duration = Duration::from_millis(5);

/// What is to be sent: a target, a payload, and the options of the call.
///
/// With [`Arguments`] it can be sent once, and the codec writes them straight into the frame. With `Bytes` it can be copied, and
/// sent as often as somebody wants to try.
#[derive(Clone)]
pub(crate) struct Request<P = Bytes> {
    /// The method; or what is wrong with its name.
    pub(crate) target: Result<Arc<Target>, String>,
    pub(crate) payload: P,
    pub(crate) route: Route,
    /// Where these are not set, the client says.
    pub(crate) codec: Option<Codec>,
    pub(crate) timeout: Option<Duration>,
    pub(crate) absent: Option<Absent>,
    pub(crate) priority: Option<u8>,
    pub(crate) metadata: Vec<(String, String)>,
    pub(crate) idempotent: bool,
    /// The call that this is another attempt of; none for the first, whose own id is that of the call.
    pub(crate) call_id: Option<Uuid>,
    /// Of the handler that makes the call.
    pub(crate) context: Option<Context>,
}

/// Appends the arguments to a frame, once the codec is known.
pub(crate) type Arguments = Box<dyn FnOnce(Codec, &mut Vec<u8>) -> Result<(), CodecError> + Send>;

/// What a request carries.
pub(crate) trait Payload {
    /// Appends it to a frame, as this codec writes it.
    fn append(self, codec: Codec, frame: &mut Vec<u8>) -> Result<(), CodecError>;
}

impl Payload for Arguments {
    fn append(self, codec: Codec, frame: &mut Vec<u8>) -> Result<(), CodecError> {
        self(codec, frame)
    }
}

impl Payload for Bytes {
    /// They are what the request's own codec has written.
    fn append(self, _: Codec, frame: &mut Vec<u8>) -> Result<(), CodecError> {
        frame.extend_from_slice(&self);
        Ok(())
    }
}

impl<P> Request<P> {
    pub(crate) fn new(target: Result<Arc<Target>, String>, payload: P) -> Self {
        Self {
            target,
            payload,
            route: Route::Any,
            codec: None,
            timeout: None,
            absent: None,
            priority: None,
            metadata: Vec::new(),
            idempotent: false,
            call_id: None,
            context: None,
        }
    }
}

impl<P> fmt::Debug for Request<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Request").field("target", &self.target).field("route", &self.route).finish_non_exhaustive()
    }
}

/// A request that is ready to leave.
pub(super) struct Outgoing {
    pub(super) ticket: Ticket,
    frame: Bytes,
    priority: Option<u8>,
    pub(super) idempotent: bool,
    pub(super) absent: Absent,
    /// Cancelled when the server drains that serves the call itself, and one of whose handlers makes it.
    pub(super) leaving: Option<CancellationToken>,
}

impl Outgoing {
    /// What becomes of it if it cannot leave, until shortly before its caller's own time is over.
    pub(super) fn token(&self) -> Token {
        Token::until(self.ticket.deadline - head_start(self.ticket.timeout))
    }
}

impl Client {
    /// Makes a frame of a request, and checks what can be checked here.
    pub(super) fn prepare<P: Payload>(&self, request: Request<P>, kind: Kind) -> Result<Outgoing, Error> {
        let settings = &self.0.settings;
        let target = request.target.map_err(Error::Invalid)?;
        if self.0.line.is_closed() {
            return Err(self.disconnected(&target, false));
        }
        if let Some(instance) = request.route.instance() {
            check_name("instance", instance).map_err(Error::Invalid)?;
        }
        check_metadata(&request.metadata)?;
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
        let (user, call_id) = (request.metadata, request.call_id);
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
            .to_body_with(|body| request.payload.append(codec, body))
            .map_err(|error| CodecError(format!("the arguments of `{target}` {}", error.0)))?;
        let body = match settings.compression {
            Some(compression) if target.reads(compression) => frame::compressed(body, compression),
            _ => body,
        };
        let frame = self.sized("request", body)?;
        let priority = request.priority.map(|priority| priority.min(MAX_PRIORITY));
        let ticket = Ticket { target, route: request.route, id, size: frame.len(), deadline, timeout, span };
        let absent = request.absent.unwrap_or(settings.absent);
        let leaving = current.and_then(|context| context.leaving(&ticket.target.service_text));
        Ok(Outgoing { ticket, frame, priority, idempotent: request.idempotent, absent, leaving })
    }

    /// Puts a frame among those that wait to leave.
    pub(super) fn post(&self, outgoing: Outgoing, address: Address, share: Share, token: Token) -> Ticket {
        let Outgoing { ticket, frame, priority, .. } = outgoing;
        let parcel = Parcel {
            id: ticket.id,
            frame,
            share,
            kind: Some(ticket.target.text.clone()),
            expiration: address.is_answered().then(|| ticket.timeout - head_start(ticket.timeout)),
            token,
        };
        self.0.line.post(address.with_priority(priority), parcel);
        ticket
    }

    /// What every frame of this client says.
    pub(super) fn metadata(&self, trace: Option<Trace>) -> Metadata {
        Metadata {
            sent_at: Some(unix_millis()),
            traceparent: trace.map(|trace| trace.text()),
            instance: Some(self.0.caller.clone()),
            ..Metadata::default()
        }
    }

    pub(super) fn sized(&self, what: &'static str, body: Bytes) -> Result<Bytes, Error> {
        let limit = self.0.settings.max_message_size;
        if body.len() > limit { Err(Error::TooLarge { what, size: body.len(), limit }) } else { Ok(body) }
    }
}

fn check_metadata(entries: &[(String, String)]) -> Result<(), Error> {
    let size: usize = entries.iter().map(|(name, value)| name.len() + value.len() + 10).sum();
    if size > MAX_USER_METADATA {
        return Err(Error::TooLarge { what: "metadata", size, limit: MAX_USER_METADATA });
    }
    if entries.len() > MAX_USER_ENTRIES {
        let count = entries.len();
        return Err(Error::Invalid(format!(
            "{count} entries of metadata, where a call has {MAX_USER_ENTRIES} at most"
        )));
    }
    Ok(())
}

pub(super) fn head_start(timeout: Duration) -> Duration {
    HEAD_START.min(timeout / 8)
}

/// Where a call made here stands in its trace: under the call being handled, or at its root, if anybody listens.
pub(super) fn traced(parent: Option<&Context>) -> Option<Trace> {
    match parent {
        Some(parent) => Some(Trace::under(Some(parent.trace()))),
        None => (LevelFilter::current() >= LevelFilter::INFO).then(|| Trace::under(None)),
    }
}
