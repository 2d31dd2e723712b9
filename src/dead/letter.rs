//! A dead letter: reading what a message in the queue of dead letters says of itself, and making the message that
//! replays it.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::Value;

use super::written;
use crate::exchanges::{Exchanges, Recipients};
use crate::frame::{self, CONTENT_TYPE, Frame, Kind};
use crate::headers::{history, user_of};
use crate::topology::{Namespace, ONEWAY_DELIVERIES, ServiceId, header};
use crate::transport::{Death, Delivery, Properties, Publication};

/// The longest header that a replayed message takes along, in bytes. The longest that Hopline itself writes, a history,
/// is shorter. A longer one could make the message's headers too large for an AMQP frame.
const MAX_HEADER: usize = 8 * 1024;
/// RabbitMQ's word for a message that was delivered too often without being acknowledged.
const DELIVERY_LIMIT: &str = "delivery_limit";
/// What a line of the history says for a value that is not known.
const UNKNOWN: &str = "-";

/// A message in the queue of dead letters of a service. [`DeadLetters::list`](crate::DeadLetters::list) and
/// [`DeadLetters::find`](crate::DeadLetters::find) return them.
///
/// ```
/// # async fn example(dead: hopline::DeadLetters) -> Result<(), hopline::Error> {
/// if let Some(letter) = dead.find("0b2f").await? {
///     println!("{} after {:?} attempts: {}", letter.id, letter.attempts, letter.reason);
///     println!("{:?} sent {:?}", letter.caller, letter.arguments);
/// }
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct DeadLetter {
    /// The id of the request, which it keeps when it is replayed. A message that cannot be read has no such id: then this
    /// is one that is made from its bytes.
    pub id: String,
    /// The id of the call, as [`Context::call_id`](crate::Context::call_id): another than [`id`](Self::id) only if the caller
    /// had sent the call before. None for a message that cannot be read.
    pub call_id: Option<String>,
    /// The service, as `name.vMAJOR`.
    pub service: String,
    /// What kind of message it is.
    pub kind: LetterKind,
    /// The method, if the message tells it.
    pub method: Option<String>,
    /// Why it is here: the message of a fault, the text of a panic, the method's own error as JSON, or what was wrong
    /// with the message.
    pub reason: String,
    /// How many attempts were made to run it, with the last one. A call that was refused without running counts that
    /// refusal as an attempt.
    pub attempts: Option<u64>,
    /// When it became a dead letter, in milliseconds since 1970, by the clock of the instance or of the broker that put
    /// it here.
    pub failed_at: Option<u64>,
    /// The instance that gave it up. `None` if the broker did.
    pub instance: Option<String>,
    /// The caller, as the caller names itself: the same as [`Context::caller`](crate::Context::caller).
    pub caller: Option<String>,
    /// The user with whom the caller was logged in at the broker, as told by the instance that gave the call up.
    pub user: Option<String>,
    /// The metadata that the caller set with [`Call::metadata`](crate::Call::metadata).
    pub metadata: BTreeMap<String, String>,
    /// The size of the message, in bytes.
    pub size: usize,
    /// How many calls are in the message. It is 1, except for messages that the broker put here, which may hold more.
    pub calls: usize,
    /// The name of the codec of the arguments.
    pub codec: Option<String>,
    /// The arguments as JSON. `None` if they cannot be read or expressed as JSON, or are longer than
    /// [`DeadLetters::list`](crate::DeadLetters::list) shows.
    pub arguments: Option<Value>,
    /// The earlier times that it became a dead letter and was replayed: the latest ten, the latest last.
    pub history: Vec<EarlierDeath>,
}

/// What kind of message a dead letter is.
///
/// ```
/// use hopline::LetterKind;
///
/// # async fn example(dead: hopline::DeadLetters) -> Result<(), hopline::Error> {
/// let letters = dead.list(1000).await?.letters;
/// let replayable = letters.iter().filter(|letter| letter.kind == LetterKind::Oneway).count();
/// println!("{replayable} of {} can be run again", letters.len());
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum LetterKind {
    /// A oneway call. It can be replayed.
    Oneway,
    /// An event that a group could not handle. It can be replayed, for this group alone.
    Event,
    /// A call with an answer. It cannot be replayed, since nobody waits for the answer any more.
    Call,
    /// Another message of Hopline, which does not belong in a service's queue.
    Other,
    /// A message that cannot be read.
    Unreadable,
}

