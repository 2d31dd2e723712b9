//! Properties of messages: Hopline's written as AMQP's, and back.
//!
//! Whatever is in a message, reading ends: what cannot be read is left out, and nothing here calls itself. A message
//! with 30 000 arrays in each other costs no more than another of its size.

use std::time::Duration;

use bytes::{BufMut as _, BytesMut};
use lapin::types::ShortString;

use super::frames::{BASIC, Fields, put_short, too_long};
use crate::transport::{Death, Properties};

/// AMQP's delivery mode for messages that a durable queue writes to disk.
const PERSISTENT: u8 = 2;
/// The longest time to live, in milliseconds. RabbitMQ closes the channel over a longer one.
const MAX_EXPIRATION_MS: u128 = u32::MAX as u128;
/// The header in which a quorum queue counts the failed deliveries of a message.
const DELIVERY_COUNT: &[u8] = b"x-delivery-count";
/// The header in which the broker tells where in its stream a message is.
const STREAM_OFFSET: &[u8] = b"x-stream-offset";
/// The header in which the broker tells how it dead-lettered a message, the latest time first.
const DEATHS: &[u8] = b"x-death";

/// The bit of each property in the flags in front of them. They follow in this order.
mod flag {
    pub(super) const CONTENT_TYPE: u16 = 1 << 15;
    pub(super) const CONTENT_ENCODING: u16 = 1 << 14;
    pub(super) const HEADERS: u16 = 1 << 13;
    pub(super) const DELIVERY_MODE: u16 = 1 << 12;
    pub(super) const PRIORITY: u16 = 1 << 11;
    pub(super) const CORRELATION_ID: u16 = 1 << 10;
    pub(super) const REPLY_TO: u16 = 1 << 9;
    pub(super) const EXPIRATION: u16 = 1 << 8;
    pub(super) const MESSAGE_ID: u16 = 1 << 7;
    pub(super) const TIMESTAMP: u16 = 1 << 6;
    pub(super) const TYPE: u16 = 1 << 5;
    pub(super) const USER_ID: u16 = 1 << 4;
    pub(super) const APP_ID: u16 = 1 << 3;
    /// More flags follow.
    pub(super) const MORE: u16 = 1;
}

/// The types of values in a table, as AMQP marks them.
mod kind {
    pub(super) const LONG_STRING: u8 = b'S';
    pub(super) const TABLE: u8 = b'F';
    pub(super) const ARRAY: u8 = b'A';
    pub(super) const TIMESTAMP: u8 = b'T';
}

/// A name as lapin takes it, in at most 255 bytes.
///
/// # Errors
/// A sentence that contains the name.
pub(super) fn short(name: &str) -> Result<ShortString, String> {
    ShortString::try_new(name).map_err(|_| too_long(name))
}

/// Writes the payload of the header frame of a message whose body has `size` bytes. Its `number` on its channel is
/// written as the message id: when the broker returns the message, the return contains it. `user` is who publishes it.
///
/// # Errors
/// A sentence that names the text that is too long for AMQP. What was written until then has to be taken back.
pub(super) fn put(
    out: &mut BytesMut,
    properties: &Properties,
    size: usize,
    number: u64,
    user: Option<&str>,
) -> Result<(), String> {
    let Properties { correlation_id, reply_to, expiration, kind, content_type, priority, app_id, headers, .. } =
        properties;
    let set = |is_set: bool, flag: u16| if is_set { flag } else { 0 };
    let flags = flag::MESSAGE_ID
        | set(content_type.is_some(), flag::CONTENT_TYPE)
        | set(!headers.is_empty(), flag::HEADERS)
        | set(properties.persistent, flag::DELIVERY_MODE)
        | set(priority.is_some(), flag::PRIORITY)
        | set(correlation_id.is_some(), flag::CORRELATION_ID)
        | set(reply_to.is_some(), flag::REPLY_TO)
        | set(expiration.is_some(), flag::EXPIRATION)
        | set(kind.is_some(), flag::TYPE)
        | set(user.is_some(), flag::USER_ID)
        | set(app_id.is_some(), flag::APP_ID);
    out.put_u16(BASIC);
    out.put_u16(0);
    out.put_u64(size as u64);
    out.put_u16(flags);
    put_text(out, content_type.as_deref())?;
    put_headers(out, headers)?;
    if properties.persistent {
        out.put_u8(PERSISTENT);
    }
    if let Some(priority) = priority {
        out.put_u8(*priority);
    }
    put_text(out, correlation_id.as_deref())?;
    put_text(out, reply_to.as_deref())?;
    if let Some(expiration) = expiration {
        put_number(out, expiration.as_millis().min(MAX_EXPIRATION_MS) as u64);
    }
    put_number(out, number);
    [kind.as_deref(), user, app_id.as_deref()].into_iter().try_for_each(|text| put_text(out, text))
}

