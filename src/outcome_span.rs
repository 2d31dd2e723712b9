//! A span that tells at its end how what it covers has ended, and how long it took.

use std::time::Instant;

use tracing::Span;

use crate::error::{Code, EndOfCall};

/// A span with the fields of an outcome: `rpc.response.status_code`, `error.type`, `otel.status_code` and `duration_ms`. They
/// are empty until it is told. If it is dropped before, nobody waited for the outcome.
#[derive(Debug)]
pub(crate) struct OutcomeSpan {
    span: Span,
    /// `None` once it was told, or if nobody listens.
    since: Option<Instant>,
}

/// Makes an [`OutcomeSpan`] with these fields and those of the outcome, as `info_span!` does.
macro_rules! outcome_span {
    ($name:literal, $($fields:tt)*) => {
        $crate::outcome_span::OutcomeSpan::new(::tracing::info_span!(
            $name,
            $($fields)*
            rpc.response.status_code = ::tracing::field::Empty,
            error.type = ::tracing::field::Empty,
            otel.status_code = ::tracing::field::Empty,
            duration_ms = ::tracing::field::Empty,
        ))
    };
}
pub(crate) use outcome_span;

impl OutcomeSpan {
    pub(crate) fn new(span: Span) -> Self {
        let since = (!span.is_disabled()).then(Instant::now);
        Self { span, since }
    }

    /// The span itself.
    pub(crate) fn span(&self) -> &Span {
        &self.span
    }

    /// Tells the outcome.
    pub(crate) fn ends(&mut self, end: impl Into<EndOfCall>) {
        let Some(since) = self.since.take() else { return };
        let end = end.into();
        self.span.record("rpc.response.status_code", end.status());
        if let Some(error) = end.error_type() {
            self.span.record("error.type", error).record("otel.status_code", "ERROR");
        }
        self.span.record("duration_ms", since.elapsed().as_secs_f64() * 1e3);
    }
}

impl Drop for OutcomeSpan {
    fn drop(&mut self) {
        self.ends(EndOfCall::Coded(Code::Cancelled));
    }
}
