//! The callback style: a callback is called exactly once, whatever happens to its call and to the runtime.

use std::marker::PhantomData;
use std::sync::Arc;

use crate::client::RUNTIME_ENDED;
use crate::error::Error;

/// A callback. If it was not called when this is dropped, it is called then: the runtime that waited for the outcome
/// has ended.
pub(super) struct Called<T, X, F>
where
    X: From<Error>,
    F: FnOnce(Result<T, X>),
{
    callback: Option<F>,
    method: Option<Arc<str>>,
    /// Why the call could not be sent at all, if so.
    refused: Option<Error>,
    result: PhantomData<fn(Result<T, X>)>,
}

impl<T, X: From<Error>, F: FnOnce(Result<T, X>)> Called<T, X, F> {
    pub(super) fn new(callback: F, method: Option<Arc<str>>, refused: Option<Error>) -> Self {
        Self { callback: Some(callback), method, refused, result: PhantomData }
    }

    /// Whether the call could not be sent at all.
    pub(super) fn is_refused(&self) -> bool {
        self.refused.is_some()
    }

    /// Calls the callback.
    pub(super) fn with(mut self, outcome: Result<T, X>) {
        if let Some(callback) = self.callback.take() {
            callback(outcome);
        }
    }
}

impl<T, X: From<Error>, F: FnOnce(Result<T, X>)> Drop for Called<T, X, F> {
    fn drop(&mut self) {
        let Some(callback) = self.callback.take() else { return };
        let method = self.method.as_deref().map(str::to_owned);
        let ended = || Error::Disconnected { method, may_have_run: true, reason: RUNTIME_ENDED.to_owned() };
        callback(Err(self.refused.take().unwrap_or_else(ended).into()));
    }
}
