//! What can go wrong with a call, as few variants as a caller can act on.

mod call_error;
mod end_of_call;
mod fault;
mod unanswered;

use std::fmt;
use std::time::Duration;

pub use self::call_error::CallError;
pub(crate) use self::end_of_call::EndOfCall;
pub(crate) use self::fault::RefusedBy;
pub use self::fault::{Code, Fault};
pub use self::unanswered::Unanswered;
use crate::codec::CodecError;

/// Why a call, or the connection under it, failed.
///
/// It has no part for the error that a method itself returns: a call of a method declared `-> Result<T, E>` fails with a
/// [`CallError<E>`], which is `E` or an `Error`. `?` turns an `Error` into any `CallError<E>`.
///
/// What each variant says to a program that decides about another attempt:
///
/// | variant | [`code`](Error::code) | [`may_have_run`](Error::may_have_run) | [`is_transient`](Error::is_transient) |
/// | --- | --- | --- | --- |
/// | `Fault` | the fault's own | yes | as [`Fault::is_transient`] |
/// | `NoService` | `UNAVAILABLE` | no | yes |
/// | `NoSubscriber` | `UNAVAILABLE` | no | yes |
/// | `Overloaded` | `RESOURCE_EXHAUSTED` | no | yes |
/// | `CircuitOpen` | `UNAVAILABLE` | no | yes |
/// | `Unreachable` | `UNAVAILABLE` | no | yes |
/// | `NoQuorum` | `UNAVAILABLE` | yes | yes |
/// | `Blocked` | `UNAVAILABLE` | its field says | yes |
/// | `Timeout` | `DEADLINE_EXCEEDED` | as [`Unanswered::may_have_run`] | yes |
/// | `TooLarge` | `RESOURCE_EXHAUSTED` | yes if the reply was too large | no |
/// | `Disconnected` | `UNAVAILABLE` | its field says | yes |
/// | `Connect` | `UNAVAILABLE` | no | yes |
/// | `Mismatch` | `FAILED_PRECONDITION` | no | no |
/// | `Broker` | `INTERNAL` | its field says | no |
/// | `Codec` | `INVALID_ARGUMENT` | no | no |
/// | `UnreadableReply` | `INTERNAL` | yes | no |
/// | `Invalid` | `INVALID_ARGUMENT` | no | no |
///
/// [`retry_after`](Error::retry_after) is there only in a `Fault` whose server set it, and in `CircuitOpen`.
///
/// Both `Display` and `Debug` are sentences for people; `Debug`, which `main` prints, begins with the variant's name.
/// A middleware that ends a call itself says so by an `Error::Fault`, with the code that it likes.
///
/// ```
/// use hopline::{Client, Error};
///
/// async fn sum(client: &Client) -> Result<i64, Error> {
///     let first = client.call("calculator.v1", "add", (2, 3)).await;
///     match first {
///         // Nothing has run: another attempt does no harm.
///         Err(error) if error.is_transient() && !error.may_have_run() => {
///             client.call("calculator.v1", "add", (2, 3)).await
///         }
///         first => first,
///     }
/// }
/// ```
#[derive(Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The server refused the call, or broke it off. If the instance that runs a call falls silent, the client makes a fault
    /// of the code `ABORTED` itself.
    #[error("{0}")]
    Fault(Fault),
    /// Nobody serves this service. No server has ever run, or the last one left longer ago than the
    /// [grace period](crate::Service::grace) (default: 60 s), in which calls wait for a server to come back. With
    /// [`Absent::Fail`](crate::Absent::Fail) there is no such wait. The call has not run.
    #[error("{}", nobody(service, method.as_deref()))]
    #[non_exhaustive]
    NoService {
        /// The service, as `name.vMAJOR`, and the instance after `@` when the call was addressed to one.
        service: String,
        /// The method, if the call is a oneway call for any instance. Then there is another possible cause: the service is
        /// there, but the method is not a [oneway method](crate::Method::oneway).
        method: Option<String>,
    },
    /// An event that is [required](crate::Publish::required) went to nobody, and is gone: no subscriber and no group has a
    /// queue for its key.
    #[error(
        "nobody gets the event `{key}`: start a subscriber or a group whose pattern matches it, on the same namespace, and publish it again; `hopline groups ls` lists the groups"
    )]
    #[non_exhaustive]
    NoSubscriber {
        /// The key of the event.
        key: String,
    },
    /// The service's queue is full, or this client has as many calls in flight as
    /// [`ClientBuilder::max_in_flight`](crate::ClientBuilder::max_in_flight) allows. The call has not run.
    #[error("{what}: try again later, or start more instances")]
    #[non_exhaustive]
    Overloaded {
        /// What is full.
        what: String,
    },
    /// The [breaker](crate::Breaker) of the method is open, since its calls have failed, or since a
    /// [rule](crate::BreakerRule::Open) says so. Nothing was sent.
    #[error("`{}` has not run: its breaker is open {}", at(method, instance.as_deref()), why_open(*retry_in, rule.as_deref(), set_by.as_deref()))]
    #[non_exhaustive]
    CircuitOpen {
        /// The method, as `name.vMAJOR.method`.
        method: String,
        /// The instance, if the breaker is that of calls to this one.
        instance: Option<String>,
        /// When another attempt may pass. If a rule has opened it, when to ask again.
        retry_in: Duration,
        /// The service, as `name.vMAJOR`, or the method, whose rule has opened it. `None` if calls have failed.
        rule: Option<String>,
        /// Who has set that rule: the user whom the broker has verified, or else how the client names itself.
        set_by: Option<String>,
    },
    /// The service's queue refused the call, though the service sets no limit for it. Usually the queue's node in a cluster
    /// is away: a [quorum queue](crate::Service::quorum) survives that. Other causes: the first server of the service is
    /// just starting, or a policy of the broker limits the queue. The call has not run.
    #[error(
        "`{method}` has not run: its queue `{queue}` cannot be reached: is its node away? Try again when it is back; with `Service::quorum`, other nodes have it too"
    )]
    #[non_exhaustive]
    Unreachable {
        /// The method, as `name.vMAJOR.method`.
        method: String,
        /// The queue's name on the broker.
        queue: String,
    },
    /// Too few instances have replied well to a broadcast that [requires](crate::Broadcast::require) more. It has run on those
    /// that have, and may have run on others.
    #[error("{good} of {asked} instances of `{service}` have replied well, and {needed} must: {}", .failed.join("; "))]
    #[non_exhaustive]
    NoQuorum {
        /// The service, as `name.vMAJOR`.
        service: String,
        /// How many have replied well.
        good: usize,
        /// How many had to.
        needed: usize,
        /// How many instances are known.
        asked: usize,
        /// Who else there is, each with its error, or that it has not replied.
        failed: Vec<String>,
    },
    /// The broker is short of memory or disk and takes no messages. The call waited for
    /// [`ClientBuilder::blocked_wait`](crate::ClientBuilder::blocked_wait) (default: 5 s); the replay of a dead letter waits
    /// for 5 s.
    #[error("{}the broker has taken nothing for {after:?}, being blocked by an alarm ({reason}): `rabbitmq-diagnostics alarms` names the node; free memory or disk there", ran(.method.as_deref(), *.may_have_run))]
    #[non_exhaustive]
    Blocked {
        /// The method, as `name.vMAJOR.method`, or the key of an event. `None` for anything else.
        method: Option<String>,
        /// The broker's words, such as `low on memory`.
        reason: String,
        /// How long the call waited.
        after: Duration,
        /// Whether the call was already handed to the broker. Then it may run once the broker takes messages again.
        may_have_run: bool,
    },
    /// The deadline passed. If the call still waits in a queue, it will not run, unless its cancel is lost with a connection.
    /// If it runs, its handler is told to stop. A oneway call may still run.
    #[error("`{method}` gave no reply within {after:?}: {why}")]
    #[non_exhaustive]
    Timeout {
        /// The method, as `name.vMAJOR.method`, or the key of an event.
        method: String,
        /// How long the call was allowed to take.
        after: Duration,
        /// What is known of the call.
        why: Unanswered,
    },
    /// A message is larger than the cap. A request, an event or metadata was not sent. If it is a reply, the method has run
    /// and its result is lost.
    #[error("the {what} takes {size} bytes, over the {whose} cap of {limit}: {}", smaller(whose))]
    #[non_exhaustive]
    TooLarge {
        /// `request`, `reply`, `event` or `metadata` (60 KiB, whatever `max_message_size` is).
        what: &'static str,
        /// Size of the message, in bytes.
        size: usize,
        /// The cap it broke, in bytes.
        limit: usize,
        /// Whose cap this is: `client's`, `broker's`, for a reply `server's or broker's`, and for metadata `fixed`.
        whose: &'static str,
    },
    /// The connection to the broker was lost, or there was none.
    #[error("{}there is no connection to the broker ({reason})", ran(.method.as_deref(), *.may_have_run))]
    #[non_exhaustive]
    Disconnected {
        /// The method, as `name.vMAJOR.method`, or the key of an event. `None` for anything else.
        method: Option<String>,
        /// Whether the call may have reached a server.
        may_have_run: bool,
        /// What ended the connection, or why there is none.
        reason: String,
    },
    /// No connection to the broker could be made.
    #[error("cannot connect to {url}: {reason}")]
    #[non_exhaustive]
    Connect {
        /// The address, without user, password and options.
        url: String,
        /// Why not.
        reason: String,
    },
    /// A queue or exchange exists with other arguments than this program declares.
    #[error("{name} exists with other arguments: {}; the guide's chapter on changing a contract says how to change it and lose nothing, or use another namespace", .differences.join(", "))]
    #[non_exhaustive]
    Mismatch {
        /// The queue or exchange.
        name: String,
        /// A sentence for each argument that differs.
        differences: Vec<String>,
    },
    /// The broker refused an operation, such as one for which the user has no permission, or did not answer in time (30 s,
    /// or [`DeadLettersBuilder::timeout`](crate::DeadLettersBuilder::timeout)). A call that the broker refused has not run.
    #[error("the broker did not {operation}: {reason}")]
    #[non_exhaustive]
    Broker {
        /// What was tried.
        operation: String,
        /// The broker's words, or that there were none.
        reason: String,
        /// Whether the broker may have done it, or may still do it, since it did not answer in time. `false` if it refused.
        may_have_run: bool,
    },
    /// The arguments of a call, or an event, cannot be written. Nothing was sent.
    #[error("{0}")]
    Codec(#[from] CodecError),
    /// The reply cannot be read: it does not fit the type that the caller expects. The method has run.
    #[error("{0}")]
    UnreadableReply(CodecError),
    /// A name, address or setting that cannot be used.
    #[error("{0}")]
    Invalid(String),
}

