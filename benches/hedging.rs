//! What hedging brings beside a slow instance: four instances, of which one takes twenty times as long.
//!
//! `cargo bench -p hopline-benches --bench hedging -- --url amqp://localhost` makes calls with and without hedging, in turn: where
//! each instance takes what it gets, and where it runs one call at a time. It prints percentiles, what share of the calls
//! the slow instance got, and how many more attempts there were than calls.

use std::env;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures::future::try_join_all;
use hopline::{Client, Context, Error, Fault, Method, Route, Running, Server, Service};
use tokio::time::sleep;

/// That of `hopline bench`, which no real service uses.
const NAMESPACE: &str = "hopline-bench";
const QUICK: Duration = Duration::from_millis(20);
const QUICK_ONES: usize = 3;
const TIMES_SLOWER: u32 = 20;
const ROUNDS: usize = 3;
const CALLERS: usize = 3;
/// How many calls each caller makes, after a tenth of them that do not count.
const CALLS: usize = 1_000;

const USAGE: &str = "usage: cargo bench -p hopline-benches --bench hedging -- --url URL";

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<_> = env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let [flag, url] = &*arguments else { return Err(USAGE.into()) };
    if flag != "--url" {
        return Err(USAGE.into());
    }
    println!("| instances run | route | hedged | p50 | p95 | p99 | p99 : p50 | to the slow one | more attempts |");
    println!("| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |");
    for round in 0..ROUNDS {
        for (service, runs) in [("one", "one call at a time"), ("many", "what they get")] {
            for route in [Route::Any, Route::LeastInFlight] {
                for hedged in [false, true] {
                    let fleet = Fleet::serve(url, service).await?;
                    let line = fleet.measured(url, route.clone(), hedged).await?;
                    println!("| {runs} | {route:?} | {} | {line} |", if hedged { "yes" } else { "no" });
                    for server in fleet.servers {
                        server.drain().await;
                    }
                }
            }
        }
        if round + 1 < ROUNDS {
            println!();
        }
    }
    Ok(())
}

struct Fleet {
    service: &'static str,
    servers: Vec<Running>,
    /// How many calls have begun in the slow instance.
    of_slow: Arc<AtomicU64>,
}

impl Fleet {
    async fn serve(url: &str, service: &'static str) -> Result<Self, Error> {
        let of_slow = Arc::new(AtomicU64::new(0));
        let mut servers = vec![serve(url, service, QUICK * TIMES_SLOWER, of_slow.clone()).await?];
        for _ in 0..QUICK_ONES {
            servers.push(serve(url, service, QUICK, Arc::default()).await?);
        }
        Ok(Self { service, servers, of_slow })
    }

    async fn measured(&self, url: &str, route: Route, hedged: bool) -> Result<String, Error> {
        let client = Client::builder().namespace(NAMESPACE).route(self.service, route);
        let client = if hedged { client.hedge() } else { client };
        let client = client.connect(url).await?;
        let caller = || async {
            let mut times = Vec::new();
            for _ in 0..CALLS + CALLS / 10 {
                let since = Instant::now();
                client.call::<()>(self.service, "work", ()).idempotent().await?;
                times.push(since.elapsed());
            }
            Ok::<_, Error>(times.split_off(CALLS / 10))
        };
        let mut times = try_join_all((0..CALLERS).map(|_| caller())).await?.concat();
        times.sort();
        let percentile = |percent: usize| times[times.len() * percent / 100].as_secs_f64() * 1e3;
        let (p50, p95, p99) = (percentile(50), percentile(95), percentile(99));
        let all = (CALLERS * (CALLS + CALLS / 10)) as f64 / 100.0;
        let (slow, hedges) = (self.of_slow.load(Ordering::Relaxed) as f64, client.policies().hedges as f64);
        client.close().await;
        let (slow, hedges, ratio) = (slow / all, hedges / all, p99 / p50);
        Ok(format!("{p50:.0} ms | {p95:.0} ms | {p99:.0} ms | {ratio:.1} | {slow:.1} % | {hedges:.1} %"))
    }
}

async fn serve(url: &str, service: &str, takes: Duration, calls: Arc<AtomicU64>) -> Result<Running, Error> {
    let works = move |_: Context, (): ()| {
        calls.fetch_add(1, Ordering::Relaxed);
        async move {
            sleep(takes).await;
            Ok::<_, Fault>(())
        }
    };
    let made = Service::new(service, 1).method(Method::new("work").idempotent(), works);
    let made = if service == "one" { made.concurrency(1).prefetch(1) } else { made };
    Server::builder().namespace(NAMESPACE).connect(url).await?.serve(made).start().await
}
