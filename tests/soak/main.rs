//! A long proof that nothing is lost, that nothing hangs, and that every error tells the truth. `scripts/soak` runs it.
//!
//! It starts RabbitMQ, and servers and clients as processes, each behind a proxy. Then it breaks all of them, in an
//! order that a seed decides. At the end it compares what the clients and the servers have recorded.

mod chaos;
mod client;
mod ledger;
#[path = "../cluster/mod.rs"]
mod cluster;
#[path = "../node/mod.rs"]
mod node;
mod process;
#[path = "../proxy/mod.rs"]
mod proxy;
mod random;
mod record;
mod server;

use std::collections::HashSet;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::exit;
use std::time::{Duration, Instant};

use hopline::transport::{Mode, Role as Direction, Transport};
use tokio::runtime::{Builder, Runtime};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{sleep, timeout};

use crate::cluster::Cluster;
use crate::ledger::Found;
use crate::node::Node;
use crate::process::{Crew, Role};
use crate::record::{History, Id};

/// The service that is called.
const SERVICE: &str = "soak";
/// How many servers there are, and how many clients.
const EACH: usize = 4;
/// How long the last calls may take to end. The longest deadline is 15 s.
const LAST_CALLS: Duration = Duration::from_secs(60);
/// How long the broker's listings may take to show what has happened.
const LISTINGS: Duration = Duration::from_secs(120);

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let status = match *arguments {
        ["server", number, url, _, queues, folder] => {
            log();
            runtime().block_on(server::run(parsed(number), url, Queues::named(queues), Path::new(folder)));
            0
        }
        ["client", number, url, seed, _, folder] => {
            log();
            runtime().block_on(client::run(parsed(number), url, Path::new(folder), parsed(seed)));
            0
        }
        ["run", seconds, seed, version, nodes, folder] => runtime().block_on(async {
            let folder = PathBuf::from(folder);
            let broker = match nodes {
                "3" => Broker::Cluster(Cluster::with(version, chaos::IMPATIENT).await),
                _ => Broker::Node([Node::with(version, chaos::IMPATIENT, &[], &[]).await]),
            };
            for node in broker.nodes() {
                chaos::make_impatient(node).await;
            }
            let ended = tokio::select! {
                ended = soak(parsed(seconds), parsed(seed), version, &broker, &folder) => ended,
                () = interrupted() => 130,
            };
            drop(broker);
            // `scripts/soak` may have put a copy of this program here. It is large, and of no use for the analysis.
            let _ = fs::remove_file(folder.join("soak"));
            ended
        }),
        _ => {
            eprintln!("this is run by scripts/soak");
            2
        }
    };
    // Returning would drop the runtime, which waits for the threads that read an input.
    exit(status);
}

/// What is served and called by way of.
#[derive(Debug)]
enum Broker {
    Node([Node; 1]),
    Cluster(Cluster),
}

impl Broker {
    fn nodes(&self) -> &[Node] {
        match self {
            Self::Node(nodes) => nodes,
            Self::Cluster(cluster) => &cluster.nodes,
        }
    }

    /// One of the nodes. Ask for it only while all of them run.
    fn node(&self) -> &Node {
        &self.nodes()[0]
    }

    /// Waits until all nodes know that the others run.
    async fn is_complete(&self) {
        match self {
            Self::Node(_) => {}
            Self::Cluster(cluster) => cluster.is_whole().await,
        }
    }

    /// Lets nothing pass between a node and the others, until [`heal`](Self::heal).
    fn cut_off(&self, node: usize) {
        if let Self::Cluster(cluster) = self {
            cluster.cut_off(node);
        }
    }

    fn heal(&self) {
        if let Self::Cluster(cluster) = self {
            cluster.heal();
        }
    }

    /// What kind of queue the calls use. In a cluster it is a quorum queue: a classic one would be unavailable as long
    /// as its node is.
    fn queues(&self) -> Queues {
        match self {
            Self::Node(_) => Queues::Classic,
            Self::Cluster(_) => Queues::Quorum,
        }
    }
}

/// What kind of queue the calls of the service wait in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Queues {
    Classic,
    Quorum,
}

