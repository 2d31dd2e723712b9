//! What the user writes as JSON: on the command line, in a file, or on stdin.

use std::io::{self, Read as _};

use serde_json::Value;

/// Reads JSON: the text itself, a file that `@FILE` names, or stdin for `-`.
///
/// # Errors
/// A sentence that says what is wrong.
pub(crate) fn value(text: &str) -> Result<Value, String> {
    let read = match text.strip_prefix('@') {
        Some(file) => Some(std::fs::read_to_string(file).map_err(|error| format!("`{file}` cannot be read: {error}"))?),
        None if text == "-" => {
            let mut read = String::new();
            io::stdin().read_to_string(&mut read).map_err(|error| format!("stdin cannot be read: {error}"))?;
            Some(read)
        }
        None => None,
    };
    serde_json::from_str(read.as_deref().unwrap_or(text)).map_err(|error| format!("not JSON: {error}"))
}
