//! How much of a reason is sent or logged. A reason may quote what a caller sent, and must fit into metadata and into
//! an AMQP header.

/// How much of a reason is sent or logged, in bytes.
pub(super) const MAX_REASON: usize = 4096;

/// The first part of a reason, of at most [`MAX_REASON`] bytes.
pub(super) fn shortened(reason: &str) -> &str {
    cut(reason, MAX_REASON)
}

/// The longest beginning of `text` that has at most `bytes` bytes and ends with a whole character.
pub(super) fn cut(text: &str, bytes: usize) -> &str {
    let end = (0..=text.len().min(bytes)).rev().find(|end| text.is_char_boundary(*end));
    &text[..end.unwrap_or_default()]
}
