//! The example `outbox` as processes that are killed: each order that was committed has its event, and nothing else has one.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use hopline::topology::{Binding, Declaration, Exchange, ExchangeKind, Queue, QueueKind};
use hopline::transport::{Confirm, Mode, Properties, Publication, Role, Settle, Transport};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};
use tokio::time::sleep;
use uuid::Uuid;

use super::programs::{example, soon};
use super::rabbit;

const KILLS: u64 = 200;
/// The key of what the test itself publishes when all is done.
const END: &str = "the.end";

/// Marsaglia's xorshift. `HOPLINE_TEST_SEED` sets its beginning.
struct Random(u64);

impl Random {
    fn new() -> Self {
        let given = std::env::var("HOPLINE_TEST_SEED").ok();
        let seed = given.map_or_else(|| Uuid::new_v4().as_u64_pair().0, |seed| seed.parse().expect("a whole number"));
        println!("HOPLINE_TEST_SEED={seed}");
        Self(seed | 1)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % bound
    }
}

/// A process of the example. It goes on until it is killed.
struct Running {
    process: Child,
    lines: Lines<BufReader<ChildStdout>>,
    printed: Vec<String>,
}

impl Running {
    fn start(mut command: Command) -> Self {
        let mut process = command.stdout(Stdio::piped()).spawn().expect("it can be run");
        let lines = BufReader::new(process.stdout.take().expect("it is piped")).lines();
        Self { process, lines, printed: Vec::new() }
    }

    async fn line(&mut self) {
        let line = self.lines.next_line().await.expect("it prints text");
        self.printed.push(line.expect("it does not end by itself"));
    }

    /// Waits until this process has printed so many lines. The other one is read as well: with a full pipe it would stop.
    async fn has_printed(&mut self, lines: u64, other: &mut Self) {
        let enough = async {
            while (self.printed.len() as u64) < lines {
                tokio::select! {
                    () = self.line() => {}
                    () = other.line() => {}
                }
            }
        };
        soon(enough).await;
    }

    /// Kills it, and returns all that it has printed.
    async fn killed(&mut self) -> Vec<String> {
        self.process.start_kill().expect("it has not ended");
        while let Some(line) = soon(self.lines.next_line()).await.expect("it prints text") {
            self.printed.push(line);
        }
        let status = soon(self.process.wait()).await.expect("it can be waited for");
        assert_eq!(status.code(), None, "it has ended by itself");
        std::mem::take(&mut self.printed)
    }
}

fn outbox(mode: &str, database: &Path, arguments: &[&str]) -> Command {
    let mut command = example("outbox");
    command.arg(mode).arg("--db").arg(database).args(arguments);
    command
}

async fn printed(mut command: Command) -> Vec<String> {
    let output = soon(command.output()).await.expect("it can be run");
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).expect("text").lines().map(str::to_owned).collect()
}

