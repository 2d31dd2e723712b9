//! Canaries: a share of a service's calls that goes to another major version of it.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock};

use super::{Client, Request};
use crate::error::Error;
use crate::exchanges::Recipients;
use crate::topology::ServiceId;

/// The parts that a share is counted in.
const WHOLE: u64 = 1_000_000;

/// The canaries of a client, by the service whose calls they get.
#[derive(Debug, Default)]
pub(super) struct Canaries {
    /// Most clients have none, and do not look further.
    any: AtomicBool,
    of: RwLock<HashMap<ServiceId, Canary>>,
}

#[derive(Debug)]
struct Canary {
    /// The other version, as `name.vMAJOR`.
    version: String,
    /// How many of [`WHOLE`] calls it gets.
    share: u64,
    calls: AtomicU64,
}

impl Canary {
    /// Whether the next call is one of the share: as evenly in time as can be.
    fn gets_next(&self) -> bool {
        let before = self.calls.fetch_add(1, Ordering::Relaxed) % WHOLE * self.share % WHOLE;
        before + self.share >= WHOLE
    }
}

impl Client {
    /// Sends `percent` % of the calls and oneway calls of a service to another major version of it, from now on: a
    /// canary. `service` is `name` or `name.vMAJOR`. This concerns all clones of this client, but no broadcasts, and no
    /// call to [one instance](crate::Call::to). 0 % ends it.
    ///
    /// The share is exact, and spread evenly in time: with 5 %, every twentieth call goes to the other version. Its methods
    /// need the same arguments and results.
    ///
    /// ```
    /// # async fn example(client: hopline::Client) -> Result<(), hopline::Error> {
    /// // Of the calls to demo.v1, every twentieth goes to demo.v2.
    /// client.canary("demo", 2, 5.0)?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// `Invalid` for a name that no service can have, a version that is the service's own, and a percentage that is not
    /// between 0 and 100.
    pub fn canary(&self, service: &str, version: u32, percent: f64) -> Result<(), Error> {
        let service = ServiceId::parse(service).map_err(Error::Invalid)?;
        if !(0.0..=100.0).contains(&percent) {
            return Err(Error::Invalid(format!("{percent} % of the calls: give a number between 0 and 100")));
        }
        if service.version() == version {
            return Err(Error::Invalid(format!("`{service}` cannot be its own canary: give another version")));
        }
        let version = ServiceId::new(service.name(), version).map_err(Error::Invalid)?.to_string();
        let share = (percent / 100.0 * WHOLE as f64).round() as u64;
        let mut canaries = self.0.canaries.of.write().unwrap_or_else(PoisonError::into_inner);
        if share == 0 {
            canaries.remove(&service);
        } else {
            canaries.insert(service, Canary { version, share, calls: AtomicU64::new(0) });
        }
        self.0.canaries.any.store(!canaries.is_empty(), Ordering::Relaxed);
        Ok(())
    }

    /// The request itself, or the same for the canary if it is one of its share.
    pub(crate) fn with_canary<P>(&self, mut request: Request<P>) -> Request<P> {
        if self.0.canaries.any.load(Ordering::Relaxed)
            && request.recipients == Recipients::Any
            && let Ok(target) = &request.target
            && !target.is_question()
        {
            let canaries = self.0.canaries.of.read().unwrap_or_else(PoisonError::into_inner);
            if let Some(canary) = canaries.get(&target.service).filter(|canary| canary.gets_next()) {
                request.target = self.target(&canary.version, &target.method);
            }
        }
        request
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_exact_and_even_in_time() {
        let canary = |share| Canary { version: "demo.v2".into(), share, calls: AtomicU64::new(0) };
        let of_4000 = |share| {
            let canary = canary(share);
            (0..4_000).filter(|_| canary.gets_next()).collect::<Vec<_>>()
        };
        let five_percent = of_4000(50_000);
        assert_eq!(five_percent.len(), 200);
        assert!(five_percent.windows(2).all(|pair| pair[1] - pair[0] == 20));
        assert_eq!((of_4000(1).len(), of_4000(WHOLE).len(), of_4000(333_333).len()), (0, 4_000, 1_333));
        let canary = canary(1);
        assert_eq!((0..2 * WHOLE).filter(|_| canary.gets_next()).count(), 2);
    }
}
