//! Clusters of three nodes of which one is missing, in one way or another.
//!
//! Most of these put a steady load on all nodes, count what became of each call, and print that as a row of the table in
//! docs/guide/src/reliability.md: `scripts/test cluster-4.3` shows all of them.

mod away;
mod changed;
mod cut_off;
mod forgotten;
mod killed;
mod ledger;
mod load;
mod stopped;
mod suspended;
mod table;
