//! Collects everything that is wrong with a trait or a type, so that the compiler reports it at once.

use std::fmt::Display;

use quote::ToTokens;
use syn::{Error, Result};

/// The errors found so far. Each points to the code that it is about.
#[derive(Default)]
pub(crate) struct Refusals(Option<Error>);

impl Refusals {
    /// Adds an error that points to `spot`. `sentence` says what to write instead.
    pub(crate) fn add(&mut self, spot: impl ToTokens, sentence: impl Display) {
        self.push(Error::new_spanned(spot, sentence));
    }

    pub(crate) fn push(&mut self, error: Error) {
        match &mut self.0 {
            Some(errors) => errors.combine(error),
            none => *none = Some(error),
        }
    }

    /// All errors as one, if there are any.
    pub(crate) fn into_result(self) -> Result<()> {
        self.0.map_or(Ok(()), Err)
    }
}
