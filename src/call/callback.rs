//! Callback style: a callback is called once, whatever becomes of its call and of the runtime.

use std::marker::PhantomData;
use std::sync::Arc;

use crate::client::RUNTIME_ENDED;
use crate::error::Error;

/// A callback, which is called when this is dropped: without an outcome, the runtime has ended that waited for it.
pub(super) struct Called<T, X, F>
where
    X: From<Error>,
    F: FnOnce(Result<T, X>),
{
    callback: Option<F>,
    method: Option<Arc<str>>,
    /// Why the call could not be put on its way, if it could not.
    refused: Option<Error>,
    result: PhantomData<fn(Result<T, X>)>,
}

impl<T, X: From<Error>, F: FnOnce(Result<T, X>)> Called<T, X, F> {
    pub(super) fn new(callback: F, method: Option<Arc<str>>, refused: Option<Error>) -> Self {
        Self { callback: Some(callback), method, refused, result: PhantomData }
    }

    /// Whether the call could not be put on its way.
    pub(super) fn is_refused(&self) -> bool {
        self.refused.is_some()
    }

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
