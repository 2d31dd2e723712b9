//! Tests of Hopline through its public API, on the broker that `HOPLINE_TEST_URL` names, or in memory.

#[path = "../cluster/mod.rs"]
mod cluster;
#[path = "../node/mod.rs"]
mod node;
#[path = "../programs/mod.rs"]
mod programs;
#[path = "../proxy/mod.rs"]
mod proxy;
mod stranger;
mod support;

mod absent;
mod alarm;
mod attempts;
mod broadcast;
mod calls;
mod caching;
mod cancel;
mod catalogue;
mod coalescing;
mod compression;
mod connecting;
mod dead;
mod dispatch;
mod documented;
mod drain;
#[cfg(feature = "schema")]
mod dynamic;
mod events;
mod fakes;
mod faults;
mod finishing;
mod flood;
mod groups;
mod from_afar;
mod hostile;
mod identity;
mod in_flight;
mod isolation;
mod limits;
mod long_calls;
mod loss;
mod manifests;
#[cfg(feature = "metrics")]
mod metrics;
mod middleware;
mod sources;
mod stalled;
mod tidy;
mod oneway;
mod operating;
mod outcomes;
mod policies;
mod public_api;
mod quarantine;
mod rates;
mod readiness;
mod redelivery;
mod registry;
mod replay;
mod routes;
mod rules;
mod runtimes;
mod server_caching;
mod settings;
mod sharing;
mod statistics;
mod strategies;
mod tapping;
mod transport_contract;
mod watching;
