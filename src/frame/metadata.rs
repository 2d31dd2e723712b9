//! Metadata: what a frame carries beside its payload. On the wire it is a CBOR map with small integers as keys.
//!
//! Unknown keys are skipped, so a later version can add some.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use minicbor::Decoder;
use minicbor::data::Type;
use minicbor::decode::Error as CborError;
use uuid::Uuid;

use super::trace::Traceparent;
use crate::compression::Readable;

/// The most entries in the user's map. An entry takes as little as 2 bytes on the wire, and many times that in memory.
pub(crate) const MAX_USER_ENTRIES: usize = 128;
/// The longest name of a method or an instance, in bytes. AMQP's keys cannot be longer.
pub(super) const MAX_NAME: usize = 255;

/// What a frame carries beside its payload. The key of each field on the wire is in `mod key`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Metadata {
    pub(crate) method: Option<Arc<str>>,
    /// How much time the call had left when the frame was sent. A duration does not depend on clocks that differ.
    pub(crate) remaining: Option<Duration>,
    /// The time by the sender's clock, in milliseconds since 1970. It tells people how long a call has waited, and
    /// decides nothing.
    pub(crate) sent_at: Option<u64>,
    /// The caller's span.
    pub(crate) traceparent: Option<Box<Traceparent>>,
    /// The instance that sent the frame.
    pub(crate) instance: Option<Arc<str>>,
    /// In a reply: how long the handler took.
    pub(crate) handler_time: Option<Duration>,
    /// The compressions that the sender can read.
    pub(crate) accepts: Readable,
    /// The fields that few frames have. They are boxed, so that most frames are small in memory.
    pub(crate) more: Option<Box<More>>,
}

/// The metadata that few frames have.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct More {
    /// Reserved for streams: the position of an item.
    pub(crate) sequence: Option<u64>,
    /// Which attempt this is; the first is 1.
    pub(crate) attempt: Option<u64>,
    /// In a fault: after which time another attempt may help.
    pub(crate) retry_after: Option<Duration>,
    /// The caller's own entries, in the order in which they were set.
    pub(crate) user: Vec<(String, String)>,
    /// In a fault: the text of the error.
    pub(crate) error: Option<String>,
    /// In a reply that replaces one over the cap: the size of that one, and the cap, in bytes.
    pub(crate) too_large: Option<(u64, u64)>,
    /// The call that the frame is an attempt of, if the frame's id does not name it.
    pub(crate) call_id: Option<Uuid>,
    /// In a reply of an instance that its caller has chosen: how many calls of the service run there.
    pub(crate) running: Option<u64>,
    /// In a fault: another attempt does not help.
    pub(crate) is_permanent: bool,
    /// In an event: the version of its type. Without it, it is 1.
    pub(crate) event_version: Option<u64>,
}

/// The keys of the fields on the wire.
mod key {
    pub(super) const METHOD: u64 = 1;
    pub(super) const REMAINING: u64 = 2;
    pub(super) const SENT_AT: u64 = 3;
    pub(super) const TRACEPARENT: u64 = 4;
    pub(super) const INSTANCE: u64 = 5;
    pub(super) const SEQUENCE: u64 = 6;
    pub(super) const HANDLER_TIME: u64 = 7;
    pub(super) const ATTEMPT: u64 = 8;
    pub(super) const RETRY_AFTER: u64 = 9;
    pub(super) const USER: u64 = 10;
    pub(super) const ERROR: u64 = 11;
    pub(super) const TOO_LARGE: u64 = 12;
    pub(super) const ACCEPTS: u64 = 13;
    pub(super) const CALL_ID: u64 = 14;
    pub(super) const RUNNING: u64 = 15;
    pub(super) const PERMANENT: u64 = 16;
    pub(super) const EVENT_VERSION: u64 = 17;
}

/// The names in a frame. The frames of one message often have the same.
#[derive(Debug, Default)]
pub(super) struct Names {
    pub(super) method: Option<Arc<str>>,
    pub(super) instance: Option<Arc<str>>,
}

