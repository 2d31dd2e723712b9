//! What panics say.

use std::any::Any;

/// What was said as something panicked, if it was text.
pub(crate) fn words(panic: &(dyn Any + Send)) -> Option<&str> {
    panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str))
}
