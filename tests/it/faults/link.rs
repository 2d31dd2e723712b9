//! Links that carry less than is asked of them. As many calls as they carry are answered in time.
//!
//! These tests are about time. So they compare ratios within one run, and their bounds hold on a busy machine too.

use std::fmt;
use std::future::IntoFuture as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use futures::future::{join_all, join3};
use hopline::{Call, Client, Context, Fault, Method, Running, Service, WhenFull};
use serde_bytes::ByteBuf;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::node::shared;
use crate::node::Node;
use crate::proxy::{Direction, Link, Proxy};
use crate::support::{PATIENCE, Scene, soon};

/// A link with 1 Mbit/s and a round trip of a tenth of a second.
const LINK: Link = Link { delay: Duration::from_millis(50), ..Link::of(125_000) };
/// How long each call may take.
const DEADLINE: Duration = Duration::from_secs(5);
/// How long calls are made.
const LASTING: Duration = Duration::from_secs(15);
/// How long the next call after that may take.
const AT_ONCE: Duration = Duration::from_secs(2);
/// How much later than its deadline a handler may begin: a round trip, plus what brokers and machines need.
const LATEST: Duration = Duration::from_millis(100 + 1000);
/// By how much memory may grow without a reason: allocators keep some of the memory that they had.
const SPARE_MEMORY: usize = 48 << 20;

/// Times in arguments count from this moment, for callers and handlers alike.
static START: LazyLock<Instant> = LazyLock::new(Instant::now);

/// Which side is behind the link and sends much over it: the client, with large requests, or the server, with large
/// replies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Behind {
    Client,
    Server,
}

/// A client and a server, and the link between them.
struct Lane {
    behind: Behind,
    /// How many bytes a call takes over the link.
    size: usize,
    link: Link,
    proxy: Proxy,
    client: Client,
    running: Running,
    runs: Arc<Runs>,
}

/// What the handlers of a lane have seen.
#[derive(Debug, Default)]
struct Runs {
    count: AtomicU64,
    /// How late the latest handler began, after the deadline of its call, in microseconds.
    latest: AtomicU64,
}

impl Lane {
    async fn open(node: &Node, behind: Behind, size: usize, link: Link, places: Option<usize>) -> Self {
        let runs = Arc::new(Runs::default());
        let seen = runs.clone();
        let carry = move |_: Context, (due, _, reply): (u64, ByteBuf, usize)| {
            seen.count.fetch_add(1, Ordering::Relaxed);
            let now = u64::try_from(START.elapsed().as_micros()).expect("a short time");
            seen.latest.fetch_max(now.saturating_sub(due), Ordering::Relaxed);
            async move { Ok::<_, Fault>(ByteBuf::from(vec![7; reply])) }
        };
        let service = Service::new("freight", 1).method(Method::new("carry"), carry);
        let near = Scene::at(node.url());
        let proxy = Proxy::to(node.address()).await;
        let far = near.by_way_of(proxy.url());
        let [clients, servers] = match behind {
            Behind::Client => [far, near],
            Behind::Server => [near, far],
        };
        let running = servers.serve(service).await;
        let builder = Client::builder().namespace(&clients.namespace);
        let builder = match places {
            Some(places) => builder.max_in_flight(places, WhenFull::Wait),
            None => builder,
        };
        let client = builder.connect(&clients.url).await.expect("the broker is there");
        let lane = Self { behind, size, link, proxy, client, running, runs };
        soon(lane.carry(size, PATIENCE).into_future()).await.expect("answered");
        lane.proxy.link(link);
        lane
    }

    /// A call that sends this many bytes over the link.
    fn carry(&self, size: usize, within: Duration) -> Call<ByteBuf> {
        let [request, reply] = match self.behind {
            Behind::Client => [size, 1],
            Behind::Server => [1, size],
        };
        let due = u64::try_from((START.elapsed() + within).as_micros()).expect("a short time");
        self.client.call("freight", "carry", (due, ByteBuf::from(vec![7; request]), reply)).timeout(within)
    }

    /// Makes this many calls, one in each period `every`, and returns their outcomes.
    async fn offer(&self, calls: usize, every: Duration) -> Load {
        let ran = self.runs.count.load(Ordering::Relaxed);
        let (began, mut under_way) = (Instant::now(), JoinSet::new());
        for number in 0..u32::try_from(calls).expect("some thousands") {
            sleep_until(began + number * every).await;
            under_way.spawn(self.carry(self.size, DEADLINE).into_future());
        }
        let outcomes = soon(under_way.join_all()).await;
        let answered = outcomes.iter().filter(|outcome| outcome.is_ok()).count();
        let over = Instant::now();
        let next = self.carry(self.size, AT_ONCE).await.is_ok().then(|| over.elapsed());
        self.idle().await;
        Load {
            offered: calls,
            answered,
            ran: self.runs.count.load(Ordering::Relaxed) - ran,
            latest: Duration::from_micros(self.runs.latest.load(Ordering::Relaxed)),
            next,
        }
    }

