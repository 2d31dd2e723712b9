//! A call that was started, with or without middleware, until its outcome is known.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context as TaskContext, Poll, Waker, ready};

use futures::FutureExt as _;
use futures::future::BoxFuture;
use tokio::runtime::Handle;
use tokio::task::JoinHandle;

use super::RUNTIME_ENDED;
#[cfg(feature = "metrics")]
use super::counted::MeasuredCall;
use super::pending::Dispatched;
use crate::context::Context;
use crate::error::Error;
#[cfg(feature = "metrics")]
use crate::frame::Trace;
use crate::middleware::Reply;

/// A call that was started, and whose reply has not come yet.
pub(crate) struct Started {
    pub(super) way: Way,
    /// `None` for what is not counted, and once it is.
    #[cfg(feature = "metrics")]
    pub(super) measured: Option<MeasuredCall>,
}

/// The way that a call takes.
pub(super) enum Way {
    /// It was sent without middleware.
    Straight(Dispatched),
    /// It goes through middleware.
    Through(Through),
}

/// A call that goes through middleware. Dropping it cancels the call.
pub(super) struct Through {
    running: RunningThrough,
    runtime: Handle,
    context: Option<Context>,
}

enum RunningThrough {
    /// Whoever waits for the call runs it.
    Here(BoxFuture<'static, Result<Reply, Error>>),
    /// It runs on a task of its own.
    There(JoinHandle<Result<Reply, Error>>),
    /// It has ended. This is the outcome, until somebody takes it.
    Over(Option<Result<Reply, Error>>),
}

impl Future for Started {
    type Output = Result<Reply, Error>;

    fn poll(self: Pin<&mut Self>, task: &mut TaskContext<'_>) -> Poll<Self::Output> {
        let started = self.get_mut();
        let outcome = match &mut started.way {
            Way::Straight(dispatched) => Pin::new(dispatched).poll(task),
            Way::Through(through) => through.poll(task),
        };
        #[cfg(feature = "metrics")]
        if let Poll::Ready(outcome) = &outcome
            && let Some(measured) = started.measured.take()
        {
            measured.ends(outcome, started.trace());
        }
        outcome
    }
}

impl Started {
    /// Makes the call run by itself from now on, whether or not anybody waits for it.
    ///
    /// # Errors
    /// The error of a call that has failed already.
    pub(crate) fn go_on(&mut self) -> Result<(), Error> {
        let Way::Through(through) = &mut self.way else { return Ok(()) };
        let Poll::Ready(outcome) = through.poll(&mut TaskContext::from_waker(Waker::noop())) else {
            through.detach();
            return Ok(());
        };
        #[cfg(feature = "metrics")]
        if let Some(measured) = self.measured.take() {
            measured.ends(&outcome, None);
        }
        through.running = RunningThrough::Over(Some(Ok(outcome?)));
        Ok(())
    }

    /// The trace that the call was sent with, if it was sent without middleware.
    #[cfg(feature = "metrics")]
    fn trace(&self) -> Option<Trace> {
        match &self.way {
            Way::Straight(dispatched) => dispatched.trace(),
            Way::Through(_) => None,
        }
    }
}

impl Through {
    /// A call that whoever waits for it runs.
    pub(super) fn new(
        running: impl Future<Output = Result<Reply, Error>> + Send + 'static,
        runtime: Handle,
        context: Option<Context>,
    ) -> Self {
        Self { running: RunningThrough::Here(running.boxed()), runtime, context }
    }

    fn poll(&mut self, task: &mut TaskContext<'_>) -> Poll<Result<Reply, Error>> {
        match &mut self.running {
            RunningThrough::Here(running) => {
                // Timers need a runtime of tokio's, and whoever waits may have none.
                let _entered = Handle::try_current().is_err().then(|| self.runtime.enter());
                running.as_mut().poll(task)
            }
            RunningThrough::There(running) => Poll::Ready(ready!(running.poll_unpin(task)).unwrap_or_else(|_| {
                Err(Error::Disconnected { method: None, may_have_run: true, reason: RUNTIME_ENDED.to_owned() })
            })),
            RunningThrough::Over(outcome) => Poll::Ready(outcome.take().expect("a call is polled until its end")),
        }
    }

    fn detach(&mut self) {
        let RunningThrough::Here(running) = std::mem::replace(&mut self.running, RunningThrough::Over(None)) else {
            return;
        };
        let running = match self.context.take() {
            Some(context) => context.scope(running).boxed(),
            None => running,
        };
        self.running = RunningThrough::There(self.runtime.spawn(running));
    }
}

impl Drop for Through {
    fn drop(&mut self) {
        if let RunningThrough::There(task) = &self.running {
            task.abort();
        }
    }
}

impl fmt::Debug for Started {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.way {
            Way::Straight(dispatched) => dispatched.fmt(f),
            Way::Through(_) => f.write_str("Through"),
        }
    }
}