impl Names {
    /// Keeps the names of a frame for the next one.
    pub(super) fn keep(&mut self, metadata: &Metadata) {
        for (kept, name) in [(&mut self.method, &metadata.method), (&mut self.instance, &metadata.instance)] {
            let is_kept = |name| kept.as_ref().is_some_and(|kept| Arc::ptr_eq(kept, name));
            if let Some(name) = name.as_ref().filter(|name| !is_kept(name)) {
                *kept = Some(name.clone());
            }
        }
    }
}

/// The name as an `Arc`: that of the previous frame if it is the same, so that nothing is allocated.
fn known(name: &str, previous: Option<&Arc<str>>) -> Arc<str> {
    previous.filter(|previous| &***previous == name).map_or_else(|| name.into(), Arc::clone)
}

/// An error in the metadata: the field, its position in bytes, and what is wrong.
pub(super) type Problem = (&'static str, usize, String);

/// Stands for `Metadata::more` where there is none.
static NO_MORE: More = More {
    sequence: None,
    attempt: None,
    retry_after: None,
    user: Vec::new(),
    error: None,
    too_large: None,
    call_id: None,
    running: None,
    is_permanent: false,
    event_version: None,
};

impl Metadata {
    /// The metadata that few frames have, to be read.
    pub(crate) fn more(&self) -> &More {
        self.more.as_deref().unwrap_or(&NO_MORE)
    }

    /// Which attempt of its call the frame was sent for. The first is 1.
    pub(crate) fn attempt(&self) -> u64 {
        self.more().attempt.unwrap_or(1).max(1)
    }

    /// The metadata that few frames have, to be set.
    pub(crate) fn more_mut(&mut self) -> &mut More {
        self.more.get_or_insert_default()
    }

    /// Appends the fields that are set, by ascending key.
    pub(super) fn encode(&self, body: &mut Vec<u8>) {
        let more = self.more();
        let entries = [
            self.method.is_some(),
            self.remaining.is_some(),
            self.sent_at.is_some(),
            self.traceparent.is_some(),
            self.instance.is_some(),
            more.sequence.is_some(),
            self.handler_time.is_some(),
            more.attempt.is_some(),
            more.retry_after.is_some(),
            !more.user.is_empty(),
            more.error.is_some(),
            more.too_large.is_some(),
            self.accepts != Readable::default(),
            more.call_id.is_some(),
            more.running.is_some(),
            more.is_permanent,
            more.event_version.is_some(),
        ];
        head(body, MAP, entries.into_iter().map(u64::from).sum());
        text(body, key::METHOD, self.method.as_deref());
        number(body, key::REMAINING, self.remaining.map(millis));
        number(body, key::SENT_AT, self.sent_at);
        text(body, key::TRACEPARENT, self.traceparent.as_deref().map(Traceparent::as_str));
        text(body, key::INSTANCE, self.instance.as_deref());
        number(body, key::SEQUENCE, more.sequence);
        number(body, key::HANDLER_TIME, self.handler_time.map(micros));
        number(body, key::ATTEMPT, more.attempt);
        number(body, key::RETRY_AFTER, more.retry_after.map(millis));
        if !more.user.is_empty() {
            head(body, NUMBER, key::USER);
            head(body, MAP, more.user.len() as u64);
            for (name, value) in &more.user {
                string(body, TEXT, name.as_bytes());
                string(body, TEXT, value.as_bytes());
            }
        }
        text(body, key::ERROR, more.error.as_deref());
        if let Some((size, limit)) = more.too_large {
            head(body, NUMBER, key::TOO_LARGE);
            head(body, ARRAY, 2);
            head(body, NUMBER, size);
            head(body, NUMBER, limit);
        }
        number(body, key::ACCEPTS, Some(self.accepts.0).filter(|accepts| *accepts != 0));
        if let Some(call_id) = &more.call_id {
            head(body, NUMBER, key::CALL_ID);
            string(body, BYTES, call_id.as_bytes());
        }
        number(body, key::RUNNING, more.running);
        number(body, key::PERMANENT, more.is_permanent.then_some(1));
        number(body, key::EVENT_VERSION, more.event_version);
    }

    /// Reads the metadata of a frame. Names that are the same as in the frame before it, `previous`, are shared and not
    /// allocated.
    pub(super) fn decode(bytes: &[u8], previous: &Names) -> Result<Self, Problem> {
        let mut metadata = Self::default();
        let mut cbor = Decoder::new(bytes);
        let entries = cbor.map().map_err(|error| problem("metadata", &cbor, error))?;
        let mut read = 0;
        while entries.map_or_else(|| cbor.datatype().is_ok_and(|next| next != Type::Break), |entries| read < entries) {
            read += 1;
            let key = cbor.u64().map_err(|error| problem("metadata key", &cbor, error))?;
            let field = field_name(key);
            metadata.decode_value(key, &mut cbor, previous).map_err(|error| problem(field, &cbor, error))?;
        }
        if entries.is_none() {
            cbor.skip().map_err(|error| problem("metadata", &cbor, error))?;
        }
        if cbor.position() != bytes.len() {
            return Err((
                "metadata",
                cbor.position(),
                format!("{} bytes after the map", bytes.len() - cbor.position()),
            ));
        }
        Ok(metadata)
    }

    /// Reads the value of one key.
    fn decode_value(&mut self, key: u64, cbor: &mut Decoder<'_>, previous: &Names) -> Result<(), CborError> {
        match key {
            key::METHOD => self.method = Some(known(name(cbor)?, previous.method.as_ref())),
            key::REMAINING => self.remaining = Some(Duration::from_millis(cbor.u64()?)),
            key::SENT_AT => self.sent_at = Some(cbor.u64()?),
            key::TRACEPARENT => self.traceparent = Traceparent::new(cbor.str()?).map(Box::new),
            key::INSTANCE => self.instance = Some(known(name(cbor)?, previous.instance.as_ref())),
            key::SEQUENCE => self.more_mut().sequence = Some(cbor.u64()?),
            key::HANDLER_TIME => self.handler_time = Some(Duration::from_micros(cbor.u64()?)),
            key::ATTEMPT => self.more_mut().attempt = Some(cbor.u64()?),
            key::RETRY_AFTER => self.more_mut().retry_after = Some(Duration::from_millis(cbor.u64()?)),
            key::USER => {
                // The iterator borrows its entries. Nothing is allocated before an entry was really read.
                for entry in cbor.map_iter::<&str, &str>()? {
                    let (name, value) = entry?;
                    let user = &mut self.more_mut().user;
                    if user.len() == MAX_USER_ENTRIES {
                        return Err(CborError::message(format_args!("more than {MAX_USER_ENTRIES} entries")));
                    }
                    user.push((name.to_owned(), value.to_owned()));
                }
            }
            key::ERROR => self.more_mut().error = Some(cbor.str()?.to_owned()),
            key::TOO_LARGE => self.more_mut().too_large = Some(cbor.decode()?),
            key::ACCEPTS => self.accepts = Readable(cbor.u64()?),
            key::CALL_ID => self.more_mut().call_id = Some(id(cbor)?),
            key::RUNNING => self.more_mut().running = Some(cbor.u64()?),
            key::PERMANENT => self.more_mut().is_permanent = cbor.u64()? != 0,
            key::EVENT_VERSION => self.more_mut().event_version = Some(cbor.u64()?),
            _ => cbor.skip()?,
        }
        Ok(())
    }
}

/// Where the number of the remaining time is in the metadata of a frame that was written here. `None` if there is none,
/// or if it is part of the first byte.
pub(super) fn remaining(metadata: &[u8]) -> Option<Range<usize>> {
    let mut at = 1;
    if u64::from(*metadata.get(at)?) == key::METHOD {
        let head = *metadata.get(at + 1)?;
        at += match head & 0x1f {
            length @ 0..24 => 2 + usize::from(length),
            24 => 3 + usize::from(*metadata.get(at + 2)?),
            _ => return None,
        };
    }
    let size = match (u64::from(*metadata.get(at)?) == key::REMAINING, metadata.get(at + 1)?) {
        (true, size @ 24..=27) => 1 << (size - 24),
        _ => return None,
    };
    Some(at + 2..at + 2 + size).filter(|number| number.end <= metadata.len())
}

/// A text that is a name on the broker, so its length is limited.
fn name<'b>(cbor: &mut Decoder<'b>) -> Result<&'b str, CborError> {
    let name = cbor.str()?;
    match name.len() {
        0..=MAX_NAME => Ok(name),
        bytes => Err(CborError::message(format_args!("{bytes} bytes, over the cap of {MAX_NAME}"))),
    }
}

