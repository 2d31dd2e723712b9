//! Records the outcome of each call of a load, and sums them up for the time in which a node was missing.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use hopline::{Error, Published, State};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use super::load::DEADLINE;
use super::table::{Counts, Row};
use crate::node::version;

/// How much later than its deadline a call may end. The same time without running counts as a stall of this process.
const GRACE: Duration = Duration::from_secs(1);
/// How long before the loss of a node is noticed something may have been lost with it.
const BEFORE: Duration = Duration::from_secs(1);
/// How long it may take until all nodes of a busy machine see a binding. RabbitMQ 3.10 took up to 0.9 s.
const SEEN: Duration = Duration::from_secs(5);
/// How often the control looks at the clock. If it is later than this, that is a stall.
const TICK: Duration = Duration::from_millis(10);
const LATE: Duration = Duration::from_millis(50);

/// Where the calls of a service wait. Unless the variant says otherwise, all nodes have instances and callers of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    Quorum,
    /// In a classic queue on this node.
    On(usize),
    /// In a classic queue. The queue, the instances and the callers are all at other nodes than this.
    Apart {
        from: usize,
    },
    /// In a classic queue that will become a quorum queue.
    Changing,
}

/// What is missing for a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lost {
    Node(usize),
    /// The instances of one service.
    Instances(Place),
}

/// What kind of call it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// A call of an idempotent method.
    Get,
    /// A call of a method that is not idempotent.
    Once,
    /// A oneway call.
    Note,
    /// A oneway call that can only become a dead letter.
    Bad,
}

/// How a service depends on what is missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Tie {
    Quorum,
    /// Its calls are on the missing node, or its instances are missing.
    OnIt,
    /// Its calls are elsewhere, but an instance and callers are at the missing node.
    Elsewhere,
    /// Nothing of it is at the missing node.
    Apart,
}

#[derive(Debug)]
pub(super) struct Call {
    place: Place,
    pub(super) kind: Kind,
    sent: Instant,
    end: Option<(Instant, Result<(), Failure>)>,
    runs: u32,
    kept: bool,
}

#[derive(Debug, Clone)]
pub(super) struct Failure {
    pub(super) what: String,
    may_have_run: bool,
}

#[derive(Debug)]
struct Event {
    from: usize,
    sent: Instant,
    /// When and how its publication ended. Until then it may be waiting at its client, and it may leave at any time.
    end: Option<(Instant, Result<Published, String>)>,
    heard: [bool; 3],
}

/// A time in which something was missing, until everything was `Ready` again.
#[derive(Debug)]
struct Outage {
    lost: Lost,
    from: Instant,
    until: Option<Instant>,
    ready_after: Duration,
}

#[derive(Debug)]
pub(super) struct Ledger {
    places: Vec<Place>,
    records: Mutex<Records>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct Records {
    calls: Vec<Call>,
    events: Vec<Event>,
    outages: Vec<Outage>,
    /// The times in which a subscriber had no connection.
    away: Vec<(usize, Instant, Instant)>,
    /// What the states of the subscribers' servers became, and when.
    states: Vec<(usize, Instant, String)>,
    /// The times in which this process did not run.
    stalls: Vec<(Instant, Instant)>,
}

impl Ledger {
    pub(super) fn new(places: Vec<Place>) -> Arc<Self> {
        Arc::new(Self { places, records: Mutex::default(), changed: Notify::new() })
    }

    pub(super) fn places(&self) -> &[Place] {
        &self.places
    }

    fn records(&self) -> MutexGuard<'_, Records> {
        self.records.lock().expect("no panic while holding it")
    }

    /// Records that a call of the service with this place is made. Returns its number.
    pub(super) fn sends(&self, place: Place, kind: Kind) -> usize {
        let calls = &mut self.records().calls;
        calls.push(Call { place, kind, sent: Instant::now(), end: None, runs: 0, kept: false });
        calls.len() - 1
    }

    pub(super) fn runs(&self, number: usize) {
        self.records().calls[number].runs += 1;
        self.changed.notify_one();
    }

    pub(super) fn ends(&self, number: usize, outcome: Result<(), Error>) {
        let end = Some((Instant::now(), outcome.map_err(|error| Failure::of(&error))));
        self.records().calls[number].end = end;
    }

    pub(super) fn publishes(&self, from: usize) -> usize {
        let events = &mut self.records().events;
        events.push(Event { from, sent: Instant::now(), end: None, heard: [false; 3] });
        events.len() - 1
    }

