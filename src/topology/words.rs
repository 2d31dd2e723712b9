//! Names, keys and patterns: which can be used, and which pattern matches which key.

/// The longest name of a namespace, service or method, in bytes: the broker's names end at 255.
const MAX_NAME: usize = 64;

/// Whether `name` can be a part of a name on the broker: `[A-Za-z0-9_-]+`, so that dots separate.
///
/// # Errors
/// A sentence that says what is wrong with it.
pub fn check_name(what: &str, name: &str) -> Result<(), String> {
    if name.is_empty() {
        return Err(format!("a {what} needs a name"));
    }
    if name.len() > MAX_NAME {
        return Err(format!("the {what} `{name}` is longer than {MAX_NAME} bytes"));
    }
    match name.chars().find(|c| !(c.is_ascii_alphanumeric() || matches!(c, '_' | '-'))) {
        Some(c) => Err(format!("the {what} `{name}` has a {c:?} in it: use letters, digits, `_` and `-`")),
        None => Ok(()),
    }
}

/// The longest key that a message on the broker has, in bytes.
const MAX_KEY: usize = 255;

/// Whether `key` can be that of an event: words with single dots between them, 1 to 255 bytes, without `*` and `#`.
pub(crate) fn check_event_key(key: &str) -> Result<(), String> {
    check_words("event key", key)?;
    match key.find(['*', '#']) {
        Some(_) => {
            Err(format!("the event key `{key}` has a wildcard in it: those are for the patterns of subscribers"))
        }
        None => Ok(()),
    }
}

/// Whether `pattern` can be that of a subscription: as a key, and a word may be `*`, for any one, or `#`, for any number.
pub(crate) fn check_event_pattern(pattern: &str) -> Result<(), String> {
    check_words("event pattern", pattern)?;
    match pattern.split('.').find(|word| word.len() > 1 && word.contains(['*', '#'])) {
        Some(word) => {
            Err(format!("the event pattern `{pattern}` has `{word}` in it: `*` and `#` stand for whole words"))
        }
        None => Ok(()),
    }
}

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

/// Whether a topic exchange sends `key` to a queue bound with `pattern`: `*` is one word, `#` any number of them.
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
