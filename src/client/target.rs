//! Which method of which service, and how long its calls take.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use super::presence::Presence;
use crate::compression::{Compression, Readable};
use crate::pace::Pace;
use crate::topology::{ServiceId, check_name, oneway_key};

/// How many targets are kept at hand: those that were used last. A program names few, but one that passes on names from
/// outside may be told any number.
const MAX_KEPT: usize = 10_000;

/// A method of a service, with the texts that each call of it needs.
#[derive(Debug)]
pub(crate) struct Target {
    pub(crate) service: ServiceId,
    /// `name.vMAJOR`.
    pub(crate) service_text: Arc<str>,
    pub(crate) method: Arc<str>,
    /// `name.vMAJOR.method`, which is also the key of a oneway call.
    pub(crate) text: Arc<str>,
    pub(crate) pace: Pace,
    known: Arc<Known>,
}

/// What its client has learned of a service, whichever of its methods was called.
#[derive(Debug)]
struct Known {
    /// Which compressions all instances can read that have replied so far, and a bit for that none has.
    reads: AtomicU8,
    presence: Presence,
}

const NOBODY_REPLIED: u8 = 0x80;

impl Default for Known {
    fn default() -> Self {
        Self { reads: AtomicU8::new(u8::MAX), presence: Presence::default() }
    }
}

impl Target {
    pub(crate) fn new(service: ServiceId, method: &str) -> Self {
        Self::of(service, method, Arc::default())
    }

    fn of(service: ServiceId, method: &str, known: Arc<Known>) -> Self {
        let service_text = service.to_string().into();
        let text = oneway_key(&service, method).into();
        Self { service, service_text, method: method.into(), text, pace: Pace::default(), known }
    }

    /// An instance says which compressions it can read. One that cannot read what another can, as one of another version,
    /// may have the next call: so what is gone stays gone.
    pub(crate) fn said_to_read(&self, readable: Readable) {
        let [.., readable] = readable.0.to_be_bytes();
        let readable = readable & !NOBODY_REPLIED;
        // Once they agree there is nothing to write, which other threads would have to hear of.
        if self.known.reads.load(Ordering::Relaxed) & !readable != 0 {
            self.known.reads.fetch_and(readable, Ordering::Relaxed);
        }
    }

    /// Whether the service is known to read this.
    pub(crate) fn reads(&self, compression: Compression) -> bool {
        let readable = self.known.reads.load(Ordering::Relaxed);
        readable & NOBODY_REPLIED == 0 && Readable(readable.into()).includes(compression)
    }

    /// Whether an instance of the service is there.
    pub(crate) fn presence(&self) -> &Presence {
        &self.known.presence
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// The targets of one client, by the names that calls give.
#[derive(Debug, Default)]
pub(crate) struct Targets(RwLock<Generations>);

/// What was used since the other generation was full, and what was used before.
#[derive(Debug, Default)]
struct Generations {
    young: Generation,
    old: Generation,
}

#[derive(Debug, Default)]
struct Generation {
    targets: HashMap<String, HashMap<String, Arc<Target>>>,
    /// However a service is written.
    known: HashMap<ServiceId, Arc<Known>>,
    len: usize,
}

impl Generation {
    fn get(&self, service: &str, method: &str) -> Option<&Arc<Target>> {
        self.targets.get(service)?.get(method)
    }
}

impl Targets {
    /// # Errors
    /// A sentence that says what is wrong with one of the names.
    pub(crate) fn find(&self, service: &str, method: &str) -> Result<Arc<Target>, String> {
        let kept = self.0.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(target) = kept.young.get(service, method) {
            return Ok(target.clone());
        }
        drop(kept);
        check_name("method", method)?;
        let id = ServiceId::parse(service)?;
        let mut kept = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let (target, outgoing) = kept.keep(id, service, method);
        // Whoever waits for the lock does not wait for the end of thousands of these.
        drop(kept);
        drop(outgoing);
        Ok(target)
    }
}

impl Generations {
    /// The target of these names, from now on among the young ones; and the generation that this was one too many for.
    fn keep(&mut self, id: ServiceId, service: &str, method: &str) -> (Arc<Target>, Option<Generation>) {
        // Somebody else may have asked for it at the same moment.
        if let Some(target) = self.young.get(service, method) {
            return (target.clone(), None);
        }
        let known = self.young.known.get(&id).or_else(|| self.old.known.get(&id)).cloned().unwrap_or_default();
        let target = match self.old.get(service, method) {
            Some(target) => target.clone(),
            None => Arc::new(Target::of(id.clone(), method, known.clone())),
        };
        let full = self.young.len >= MAX_KEPT / 2;
        let outgoing = full.then(|| std::mem::replace(&mut self.old, std::mem::take(&mut self.young)));
        self.young.known.insert(id, known);
        self.young.targets.entry(service.to_owned()).or_default().insert(method.to_owned(), target.clone());
        self.young.len += 1;
        (target, outgoing)
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
    fn made_up_names_do_not_pile_up_and_drive_out_nothing_that_is_used() {
        let targets = Targets::default();
        let find = |service: &str, method: &str| targets.find(service, method).expect("good names");
        let used = find("demo", "used");
        used.said_to_read(Readable(0b10));
        let unused = find("demo", "unused");
        for number in 0..3 * MAX_KEPT {
            find(&format!("made-up-{number}"), "x");
            find("demo", &format!("made-up-{number}"));
            assert!(Arc::ptr_eq(&find("demo", "used"), &used));
        }
        assert!(find("demo.v1", "other").reads(Compression::Lz4), "what is known of the service is kept");
        assert!(!Arc::ptr_eq(&find("demo", "unused"), &unused));
        let kept = targets.0.read().expect("no panic");
        for generation in [&kept.young, &kept.old] {
            assert!(generation.len <= MAX_KEPT / 2 && generation.known.len() <= generation.len);
            assert_eq!(generation.targets.values().map(HashMap::len).sum::<usize>(), generation.len);
        }
    }
}
