//! Several middleware around each other. Clients and workers run their calls through a [`Chain`]; a middleware runs
//! what is inside of it through [`Next`].

use std::fmt;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use futures::future::BoxFuture;
use tracing::error;

use super::{Finished, Invocation, Middleware, PacedBy, Reply, ServerPolicy};
use crate::error::{Code, Error, Fault};
use crate::panics::words;

/// What is inside of a middleware: the middleware after it, and then the sending of the call or its handler.
///
/// ```
/// use hopline::{Error, Invocation, Middleware, Next, Reply};
///
/// /// Tries once more what has not run.
/// struct Again;
///
/// impl Middleware for Again {
///     async fn handle(&self, call: Invocation, next: Next) -> Result<Reply, Error> {
///         match next.run(call.clone()).await {
///             Err(error) if error.is_transient() && !error.may_have_run() => next.run(call).await,
///             outcome => outcome,
///         }
///     }
/// }
/// ```
#[derive(Clone)]
pub struct Next {
    layers: Arc<Vec<Arc<dyn Layer>>>,
    /// How many middleware are outside of it.
    at: usize,
    end: Innermost,
}

/// What is inside of all middleware: it sends the call, or runs the handler.
type Innermost = Arc<dyn Fn(Invocation) -> RunningChain + Send + Sync>;

/// A call that is running inside of a middleware.
type RunningChain = BoxFuture<'static, Result<Reply, Error>>;

impl Next {
    /// Runs what is inside. On a client, each run is an attempt of the call. Dropping the future cancels the attempt.
    ///
    /// # Errors
    /// What went wrong, if the outcome is neither a result nor the method's own error.
    pub fn run(&self, call: Invocation) -> impl Future<Output = Result<Reply, Error>> + Send + Unpin + use<> {
        self.go_on(call)
    }

    fn go_on(&self, call: Invocation) -> RunningChain {
        match self.layers.get(self.at) {
            None => (self.end)(call),
            Some(layer) => layer.clone().go_around(call, Self { at: self.at + 1, ..self.clone() }),
        }
    }
}

impl fmt::Debug for Next {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Next").field("inside", &(self.layers.len() - self.at)).finish_non_exhaustive()
    }
}

/// A [`Middleware`] as a trait object: its futures are boxed.
trait Layer: Send + Sync {
    fn go_around(self: Arc<Self>, call: Invocation, next: Next) -> RunningChain;

    fn admit(&self, call: &Invocation) -> Result<(), Fault>;

    fn finished(&self, done: &Finished<'_>);

    fn policy(&self) -> Option<&dyn ServerPolicy>;
}

impl<M: Middleware> Layer for M {
    fn go_around(self: Arc<Self>, call: Invocation, next: Next) -> RunningChain {
        Box::pin(async move { self.handle(call, next).await })
    }

    fn admit(&self, call: &Invocation) -> Result<(), Fault> {
        Middleware::admit(self, call)
    }

    fn finished(&self, done: &Finished<'_>) {
        Middleware::finished(self, done);
    }

    fn policy(&self) -> Option<&dyn ServerPolicy> {
        Middleware::policy(self)
    }
}

/// A middleware refuses a call.
pub(crate) struct NotAdmitted {
    pub(crate) fault: Fault,
    /// Whether a oneway call is held instead.
    pub(crate) holds: bool,
}

/// Middleware in its order, the outermost first.
#[derive(Clone, Default)]
pub(crate) struct Chain(Arc<Vec<Arc<dyn Layer>>>);

impl Chain {
    /// Adds a middleware inside of all others.
    pub(crate) fn push(&mut self, middleware: impl Middleware) {
        Arc::make_mut(&mut self.0).push(Arc::new(middleware));
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// A chain with `inside` inside of this one.
    pub(crate) fn around(&self, inside: &Self) -> Self {
        if inside.is_empty() {
            return self.clone();
        }
        Self(Arc::new(self.0.iter().chain(&*inside.0).cloned().collect()))
    }

    /// Runs a call through all middleware, and then `end`.
    pub(crate) fn run(
        &self,
        call: Invocation,
        end: impl Fn(Invocation) -> RunningChain + Send + Sync + 'static,
    ) -> RunningChain {
        Next { layers: self.0.clone(), at: 0, end: Arc::new(end) }.go_on(call)
    }

    /// Asks all middleware whether they accept a call, until one refuses. A middleware that panics refuses. `admitted`
    /// becomes the number of those that have accepted it. Where a rule paces calls, the code does not.
    pub(crate) fn admit(&self, call: &Invocation, admitted: &AtomicUsize) -> Result<(), NotAdmitted> {
        let mut is_ruled = false;
        self.0.iter().try_for_each(|layer| {
            let paced = layer.policy().and_then(|policy| policy.paces(call));
            is_ruled |= paced == Some(PacedBy::Rule);
            if is_ruled && paced == Some(PacedBy::Code) {
                admitted.fetch_add(1, Ordering::Relaxed);
                return Ok(());
            }
            // One that panics has not said yes.
            let asked = catch_unwind(AssertUnwindSafe(|| layer.admit(call))).unwrap_or_else(|panic| {
                let (service, method) = (call.service(), call.method());
                error!(
                    service,
                    method,
                    panic = words(&*panic),
                    "a middleware panicked as it was to admit a call: refused"
                );
                Err(Fault::new(Code::Internal, "a middleware panicked as it was to admit the call: the log says why"))
            });
            match asked {
                Ok(()) => {
                    admitted.fetch_add(1, Ordering::Relaxed);
                    Ok(())
                }
                Err(fault) => Err(NotAdmitted { fault, holds: layer.policy().is_some_and(ServerPolicy::holds) }),
            }
        })
    }

    /// The policies among the middleware.
    pub(crate) fn policies(&self) -> impl Iterator<Item = &dyn ServerPolicy> {
        self.0.iter().filter_map(|layer| layer.policy())
    }

    /// Asks all policies whether a request may begin, until one refuses.
    pub(crate) fn begins(&self, call: &Invocation) -> Result<(), Fault> {
        self.policies().try_for_each(|policy| policy.begins(call))
    }

    /// Tells the policies among the first `admitted` middleware that a call has left.
    pub(crate) fn leaves(&self, call: &Invocation, admitted: usize) {
        self.0.iter().take(admitted).filter_map(|layer| layer.policy()).for_each(|policy| policy.leaves(call));
    }

    /// Tells all middleware that a call has ended, the innermost first.
    pub(crate) fn finished(&self, done: &Finished<'_>) {
        for layer in self.0.iter().rev() {
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| layer.finished(done))) {
                let (service, method) = (done.call.service(), done.call.method());
                error!(
                    service,
                    method,
                    panic = words(&*panic),
                    "a middleware panicked as it was told how a call ended"
                );
            }
        }
    }
}

impl fmt::Debug for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Chain").field(&self.0.len()).finish()
    }
}
