//! What a stand-in answers: JSON lines, read and checked before it serves.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use hopline::{Code, Fault, ServiceId};
use serde::{Deserialize, Deserializer};
use serde_json::Value;

/// The name of all methods that have no lines of their own.
const OTHERS: &str = "*";

/// What each method answers, by its name.
pub(super) struct Script(BTreeMap<String, Answers>);

/// The answers of a method: the first to the first call, and the last to all later ones.
#[derive(Default)]
struct Answers {
    oneway: bool,
    answers: Vec<Answer>,
    asked: AtomicUsize,
}

#[derive(Debug, PartialEq)]
pub(super) struct Answer {
    pub(super) outcome: Outcome,
    pub(super) delay: Duration,
}

#[derive(Debug, PartialEq)]
pub(super) enum Outcome {
    Reply(Value),
    OwnError(Value),
    Fault(Fault),
    /// The reply is the array of arguments.
    Arguments,
}

/// A line, as it is written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    method: String,
    #[serde(default, deserialize_with = "given")]
    reply: Option<Value>,
    #[serde(default, deserialize_with = "given")]
    error: Option<Value>,
    fault: Option<String>,
    message: Option<String>,
    #[serde(default)]
    delay_ms: u64,
    #[serde(default)]
    oneway: bool,
}

/// A null that is written is a value, too.
fn given<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Value>, D::Error> {
    Value::deserialize(deserializer).map(Some)
}

impl Script {
    /// The same answer to all calls of all methods.
    pub(super) fn of_all(outcome: Outcome) -> Self {
        let answers = vec![Answer { outcome, delay: Duration::ZERO }];
        Self(BTreeMap::from([(OTHERS.to_owned(), Answers { answers, ..Answers::default() })]))
    }

    /// Reads a script.
    ///
    /// # Errors
    /// The number of the first line that is wrong, and what is wrong with it.
    pub(super) fn read(text: &str) -> Result<Self, String> {
        let mut methods = BTreeMap::<String, Answers>::new();
        for (line, number) in text.lines().zip(1..).filter(|(line, _)| !line.trim().is_empty()) {
            let (line, answer) = read(line).map_err(|wrong| format!("line {number}: {wrong}"))?;
            let answers = methods.entry(line.method).or_default();
            answers.oneway |= line.oneway;
            answers.answers.push(answer);
        }
        if methods.is_empty() {
            return Err("line 1: there is none: write {\"method\": \"add\", \"reply\": 5}".to_owned());
        }
        Ok(Self(methods))
    }

    /// The methods, and whether they take oneway calls. `None` stands for all others.
    pub(super) fn methods(&self) -> impl Iterator<Item = (Option<&str>, bool)> {
        self.0.iter().map(|(name, answers)| ((name != OTHERS).then_some(name.as_str()), answers.oneway))
    }

    /// The answer to the next call of a method.
    pub(super) fn answer(&self, method: &str) -> Option<&Answer> {
        let answers = self.0.get(method).or_else(|| self.0.get(OTHERS))?;
        let number = answers.asked.fetch_add(1, Ordering::Relaxed);
        answers.answers.get(number).or(answers.answers.last())
    }
}

fn read(text: &str) -> Result<(Line, Answer), String> {
    // What is read is one line, so that its number would be told twice.
    let line =
        serde_json::from_str::<Line>(text).map_err(|error| error.to_string().replace("line 1 column", "column"))?;
    if line.method == OTHERS && line.oneway {
        return Err("`oneway` needs the name of a method, and not *".to_owned());
    }
    if line.method != OTHERS {
        ServiceId::with_method(&format!("a.{}", line.method)).map_err(|error| error.to_string())?;
    }
    if line.message.is_some() && line.fault.is_none() {
        return Err("a `message` goes with a `fault`".to_owned());
    }
    let outcome = match (&line.reply, &line.error, &line.fault) {
        (Some(reply), None, None) => Outcome::Reply(reply.clone()),
        (None, Some(error), None) => Outcome::OwnError(error.clone()),
        (None, None, Some(name)) => {
            let mut codes = Code::ALL.iter().filter(|code| **code != Code::Ok);
            let code = codes.clone().find(|code| code.name() == name).ok_or_else(|| {
                let names: Vec<_> = codes.by_ref().map(|code| code.name()).collect();
                format!("there is no fault `{name}`: write one of {}", names.join(", "))
            })?;
            Outcome::Fault(Fault::new(*code, line.message.clone().unwrap_or_default()))
        }
        _ => return Err("write one of `reply`, `error` and `fault`".to_owned()),
    };
    let answer = Answer { outcome, delay: Duration::from_millis(line.delay_ms) };
    Ok((line, answer))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_method_answers_its_lines_one_after_the_other_and_the_last_for_ever() {
        let script = r#"{"method": "add", "reply": null, "delay_ms": 20}

            {"method": "add", "error": {"a": 1}}
            {"method": "*", "fault": "NOT_FOUND", "message": "no"}
            {"method": "note", "reply": 1, "oneway": true}"#;
        let script = Script::read(script).expect("it can be read");
        let outcome = |method| script.answer(method).map(|answer| (&answer.outcome, answer.delay.as_millis()));
        assert_eq!(outcome("add"), Some((&Outcome::Reply(Value::Null), 20)));
        for _ in 0..2 {
            assert_eq!(outcome("add"), Some((&Outcome::OwnError(json!({ "a": 1 })), 0)));
        }
        assert_eq!(outcome("other"), Some((&Outcome::Fault(Fault::new(Code::NotFound, "no")), 0)));
        let methods: Vec<_> = script.methods().collect();
        assert_eq!(methods, [(None, false), (Some("add"), false), (Some("note"), true)]);
    }

    #[test]
    fn what_is_wrong_is_told_with_the_number_of_its_line() {
        let wrong = |line: &str| Script::read(&format!("{{\"method\": \"a\", \"reply\": 1}}\n{line}")).err();
        for (line, said) in [
            (r#"{"method": "add""#, "line 2: EOF while parsing an object at column 16"),
            (r#"{"reply": 1}"#, "line 2: missing field `method`"),
            (r#"{"method": "a b", "reply": 1}"#, "line 2: the method `a b` has a ' ' in it"),
            (r#"{"method": "add"}"#, "line 2: write one of `reply`, `error` and `fault`"),
            (r#"{"method": "add", "reply": 1, "fault": "INTERNAL"}"#, "line 2: write one of"),
            (r#"{"method": "add", "reply": 1, "message": "x"}"#, "line 2: a `message` goes with a `fault`"),
            (r#"{"method": "add", "fault": "NO"}"#, "line 2: there is no fault `NO`: write one of CANCELLED, UNKNOWN"),
            (r#"{"method": "add", "fault": "OK"}"#, "line 2: there is no fault `OK`"),
            (r#"{"method": "add", "answer": 1}"#, "line 2: unknown field `answer`, expected one of `method`"),
            (r#"{"method": "add", "reply": 1, "delay_ms": -1}"#, "line 2: invalid value: integer `-1`"),
            (r#"{"method": "*", "reply": 1, "oneway": true}"#, "line 2: `oneway` needs the name of a method"),
        ] {
            let told = wrong(line).unwrap_or_default();
            assert!(told.starts_with(said), "{line}: {told}");
        }
        assert!(Script::read("\n").is_err());
    }
}
