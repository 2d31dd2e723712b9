//! A transactional outbox: an order and its event are committed together, or neither is. A relay publishes the event
//! later, at least once, and subscribers drop what comes again.
//!
//! Without a command it shows all of it in one process. As several processes, which may be killed at any time:
//!
//! ```sh
//! cargo run --example outbox --features outbox -- orders --db shop.db --count 1000
//! cargo run --example outbox --features outbox -- relay --db shop.db --url amqp://localhost
//! cargo run --example outbox --features outbox -- ls --db shop.db
//! ```

mod outbox;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Mutex};

use hopline::{Client, Codec, Context, Running, Server, Subscription};
use rusqlite::Connection;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tracing_subscriber::EnvFilter;
use uuid::Uuid;

use outbox::{Failure, Outbox, is_new};

const USAGE: &str = "usage: outbox [URL]
       outbox orders --db FILE --count N
       outbox relay --db FILE [--url URL] [--once]
       outbox ls --db FILE";

/// The namespace of what is shown in one process: what others publish on the same broker is not for its subscriber.
const DEMO: &str = "outbox-demo";

/// What the shop tells when an order is there.
#[derive(Serialize)]
struct OrderCreated<'a> {
    order: &'a str,
    item: &'a str,
}

#[tokio::main]
async fn main() -> ExitCode {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn,lapin=off"));
    let demo = std::env::args().nth(1).is_none_or(|first| !["orders", "relay", "ls"].contains(&&*first));
    if !demo {
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    }
    match run().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("outbox: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn run() -> Result<(), Failure> {
    let (mut words, mut db, mut count, mut once) = (Vec::new(), None, None, false);
    let mut url = std::env::var("HOPLINE_URL").ok();
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match &*argument {
            "--db" => db = Some(PathBuf::from(arguments.next().ok_or(USAGE)?)),
            "--count" => count = Some(arguments.next().ok_or(USAGE)?.parse::<u64>()?),
            "--url" => url = Some(arguments.next().ok_or(USAGE)?),
            "--once" => once = true,
            _ => words.push(argument),
        }
    }
    match (words.first().map(String::as_str), db, count) {
        (Some("orders"), Some(db), Some(count)) => take_orders(&db, count),
        (Some("relay"), Some(db), None) => relay(&db, &url.ok_or(USAGE)?, once).await,
        (Some("ls"), Some(db), None) => list(&db),
        (first, None, None) => show(first.or(url.as_deref()).unwrap_or("memory://")).await,
        _ => Err(USAGE.into()),
    }
}

/// The orders of the shop, beside the outbox.
fn open_shop(path: &Path) -> Result<(Outbox, Connection), Failure> {
    let outbox = Outbox::open(path)?;
    let shop = outbox.connect()?;
    shop.execute_batch("CREATE TABLE IF NOT EXISTS orders (id TEXT PRIMARY KEY, item TEXT NOT NULL) STRICT")?;
    Ok((outbox, shop))
}

/// Takes an order, and tells of it: both or neither.
fn take_order(shop: &mut Connection, item: &str, is_paid: bool) -> rusqlite::Result<String> {
    let transaction = shop.transaction()?;
    let order = Uuid::new_v4().to_string();
    transaction.execute("INSERT INTO orders VALUES (?1, ?2)", (&order, item))?;
    Outbox::write(&transaction, "order.created", &OrderCreated { order: &order, item })?;
    if is_paid {
        transaction.commit()?
    } else {
        transaction.rollback()?
    }
    Ok(order)
}

/// Takes orders. Every third one is rolled back.
fn take_orders(path: &Path, count: u64) -> Result<(), Failure> {
    let (_, mut shop) = open_shop(path)?;
    for number in 1..=count {
        let is_paid = number % 3 != 0;
        let order = take_order(&mut shop, "tea", is_paid)?;
        println!("{} {order}", if is_paid { "committed" } else { "rolled back" });
    }
    Ok(())
}

/// Relays until it is killed, which may be at any time, or once what is there.
async fn relay(path: &Path, url: &str, once: bool) -> Result<(), Failure> {
    // The table has JSON. Events wait there while there is no broker, so there need not be one now.
    let client = Client::builder().codec(Codec::Json).with_env().connect_lazy(url)?;
    let mut relay = Outbox::open(path)?.relay(&client).await?;
    while !(once && relay.is_done().await?) {
        let batch = relay.next().await?;
        for number in batch.published {
            println!("published {number}");
        }
        for (number, why) in batch.failed {
            println!("failed {number}: {why}");
        }
    }
    Ok(())
}