impl Queues {
    fn name(self) -> &'static str {
        match self {
            Self::Classic => "classic",
            Self::Quorum => "quorum",
        }
    }

    fn named(name: &str) -> Self {
        [Self::Classic, Self::Quorum].into_iter().find(|queues| queues.name() == name).expect("our own process says it")
    }
}

/// It has more threads than needed, so that one that writes to a slow disk holds up no result.
fn runtime() -> Runtime {
    Builder::new_multi_thread().worker_threads(8).enable_all().build().expect("threads can be had")
}

fn log() {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "hopline=info".into());
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false).with_writer(std::io::stderr).init();
}

fn parsed<T: std::str::FromStr>(text: &str) -> T {
    text.parse().unwrap_or_else(|_| panic!("`{text}` is not a number"))
}

async fn interrupted() {
    let mut terminated = signal(SignalKind::terminate()).expect("signals can be handled");
    tokio::select! {
        _ = tokio::signal::ctrl_c() => {}
        _ = terminated.recv() => {}
    }
    eprintln!("interrupted");
}

/// Prints a line for the process that started this one.
fn say(line: &str) {
    // It may have ended.
    let _ = writeln!(std::io::stdout(), "{line}");
}

async fn soak(seconds: u64, seed: u64, version: &str, broker: &Broker, folder: &Path) -> i32 {
    let since = Instant::now();
    let of_broker = broker.node().ctl(&["version"]).await;
    let commit = std::env::var("SOAK_COMMIT").unwrap_or_else(|_| "unknown".to_owned());
    let versions = format!(
        "hopline {} at {commit}, RabbitMQ {} (asked for: {version}){}, debug build",
        env!("CARGO_PKG_VERSION"),
        of_broker.trim(),
        match broker {
            Broker::Node(_) => "",
            Broker::Cluster(_) => " on three nodes, the service `.quorum()`",
        },
    );
    println!("seed {seed}, {seconds} s, {versions}; files in {}", folder.display());
    let crew = Crew::start(EACH, broker, seed, folder).await;
    let log = chaos::run(seed, Duration::from_secs(seconds), broker, &crew).await;
    let minutes = since.elapsed().as_secs_f64() / 60.0;
    println!("all is healed; the load ends");
    let mut found = Found {
        seed,
        minutes,
        versions,
        log,
        dead: HashSet::new(),
        work: 0,
        in_flight: 0,
        unended: Vec::new(),
        leaked: Vec::new(),
        left: Vec::new(),
    };
    close(&mut found, broker, &crew, folder).await;
    let (text, broken) = ledger::write(&found, &History::read(folder));
    fs::write(folder.join("ledger.md"), &text).expect("the disk has room");
    println!("\n{text}");
    i32::from(!broken.is_empty())
}

/// Ends the load, then the processes, and checks each time what is left.
async fn close(found: &mut Found, broker: &Broker, crew: &Crew, folder: &Path) {
    let broker = broker.node();
    for process in &crew.processes {
        found.log.ended.extend(process.lock().await.ended_by_itself());
    }
    for slot in 0..EACH {
        crew.client(slot).lock().await.tell("stop").await;
    }
    for slot in 0..EACH {
        let mut client = crew.client(slot).lock().await;
        match client.says(LAST_CALLS).await.as_deref().and_then(|line| line.strip_prefix("stopped ")) {
            Some(in_flight) => found.in_flight += parsed::<usize>(in_flight),
            None => found.unended.push(client.name()),
        }
    }
    println!("all calls have ended");
    found.work = until(async || work(broker).await, |work| *work == 0).await;
    // Those that are not handled by then are lost, which the ledger tells.
    until(async || History::read(folder).unhandled(), |unhandled| *unhandled == 0).await;
    found.leaked = until(async || unexpected(broker, EACH).await, Vec::is_empty).await;
    println!("the processes end");
    for slot in 0..EACH {
        let mut server = crew.server(slot).lock().await;
        match server.terminate(LAST_CALLS).await {
            Some(took) => found.log.slowest_drain = found.log.slowest_drain.max(took),
            None => found.log.stuck.push(server.name()),
        }
        let mut client = crew.client(slot).lock().await;
        if !client.dismiss(LAST_CALLS).await {
            found.log.stuck.push(client.name());
        }
    }
    found.left = until(async || unexpected(broker, 0).await, Vec::is_empty).await;
    found.dead = dead(broker).await;
}