/// What a variant says: its name, its code, whether the call may have run, and whether trying again later can help.
struct Facts(&'static str, Code, bool, bool);

impl Error {
    /// The broker refused an operation, for this reason.
    pub(crate) fn refused(operation: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Broker { operation: operation.into(), reason: reason.into(), may_have_run: false }
    }

    /// The broker did not answer about an operation within this time, and may have done it.
    pub(crate) fn silent(operation: impl Into<String>, within: Duration) -> Self {
        let reason = format!("it gave no answer within {within:?}");
        Self::Broker { operation: operation.into(), reason, may_have_run: true }
    }

    /// The one table of what each variant says.
    fn facts(&self) -> Facts {
        match self {
            Self::Fault(fault) => Facts("Fault", fault.code, !fault.has_not_run, fault.is_transient()),
            Self::NoService { .. } => Facts("NoService", Code::Unavailable, false, true),
            Self::NoSubscriber { .. } => Facts("NoSubscriber", Code::Unavailable, false, true),
            Self::Overloaded { .. } => Facts("Overloaded", Code::ResourceExhausted, false, true),
            Self::CircuitOpen { .. } => Facts("CircuitOpen", Code::Unavailable, false, true),
            Self::Unreachable { .. } => Facts("Unreachable", Code::Unavailable, false, true),
            Self::NoQuorum { .. } => Facts("NoQuorum", Code::Unavailable, true, true),
            Self::Blocked { may_have_run, .. } => Facts("Blocked", Code::Unavailable, *may_have_run, true),
            Self::Timeout { why, .. } => Facts("Timeout", Code::DeadlineExceeded, why.may_have_run(), true),
            Self::TooLarge { what, .. } => Facts("TooLarge", Code::ResourceExhausted, *what == "reply", false),
            Self::Disconnected { may_have_run, .. } => Facts("Disconnected", Code::Unavailable, *may_have_run, true),
            Self::Connect { .. } => Facts("Connect", Code::Unavailable, false, true),
            Self::Mismatch { .. } => Facts("Mismatch", Code::FailedPrecondition, false, false),
            Self::Broker { may_have_run, .. } => Facts("Broker", Code::Internal, *may_have_run, false),
            Self::Codec(_) => Facts("Codec", Code::InvalidArgument, false, false),
            Self::UnreadableReply(_) => Facts("UnreadableReply", Code::Internal, true, false),
            Self::Invalid(_) => Facts("Invalid", Code::InvalidArgument, false, false),
        }
    }

    /// The kind of failure as one of gRPC's codes: for statistics, logs, and answers to others.
    #[must_use]
    pub fn code(&self) -> Code {
        self.facts().1
    }

    /// Whether the method of a call may have run, or may still run. `false` is certain; `true` means that it is possible. For
    /// a [`Fault`] it is `false` only if its code is `UNAVAILABLE` or `RESOURCE_EXHAUSTED` and the reply says that no handler
    /// ran.
    #[must_use]
    pub fn may_have_run(&self) -> bool {
        self.facts().2
    }

    /// Whether trying again later can help. That it does no harm is another question: unless the method may run twice, ask
    /// [`may_have_run`](Error::may_have_run) as well.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        self.facts().3
    }

    /// The same error for a call of which another attempt may have run: it never says that the call has not run.
    pub(crate) fn after_another_attempt(self) -> Self {
        match self {
            error if error.may_have_run() => error,
            Self::Timeout { method, after, .. } => Self::Timeout { method, after, why: Unanswered::Unknown },
            Self::Blocked { method, reason, after, .. } => Self::Blocked { method, reason, after, may_have_run: true },
            Self::Disconnected { method, reason, .. } => Self::Disconnected { method, reason, may_have_run: true },
            error => {
                let fault = Fault::new(
                    error.code(),
                    format!("another attempt of the call may have run, and this one failed: {error}"),
                );
                // Trying again helps no more than it did.
                let code =
                    if fault.is_transient() && !error.is_transient() { Code::FailedPrecondition } else { fault.code };
                Self::Fault(Fault { code, ..fault })
            }
        }
    }

    /// How long to wait before another attempt: the server asked for it, or a breaker is open for so long.
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Fault(fault) => fault.retry_after,
            Self::CircuitOpen { retry_in, .. } => Some(*retry_in),
            _ => None,
        }
    }
}

