//! Which dead letters are meant, and what was done with them.

use super::DeadLetter;
use crate::error::Error;

/// Which dead letters to replay or drop.
///
/// ```
/// use hopline::WhichLetters;
///
/// # async fn example(dead: hopline::DeadLetters) -> Result<(), hopline::Error> {
/// dead.discard(&WhichLetters::Ids(vec!["0b2f".to_owned()]), |_| {}).await?;
/// dead.replay(&WhichLetters::All, |_| {}).await?;
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum WhichLetters {
    /// All, with those that arrive in the meantime.
    All,
    /// Those with these ids. The beginning of an id is enough if no other id begins so. A whole id may be in upper
    /// case, and without hyphens. If several letters have the same id, any one of them is taken.
    Ids(Vec<String>),
}

/// The dead letters of a service, as far as they could be read.
///
/// ```
/// # async fn example(dead: hopline::DeadLetters) -> Result<(), hopline::Error> {
/// let listed = dead.list(100).await?;
/// println!("{} letters", listed.letters.len());
/// if let Some(error) = listed.broken_off {
///     eprintln!("and perhaps more: {error}");
/// }
/// # Ok(()) }
/// ```
#[derive(Debug)]
#[non_exhaustive]
pub struct Listed {
    /// The letters, the oldest first.
    pub letters: Vec<DeadLetter>,
    /// Why there may be more letters, if the broker did not answer to the end.
    pub broken_off: Option<Error>,
}

/// What was done with a dead letter.
///
/// ```
/// use hopline::Fate;
///
/// fn told(fate: &Fate) -> String {
///     match fate {
///         Fate::Replayed => "it runs again".to_owned(),
///         Fate::Kept(why) => format!("it is kept: {why}"),
///         other => format!("{other:?}"),
///     }
/// }
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fate {
    /// It was published again, and will run.
    Replayed,
    /// It was removed for good.
    Dropped,
    /// It is still a dead letter, for this reason.
    Kept(String),
    /// There is no such dead letter.
    Absent,
}

/// A dead letter that was to be replayed or dropped, and what was done with it.
///
/// ```
/// use hopline::{Fate, WhichLetters};
///
/// # async fn example(dead: hopline::DeadLetters) -> Result<(), hopline::Error> {
/// for handled in dead.replay(&WhichLetters::All, |_| {}).await? {
///     if let Fate::Kept(why) = handled.fate {
///         println!("{} is kept: {why}", handled.id);
///     }
/// }
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Handled {
    /// Its [`DeadLetter::id`].
    pub id: String,
    /// What was done with it.
    pub fate: Fate,
}
