//! The outcomes of all calls as a row of a table, and what has to be true of them.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use super::ledger::{Call, Kind, Tie};

/// The outcomes of some calls.
#[derive(Debug, Default)]
pub(super) struct Counts {
    pub(super) gets: usize,
    pub(super) failed: BTreeMap<String, usize>,
    pub(super) others: usize,
    pub(super) others_failed: BTreeMap<String, usize>,
    /// Failed while this process did not run.
    pub(super) not_run: usize,
    pub(super) gap: Duration,
}

impl Counts {
    pub(super) fn add(&mut self, call: &Call, had_its_time: bool) {
        if call.failure().is_some() && !had_its_time {
            self.not_run += 1;
            return;
        }
        let (sent, failed) = match call.kind {
            Kind::Get => (&mut self.gets, &mut self.failed),
            Kind::Once => (&mut self.others, &mut self.others_failed),
            Kind::Note | Kind::Bad => return,
        };
        *sent += 1;
        if let Some(failure) = call.failure() {
            *failed.entry(failure.what.clone()).or_default() += 1;
        }
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let named = |failed: &BTreeMap<String, usize>| {
            let named: Vec<_> = failed.iter().map(|(what, times)| format!("{times} {what}")).collect();
            if named.is_empty() { "0".to_owned() } else { named.join(", ") }
        };
        let (failed, others) = (named(&self.failed), named(&self.others_failed));
        write!(f, "{failed} of {}; {others} of {}; {:.1} s", self.gets, self.others, self.gap.as_secs_f64())?;
        if self.not_run > 0 { write!(f, " (and {} while the test did not run)", self.not_run) } else { Ok(()) }
    }
}

/// The head of the table. A cell about services holds the number of failed idempotent calls, the number of other failed
/// calls, and the longest gap between two answers.
pub(super) const HEADER: &str = "\
| what was done | version | quorum | classic, on it | classic, elsewhere | nothing on it | oneway | dead letters | events | `Ready` after |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |";

/// The outcomes of all calls while something was done to a cluster.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) what: String,
    pub(super) version: String,
    pub(super) ties: BTreeMap<Tie, Counts>,
    /// Calls that met no outage.
    pub(super) calm: Counts,
    pub(super) confirmed: usize,
    pub(super) lost: usize,
    pub(super) dead: usize,
    pub(super) dead_lost: usize,
    /// How many events reached all subscribers, how many did not, and how many failed.
    pub(super) events: (usize, usize, usize),
    pub(super) events_missed: usize,
    /// Which events were missed by whom.
    pub(super) missed: String,
    pub(super) run_twice: usize,
    pub(super) lied: usize,
    pub(super) late: usize,
    pub(super) ready_after: Duration,
    pub(super) stalled: Duration,
}

impl Row {
    /// Checks what has to hold whatever happens to a cluster.
    pub(super) fn no_promise_is_broken(&self) {
        assert_eq!(self.lost, 0, "oneway calls are lost: {self}");
        assert_eq!(self.dead_lost, 0, "dead letters are lost: {self}");
        assert_eq!(self.events_missed, 0, "a subscriber that lives has missed events: {}: {self}", self.missed);
        assert_eq!(self.run_twice, 0, "what may not run twice has: {self}");
        assert_eq!(self.lied, 0, "what was said not to have run has: {self}");
        assert_eq!(self.late, 0, "calls did not end by their deadlines: {self}");
        assert!(self.calm.failed.is_empty(), "calls failed while all was well: {}: {self}", self.calm);
    }

    /// Checks what services with this tie promise: no idempotent call has failed, and there was no long gap.
    pub(super) fn holds(&self, tie: Tie) {
        const GAP: Duration = Duration::from_secs(2);
        let counts = &self.ties[&tie];
        assert!(counts.failed.is_empty(), "{tie:?}: {counts}");
        assert!(counts.gap <= GAP, "{tie:?}: {counts}, {:?} of it not run: {self}", self.stalled);
    }
}

impl fmt::Display for Row {
    /// With what is not for the table, if it is asked for.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "| {} | {} |", self.what, self.version)?;
        for tie in [Tie::Quorum, Tie::OnIt, Tie::Elsewhere, Tie::Apart] {
            match self.ties.get(&tie) {
                Some(counts) => write!(f, " {counts} |")?,
                None => f.write_str(" |")?,
            }
        }
        let (all, not_all, failed) = self.events;
        write!(f, " {}, {} lost | {}, {} lost |", self.confirmed, self.lost, self.dead, self.dead_lost)?;
        write!(f, " {all} + {not_all} not to all, {failed} failed, {} lost |", self.events_missed)?;
        write!(f, " {:.1} s |", self.ready_after.as_secs_f64())?;
        let Self { run_twice, lied, late, stalled, calm, .. } = self;
        let more = format!("run twice {run_twice}, lied {lied}, late {late}, stalled {stalled:.1?}, calm {calm}");
        if f.alternate() { write!(f, " {more}") } else { Ok(()) }
    }
}
