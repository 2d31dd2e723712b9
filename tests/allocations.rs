//! How often a call takes memory from the allocator. Allocations cost more than anything else that a call does, and
//! each change adds some unless somebody counts.
//!
//! Calls are counted on the broker in this process, on one thread, so that each run counts the same. `cargo bench -p
//! hopline-benches --bench allocations` prints the figures, on RabbitMQ too.

use std::alloc::System;

use futures::future::try_join_all;
use hopline::{Client, Context, Error, Fault, Method, Server, Service};
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// How many calls are in flight.
const AT_ONCE: usize = 64;
/// How many calls each caller makes.
const ROUNDS: usize = 200;
/// How many allocations a call may take, client and server together. When a change needs fewer, lower it.
const MOST: f64 = 8.0;

/// Makes calls, so many at a time.
async fn calls(client: &Client) -> Result<(), Error> {
    let callers = (0..AT_ONCE).map(async |_| {
        for _ in 0..ROUNDS {
            let sum: i64 = client.call("counted.v1", "add", (2_i64, 3_i64)).await?;
            assert_eq!(sum, 5);
        }
        Ok::<(), Error>(())
    });
    try_join_all(callers).await.map(drop)
}

#[tokio::test(flavor = "current_thread")]
async fn a_call_takes_few_allocations() {
    let service = Service::new("counted", 1)
        .method(Method::new("add"), |_: Context, (a, b): (i64, i64)| async move { Ok::<_, Fault>(a + b) });
    let server = Server::connect("memory://").await.expect("it is in this process");
    let server = server.serve(service).start().await.expect("it serves");
    let client = Client::connect("memory://").await.expect("it is in this process");
    // What is kept for the next call is not counted.
    calls(&client).await.expect("answered");
    let (before, traffic_before) = (ALLOCATOR.stats(), client.traffic());
    calls(&client).await.expect("answered");
    let (counted, traffic) = (ALLOCATOR.stats() - before, client.traffic());
    let of_a_call = (counted.allocations + counted.reallocations) as f64 / (AT_ONCE * ROUNDS) as f64;
    let of_a_message = (AT_ONCE * ROUNDS) as f64 / (traffic.messages_sent - traffic_before.messages_sent) as f64;
    println!("{of_a_call:.2} allocations a call, {of_a_message:.1} calls a message");
    assert!(of_a_message > 30.0, "calls share no messages: {of_a_message}");
    assert!(of_a_call <= MOST, "{of_a_call:.2} allocations a call, and {MOST} are allowed");
    client.close().await;
    server.drain().await;
}
