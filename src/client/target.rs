//! A target: a method of a service, with what the client has learned about it.
//!
//! Calls name a service and a method by text. [`Targets`] checks these names once and remembers the result, so that a
//! call needs neither checks nor allocations for them.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use super::called::{CalledMethod, CalledMethods};
use super::presence::Presence;
use crate::compression::{Compression, Readable};
use crate::map::FastMap;
use crate::pace::Pace;
use crate::topology::{ServiceId, check_name, oneway_key};

/// How many targets a client remembers: those that were used last. Most programs use few, but a program that passes on
/// names from outside may get any number.
const MAX_KEPT: usize = 10_000;

/// A method of a service, with the texts that each call of it needs.
#[derive(Debug)]
pub(crate) struct Target {
    pub(crate) service: ServiceId,
    /// The service as `name.vMAJOR`.
    pub(crate) service_text: Arc<str>,
    pub(crate) method: Arc<str>,
    /// `name.vMAJOR.method`. It is also the key of a oneway call.
    pub(crate) text: Arc<str>,
    /// How long the method's handler takes, as replies have reported.
    pub(crate) pace: Pace,
    /// What is counted of its calls. Nobody reads it of a question of discovery.
    pub(crate) counted: Arc<CalledMethod>,
    /// What is known of the service. All its methods share it.
    known: Arc<KnownService>,
}

/// What the client has learned of a service from the replies of any of its methods.
#[derive(Debug)]
struct KnownService {
    /// The compressions that every instance can read that has replied so far, as the bits of [`Readable`]. The top bit
    /// is set until the first reply.
    reads: AtomicU8,
    presence: Presence,
}

/// The bit in `KnownService::reads` that means that no instance has replied yet.
const NOBODY_REPLIED: u8 = 0x80;

impl Default for KnownService {
    fn default() -> Self {
        Self { reads: AtomicU8::new(u8::MAX), presence: Presence::default() }
    }
}

impl Target {
    /// A target that shares nothing with others. For discovery and for tests.
    pub(crate) fn new(service: ServiceId, method: &str) -> Self {
        Self::of(service, method, Arc::default(), |_, _| Arc::default())
    }

    /// A target of a service about which `known` is known.
    fn of(
        service: ServiceId,
        method: &str,
        known: Arc<KnownService>,
        counted: impl FnOnce(&Arc<str>, &Arc<str>) -> Arc<CalledMethod>,
    ) -> Self {
        let (service_text, method): (Arc<str>, Arc<str>) = (service.to_string().into(), method.into());
        let (text, counted) = (oneway_key(&service, &method).into(), counted(&service_text, &method));
        Self { service, service_text, method, text, pace: Pace::default(), counted, known }
    }

    /// Whether it is a question of discovery, which every instance answers at once: no method has a dot in its name.
    pub(crate) fn is_question(&self) -> bool {
        self.method.contains('.')
    }

    /// An instance has said which compressions it can read. Another instance, perhaps of another version, may get the
    /// next call, so only what all of them can read is used.
    pub(crate) fn said_to_read(&self, readable: Readable) {
        let [.., readable] = readable.0.to_be_bytes();
        let readable = readable & !NOBODY_REPLIED;
        // Usually nothing changes. Not writing then spares other CPUs a cache miss.
        if self.known.reads.load(Ordering::Relaxed) & !readable != 0 {
            self.known.reads.fetch_and(readable, Ordering::Relaxed);
        }
    }

    /// Whether every instance that has replied so far can read this.
    pub(crate) fn reads(&self, compression: Compression) -> bool {
        let readable = self.known.reads.load(Ordering::Relaxed);
        readable & NOBODY_REPLIED == 0 && Readable(readable.into()).includes(compression)
    }

    /// Whether the service has an instance, as far as is known.
    pub(crate) fn presence(&self) -> &Presence {
        &self.known.presence
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// The targets of a client, found by the names that calls use.
#[derive(Debug, Default)]
pub(crate) struct Targets(RwLock<Generations>);

/// The targets in two generations. When `young` is full, it becomes `old`, and the old one is dropped. A target of
/// `old` that is used moves to `young`. So the targets that were used last are kept.
#[derive(Debug, Default)]
struct Generations {
    young: Generation,
    old: Generation,
    called: Arc<CalledMethods>,
}

/// Targets by the names of service and method, as they were written.
#[derive(Debug, Default)]
struct Generation {
    targets: FastMap<String, FastMap<String, Arc<Target>>>,
    /// What is known of each service, whichever way its name was written.
    known: HashMap<ServiceId, Arc<KnownService>>,
    /// How many targets there are.
    len: usize,
}

impl Generation {
    fn get(&self, service: &str, method: &str) -> Option<&Arc<Target>> {
        self.targets.get(service)?.get(method)
    }
}

impl Targets {
    /// What is counted of the methods that were called.
    pub(super) fn called(&self) -> Arc<CalledMethods> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).called.clone()
    }

    /// The target with these names.
    ///
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
        // Dropping thousands of targets takes time, so the lock is released first.
        drop(kept);
        drop(outgoing);
        Ok(target)
    }
}

impl Generations {
    /// A target that calls use, and whose calls are counted.
    fn made(&self, service: ServiceId, method: &str, known: Arc<KnownService>) -> Target {
        Target::of(service, method, known, |service, method| self.called.method(service, method))
    }

    /// Moves the target with these names to the young generation, or makes it. Returns it, and the old generation if
    /// that is to be dropped.
    fn keep(&mut self, id: ServiceId, service: &str, method: &str) -> (Arc<Target>, Option<Generation>) {
        // Another thread may have added it at the same moment.
        if let Some(target) = self.young.get(service, method) {
            return (target.clone(), None);
        }
        let known = self.young.known.get(&id).or_else(|| self.old.known.get(&id)).cloned().unwrap_or_default();
        let target = match self.old.get(service, method) {
            Some(target) => target.clone(),
            None => Arc::new(self.made(id.clone(), method, known.clone())),
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
        // One of the targets in use is old.
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
            assert_eq!(generation.targets.values().map(FastMap::len).sum::<usize>(), generation.len);
        }
    }
}
