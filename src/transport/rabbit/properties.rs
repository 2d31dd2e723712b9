//! Translates the properties of messages: Hopline's [`Properties`] to AMQP's, and back.

use std::time::Duration;

use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable, ShortString};

use crate::transport::{Death, Properties};

/// AMQP's delivery mode for messages that a durable queue writes to disk.
const PERSISTENT: u8 = 2;
/// The longest time to live, in milliseconds. RabbitMQ closes the channel over a longer one.
const MAX_EXPIRATION_MS: u128 = u32::MAX as u128;
/// The header in which a quorum queue counts the failed deliveries of a message.
const DELIVERY_COUNT: &str = "x-delivery-count";
/// The header in which the broker tells how it dead-lettered a message, the latest time first.
const DEATHS: &str = "x-death";

/// A name as AMQP writes it, in at most 255 bytes.
///
/// # Errors
/// A sentence that contains the name.
pub(super) fn short(name: &str) -> Result<ShortString, String> {
    ShortString::try_new(name).map_err(|_| format!("`{name}` is longer than the 255 bytes that AMQP allows for a name"))
}

/// The AMQP properties of a message. The `user_id` is not among them: the publisher sets it, since only it knows the
/// user.
///
/// # Errors
/// A sentence that names the text that is too long for AMQP.
pub(super) fn written(properties: &Properties) -> Result<BasicProperties, String> {
    let mut written = BasicProperties::default();
    if let Some(id) = &properties.correlation_id {
        written = written.with_correlation_id(short(id)?);
    }
    if let Some(queue) = &properties.reply_to {
        written = written.with_reply_to(short(queue)?);
    }
    if let Some(expiration) = properties.expiration {
        let milliseconds = expiration.as_millis().min(MAX_EXPIRATION_MS);
        written = written.with_expiration(milliseconds.to_string().into());
    }
    if let Some(kind) = &properties.kind {
        written = written.with_type(short(kind)?);
    }
    if let Some(content_type) = &properties.content_type {
        written = written.with_content_type(short(content_type)?);
    }
    if properties.persistent {
        written = written.with_delivery_mode(PERSISTENT);
    }
    if let Some(priority) = properties.priority {
        written = written.with_priority(priority);
    }
    if let Some(instance) = &properties.app_id {
        written = written.with_app_id(short(instance)?);
    }
    if !properties.headers.is_empty() {
        let mut headers = FieldTable::default();
        for (name, value) in &properties.headers {
            headers.insert(short(name)?, AMQPValue::LongString(value.as_str().into()));
        }
        written = written.with_headers(headers);
    }
    Ok(written)
}

/// The properties of a message that came from the broker. Headers that are not text, and what Hopline does not use, are
/// left out.
pub(super) fn read(properties: &BasicProperties) -> Properties {
    let text = |value: &Option<ShortString>| value.as_ref().map(ToString::to_string);
    let expiration = properties.expiration().as_ref().and_then(|text| text.as_str().parse().ok());
    let headers = properties.headers().as_ref().map(|headers| headers.inner().iter());
    Properties {
        correlation_id: text(properties.correlation_id()),
        reply_to: text(properties.reply_to()),
        expiration: expiration.map(Duration::from_millis),
        kind: text(properties.kind()),
        content_type: text(properties.content_type()),
        persistent: *properties.delivery_mode() == Some(PERSISTENT),
        priority: *properties.priority(),
        app_id: text(properties.app_id()),
        user_id: text(properties.user_id()),
        headers: headers.into_iter().flatten().filter_map(|(name, value)| header(name, value)).collect(),
    }
}

/// How many deliveries of a message have failed. 0 if its queue does not count them.
pub(super) fn failures(properties: &BasicProperties) -> u32 {
    let count = properties.headers().as_ref().and_then(|headers| headers.inner().get(DELIVERY_COUNT));
    count.and_then(integer).map_or(0, |count| u32::try_from(count.max(0)).unwrap_or(u32::MAX))
}

/// How the broker dead-lettered a message the last time. `None` if it did not.
pub(super) fn death(properties: &BasicProperties) -> Option<Death> {
    let deaths = properties.headers().as_ref()?.inner().get(DEATHS)?;
    let AMQPValue::FieldArray(deaths) = deaths else { return None };
    let Some(AMQPValue::FieldTable(latest)) = deaths.as_slice().first() else { return None };
    let text = |name: &str| match latest.inner().get(name) {
        Some(AMQPValue::LongString(text)) => text.to_string(),
        _ => String::new(),
    };
    let at = match latest.inner().get("time") {
        Some(AMQPValue::Timestamp(seconds)) => *seconds,
        _ => 0,
    };
    Some(Death { reason: text("reason"), queue: text("queue"), at })
}

