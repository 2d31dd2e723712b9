//! Which names, keys and patterns the broker can use, and which pattern matches which key.

/// The longest name of a namespace, service or method, in bytes. A name on the broker has several of them in it, and
/// may have at most 255 bytes.
const MAX_NAME: usize = 64;

/// Checks that `name` can be a part of a name on the broker: one or more of `A-Z`, `a-z`, `0-9`, `_` and `-`. Dots
/// separate the parts, so a part contains none. `what` is what has the name, for the error.
///
/// # Errors
/// A sentence that says what is wrong with it.
pub fn check_name(what: &str, name: &str) -> Result<(), String> {
    if name.is_empty() {
        return Err(format!("the {what} has no name"));
    }
    if name.len() > MAX_NAME {
        return Err(format!("the {what} `{name}` is longer than {MAX_NAME} bytes"));
    }
    match name.chars().find(|c| !(c.is_ascii_alphanumeric() || matches!(c, '_' | '-'))) {
        Some(c) => Err(format!("the {what} `{name}` has a {c:?} in it: use letters, digits, `_` and `-`")),
        None => Ok(()),
    }
}

/// The longest routing key in AMQP, in bytes.
const MAX_KEY: usize = 255;

/// Checks the key of an event: words with single dots between them, 1 to 255 bytes, without `*` and `#`.
pub(crate) fn check_event_key(key: &str) -> Result<(), String> {
    check_words("event key", key)?;
    match key.find(['*', '#']) {
        Some(_) => {
            Err(format!("the event key `{key}` has a wildcard in it: those are for the patterns of subscribers"))
        }
        None => Ok(()),
    }
}

/// Checks the pattern of a subscription. It is written like a key, but a word may also be `*`, which stands for any one
/// word, or `#`, which stands for any number of words.
pub(crate) fn check_event_pattern(pattern: &str) -> Result<(), String> {
    check_words("event pattern", pattern)?;
    match pattern.split('.').find(|word| word.len() > 1 && word.contains(['*', '#'])) {
        Some(word) => {
            Err(format!("the event pattern `{pattern}` has `{word}` in it: `*` and `#` stand for whole words"))
        }
        None => Ok(()),
    }
}

/// Checks what keys and patterns have in common: their length, and that no word is empty.
fn check_words(what: &str, text: &str) -> Result<(), String> {
    if text.is_empty() {
        return Err(format!("an {what} has at least one word, such as `order` in `order.created`"));
    }
    if text.len() > MAX_KEY {
        return Err(format!("the {what} `{text}` is longer than {MAX_KEY} bytes"));
    }
    match text.split('.').any(str::is_empty) {
        true => Err(format!("the {what} `{text}` has an empty word: write words with single dots between them")),
        false => Ok(()),
    }
}

/// Whether a topic exchange routes a message with `key` to a queue bound with `pattern`. In a pattern `*` is any one
/// word, and `#` is any number of words, also none.
#[must_use]
pub fn topic_matches(pattern: &str, key: &str) -> bool {
    fn words_match(pattern: &[&str], key: &[&str]) -> bool {
        match (pattern.split_first(), key.split_first()) {
            (None, None) => true,
            (Some((&"#", rest)), _) => {
                words_match(rest, key) || key.split_first().is_some_and(|(_, key)| words_match(pattern, key))
            }
            (Some((word, rest)), Some((first, key))) => (*word == "*" || word == first) && words_match(rest, key),
            _ => false,
        }
    }
    let pattern: Vec<&str> = pattern.split('.').collect();
    let key: Vec<&str> = key.split('.').collect();
    words_match(&pattern, &key)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_events_are_words_with_dots_between_them_and_patterns_have_wildcards_too() {
        let longest = "x".repeat(255);
        for key in ["order", "order.created", "Größe.a b", &longest] {
            assert_eq!(check_event_key(key), Ok(()));
            assert_eq!(check_event_pattern(key), Ok(()));
        }
        for pattern in ["#", "*", "order.*", "#.eu", "a.#.*"] {
            assert_eq!(check_event_pattern(pattern), Ok(()));
            let why = check_event_key(pattern).expect_err("a wildcard");
            assert!(why.contains(pattern) && why.contains("wildcard"), "{why}");
        }
        for (wrong, said) in [
            ("", "at least one word"),
            (".", "empty word"),
            (".order", "empty word"),
            ("order.", "empty word"),
            ("order..#.*", "empty word"),
            (&*"x".repeat(256), "255 bytes"),
        ] {
            for checked in [check_event_key(wrong), check_event_pattern(wrong)] {
                let why = checked.expect_err(wrong);
                assert!(why.contains(wrong) && why.contains(said), "{why}");
            }
        }
        for pattern in ["order*", "order.#x", "**", "a.*#"] {
            assert!(check_event_pattern(pattern).expect_err(pattern).contains("whole words"));
        }
    }

    #[test]
    fn topic_patterns_match_whole_words() {
        assert!(topic_matches("order.*", "order.created"));
        assert!(!topic_matches("order.*", "order"));
        assert!(!topic_matches("order.*", "order.created.eu"));
        assert!(topic_matches("order.#", "order"));
        assert!(topic_matches("#.eu", "order.created.eu"));
        assert!(topic_matches("#", ""));
        assert!(topic_matches("a.#.b.*", "a.x.y.b.c"));
        assert!(!topic_matches("a.#.b.*", "a.x.y.c"));
    }
}
