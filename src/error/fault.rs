//! A fault: what a server reports when a call fails without an error of the method's own.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

/// What a server reports when a call fails without an error of the method's own: a [`Code`] to branch on, and a sentence for
/// people.
///
/// A handler may return one instead of an error type of its own. Any code but [`Code::Ok`] reaches the caller as it is;
/// `Ok` reaches the caller as `INTERNAL`, because what fails is never a success.
///
/// ```
/// use std::time::Duration;
///
/// use hopline::{Code, Fault};
///
/// let fault = Fault::new(Code::Unavailable, "the database restarts").retry_after(Duration::from_secs(2));
/// assert_eq!(fault.to_string(), "UNAVAILABLE: the database restarts");
/// assert!(fault.is_transient());
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Fault {
    /// The kind of fault, with gRPC's numbers and names.
    pub code: Code,
    /// What was wrong and what to do.
    pub message: String,
    /// How long to wait before a new attempt makes sense, if the server said.
    pub retry_after: Option<Duration>,
    /// Whether the server said that another attempt does not help.
    pub is_permanent: bool,
    /// Whether it is certain that no handler ran.
    pub(crate) has_not_run: bool,
    /// The instance that reported it.
    pub(crate) instance: Option<Arc<str>>,
    /// What has refused the call, at the server.
    pub(crate) refused_by: RefusedBy,
}

/// What has refused a call at a server.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum RefusedBy {
    Rate,
    FairShare,
    /// Shedding: it comes too late.
    Late,
    /// Shedding: there is too much.
    Overload,
    /// The places of the method, and the queue in front of them, are full.
    NoRoom,
    /// Anything else, such as a middleware of the program.
    #[default]
    Other,
}

impl RefusedBy {
    pub(crate) const ALL: [Self; 6] =
        [Self::Rate, Self::FairShare, Self::Late, Self::Overload, Self::NoRoom, Self::Other];

    /// As metrics name it.
    #[cfg(feature = "metrics")]
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Rate => "rate",
            Self::FairShare => "fair_share",
            Self::Late => "late",
            Self::Overload => "overloaded",
            Self::NoRoom => "no_room",
            Self::Other => "other",
        }
    }
}

impl Fault {
    /// A fault that does not say when to try again.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        let message = message.into();
        Self {
            code,
            message,
            retry_after: None,
            is_permanent: false,
            has_not_run: false,
            instance: None,
            refused_by: RefusedBy::Other,
        }
    }

    /// Says which policy has refused the call.
    pub(crate) fn refused_by(self, refused_by: RefusedBy) -> Self {
        Self { refused_by, ..self }
    }

    /// Says how long the caller should wait before it tries again.
    #[must_use]
    pub fn retry_after(mut self, wait: Duration) -> Self {
        self.retry_after = Some(wait);
        self
    }

    /// Says that another attempt does not help, whatever the code is. No policy of a client tries the call again.
    ///
    /// ```
    /// use hopline::{Code, Fault};
    ///
    /// let fault = Fault::new(Code::Unavailable, "this shop has closed for good").permanent();
    /// assert!(!fault.is_transient());
    /// ```
    #[must_use]
    pub fn permanent(mut self) -> Self {
        self.is_permanent = true;
        self
    }

    /// Whether trying again later can help: the server said when to try again, or the code is `UNAVAILABLE`,
    /// `RESOURCE_EXHAUSTED`, `ABORTED` or `DEADLINE_EXCEEDED`. It cannot if the fault is [permanent](Fault::permanent).
    /// It says nothing about whether the method has run: try a call again only if its method may run twice.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        let passes =
            matches!(self.code, Code::Unavailable | Code::ResourceExhausted | Code::Aborted | Code::DeadlineExceeded);
        !self.is_permanent && (passes || self.retry_after.is_some())
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
        ///
        /// ```
        /// use hopline::{Code, Fault};
        ///
        /// let fault = Fault::new(Code::NotFound, "there is no order 7");
        /// assert_eq!(fault.to_string(), "NOT_FOUND: there is no order 7");
        /// ```
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
    fn a_fault_reads_as_its_code_and_its_message() {
        assert_eq!(Fault::new(Code::Unimplemented, "no method `x`").to_string(), "UNIMPLEMENTED: no method `x`");
        assert_eq!(Fault::new(Code::NotFound, "").to_string(), "NOT_FOUND");
    }

    #[test]
    fn a_fault_is_transient_by_its_code_or_because_it_says_when_to_try_again() {
        let transient = Code::ALL.iter().filter(|code| Fault::new(**code, "").is_transient());
        let transient: Vec<_> = transient.map(|code| code.name()).collect();
        assert_eq!(transient, ["DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "ABORTED", "UNAVAILABLE"]);
        let fault = Fault::new(Code::NotFound, "not yet").retry_after(Duration::from_secs(1));
        assert!(fault.is_transient());
        assert_eq!(fault.retry_after, Some(Duration::from_secs(1)));
    }
}
