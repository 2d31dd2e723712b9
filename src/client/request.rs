//! A call before it is sent: what it asks for, and the frame that is made of it.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::attempt::{AttemptKind, more, traced};
use super::line::Token;
use super::pending::Ticket;
use super::span::{attempt_span, call_span};
use super::{Absent, Attempt, Client, Target};
use crate::clock::unix_millis;
use crate::codec::{Codec, CodecError};
use crate::compression::Readable;
use crate::context::Context;
use crate::error::{Error, Unanswered};
use crate::exchanges::{Address, Recipients};
use crate::frame::{self, Excess, Frame, Kind, Metadata, Trace};
use crate::limits::MAX_TIMEOUT;
use crate::middleware::{Apart, Asked, RetryOn, TalliedCall};
use crate::outgoing::{Parcel, Share};
use crate::route::Route;
use crate::topology::{MAX_PRIORITY, check_name};

/// How much earlier than the call's deadline its message expires in a queue. The broker begins to count only when the
/// message arrives, and a call that has timed out must not run.
const HEAD_START: Duration = Duration::from_millis(5);

/// What is to be sent: a target, a payload, and the options of the call.
///
/// A request with [`ArgumentWriter`] can be sent once: the codec writes them directly into the frame. A request with `Bytes`
/// can be copied and sent as often as needed.
#[derive(Clone)]
pub(crate) struct Request<P = Bytes> {
    /// The method, or what is wrong with its name.
    pub(crate) target: Result<Arc<Target>, String>,
    pub(crate) payload: P,
    pub(crate) recipients: Recipients,
    /// How one of them is chosen. `None` means the setting for the service.
    pub(crate) route: Option<Arc<Route>>,
    /// For this and the next two, `None` means the client's setting.
    pub(crate) codec: Option<Codec>,
    pub(crate) timeout: Option<Duration>,
    pub(crate) absent: Option<Absent>,
    pub(crate) priority: Option<u8>,
    pub(crate) metadata: Vec<(String, String)>,
    pub(crate) idempotent: bool,
    /// What it asks of the client's policies.
    pub(crate) asked: Asked,
    /// Which of the method's own errors are worth another attempt.
    pub(crate) retry_on: Option<RetryOn>,
    /// Instances that it is not to go to, unless there is no other.
    pub(crate) avoid: Vec<Arc<str>>,
    /// Set if other attempts of the call are on their way at the same time.
    pub(crate) apart: Option<Apart>,
    /// What is counted of a call that may have several attempts.
    pub(crate) counted: Option<Arc<TalliedCall>>,
    /// The context of the handler that makes the call.
    pub(crate) context: Option<Context>,
    /// `None` for a call without middleware, which is sent once.
    pub(crate) attempt: Option<Box<Attempt>>,
}

/// Writes the arguments into a frame, with the codec that is chosen when the call is sent.
pub(crate) type ArgumentWriter = Box<dyn FnOnce(Codec, &mut Vec<u8>) -> Result<(), CodecError> + Send>;

/// What a request carries: arguments that are not encoded yet, or encoded bytes.
pub(crate) trait Payload {
    /// Appends the payload to a frame, encoded with `codec`.
    fn append(self, codec: Codec, frame: &mut Vec<u8>) -> Result<(), CodecError>;
}

impl<F: FnOnce(Codec, &mut Vec<u8>) -> Result<(), CodecError>> Payload for F {
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
            recipients: Recipients::Any,
            route: None,
            codec: None,
            timeout: None,
            absent: None,
            priority: None,
            metadata: Vec::new(),
            idempotent: false,
            asked: Asked::default(),
            retry_on: None,
            avoid: Vec::new(),
            apart: None,
            counted: None,
            context: None,
            attempt: None,
        }
    }
}

impl Request {
    /// Whether it has to go to another instance than the other attempts of its call.
    pub(super) fn is_elsewhere(&self) -> bool {
        self.apart.as_ref().is_some_and(Apart::is_elsewhere)
    }

    /// It was sent to so many instances before, along its route.
    pub(super) fn has_moved(&mut self, times: usize) {
        if let Some(attempt) = &mut self.attempt {
            attempt.moves = u32::try_from(times).unwrap_or(u32::MAX);
        }
    }
}

