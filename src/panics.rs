//! Reads the message of a panic, for logs and faults.

use std::any::Any;

/// The message of a panic, if it is text.
pub(crate) fn words(panic: &(dyn Any + Send)) -> Option<&str> {
    panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str))
}
