//! The metadata that users attach to calls and replies: texts with names.

use std::fmt;
use std::sync::Arc;

use super::MAX_USER_ENTRIES;

/// How many bytes the entries of one frame may take. All metadata of a frame, with what Hopline adds, may take 64 KiB.
const MAX_SIZE: usize = 60 * 1024;
/// What an entry takes at most besides its name and text, in bytes.
const OVERHEAD: usize = 10;

/// Texts with names, in the order in which they were set. Cloning is cheap, and an empty list costs nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub(crate) struct Entries(Option<Arc<Vec<(String, String)>>>);

/// Why entries do not fit into a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Excess {
    /// Their size in bytes, and the limit.
    Size(usize, usize),
    /// Their number, and the limit.
    Count(usize, usize),
}

impl fmt::Display for Excess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Size(size, cap) => write!(f, "{size} bytes of metadata, where a call has {cap} at most"),
            Self::Count(count, cap) => write!(f, "{count} entries of metadata, where a call has {cap} at most"),
        }
    }
}

impl Entries {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_none()
    }

    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        self.iter().find(|(key, _)| *key == name).map(|(_, value)| value)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        let entries = self.0.as_deref().map(Vec::as_slice).unwrap_or_default();
        entries.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// Sets the text of a name, in place of an earlier one.
    pub(crate) fn set(&mut self, name: String, value: String) {
        set(Arc::make_mut(self.0.get_or_insert_default()), name, value);
    }

    /// Whether this is the same unchanged list as `other`. It compares pointers, not texts.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        match (&self.0, &other.0) {
            (Some(own), Some(other)) => Arc::ptr_eq(own, other),
            (None, None) => true,
            _ => false,
        }
    }

    pub(crate) fn into_vec(self) -> Vec<(String, String)> {
        self.0.map(Arc::unwrap_or_clone).unwrap_or_default()
    }
}

impl From<Vec<(String, String)>> for Entries {
    fn from(entries: Vec<(String, String)>) -> Self {
        Self((!entries.is_empty()).then(|| Arc::new(entries)))
    }
}

/// Sets the text of a name among `entries`, in place of an earlier one.
pub(crate) fn set(entries: &mut Vec<(String, String)>, name: String, value: String) {
    entries.retain(|(other, _)| *other != name);
    entries.push((name, value));
}

/// Checks that a frame can hold these entries.
pub(crate) fn check<'a>(entries: impl Iterator<Item = (&'a str, &'a str)>) -> Result<(), Excess> {
    let (mut size, mut count) = (0, 0);
    for (name, value) in entries {
        size += name.len() + value.len() + OVERHEAD;
        count += 1;
    }
    match (size, count) {
        (size, _) if size > MAX_SIZE => Err(Excess::Size(size, MAX_SIZE)),
        (_, count) if count > MAX_USER_ENTRIES => Err(Excess::Count(count, MAX_USER_ENTRIES)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_has_one_text_and_clones_do_not_change_each_other() {
        let mut entries = Entries::default();
        assert!(entries.is_empty() && entries.get("a").is_none());
        for (name, value) in [("a", "1"), ("b", "2"), ("a", "3")] {
            entries.set(name.into(), value.into());
        }
        let mut clone = entries.clone();
        assert!(clone.is_same(&entries));
        clone.set("c".into(), "4".into());
        assert!(!clone.is_same(&entries));
        assert_eq!(entries.iter().collect::<Vec<_>>(), [("b", "2"), ("a", "3")]);
        assert_eq!((entries.get("a"), clone.get("c")), (Some("3"), Some("4")));
    }

    #[test]
    fn a_frame_takes_only_so_many_and_so_much() {
        let many = |count: usize| (0..count).map(|_| ("n", "v"));
        assert_eq!(check(many(128)), Ok(()));
        assert_eq!(check(many(129)), Err(Excess::Count(129, 128)));
        let large = |bytes: usize| "x".repeat(bytes - OVERHEAD);
        assert_eq!(check([("", &*large(MAX_SIZE))].into_iter()), Ok(()));
        assert_eq!(check([("", &*large(MAX_SIZE + 1))].into_iter()), Err(Excess::Size(MAX_SIZE + 1, MAX_SIZE)));
    }
}
