//! Events are published with a key. Every server that subscribes to a matching pattern handles them.

use hopline::{Client, Context, Server};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

#[derive(Debug, Serialize, Deserialize)]
struct Order {
    id: u64,
    total_cents: u64,
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let url = std::env::args().nth(1).or_else(|| std::env::var("HOPLINE_URL").ok());
    let url = url.unwrap_or_else(|| "memory://".to_owned());

    let (seen, mut events) = mpsc::unbounded_channel();
    let every = seen.clone();
    let server = Server::connect(&url)
        .await?
        .subscribe("order.*", move |ctx: Context, order: Order| {
            // Sending fails only after main has returned, when nobody reads it.
            let _ = every.send(format!("order.* heard {}: {order:?}", ctx.method()));
            async {}
        })
        .subscribe("order.shipped", move |_: Context, order: Order| {
            let _ = seen.send(format!("order.shipped heard of order {}", order.id));
            async {}
        })
        .start()
        .await?;

    let client = Client::connect(&url).await?;
    client.publish("order.created", &Order { id: 1, total_cents: 4200 }).await?;
    client.publish("order.shipped", &Order { id: 1, total_cents: 4200 }).await?;
    client.publish("invoice.sent", &Order { id: 1, total_cents: 4200 }).await?;

    for _ in 0..3 {
        println!("{}", events.recv().await.ok_or("the server ended")?);
    }
    server.drain().await;
    Ok(())
}
