//! What calls take from the allocator: allocations and bytes of a call, and the memory of calls in flight.
//!
//! `cargo bench -p hopline-benches --bench allocations` counts on the broker in memory, and with `-- --url amqp://localhost` on RabbitMQ.
//! Only there can the server and the broker be other processes, as the memory of the client alone asks for.

use std::alloc::System;
use std::env;
use std::future::pending;
use std::process::Stdio;
use std::time::Duration;

use hopline::{Client, Context, Error, Fault, Method, Server, Service};
use stats_alloc::{INSTRUMENTED_SYSTEM, Stats, StatsAlloc};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::task::JoinSet;
use tokio::time::sleep;

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const MEMORY: &str = "memory://";
/// Those of `hopline bench`, which no real service uses.
const NAMESPACE: &str = "hopline-bench";
/// How many calls are counted, after a tenth of them that is not.
const COUNTED: usize = 20_000;
/// How many are made at once where not one after the other.
const AT_ONCE: usize = 64;
/// How many calls wait for their reply.
const IN_FLIGHT: usize = 100_000;
/// After how many of them the broker is waited for: what buffers a burst stays as large as it once was, and would count as
/// memory of the calls.
const BURST: usize = 1_000;
/// Longer than any of them has to wait.
const LONG: Duration = Duration::from_secs(600);
/// How long the heap has to stay as it is to count as settled.
const STILL: Duration = Duration::from_millis(500);
/// What the process of a server prints when it can be called.
const READY: &str = "serving";

const USAGE: &str = "usage: cargo bench -p hopline-benches --bench allocations [-- --url URL]";

/// What this process is for.
enum Part {
    Count {
        url: String,
    },
    /// Serves the service of this name for another one, until its standard input ends.
    Serve {
        url: String,
        service: String,
    },
}

fn part(mut arguments: impl Iterator<Item = String>) -> Option<Part> {
    let (mut url, mut service) = (MEMORY.to_owned(), None);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            // Cargo's own.
            "--bench" => {}
            "--url" => url = arguments.next()?,
            "--serve" => service = Some(arguments.next()?),
            _ => return None,
        }
    }
    // An address may hold a password, which the arguments of a process show to all.
    Some(match service {
        Some(service) => Part::Serve { url: env::var("HOPLINE_URL").ok()?, service },
        None => Part::Count { url },
    })
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let Some(part) = part(env::args().skip(1)) else { return Err(USAGE.into()) };
    match part {
        Part::Serve { url, service } => serve_waiting(&url, &service).await?,
        Part::Count { url } => {
            count_calls(&url).await?;
            if url.starts_with(MEMORY) {
                println!("\nThe memory of calls in flight is that of a client alone: name a RabbitMQ by `--url`.");
            } else {
                count_in_flight(&url).await?;
            }
        }
    }
    Ok(())
}

// ---------------------------------------------------------------- allocations of a call

async fn count_calls(url: &str) -> Result<(), Box<dyn std::error::Error>> {
    let service = Service::new("counted", 1)
        .method(Method::new("add"), |_: Context, (a, b): (i64, i64)| async move { Ok::<_, Fault>(a + b) });
    let server = Server::builder().namespace(NAMESPACE).connect(url).await?.serve(service).start().await?;
    let client = Client::builder().namespace(NAMESPACE).connect(url).await?;

    println!("Client and server in one process; an allocation that grows counts as one more.\n");
    println!("| calls in flight | allocations a call | bytes a call | calls a message |");
    println!("| ---: | ---: | ---: | ---: |");
    for at_once in [1, AT_ONCE] {
        calls(&client, at_once, COUNTED / 10).await?;
        let (before, traffic_before) = (ALLOCATOR.stats(), client.traffic());
        calls(&client, at_once, COUNTED).await?;
        let (after, traffic) = (ALLOCATOR.stats(), client.traffic());
        let counted = after - before;
        println!(
            "| {at_once} | {:.1} | {:.0} | {:.1} |",
            (counted.allocations + counted.reallocations) as f64 / COUNTED as f64,
            counted.bytes_allocated as f64 / COUNTED as f64,
            (traffic.calls_sent - traffic_before.calls_sent) as f64
                / (traffic.messages_sent - traffic_before.messages_sent) as f64,
        );
    }
    client.close().await;
    server.drain().await;
    Ok(())
}

/// Makes so many calls, from as many tasks as are to be in flight: what the tasks allocate is little beside it.
async fn calls(client: &Client, at_once: usize, calls: usize) -> Result<(), Box<dyn std::error::Error>> {
    let mut callers = JoinSet::new();
    for caller in 0..at_once {
        let client = client.clone();
        let share = (caller..calls).step_by(at_once).len();
        callers.spawn(async move {
            for _ in 0..share {
                let _sum: i64 = client.call("counted.v1", "add", (2_i64, 3_i64)).await?;
            }
            Ok::<(), Error>(())
        });
    }
    while let Some(caller) = callers.join_next().await {
        caller??;
    }
    Ok(())
}

