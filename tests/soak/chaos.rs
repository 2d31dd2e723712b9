//! Chaos: what is broken, and when. The seed alone decides.

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, Instant};

use futures::future::join_all;
use tokio::sync::Mutex;
use tokio::time::sleep;

use crate::Broker;
use crate::node::{Alarm, Node};
use crate::process::Crew;
use crate::proxy::Proxy;
use crate::random::Random;

/// How long a server may take to drain. Its handlers take at most 3 s.
const DRAIN: Duration = Duration::from_secs(60);

/// What can be broken. The `work` queue is never deleted: an operator who does that throws the calls in it away.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Fault {
    KillServer { slot: usize, back_after: Duration },
    DrainServer { slot: usize, back_after: Duration },
    KillClient { slot: usize, back_after: Duration },
    KillNode { node: usize, back_after: Duration },
    StopNode { node: usize, back_after: Duration },
    SuspendNode { node: usize, lasts: Duration },
    CutOffNode { node: usize, lasts: Duration },
    CloseConnections,
    DeleteReplyQueues,
    DeleteCallsQueue,
    DeleteExchange { which: usize },
    DeleteBinding { which: usize },
    TakePermissions { taken: Taken, lasts: Duration },
    MemoryAlarm { node: usize, lasts: Duration },
    End { whose: Whose, how: End },
    Stall { whose: Whose, lasts: Duration },
}

/// The exchanges for calls.
const EXCHANGES: [&str; 4] = ["hopline.rpc", "hopline.oneway", "hopline.discovery", "hopline.events"];
/// The bindings of the queues that all instances share.
const BINDINGS: [[&str; 3]; 4] = [
    ["hopline.rpc", "soak.v1", "hopline.soak.v1.calls"],
    ["hopline.oneway", "soak.v1.note", "hopline.soak.v1.work"],
    ["hopline.events", "soak.group", "hopline.group:soak.work"],
    ["hopline.events", "soak.replay", "hopline.kept:soak.replay"],
];

/// The permission that the user loses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Taken {
    /// To publish to queues directly: replies and dead letters are published so.
    Replies,
    All,
}

/// How connections end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    Closed,
    Reset,
}

/// Whose connections end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Whose {
    One(usize),
    All,
}

/// Faults that happen at the same time, after a pause.
#[derive(Debug)]
pub(crate) struct Step {
    pause: Duration,
    faults: Vec<Fault>,
}

impl Fault {
    fn next(random: &mut Random, each: u64, nodes: u64) -> Self {
        let is_cluster = nodes > 1;
        // With a single node there is nothing to choose, so no random number is drawn.
        let node = |random: &mut Random| match is_cluster {
            true => usize::try_from(random.of(0..nodes)).expect("a few"),
            false => 0,
        };
        let slot = |random: &mut Random| usize::try_from(random.of(0..each)).expect("a few");
        let seconds =
            |random: &mut Random, from: u64, to: u64| Duration::from_millis(random.of(from * 1000..to * 1000));
        let whose = |random: &mut Random| match random.percent(25) {
            true => Whose::All,
            false => Whose::One(usize::try_from(random.of(0..2 * each)).expect("a few")),
        };
        let one_of = |random: &mut Random, all: usize| {
            usize::try_from(random.of(0..u64::try_from(all).expect("a few"))).expect("a few")
        };
        match random.of(0..100) {
            0..12 => Self::KillServer { slot: slot(random), back_after: seconds(random, 0, 3) },
            12..23 => Self::DrainServer { slot: slot(random), back_after: seconds(random, 0, 2) },
            23..30 => Self::KillClient { slot: slot(random), back_after: seconds(random, 0, 2) },
            // In a cluster, the other nodes go on meanwhile.
            30..36 => {
                Self::KillNode { node: node(random), back_after: seconds(random, 0, if is_cluster { 20 } else { 5 }) }
            }
            36..40 => Self::StopNode { node: node(random), back_after: seconds(random, 0, 3) },
            40..45 => Self::CloseConnections,
            45..50 => Self::DeleteReplyQueues,
            50..55 => Self::DeleteCallsQueue,
            55..61 => Self::DeleteExchange { which: one_of(random, EXCHANGES.len()) },
            61..66 => Self::DeleteBinding { which: one_of(random, BINDINGS.len()) },
            66..72 => {
                let taken = if random.percent(50) { Taken::Replies } else { Taken::All };
                Self::TakePermissions { taken, lasts: seconds(random, 1, 6) }
            }
            72..79 => Self::MemoryAlarm { node: node(random), lasts: seconds(random, 1, 8) },
            79..85 => Self::End { whose: whose(random), how: End::Closed },
            85..91 => Self::End { whose: whose(random), how: End::Reset },
            91..94 if is_cluster => Self::SuspendNode { node: node(random), lasts: seconds(random, 3, 20) },
            94..97 if is_cluster => Self::CutOffNode { node: node(random), lasts: seconds(random, 3, 20) },
            _ => Self::Stall { whose: whose(random), lasts: seconds(random, 5, 9) },
        }
    }