/// The orders and ids of the events in a message.
fn events(mut body: &[u8]) -> Vec<(String, String)> {
    let mut events = Vec::new();
    while !body.is_empty() {
        let number = |at: usize| u32::from_be_bytes(body[at..at + 4].try_into().expect("4 bytes")) as usize;
        let (from, to) = (32 + number(24), 32 + number(24) + number(28));
        let event: Value = serde_json::from_slice(&body[from..to]).expect("the relay sends JSON");
        let text = |name: &str| event[name].as_str().expect("a text").to_owned();
        events.push((text("order"), text("event_id")));
        body = &body[to..];
    }
    events
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: HOPLINE_TEST_URL"]
async fn each_committed_order_has_its_event_whenever_the_outbox_is_killed() {
    let url = rabbit();
    let mut random = Random::new();
    let namespace = format!("outbox-{}", Uuid::new_v4().simple());
    let (exchange, queue) = (format!("{namespace}.events"), format!("{namespace}.all"));

    // A subscriber that keeps every copy. Its queue lives as long as its connection.
    let transport = Transport::connect(&url, Role::Client).await.expect("the broker is there");
    let declared = [
        Declaration::Exchange(Exchange { name: exchange.clone(), kind: ExchangeKind::Topic }),
        Declaration::Queue(Queue::new(&queue, QueueKind::Exclusive)),
        Declaration::Binding(Binding { exchange: exchange.clone(), queue: queue.clone(), key: "#".to_owned() }),
    ];
    transport.declare(&declared).await.expect("declared");
    let mut messages = transport.consume(&queue, Mode::Settle { prefetch: 1000 }).await.expect("it is ours");
    let copies = tokio::spawn(async move {
        let mut copies = Vec::new();
        loop {
            let message = messages.next().await.expect("the connection stays");
            if message.key == END {
                return copies;
            }
            copies.extend(events(&message.body));
            message.settle(Settle::Ack);
        }
    });

    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(&namespace);
    std::fs::create_dir(&folder).expect("it is new");
    let database = folder.join("shop.db");
    let orders = || Running::start(outbox("orders", &database, &["--count", "1000000"]));
    let relay = |arguments: &[&str]| {
        let mut command = outbox("relay", &database, arguments);
        command.env("HOPLINE_URL", &url).env("HOPLINE_NAMESPACE", &namespace);
        command
    };
    let (mut writing, mut relaying) = (orders(), Running::start(relay(&[])));
    let (mut writers_killed, mut said) = (0, Vec::new());
    for _ in 0..KILLS {
        let kills_writer = random.below(2) == 0;
        let (victim, other) = if kills_writer { (&mut writing, &mut relaying) } else { (&mut relaying, &mut writing) };
        // Some are killed while they begin: they open the database, and connect.
        let begins = random.below(4) == 0;
        let lines = if begins { 0 } else { victim.printed.len() as u64 + 1 + random.below(30) };
        victim.has_printed(lines, other).await;
        // This decides nothing. It spreads the kills over all that the process does between two lines.
        sleep(Duration::from_micros(random.below(if begins { 50_000 } else { 8_000 }))).await;
        if kills_writer {
            writers_killed += 1;
            said.extend(writing.killed().await);
            writing = orders();
        } else {
            relaying.killed().await;
            relaying = Running::start(relay(&[]));
        }
    }
    said.extend(writing.killed().await);
    relaying.killed().await;

    // What is left is published in peace.
    printed(relay(&["--once"])).await;
    let end = Publication {
        exchange,
        key: END.to_owned(),
        mandatory: true,
        properties: Properties::default(),
        body: Vec::new().into(),
    };
    assert_eq!(soon(transport.publish(end)).await, Ok(Confirm::Accepted));
    let copies = soon(copies).await.expect("all have come");
    transport.close().await;

    let listed = printed(outbox("ls", &database, &[])).await;
    let orders: Option<BTreeSet<_>> = listed.iter().map(|line| line.strip_prefix("order ")).collect();
    let orders = orders.unwrap_or_else(|| panic!("the outbox is not empty: {listed:?}"));
    let mut ids: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for (order, id) in &copies {
        ids.entry(order).or_default().insert(id);
    }
    let told: BTreeSet<_> = ids.keys().copied().collect();
    let lost = orders.difference(&told).count();
    assert_eq!(lost, 0, "of {} orders and {} copies: these events are lost", orders.len(), copies.len());
    assert_eq!(told.difference(&orders).count(), 0, "there are no such orders");
    assert!(ids.values().all(|ids| ids.len() == 1), "all copies of an event have its id");
    println!(
        "{KILLS} kills, {writers_killed} of them of the writer: {} orders, {} copies too many",
        orders.len(),
        copies.len() - orders.len(),
    );
    for line in &said {
        let (what, order) = line.rsplit_once(' ').expect("what has become of an order");
        assert_eq!(what == "committed", told.contains(order), "{line}");
    }
    std::fs::remove_dir_all(&folder).expect("it is there");
}
