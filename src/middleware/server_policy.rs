//! What the policies of this crate do beyond the methods of [`Middleware`](super::Middleware). A server asks them for it
//! at the steps of a call that middleware of a program does not see.

use super::{Adaptive, Invocation, Quarantine, Style};
use crate::error::Fault;

/// A policy: a middleware that a server asks more than other middleware. Each method has a default that does nothing.
pub trait ServerPolicy: Send + Sync {
    /// Whether a oneway call that this refuses for now is held in the instance and asked about again, instead of being
    /// published again as a failed attempt.
    fn holds(&self) -> bool {
        false
    }

    /// Whether calls are to be delivered while all places are taken, so that this can decide about them.
    fn looks_ahead(&self) -> bool {
        false
    }

    /// What paces a call of this user, if this does.
    fn paces(&self, call: &Invocation) -> Option<PacedBy> {
        let _ = call;
        None
    }

    /// Decides about a request that has its place and is about to begin.
    fn begins(&self, call: &Invocation) -> Result<(), Fault> {
        let _ = call;
        Ok(())
    }

    /// A call that this has admitted has left the instance, whatever has become of it.
    fn leaves(&self, call: &Invocation) {
        let _ = call;
    }

    /// The limit of the calls that run at once, if this sets it.
    fn adaptive(&self) -> Option<&Adaptive> {
        None
    }

    /// When a service stops taking calls, if this decides that.
    fn quarantine(&self) -> Option<&Quarantine> {
        None
    }
}

/// Who has said how many calls a second a user may make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PacedBy {
    /// The program, by a [`RateLimit`](super::RateLimit).
    Code,
    /// A rule of an operator, in place of that.
    Rule,
}

impl Invocation {
    /// Whether this waits for a reply and is no question of discovery, whose names have a dot in them.
    pub(crate) fn is_governed(&self) -> bool {
        matches!(self.style, Style::Call | Style::Broadcast) && !self.method.contains('.')
    }
}
