//! Hedging: one of three instances is slow now and then, and a second attempt at another one is quicker.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use hopline::{Client, Context, Error, Fault, Method, Server, Service};

/// One call in fifty hangs for this long.
const HANGS: Duration = Duration::from_millis(500);

fn prices(calls: &Arc<AtomicU64>) -> Service {
    let calls = calls.clone();
    Service::new("prices", 1).method(Method::new("of").idempotent(), move |_: Context, (number,): (u64,)| {
        let hangs = calls.fetch_add(1, Ordering::Relaxed) % 50 == 49;
        async move {
            tokio::time::sleep(if hangs { HANGS } else { Duration::from_millis(2) }).await;
            Ok::<_, Fault>(number * 100)
        }
    })
}

#[tokio::main]
async fn main() -> Result<(), Error> {
    let url = std::env::args().nth(1).or_else(|| std::env::var("HOPLINE_URL").ok());
    let url = url.unwrap_or_else(|| "memory://".to_owned());
    let (calls, mut servers) = (Arc::default(), Vec::new());
    for _ in 0..3 {
        let server = Server::builder().namespace("hedging").connect(&url).await?;
        servers.push(server.serve(prices(&calls)).start().await?);
    }
    let client = Client::builder().namespace("hedging").connect(&url).await?;
    for is_hedged in [false, true] {
        let mut times = Vec::new();
        for number in 0..300_u64 {
            let call = client.call::<u64>("prices", "of", (number,)).idempotent();
            let since = Instant::now();
            let price = if is_hedged { call.hedge().await? } else { call.await? };
            assert_eq!(price, number * 100);
            times.push(since.elapsed());
        }
        let late = times.iter().filter(|time| **time >= HANGS).count();
        println!("{}: {late} of {} calls hung", if is_hedged { "hedged" } else { "as usual" }, times.len());
    }
    let counts = client.policies();
    println!("{} second attempts, {} were quicker", counts.hedges, counts.hedges_won);
    Ok(())
}
