//! Which method of which service, and how long its calls take.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use crate::compression::{Compression, Readable};
use crate::pace::Pace;
use crate::topology::{ServiceId, check_name, oneway_key};

/// How many targets are kept at hand. A program names few; one that makes up names gets each made anew beyond this.
const MAX_KEPT: usize = 10_000;

/// A method of a service, with the texts that each call of it needs.
#[derive(Debug)]
pub(crate) struct Target {
    pub(crate) service: ServiceId,
    /// `name.vMAJOR`.
    pub(crate) service_text: Arc<str>,
    pub(crate) method: Arc<str>,
    /// `name.vMAJOR.method`, which is also the key of an oneway call.
    pub(crate) text: Arc<str>,
    pub(crate) pace: Pace,
    /// What its service can read.
    reads: Arc<Reads>,
}

/// Which compressions all instances of a service can read that have replied so far, and a bit for that none has.
#[derive(Debug)]
struct Reads(AtomicU8);

impl Reads {
    const NOBODY_REPLIED: u8 = 0x80;
}

impl Default for Reads {
    fn default() -> Self {
        Self(AtomicU8::new(u8::MAX))
    }
}

impl Target {
    pub(crate) fn new(service: ServiceId, method: &str) -> Self {
        let service_text = service.to_string().into();
        let text = oneway_key(&service, method).into();
        Self { service, service_text, method: method.into(), text, pace: Pace::default(), reads: Arc::default() }
    }

    /// An instance says which compressions it can read. One that cannot read what another can, as one of another version,
    /// may have the next call: so what is gone stays gone.
    pub(crate) fn said_to_read(&self, readable: Readable) {
        let [.., readable] = readable.0.to_be_bytes();
        let readable = readable & !Reads::NOBODY_REPLIED;
        // Once they agree there is nothing to write, which other threads would have to hear of.
        if self.reads.0.load(Ordering::Relaxed) & !readable != 0 {
            self.reads.0.fetch_and(readable, Ordering::Relaxed);
        }
    }

    /// Whether the service is known to read this.
    pub(crate) fn reads(&self, compression: Compression) -> bool {
        let readable = self.reads.0.load(Ordering::Relaxed);
        readable & Reads::NOBODY_REPLIED == 0 && Readable(readable.into()).includes(compression)
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// The targets of one client, by the names that calls give.
#[derive(Debug, Default)]
pub(crate) struct Targets(RwLock<HashMap<String, HashMap<String, Arc<Target>>>>);

impl Targets {
    /// # Errors
    /// A sentence that says what is wrong with one of the names.
    pub(crate) fn find(&self, service: &str, method: &str) -> Result<Arc<Target>, String> {
        let known = self.0.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(target) = known.get(service).and_then(|methods| methods.get(method)) {
            return Ok(target.clone());
        }
        drop(known);
        check_name("method", method)?;
        let mut target = Target::new(ServiceId::parse(service)?, method);
        let mut known = self.0.write().unwrap_or_else(PoisonError::into_inner);
        // However the service is written, and whichever method replied.
        let mut siblings = known.values().filter_map(|methods| methods.values().next());
        if let Some(sibling) = siblings.find(|sibling| sibling.service == target.service) {
            target.reads = sibling.reads.clone();
        }
        let target = Arc::new(target);
        if known.values().map(HashMap::len).sum::<usize>() < MAX_KEPT {
            let methods = known.entry(service.to_owned()).or_default();
            return Ok(methods.entry(method.to_owned()).or_insert(target).clone());
        }
        Ok(target)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_method_is_found_again_whichever_way_its_service_is_written() {
        let targets = Targets::default();
        let target = targets.find("demo", "add").expect("good names");
        assert_eq!((&*target.service_text, target.to_string().as_str()), ("demo.v1", "demo.v1.add"));
        assert!(Arc::ptr_eq(&target, &targets.find("demo", "add").expect("good names")));
        assert_eq!(targets.find("demo.v1", "add").expect("good names").text, target.text);
        assert!(targets.find("demo", "a.b").is_err_and(|why| why.contains("'.'")));
        assert!(targets.find("demo.1", "add").is_err());
    }

    #[test]
    fn a_service_reads_what_all_instances_that_replied_can() {
        let targets = Targets::default();
        let [add, div] = [("demo", "add"), ("demo.v1", "div")].map(|(s, m)| targets.find(s, m).expect("good names"));
        assert!(!div.reads(Compression::Lz4), "nobody has replied");
        add.said_to_read(Readable(0b10));
        assert!(div.reads(Compression::Lz4) && !div.reads(Compression::Zstd));
        assert!(!targets.find("other", "add").expect("good names").reads(Compression::Lz4));
        assert!(targets.find("demo", "late").expect("good names").reads(Compression::Lz4));
        // An old one among them.
        add.said_to_read(Readable::default());
        add.said_to_read(Readable(u64::MAX));
        assert!(!div.reads(Compression::Lz4));
    }

    #[test]
    fn made_up_names_do_not_pile_up() {
        let targets = Targets::default();
        for method in 0..MAX_KEPT + 10 {
            targets.find("demo", &method.to_string()).expect("good names");
        }
        assert_eq!(targets.0.read().expect("no panic")["demo"].len(), MAX_KEPT);
    }
}
