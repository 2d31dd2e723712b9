//! A circuit breaker: calls of a method that fails again and again are not sent for a while.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use hopline::{Client, Code, Error, Fault, Server};

#[hopline::service(name = "fragile")]
trait Fragile {
    async fn work(&self) -> Result<u64, Fault>;
}

static BROKEN: AtomicBool = AtomicBool::new(true);
static RUNS: AtomicU64 = AtomicU64::new(0);

struct Glass;

impl Fragile for Glass {
    async fn work(&self) -> Result<u64, Fault> {
        let run = RUNS.fetch_add(1, Ordering::Relaxed) + 1;
        if BROKEN.load(Ordering::Relaxed) { Err(Fault::new(Code::Internal, "broken")) } else { Ok(run) }
    }
}

#[tokio::main]
async fn main() -> Result<(), Error> {
    let url = std::env::args().nth(1).or_else(|| std::env::var("HOPLINE_URL").ok());
    let url = url.unwrap_or_else(|| "memory://".to_owned());
    let server = Server::connect(&url).await?.serve(FragileServer::new(Glass)).start().await?;
    // One line switches it on.
    let client = Client::builder().breaker().connect(&url).await?;
    let fragile = FragileClient::new(&client);

    // Half of at least twenty calls have failed: here all of them.
    for _ in 0..20 {
        if fragile.work().await.is_ok() {
            println!("it works, though it is broken");
        }
    }
    println!("{} calls have failed", RUNS.load(Ordering::Relaxed));
    for _ in 0..100 {
        match fragile.work().await {
            Err(Error::CircuitOpen { .. }) => {}
            other => println!("the breaker has let one pass: {other:?}"),
        }
    }
    let counts = client.policies();
    println!("{} more were not sent, and {} ran", counts.refused_by_breaker, RUNS.load(Ordering::Relaxed) - 20);
    for breaker in client.breakers() {
        println!("{} is open: {}", breaker.method, breaker.state != hopline::BreakerState::Closed);
    }

    // After five seconds it would let three calls through to see. Who knows better closes it.
    BROKEN.store(false, Ordering::Relaxed);
    client.close_breaker("fragile", "work")?;
    println!("run {} went well", fragile.work().await?);

    server.drain().await;
    Ok(())
}
