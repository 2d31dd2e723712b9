//! Groups of processes that are killed, on a broker that is killed and restarted: no event is lost.
//!
//! This needs a RabbitMQ node of the version that `HOPLINE_TEST_NODE` names, and is ignored unless it is asked for.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use hopline::{Client, Context, Running, Subscription};
use tokio::sync::{mpsc, oneshot, watch};

mod command;
#[path = "../../tests/node/mod.rs"]
mod node;

use command::{Going, Place};
use node::{Node, version};

/// How many events are published.
const EVENTS: u64 = 20_000;
/// How many of them are under way at a time.
const AT_ONCE: usize = 64;
/// How long any event of the test may take. The whole takes a minute or two.
const PATIENCE: Duration = Duration::from_secs(600);

/// A process of the group `killed`.
struct Member(oneshot::Sender<()>);

impl Member {
    /// Starts it, and tells each event whose line it prints, also those that it printed just before it was killed.
    async fn start(place: &Place, tell: &mpsc::UnboundedSender<u64>) -> Self {
        let mut process = Going::start(place.here(&["subscribe", "n.*", "--group", "killed"]));
        // Just after a restart of the broker it may have to connect again, and says so.
        while !process.note().await.contains("subscribed to n.* as the group killed") {}
        let (kill, mut killed) = oneshot::channel();
        let tell = tell.clone();
        tokio::spawn(async move {
            let mut lives = true;
            loop {
                let line = tokio::select! {
                    _ = &mut killed, if lives => {
                        process.signal("KILL").await;
                        lives = false;
                        continue;
                    }
                    line = process.line_whenever() => line,
                };
                let Some(line) = line else { break };
                let event = line.rsplit(' ').next().and_then(|event| event.parse().ok());
                // A line that is cut off by the kill was not printed.
                if let Some(event) = event {
                    tell.send(event).expect("the test listens");
                }
            }
            assert!(!lives, "nobody but the test ends it");
        });
        Self(kill)
    }

    fn kill(self) {
        self.0.send(()).expect("it runs");
    }
}

/// How often each event was handled.
type Counts = Arc<Mutex<HashMap<u64, u64>>>;

/// An instance of the group `lasting`, which lives through all, and handles each event once.
async fn lasting(place: &Place) -> (Running, Counts) {
    let counts = Counts::default();
    let counted = counts.clone();
    let subscription = Subscription::to("n.*").shared("lasting").dedup(Duration::from_secs(3600));
    let server = place.server().await.subscribe(subscription, move |_: Context, event: u64| {
        *counted.lock().expect("no panic").entry(event).or_default() += 1;
        async {}
    });
    (server.start().await.expect("it can subscribe"), counts)
}

/// Publishes all events, and tells how many the broker has. Returns how many were published once more, after an error that
/// left open whether the broker has them.
async fn publish(client: Client, told: watch::Sender<u64>) -> u64 {
    let (mut next, mut again, mut under_way) = (0, 0, FuturesUnordered::new());
    let publish = |event: u64| {
        let client = client.clone();
        async move { (event, client.publish(&format!("n.{}", event % 7), &event).confirmed().await) }
    };
    while next < EVENTS || !under_way.is_empty() {
        while next < EVENTS && under_way.len() < AT_ONCE {
            under_way.push(publish(next));
            next += 1;
        }
        match under_way.next().await.expect("some are under way") {
            (_, Ok(hopline::Published::ToAll)) => told.send_modify(|done| *done += 1),
            (event, _) => {
                again += 1;
                under_way.push(publish(event));
            }
        }
    }
    again
}

async fn soon<F: Future>(event: F) -> F::Output {
    tokio::time::timeout(PATIENCE, event).await.expect("it happens in ten minutes")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn no_event_is_lost_while_members_of_its_group_are_killed_are_all_away_and_the_broker_is_killed_and_restarted() {
    let node = Node::start(&version()).await;
    let place = Place::at(node.url(), "groups");
    let (tell, mut heard) = mpsc::unbounded_channel();
    let mut members = Vec::new();
    for _ in 0..3 {
        members.push(Member::start(&place, &tell).await);
    }
    let (running, of_lasting) = lasting(&place).await;
    node.remembers().await;
    let client = Client::builder().namespace(&place.namespace).timeout(PATIENCE).connect(&place.url).await;
    let (told, mut done) = watch::channel(0);
    let begun = Instant::now();
    let publishing = tokio::spawn(publish(client.expect("the broker is there"), told));

    for (at, what) in [
        (2000, "kill"),
        (4000, "kill"),
        (6000, "kill the broker"),
        (10_000, "away"),
        (14_000, "back"),
        (15_000, "restart the broker"),
        (17_000, "kill"),
        (19_000, "kill"),
    ] {
        soon(done.wait_for(|done| *done >= at)).await.expect("it publishes");
        match what {
            "kill" => {
                members.remove(0).kill();
                members.push(Member::start(&place, &tell).await);
            }
            "kill the broker" => {
                node.kill().await;
                node.start_again().await;
            }
            "restart the broker" => {
                node.stop().await;
                node.start_again().await;
            }
            "away" => members.drain(..).for_each(Member::kill),
            _ => {
                for _ in 0..3 {
                    members.push(Member::start(&place, &tell).await);
                }
            }
        }
    }
    let again = soon(publishing).await.expect("no panic");
    let mut of_killed: HashMap<u64, u64> = HashMap::new();
    while of_killed.len() < usize::try_from(EVENTS).expect("small") {
        *of_killed.entry(soon(heard.recv()).await.expect("they print")).or_default() += 1;
    }
    soon(async {
        while of_lasting.lock().expect("no panic").len() < usize::try_from(EVENTS).expect("small") {
            tokio::task::yield_now().await;
        }
    })
    .await;
    // Nothing else is to come.
    let transport = hopline::transport::Transport::connect(&place.url, hopline::transport::Role::Client).await;
    let transport = transport.expect("the broker is there");
    for queue in ["killed.work", "killed.dead", "lasting.work", "lasting.dead"] {
        let queue = format!("{}.group:{queue}", place.namespace);
        soon(async { while transport.count(&queue).await.expect("an answer") != Some(0) {} }).await;
    }
    soon(running.drain()).await;
    while let Ok(event) = heard.try_recv() {
        *of_killed.entry(event).or_default() += 1;
    }
    let copies = |counts: &HashMap<u64, u64>| counts.values().map(|count| count - 1).sum::<u64>();
    let of_lasting = of_lasting.lock().expect("no panic").clone();
    println!(
        "{EVENTS} events in {:?}: {} copies too many in the group that was killed, {} with dedup in one instance, {again} \
         published once more",
        begun.elapsed(),
        copies(&of_killed),
        copies(&of_lasting),
    );
    assert!(of_killed.keys().chain(of_lasting.keys()).all(|event| *event < EVENTS), "no event is invented");
    assert!(copies(&of_lasting) <= again, "only what was published twice is handled twice");
}
