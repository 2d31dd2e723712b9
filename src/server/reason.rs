//! How much of a reason is told: it may quote what a peer has sent, and has to fit into metadata and into an AMQP header.

/// How much of a reason is told, in bytes.
pub(super) const MAX_REASON: usize = 4096;

/// The first part of a reason.
pub(super) fn shortened(reason: &str) -> &str {
    cut(reason, MAX_REASON)
}

/// As many whole letters of a text as fit into so many bytes.
pub(super) fn cut(text: &str, bytes: usize) -> &str {
    let end = (0..=text.len().min(bytes)).rev().find(|end| text.is_char_boundary(*end));
    &text[..end.unwrap_or_default()]
}
