//! What can go wrong with a call, as few variants as a caller can act on.

use std::convert::Infallible;
use std::fmt;
use std::time::Duration;

use crate::codec::CodecError;

/// Why a call, or the connection under it, failed.
///
/// `E` is the method's own error type: a method declared `-> Result<T, E>` fails with `Error<E>`, and what it
/// returned is in [`Error::Service`]. Everything else has no error of its own: `Error` alone. It reads as a sentence if `E`
/// does, that is if `E` has `Display`; without it `Error<E>` is no [`std::error::Error`] either.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error<E = Infallible>
where
    E: fmt::Debug,
{
    /// The method ran and returned its own error.
    #[error("the service returned its own error: {0}")]
    Service(E),
    /// The server, or the network's other end, refused or broke off the call.
    #[error("{0}")]
    Fault(Fault),
    /// No queue takes calls for this service: no server runs, or the last one left longer ago than the
    /// [grace period](crate::Service::grace), 60 s unless set, within which calls wait for one to come back. With
    /// [`Absent::Fail`](crate::Absent::Fail): no instance is there, however short a time ago it left. It was not run.
    #[error("{}", nobody(service, method.as_deref()))]
    NoService {
        /// The service, as `name.vMAJOR`, and the instance after `@` when the call was addressed to one.
        service: String,
        /// The method of a oneway call for any instance: of a service that is there it may be no
        /// [oneway method](crate::Method::oneway), and then has no queue.
        method: Option<String>,
    },
    /// The service's queue is full and refused the call, or too many calls of this client are in flight
    /// ([`ClientBuilder::max_in_flight`](crate::ClientBuilder::max_in_flight)); it was not run.
    #[error("{what}: try again later, or start more instances")]
    Overloaded {
        /// What is full.
        what: String,
    },
    /// The service's queue could not take the call, though it has no limit: it is out of reach, as when its node in a cluster is
    /// away, or when its first server is just starting; or a policy of the broker limits it. The call was not run. A
    /// [quorum queue](crate::Service::quorum) outlives the loss of a node.
    #[error(
        "`{method}` has not run: its queue `{queue}` cannot be reached: is its node away? Try again when it is back; with `Service::quorum`, other nodes have it too"
    )]
    Unreachable {
        /// The method, as `name.vMAJOR.method`.
        method: String,
        /// The queue's name on the broker.
        queue: String,
    },
    /// The broker takes nothing, being short of memory or disk, and did not within
    /// [`ClientBuilder::blocked_wait`](crate::ClientBuilder::blocked_wait); of dead letters that are replayed, within 5 s.
    #[error("{}the broker has taken nothing for {after:?}, being blocked ({reason})", ran(.method.as_deref(), *.may_have_run))]
    Blocked {
        /// The method, as `name.vMAJOR.method`, or the key of an event; none for what is neither.
        method: Option<String>,
        /// The broker's words, such as `low on memory`.
        reason: String,
        /// How long it was waited for.
        after: Duration,
        /// Whether the call had been handed over before: then it may run once the broker takes messages again.
        may_have_run: bool,
    },
    /// The deadline passed. A request that still waits is not run, unless its cancel is lost with a connection; one that runs
    /// is told to stop. A oneway call may run nevertheless.
    #[error("`{method}` gave no reply within {after:?}: {why}")]
    Timeout {
        /// The method, as `name.vMAJOR.method`, or the key of an event.
        method: String,
        /// How long the call was allowed to take.
        after: Duration,
        /// What is known of it.
        why: Unanswered,
    },
    /// A request, an event or metadata over the size cap, which nobody has got; or a reply over it: then the method has run,
    /// and its result is lost.
    #[error("the {what} takes {size} bytes, over the cap of {limit}: {}", if *.what == "metadata" { "shorten it, since this cap is fixed" } else { "send less, or raise `max_message_size` on both sides" })]
    TooLarge {
        /// `request`, `reply`, `event` or `metadata` (60 KiB, whatever `max_message_size` is).
        what: &'static str,
        /// Size of the message, in bytes.
        size: usize,
        /// The cap it broke, in bytes.
        limit: usize,
    },
    /// The connection to the broker was lost, or there was none.
    #[error("{}there is no connection to the broker ({reason})", ran(.method.as_deref(), *.may_have_run))]
    Disconnected {
        /// The method, as `name.vMAJOR.method`, or the key of an event; none for what is neither.
        method: Option<String>,
        /// Whether the call may have reached a server.
        may_have_run: bool,
        /// What ended the connection, or why there is none.
        reason: String,
    },
    /// No connection could be made.
    #[error("cannot connect to {url}: {reason}")]
    Connect {
        /// The address, without user, password and options.
        url: String,
        /// Why not.
        reason: String,
    },
    /// A queue or exchange exists with other arguments than this program declares.
    #[error("{name} exists with other arguments: {}; delete it, or use another namespace", .differences.join(", "))]
    Mismatch {
        /// The queue or exchange.
        name: String,
        /// A sentence for each argument that differs.
        differences: Vec<String>,
    },
    /// The broker refused an operation, such as one that the user's permissions do not cover, or did not answer.
    #[error("the broker did not {operation}: {reason}")]
    Broker {
        /// What was tried.
        operation: String,
        /// The broker's words, or that there were none.
        reason: String,
    },
    /// Arguments that cannot be written, or a result that cannot be read.
    #[error("{0}")]
    Codec(#[from] CodecError),
    /// A name, address or setting that cannot be used.
    #[error("{0}")]
    Invalid(String),
}

