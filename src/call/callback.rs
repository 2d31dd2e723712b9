//! The callback style: a callback is called exactly once, whatever happens to its call and to the runtime.

use std::marker::PhantomData;
use std::sync::Arc;

use super::{Answered, Call, Stage};
use crate::client::RUNTIME_ENDED;
use crate::error::Error;
use crate::service::Failure;

impl<T, E> Call<T, E> {
    /// Sends the call at once. `callback` gets its outcome exactly once, on a task of the runtime in which the client
    /// connected.
    ///
    /// If that runtime has ended, or ends before, the outcome is [`Error::Disconnected`]. `callback` then gets it on
    /// the thread that makes the call or ends the runtime.
    pub fn then(mut self, callback: impl FnOnce(Result<T, E::Error>) + Send + 'static)
    where
        T: Answered + 'static,
        E: Failure + 'static,
    {
        let runtime = self.client.runtime().clone();
        let method = match &self.stage {
            Stage::Ready(request) => request.target.as_ref().ok().map(|target| target.text.clone()),
            Stage::Sent(_) | Stage::Unsent(_) | Stage::Over => None,
        };
        // The caller's thread may have no runtime.
        let entered = runtime.enter();
        let refused = self.dispatch().or_else(|error| self.keep(error)).err();
        drop(entered);
        let called = Called::new(callback, method, refused);
        runtime.spawn(async move {
            if !called.is_refused() {
                called.with(self.await);
            }
        });
    }
}

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