    /// Whether the fault needs a running node.
    fn is_the_brokers(&self) -> bool {
        match self {
            Self::KillServer { .. } | Self::DrainServer { .. } | Self::KillClient { .. } => false,
            Self::End { .. } | Self::Stall { .. } => false,
            Self::KillNode { .. } | Self::StopNode { .. } | Self::CloseConnections => true,
            Self::SuspendNode { .. } | Self::CutOffNode { .. } => true,
            Self::DeleteReplyQueues | Self::DeleteCallsQueue | Self::MemoryAlarm { .. } => true,
            Self::DeleteExchange { .. } | Self::DeleteBinding { .. } | Self::TakePermissions { .. } => true,
        }
    }

    /// Its name in the ledger.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::KillServer { .. } => "server killed",
            Self::DrainServer { .. } => "server told to end (drains)",
            Self::KillClient { .. } => "client killed",
            Self::KillNode { .. } => "the broker, or a node of it, killed",
            Self::StopNode { .. } => "the broker, or a node of it, stopped (`stop_app`)",
            Self::SuspendNode { .. } => "a node of the broker suspended (SIGSTOP)",
            Self::CutOffNode { .. } => "a node of the broker cut off from the others",
            Self::CloseConnections => "all connections closed by the broker",
            Self::DeleteReplyQueues => "all reply queues deleted",
            Self::DeleteCallsQueue => "`calls` queue deleted",
            Self::DeleteExchange { .. } => "an exchange deleted",
            Self::DeleteBinding { .. } => "a binding deleted",
            Self::TakePermissions { taken: Taken::Replies, .. } => "permission to reply taken, connections closed",
            Self::TakePermissions { taken: Taken::All, .. } => "all permissions taken, connections closed",
            Self::MemoryAlarm { .. } => "memory alarm",
            Self::End { whose: Whose::One(_), how: End::Closed } => "one process cut off",
            Self::End { whose: Whose::All, how: End::Closed } => "all processes cut off",
            Self::End { whose: Whose::One(_), how: End::Reset } => "one process reset",
            Self::End { whose: Whose::All, how: End::Reset } => "all processes reset",
            Self::Stall { whose: Whose::One(_), .. } => "one process's network stalled",
            Self::Stall { whose: Whose::All, .. } => "all networks stalled",
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.kind())?;
        match self {
            Self::KillServer { slot, back_after }
            | Self::DrainServer { slot, back_after }
            | Self::KillClient { slot, back_after } => write!(f, ": place {}, back after {back_after:?}", slot + 1),
            Self::KillNode { node, back_after } | Self::StopNode { node, back_after } => {
                write!(f, ": node {}, back after {back_after:?}", node + 1)
            }
            Self::SuspendNode { node, lasts }
            | Self::CutOffNode { node, lasts }
            | Self::MemoryAlarm { node, lasts } => {
                write!(f, ": node {}, for {lasts:?}", node + 1)
            }
            Self::TakePermissions { lasts, .. } => write!(f, ": for {lasts:?}"),
            Self::DeleteExchange { which } => write!(f, ": {}", EXCHANGES[*which]),
            Self::DeleteBinding { which } => write!(f, ": {}", BINDINGS[*which].join(", ")),
            Self::Stall { whose: Whose::One(place), lasts } => write!(f, ": place {}, for {lasts:?}", place + 1),
            Self::Stall { whose: Whose::All, lasts } => write!(f, ": for {lasts:?}"),
            Self::End { whose: Whose::One(place), .. } => write!(f, ": place {}", place + 1),
            _ => Ok(()),
        }
    }
}

