//! A server's rules: who may call what, and who may have it drained.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use tracing::error;

use super::Server;
use crate::error::{Code, Fault};
use crate::panics::words;

/// The caller of a method, as a rule sees it: see [`Server::allow`](crate::Server::allow).
///
/// ```
/// use hopline::{Caller, Server};
///
/// /// Operators may call everything, and others only what looks.
/// fn allowed(caller: &Caller<'_>, method: &str) -> bool {
///     caller.user == Some("operator") || method.ends_with(".look")
/// }
///
/// # async fn example() -> Result<(), hopline::Error> {
/// let server = Server::connect("memory://").await?.allow(allowed);
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Caller<'a> {
    /// The user with whom the caller is logged in at the broker, verified by the broker. `None` if the message does not
    /// carry it.
    pub user: Option<&'a str>,
    /// The id of the calling instance, as it names itself. It could say anything, so it proves nothing.
    pub instance: Option<&'a str>,
}

impl Server {
    /// Sets the rule that says who may do what. `rule` gets the caller and what it wants to do, before arguments are
    /// read. It returns whether that is allowed. Default: everything is allowed. A second rule replaces the first.
    ///
    /// What the caller wants is written as follows:
    ///
    /// - a request, oneway call or broadcast is `service.vMAJOR.method`,
    /// - a question of discovery is `service.vMAJOR.hopline.ping`, `.info`, `.stats`, `.schema`, `.tap` or `.drain`,
    /// - an event is `event:KEY`.
    ///
    /// A request that is refused is answered with `PERMISSION_DENIED`, a oneway call becomes a dead letter, and an
    /// event is dropped and logged. The rule is not asked about cancels: who cancels must know the id of the call, and
    /// only the caller does. The rule is called for every frame and must not block. If it panics, the frame is refused.
    ///
    /// ```
    /// # async fn example() -> Result<(), hopline::Error> {
    /// # let url = "memory://";
    /// let server = hopline::Server::connect(url).await?.allow(|caller, method| match method {
    ///     "ledger.v1.book" => caller.user == Some("billing"),
    ///     _ => caller.user.is_some(),
    /// });
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn allow<F>(mut self, rule: F) -> Self
    where
        F: Fn(&Caller<'_>, &str) -> bool + Send + Sync + 'static,
    {
        self.allow = Allow::by(rule);
        self
    }

    /// Lets operators have this server drained from afar, as `hopline drain INSTANCE` and
    /// [`Registry::drain`](crate::Registry::drain) do. `rule` gets the caller, and returns whether that one may. The rule
    /// of [`allow`](Self::allow) is asked, too, about `service.vMAJOR.hopline.drain`. Default: nobody may. A second rule
    /// replaces the first.
    ///
    /// The server replies, and drains as after a signal: [`Running::run_until_signal`](crate::Running::run_until_signal)
    /// and [`Server::run_until`] return when it has drained. In a program that waits for something else,
    /// [`Running::health`](crate::Running::health) tells that it has ended.
    ///
    /// ```
    /// # async fn example() -> Result<(), hopline::Error> {
    /// # let url = "memory://";
    /// let server = hopline::Server::connect(url).await?.allow_drain(|caller| caller.user == Some("operator"));
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn allow_drain<F>(mut self, rule: F) -> Self
    where
        F: Fn(&Caller<'_>) -> bool + Send + Sync + 'static,
    {
        self.allow_drain = Allow::by(move |caller, _| rule(caller));
        self
    }
}

type Rule = dyn Fn(&Caller<'_>, &str) -> bool + Send + Sync;

/// A server's rule who may call what. Without one, everybody may call everything.
#[derive(Clone, Default)]
pub(super) struct Allow(Option<Arc<Rule>>);

impl Allow {
    pub(super) fn by<F>(rule: F) -> Self
    where
        F: Fn(&Caller<'_>, &str) -> bool + Send + Sync + 'static,
    {
        Self(Some(Arc::new(rule)))
    }

    /// Whether there is a rule.
    pub(super) fn is_set(&self) -> bool {
        self.0.is_some()
    }

    /// Asks the rule.
    ///
    /// # Errors
    /// A fault for a caller that may not call `method`.
    pub(super) fn check(&self, caller: &Caller<'_>, method: &str) -> Result<(), Fault> {
        let Some(rule) = &self.0 else { return Ok(()) };
        // A rule that panics has not allowed the call.
        let allowed = catch_unwind(AssertUnwindSafe(|| rule(caller, method))).unwrap_or_else(|panic| {
            let Caller { user, instance } = caller;
            error!(
                method,
                user,
                caller = instance,
                panic = words(&*panic),
                "the rule about who may call what panicked: refused"
            );
            false
        });
        if allowed {
            return Ok(());
        }
        let why = match caller.user {
            Some(user) => {
                format!("the user `{user}` may not call `{method}` here: have it allowed where this server runs")
            }
            None => format!(
                "who calls `{method}` is not known, and only known users may: its messages have to carry their `user_id`"
            ),
        };
        Err(Fault::new(Code::PermissionDenied, why))
    }
}

impl fmt::Debug for Allow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Allow").field(&self.is_set()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_that_panics_refuses() {
        let allow = Allow::by(|_, _| panic!("as the test asks"));
        let caller = Caller { user: Some("bob"), instance: None };
        assert!(allow.check(&caller, "demo.v1.add").is_err_and(|fault| fault.code == Code::PermissionDenied));
        assert_eq!(Allow::default().check(&caller, "demo.v1.add"), Ok(()));
    }
}