    pub(super) fn is_published(&self, number: usize, outcome: Result<Published, Error>) {
        let end = Some((Instant::now(), outcome.map_err(|error| Failure::of(&error).what)));
        self.records().events[number].end = end;
    }

    pub(super) fn hears(&self, number: usize, node: usize) {
        self.records().events[number].heard[node] = true;
        self.changed.notify_one();
    }

    pub(super) fn loses(&self, lost: Lost) {
        let outage = Outage { lost, from: Instant::now(), until: None, ready_after: Duration::ZERO };
        self.records().outages.push(outage);
    }

    /// Records that the missing node came back at `since`, and that everything is `Ready` now.
    pub(super) fn is_back(&self, since: Instant) {
        let mut records = self.records();
        let outage = records.outages.last_mut().expect("one was lost");
        (outage.until, outage.ready_after) = (Some(Instant::now()), since.elapsed());
    }

    /// Records the states of the subscriber at a node, and the times in which it has no connection.
    pub(super) async fn watch(&self, node: usize, mut state: watch::Receiver<State>) {
        let mut away_since = None;
        loop {
            let (now, is) = (Instant::now(), state.borrow_and_update().clone());
            self.has_state(node, now, &is, &mut away_since);
            // This ends with the server.
            if state.changed().await.is_err() {
                return;
            }
        }
    }

    fn has_state(&self, node: usize, now: Instant, state: &State, away_since: &mut Option<Instant>) {
        let mut records = self.records();
        records.states.push((node, now, format!("{state:?}")));
        if matches!(state, State::Reconnecting { .. }) {
            away_since.get_or_insert(now);
        } else if let Some(since) = away_since.take() {
            records.away.push((node, since, now));
        }
    }

    /// Records the times in which this process does not run.
    pub(super) async fn control(&self, stop: &CancellationToken) {
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut last = Instant::now();
        while !stop.is_cancelled() {
            tick.tick().await;
            if last.elapsed() > TICK + LATE {
                self.records().stalls.push((last + TICK, Instant::now()));
            }
            last = Instant::now();
        }
    }

    /// Waits until all confirmed oneway calls have run.
    pub(super) async fn is_run(&self) {
        while self.records().not_run() > 0 {
            self.changed.notified().await;
        }
    }

    /// Waits until all confirmed events have reached all subscribers that are running.
    pub(super) async fn is_heard(&self) {
        while self.records().missed().next().is_some() {
            self.changed.notified().await;
        }
    }

    /// Records that these calls of a service are dead letters. Returns whether that is all of them.
    pub(super) fn keeps(&self, place: Place, letters: impl Iterator<Item = usize>) -> bool {
        let calls = &mut self.records().calls;
        for number in letters {
            calls[number].kept = true;
        }
        let is_lost = |call: &&Call| call.place == place && call.is_unkept();
        !calls.iter().any(|call| is_lost(&call))
    }

    pub(super) fn row(&self, what: &str) -> Row {
        self.records().row(what, &self.places)
    }
}

impl Failure {
    fn of(error: &Error) -> Self {
        let (what, may_have_run) = match error {
            Error::Fault(fault) => (fault.code.name(), true),
            Error::NoService { .. } => ("NoService", false),
            Error::Overloaded { .. } => ("Overloaded", false),
            Error::Unreachable { .. } => ("Unreachable", false),
            Error::Blocked { may_have_run, .. } => ("Blocked", *may_have_run),
            Error::Disconnected { may_have_run, .. } => ("Disconnected", *may_have_run),
            Error::Timeout { why, .. } => ("Timeout", why.may_have_run()),
            other => panic!("no fault of a cluster ends a call like this: {other}"),
        };
        Self { what: what.to_owned(), may_have_run }
    }
}

impl Call {
    fn is_confirmed(&self) -> bool {
        matches!(self.end, Some((_, Ok(()))))
    }

    pub(super) fn failure(&self) -> Option<&Failure> {
        self.end.as_ref().and_then(|(_, outcome)| outcome.as_ref().err())
    }

    /// Whether it was confirmed and should be a dead letter, but is not.
    fn is_unkept(&self) -> bool {
        self.kind == Kind::Bad && self.is_confirmed() && !self.kept
    }

    fn has_reply(&self) -> bool {
        matches!(self.kind, Kind::Get | Kind::Once)
    }
}

impl Event {
    /// When its publication ended.
    fn ended(&self) -> Instant {
        self.end.as_ref().map_or(self.sent, |&(ended, _)| ended)
    }
}