/// The 16 bytes of a UUID.
fn id(cbor: &mut Decoder<'_>) -> Result<Uuid, CborError> {
    let bytes = cbor.bytes()?;
    Uuid::from_slice(bytes).map_err(|_| CborError::message(format_args!("{} bytes, where an id has 16", bytes.len())))
}

/// The major types of CBOR, in the upper three bits of an item's first byte.
const NUMBER: u8 = 0 << 5;
const BYTES: u8 = 2 << 5;
const TEXT: u8 = 3 << 5;
const ARRAY: u8 = 4 << 5;
const MAP: u8 = 5 << 5;

/// Appends the head of an item: its type, and a number in the shortest form. Every call has several of these, and a
/// general encoder takes five times as long.
fn head(body: &mut Vec<u8>, major: u8, number: u64) {
    match number {
        0..24 => body.push(major | number as u8),
        24..0x100 => body.extend_from_slice(&[major | 24, number as u8]),
        0x100..0x1_0000 => {
            let [high, low] = (number as u16).to_be_bytes();
            body.extend_from_slice(&[major | 25, high, low]);
        }
        0x1_0000..0x1_0000_0000 => {
            let [a, b, c, d] = (number as u32).to_be_bytes();
            body.extend_from_slice(&[major | 26, a, b, c, d]);
        }
        _ => {
            let [a, b, c, d, e, f, g, h] = number.to_be_bytes();
            body.extend_from_slice(&[major | 27, a, b, c, d, e, f, g, h]);
        }
    }
}

