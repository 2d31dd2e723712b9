//! Calls with callbacks: a loop makes the calls, and each outcome is passed to a function.

use hopline::{Client, Context, Fault, Server, Service};
use tokio::sync::mpsc;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let url = std::env::args().nth(1).or_else(|| std::env::var("HOPLINE_URL").ok());
    let url = url.unwrap_or_else(|| "memory://".to_owned());
    let square = |_: Context, (n,): (u64,)| async move { Ok::<_, Fault>(n * n) };
    let service = Service::new("callbacks", 1).method("square", square);
    let server = Server::connect(&url).await?.serve(service).start().await?;
    let client = Client::connect(&url).await?;

    let (outcomes, mut collected) = mpsc::unbounded_channel();
    for n in 1..=5_u64 {
        let outcomes = outcomes.clone();
        client.call::<u64>("callbacks", "square", (n,)).then(move |outcome| {
            // Sending fails only after main has returned, when nobody reads it.
            let _ = outcomes.send((n, outcome));
        });
    }
    drop(outcomes);
    while let Some((n, outcome)) = collected.recv().await {
        println!("square({n}) = {}", outcome?);
    }

    server.drain().await;
    Ok(())
}
