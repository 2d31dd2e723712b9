//! What the headers of a message tell: who its caller is, and how often it died before.

use std::sync::Arc;

use crate::topology::header;
use crate::transport::Properties;

/// How many earlier deaths the history of a replayed message holds.
const MAX_HISTORY: usize = 10;
/// How much of each reason the history holds, in bytes.
const MAX_PAST_REASON: usize = 256;
/// How much of each other value a line of the history holds, in bytes.
const MAX_PAST_NAME: usize = 64;

/// The user of the caller of a message. When a server publishes a message again, the message carries the server's user,
/// and names the caller in a header. The header is believed only if it comes from the same user as this server's,
/// `own`.
pub(crate) fn user_of(properties: &Properties, own: Option<&str>) -> Option<Arc<str>> {
    let publisher = properties.user_id.as_deref()?;
    let user = match header::value(&properties.headers, header::USER) {
        Some(user) if own == Some(publisher) => user,
        _ => publisher,
    };
    Some(user).filter(|user| !user.is_empty()).map(Into::into)
}

/// The history of a dead letter that comes with these headers: a line for each earlier death, the latest last.
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
    // Whoever published the message may have written anything into this header, so it is cut.
    let lines = value(header::HISTORY).unwrap_or_default().lines();
    let mut lines: Vec<&str> = lines.map(|line| cut(line, 4 * MAX_PAST_NAME + MAX_PAST_REASON)).collect();
    lines.push(&latest);
    Some(lines[lines.len().saturating_sub(MAX_HISTORY)..].join("\n"))
}

/// The longest beginning of `text` that has at most `bytes` bytes and ends with a whole character.
pub(crate) fn cut(text: &str, bytes: usize) -> &str {
    let end = (0..=text.len().min(bytes)).rev().find(|end| text.is_char_boundary(*end));
    &text[..end.unwrap_or_default()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(user_id: Option<&str>, told: Option<&str>) -> Option<Arc<str>> {
        let headers = told.map(|user| (header::USER.to_owned(), user.to_owned())).into_iter().collect();
        let properties = Properties { user_id: user_id.map(str::to_owned), headers, ..Properties::default() };
        user_of(&properties, Some("server"))
    }

    #[test]
    fn only_a_server_of_the_same_user_is_believed_whose_a_message_was() {
        assert_eq!(of(Some("bob"), None).as_deref(), Some("bob"));
        assert_eq!(of(Some("bob"), Some("root")).as_deref(), Some("bob"));
        assert_eq!(of(Some("server"), Some("bob")).as_deref(), Some("bob"));
        assert_eq!(of(Some("server"), Some("")), None);
        assert_eq!(of(Some("server"), None).as_deref(), Some("server"));
        assert_eq!(of(None, Some("server")), None);
    }

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
