//! A service's name and version, or a group's name, as users write it and as it is in names on the broker.

use std::fmt;
use std::str::FromStr;

use super::check_name;
use crate::error::Error;

/// What names a group, in front of its name. No service has a colon in its name.
const GROUP: &str = "group:";

/// A service's name and major version, written `name.vMAJOR`. A `name` alone means version 1. The name of a
/// [group](crate::Subscription::shared) of subscribers is written `group:NAME`, and stands wherever a service does: in
/// the registry, in rules, and among those that have dead letters.
///
/// ```
/// use hopline::ServiceId;
///
/// # fn main() -> Result<(), hopline::Error> {
/// let service: ServiceId = "billing.v2".parse()?;
/// assert_eq!((service.name(), service.version()), ("billing", 2));
/// assert_eq!("billing".parse::<ServiceId>()?.to_string(), "billing.v1");
/// let (service, method) = ServiceId::with_method("billing.v2.total")?;
/// assert_eq!((service.to_string().as_str(), method), ("billing.v2", "total"));
/// assert!("group:billing".parse::<ServiceId>()?.is_group());
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceId {
    name: String,
    /// `None`: a group.
    version: Option<u32>,
}

impl ServiceId {
    /// Version `version` of the service `name`.
    ///
    /// # Errors
    /// A sentence that says what is wrong with the name.
    pub(crate) fn new(name: &str, version: u32) -> Result<Self, String> {
        check_name("service", name)?;
        Ok(Self { name: name.to_owned(), version: Some(version) })
    }

    /// The group `name`.
    ///
    /// # Errors
    /// A sentence that says what is wrong with the name.
    pub(crate) fn group(name: &str) -> Result<Self, String> {
        check_name("group", name)?;
        Ok(Self { name: name.to_owned(), version: None })
    }

    /// Whether it is a group of subscribers.
    #[must_use]
    pub fn is_group(&self) -> bool {
        self.version.is_none()
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its major version. A group has none, which is 0.
    #[must_use]
    pub fn version(&self) -> u32 {
        self.version.unwrap_or(0)
    }

    /// Reads a service and one of its methods, written `name.method` or `name.vMAJOR.method`.
    ///
    /// # Errors
    /// `Invalid` if `text` is not written like that.
    pub fn with_method(text: &str) -> Result<(Self, &str), Error> {
        let split = text.rsplit_once('.').ok_or_else(|| "write SERVICE.METHOD, such as demo.add".to_owned());
        let parsed = split.and_then(|(service, method)| {
            let service = Self::parse(service)?;
            check_name("method", method)?;
            Ok((service, method))
        });
        parsed.map_err(Error::Invalid)
    }

    /// Reads `name.vMAJOR`, or a `name` alone, which means version 1, or `group:NAME`.
    ///
    /// # Errors
    /// A sentence that says what is wrong with it.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        if let Some(name) = text.strip_prefix(GROUP) {
            return Self::group(name);
        }
        let Some((name, version)) = text.split_once('.') else { return Self::new(text, 1) };
        let number = version.strip_prefix('v').and_then(|digits| digits.parse::<u32>().ok());
        // What is not written as it is on the broker, as in `v+1` or `v01`, would be another name there.
        match number {
            Some(number) if version == format!("v{number}") => Self::new(name, number),
            _ => Err(format!("`{text}` is not a service: write `name` or `name.v2`")),
        }
    }
}

impl FromStr for ServiceId {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        Self::parse(text).map_err(Error::Invalid)
    }
}

impl fmt::Display for ServiceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.version {
            Some(version) => write!(f, "{}.v{version}", self.name),
            None => write!(f, "{GROUP}{}", self.name),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topology::Namespace;

    #[test]
    fn a_bad_name_is_refused_with_the_character_in_it() {
        assert_eq!(
            ServiceId::new("a.b", 1),
            Err("the service `a.b` has a '.' in it: use letters, digits, `_` and `-`".into())
        );
        assert!(Namespace::new("").is_err());
        assert!(check_name("method", &"x".repeat(65)).is_err());
        for text in ["demo.2", "demo.v", "demo.v+1", "demo.v01", "demo.v4294967296"] {
            assert!(ServiceId::parse(text).is_err(), "{text}");
        }
        assert!(ServiceId::parse("demo.v1.add").is_err());
    }

    #[test]
    fn a_group_is_told_from_a_service_by_a_colon() {
        let group = ServiceId::parse("group:billing").expect("a group");
        assert_eq!((group.to_string().as_str(), group.name(), group.is_group()), ("group:billing", "billing", true));
        assert_ne!(ServiceId::parse("group"), Ok(group));
        for wrong in ["group:", "group:a.b", "group:a:b", "groups:a"] {
            assert!(ServiceId::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_bare_name_is_version_one() {
        assert_eq!(ServiceId::parse("demo"), ServiceId::new("demo", 1));
        assert_eq!(ServiceId::parse("demo.v7"), ServiceId::new("demo", 7));
    }
}