/// A number. RabbitMQ uses several widths for the same header.
fn integer(value: &AMQPValue) -> Option<i64> {
    match *value {
        AMQPValue::ShortShortInt(number) => Some(number.into()),
        AMQPValue::ShortShortUInt(number) => Some(number.into()),
        AMQPValue::ShortInt(number) => Some(number.into()),
        AMQPValue::ShortUInt(number) => Some(number.into()),
        AMQPValue::LongInt(number) => Some(number.into()),
        AMQPValue::LongUInt(number) => Some(number.into()),
        AMQPValue::LongLongInt(number) => Some(number),
        _ => None,
    }
}

/// A header, if it is text.
fn header(name: &ShortString, value: &AMQPValue) -> Option<(String, String)> {
    let AMQPValue::LongString(value) = value else {
        return None;
    };
    let value = std::str::from_utf8(value.as_bytes()).ok()?;
    Some((name.to_string(), value.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn properties_survive_the_round_trip() {
        let full = Properties {
            correlation_id: Some("id".into()),
            reply_to: Some("queue".into()),
            expiration: Some(Duration::from_millis(1500)),
            kind: Some("demo.v1.add".into()),
            content_type: Some("application/vnd.hopline".into()),
            persistent: true,
            priority: Some(9),
            app_id: Some("instance".into()),
            user_id: None,
            headers: vec![("tenant".into(), "grün".into())],
        };
        for properties in [full, Properties::default()] {
            assert_eq!(read(&written(&properties).expect("short names")), properties);
        }
    }

    #[test]
    fn who_published_is_read_and_not_written() {
        let verified = read(&BasicProperties::default().with_user_id("bob".into()));
        assert_eq!(verified.user_id.as_deref(), Some("bob"));
        assert_eq!(*written(&verified).expect("short names").user_id(), None);
    }

    #[test]
    fn headers_that_are_not_text_are_left_out() {
        let mut headers = FieldTable::default();
        headers.insert("count".into(), AMQPValue::LongLongInt(1));
        headers.insert("bytes".into(), AMQPValue::LongString(vec![0xff].into()));
        headers.insert("text".into(), AMQPValue::LongString("yes".into()));
        let properties = read(&BasicProperties::default().with_headers(headers));
        assert_eq!(properties.headers, [("text".to_owned(), "yes".to_owned())]);
    }

    #[test]
    fn failed_deliveries_are_counted_in_every_width_of_number() {
        let counted = |value| {
            let mut headers = FieldTable::default();
            headers.insert(DELIVERY_COUNT.into(), value);
            failures(&BasicProperties::default().with_headers(headers))
        };
        assert_eq!(counted(AMQPValue::LongLongInt(3)), 3);
        assert_eq!(counted(AMQPValue::ShortShortUInt(3)), 3);
        assert_eq!(counted(AMQPValue::LongLongInt(-1)), 0);
        assert_eq!(counted(AMQPValue::LongLongInt(i64::MAX)), u32::MAX);
        assert_eq!(failures(&BasicProperties::default()), 0);
    }

    #[test]
    fn properties_that_nobody_should_send_are_read_as_if_they_were_not_there() {
        for time in ["", "-1", "1e3", " 1", "18446744073709551616", "soon"] {
            let properties = read(&BasicProperties::default().with_expiration(time.into()));
            assert_eq!(properties, Properties::default(), "`{time}`");
        }
        let longest = read(&BasicProperties::default().with_expiration(u64::MAX.to_string().into()));
        assert_eq!(longest.expiration, Some(Duration::from_millis(u64::MAX)));
        let mut nested = AMQPValue::Void;
        for _ in 0..100 {
            let mut table = FieldTable::default();
            table.insert("".into(), AMQPValue::FieldArray(vec![nested].into()));
            nested = AMQPValue::FieldTable(table);
        }
        let mut headers = FieldTable::default();
        headers.insert("nested".into(), nested);
        headers.insert("time".into(), AMQPValue::Timestamp(u64::MAX));
        headers.insert("short".into(), AMQPValue::ShortString("text".into()));
        let odd = BasicProperties::default().with_headers(headers).with_delivery_mode(77).with_priority(255);
        let expected = Properties { priority: Some(255), ..Properties::default() };
        assert_eq!(read(&odd), expected);
    }

    #[test]
    fn what_amqp_cannot_carry_is_refused_or_cut_to_its_limit() {
        let long = Properties { reply_to: Some("x".repeat(256)), ..Properties::default() };
        assert!(written(&long).is_err_and(|why| why.contains("255 bytes")));
        let patient = Properties { expiration: Some(Duration::MAX), ..Properties::default() };
        let patient = written(&patient).expect("short names");
        assert_eq!(patient.expiration().as_ref().map(ShortString::as_str), Some("4294967295"));
    }
}
