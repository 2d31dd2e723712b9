//! Replay: who subscribes later hears what was published before, and a group goes on where it was.

use hopline::{Client, Context, Error, Replay, Running, Server, Subscription};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc::{self, UnboundedReceiver};

/// The event.
#[derive(Serialize, Deserialize)]
struct Ordered {
    /// Which run of this example it is of. A broker keeps those of other runs, too.
    run: String,
    id: u64,
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let url = std::env::args().nth(1).or_else(|| std::env::var("HOPLINE_URL").ok());
    let url = url.unwrap_or_else(|| "memory://".to_owned());
    let client = Client::connect(&url).await?;
    let run = client.instance();
    let reports = || Subscription::to("replay.*").shared("reports").from(Replay::Start);

    // The broker keeps events from when somebody first subscribes like this.
    let (server, mut heard) = hear(&url, run, reports()).await?;
    publish(&client, [1, 2]).await?;
    for _ in 0..2 {
        println!("the group hears of order {}", heard.recv().await.ok_or("the server ended")?);
    }
    server.drain().await;

    publish(&client, [3, 4]).await?;
    println!("orders 3 and 4 were published while nobody was there");
    let (server, mut heard) = hear(&url, run, reports()).await?;
    for _ in 0..2 {
        println!("the group goes on with order {}", heard.recv().await.ok_or("the server ended")?);
    }
    server.drain().await;

    // Without a group, each start begins there.
    let (server, mut heard) = hear(&url, run, Subscription::to("replay.*").from(Replay::Start)).await?;
    for _ in 0..4 {
        println!("a newcomer hears of order {}", heard.recv().await.ok_or("the server ended")?);
    }
    server.drain().await;
    Ok(())
}

/// Publishes orders.
async fn publish(client: &Client, orders: [u64; 2]) -> Result<(), Error> {
    for id in orders {
        client.publish("replay.order", &Ordered { run: client.instance().to_owned(), id }).await?;
    }
    Ok(())
}

/// A server that tells the ids of this run's orders, in the order in which they come.
async fn hear(
    url: &str,
    run: &str,
    subscription: Subscription<Ordered>,
) -> Result<(Running, UnboundedReceiver<u64>), Error> {
    let (told, heard) = mpsc::unbounded_channel();
    let run = run.to_owned();
    let handler = move |_: Context, order: Ordered| {
        let sent = if order.run == run { told.send(order.id) } else { Ok(()) };
        async move { sent.map_err(|_| "nobody prints any more".to_owned()) }
    };
    Ok((Server::connect(url).await?.subscribe(subscription, handler).start().await?, heard))
}
