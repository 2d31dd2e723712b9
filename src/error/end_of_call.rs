//! How a call ended, as metrics and spans tell it.

use super::{Code, Error};

/// How a call ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EndOfCall {
    /// With this status of a reply, `OK` among them.
    Coded(Code),
    /// With the method's own error.
    ServiceError,
    NoService,
    Overloaded,
    Unreachable,
    Timeout,
    Blocked,
    Disconnected,
    TooLarge,
    CircuitOpen,
    NoSubscriber,
}

#[cfg(feature = "metrics")]
impl EndOfCall {
    /// The ends that are no code, in the order of their places.
    const NAMED: [Self; 10] = [
        Self::ServiceError,
        Self::NoService,
        Self::Overloaded,
        Self::Unreachable,
        Self::Timeout,
        Self::Blocked,
        Self::Disconnected,
        Self::TooLarge,
        Self::CircuitOpen,
        Self::NoSubscriber,
    ];
    pub(crate) const COUNT: usize = Code::ALL.len() + Self::NAMED.len();

    pub(crate) fn all() -> impl Iterator<Item = Self> {
        Code::ALL.iter().map(|code| Self::Coded(*code)).chain(Self::NAMED)
    }

    /// Its place among all of them.
    pub(crate) fn place(self) -> usize {
        let named = match self {
            Self::Coded(code) => return code as usize,
            Self::ServiceError => 0,
            Self::NoService => 1,
            Self::Overloaded => 2,
            Self::Unreachable => 3,
            Self::Timeout => 4,
            Self::Blocked => 5,
            Self::Disconnected => 6,
            Self::TooLarge => 7,
            Self::CircuitOpen => 8,
            Self::NoSubscriber => 9,
        };
        Code::ALL.len() + named
    }
}

impl EndOfCall {
    /// The status, with gRPC's name.
    pub(crate) fn status(self) -> &'static str {
        match self {
            Self::Coded(code) => code,
            Self::ServiceError => Code::Unknown,
            Self::NoService
            | Self::NoSubscriber
            | Self::Unreachable
            | Self::Blocked
            | Self::Disconnected
            | Self::CircuitOpen => Code::Unavailable,
            Self::Overloaded | Self::TooLarge => Code::ResourceExhausted,
            Self::Timeout => Code::DeadlineExceeded,
        }
        .name()
    }

    /// What went wrong. `None` for success.
    pub(crate) fn error_type(self) -> Option<&'static str> {
        match self {
            Self::Coded(Code::Ok) => None,
            Self::Coded(code) => Some(code.name()),
            Self::ServiceError => Some("service_error"),
            Self::NoService => Some("no_service"),
            Self::Overloaded => Some("overloaded"),
            Self::Unreachable => Some("unreachable"),
            Self::Timeout => Some("timeout"),
            Self::Blocked => Some("blocked"),
            Self::Disconnected => Some("disconnected"),
            Self::TooLarge => Some("too_large"),
            Self::CircuitOpen => Some("circuit_open"),
            Self::NoSubscriber => Some("no_subscriber"),
        }
    }
}

impl From<&Result<(), Error>> for EndOfCall {
    fn from(outcome: &Result<(), Error>) -> Self {
        outcome.as_ref().map_or_else(Self::from, |()| Self::Coded(Code::Ok))
    }
}

impl From<&Error> for EndOfCall {
    fn from(error: &Error) -> Self {
        match error {
            Error::NoService { .. } => Self::NoService,
            Error::Overloaded { .. } => Self::Overloaded,
            Error::Unreachable { .. } => Self::Unreachable,
            Error::Timeout { .. } => Self::Timeout,
            Error::Blocked { .. } => Self::Blocked,
            Error::Disconnected { .. } => Self::Disconnected,
            Error::TooLarge { .. } => Self::TooLarge,
            Error::CircuitOpen { .. } => Self::CircuitOpen,
            Error::NoSubscriber { .. } => Self::NoSubscriber,
            other => Self::Coded(other.code()),
        }
    }
}

#[cfg(all(test, feature = "metrics"))]
mod tests {
    use super::*;

    #[test]
    fn each_end_of_a_call_has_a_place_and_labels_of_its_own() {
        let all: Vec<_> = EndOfCall::all().collect();
        assert_eq!(all.len(), EndOfCall::COUNT);
        assert!(all.iter().enumerate().all(|(place, end)| end.place() == place), "{all:?}");
        let mut labels: Vec<_> = all.iter().map(|end| (end.status(), end.error_type())).collect();
        labels.sort_unstable();
        labels.dedup();
        assert_eq!(labels.len(), EndOfCall::COUNT);
        let refused = Error::Overloaded { what: "the queue of `demo.v1` is full".to_owned() };
        let told = EndOfCall::from(&refused);
        assert_eq!((told.status(), told.error_type()), ("RESOURCE_EXHAUSTED", Some("overloaded")));
        assert_eq!(EndOfCall::Coded(Code::Ok).error_type(), None);
    }
}
