//! What the user writes as JSON: on the command line, in a file, or on stdin.

use std::io::{self, Read as _};

use serde_json::Value;

/// What is in the file that `@FILE` names, or comes from stdin for `-`. `None` if `text` is neither.
///
/// # Errors
/// A sentence that says what is wrong.
pub(crate) fn from_elsewhere(text: &str) -> Result<Option<String>, String> {
    match text.strip_prefix('@') {
        Some(file) => {
            std::fs::read_to_string(file).map(Some).map_err(|error| format!("`{file}` cannot be read: {error}"))
        }
        None if text == "-" => {
            let mut read = String::new();
            io::stdin().read_to_string(&mut read).map_err(|error| format!("stdin cannot be read: {error}"))?;
            Ok(Some(read))
        }
        None => Ok(None),
    }
}

/// Reads JSON: the text itself, or what `@FILE` and `-` stand for.
///
/// # Errors
/// A sentence that says what is wrong.
pub(crate) fn value(text: &str) -> Result<Value, String> {
    let read = from_elsewhere(text)?;
    serde_json::from_str(read.as_deref().unwrap_or(text)).map_err(|error| format!("not JSON: {error}"))
}
