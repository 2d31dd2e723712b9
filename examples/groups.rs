//! Groups share events: each goes to one instance of every group. One that cannot be handled is kept as a dead letter.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use hopline::{Client, Context, DeadLetters, Error, Running, Server, Subscription, WhichLetters};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc::{self, UnboundedSender};

/// The event: an order is there.
#[hopline::event(key = "shop.order")]
#[derive(Serialize, Deserialize)]
struct Ordered {
    id: u64,
    item: String,
}

/// What the price list does not have yet.
static KNOWS_UMBRELLAS: AtomicBool = AtomicBool::new(false);

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let url = std::env::args().nth(1).or_else(|| std::env::var("HOPLINE_URL").ok());
    let url = url.unwrap_or_else(|| "memory://".to_owned());
    let (told, mut lines) = mpsc::unbounded_channel();
    let mut next = async || lines.recv().await.ok_or("the servers have ended");

    // Two instances of one group, and one of another.
    let servers =
        [invoices(&url, "first", &told).await?, invoices(&url, "second", &told).await?, statistics(&url, &told).await?];

    let client = Client::connect(&url).await?;
    for (id, item) in [(1, "tea"), (2, "cake"), (3, "milk"), (4, "umbrella")] {
        // It is an error if no group is there, not even one that is away.
        client.emit(&Ordered { id, item: item.to_owned() }).required().await?;
    }
    for _ in 0..7 {
        println!("{}", next().await?);
    }

    // After its last attempt, the event waits for somebody who repairs what is wrong.
    let dead = DeadLetters::connect(&url, "group:invoices").await?;
    while dead.count().await? == 0 {
        // Nobody is told of a dead letter.
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    for letter in dead.list(10).await?.letters {
        println!("dead letter: {}", letter.reason);
    }
    KNOWS_UMBRELLAS.store(true, Ordering::Relaxed);
    dead.replay(&WhichLetters::All, |_| {}).await?;
    println!("replayed: {}", next().await?);

    for server in servers {
        server.drain().await;
    }
    Ok(())
}

/// An instance of the group `invoices`.
async fn invoices(url: &str, instance: &'static str, told: &UnboundedSender<String>) -> Result<Running, Error> {
    let told = told.clone();
    let write = move |_: Context, order: Ordered| {
        let told = told.clone();
        async move {
            if order.item == "umbrella" && !KNOWS_UMBRELLAS.load(Ordering::Relaxed) {
                return Err(format!("there is no price of {}", order.item));
            }
            let line = format!("invoices: order {} by the {instance} instance", order.id);
            told.send(line).map_err(|_| "nobody prints any more".to_owned())
        }
    };
    let group = Subscription::event().shared("invoices").attempts(3).pause(Duration::from_millis(50));
    Server::connect(url).await?.subscribe(group, write).start().await
}

/// The instance of the group `statistics`.
async fn statistics(url: &str, told: &UnboundedSender<String>) -> Result<Running, Error> {
    let told = told.clone();
    let count = move |_: Context, order: Ordered| {
        let sent = told.send(format!("statistics: order {}", order.id));
        async move { sent.map_err(|_| "nobody prints any more".to_owned()) }
    };
    Server::connect(url).await?.subscribe(Subscription::to("shop.*").shared("statistics"), count).start().await
}