impl Request<ArgumentWriter> {
    /// The same request with its arguments encoded, so that it can be sent several times.
    pub(super) fn written(self, codec: Codec) -> Result<Request, CodecError> {
        let mut written = Vec::new();
        (self.payload)(codec, &mut written)?;
        Ok(Request {
            target: self.target,
            payload: written.into(),
            recipients: self.recipients,
            route: self.route,
            codec: Some(codec),
            timeout: self.timeout,
            absent: self.absent,
            priority: self.priority,
            metadata: self.metadata,
            idempotent: self.idempotent,
            asked: self.asked,
            retry_on: self.retry_on,
            avoid: self.avoid,
            apart: self.apart,
            counted: self.counted,
            context: self.context,
            attempt: self.attempt,
        })
    }
}

impl<P> fmt::Debug for Request<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Request")
            .field("target", &self.target)
            .field("recipients", &self.recipients)
            .finish_non_exhaustive()
    }
}

/// A request with its finished frame, ready to be sent.
pub(super) struct Outgoing {
    pub(super) ticket: Ticket,
    /// The call that it is an attempt of, if that may have several.
    call: Option<Arc<TalliedCall>>,
    /// How much time it has left.
    left: Duration,
    /// How many attempts of the same call came before it.
    before: u32,
    attempt_kind: AttemptKind,
    frame: Bytes,
    priority: Option<u8>,
    pub(super) idempotent: bool,
    pub(super) absent: Absent,
    /// Cancelled when the server of the handler that makes this call drains, if that server serves the called service
    /// too. The call must not wait for its own server then.
    pub(super) leaving: Option<CancellationToken>,
}

impl Outgoing {
    /// Counts it as an attempt of its call.
    pub(super) fn counts(&self) {
        match (self.attempt_kind, &self.call) {
            (AttemptKind::Hedge, Some(call)) => call.hedges(),
            (AttemptKind::Fork, Some(call)) => call.method.forks.one_more(),
            #[cfg(feature = "metrics")]
            (kind, _) => self.ticket.target.counted.counts.attempts(kind == AttemptKind::First),
            #[cfg(not(feature = "metrics"))]
            (_, _) => {}
        }
    }

    /// What the line is told about this request: above all until when it may wait to be sent. That is shortly before
    /// its deadline.
    pub(super) fn token(&self) -> Token {
        Token { before: self.before, ..Token::until(self.ticket.deadline - head_start(self.left)) }
    }
}

impl Client {
    /// Makes the frame of a request, and checks everything that can be checked before it is sent.
    pub(super) fn prepare<P: Payload>(&self, request: Request<P>, kind: Kind) -> Result<Outgoing, Error> {
        let settings = &self.0.settings;
        let target = request.target.map_err(Error::Invalid)?;
        if self.0.line.is_closed() {
            return Err(self.disconnected(&target, false));
        }
        if let Some(instance) = request.recipients.instance() {
            check_name("instance", instance).map_err(Error::Invalid)?;
        }
        let attempt = request.attempt.as_deref().copied();
        let attempt_kind =
            attempt.map_or(AttemptKind::First, |attempt| AttemptKind::of(&attempt, request.apart.as_ref()));
        let user = match attempt {
            None => self.with_own(request.metadata),
            Some(_) => request.metadata,
        };
        check_metadata(&user)?;
        let current = request.context.or_else(Context::current);
        let (timeout, left, deadline) = match attempt {
            None => {
                let timeout = self.time_for(request.timeout, current.as_ref());
                (timeout, timeout, Instant::now() + timeout)
            }
            Some(Attempt { timeout, deadline, .. }) => {
                (timeout, deadline.saturating_duration_since(Instant::now()), deadline)
            }
        };
        if left.is_zero() {
            return Err(Error::Timeout { method: target.to_string(), after: timeout, why: Unanswered::Unsent });
        }
        let codec = request.codec.unwrap_or(settings.codec);
        let id = attempt.map_or_else(Uuid::new_v4, Attempt::id);
        let (trace, span) = match attempt {
            None => {
                let trace = traced(current.as_ref());
                (trace, call_span(&target, kind, id, trace))
            }
            Some(attempt) => {
                let trace = attempt.traced(current.as_ref());
                (trace, attempt_span(attempt_kind, id, trace))
            }
        };
        let more = more(attempt.as_ref(), user);
        let metadata = Metadata {
            method: Some(target.method.clone()),
            remaining: (kind == Kind::Request).then_some(left),
            // Only what is answered can be answered compressed.
            accepts: if kind == Kind::Request { Readable::HERE } else { Readable::default() },
            more,
            ..self.metadata(trace)
        };
        let frame = Frame { idempotent: request.idempotent, ..Frame::new(kind, id, codec, metadata, Bytes::new()) };
        let body = frame
            .to_body_with(|body| request.payload.append(codec, body))
            .map_err(|error| unwritten(&target, error))?;
        let body = match settings.compression {
            Some(compression) if target.reads(compression) => frame::compressed(body, compression),
            _ => body,
        };
        let frame = self.sized("request", body)?;
        let priority = request.priority.map(|priority| priority.min(MAX_PRIORITY));
        let ticket = Ticket {
            target,
            recipients: request.recipients,
            id,
            size: frame.len(),
            deadline,
            timeout,
            span,
            #[cfg(feature = "metrics")]
            trace,
        };
        let absent = request.absent.unwrap_or(settings.absent);
        let leaving = current.and_then(|context| context.leaving(&ticket.target.service_text));
        let before = attempt.map_or(0, |attempt| attempt.time() - 1);
        let (idempotent, call) = (request.idempotent, request.counted);
        Ok(Outgoing { ticket, call, left, before, attempt_kind, frame, priority, idempotent, absent, leaving })
    }