impl Step {
    fn next(random: &mut Random, each: u64, nodes: u64) -> Self {
        let pause = Duration::from_millis(random.of(1000..6000));
        let mut faults = vec![Fault::next(random, each, nodes)];
        if random.percent(20) {
            let second = Fault::next(random, each, nodes);
            if !(second.is_the_brokers() && faults[0].is_the_brokers()) {
                faults.push(second);
            }
        }
        Self { pause, faults }
    }
}

/// What was broken, and what was noticed meanwhile.
#[derive(Debug, Default)]
pub(crate) struct Log {
    pub(crate) faults: BTreeMap<&'static str, usize>,
    /// The numbers of the clients that were killed.
    pub(crate) killed: Vec<u32>,
    /// Processes that ended though nobody told them to.
    pub(crate) ended: Vec<String>,
    /// Servers that did not end when they were told to.
    pub(crate) stuck: Vec<String>,
    pub(crate) slowest_drain: Duration,
}

/// Breaks things until the time is over. Everything is healed when this returns.
pub(crate) async fn run(seed: u64, time: Duration, broker: &Broker, crew: &Crew) -> Log {
    let log = Mutex::new(Log::default());
    let mut random = Random::new(seed);
    let [each, nodes] = [crew.servers, broker.nodes().len()].map(|number| u64::try_from(number).expect("a few"));
    let since = Instant::now();
    loop {
        let Step { pause, faults } = Step::next(&mut random, each, nodes);
        if since.elapsed() + pause >= time {
            break;
        }
        sleep(pause).await;
        for fault in &faults {
            println!("{:7.1} s  {fault}", since.elapsed().as_secs_f64());
        }
        join_all(faults.iter().map(|fault| inject(fault, broker, crew, &log))).await;
    }
    sleep(time.saturating_sub(since.elapsed())).await;
    log.into_inner()
}