impl Error {
    /// The same error where a method's own error type is expected.
    #[must_use]
    pub fn widen<E: fmt::Debug>(self) -> Error<E> {
        match self {
            Error::Service(never) => match never {},
            Error::Fault(fault) => Error::Fault(fault),
            Error::NoService { service, method } => Error::NoService { service, method },
            Error::Overloaded { what } => Error::Overloaded { what },
            Error::Unreachable { method, queue } => Error::Unreachable { method, queue },
            Error::Blocked { method, reason, after, may_have_run } => {
                Error::Blocked { method, reason, after, may_have_run }
            }
            Error::Timeout { method, after, why } => Error::Timeout { method, after, why },
            Error::TooLarge { what, size, limit } => Error::TooLarge { what, size, limit },
            Error::Disconnected { method, may_have_run, reason } => {
                Error::Disconnected { method, may_have_run, reason }
            }
            Error::Connect { url, reason } => Error::Connect { url, reason },
            Error::Mismatch { name, differences } => Error::Mismatch { name, differences },
            Error::Broker { operation, reason } => Error::Broker { operation, reason },
            Error::Codec(error) => Error::Codec(error),
            Error::Invalid(why) => Error::Invalid(why),
        }
    }
}

fn nobody(service: &str, oneway: Option<&str>) -> String {
    match oneway {
        None => format!("nobody serves `{service}`: is a server running, and on the same namespace?"),
        Some(method) => format!(
            "`{service}` takes no oneway calls of `{method}`: has a server run, on the same namespace, in which this is a \
             oneway method?"
        ),
    }
}

/// The beginning of an error about a call, if it is one.
fn ran(method: Option<&str>, may_have_run: bool) -> String {
    let ran = if may_have_run { "may have run" } else { "has not run" };
    method.map(|method| format!("`{method}` {ran}: ")).unwrap_or_default()
}

/// What is known of a call that got no reply in its time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Unanswered {
    /// It was not sent: no time was left for it when it was made, or, with [`Absent::Fail`](crate::Absent::Fail), the broker
    /// did not say in time whether an instance is there.
    Unsent,
    /// It was not sent: more was to be sent in its time than the connection to the broker carries, or its queue did not confirm
    /// what it had got before.
    Congested,
    /// No instance of its service was there whenever the broker was asked, as it is after a second without a sign of life.
    /// It waited for one to come back, as calls do for the [grace period](crate::Service::grace) of 60 s unless set. It
    /// has run only if an instance took it and died within that first second, or came between two questions.
    Unserved,
    /// A handler made it, of a server that drains and served it itself, and no other instance was there when the broker was
    /// asked: the drain would have waited for it. It runs if an instance comes in the rest of its time.
    Draining,
    /// It may have run, or run still, or wait behind others.
    Unknown,
}

impl Unanswered {
    /// Whether the call may have run: certain it is only of one that was not sent.
    #[must_use]
    pub fn may_have_run(self) -> bool {
        !matches!(self, Self::Unsent | Self::Congested)
    }
}

impl fmt::Display for Unanswered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unsent => "it was not sent, since no time was left",
            Self::Congested => {
                "it was not sent: the connection to the broker, or the queue, takes less than there is to send; send less, \
                 or allow more time with `.timeout()`"
            }
            Self::Unserved => {
                "nobody served it whenever the broker was asked: start an instance, for which calls wait as long as \
                 `Service::grace` says (60 s unless set); it has run only if an instance took it and died at once, or came in between"
            }
            Self::Draining => {
                "the server that made it drains, and no other instance of the service is there: it runs if one comes in \
                 the rest of its time"
            }
            Self::Unknown => "it may have run; allow more time with `.timeout()`",
        })
    }
}

/// A refusal or breakdown reported by the server: a [`Code`] to branch on and a sentence for people.
///
/// A handler may return one in the place of an error type of its own. Its code is any but [`Code::Ok`], which reaches the
/// caller as `INTERNAL`: what fails is never a success.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// The kind of fault, with gRPC's numbers and names.
    pub code: Code,
    /// What was wrong and what to do.
    pub message: String,
    /// When a new attempt makes sense, if the server said.
    pub retry_after: Option<Duration>,
}

impl Fault {
    /// A fault without a retry hint.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), retry_after: None }
    }

    /// What it says, or at least its code.
    pub(crate) fn reason(&self) -> &str {
        if self.message.is_empty() { self.code.name() } else { &self.message }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &*self.message {
            "" => self.code.fmt(f),
            message => write!(f, "{}: {message}", self.code),
        }
    }
}