/// Writes a text, if there is one.
fn put_text(out: &mut BytesMut, text: Option<&str>) -> Result<(), String> {
    text.map_or(Ok(()), |text| put_short(out, text))
}

/// Writes a number as text.
fn put_number(out: &mut BytesMut, mut number: u64) {
    let mut digits = [0; 20];
    let mut start = digits.len();
    loop {
        start -= 1;
        digits[start] = b'0' + (number % 10) as u8;
        number /= 10;
        if number == 0 {
            break;
        }
    }
    out.put_u8((digits.len() - start) as u8);
    out.put_slice(&digits[start..]);
}

/// Writes the headers, if there are any.
fn put_headers(out: &mut BytesMut, headers: &[(String, String)]) -> Result<(), String> {
    if headers.is_empty() {
        return Ok(());
    }
    let start = out.len();
    out.put_u32(0);
    for (name, value) in headers {
        put_short(out, name)?;
        out.put_u8(kind::LONG_STRING);
        out.put_u32(value.len() as u32);
        out.put_slice(value.as_bytes());
    }
    let length = (out.len() - start - 4) as u32;
    out[start..start + 4].copy_from_slice(&length.to_be_bytes());
    Ok(())
}

/// What the header frame of a message tells.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Content {
    /// The length of the body in bytes.
    pub(super) size: u64,
    /// The properties. Headers that are not text, and what Hopline does not use, are left out.
    pub(super) properties: Properties,
    /// The message id, if it is a number.
    pub(super) number: Option<u64>,
    /// How many deliveries of the message have failed. 0 if its queue does not count them.
    pub(super) failures: u32,
    /// Where in its stream the message is, if it comes from one.
    pub(super) offset: Option<u64>,
    /// How the broker dead-lettered the message the last time. `None` if it did not.
    pub(super) death: Option<Death>,
}

/// Reads the payload of a header frame. What comes after the first byte that AMQP does not allow is left out.
pub(super) fn read(payload: &[u8]) -> Content {
    let mut content = Content::default();
    // The broker does not look into everything that a client has written.
    let _ = fill(&mut content, Fields(payload));
    content
}

/// Reads one property after the other, until there are no more bytes.
fn fill(content: &mut Content, mut fields: Fields<'_>) -> Option<()> {
    let _class_and_weight = fields.u32()?;
    content.size = fields.u64()?;
    let flags = fields.u16()?;
    let mut more = flags;
    while more & flag::MORE != 0 {
        more = fields.u16()?;
    }
    let has = |flag: u16| flags & flag != 0;
    let properties = &mut content.properties;
    if has(flag::CONTENT_TYPE) {
        properties.content_type = Some(fields.short()?.into_owned());
    }
    if has(flag::CONTENT_ENCODING) {
        fields.short()?;
    }
    if has(flag::HEADERS) {
        let headers = Fields(fields.long()?);
        for (name, value) in Table(headers) {
            match value {
                HeaderValue::Text(text) => {
                    if let (Ok(name), Ok(text)) = (std::str::from_utf8(name), std::str::from_utf8(text)) {
                        properties.headers.push((name.to_owned(), text.to_owned()));
                    }
                }
                HeaderValue::Number(count) if name == DELIVERY_COUNT => {
                    content.failures = u32::try_from(count.max(0)).unwrap_or(u32::MAX);
                }
                HeaderValue::Number(offset) if name == STREAM_OFFSET => content.offset = u64::try_from(offset).ok(),
                HeaderValue::Array(deaths) if name == DEATHS => content.death = death(deaths),
                _ => {}
            }
        }
    }
    if has(flag::DELIVERY_MODE) {
        properties.persistent = fields.u8()? == PERSISTENT;
    }
    if has(flag::PRIORITY) {
        properties.priority = Some(fields.u8()?);
    }
    if has(flag::CORRELATION_ID) {
        properties.correlation_id = Some(fields.short()?.into_owned());
    }
    if has(flag::REPLY_TO) {
        properties.reply_to = Some(fields.short()?.into_owned());
    }
    if has(flag::EXPIRATION) {
        properties.expiration = fields.short()?.parse().ok().map(Duration::from_millis);
    }
    if has(flag::MESSAGE_ID) {
        content.number = fields.short()?.parse().ok();
    }
    if has(flag::TIMESTAMP) {
        fields.u64()?;
    }
    if has(flag::TYPE) {
        properties.kind = Some(fields.short()?.into_owned());
    }
    if has(flag::USER_ID) {
        properties.user_id = Some(fields.short()?.into_owned());
    }
    if has(flag::APP_ID) {
        properties.app_id = Some(fields.short()?.into_owned());
    }
    Some(())
}

