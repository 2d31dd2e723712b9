//! The ledger: it tells what became of every call, and which promises were broken.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fmt::Write as _;
use std::time::Duration;

use crate::chaos::Log;
use crate::record::{Call, History, Id, Method, Outcome};

/// How much later than its deadline a call may end, in milliseconds.
const GRACE: u64 = 1000;
/// How much later than its deadline a handler may begin, in milliseconds.
const SLACK: u64 = 100;

/// The run, and what was found at its end.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) seed: u64,
    pub(crate) minutes: f64,
    pub(crate) versions: String,
    pub(crate) log: Log,
    /// The calls in the queue of dead letters.
    pub(crate) dead: HashSet<Id>,
    /// How many messages stayed in the `work` queue.
    pub(crate) work: u64,
    /// How many calls the clients still counted in flight after all had ended.
    pub(crate) in_flight: usize,
    /// The clients whose calls did not all end.
    pub(crate) unended: Vec<String>,
    /// Queues and connections that were missing, or should not have been there, while all processes ran.
    pub(crate) leaked: Vec<String>,
    /// The same, after all processes had ended.
    pub(crate) left: Vec<String>,
}

/// What is counted for one method.
#[derive(Debug, Default)]
struct Counts {
    sent: usize,
    right: usize,
    wrong: usize,
    confirmed: usize,
    given_up: usize,
    errors: BTreeMap<String, usize>,
    killed: usize,
    /// Calls that ran at least once.
    run: usize,
    /// Runs after the first, on another instance.
    again_elsewhere: usize,
    /// Runs after the first, on the same instance.
    again_in_the_same: usize,
    /// Calls that ran, though their errors said that they had not.
    lied: Vec<Id>,
    lost: Vec<Id>,
    in_the_dead_queue: usize,
    /// Calls that ended later than their deadline plus [`GRACE`], or never.
    late: Vec<Id>,
    run_twice: Vec<Id>,
    run_twice_in_one: Vec<Id>,
    began_late: usize,
    slowest: i64,
}

/// The ledger's text, and the promises that were broken.
pub(crate) fn write(found: &Found, history: &History) -> (String, Vec<String>) {
    let counts = Method::ALL.map(|method| count(method, found, history));
    let broken = broken(found, history, &counts);
    (text(found, history, &counts, &broken), broken)
}

fn count(method: Method, found: &Found, history: &History) -> Counts {
    let killed: HashSet<u32> = found.log.killed.iter().copied().collect();
    let mut counts = Counts { slowest: i64::MIN, ..Counts::default() };
    for (&id, call) in history.calls.iter().filter(|(_, call)| call.method == method) {
        counts.add(id, call, killed.contains(&id.0), found.dead.contains(&id));
    }
    counts
}

impl Counts {
    fn add(&mut self, id: Id, call: &Call, killed: bool, dead: bool) {
        self.sent += 1;
        self.run += usize::from(!call.runs.is_empty());
        self.in_the_dead_queue += usize::from(dead);
        let servers: BTreeSet<u32> = call.runs.iter().map(|run| run.server).collect();
        self.again_elsewhere += servers.len().saturating_sub(1);
        self.again_in_the_same += call.runs.len() - servers.len();
        if call.runs.len() > 1 && !call.method.is_repeatable() {
            self.run_twice.push(id);
        }
        if call.runs.len() > servers.len() && call.method.is_remembered() {
            self.run_twice_in_one.push(id);
        }
        if !call.method.is_oneway() {
            let over = call.sent_at + call.deadline + SLACK;
            self.began_late += call.runs.iter().filter(|run| run.at > over).count();
        }
        let Some((outcome, took)) = &call.end else {
            match killed {
                true => self.killed += 1,
                false => self.late.push(id),
            }
            return;
        };
        match outcome {
            Outcome::Right => self.right += 1,
            Outcome::Wrong => self.wrong += 1,
            Outcome::Confirmed => {
                self.confirmed += 1;
                if call.runs.is_empty() && !dead {
                    self.lost.push(id);
                }
            }
            Outcome::GivenUp => self.given_up += 1,
            Outcome::Error(kind) => {
                *self.errors.entry(kind.clone()).or_default() += 1;
                if Outcome::NOT_RUN.contains(&&**kind) && !call.runs.is_empty() {
                    self.lied.push(id);
                }
            }
        }
        let over = i64::try_from(*took).expect("no call takes that long")
            - i64::try_from(call.deadline).expect("no deadline is that late");
        self.slowest = self.slowest.max(over);
        if *took > call.deadline + GRACE {
            self.late.push(id);
        }
    }
}

