//! Maps that are looked up for each call.

/// A `HashMap` whose hasher is fast with short keys. It has a random start in each process, so that it is
/// not easy to choose keys that collide.
pub(crate) type FastMap<K, V> = std::collections::HashMap<K, V, foldhash::fast::RandomState>;
