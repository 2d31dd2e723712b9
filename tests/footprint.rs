//! The memory that clients need. The test is a process of its own, in which nothing else uses memory.

use std::fs;
use std::future::Future;
use std::time::{Duration, Instant};

use futures::future::join_all;
use hopline::Client;

/// How long a test waits for an event before it fails.
const PATIENCE: Duration = Duration::from_secs(60);

async fn soon<F: Future>(event: F) -> F::Output {
    tokio::time::timeout(PATIENCE, event).await.expect("what has to happen happens within a minute")
}

/// The memory that this process uses, in KiB.
fn memory() -> u64 {
    let status = fs::read_to_string("/proc/self/status").expect("it runs on Linux");
    let memory = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a process uses memory");
    memory.trim().trim_end_matches(" kB").parse().expect("a number")
}

#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_clients_take_less_than_a_mib_each() {
    let url = std::env::var("HOPLINE_TEST_URL").unwrap_or_else(|_| "memory://footprint".to_owned());
    const CLIENTS: u64 = 200;
    let (before, began) = (memory(), Instant::now());
    let connecting = (0..CLIENTS).map(|_| Client::builder().connect_timeout(PATIENCE).connect(&url));
    let clients: Result<Vec<_>, _> = soon(join_all(connecting)).await.into_iter().collect();
    let clients = clients.expect("the broker is there");
    let connected = began.elapsed();
    // Each client has been used.
    for published in soon(join_all(clients.iter().map(|client| client.publish("footprint", &7)))).await {
        published.expect("the broker has it");
    }
    let grown = memory().saturating_sub(before);
    println!("{CLIENTS} clients connected in {connected:.2?} and take {} KiB each", grown / CLIENTS);
    assert!(grown < CLIENTS * 1024, "VmRSS grew by {grown} KiB");
    soon(join_all(clients.iter().map(Client::close))).await;
}