/// Prints the orders, and what is in the outbox.
fn list(path: &Path) -> Result<(), Failure> {
    let (_, shop) = open_shop(path)?;
    let text = "SELECT 'order ' || id FROM orders
        UNION ALL SELECT 'waits ' || number || ' ' || key FROM outbox WHERE failed IS NULL
        UNION ALL SELECT 'failed ' || number || ' ' || key || ': ' || failed FROM outbox WHERE failed NOT NULL";
    for line in shop.prepare(text)?.query_map([], |row| row.get::<_, String>(0))? {
        println!("{}", line?);
    }
    Ok(())
}

/// All of it in one process, with databases that are removed at the end.
async fn show(url: &str) -> Result<(), Failure> {
    let folder = std::env::temp_dir().join(format!("hopline-outbox-{}", std::process::id()));
    std::fs::create_dir_all(&folder)?;
    let shown = show_in(&folder, url).await;
    std::fs::remove_dir_all(&folder)?;
    shown
}

async fn show_in(folder: &Path, url: &str) -> Result<(), Failure> {
    let (told, mut lines) = mpsc::unbounded_channel();
    let billing = bill(url, Connection::open(folder.join("billing.db"))?, told).await?;

    let (outbox, mut shop) = open_shop(&folder.join("shop.db"))?;
    for (item, is_paid) in [("tea", true), ("coffee", false), ("cake", true)] {
        take_order(&mut shop, item, is_paid)?;
        println!("{item}: {}", if is_paid { "committed" } else { "rolled back" });
    }
    // A mistake of the program: this is a pattern, and no key.
    let transaction = shop.transaction()?;
    Outbox::write(&transaction, "order.*", &OrderCreated { order: "none", item: "milk" })?;
    transaction.commit()?;
    outbox.wake();

    let client = Client::builder().codec(Codec::Json).namespace(DEMO).connect(url).await?;
    let mut relay = outbox.relay(&client).await?;
    // The first copy of the first event, as from a relay that was killed before it could remove the event.
    let event = "SELECT event FROM outbox ORDER BY number LIMIT 1";
    let event: String = shop.query_row(event, [], |row| row.get(0))?;
    client.publish("order.created", &serde_json::from_str::<serde_json::Value>(&event)?).await?;
    while !relay.is_done().await? {
        for (_, why) in relay.next().await?.failed {
            println!("never published: {why}");
        }
    }
    for _ in 0..3 {
        println!("{}", lines.recv().await.ok_or("the subscriber has ended")?);
    }
    billing.drain().await;
    Ok(())
}

/// What the subscriber reads of an event.
#[derive(Deserialize)]
struct NewOrder {
    event_id: String,
    order: String,
    item: String,
}

/// An instance of a group with a database of its own, which writes an invoice for each order. The broker keeps its events
/// while it is away.
async fn bill(url: &str, database: Connection, told: mpsc::UnboundedSender<String>) -> Result<Running, Failure> {
    database.execute_batch("CREATE TABLE invoices (order_id TEXT PRIMARY KEY, item TEXT NOT NULL) STRICT")?;
    let database = Arc::new(Mutex::new(database));
    let handler = move |_: Context, new: NewOrder| {
        let (database, told) = (database.clone(), told.clone());
        async move {
            let item = new.item.clone();
            let written = tokio::task::spawn_blocking(move || {
                write_invoice(&mut database.lock().expect("nobody panics with it"), &new)
            });
            // What fails is tried again, and kept as a dead letter in the end.
            let line = match written.await.map_err(|error| error.to_string())?.map_err(|error| error.to_string())? {
                true => format!("an invoice for {item}"),
                false => format!("{item} came again, and is dropped"),
            };
            told.send(line).map_err(|_| "nobody prints any more".to_owned())
        }
    };
    // There is one connection to the database.
    let subscription = Subscription::to("order.created").shared("billing").concurrency(1);
    let server = Server::builder().namespace(DEMO).connect(url).await?;
    Ok(server.subscribe(subscription, handler).start().await?)
}

/// Writes an invoice for an event that has not come before. The note that it has come is a part of the same transaction.
fn write_invoice(database: &mut Connection, new: &NewOrder) -> rusqlite::Result<bool> {
    let transaction = database.transaction()?;
    if !is_new(&transaction, &new.event_id)? {
        return Ok(false);
    }
    transaction.execute("INSERT INTO invoices VALUES (?1, ?2)", (&new.order, &new.item))?;
    transaction.commit()?;
    Ok(true)
}