/// Asks again and again, until the answer is `as_expected` or the time is over. Returns the last answer.
async fn until<T>(ask: impl AsyncFn() -> T, as_expected: impl Fn(&T) -> bool) -> T {
    let since = Instant::now();
    loop {
        let answer = ask().await;
        if as_expected(&answer) || since.elapsed() > LISTINGS {
            return answer;
        }
        sleep(Duration::from_millis(500)).await;
    }
}

/// How many messages are in the `work` queues of the service and its groups, with those that are delivered and not acknowledged.
async fn work(broker: &Node) -> u64 {
    let queues = broker.queues().await;
    let work = queues.iter().filter(|queue| queue.name.ends_with(".work"));
    work.map(|queue| queue.messages).sum()
}

/// How the queues and connections at the broker differ from those that `each` servers and clients should have.
async fn unexpected(broker: &Node, each: usize) -> Vec<String> {
    let (queues, connections) = (broker.queues().await, broker.connections().await);
    let durable = [
        "soak.v1.calls",
        "soak.v1.work",
        "soak.v1.dead",
        "group:soak.work",
        "group:soak.dead",
        "group:replayed.work",
        "group:replayed.dead",
        "group:replayed.turn",
        "group:replayed.offset",
        "kept:soak.replay",
    ]
    .map(|name| format!("hopline.{name}"));
    let own = [
        (Role::Server, "hopline.soak.v1@"),
        (Role::Server, "hopline.group:soak@"),
        (Role::Server, "hopline.group:replayed@"),
        (Role::Client, "hopline.reply@"),
    ];
    let mut unexpected = Vec::new();
    for (role, name) in own {
        let there: Vec<_> = queues.iter().map(|queue| &*queue.name).filter(|queue| queue.starts_with(name)).collect();
        if there.len() != each {
            unexpected.push(format!("{} queues of {each} {}s: {}", there.len(), role.name(), there.join(", ")));
        }
    }
    // The catalogue and the queues for what failed stay.
    for queue in &queues {
        let stays = durable.contains(&queue.name) || queue.name == "hopline.services" || queue.name.ends_with(".retry");
        let known = stays || own.iter().any(|(_, name)| queue.name.starts_with(name));
        if !known {
            unexpected.push(format!("the queue {}", queue.name));
        }
    }
    // The queue for calls is deleted 60 s after the last server has ended, so it may be there or not.
    for name in &durable[usize::from(each == 0)..] {
        if !queues.iter().any(|queue| queue.name == *name) {
            unexpected.push(format!("the queue {name} is missing"));
        }
    }
    // A server has two connections and one for the stream, a client one.
    if connections.len() != 4 * each {
        let names: Vec<_> = connections.iter().map(|connection| &*connection.name).collect();
        unexpected.push(format!("{} connections instead of {}: {}", names.len(), 4 * each, names.join(", ")));
    }
    unexpected
}

/// The oneway calls and events in the queues of dead letters.
async fn dead(broker: &Node) -> HashSet<Id> {
    let mut dead = HashSet::new();
    for owner in ["soak.v1", "group:soak", "group:replayed"] {
        dead.extend(dead_of(broker, owner).await);
    }
    dead
}

async fn dead_of(broker: &Node, owner: &str) -> HashSet<Id> {
    let transport = Transport::connect(broker.url(), Direction::Client).await.expect("the broker is there");
    let mut queue = transport.consume(&format!("hopline.{owner}.dead"), Mode::NoAck).await.expect("the queue is there");
    let mut dead = HashSet::new();
    // The listing does not tell how many are on their way, but they arrive at once.
    while let Ok(Some(delivery)) = timeout(Duration::from_secs(3), queue.next()).await {
        let mut body = &delivery.body[..];
        while !body.is_empty() {
            let length = |at: usize| u32::from_be_bytes(body[at..at + 4].try_into().expect("4 bytes")) as usize;
            let (start, end) = (32 + length(24), 32 + length(24) + length(28));
            let (client, sequence, _) = serde_cbor::from_slice::<(u32, u32, u64)>(&body[start..end]).expect("our own");
            dead.insert((client, sequence));
            body = &body[end..];
        }
    }
    transport.close().await;
    dead
}