impl Outage {
    fn tie(&self, place: Place) -> Tie {
        match (place, self.lost) {
            (Place::On(node), Lost::Node(lost)) if node == lost => Tie::OnIt,
            (Place::Apart { from }, Lost::Node(lost)) if from == lost => Tie::Apart,
            (place, Lost::Instances(lost)) if place == lost => Tie::OnIt,
            // It has become a quorum queue before any node is lost.
            (Place::Quorum, _) | (Place::Changing, Lost::Node(_)) => Tie::Quorum,
            (Place::On(_) | Place::Apart { .. } | Place::Changing, _) => Tie::Elsewhere,
        }
    }

    fn node(&self) -> Option<usize> {
        if let Lost::Node(node) = self.lost { Some(node) } else { None }
    }

    fn until(&self) -> Instant {
        self.until.expect("it is waited for")
    }

    /// Whether a call that was sent then may have met the outage.
    fn has_met(&self, sent: Instant) -> bool {
        self.from <= sent + DEADLINE && self.until.is_none_or(|until| sent <= until)
    }
}

impl Records {
    fn not_run(&self) -> usize {
        self.calls.iter().filter(|call| call.kind == Kind::Note && call.is_confirmed() && call.runs == 0).count()
    }

    /// The confirmed events that a subscriber did not get although its connection was there, each with that subscriber.
    fn missed(&self) -> impl Iterator<Item = (&Event, usize)> {
        self.events.iter().flat_map(|event| {
            let (sent, from) = (event.sent, event.from);
            let ended = event.ended();
            // It left at some time between these two: it waits at its client while the queues of others confirm nothing.
            let has_met = |outage: &&Outage| outage.from <= ended && outage.until.is_none_or(|until| sent <= until);
            let outages: Vec<_> = self.outages.iter().filter(has_met).filter_map(Outage::node).collect();
            let is_taken = match event.end {
                Some((_, Ok(Published::ToAll))) => true,
                // A subscriber that was cut off itself does not know who else is running.
                Some((_, Ok(_))) => !outages.contains(&from),
                Some((_, Err(_))) | None => false,
            };
            // The other nodes see its new bindings a moment later.
            let went = |&(node, from, until): &(usize, Instant, Instant)| {
                (from - BEFORE <= ended && sent <= until + SEEN).then_some(node)
            };
            let away: Vec<_> = self.away.iter().filter_map(went).chain(outages).collect();
            (0..3)
                .filter(move |node| is_taken && !away.contains(node) && !event.heard[*node])
                .map(move |node| (event, node))
        })
    }

    /// Which events were missed by whom, who had no connection when, and the states of the subscribers' servers, in
    /// seconds after the first outage began. Empty if none was missed.
    fn missed_in_words(&self) -> String {
        let begin = self.outages.first().map(|outage| outage.from).or(self.events.first().map(|event| event.sent));
        let Some(begin) = begin else { return String::new() };
        let at = |time: Instant| match time.checked_duration_since(begin) {
            Some(after) => after.as_secs_f64(),
            None => -begin.duration_since(time).as_secs_f64(),
        };
        let mut groups = BTreeMap::<(usize, usize), Vec<(f64, f64)>>::new();
        for (event, node) in self.missed() {
            groups.entry((event.from, node)).or_default().push((at(event.sent), at(event.ended())));
        }
        if groups.is_empty() {
            return String::new();
        }
        let groups = groups.iter().map(|((from, to), times)| {
            let sent = (times[0].0, times[times.len() - 1].0);
            let ended = times.iter().fold((f64::MAX, f64::MIN), |(min, max), &(_, end)| (min.min(end), max.max(end)));
            format!(
                "{} of the client at node {from} to the subscriber at node {to}, published {:.1} s to {:.1} s, confirmed {:.1} s to {:.1} s",
                times.len(), sent.0, sent.1, ended.0, ended.1
            )
        });
        let away = self.away.iter().map(|&(node, from, until)| {
            format!("the subscriber at node {node} had no connection from {:.1} s to {:.1} s", at(from), at(until))
        });
        let back = self
            .outages
            .iter()
            .filter_map(|outage| outage.until)
            .map(|until| format!("all was `Ready` at {:.1} s", at(until)));
        let states = self
            .states
            .iter()
            .map(|(node, time, state)| format!("the server at node {node} became {state} at {:.1} s", at(*time)));
        groups.chain(away).chain(back).chain(states).collect::<Vec<_>>().join("; ")
    }

