//! The process that calls. It records what it sends and how each call ends, measured when the call's future resolves.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hopline::{Client, Error, Published};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};
use tokio_util::task::TaskTracker;

use crate::random::Random;
use crate::record::{Method, Outcome, Records, answer};
use crate::{SERVICE, say};

/// The pause between two calls. Four clients together make about 270 calls a second.
const PERIOD: Duration = Duration::from_millis(15);
/// How long it may take after the last calls have ended until none is counted in flight.
const FORGET: Duration = Duration::from_secs(5);
/// How long publishing an event may take: the client's time-out.
const EVENT_TIMEOUT: Duration = Duration::from_secs(15);
/// The client's setting `blocked_wait`.
const BLOCKED_WAIT: Duration = Duration::from_secs(2);

pub(crate) async fn run(number: u32, url: &str, folder: &Path, seed: u64) {
    let records = Arc::new(Records::create(&folder.join(format!("client-{number}.records"))));
    watch_for_stalls(records.clone());
    let client =
        Client::builder().blocked_wait(BLOCKED_WAIT).timeout(EVENT_TIMEOUT).connect_lazy(url).expect("a good address");
    let mut random = Random::new(seed ^ u64::from(number) << 32);
    let mut orders = BufReader::new(tokio::io::stdin()).lines();
    let calls = TaskTracker::new();
    let mut ticks = interval(PERIOD);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut sequence = 0;
    let order = loop {
        tokio::select! {
            order = orders.next_line() => break order,
            _ = ticks.tick() => {
                sequence += 1;
                let plan = Plan::next(number, sequence, &mut random);
                calls.spawn(plan.carry_out(client.clone(), records.clone()));
            }
        }
    };
    // There is no order: the soak has ended.
    if !matches!(order, Ok(Some(_))) {
        return;
    }
    calls.close();
    calls.wait().await;
    let since = Instant::now();
    while client.in_flight() > 0 && since.elapsed() < FORGET {
        sleep(Duration::from_millis(10)).await;
    }
    say(&format!("stopped {}", client.in_flight()));
    // It stays connected until the next order, or until its input ends.
    let _ = orders.next_line().await;
    client.close().await;
}

/// One call to be made.
struct Plan {
    client: u32,
    sequence: u32,
    method: Method,
    /// How long the handler takes, in milliseconds.
    work: u64,
    deadline: Duration,
    /// When the caller drops it.
    given_up: Option<Duration>,
}

impl Plan {
    fn next(client: u32, sequence: u32, random: &mut Random) -> Self {
        let method = match random.of(0..100) {
            0..10 => Method::Note,
            10..20 => Method::NoteOnce,
            20..30 => Method::Group,
            30..40 => Method::Replay,
            40..65 => Method::Count,
            _ => Method::CountIdempotent,
        };
        let (work, deadline) = match random.of(0..100) {
            0..2 => (random.of(2000..3000), random.of(4000..15_000)),
            2..50 => (random.of(0..5), random.of(2000..15_000)),
            _ => (random.of(0..200), random.of(2000..15_000)),
        };
        let given_up = random.percent(2).then(|| Duration::from_millis(random.of(0..1000)));
        // An event has the client's time-out.
        let deadline = if method.key().is_some() { EVENT_TIMEOUT } else { Duration::from_millis(deadline) };
        Self { client, sequence, method, work, deadline, given_up: given_up.filter(|_| !method.is_oneway()) }
    }

    async fn carry_out(self, client: Client, records: Arc<Records>) {
        let Self { sequence, method, deadline, .. } = self;
        let arguments = (self.client, sequence, self.work);
        let expected = answer((self.client, sequence));
        let call = async {
            if let Some(key) = method.key() {
                return match client.publish(key, &arguments).required().await {
                    Ok(Published::ToAll) => (Outcome::Confirmed, String::new()),
                    Ok(other) => (Outcome::Error(format!("{other:?}")), String::new()),
                    Err(error) => failed(&error),
                };
            }
            if method.is_oneway() {
                return match client.oneway(SERVICE, method.name(), arguments).timeout(deadline).send().await {
                    Ok(()) => (Outcome::Confirmed, String::new()),
                    Err(error) => failed(&error),
                };
            }
            let call = client.call::<u64>(SERVICE, method.name(), arguments).timeout(deadline);
            let call = if method.is_repeatable() { call.idempotent() } else { call };
            match call.await {
                Ok(value) if value == expected => (Outcome::Right, String::new()),
                Ok(value) => (Outcome::Wrong, format!("{value} instead of {expected}")),
                Err(error) => failed(&error),
            }
        };
        let patience = self.given_up.unwrap_or(Duration::MAX);
        records.sent(method, sequence, millis(deadline));
        let since = Instant::now();
        let ended = timeout(patience, call).await;
        let took = since.elapsed();
        let (outcome, detail) = ended.unwrap_or_else(|_| (Outcome::GivenUp, String::new()));
        records.ended(sequence, &outcome, millis(took), &detail);
    }
}

/// The name of an error in the ledger, and its text.
fn failed(error: &Error) -> (Outcome, String) {
    let kind = match error {
        Error::Fault(fault) => fault.code.name(),
        Error::NoService { .. } => "NoService",
        Error::NoSubscriber { .. } => "NoSubscriber",
        Error::Overloaded { .. } => "Overloaded",
        Error::Unreachable { .. } => "Unreachable",
        Error::Blocked { may_have_run: true, .. } => "Blocked, may have run",
        Error::Blocked { may_have_run: false, .. } => "Blocked, not run",
        Error::Timeout { .. } => "Timeout",
        Error::Disconnected { may_have_run: true, .. } => "Disconnected, may have run",
        Error::Disconnected { may_have_run: false, .. } => "Disconnected, not run",
        _ => "another error",
    };
    (Outcome::Error(kind.to_owned()), error.to_string())
}

/// Records when this process was not run for a while: then results are late without anybody's fault.
fn watch_for_stalls(records: Arc<Records>) {
    const NAP: Duration = Duration::from_millis(50);
    std::thread::spawn(move || {
        loop {
            let since = Instant::now();
            std::thread::sleep(NAP);
            let over = since.elapsed().saturating_sub(NAP);
            if over > Duration::from_millis(200) {
                records.stalled(millis(over));
            }
        }
    });
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).expect("nothing takes that long")
}
