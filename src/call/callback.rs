//! A callback that is called once, whatever becomes of the runtime that waits for the outcome.

use std::fmt;
use std::sync::Arc;

use crate::client::RUNTIME_ENDED;
use crate::error::Error;

/// A callback, which is called when this is dropped: without an outcome, the runtime has ended that waited for it.
pub(super) struct Called<T, E: fmt::Debug, F: FnOnce(Result<T, Error<E>>)> {
    callback: Option<F>,
    method: Option<Arc<str>>,
    outcome: Option<Result<T, Error<E>>>,
}

impl<T, E: fmt::Debug, F: FnOnce(Result<T, Error<E>>)> Called<T, E, F> {
    /// With the outcome, if that is known already; of a call of this method, if it has a good name.
    pub(super) fn new(callback: F, method: Option<Arc<str>>, outcome: Option<Result<T, Error<E>>>) -> Self {
        Self { callback: Some(callback), method, outcome }
    }

    pub(super) fn with(mut self, outcome: Result<T, Error<E>>) {
        self.outcome = Some(outcome);
    }
}

impl<T, E: fmt::Debug, F: FnOnce(Result<T, Error<E>>)> Drop for Called<T, E, F> {
    fn drop(&mut self) {
        let method = self.method.as_deref().map(str::to_owned);
        let ended =
            || Err(Error::Disconnected { method, may_have_run: true, reason: RUNTIME_ENDED.to_owned() }.widen());
        let outcome = self.outcome.take().unwrap_or_else(ended);
        if let Some(callback) = self.callback.take() {
            callback(outcome);
        }
    }
}
