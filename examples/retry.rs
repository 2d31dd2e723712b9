//! Retry: which calls are tried again after a failure, and which are not.

use std::sync::atomic::{AtomicU64, Ordering};

use hopline::{Client, Code, Error, Fault, Server};

#[hopline::service(name = "stock")]
trait Stock {
    /// Fails while the database is away.
    #[rpc(idempotent, retry = 2)]
    async fn count(&self, article: String) -> Result<u64, Fault>;
    /// The same, but taking twice is not taking once.
    #[rpc(retry = 2)]
    async fn take(&self, article: String) -> Result<u64, Fault>;
    /// Refuses to try at all.
    #[rpc(idempotent, retry = 2)]
    async fn check(&self, article: String) -> Result<u64, Fault>;
}

/// How many runs fail from now on.
static FAILS: AtomicU64 = AtomicU64::new(0);
/// How many runs there were.
static RUNS: AtomicU64 = AtomicU64::new(0);

struct Shelf;

impl Shelf {
    fn look(fault: Fault) -> Result<u64, Fault> {
        RUNS.fetch_add(1, Ordering::Relaxed);
        let fails = FAILS.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok();
        if fails { Err(fault) } else { Ok(17) }
    }
}

impl Stock for Shelf {
    async fn count(&self, _article: String) -> Result<u64, Fault> {
        Self::look(Fault::new(Code::Unavailable, "the database is away"))
    }

    async fn take(&self, _article: String) -> Result<u64, Fault> {
        Self::look(Fault::new(Code::Unavailable, "the database is away"))
    }

    async fn check(&self, _article: String) -> Result<u64, Fault> {
        Self::look(Fault::new(Code::Unavailable, "the shelf is gone for good").permanent())
    }
}

#[tokio::main]
async fn main() -> Result<(), Error> {
    let url = std::env::args().nth(1).or_else(|| std::env::var("HOPLINE_URL").ok());
    let url = url.unwrap_or_else(|| "memory://".to_owned());
    let server = Server::connect(&url).await?.serve(StockServer::new(Shelf)).start().await?;
    let client = Client::connect(&url).await?;
    let stock = StockClient::new(&client);

    FAILS.store(2, Ordering::Relaxed);
    tell("count", stock.count("pen".to_owned()).await);
    // The handler has run: perhaps it has taken one before it failed.
    FAILS.store(1, Ordering::Relaxed);
    tell("take", stock.take("pen".to_owned()).await);
    // The server says that another attempt does not help.
    FAILS.store(1, Ordering::Relaxed);
    tell("check", stock.check("pen".to_owned()).await);
    // A caller decides for itself.
    FAILS.store(1, Ordering::Relaxed);
    tell("count once", stock.count("pen".to_owned()).retry(0).await);
    println!("{} attempts were not the first", client.policies().retries);

    server.drain().await;
    Ok(())
}

fn tell(what: &str, outcome: Result<u64, Error>) {
    let runs = RUNS.swap(0, Ordering::Relaxed);
    match outcome {
        Ok(count) => println!("{what}: {count} after {runs} runs"),
        Err(error) => println!("{what}: {error} after {runs} runs"),
    }
}