    /// How long a call may take that allows itself `allowed`. It never gets more time than the handler that makes it
    /// has left.
    pub(super) fn time_for(&self, allowed: Option<Duration>, context: Option<&Context>) -> Duration {
        let own = allowed.unwrap_or(self.0.settings.timeout).min(MAX_TIMEOUT);
        context.and_then(Context::inherited).map_or(own, |remaining| own.min(remaining))
    }

    /// The metadata of a call together with the client's own. If both have a name, the call's text is used.
    pub(super) fn with_own(&self, mut metadata: Vec<(String, String)>) -> Vec<(String, String)> {
        for (name, value) in &self.0.settings.metadata {
            if !metadata.iter().any(|(own, _)| own == name) {
                metadata.push((name.clone(), value.clone()));
            }
        }
        metadata
    }

    /// Hands a frame to the line, which sends it.
    pub(super) fn post(&self, outgoing: Outgoing, address: Address, share: Share, token: Token) -> Ticket {
        let Outgoing { ticket, left, frame, priority, .. } = outgoing;
        let parcel = Parcel {
            id: ticket.id,
            frame,
            share,
            kind: Some(ticket.target.text.clone()),
            expiration: address.is_answered().then(|| left - head_start(left)),
            token,
        };
        self.0.line.post(address.with_priority(priority), parcel);
        ticket
    }

    /// The metadata that every frame of this client has.
    pub(super) fn metadata(&self, trace: Option<Trace>) -> Metadata {
        Metadata {
            sent_at: Some(unix_millis()),
            traceparent: trace.map(|trace| Box::new(trace.text())),
            instance: Some(self.0.caller.clone()),
            ..Metadata::default()
        }
    }

    /// Checks that a frame is not over the client's limit. `what` names it in the error.
    pub(super) fn sized(&self, what: &'static str, body: Bytes) -> Result<Bytes, Error> {
        let limit = self.0.settings.max_message_size;
        if body.len() > limit {
            Err(Error::TooLarge { what, size: body.len(), limit, whose: "client's" })
        } else {
            Ok(body)
        }
    }
}

/// Checks that a frame can hold the metadata of a call.
pub(super) fn check_metadata(entries: &[(String, String)]) -> Result<(), Error> {
    frame::check_entries(entries.iter().map(|(name, value)| (&**name, &**value))).map_err(|excess| match excess {
        Excess::Size(size, limit) => Error::TooLarge { what: "metadata", size, limit, whose: "fixed" },
        Excess::Count(..) => Error::Invalid(excess.to_string()),
    })
}

/// The error for arguments that cannot be encoded.
pub(super) fn unwritten(target: &Target, error: CodecError) -> CodecError {
    CodecError(format!("the arguments of `{target}` {}", error.0))
}

/// [`HEAD_START`], or less for a call with a short time-out.
pub(super) fn head_start(timeout: Duration) -> Duration {
    HEAD_START.min(timeout / 8)
}
