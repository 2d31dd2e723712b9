//! Callback style: a callback is called once, whatever becomes of its call and of the runtime.

use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;

use crate::client::RUNTIME_ENDED;
use crate::error::Error;

/// A callback, which is called when this is dropped: without an outcome, the runtime has ended that waited for it.
pub(super) struct Called<T, E, F>
where
    E: fmt::Debug,
    F: FnOnce(Result<T, Error<E>>),
{
    callback: Option<F>,
    method: Option<Arc<str>>,
    /// Why the call could not be put on its way, if it could not.
    refused: Option<Error<E>>,
    result: PhantomData<fn(T)>,
}

impl<T, E: fmt::Debug, F: FnOnce(Result<T, Error<E>>)> Called<T, E, F> {
    pub(super) fn new(callback: F, method: Option<Arc<str>>, refused: Option<Error<E>>) -> Self {
        Self { callback: Some(callback), method, refused, result: PhantomData }
    }

    /// Whether the call could not be put on its way.
    pub(super) fn is_refused(&self) -> bool {
        self.refused.is_some()
    }

    pub(super) fn with(mut self, outcome: Result<T, Error<E>>) {
        if let Some(callback) = self.callback.take() {
            callback(outcome);
        }
    }
}

impl<T, E: fmt::Debug, F: FnOnce(Result<T, Error<E>>)> Drop for Called<T, E, F> {
    fn drop(&mut self) {
        let Some(callback) = self.callback.take() else { return };
        let method = self.method.as_deref().map(str::to_owned);
        let ended = || Error::Disconnected { method, may_have_run: true, reason: RUNTIME_ENDED.to_owned() }.widen();
        callback(Err(self.refused.take().unwrap_or_else(ended)));
    }
}