    /// Offers the link `times` as much as it carries.
    async fn offer_times(&self, times: usize) -> Load {
        let carried = self.link.rate * usize::try_from(LASTING.as_secs()).expect("a short time") / self.size;
        let calls = times * carried;
        self.offer(calls, LASTING / u32::try_from(calls).expect("some thousands")).await
    }

    /// Waits until everything that was given to the link has arrived. If it was too much, its outcome is known by then.
    async fn idle(&self) {
        let left = async {
            while self.proxy.waiting(Direction::ToBroker) + self.proxy.waiting(Direction::ToClient) > 0 {
                sleep(Duration::from_millis(10)).await;
            }
        };
        if timeout(2 * DEADLINE, left).await.is_ok() {
            // When this call has arrived, everything that was sent before it has arrived too.
            let _ = self.carry(1, DEADLINE).await;
        }
    }

    async fn close(self) {
        self.client.close().await;
        soon(self.running.drain()).await;
    }
}

/// The outcomes of calls.
struct Load {
    offered: usize,
    /// How many were answered in time.
    answered: usize,
    ran: u64,
    /// How late the latest handler began, after its call's deadline.
    latest: Duration,
    /// How long the next call after that took. `None` if it was too long.
    next: Option<Duration>,
}

impl fmt::Display for Load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { offered, answered, ran, latest, next } = self;
        write!(f, "{answered:5} of {offered:5} answered, {ran:5} run, the latest {latest:8.3?} after its deadline, ")?;
        match next {
            Some(time) => write!(f, "the next call took {time:.3?}"),
            None => write!(f, "the next call failed"),
        }
    }
}

impl Load {
    /// What is not as it should be.
    fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        if self.latest > LATEST {
            faults.push(format!("a handler began {:?} after its deadline", self.latest));
        }
        if self.next.is_none() {
            faults.push(format!("when it was over, the next call was not answered within {AT_ONCE:?}"));
        }
        faults
    }
}

/// The memory that this process uses, in bytes.
fn memory() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").expect("it runs on Linux");
    let memory = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a process uses memory");
    memory.trim().trim_end_matches(" kB").parse::<usize>().expect("a number") << 10
}