    /// For how long between these times this process did not run.
    fn stalled(&self, from: Instant, until: Instant) -> Duration {
        let part = |&(since, end): &(Instant, Instant)| end.min(until).saturating_duration_since(since.max(from));
        self.stalls.iter().map(part).sum()
    }

    /// Whether this process ran during a call. Otherwise its failure tells nothing of the service.
    fn had_its_time(&self, call: &Call) -> bool {
        call.end.as_ref().is_none_or(|&(ended, _)| self.stalled(call.sent, ended) <= GRACE)
    }

    fn row(&self, what: &str, places: &[Place]) -> Row {
        let mut ties = BTreeMap::<Tie, Counts>::new();
        for outage in &self.outages {
            for &place in places {
                let counts = ties.entry(outage.tie(place)).or_default();
                counts.gap = counts.gap.max(self.gap(place, outage));
                for call in self.calls.iter().filter(|call| call.place == place && outage.has_met(call.sent)) {
                    counts.add(call, self.had_its_time(call));
                }
            }
        }
        let unmet = |call: &&Call| !self.outages.iter().any(|outage| outage.has_met(call.sent));
        let mut calm = Counts::default();
        self.calls.iter().filter(unmet).for_each(|call| calm.add(call, self.had_its_time(call)));
        let count = |is_so: &dyn Fn(&Call) -> bool| self.calls.iter().filter(|call| is_so(call)).count();
        let said_not_to_have = |call: &Call| call.failure().is_some_and(|failure| !failure.may_have_run);
        let is_late = |call: &Call| {
            call.end.as_ref().is_none_or(|&(ended, _)| {
                let took = ended.saturating_duration_since(call.sent);
                took.saturating_sub(self.stalled(call.sent, ended)) > DEADLINE + GRACE
            })
        };
        let events = |is_so: fn(&Result<Published, String>) -> bool| {
            self.events.iter().filter_map(|event| event.end.as_ref()).filter(|(_, outcome)| is_so(outcome)).count()
        };
        Row {
            what: what.to_owned(),
            version: version(),
            ties,
            calm,
            confirmed: count(&|call| call.kind == Kind::Note && call.is_confirmed()),
            lost: self.not_run(),
            dead: count(&|call| call.kind == Kind::Bad && call.is_confirmed()),
            dead_lost: count(&Call::is_unkept),
            events: (
                events(|outcome| matches!(outcome, Ok(Published::ToAll))),
                events(|outcome| matches!(outcome, Ok(Published::NotToAll))),
                events(Result::is_err),
            ),
            events_missed: self.missed().count(),
            missed: self.missed_in_words(),
            run_twice: count(&|call| call.kind == Kind::Once && call.runs > 1),
            lied: count(&|call| said_not_to_have(call) && call.runs > 0),
            late: count(&is_late),
            ready_after: self.outages.iter().map(|outage| outage.ready_after).max().unwrap_or_default(),
            stalled: self.stalls.iter().map(|(from, until)| *until - *from).sum(),
        }
    }

    /// The longest time between two answers of a service around an outage, without the times in which this process did
    /// not run.
    fn gap(&self, place: Place, outage: &Outage) -> Duration {
        let (from, until) = (outage.from - BEFORE, outage.until() + BEFORE);
        let answers = self.calls.iter().filter(|call| call.place == place && call.has_reply() && call.is_confirmed());
        let answered = answers.filter_map(|call| call.end.as_ref().map(|(ended, _)| *ended));
        let times: BTreeSet<_> = answered.filter(|time| (from..until).contains(time)).chain([from, until]).collect();
        let gaps = times.iter().zip(times.iter().skip(1));
        let gaps = gaps.map(|(&one, &next)| (next - one).saturating_sub(self.stalled(one, next)));
        gaps.max().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn an_event_that_the_broker_confirms_late_may_come_when_a_subscriber_is_away() {
        let (sent, second) = (Instant::now(), Duration::from_secs(1));
        let missed = |confirmed: u32| {
            let end = Some((sent + second * confirmed, Ok(Published::ToAll)));
            let event = Event { from: 0, sent, end, heard: [true, false, true] };
            let away = vec![(1, sent + 12 * second, sent + 14 * second)];
            Records { events: vec![event], away, ..Records::default() }.missed().count()
        };
        assert_eq!([1, 10].map(missed), [1, 1], "the subscriber was there until after the event was confirmed");
        assert_eq!([11, 13].map(missed), [0, 0]);
    }
}
