//! Why a command has failed, and what it exits with.

use std::fmt;
use std::process::ExitCode;

use hopline::Error;

use crate::address::said;
use crate::printed::one_line;

/// Why a command has failed, in one line, and its exit code: 1 if something has failed, 2 for wrong usage, and 64 and the
/// number of its code for a fault.
pub(crate) struct Failed {
    said: String,
    code: u8,
}

impl Failed {
    /// Whether the command was used wrongly, so that another try is of no use.
    pub(crate) fn is_usage(&self) -> bool {
        self.code == 2
    }

    /// Something has failed.
    pub(crate) fn run(said: String) -> Self {
        Self { said, code: 1 }
    }
}

impl From<Error> for Failed {
    fn from(error: Error) -> Self {
        let code = match &error {
            // A name or an address that cannot be used is wrong usage.
            Error::Invalid(_) => 2,
            Error::Fault(fault) => 64 + fault.code as u8,
            _ => 1,
        };
        Self { said: said(&error), code }
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

/// Tells on stderr what has failed, in one line.
pub(crate) fn tell(said: &str) {
    eprintln!("hopline: {}", one_line(said));
}

/// The exit code of a command. Tells on stderr why it has failed.
pub(crate) fn ended(outcome: Result<(), Failed>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failed { said, code }) => {
            tell(&said);
            ExitCode::from(code)
        }
    }
}