// -------------------------------------------------------------- memory of calls in flight

async fn count_in_flight(url: &str) -> Result<(), Box<dyn std::error::Error>> {
    println!("\n{IN_FLIGHT} calls in flight on one client, server and broker in other processes.\n");
    println!("| waiting | live bytes a call |");
    println!("| --- | ---: |");
    println!("| a `Pending` each, in a `Vec` | {:.0} |", started(url, "started").await?);
    println!("| a task each, which awaits the call | {:.0} |", spawned(url, "spawned").await?);
    Ok(())
}

/// Live bytes of a call that was started, and is kept to be awaited.
async fn started(url: &str, service: &str) -> Result<f64, Box<dyn std::error::Error>> {
    let server = start_server(url, service).await?;
    let client = Client::builder().namespace(NAMESPACE).timeout(LONG).connect(url).await?;
    let before = live(ALLOCATOR.stats());
    let mut waiting = Vec::with_capacity(IN_FLIGHT);
    for call in 0..IN_FLIGHT {
        waiting.push(client.call::<i64>(service, "wait", (2_i64, 3_i64)).start().await?);
        if call % BURST == 0 {
            broker_has_all(&client).await?;
        }
    }
    let after = settled(&client).await?;
    // A client that is closed has nobody to tell that its calls are given up.
    client.close().await;
    drop(waiting);
    end_server(server).await?;
    Ok((after - before) as f64 / IN_FLIGHT as f64)
}

/// The same of one that a task of its own awaits.
async fn spawned(url: &str, service: &'static str) -> Result<f64, Box<dyn std::error::Error>> {
    let server = start_server(url, service).await?;
    let client = Client::builder().namespace(NAMESPACE).timeout(LONG).connect(url).await?;
    // Its memory is not that of the calls.
    let mut tasks = Vec::with_capacity(IN_FLIGHT);
    let before = live(ALLOCATOR.stats());
    for call in 0..IN_FLIGHT {
        let caller = client.clone();
        tasks.push(tokio::spawn(async move { caller.call::<i64>(service, "wait", (2_i64, 3_i64)).await }));
        if call % BURST == 0 {
            broker_has_all(&client).await?;
        }
    }
    let after = settled(&client).await?;
    client.close().await;
    for task in tasks {
        match task.await? {
            Err(Error::Disconnected { .. }) => {}
            ended => return Err(format!("a call that nobody answers ended with {ended:?}").into()),
        }
    }
    end_server(server).await?;
    Ok((after - before) as f64 / IN_FLIGHT as f64)
}

/// Returns when the broker has what was sent before: an event goes the same way, and is confirmed.
async fn broker_has_all(client: &Client) -> Result<(), Error> {
    client.publish("calls-sent", &()).await.map(drop)
}

/// Live bytes once the broker has all calls, and the client knows it, after which nothing changes.
async fn settled(client: &Client) -> Result<isize, Error> {
    broker_has_all(client).await?;
    // Events are counted with the calls: one for each burst, and this one.
    let sent = (IN_FLIGHT + IN_FLIGHT.div_ceil(BURST) + 1) as u64;
    let mut last = live(ALLOCATOR.stats());
    loop {
        sleep(STILL).await;
        let now = live(ALLOCATOR.stats());
        // What the runtime and the connection do by themselves is less than this.
        if client.traffic().calls_sent == sent && now.abs_diff(last) < IN_FLIGHT {
            return Ok(now);
        }
        last = now;
    }
}

fn live(stats: Stats) -> isize {
    stats.bytes_allocated.wrapping_sub(stats.bytes_deallocated).cast_signed()
}

/// Serves calls that are never answered, until the standard input ends.
async fn serve_waiting(url: &str, service: &str) -> Result<(), Box<dyn std::error::Error>> {
    // The calls that still wait when the server is gone go with the queue.
    let service = Service::new(service, 1)
        .grace(Duration::from_secs(1))
        .method(Method::new("wait"), |_: Context, _: (i64, i64)| pending::<Result<i64, Fault>>());
    let _serving = Server::builder().namespace(NAMESPACE).connect(url).await?.serve(service).start().await?;
    println!("{READY}");
    tokio::io::stdin().read_to_end(&mut Vec::new()).await?;
    Ok(())
}

async fn start_server(url: &str, service: &str) -> Result<Child, Box<dyn std::error::Error>> {
    let mut command = Command::new(env::current_exe()?);
    command.args(["--serve", service]).env("HOPLINE_URL", url);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
    let mut server = command.spawn()?;
    let printed = server.stdout.as_mut().ok_or("its output is not piped")?;
    match BufReader::new(printed).lines().next_line().await? {
        Some(line) if line == READY => Ok(server),
        _ => Err("the server ended before it served".into()),
    }
}

async fn end_server(mut server: Child) -> Result<(), Box<dyn std::error::Error>> {
    // It ends with its input.
    drop(server.stdin.take());
    let status = server.wait().await?;
    if status.success() { Ok(()) } else { Err(format!("the server failed: {status}").into()) }
}
