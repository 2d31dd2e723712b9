//! The methods that a client has called, and what is counted of each.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

#[cfg(feature = "metrics")]
use super::counted::{CalledMethodTold, MethodCounts};
use crate::middleware::{PolicyCounters, PolicyCounts};

/// How many methods have counters of their own. All others are counted as one: their names may come from outside.
pub(crate) const MAX_METHODS: usize = 1000;

/// A service as `name.vMAJOR`, and a method.
pub(super) type MethodName = (Arc<str>, Arc<str>);

/// What is counted of the calls of one method.
#[derive(Debug, Default)]
pub(crate) struct CalledMethod {
    pub(crate) policies: Arc<PolicyCounters>,
    #[cfg(feature = "metrics")]
    pub(super) counts: MethodCounts,
}

/// The methods that a client has called. Their counters stay as long as the client, whatever it forgets of them.
#[derive(Debug, Default)]
pub(crate) struct CalledMethods {
    methods: Mutex<BTreeMap<MethodName, Arc<CalledMethod>>>,
    /// The methods that came when there were counters for many already.
    others: Arc<CalledMethod>,
}

impl CalledMethods {
    /// The counters of a method.
    pub(super) fn method(&self, service: &Arc<str>, method: &Arc<str>) -> Arc<CalledMethod> {
        let mut methods = self.methods.lock().unwrap_or_else(PoisonError::into_inner);
        let is_full = methods.len() >= MAX_METHODS;
        let key = (service.clone(), method.clone());
        match methods.get(&key) {
            Some(known) => known.clone(),
            None if is_full => self.others.clone(),
            None => methods.entry(key).or_default().clone(),
        }
    }

    /// What the policies have done, for all methods together.
    pub(super) fn policies(&self) -> PolicyCounts {
        let methods = self.methods.lock().unwrap_or_else(PoisonError::into_inner);
        let mut sum = self.others.policies.now();
        methods.values().for_each(|method| sum.add(method.policies.now()));
        sum
    }

    /// What was counted of each, and last of those that have no counters of their own.
    #[cfg(feature = "metrics")]
    pub(crate) fn told(&self) -> Vec<CalledMethodTold> {
        let methods = self.methods.lock().unwrap_or_else(PoisonError::into_inner);
        let named = methods.iter().map(|(name, method)| method.told(Some(name.clone())));
        named.chain([self.others.told(None)]).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn methods_over_the_limit_share_their_counters() {
        let (methods, service) = (CalledMethods::default(), Arc::from("demo.v1"));
        let retries = |name: &str| methods.method(&service, &name.into()).policies.retries.get();
        for number in 0..MAX_METHODS + 10 {
            methods.method(&service, &format!("m{number}").into()).policies.retries.one_more();
        }
        methods.method(&service, &"m7".into()).policies.retries.one_more();
        assert_eq!((retries("m7"), retries("m8"), retries("another")), (2, 1, 10));
        assert_eq!(methods.policies().retries, MAX_METHODS as u64 + 11);
    }
}
