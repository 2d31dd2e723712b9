//! What a slow instance costs the calls of each route: five instances, of which one takes ten times as long.
//!
//! `cargo bench -p hopline-benches --bench routes -- --url amqp://localhost` calls along `RoundRobin` and `LeastInFlight` in turn, and
//! prints the 99th percentiles.

use std::env;
use std::time::{Duration, Instant};

use futures::future::try_join_all;
use hopline::{Client, Context, Error, Fault, Method, Route, Running, Server, Service};
use tokio::time::sleep;

/// That of `hopline bench`, which no real service uses.
const NAMESPACE: &str = "hopline-bench";
const SERVICE: &str = "routes.v1";
const QUICK: Duration = Duration::from_millis(5);
const SLOW: Duration = Duration::from_millis(50);
const QUICK_ONES: usize = 4;
/// How many rounds there are. Each measures both routes.
const ROUNDS: usize = 5;
/// For how long each route is called in a round, after a tenth of it that does not count.
const EACH: Duration = Duration::from_secs(10);

const USAGE: &str = "usage: cargo bench -p hopline-benches --bench routes -- --url URL [--concurrency N] [CALLERS ...]";

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let Some((url, concurrency, callers)) = told(env::args().skip(1)) else { return Err(USAGE.into()) };
    let mut servers = vec![serve(&url, SLOW, concurrency).await?];
    for _ in 0..QUICK_ONES {
        servers.push(serve(&url, QUICK, concurrency).await?);
    }
    println!("{:>7} {:>5} {:>18} {:>18} {:>6}", "callers", "round", "RoundRobin", "LeastInFlight", "ratio");
    for callers in callers {
        let mut ratios = Vec::new();
        for round in 1..=ROUNDS {
            let (in_turn, of_turn) = p99(&url, Route::RoundRobin, callers).await?;
            let (least, of_least) = p99(&url, Route::LeastInFlight, callers).await?;
            let ratio = in_turn.as_secs_f64() / least.as_secs_f64();
            let shown = |time: Duration, calls: usize| format!("{:.1} ms of {calls}", time.as_secs_f64() * 1e3);
            println!(
                "{callers:>7} {round:>5} {:>18} {:>18} {ratio:>6.2}",
                shown(in_turn, of_turn),
                shown(least, of_least)
            );
            ratios.push(ratio);
        }
        ratios.sort_by(f64::total_cmp);
        println!("{callers:>7} median ratio {:.2}", ratios[ROUNDS / 2]);
    }
    for server in servers {
        server.drain().await;
    }
    Ok(())
}

/// The address, the limit of calls that run at an instance, and the numbers of callers.
fn told(mut arguments: impl Iterator<Item = String>) -> Option<(String, Option<usize>, Vec<usize>)> {
    let (mut url, mut concurrency, mut callers) = (None, None, Vec::new());
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            // Cargo's own.
            "--bench" => {}
            "--url" => url = arguments.next(),
            "--concurrency" => concurrency = Some(arguments.next()?.parse().ok()?),
            number => callers.push(number.parse().ok()?),
        }
    }
    let callers = if callers.is_empty() { vec![8, 32] } else { callers };
    Some((url?, concurrency, callers))
}

async fn serve(url: &str, takes: Duration, concurrency: Option<usize>) -> Result<Running, Error> {
    let works = move |_: Context, (): ()| async move {
        sleep(takes).await;
        Ok::<_, Fault>(())
    };
    let mut service = Service::new("routes", 1).method(Method::new("work"), works);
    if let Some(calls) = concurrency {
        service = service.concurrency(calls);
    }
    Server::builder().namespace(NAMESPACE).connect(url).await?.serve(service).start().await
}

/// The 99th percentile of the times of calls along a route, and how many were measured.
async fn p99(url: &str, route: Route, callers: usize) -> Result<(Duration, usize), Error> {
    let client = Client::builder().namespace(NAMESPACE).route(SERVICE, route).connect(url).await?;
    let begin = Instant::now();
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
    Ok((times[times.len() * 99 / 100], times.len()))
}