/// An earlier time that a letter became a dead letter.
///
/// ```
/// # fn example(letter: hopline::DeadLetter) {
/// for earlier in &letter.history {
///     println!("it failed before, at {:?}: {}", earlier.failed_at, earlier.reason);
/// }
/// # }
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct EarlierDeath {
    /// When, in milliseconds since 1970.
    pub failed_at: Option<u64>,
    /// The instance that gave it up. `None` if the broker did.
    pub instance: Option<String>,
    /// How many attempts were made to run it.
    pub attempts: Option<u64>,
    /// Why it was given up. A long reason is cut.
    pub reason: String,
}

impl EarlierDeath {
    /// Reads one line of the header `x-hopline-history`: time, instance, attempts and reason, with a space between
    /// them.
    fn read(line: &str) -> Self {
        let mut parts = line.splitn(4, ' ');
        let mut next = || parts.next().filter(|part| *part != UNKNOWN).map(str::to_owned);
        Self {
            failed_at: next().and_then(|text| text.parse().ok()),
            instance: next(),
            attempts: next().and_then(|text| text.parse().ok()),
            reason: next().unwrap_or_default(),
        }
    }
}

impl DeadLetter {
    /// Reads a message out of the dead letters of `service`. Arguments of more than `arguments` bytes are left out.
    pub(super) fn read(service: &ServiceId, delivery: &Delivery, arguments: usize) -> Self {
        let headers = &delivery.properties.headers;
        // If the broker put the message here, the headers tell of an earlier time.
        let said = |name| header::value(headers, name).filter(|_| delivery.death.is_none());
        let frames = frames(delivery).unwrap_or_default();
        let first = frames.first();
        let method = first.and_then(|frame| frame.metadata.method.as_deref());
        let id = first.map(|frame| frame.id.to_string());
        let named =
            || header::value(headers, header::ID).or(delivery.properties.correlation_id.as_deref()).map(written);
        let reason = match &delivery.death {
            Some(death) => told(death),
            None => said(header::REASON).unwrap_or("it does not say").to_owned(),
        };
        let attempts = match &delivery.death {
            Some(death) if death.reason == DELIVERY_LIMIT => {
                let before = first.and_then(|frame| frame.metadata.more().attempt).unwrap_or(1).max(1);
                Some(before.saturating_add(u64::from(ONEWAY_DELIVERIES) - 1))
            }
            _ => said(header::ATTEMPTS).and_then(|text| text.parse().ok()),
        };
        let past = match delivery.death {
            Some(_) => history(headers),
            None => header::value(headers, header::HISTORY).map(str::to_owned),
        };
        Self {
            call_id: first.map(|frame| frame.call_id().to_string()),
            id: id.or_else(named).unwrap_or_else(|| format!("unread-{:016x}", fingerprint(&delivery.body))),
            service: service.to_string(),
            kind: match first.map(|frame| frame.kind) {
                Some(Kind::Oneway) => LetterKind::Oneway,
                Some(Kind::Event) if service.is_group() => LetterKind::Event,
                Some(Kind::Request) => LetterKind::Call,
                Some(_) => LetterKind::Other,
                None => LetterKind::Unreadable,
            },
            method: method.or(header::value(headers, header::METHOD)).map(str::to_owned),
            reason,
            attempts,
            failed_at: match &delivery.death {
                Some(death) => Some(death.at.saturating_mul(1000)),
                None => said(header::FAILED_AT).and_then(|text| text.parse().ok()),
            },
            instance: said(header::INSTANCE).map(str::to_owned),
            caller: first.and_then(|frame| frame.metadata.instance.as_deref()).map(str::to_owned),
            user: match said(header::USER) {
                Some(user) => Some(user.to_owned()).filter(|user| !user.is_empty()),
                None => user_of(&delivery.properties, None).as_deref().map(str::to_owned),
            },
            metadata: first.map(|frame| frame.metadata.more().user.iter().cloned().collect()).unwrap_or_default(),
            size: delivery.body.len(),
            calls: frames.len().max(1),
            codec: first.map(|frame| frame.codec.name().to_owned()),
            arguments: first.and_then(|frame| {
                let payload = frame.plain_payload(arguments).ok().filter(|payload| payload.len() <= arguments)?;
                frame.codec.decode(&payload).ok()
            }),
            history: past.unwrap_or_default().lines().map(EarlierDeath::read).collect(),
        }
    }