macro_rules! codes {
    ($($(#[$doc:meta])* $variant:ident = $number:literal $name:literal,)*) => {
        /// Status of a reply, with gRPC's numbers and names.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum Code { $($(#[$doc])* $variant = $number,)* }

        impl Code {
            /// Every code, in the order of their numbers.
            pub const ALL: &'static [Code] = &[$(Code::$variant),*];

            /// gRPC's name, such as `INVALID_ARGUMENT`.
            pub fn name(self) -> &'static str {
                match self { $(Code::$variant => $name),* }
            }

            pub(crate) fn from_number(number: u8) -> Option<Self> {
                match number { $($number => Some(Code::$variant),)* _ => None }
            }
        }
    };
}

codes! {
    /// The call succeeded.
    Ok = 0 "OK",
    /// The caller gave up.
    Cancelled = 1 "CANCELLED",
    /// The method returned its own error, which travels as payload.
    Unknown = 2 "UNKNOWN",
    /// Malformed arguments, or a malformed message.
    InvalidArgument = 3 "INVALID_ARGUMENT",
    /// The deadline passed before the method had an answer.
    DeadlineExceeded = 4 "DEADLINE_EXCEEDED",
    /// Something the call names does not exist.
    NotFound = 5 "NOT_FOUND",
    /// Something the call creates exists.
    AlreadyExists = 6 "ALREADY_EXISTS",
    /// The caller may not do this.
    PermissionDenied = 7 "PERMISSION_DENIED",
    /// A limit, quota or size cap.
    ResourceExhausted = 8 "RESOURCE_EXHAUSTED",
    /// The system is not in a state for this call.
    FailedPrecondition = 9 "FAILED_PRECONDITION",
    /// The call broke off in the middle and may have run.
    Aborted = 10 "ABORTED",
    /// Past the valid range.
    OutOfRange = 11 "OUT_OF_RANGE",
    /// No such method, or a part of the wire that this peer does not speak.
    Unimplemented = 12 "UNIMPLEMENTED",
    /// The handler panicked, or its result could not be written.
    Internal = 13 "INTERNAL",
    /// The instance is leaving or not ready.
    Unavailable = 14 "UNAVAILABLE",
    /// Data is lost for good.
    DataLoss = 15 "DATA_LOSS",
    /// The caller is not known.
    Unauthenticated = 16 "UNAUTHENTICATED",
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_comes_back_from_its_number() {
        for &code in Code::ALL {
            assert_eq!(Code::from_number(code as u8), Some(code));
        }
        assert_eq!(Code::from_number(17), None);
    }

    #[test]
    fn errors_read_as_sentences_that_name_the_culprit() {
        let error: Error = Error::NoService { service: "demo.v1".into(), method: None };
        assert_eq!(error.to_string(), "nobody serves `demo.v1`: is a server running, and on the same namespace?");
        let disconnected = |method: Option<&str>, may_have_run| {
            let method = method.map(Into::into);
            let error: Error = Error::Disconnected { method, may_have_run, reason: "reset".into() };
            error.to_string()
        };
        assert_eq!(disconnected(None, false), "there is no connection to the broker (reset)");
        let ran = "`demo.v1.add` may have run: there is no connection to the broker (reset)";
        assert_eq!(disconnected(Some("demo.v1.add"), true), ran);
        let not_run = "`demo.v1.add` has not run: there is no connection to the broker (reset)";
        assert_eq!(disconnected(Some("demo.v1.add"), false), not_run);
        let timeout = |why| {
            let error: Error = Error::Timeout { method: "demo.v1.add".into(), after: Duration::from_secs(2), why };
            error.to_string()
        };
        assert!(
            timeout(Unanswered::Unknown).ends_with("within 2s: it may have run; allow more time with `.timeout()`")
        );
        assert!(timeout(Unanswered::Unserved).contains("nobody served it whenever the broker was asked"));
        assert!(timeout(Unanswered::Unsent).ends_with("it was not sent, since no time was left"));
        assert!(
            timeout(Unanswered::Congested)
                .contains("it was not sent: the connection to the broker, or the queue, takes less")
        );
        assert!(!Unanswered::Congested.may_have_run() && Unanswered::Unserved.may_have_run());
        let fault = Fault::new(Code::Unimplemented, "no method `x`");
        assert_eq!(Error::<String>::Fault(fault).to_string(), "UNIMPLEMENTED: no method `x`");
        assert_eq!(Fault::new(Code::NotFound, "").to_string(), "NOT_FOUND");
        let error = Error::Service(std::net::IpAddr::from([127, 0, 0, 1]));
        assert_eq!(error.to_string(), "the service returned its own error: 127.0.0.1", "not as it is debugged");
        let too_large = |what| Error::<Infallible>::TooLarge { what, size: 2, limit: 1 }.to_string();
        assert!(
            too_large("request").ends_with("or raise `max_message_size` on both sides"),
            "{}",
            too_large("request")
        );
        assert_eq!(
            too_large("metadata"),
            "the metadata takes 2 bytes, over the cap of 1: shorten it, since this cap is fixed"
        );
    }
}
