//! The spans of a client: one for each call, and of a call that may have several attempts, one for each of these.

use std::future::Future;

use tracing::Instrument as _;
use uuid::Uuid;

use super::Target;
use super::attempt::AttemptKind;
use crate::error::Error;
use crate::frame::{Kind, Trace};
use crate::middleware::Reply;
use crate::outcome_span::{OutcomeSpan, outcome_span};

/// The span of a call, with all its attempts.
pub(super) fn call_span(target: &Target, kind: Kind, id: Uuid, trace: Option<Trace>) -> OutcomeSpan {
    let name = format_args!("{}/{}", target.service_text, target.method);
    outcome_span!(
        "call",
        otel.kind = if kind == Kind::Oneway { "producer" } else { "client" },
        otel.name = %name,
        rpc.system.name = "hopline",
        rpc.method = %name,
        id = %id,
        traceparent = trace.map(tracing::field::display),
    )
}

/// The span of one attempt. It lies in that of its call.
pub(super) fn attempt_span(kind: AttemptKind, id: Uuid, trace: Option<Trace>) -> OutcomeSpan {
    outcome_span!(
        "hopline.attempt",
        hopline.attempt.kind = kind.name(),
        id = %id,
        traceparent = trace.map(tracing::field::display),
    )
}

/// Runs a call within its span, and tells there how it has ended.
pub(super) async fn within(
    mut span: OutcomeSpan,
    running: impl Future<Output = Result<Reply, Error>>,
) -> Result<Reply, Error> {
    let outcome = running.instrument(span.span().clone()).await;
    span.ends(&outcome);
    outcome
}
