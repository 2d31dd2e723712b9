//! How a call fails whose method has an error type of its own.

use std::fmt;
use std::time::Duration;

use super::{Code, Error};

/// How a call of a method with an error type of its own fails: by that error, or in another way.
///
/// A method declared `-> Result<T, E>` fails with `CallError<E>`; one without an error of its own, or with
/// [`Fault`](crate::Fault) as its error, fails with [`Error`]. `?` turns an [`Error`] into a `CallError<E>`. It reads as a
/// sentence, and is a [`std::error::Error`], if `E` has `Display`.
///
/// ```
/// use hopline::{CallError, Client};
///
/// async fn withdraw(client: &Client) -> String {
///     match client.call::<u64>("account", "withdraw", (150,)).fails_with::<String>().await {
///         Ok(left) => format!("{left} cents are left"),
///         Err(CallError::Service(refusal)) => format!("the account says no: {refusal}"),
///         Err(CallError::Failed(error)) if error.may_have_run() => format!("look at the account first: {error}"),
///         Err(CallError::Failed(error)) => format!("nothing has happened: {error}"),
///     }
/// }
/// ```
#[derive(thiserror::Error)]
pub enum CallError<E> {
    /// The method ran and returned its own error.
    #[error("the service returned its own error: {0}")]
    Service(E),
    /// The call failed in another way, which is the same for all methods.
    #[error("{0}")]
    Failed(Error),
}

impl<E> CallError<E> {
    /// As [`Error::code`]; `UNKNOWN` for the method's own error, as on the wire.
    #[must_use]
    pub fn code(&self) -> Code {
        self.failed().map_or(Code::Unknown, Error::code)
    }

    /// As [`Error::may_have_run`]; `true` for the method's own error, since the method returned it.
    #[must_use]
    pub fn may_have_run(&self) -> bool {
        self.failed().is_none_or(Error::may_have_run)
    }

    /// As [`Error::is_transient`]; `false` for the method's own error, which is an answer.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        self.failed().is_some_and(Error::is_transient)
    }

    /// As [`Error::retry_after`]; `None` for the method's own error.
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        self.failed().and_then(Error::retry_after)
    }

    fn failed(&self) -> Option<&Error> {
        match self {
            Self::Service(_) => None,
            Self::Failed(error) => Some(error),
        }
    }
}

impl<E> From<Error> for CallError<E> {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

/// As `main` prints it: the method's own error with its `Debug`, or `Variant: sentence`.
impl<E: fmt::Debug> fmt::Debug for CallError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Service(error) => f.debug_tuple("Service").field(error).finish(),
            Self::Failed(error) => error.fmt(f),
        }
    }
}
