//! What a slow instance costs the calls of each route: five instances, of which one takes ten times as long.
//!
//! `cargo bench -p hopline-benches --bench routes -- --url amqp://localhost` calls along `RoundRobin` and `LeastInFlight` in turn, and
//! prints the 99th percentiles, and how many of the calls the slow instance got. On a busy machine, take a larger `--quick`: the
//! milliseconds that a call takes in the others.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use std::{env, fmt};

use futures::future::try_join_all;
use hopline::{Client, Context, Error, Fault, Method, Route, Running, Server, Service};
use tokio::time::sleep;

/// That of `hopline bench`, which no real service uses.
const NAMESPACE: &str = "hopline-bench";
const SERVICE: &str = "routes.v1";
const QUICK: Duration = Duration::from_millis(5);
const QUICK_ONES: usize = 4;
const TIMES_SLOWER: u32 = 10;
/// How many rounds there are. Each measures both routes.
const ROUNDS: usize = 5;
/// For how long each route is called in a round, after a tenth of it that does not count.
const EACH: Duration = Duration::from_secs(10);

const USAGE: &str =
    "usage: cargo bench -p hopline-benches --bench routes -- --url URL [--quick MILLISECONDS] [CALLERS ...]";

/// What this process was told.
struct Told {
    url: String,
    /// How long a call takes in the quick instances.
    quick: Duration,
    callers: Vec<usize>,
}

/// What was measured of the calls along a route.
struct Measured {
    /// The 99th percentile of their times.
    p99: Duration,
    calls: usize,
    /// How many of all calls the slow instance got.
    of_slow: u64,
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let Some(Told { url, quick, callers }) = told(env::args().skip(1)) else { return Err(USAGE.into()) };
    let of_slow = Arc::new(AtomicU64::new(0));
    let mut servers = vec![serve(&url, quick * TIMES_SLOWER, of_slow.clone()).await?];
    for _ in 0..QUICK_ONES {
        servers.push(serve(&url, quick, Arc::default()).await?);
    }
    println!("{:>7} {:>5} {:>28} {:>28} {:>6}", "callers", "round", "RoundRobin", "LeastInFlight", "ratio");
    for callers in callers {
        let mut ratios = Vec::new();
        for round in 1..=ROUNDS {
            let in_turn = measured(&url, Route::RoundRobin, callers, &of_slow).await?;
            let least = measured(&url, Route::LeastInFlight, callers, &of_slow).await?;
            let ratio = in_turn.p99.as_secs_f64() / least.p99.as_secs_f64();
            println!("{callers:>7} {round:>5} {:>28} {:>28} {ratio:>6.2}", in_turn.to_string(), least.to_string());
            ratios.push(ratio);
        }
        ratios.sort_by(f64::total_cmp);
        println!("{callers:>7} median {:>65.2}", ratios[ROUNDS / 2]);
    }
    for server in servers {
        server.drain().await;
    }
    Ok(())
}

fn told(mut arguments: impl Iterator<Item = String>) -> Option<Told> {
    let (mut url, mut quick, mut callers) = (None, QUICK, Vec::new());
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            // Cargo's own.
            "--bench" => {}
            "--url" => url = arguments.next(),
            "--quick" => quick = Duration::from_millis(arguments.next()?.parse().ok()?),
            number => callers.push(number.parse().ok()?),
        }
    }
    Some(Told { url: url?, quick, callers: if callers.is_empty() { vec![8, 32] } else { callers } })
}

async fn serve(url: &str, takes: Duration, calls: Arc<AtomicU64>) -> Result<Running, Error> {
    let works = move |_: Context, (): ()| {
        calls.fetch_add(1, Ordering::Relaxed);
        async move {
            sleep(takes).await;
            Ok::<_, Fault>(())
        }
    };
    let service = Service::new("routes", 1).method(Method::new("work"), works);
    Server::builder().namespace(NAMESPACE).connect(url).await?.serve(service).start().await
}

async fn measured(url: &str, route: Route, callers: usize, of_slow: &AtomicU64) -> Result<Measured, Error> {
    let client = Client::builder().namespace(NAMESPACE).route(SERVICE, route).connect(url).await?;
    let (begin, before) = (Instant::now(), of_slow.load(Ordering::Relaxed));
    let caller = || async {
        let mut times = Vec::new();
        while begin.elapsed() < EACH + EACH / 10 {
            let since = Instant::now();
            client.call::<()>(SERVICE, "work", ()).await?;
            if begin.elapsed() > EACH / 10 {
                times.push(since.elapsed());
            }
        }
        Ok::<_, Error>(times)
    };
    let mut times = try_join_all((0..callers).map(|_| caller())).await?.concat();
    times.sort();
    client.close().await;
    let of_slow = of_slow.load(Ordering::Relaxed) - before;
    Ok(Measured { p99: times[times.len() * 99 / 100], calls: times.len(), of_slow })
}

impl fmt::Display for Measured {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.1} ms, {} of {} slow", self.p99.as_secs_f64() * 1e3, self.of_slow, self.calls)
    }
}