/// The latest of the broker's notes about how it dead-lettered a message.
fn death(mut deaths: Fields<'_>) -> Option<Death> {
    let HeaderValue::Table(latest) = value(&mut deaths)? else { return None };
    let mut death = Death { reason: String::new(), queue: String::new(), at: 0 };
    for (name, value) in Table(latest) {
        match (name, value) {
            (b"reason", HeaderValue::Text(text)) => death.reason = String::from_utf8_lossy(text).into_owned(),
            (b"queue", HeaderValue::Text(text)) => death.queue = String::from_utf8_lossy(text).into_owned(),
            (b"time", HeaderValue::Time(seconds)) => death.at = seconds,
            _ => {}
        }
    }
    Some(death)
}

/// A value in a table, as far as Hopline uses it. Tables and arrays are not read, only found.
enum HeaderValue<'a> {
    Text(&'a [u8]),
    /// A number. RabbitMQ uses several widths for the same header.
    Number(i64),
    Time(u64),
    Table(Fields<'a>),
    Array(Fields<'a>),
    Other,
}

/// The names and values of a table. It ends where it cannot be read.
struct Table<'a>(Fields<'a>);

impl<'a> Iterator for Table<'a> {
    type Item = (&'a [u8], HeaderValue<'a>);

    fn next(&mut self) -> Option<Self::Item> {
        let length = self.0.u8()?;
        Some((self.0.bytes(length.into())?, value(&mut self.0)?))
    }
}

/// Reads a value with the mark of its type. `None` if RabbitMQ has no such type.
fn value<'a>(fields: &mut Fields<'a>) -> Option<HeaderValue<'a>> {
    Some(match fields.u8()? {
        kind::LONG_STRING => HeaderValue::Text(fields.long()?),
        kind::TABLE => HeaderValue::Table(Fields(fields.long()?)),
        kind::ARRAY => HeaderValue::Array(Fields(fields.long()?)),
        kind::TIMESTAMP => HeaderValue::Time(fields.u64()?),
        b'b' => HeaderValue::Number((fields.u8()? as i8).into()),
        b'B' => HeaderValue::Number(fields.u8()?.into()),
        b's' => HeaderValue::Number((fields.u16()? as i16).into()),
        b'u' => HeaderValue::Number(fields.u16()?.into()),
        b'I' => HeaderValue::Number((fields.u32()? as i32).into()),
        b'i' => HeaderValue::Number(fields.u32()?.into()),
        b'l' | b'L' => HeaderValue::Number(fields.u64()? as i64),
        b't' => skip(fields, 1)?,
        b'f' => skip(fields, 4)?,
        b'D' => skip(fields, 5)?,
        b'd' => skip(fields, 8)?,
        b'x' => {
            fields.long()?;
            HeaderValue::Other
        }
        b'V' => HeaderValue::Other,
        _ => return None,
    })
}

fn skip<'a>(fields: &mut Fields<'a>, bytes: usize) -> Option<HeaderValue<'a>> {
    fields.bytes(bytes).map(|_| HeaderValue::Other)
}

#[cfg(test)]
mod tests {
    use amq_protocol::frame::{AMQPFrame, parse_frame};
    use lapin::BasicProperties;
    use lapin::types::{AMQPValue, FieldTable};

    use super::super::frames::{HEADER, frame, payload};
    use super::*;

    fn bytes_of(properties: &Properties, user: Option<&str>) -> BytesMut {
        let mut out = BytesMut::new();
        put(&mut out, properties, 5, 17, user).expect("short names");
        out
    }

    /// What is read of properties that another client has written.
    fn of(properties: BasicProperties) -> Content {
        let header = amq_protocol::frame::AMQPContentHeader { class_id: BASIC, body_size: 5, properties };
        let header = AMQPFrame::Header(1, header);
        let written = amq_protocol::frame::gen_frame(&header)(Vec::new().into()).expect("a vector takes all");
        read(payload(&written.into_inner().0))
    }

