//! The Rust code of the guide and of the README compiles, and runs where it can: `cargo test --doc` takes each page for the
//! documentation of a type here.

macro_rules! pages {
    ($($(#[$condition:meta])* $page:ident = $path:literal,)*) => {
        $($(#[$condition])* #[doc = include_str!(concat!("../", $path))] struct $page;)*
    };
}

pages! {
    Readme = "README.md",
    Introduction = "docs/guide/src/introduction.md",
    GettingStarted = "docs/guide/src/getting-started.md",
    ServicesAndCalls = "docs/guide/src/services-and-calls.md",
    Errors = "docs/guide/src/errors.md",
    Routes = "docs/guide/src/routes.md",
    Governance = "docs/guide/src/governance.md",
    Strategies = "docs/guide/src/strategies.md",
    Oneway = "docs/guide/src/oneway.md",
    Events = "docs/guide/src/events.md",
    TheOutbox = "docs/guide/src/outbox.md",
    Deadlines = "docs/guide/src/deadlines.md",
    Middleware = "docs/guide/src/middleware.md",
    Caching = "docs/guide/src/caching.md",
    Limits = "docs/guide/src/limits.md",
    Testing = "docs/guide/src/testing.md",
    ChangingAContract = "docs/guide/src/changing-a-contract.md",
    #[cfg(feature = "schema")]
    Schemas = "docs/guide/src/schemas.md",
    Deploying = "docs/guide/src/deploying.md",
    Operating = "docs/guide/src/operations.md",
    #[cfg(feature = "metrics")]
    MetricsPage = "docs/guide/src/metrics.md",
    RulesWithoutARestart = "docs/guide/src/rules.md",
    TheDoctor = "docs/guide/src/doctor.md",
    Cluster = "docs/guide/src/cluster.md",
    TheCommand = "docs/guide/src/command.md",
    Discovery = "docs/guide/src/discovery.md",
    #[cfg(feature = "tls")]
    Security = "docs/guide/src/security.md",
    Performance = "docs/guide/src/performance.md",
    Troubleshooting = "docs/guide/src/troubleshooting.md",
    Reliability = "docs/guide/src/reliability.md",
    OtherLanguages = "docs/guide/src/other-languages.md",
    BesideOthers = "docs/guide/src/beside-others.md",
    Questions = "docs/guide/src/faq.md",
}