async fn inject(fault: &Fault, broker: &Broker, crew: &Crew, log: &Mutex<Log>) {
    *log.lock().await.faults.entry(fault.kind()).or_default() += 1;
    match *fault {
        Fault::KillServer { slot, back_after } => {
            let mut server = crew.server(slot).lock().await;
            log.lock().await.ended.extend(server.ended_by_itself());
            server.kill().await;
            sleep(back_after).await;
            server.start_again();
        }
        Fault::DrainServer { slot, back_after } => {
            let mut server = crew.server(slot).lock().await;
            log.lock().await.ended.extend(server.ended_by_itself());
            match server.terminate(DRAIN).await {
                Some(took) => {
                    let mut log = log.lock().await;
                    log.slowest_drain = log.slowest_drain.max(took);
                }
                None => log.lock().await.stuck.push(server.name()),
            }
            sleep(back_after).await;
            server.start_again();
        }
        Fault::KillClient { slot, back_after } => {
            let mut client = crew.client(slot).lock().await;
            log.lock().await.ended.extend(client.ended_by_itself());
            log.lock().await.killed.push(client.number());
            client.kill().await;
            sleep(back_after).await;
            client.start_again();
        }
        Fault::KillNode { node, back_after } => {
            let node = &broker.nodes()[node];
            node.kill().await;
            sleep(back_after).await;
            node.start_again().await;
            make_impatient(node).await;
            broker.is_complete().await;
        }
        Fault::StopNode { node, back_after } => {
            let node = &broker.nodes()[node];
            node.ctl(&["stop_app"]).await;
            sleep(back_after).await;
            node.ctl(&["start_app"]).await;
            make_impatient(node).await;
            broker.is_complete().await;
        }
        Fault::SuspendNode { node, lasts } => {
            broker.nodes()[node].suspend().await;
            sleep(lasts).await;
            broker.nodes()[node].resume().await;
            broker.is_complete().await;
        }
        Fault::CutOffNode { node, lasts } => {
            broker.cut_off(node);
            sleep(lasts).await;
            broker.heal();
            broker.is_complete().await;
        }
        Fault::CloseConnections => close_connections(broker).await,
        Fault::DeleteReplyQueues => drop(broker.node().eval(&deletion("hopline.reply@")).await),
        Fault::DeleteCallsQueue => drop(broker.node().eval(&deletion("hopline.soak.v1.calls")).await),
        Fault::DeleteExchange { which } => broker.node().delete_exchange(EXCHANGES[which]).await,
        Fault::DeleteBinding { which } => {
            let [exchange, key, queue] = BINDINGS[which];
            broker.node().unbind(exchange, key, queue).await;
        }
        Fault::TakePermissions { taken, lasts } => {
            let [configure, write, read] = match taken {
                Taken::Replies => [".*", "^hopline", ".*"],
                Taken::All => ["^$"; 3],
            };
            broker.node().ctl(&["set_permissions", "-p", "/", "guest", configure, write, read]).await;
            // An open channel keeps the permissions that it had.
            close_connections(broker).await;
            sleep(lasts).await;
            broker.node().ctl(&["set_permissions", "-p", "/", "guest", ".*", ".*", ".*"]).await;
        }
        Fault::MemoryAlarm { node, lasts } => {
            let node = &broker.nodes()[node];
            node.memory_alarm(Alarm::On).await;
            sleep(lasts).await;
            node.memory_alarm(Alarm::Off).await;
        }
        Fault::End { whose, how } => {
            for proxy in proxies(crew, whose) {
                match how {
                    End::Closed => proxy.cut().await,
                    End::Reset => proxy.reset().await,
                }
            }
        }
        Fault::Stall { whose, lasts } => {
            for proxy in proxies(crew, whose) {
                proxy.stall();
            }
            sleep(lasts).await;
            for proxy in proxies(crew, whose) {
                proxy.resume();
            }
        }
    }
}

/// A setting of RabbitMQ: a delivery that is not acknowledged for 1.5 s costs its channel. Some handlers take longer.
pub(crate) const IMPATIENT: &str = "consumer_timeout = 1500\n";

/// Makes RabbitMQ before 4.3 look for such deliveries twice a second, and not once a minute.
pub(crate) async fn make_impatient(broker: &Node) {
    broker.eval("application:set_env(rabbit, channel_tick_interval, 500).").await;
}

async fn close_connections(broker: &Broker) {
    join_all(broker.nodes().iter().map(|node| node.ctl(&["close_all_connections", "the soak"]))).await;
}

fn proxies(crew: &Crew, whose: Whose) -> impl Iterator<Item = &Proxy> {
    match whose {
        Whose::One(place) => crew.proxies[place..=place].iter().flatten(),
        Whose::All => crew.proxies.iter().flatten(),
    }
}

/// Deletes the queues whose names begin with `prefix`, also other connections' exclusive ones.
fn deletion(prefix: &str) -> String {
    let size = prefix.len();
    format!(
        "[rabbit_amqqueue:delete(Q, false, false, <<\"soak\">>) || Q <- rabbit_amqqueue:list(), \
         {{resource, _, queue, <<Name:{size}/binary, _/binary>>}} <- [amqqueue:get_name(Q)], \
         Name == <<\"{prefix}\">>]."
    )
}
