//! How much of a reason is sent or logged. A reason may quote what a caller sent, and must fit into metadata and into
//! an AMQP header.

use crate::headers::cut;

/// How much of a reason is sent or logged, in bytes.
pub(super) const MAX_REASON: usize = 4096;

/// The first part of a reason, of at most [`MAX_REASON`] bytes.
pub(super) fn shortened(reason: &str) -> &str {
    cut(reason, MAX_REASON)
}