    /// The message that makes the call run again. If `unread` is true, a message that cannot be read is sent again as
    /// well, to where it came from.
    ///
    /// # Errors
    /// A sentence that says why the letter cannot be replayed.
    pub(super) fn replayed(
        &self,
        namespace: &Namespace,
        service: &ServiceId,
        delivery: &Delivery,
        own_user: Option<&str>,
        unread: bool,
    ) -> Result<Publication, String> {
        let original = |name| header::value(&delivery.properties.headers, name).unwrap_or_default().to_owned();
        let (exchange, key) = (original(header::EXCHANGE), original(header::KEY));
        let work = (String::new(), namespace.work_queue(service));
        let ((exchange, key), body) = match self.kind {
            LetterKind::Unreadable if unread => {
                // The headers say where the message was sent. Whoever can publish dead letters could write anything
                // there, but must not choose where an operator publishes.
                let to_service = key == service.to_string() || key.starts_with(&format!("{service}@"));
                let ours = exchange == namespace.rpc() && to_service && delivery.death.is_none();
                (if ours { (exchange, key) } else { work }, delivery.body.clone())
            }
            LetterKind::Unreadable => return Err("it cannot be read, and would come back".to_owned()),
            LetterKind::Call => {
                return Err("it is a call, and whoever made it has stopped waiting: make it anew".to_owned());
            }
            LetterKind::Other => return Err("it is not a call of this service".to_owned()),
            LetterKind::Oneway | LetterKind::Event => {
                let mut frames = frames(delivery).map_err(|error| error.to_string())?;
                // The call starts again with its first attempt.
                let mut body = Vec::new();
                for frame in &mut frames {
                    if frame.metadata.more().attempt.is_some() {
                        frame.metadata.more_mut().attempt = None;
                    }
                    frame.encode(&mut body);
                }
                let is_call = self.kind == LetterKind::Oneway;
                let to_one = is_call && !exchange.is_empty() && exchange != namespace.oneway();
                let address = match &self.instance {
                    // The call was for this instance, or for all instances, of which each got a copy. So it is replayed
                    // at this one.
                    Some(instance) if to_one => {
                        let (recipients, service) = (Recipients::One(instance.clone()), service.to_string());
                        let own = Exchanges::of(namespace).oneway(&recipients, &service, &service.as_str().into());
                        (own.exchange().to_string(), own.key().to_string())
                    }
                    _ => work,
                };
                (address, body.into())
            }
        };
        // The operator publishes the message, but it keeps the caller's user.
        let mut headers = self.headers(delivery);
        headers.retain(|(name, _)| name != header::USER);
        let user = user_of(&delivery.properties, own_user);
        headers.push((header::USER.to_owned(), user.as_deref().unwrap_or_default().to_owned()));
        let properties = Properties {
            correlation_id: delivery.properties.correlation_id.clone(),
            kind: delivery.properties.kind.clone(),
            content_type: Some(CONTENT_TYPE.to_owned()),
            persistent: true,
            app_id: delivery.properties.app_id.clone(),
            headers,
            ..Properties::default()
        };
        Ok(Publication { exchange, key, mandatory: true, properties, body })
    }

    /// The headers of the replayed message. They hold its history, in case it becomes a dead letter again.
    fn headers(&self, delivery: &Delivery) -> Vec<(String, String)> {
        let mut headers = delivery.properties.headers.clone();
        // Headers that a peer has added are dropped: they could be too large for a frame together with Hopline's own.
        headers.retain(|(name, value)| header::is_ours(name) && value.len() <= MAX_HEADER);
        if delivery.death.is_none() {
            return headers;
        }
        // The broker told of this death in headers of its own. It would not tell it again at the next one, so it is
        // written into the history.
        let past = history(&headers);
        headers.retain(|(name, _)| !header::is_ours(name));
        let number = |number: Option<u64>| number.map_or_else(|| UNKNOWN.to_owned(), |number| number.to_string());
        let own = [
            (header::REASON, Some(self.reason.clone())),
            (header::ATTEMPTS, Some(number(self.attempts))),
            (header::FAILED_AT, Some(number(self.failed_at))),
            (header::HISTORY, past),
        ];
        headers.extend(own.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))));
        headers
    }
}

/// All frames of the message, or the first error.
fn frames(delivery: &Delivery) -> Result<Vec<Frame>, frame::FrameError> {
    frame::decode(delivery.body.clone()).collect()
}

/// The reason that the broker gives, as a sentence.
fn told(death: &Death) -> String {
    match death.reason.as_str() {
        DELIVERY_LIMIT => "each instance that had it died or was lost (delivery_limit)".to_owned(),
        reason => format!("the broker gave it up in the queue `{}` ({reason})", death.queue),
    }
}

/// FNV-1a, a hash that is the same in every program and version. It makes an id for a message without one.
fn fingerprint(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}
