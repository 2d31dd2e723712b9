//! What differs between a declaration and what is there, read from the broker's words.

use lapin::types::AMQPValue;

use super::text;

/// How the broker's words begin when an argument differs.
pub(super) const INEQUIVALENT: &str = "inequivalent arg '";

/// One argument that differs.
#[derive(Debug, PartialEq)]
pub(super) struct Difference {
    pub(super) argument: String,
    declared: Option<Value>,
    pub(super) current: Option<Value>,
}

/// A value in the broker's words, and its type if the broker tells it.
#[derive(Debug, PartialEq)]
pub(super) struct Value {
    text: String,
    kind: Option<String>,
}

impl Difference {
    /// Reads "... inequivalent arg 'x-expires' for queue 'q' in vhost '/': received the value '1000' of type
    /// 'signedint' but current is none". `None` if the words do not contain this. The broker cuts its words after 255
    /// bytes.
    pub(super) fn read(complaint: &str) -> Option<Self> {
        let (_, rest) = complaint.split_once(INEQUIVALENT)?;
        let (argument, rest) = rest.split_once('\'')?;
        let (_, rest) = rest.split_once(": received ")?;
        let (declared, current) = rest.split_once(" but current is ")?;
        let read = |words| {
            let value = Value::read(words)?;
            Some(if argument == "x-max-age" { value.of_age() } else { value })
        };
        Some(Self { argument: argument.to_owned(), declared: read(declared), current: read(current) })
    }

    /// The difference in words, for the error.
    pub(super) fn sentence(&self) -> String {
        let argument = &self.argument;
        match (&self.current, &self.declared) {
            (Some(current), Some(declared)) => {
                format!("`{argument}` is {}, not {} as declared here", current.text, declared.text)
            }
            (None, Some(declared)) => format!("`{argument}` is not set, but declared here as {}", declared.text),
            (Some(current), None) => {
                format!("`{argument}` is {}, but not declared here", current.text)
            }
            (None, None) => format!("`{argument}` differs"),
        }
    }
}

impl Value {
    /// Reads `none`, `'1000'` or `the value '1000' of type 'signedint'`.
    fn read(words: &str) -> Option<Self> {
        let (_, rest) = words.split_once('\'')?;
        let (text, rest) = rest.split_once("' of type '").unwrap_or((rest, ""));
        let unquoted = |text: &str| text.trim_end_matches('\'').to_owned();
        Some(Self { text: unquoted(text), kind: (!rest.is_empty()).then(|| unquoted(rest)) })
    }

    /// The same as it is declared, such as `60s`. RabbitMQ 4 says it in milliseconds.
    fn of_age(self) -> Self {
        match self.text.parse::<u64>() {
            Ok(milliseconds) => Self { text: format!("{}s", milliseconds / 1000), kind: Some("longstr".to_owned()) },
            Err(_) => self,
        }
    }

    /// The value to declare, if it is of a type that queues and exchanges are declared with. The broker leaves the
    /// type out where it is that of the value which was `declared`.
    pub(super) fn value(&self, declared: Option<&AMQPValue>) -> Option<AMQPValue> {
        let number = |text: &str| text.parse().ok().map(AMQPValue::LongLongInt);
        match (self.kind.as_deref(), declared) {
            (Some("longstr"), _) => Some(text(&self.text)),
            (Some("bool"), _) | (None, None | Some(AMQPValue::Boolean(_))) => {
                self.text.parse().ok().map(AMQPValue::Boolean)
            }
            (None, Some(AMQPValue::LongString(_))) => Some(text(&self.text)),
            (Some(_), _) | (None, Some(_)) => number(&self.text),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sentence(words: &str) -> String {
        let complaint = format!("PRECONDITION_FAILED - inequivalent arg {words}");
        Difference::read(&complaint).expect("a complaint of the broker").sentence()
    }

    #[test]
    fn the_brokers_complaints_become_sentences() {
        assert_eq!(
            sentence(
                "'x-expires' for queue 'q' in vhost '/': received the value '2000' of type 'signedint' \
                 but current is the value '1000' of type 'long'"
            ),
            "`x-expires` is 1000, not 2000 as declared here"
        );
        assert_eq!(
            sentence(
                "'x-max-length' for queue 'q' in vhost '/': received none but current is the value '10' of type 'long'"
            ),
            "`x-max-length` is 10, but not declared here"
        );
        assert_eq!(
            sentence(
                "'x-overflow' for queue 'q' in vhost '/': received the value 'a' of type 'longstr' but current is none"
            ),
            "`x-overflow` is not set, but declared here as a"
        );
        assert_eq!(
            sentence("'x-max-length' for queue 'q' in vhost '/': received '20' but current is '10'"),
            "`x-max-length` is 10, not 20 as declared here"
        );
        assert_eq!(
            sentence("'durable' for queue 'q' in vhost '/': received 'true' but current is 'false'"),
            "`durable` is false, not true as declared here"
        );
    }

    #[test]
    fn an_age_is_told_as_it_is_declared() {
        for [declared, current] in [["'7200000'", "'3600000'"], ["'7200s'", "'3600s'"]] {
            let words = format!("'x-max-age' for queue 'q' in vhost '/': received {declared} but current is {current}");
            assert_eq!(sentence(&words), "`x-max-age` is 3600s, not 7200s as declared here");
        }
        let words = "inequivalent arg 'x-max-age' for queue 'q' in vhost '/': received none but current is '60000'";
        let current = Difference::read(words).and_then(|difference| difference.current).expect("it has a value");
        assert_eq!(current.value(None), Some(text("60s")));
    }

    #[test]
    fn what_the_broker_has_can_be_declared() {
        let value =
            |words, declared: Option<AMQPValue>| Value::read(words).and_then(|value| value.value(declared.as_ref()));
        let number = AMQPValue::LongLongInt;
        assert_eq!(value("the value '10' of type 'signedint'", None), Some(number(10)));
        assert_eq!(value("the value '10' of type 'longstr'", Some(number(20))), Some(text("10")));
        assert_eq!(value("'10'", Some(number(20))), Some(number(10)));
        assert_eq!(value("'10'", Some(text("20"))), Some(text("10")));
        assert_eq!(value("'false'", Some(AMQPValue::Boolean(true))), Some(AMQPValue::Boolean(false)));
        assert_eq!(value("'true'", None), Some(AMQPValue::Boolean(true)));
        assert_eq!(value("none", Some(number(20))), None);
        assert_eq!(value("the value '[]' of type 'array'", None), None);
    }
}