/// As `main` prints it: `Variant: sentence`.
impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {self}", self.facts().0)
    }
}

/// A method, and the instance if there is one.
fn at(method: &str, instance: Option<&str>) -> String {
    instance.map_or_else(|| method.to_owned(), |instance| format!("{method}@{instance}"))
}

fn why_open(retry_in: Duration, rule: Option<&str>, set_by: Option<&str>) -> String {
    let Some(rule) = rule else { return format!("for {retry_in:.1?}, since its calls have failed") };
    let by = set_by.map(|by| format!(" that `{by}` has set")).unwrap_or_default();
    format!("by the rule of `{rule}`{by}: `hopline rules unset {rule} breaker` closes it")
}

fn nobody(service: &str, oneway: Option<&str>) -> String {
    match oneway {
        None => match service.split_once('@') {
            Some((service, instance)) => format!(
                "there is no instance `{instance}` of `{service}`: it has gone, or connects again at this moment; \
                 `Registry::instances`, or `hopline info {service}`, lists those that are there"
            ),
            None => format!("nobody serves `{service}`: is a server running, and on the same namespace?"),
        },
        Some(method) => format!(
            "`{service}` takes no oneway calls of `{method}`: has a server run, on the same namespace, in which this is a \
             oneway method?"
        ),
    }
}

/// What helps against a message that is over a cap.
fn smaller(whose: &str) -> &'static str {
    match whose {
        "fixed" => "shorten it",
        "broker's" => "send less, or raise `max_message_size` in the broker's configuration",
        "server's or broker's" => {
            "send less, or raise `max_message_size` on both sides and in the broker's configuration"
        }
        _ => "send less, or raise `max_message_size` on both sides",
    }
}

/// The beginning of an error about a call, if it is one.
fn ran(method: Option<&str>, may_have_run: bool) -> String {
    let ran = if may_have_run { "may have run" } else { "has not run" };
    method.map(|method| format!("`{method}` {ran}: ")).unwrap_or_default()
}

#[cfg(test)]
mod tests;