fn broken(found: &Found, history: &History, counts: &[Counts]) -> Vec<String> {
    let mut broken = Vec::new();
    for (method, counts) in Method::ALL.into_iter().zip(counts) {
        let name = method.name();
        let mut calls = |what: &str, ids: &[Id]| {
            if !ids.is_empty() {
                let named: Vec<_> = ids.iter().take(10).map(|(client, call)| format!("{client}/{call}")).collect();
                broken.push(format!("`{name}`: {} {what}: {}", ids.len(), named.join(", ")));
            }
        };
        calls("confirmed, never run, and not in the dead queue", &counts.lost);
        calls("run twice", &counts.run_twice);
        calls("run twice in one process", &counts.run_twice_in_one);
        calls("without a result by the deadline and 1 s", &counts.late);
        calls("run though their errors said that they had not", &counts.lied);
        if counts.wrong > 0 {
            broken.push(format!("`{name}`: {} wrong answers", counts.wrong));
        }
    }
    if history.strange > 0 {
        broken.push(format!("{} runs of what nobody called", history.strange));
    }
    if found.work > 0 {
        broken.push(format!("{} messages stayed in the `work` queues", found.work));
    }
    if found.in_flight > 0 {
        broken.push(format!("{} calls in flight after the end of all", found.in_flight));
    }
    broken.extend(found.unended.iter().map(|client| format!("{client}: not all of its calls ended")));
    broken.extend(found.leaked.iter().map(|what| format!("at the end of the load: {what}")));
    broken.extend(found.left.iter().map(|what| format!("after the end of all processes: {what}")));
    broken.extend(found.log.ended.iter().map(|process| format!("ended by itself: {process}")));
    broken.extend(found.log.stuck.iter().map(|server| format!("did not drain: {server}")));
    broken
}

fn text(found: &Found, history: &History, counts: &[Counts], broken: &[String]) -> String {
    let mut text = String::new();
    let mut line = |line: String| writeln!(text, "{line}").expect("memory can be written");
    let row = |name: &str, value: &dyn Fn(Method, &Counts) -> String| {
        let values: Vec<_> =
            Method::ALL.into_iter().zip(counts).map(|(method, counts)| value(method, counts)).collect();
        format!("| {name} | {} |", values.join(" | "))
    };
    let calls = |value: usize, of: bool| if of { value.to_string() } else { "–".to_owned() };
    line(format!("{:.1} minutes, seed {}. {}.\n", found.minutes, found.seed, found.versions));
    line(row("", &|method, _| format!("`{}`", method.name())));
    line(row("---", &|_, _| "---:".to_owned()));
    line(row("sent", &|_, counts| counts.sent.to_string()));
    line(row("confirmed", &|method, counts| calls(counts.confirmed, method.is_oneway())));
    line(row("answered right", &|method, counts| calls(counts.right, !method.is_oneway())));
    line(row("**answered wrong**", &|method, counts| calls(counts.wrong, !method.is_oneway())));
    let errors: BTreeSet<&String> = counts.iter().flat_map(|counts| counts.errors.keys()).collect();
    for error in errors {
        line(row(&format!("ended by {error}"), &|_, counts| {
            counts.errors.get(error).copied().unwrap_or_default().to_string()
        }));
    }
    line(row("given up by the caller", &|method, counts| calls(counts.given_up, !method.is_oneway())));
    line(row("the caller was killed", &|_, counts| counts.killed.to_string()));
    line(row("run", &|_, counts| counts.run.to_string()));
    line(row("**run twice**", &|method, counts| calls(counts.run_twice.len(), !method.is_repeatable())));
    line(row("run again in another process", &|method, counts| calls(counts.again_elsewhere, method.is_repeatable())));
    line(row("run again in the same process", &|method, counts| {
        calls(counts.again_in_the_same, method.is_repeatable() && !method.is_remembered())
    }));
    line(row("**run twice in one process**", &|method, counts| {
        calls(counts.run_twice_in_one.len(), method.is_remembered())
    }));
    line(row("**confirmed and lost**", &|method, counts| calls(counts.lost.len(), method.is_oneway())));
    line(row("in the dead queue", &|method, counts| calls(counts.in_the_dead_queue, method.is_oneway())));
    line(row("**run though said not to have**", &|_, counts| counts.lied.len().to_string()));
    line(row("**no result by deadline + 1 s**", &|_, counts| counts.late.len().to_string()));
    line(row("slowest over its deadline, ms", &|_, counts| counts.slowest.max(0).to_string()));
    line(row("begun after the caller's deadline", &|method, counts| calls(counts.began_late, !method.is_oneway())));
    let again = history.calls.values().flat_map(|call| &call.runs).filter(|run| run.redelivered).count();
    let total: usize = found.log.faults.values().sum();
    line(format!("\n{total} faults:\n"));
    for (kind, times) in &found.log.faults {
        line(format!("- {kind}: {times}"));
    }
    line("\nAt the end:\n".to_owned());
    let none_or = |what: &[String]| if what.is_empty() { "none".to_owned() } else { what.join("; ") };
    line(format!("- calls in flight in the clients: {}", found.in_flight));
    line(format!("- messages in `work`: {}, in the dead queue: {}", found.work, found.dead.len()));
    line(format!("- queues and connections that should not be there: {}", none_or(&found.leaked)));
    line(format!("- the same after the end of all processes: {}", none_or(&found.left)));
    line(format!("- runs of what the broker had delivered before: {again}"));
    line(format!("- slowest drain of a server: {:.1} s", found.log.slowest_drain.as_secs_f64()));
    line(format!("- longest time in which a client's process was not run: {:?}", Duration::from_millis(history.stall)));
    line(match broken {
        [] => "\nNo promise was broken.".to_owned(),
        broken => format!("\n**Broken promises:**\n\n- {}", broken.join("\n- ")),
    });
    text
}
