//! What the broker's words mean. It tells some things in no other way.

use std::time::Duration;

use lapin::ErrorKind;

use crate::transport::ConsumerEnd;

/// What the broker said, if it said something; otherwise lapin's text.
pub(super) fn of(error: &lapin::Error) -> String {
    match error.kind() {
        ErrorKind::ProtocolError(error) => error.get_message().to_string(),
        ErrorKind::IOError(error) => error.to_string(),
        _ => error.to_string(),
    }
}

/// Why the broker has closed the channel of a consumer. It says for example "PRECONDITION_FAILED - delivery
/// acknowledgement on channel 2 timed out. Timeout value used: 5000 ms. This timeout value can be configured".
pub(super) fn end_of_channel(words: &str) -> ConsumerEnd {
    let limit = words.split_once("timed out. Timeout value used: ").and_then(|(_, rest)| rest.split_once(" ms"));
    match limit.and_then(|(number, _)| number.parse().ok()) {
        Some(milliseconds) => ConsumerEnd::TimedOut(Duration::from_millis(milliseconds)),
        None => ConsumerEnd::Channel(words.into()),
    }
}

/// The exchange to which the user may not publish, and the key if only that is forbidden, in the broker's words
/// "ACCESS_REFUSED - access to topic 'key' in exchange 'x' in vhost '/' refused for user 'u'".
pub(super) fn forbidden_exchange(reason: &str) -> Option<(&str, Option<&str>)> {
    let (_, rest) = reason.split_once("ACCESS_REFUSED")?;
    let (about, rest) = rest.split_once("exchange '")?;
    let (exchange, _) = rest.split_once("' in vhost")?;
    let topic = about.split_once("topic '").and_then(|(_, rest)| rest.strip_suffix("' in "));
    Some((if exchange == "amq.default" { "" } else { exchange }, topic))
}

/// The largest message that the broker accepts, in bytes, in its words "message size 20971520 is larger than configured
/// max size 16777216".
pub(super) fn largest_message(reason: &str) -> Option<usize> {
    let (_, rest) = reason.split_once("configured max size ")?;
    let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
    rest[..digits].parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_message_is_read_from_the_brokers_words() {
        let words = "PRECONDITION_FAILED - message size 20971520 is larger than configured max size 16777216";
        assert_eq!(largest_message(words), Some(16_777_216));
        assert_eq!(largest_message("NOT_FOUND - no exchange 'a' in vhost '/'"), None);
    }

    #[test]
    fn the_forbidden_exchange_is_read_from_the_brokers_words() {
        let words = "ACCESS_REFUSED - write access to exchange 'a.b' in vhost '/' refused for user 'u'";
        assert_eq!(forbidden_exchange(words), Some(("a.b", None)));
        let words = "ACCESS_REFUSED - access to exchange 'amq.default' in vhost '/' refused for user 'u'";
        assert_eq!(forbidden_exchange(words), Some(("", None)));
        let words = "ACCESS_REFUSED - access to topic 'k.l' in exchange 'a' in vhost '/' refused for user 'u'";
        assert_eq!(forbidden_exchange(words), Some(("a", Some("k.l"))));
        assert_eq!(forbidden_exchange("NOT_FOUND - no exchange 'a' in vhost '/'"), None);
    }

    #[test]
    fn the_time_that_a_delivery_had_is_read_from_the_brokers_words() {
        let words = "PRECONDITION_FAILED - delivery acknowledgement on channel 2 timed out. Timeout value used: 5000 ms. \
                     This timeout value can be configured";
        assert_eq!(end_of_channel(words), ConsumerEnd::TimedOut(Duration::from_secs(5)));
        let words = "PRECONDITION_FAILED - unknown delivery tag 7";
        assert_eq!(end_of_channel(words), ConsumerEnd::Channel(words.into()));
    }
}
