//! Clusters of three nodes, of which one is missing for some reason.
//!
//! Most of these tests put a steady load on all nodes and count the outcomes of the calls. They print the result as a
//! row of the table in docs/guide/src/reliability.md. `scripts/test cluster-4.3` shows all of them.

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
