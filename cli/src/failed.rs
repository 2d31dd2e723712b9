//! Why a command has failed, and what it exits with.

use std::fmt::{self, Display};
use std::process::ExitCode;

use hopline::{Code, Error};
use serde_json::{Map, Value, json};

use crate::address::said;
use crate::printed::{self, one_line};

/// Why a command has failed, in one line, and its exit code: 1 if something has failed, 2 for wrong usage, and 64 and the
/// number of its code for a fault.
#[derive(Debug)]
pub(crate) struct Failed {
    said: String,
    exit: u8,
    /// The code of the library's error, if it was one.
    code: Option<Code>,
    /// The method's own error.
    service_error: Option<Value>,
}

impl Failed {
    /// Whether the command was used wrongly, so that another try is of no use.
    pub(crate) fn is_usage(&self) -> bool {
        self.exit == 2
    }

    /// Something has failed.
    pub(crate) fn run(said: String) -> Self {
        Self { said, exit: 1, code: None, service_error: None }
    }

    /// The command was used wrongly.
    pub(crate) fn usage(said: String) -> Self {
        Self { exit: 2, ..Self::run(said) }
    }

    /// A file, a process or the like has failed.
    pub(crate) fn at(what: impl Display, error: impl Display) -> Self {
        Self::run(format!("{what}: {error}"))
    }

    /// The method has returned its own error.
    pub(crate) fn service_error(error: Value) -> Self {
        let said = format!("the service returned its own error: {error}");
        Self { service_error: Some(error), ..Self::run(said) }
    }

    /// As one JSON object.
    fn as_json(&self) -> String {
        let mut object = Map::from_iter([("error".to_owned(), json!(self.said))]);
        if let Some(code) = self.code {
            object.insert("code".to_owned(), json!(code.name()));
        }
        if let Some(error) = &self.service_error {
            object.insert("service_error".to_owned(), error.clone());
        }
        printed::json(&object)
    }
}

impl From<Error> for Failed {
    fn from(error: Error) -> Self {
        let exit = match &error {
            // A name or an address that cannot be used is wrong usage.
            Error::Invalid(_) => 2,
            Error::Fault(fault) => 64 + fault.code as u8,
            _ => 1,
        };
        Self { exit, code: Some(error.code()), ..Self::run(said(&error)) }
    }
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.said)
    }
}

impl From<String> for Failed {
    fn from(said: String) -> Self {
        Self::run(said)
    }
}

/// Tells something on stderr, in one line.
pub(crate) fn tell(said: &str) {
    eprintln!("hopline: {}", one_line(said));
}

/// The exit code of a command. Tells on stderr why it has failed, as a line or as an object of `json`.
pub(crate) fn ended(outcome: Result<(), Failed>, json: bool) -> ExitCode {
    let Err(failed) = outcome else { return ExitCode::SUCCESS };
    if json {
        eprintln!("{}", failed.as_json());
    } else {
        tell(&failed.said);
    }
    ExitCode::from(failed.exit)
}

#[cfg(test)]
mod tests {
    use hopline::Fault;

    use super::*;

    #[test]
    fn a_failure_is_an_object_with_what_programs_branch_on() {
        let failed = Failed::from(Error::Fault(Fault::new(Code::NotFound, "no\u{1b}[2J such")));
        assert_eq!((failed.exit, failed.is_usage()), (69, false));
        let said = r#"{"error":"NOT_FOUND: no [2J such","code":"NOT_FOUND"}"#;
        assert_eq!(serde_json::from_str::<Value>(&failed.as_json()).ok(), serde_json::from_str(said).ok());
        let failed = Failed::service_error(json!({ "left": 3 }));
        assert_eq!(failed.said, r#"the service returned its own error: {"left":3}"#);
        assert!(failed.as_json().contains(r#""service_error":{"left":3}"#), "{}", failed.as_json());
    }
}
