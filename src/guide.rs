//! The Rust code of the guide and of the README compiles, and runs where it can: `cargo test --doc` takes each page for the
//! documentation of a type here.

macro_rules! pages {
    ($($(#[$condition:meta])* $page:ident = $path:literal,)*) => {
        $($(#[$condition])* #[doc = include_str!(concat!("../", $path))] struct $page;)*
    };
}

pages! {
    Readme = "README.md",
    BesideOthers = "docs/guide/src/beside-others.md",
    ChangingAContract = "docs/guide/src/changing-a-contract.md",
    Cluster = "docs/guide/src/cluster.md",
    Events = "docs/guide/src/events.md",
    OtherLanguages = "docs/guide/src/other-languages.md",
    Performance = "docs/guide/src/performance.md",
    Reliability = "docs/guide/src/reliability.md",
    #[cfg(feature = "tls")]
    Security = "docs/guide/src/security.md",
    Troubleshooting = "docs/guide/src/troubleshooting.md",
}