/// Appends a text, or bytes.
fn string(body: &mut Vec<u8>, major: u8, string: &[u8]) {
    head(body, major, string.len() as u64);
    body.extend_from_slice(string);
}

fn text(body: &mut Vec<u8>, key: u64, text: Option<&str>) {
    if let Some(text) = text {
        head(body, NUMBER, key);
        string(body, TEXT, text.as_bytes());
    }
}

fn number(body: &mut Vec<u8>, key: u64, number: Option<u64>) {
    if let Some(number) = number {
        head(body, NUMBER, key);
        head(body, NUMBER, number);
    }
}

/// A key in words, for errors.
fn field_name(key: u64) -> &'static str {
    match key {
        key::METHOD => "metadata 1 (method)",
        key::REMAINING => "metadata 2 (remaining time)",
        key::SENT_AT => "metadata 3 (sender's clock)",
        key::TRACEPARENT => "metadata 4 (traceparent)",
        key::INSTANCE => "metadata 5 (instance)",
        key::SEQUENCE => "metadata 6 (sequence)",
        key::HANDLER_TIME => "metadata 7 (handler time)",
        key::ATTEMPT => "metadata 8 (attempt)",
        key::RETRY_AFTER => "metadata 9 (retry after)",
        key::USER => "metadata 10 (user's map)",
        key::ERROR => "metadata 11 (error text)",
        key::TOO_LARGE => "metadata 12 (size and cap)",
        key::ACCEPTS => "metadata 13 (readable compressions)",
        key::CALL_ID => "metadata 14 (call)",
        key::RUNNING => "metadata 15 (running calls)",
        key::PERMANENT => "metadata 16 (permanent)",
        key::EVENT_VERSION => "metadata 17 (version of the event)",
        _ => "metadata of an unknown key",
    }
}

/// The error of the CBOR reader as a [`Problem`].
fn problem(field: &'static str, cbor: &Decoder<'_>, error: CborError) -> Problem {
    (field, error.position().unwrap_or(cbor.position()), error.to_string())
}

/// Whole milliseconds, as the wire has them.
pub(crate) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Whole microseconds, as the wire has them.
pub(crate) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
