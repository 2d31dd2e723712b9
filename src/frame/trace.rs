//! The position of a call in its trace, and how it is written: [W3C Trace
//! Context](https://www.w3.org/TR/trace-context/), version 00.

use std::fmt;

use uuid::Uuid;

/// The text of a `traceparent`: 55 bytes in version 00. It is kept as it came, and parsed only if somebody asks for the
/// trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Traceparent([u8; 55]);

impl Traceparent {
    /// `None` for a text of another length, which is another version's and cannot be read.
    pub(super) fn new(text: &str) -> Option<Self> {
        text.as_bytes().try_into().ok().map(Self)
    }

    pub(crate) fn as_str(&self) -> &str {
        // It was made of a text, so it is UTF-8.
        std::str::from_utf8(&self.0).unwrap_or_default()
    }
}

/// The position of a call in its trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Trace {
    trace_id: u128,
    span_id: u64,
    flags: u8,
}

impl Trace {
    /// The first span of a new trace.
    fn root() -> Self {
        Self { trace_id: Uuid::new_v4().as_u128(), span_id: span_id(), flags: 1 }
    }

    /// A new span under `parent`; without one, the first span of a new trace.
    pub(crate) fn under(parent: Option<Self>) -> Self {
        match parent {
            Some(parent) => Self { span_id: span_id(), ..parent },
            None => Self::root(),
        }
    }

    /// The id of the trace.
    #[cfg(feature = "metrics")]
    pub(crate) fn id(&self) -> u128 {
        self.trace_id
    }

    /// The span as a `traceparent`.
    pub(crate) fn text(&self) -> Traceparent {
        let mut text = *b"00-00000000000000000000000000000000-0000000000000000-00";
        hex(&mut text[3..35], &self.trace_id.to_be_bytes());
        hex(&mut text[36..52], &self.span_id.to_be_bytes());
        hex(&mut text[53..], &[self.flags]);
        Traceparent(text)
    }

    /// Reads a `traceparent`. `None` if it is malformed: the specification asks for a new trace then.
    pub(crate) fn parse(traceparent: &str) -> Option<Self> {
        let mut parts = traceparent.split('-');
        let (version, trace_id, span_id, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        let hex =
            |text: &str, length| text.len() == length && text.bytes().all(|c| matches!(c, b'0'..=b'9' | b'a'..=b'f'));
        let well_formed = hex(version, 2) && hex(trace_id, 32) && hex(span_id, 16) && hex(flags, 2);
        let known = version != "ff" && (version != "00" || parts.next().is_none());
        if !(well_formed && known) {
            return None;
        }
        let trace = Self {
            trace_id: u128::from_str_radix(trace_id, 16).ok()?,
            span_id: u64::from_str_radix(span_id, 16).ok()?,
            flags: u8::from_str_radix(flags, 16).ok()?,
        };
        (trace.trace_id != 0 && trace.span_id != 0).then_some(trace)
    }
}

/// A random span id. 0 is not valid, so it is odd.
fn span_id() -> u64 {
    Uuid::new_v4().as_u64_pair().1 | 1
}

impl fmt::Display for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.text().as_str())
    }
}

/// Writes `bytes` as hexadecimal digits.
fn hex(text: &mut [u8], bytes: &[u8]) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    for (pair, byte) in text.chunks_exact_mut(2).zip(bytes) {
        pair[0] = DIGITS[usize::from(byte >> 4)];
        pair[1] = DIGITS[usize::from(byte & 15)];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_traceparent_is_read_and_written_alike() {
        let text = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let trace = Trace::parse(text).expect("the specification's own example");
        assert_eq!(trace.to_string(), text);
        let child = Trace::under(Some(trace));
        assert_eq!((child.trace_id, child.flags), (trace.trace_id, trace.flags));
        assert_ne!(child.span_id, trace.span_id);
    }

    #[test]
    fn a_malformed_traceparent_is_not_read() {
        for text in [
            "",
            "00",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331",
            "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-x",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
        ] {
            assert_eq!(Trace::parse(text), None, "{text}");
        }
    }
}