/// Checks that a link that is offered more than it carries still carries as many calls in time, and that the other
/// calls leave nothing behind.
async fn carries_on(behind: Behind, size: usize, link: Link, places: Option<usize>) {
    let node = shared().await;
    // Each lane has its own link, so they can run at the same time.
    let [once, twice, five_times] = [(); 3].map(|()| Lane::open(&node, behind, size, link, places));
    let (once, twice, five_times) = join3(once, twice, five_times).await;
    let before = memory();
    let loads = join3(once.offer_times(1), twice.offer_times(2), five_times.offer_times(5));
    let mut peak = before;
    let watch = async {
        loop {
            peak = peak.max(memory());
            sleep(Duration::from_millis(50)).await;
        }
    };
    let loads: [Load; 3] = tokio::select! {
        loads = loads => loads.into(),
        () = watch => unreachable!("it goes on"),
    };
    let after = memory();
    println!("{behind:?} behind {link:?}, {size} bytes a call, places: {places:?}");
    for (times, load) in [1, 2, 5].iter().zip(&loads) {
        println!("{times} x: {load}");
    }
    let [before, peak, after] = [before, peak, after].map(|bytes| bytes >> 10);
    println!("memory: {before} KiB before, {peak} at most, {after} after");
    let mut faults: Vec<_> = loads.iter().flat_map(Load::faults).collect();
    let best = loads.iter().map(|load| load.answered).max().unwrap_or_default();
    for load in &loads {
        if load.answered * 100 < best * 80 {
            faults.push(format!("{} were answered, where another load had {best}", load.answered));
        }
    }
    // Callers hold the requests within their deadlines, as arguments and as frames. The queues of the links are in this
    // process as well.
    let held = 2 * (1 + 2 + 5) * link.rate * 5 + 3 * 2 * link.queue;
    if peak > before + ((held + SPARE_MEMORY) >> 10) || after > before + (SPARE_MEMORY >> 10) {
        faults.push(format!("memory grew from {before} KiB to {peak} KiB, and {after} KiB in the end"));
    }
    for lane in [once, twice, five_times] {
        lane.close().await;
    }
    assert!(faults.is_empty(), "{faults:#?}");
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn more_large_calls_than_a_link_carries_are_answered_as_well_as_it_can() {
    carries_on(Behind::Client, 16 << 10, LINK, None).await;
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn more_calls_than_a_link_carries_are_answered_as_well_as_it_can() {
    carries_on(Behind::Client, 4 << 10, LINK, None).await;
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn more_calls_than_a_link_carries_that_loses_some_are_answered_as_well_as_it_can() {
    carries_on(Behind::Client, 4 << 10, Link { loss: Some(100), ..LINK }, None).await;
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn places_among_the_calls_in_flight_keep_no_link_from_what_it_can() {
    carries_on(Behind::Client, 16 << 10, LINK, Some(50)).await;
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn more_replies_than_a_link_carries_arrive_as_well_as_it_can() {
    carries_on(Behind::Server, 16 << 10, LINK, None).await;
}

/// Checks that at least half as many calls of a burst are answered as the link carries, and that the other calls leave
/// nothing behind.
async fn bears_a_burst(behind: Behind, calls: usize, size: usize, places: Option<usize>) {
    let node = shared().await;
    let lane = Lane::open(&node, behind, size, LINK, places).await;
    println!("{behind:?} behind {LINK:?}, {size} bytes a call, places: {places:?}");
    let (mut faults, mut memories) = (Vec::new(), Vec::new());
    // The first burst fills caches, and the client does not know the link yet: a third is enough.
    for parts in [3, 2, 2] {
        let load = lane.offer(calls, Duration::ZERO).await;
        memories.push(memory() >> 10);
        println!("a burst: {load}");
        faults.extend(load.faults());
        let carried = LINK.rate * 5 / size;
        if load.answered * parts < carried {
            faults.push(format!("{} were answered, of {carried} that the link carries", load.answered));
        }
    }
    println!("memory: {memories:?} KiB after each");
    if memories[2] > memories[0] + (SPARE_MEMORY >> 10) {
        faults.push(format!("memory grew: {memories:?} KiB"));
    }
    lane.close().await;
    assert!(faults.is_empty(), "{faults:#?}");
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn a_burst_of_calls_leaves_the_link_when_its_time_is_over() {
    bears_a_burst(Behind::Client, 2000, 4 << 10, None).await;
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn a_burst_of_calls_that_wait_for_places_leaves_the_link_when_its_time_is_over() {
    bears_a_burst(Behind::Client, 2000, 4 << 10, Some(50)).await;
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn a_burst_of_small_calls_leaves_no_memory_behind() {
    bears_a_burst(Behind::Client, 10_000, 1 << 10, None).await;
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn a_burst_of_replies_leaves_the_link_when_its_time_is_over() {
    bears_a_burst(Behind::Server, 2000, 4 << 10, None).await;
}

/// Checks that small calls do not wait for everything that large calls have to send.
async fn lets_small_ones_pass(behind: Behind) {
    const LARGE: usize = 64 << 10;
    const AT_A_TIME: usize = 4;
    let node = shared().await;
    let lane = Lane::open(&node, behind, LARGE, LINK, None).await;
    let large = join_all((0..AT_A_TIME).map(async |_| {
        loop {
            lane.carry(LARGE, PATIENCE).await.expect("answered");
        }
    }));
    let small = async {
        let (until, mut times) = (Instant::now() + LASTING, Vec::new());
        while Instant::now() < until {
            let began = Instant::now();
            lane.carry(16, PATIENCE).await.expect("answered");
            times.push(began.elapsed());
        }
        times.sort_unstable();
        times
    };
    let times = tokio::select! {
        times = small => times,
        _ = large => unreachable!("they go on"),
    };
    let (median, longest) = (times[times.len() / 2], times[times.len() - 1]);
    let all_large = Duration::from_secs_f64((AT_A_TIME * LARGE) as f64 / LINK.rate as f64);
    println!(
        "{behind:?} behind {LINK:?}: {} small calls beside {AT_A_TIME} x {LARGE} bytes, which take {all_large:.3?}: \
         median {median:.3?}, longest {longest:.3?}",
        times.len()
    );
    lane.close().await;
    assert!(median < all_large * 3 / 4, "a small call waits for all large ones: {median:?}");
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn small_calls_do_not_wait_for_all_large_ones() {
    lets_small_ones_pass(Behind::Client).await;
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn small_replies_do_not_wait_for_all_large_ones() {
    lets_small_ones_pass(Behind::Server).await;
}
