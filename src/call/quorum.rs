//! How many instances must reply well to a broadcast, and when that is decided.

use std::collections::BTreeMap;
use std::fmt;

use crate::error::Error;

/// How many of the instances must reply well to a broadcast: [`Broadcast::require`](crate::Broadcast::require).
///
/// ```
/// # use std::time::Duration;
/// use hopline::{Error, Quorum};
///
/// # async fn example(client: hopline::Client) -> Result<(), Error> {
/// let reload = client.call::<()>("demo.v1", "reload", [(); 0]).all().require(Quorum::Percent(60));
/// match reload.gather(Duration::from_secs(1)).await {
///     Ok(replies) => println!("{} have done it so far, which is enough", replies.len()),
///     Err(Error::NoQuorum { failed, .. }) => println!("these have not: {}", failed.join(", ")),
///     Err(error) => return Err(error),
/// }
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quorum {
    /// Every instance.
    All,
    /// One.
    Any,
    /// So many of a hundred, rounded up, but at least one. More than 100 counts as 100.
    Percent(u8),
}

impl Quorum {
    /// How many of so many instances.
    fn of(self, instances: usize) -> usize {
        match self {
            Self::All => instances,
            Self::Any => 1,
            Self::Percent(percent) => (instances * usize::from(percent.min(100))).div_ceil(100).max(1),
        }
    }
}

impl fmt::Display for Quorum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All => f.write_str("all"),
            Self::Any => f.write_str("any"),
            Self::Percent(percent) => write!(f, "{percent} %"),
        }
    }
}

/// The replies to a broadcast, as they are counted.
pub(super) struct Votes {
    quorum: Quorum,
    /// Whether it is known which instances there are.
    is_complete: bool,
    /// What is known of each instance.
    of: BTreeMap<String, Vote>,
}

/// What an instance has replied.
enum Vote {
    Awaited,
    Good,
    Failed(String),
}

impl Votes {
    /// Nobody has replied. These are the instances, or none if they are not known.
    pub(super) fn new(quorum: Quorum, instances: impl IntoIterator<Item = String>) -> Self {
        let of: BTreeMap<_, _> = instances.into_iter().map(|instance| (instance, Vote::Awaited)).collect();
        Self { quorum, is_complete: !of.is_empty(), of }
    }

    /// An instance has replied, perhaps with an error.
    pub(super) fn count(&mut self, instance: &str, error: Option<String>) {
        self.of.insert(instance.to_owned(), error.map_or(Vote::Good, Vote::Failed));
    }

    /// Whether no further reply can change how it ends.
    pub(super) fn are_decided(&self) -> bool {
        let needed = self.quorum.of(self.of.len());
        match self.quorum {
            Quorum::Any if self.good() > 0 => true,
            _ => self.is_complete && (self.good() >= needed || self.of.len() - self.failed() < needed),
        }
    }

    /// How it ends.
    pub(super) fn end(self, service: impl FnOnce() -> String) -> Result<(), Error> {
        let (good, asked) = (self.good(), self.of.len());
        let needed = self.quorum.of(asked);
        if good >= needed {
            return Ok(());
        }
        let failed = self.of.into_iter().filter_map(|(instance, vote)| match vote {
            Vote::Good => None,
            Vote::Awaited => Some(format!("{instance} has not replied")),
            Vote::Failed(why) => Some(format!("{instance}: {why}")),
        });
        Err(Error::NoQuorum { service: service(), good, needed, asked, failed: failed.collect() })
    }

    fn good(&self) -> usize {
        self.of.values().filter(|vote| matches!(vote, Vote::Good)).count()
    }

    fn failed(&self) -> usize {
        self.of.values().filter(|vote| matches!(vote, Vote::Failed(_))).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn votes(quorum: Quorum, known: usize, good: usize, failed: usize) -> Votes {
        let mut votes = Votes::new(quorum, (0..known).map(|number| number.to_string()));
        (0..good).for_each(|number| votes.count(&number.to_string(), None));
        (good..good + failed).for_each(|number| votes.count(&number.to_string(), Some("broken".to_owned())));
        votes
    }

    #[test]
    fn it_is_decided_as_soon_as_no_reply_can_change_it() {
        // Quorum, known, good, failed; decided, reached.
        let rows = [
            (Quorum::All, 3, 2, 0, false, false),
            (Quorum::All, 3, 3, 0, true, true),
            (Quorum::All, 3, 0, 1, true, false),
            // One that nobody knew of has replied, and counts.
            (Quorum::All, 3, 4, 0, true, true),
            (Quorum::All, 0, 2, 0, false, true),
            (Quorum::Any, 3, 0, 2, false, false),
            (Quorum::Any, 3, 1, 0, true, true),
            (Quorum::Any, 0, 1, 0, true, true),
            (Quorum::Any, 3, 0, 3, true, false),
            (Quorum::Percent(50), 3, 1, 0, false, false),
            (Quorum::Percent(50), 3, 2, 0, true, true),
            (Quorum::Percent(50), 4, 1, 3, true, false),
            (Quorum::Percent(0), 4, 1, 0, true, true),
            (Quorum::Percent(200), 4, 3, 0, false, false),
        ];
        for (quorum, known, good, failed, decided, reached) in rows {
            let votes = votes(quorum, known, good, failed);
            let is_decided = votes.are_decided();
            let is_reached = votes.end(|| "demo.v1".to_owned()).is_ok();
            assert_eq!((is_decided, is_reached), (decided, reached), "{quorum} {known} {good} {failed}");
        }
    }

    #[test]
    fn the_error_names_who_has_failed_and_who_is_silent() {
        let error = votes(Quorum::All, 3, 1, 1).end(|| "demo.v1".to_owned()).expect_err("not all");
        let why = "1 of 3 instances of `demo.v1` have replied well, and 3 must: 1: broken; 2 has not replied";
        assert_eq!(error.to_string(), why);
    }
}