    fn full() -> Properties {
        Properties {
            correlation_id: Some("id".into()),
            reply_to: Some("queue".into()),
            expiration: Some(Duration::from_millis(1500)),
            kind: Some("demo.v1.add".into()),
            content_type: Some("application/vnd.hopline".into()),
            persistent: true,
            priority: Some(9),
            app_id: Some("instance".into()),
            user_id: Some("bob".into()),
            headers: vec![("tenant".into(), "grün".into())],
        }
    }

    #[test]
    fn properties_survive_the_round_trip() {
        for (properties, user) in [(full(), Some("bob")), (Properties::default(), None)] {
            let content = read(&bytes_of(&properties, user));
            assert_eq!((content.size, content.number), (5, Some(17)));
            assert_eq!(content.properties, properties);
        }
    }

    #[test]
    fn others_read_what_is_written() {
        let mut out = BytesMut::new();
        let payload = bytes_of(&full(), Some("bob"));
        frame(&mut out, HEADER, 3, |out| out.extend_from_slice(&payload));
        let Ok((_, AMQPFrame::Header(3, header))) = parse_frame(&out[..]) else { panic!("it is one") };
        let mut headers = FieldTable::default();
        headers.insert("tenant".into(), AMQPValue::LongString("grün".into()));
        let expected = BasicProperties::default()
            .with_correlation_id("id".into())
            .with_reply_to("queue".into())
            .with_expiration("1500".into())
            .with_type("demo.v1.add".into())
            .with_content_type("application/vnd.hopline".into())
            .with_delivery_mode(PERSISTENT)
            .with_priority(9)
            .with_app_id("instance".into())
            .with_user_id("bob".into())
            .with_message_id("17".into())
            .with_headers(headers);
        assert_eq!((header.body_size, header.properties), (5, expected));
    }

    #[test]
    fn what_others_have_written_is_read() {
        let mut headers = FieldTable::default();
        headers.insert("text".into(), AMQPValue::LongString("yes".into()));
        let written = BasicProperties::default()
            .with_content_encoding("gzip".into())
            .with_timestamp(7)
            .with_cluster_id("cluster".into())
            .with_app_id("instance".into())
            .with_user_id("bob".into())
            .with_headers(headers);
        let expected = Properties {
            app_id: Some("instance".into()),
            user_id: Some("bob".into()),
            headers: vec![("text".into(), "yes".into())],
            ..Properties::default()
        };
        assert_eq!(of(written), Content { size: 5, properties: expected, ..Content::default() });
    }

    #[test]
    fn headers_that_are_not_text_are_left_out() {
        let mut headers = FieldTable::default();
        let others = [
            AMQPValue::Boolean(true),
            AMQPValue::Double(1.0),
            AMQPValue::Float(1.0),
            AMQPValue::ByteArray(vec![1, 2].into()),
            AMQPValue::LongLongInt(1),
            AMQPValue::Timestamp(u64::MAX),
            AMQPValue::Void,
            AMQPValue::LongString(vec![0xff].into()),
        ];
        for (place, other) in others.into_iter().enumerate() {
            headers.insert(place.to_string().into(), other);
        }
        headers.insert("text".into(), AMQPValue::LongString("yes".into()));
        let content = of(BasicProperties::default().with_headers(headers));
        assert_eq!(content.properties.headers, [("text".to_owned(), "yes".to_owned())]);
    }

    #[test]
    fn failed_deliveries_are_counted_in_every_width_of_number() {
        let counted = |value| {
            let mut headers = FieldTable::default();
            headers.insert("x-delivery-count".into(), value);
            of(BasicProperties::default().with_headers(headers)).failures
        };
        for value in [
            AMQPValue::ShortShortInt(3),
            AMQPValue::ShortShortUInt(3),
            AMQPValue::ShortInt(3),
            AMQPValue::LongInt(3),
            AMQPValue::LongUInt(3),
            AMQPValue::LongLongInt(3),
        ] {
            assert_eq!(counted(value.clone()), 3, "{value:?}");
        }
        assert_eq!(counted(AMQPValue::LongLongInt(-1)), 0);
        assert_eq!(counted(AMQPValue::LongLongInt(i64::MAX)), u32::MAX);
        assert_eq!(of(BasicProperties::default()).failures, 0);
    }

    #[test]
    fn the_place_in_a_stream_is_read_if_it_is_a_number() {
        let at = |value| {
            let mut headers = FieldTable::default();
            headers.insert("x-stream-offset".into(), value);
            of(BasicProperties::default().with_headers(headers)).offset
        };
        assert_eq!(at(AMQPValue::LongLongInt(i64::MAX)), Some(i64::MAX as u64));
        assert_eq!(at(AMQPValue::LongLongInt(0)), Some(0));
        assert_eq!(at(AMQPValue::LongLongInt(-1)), None);
        assert_eq!(at(AMQPValue::LongString("7".into())), None);
    }

