//! What a dead letter says of itself: the headers that an operator reads.

use bytes::Bytes;
use uuid::Uuid;

use super::message::Message;
use super::outcome::{cut, shortened};
use crate::context::unix_millis;
use crate::topology::header;

/// How many earlier deaths of a replayed message are told, and how much of each reason, in bytes.
const MAX_HISTORY: usize = 10;
const MAX_PAST_REASON: usize = 256;
/// How much of what else a line of it says.
const MAX_PAST_NAME: usize = 64;

/// What nobody can be told about, or was tried for the last time.
pub(super) struct Letter<'a> {
    /// The frame, or what of a message could not be read.
    pub(super) body: Bytes,
    pub(super) reason: &'a str,
    pub(super) id: Uuid,
    pub(super) method: Option<&'a str>,
    pub(super) attempts: u64,
}

impl Letter<'_> {
    /// The headers of this letter, which is what became of a part of `message`.
    pub(super) fn headers(&self, instance: &str, message: &Message) -> Vec<(String, String)> {
        let mut headers = vec![
            (header::REASON, shortened(self.reason).to_owned()),
            (header::INSTANCE, instance.to_owned()),
            (header::EXCHANGE, message.exchange.clone()),
            (header::KEY, message.key.clone()),
            (header::ATTEMPTS, self.attempts.to_string()),
            (header::FAILED_AT, unix_millis().to_string()),
            (header::ID, self.id.to_string()),
            (header::USER, message.user.as_deref().unwrap_or_default().to_owned()),
        ];
        headers.extend(self.method.map(|method| (header::METHOD, method.to_owned())));
        headers.extend(history(&message.properties.headers).map(|history| (header::HISTORY, history)));
        headers.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }
}

/// The earlier deaths of a message that comes with the `headers` of one, a line for each, the latest last.
pub(crate) fn history(headers: &[(String, String)]) -> Option<String> {
    let value = |wanted| header::value(headers, wanted);
    let reason = value(header::REASON)?.replace('\n', " ");
    let latest = format!(
        "{} {} {} {}",
        cut(value(header::FAILED_AT).unwrap_or("-"), MAX_PAST_NAME),
        cut(value(header::INSTANCE).unwrap_or("-"), MAX_PAST_NAME),
        cut(value(header::ATTEMPTS).unwrap_or("-"), MAX_PAST_NAME),
        cut(&reason, MAX_PAST_REASON),
    );
    // Whoever published it may have written anything there.
    let lines = value(header::HISTORY).unwrap_or_default().lines();
    let mut lines: Vec<&str> = lines.map(|line| cut(line, 4 * MAX_PAST_NAME + MAX_PAST_REASON)).collect();
    lines.push(&latest);
    Some(lines[lines.len().saturating_sub(MAX_HISTORY)..].join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())).collect()
    }

    #[test]
    fn a_message_that_never_died_has_no_history() {
        assert_eq!(history(&headers(&[("tenant", "a")])), None);
    }

    #[test]
    fn the_ten_latest_deaths_are_told_in_a_line_each() {
        let mut past = String::new();
        for n in 0..12 {
            let died = headers(&[
                (header::REASON, "no\nluck"),
                (header::INSTANCE, "i"),
                (header::ATTEMPTS, "5"),
                (header::FAILED_AT, &n.to_string()),
                (header::HISTORY, &past),
            ]);
            past = history(&died).expect("it died");
        }
        let lines: Vec<_> = past.lines().collect();
        assert_eq!((lines.len(), lines[0], lines[9]), (10, "2 i 5 no luck", "11 i 5 no luck"));
    }

    #[test]
    fn a_history_that_a_peer_made_up_stays_short() {
        let line = "x".repeat(100_000);
        let died = [(header::REASON, "no"), (header::INSTANCE, &line), (header::HISTORY, &line)];
        assert!(history(&headers(&died)).expect("it died").len() < 1024);
    }

    #[test]
    fn a_long_reason_is_cut_between_letters() {
        let past = history(&headers(&[(header::REASON, &"ü".repeat(1000))])).expect("it died");
        assert_eq!(past, format!("- - - {}", "ü".repeat(128)));
    }
}
