//! The result cache: what was returned is kept for a while, and calls for the same at the same time share one.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::future::join_all;
use hopline::{Client, Context, Error, Server};

#[hopline::service(name = "weather")]
trait Weather {
    #[rpc(idempotent, cache = "1m")]
    async fn today(&self, ctx: &Context, town: String) -> String;
}

static RUNS: AtomicU64 = AtomicU64::new(0);

struct Station;

impl Weather for Station {
    async fn today(&self, ctx: &Context, town: String) -> String {
        RUNS.fetch_add(1, Ordering::Relaxed);
        // Long enough for all who ask to have asked.
        tokio::time::sleep(Duration::from_millis(100)).await;
        match ctx.metadata("language") {
            Some("de") => format!("{town}: sonnig"),
            _ => format!("{town}: sunny"),
        }
    }
}

#[tokio::main]
async fn main() -> Result<(), Error> {
    let url = std::env::args().nth(1).or_else(|| std::env::var("HOPLINE_URL").ok());
    let url = url.unwrap_or_else(|| "memory://".to_owned());
    let server = Server::connect(&url).await?.serve(WeatherServer::new(Station)).start().await?;
    let client = Client::connect(&url).await?;
    let weather = WeatherClient::new(&client);
    let today = |town: &str| weather.today(town.to_owned());
    let runs = || RUNS.swap(0, Ordering::Relaxed);

    let answers = join_all((0..100).map(|_| today("Rome"))).await;
    let good = answers.iter().filter(|answer| answer.is_ok()).count();
    println!("{good} answers at once, {} run", runs());
    println!("{}, {} runs", today("Rome").await?, runs());
    println!("{}, {} run", today("Oslo").await?, runs());
    // Metadata is a part of what is asked.
    println!("{}, {} run", today("Rome").metadata("language", "de").await?, runs());
    println!("{}, {} run", today("Rome").cache(Duration::ZERO).await?, runs());
    client.forget_results();
    println!("{}, {} run", today("Rome").await?, runs());
    let counts = client.policies();
    println!("{} from the cache, {} not", counts.cache_hits + counts.cache_shared, counts.cache_misses);

    server.drain().await;
    Ok(())
}