    #[test]
    fn the_latest_death_is_read() {
        let died = |reason: &str, at| {
            let mut death = FieldTable::default();
            death.insert("reason".into(), AMQPValue::LongString(reason.into()));
            death.insert("queue".into(), AMQPValue::LongString("calls".into()));
            death.insert("time".into(), AMQPValue::Timestamp(at));
            AMQPValue::FieldTable(death)
        };
        let mut headers = FieldTable::default();
        headers.insert("x-death".into(), AMQPValue::FieldArray(vec![died("expired", 9), died("rejected", 8)].into()));
        let expected = Death { reason: "expired".into(), queue: "calls".into(), at: 9 };
        assert_eq!(of(BasicProperties::default().with_headers(headers)).death, Some(expected));
    }

    /// The payload of a header frame with these headers, and an app id behind them.
    fn with_headers(table: &[u8]) -> Vec<u8> {
        let mut payload = vec![0, 60, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5];
        payload.extend((flag::HEADERS | flag::APP_ID).to_be_bytes());
        payload.extend((table.len() as u32).to_be_bytes());
        payload.extend(table);
        payload.extend(b"\x02me");
        payload
    }

    #[test]
    fn arrays_in_each_other_are_skipped_however_many_they_are() {
        let mut nested = vec![b'V'];
        for _ in 0..30_000 {
            let mut array = vec![b'A'];
            array.extend((nested.len() as u32).to_be_bytes());
            array.append(&mut nested);
            nested = array;
        }
        let mut table = b"\x06nested".to_vec();
        table.append(&mut nested);
        table.extend(b"\x04textS\0\0\0\x03yes");
        let content = read(&with_headers(&table));
        assert_eq!(content.properties.headers, [("text".to_owned(), "yes".to_owned())]);
        assert_eq!(content.properties.app_id.as_deref(), Some("me"));
    }

    #[test]
    fn headers_that_nobody_can_read_cost_only_themselves() {
        for table in [&b"\x01a?\x01b"[..], b"\xffa", b"\x01aS\xff\xff\xff\xff", b"\x01aA\xff\xff\xff\xff"] {
            let content = read(&with_headers(table));
            assert_eq!((content.properties.headers.len(), content.properties.app_id.as_deref()), (0, Some("me")));
        }
    }

    #[test]
    fn properties_that_nobody_should_send_are_read_as_if_they_were_not_there() {
        for time in ["", "-1", "1e3", " 1", "18446744073709551616", "soon"] {
            let content = of(BasicProperties::default().with_expiration(time.into()));
            assert_eq!(content.properties, Properties::default(), "`{time}`");
        }
        let longest = of(BasicProperties::default().with_expiration(u64::MAX.to_string().into()));
        assert_eq!(longest.properties.expiration, Some(Duration::from_millis(u64::MAX)));
        let odd = of(BasicProperties::default().with_delivery_mode(77).with_priority(255));
        assert_eq!(odd.properties, Properties { priority: Some(255), ..Properties::default() });
    }

    #[test]
    fn whatever_the_bytes_are_reading_ends() {
        let whole = bytes_of(&full(), Some("bob"));
        for end in 0..whole.len() {
            read(&whole[..end]);
            let mut changed = whole.clone();
            changed[end] ^= 0xff;
            read(&changed);
        }
        assert_eq!(read(&[0xff; 64]).properties, Properties::default());
    }

    #[test]
    fn what_amqp_cannot_carry_is_refused_or_cut_to_its_limit() {
        let long = Properties { reply_to: Some("x".repeat(256)), ..Properties::default() };
        let refused = put(&mut BytesMut::new(), &long, 0, 1, None);
        assert!(refused.is_err_and(|why| why.contains("255 bytes")));
        let patient = Properties { expiration: Some(Duration::MAX), ..Properties::default() };
        let patient = read(&bytes_of(&patient, None));
        assert_eq!(patient.properties.expiration, Some(Duration::from_millis(4_294_967_295)));
    }

    #[test]
    fn numbers_are_written_as_text() {
        for number in [0, 9, 10, 1234, u64::MAX] {
            let mut out = BytesMut::new();
            put_number(&mut out, number);
            assert_eq!(Fields(&out).short().as_deref(), Some(number.to_string().as_str()));
        }
    }
}
