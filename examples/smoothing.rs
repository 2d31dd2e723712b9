//! Traffic smoothing: a spike of twenty times what a service can do, for two seconds. Its queue takes what it can work off
//! soon. The rest is told so at once, and is tried again within a budget.
//!
//! `cargo run --example smoothing -- amqp://localhost chart.svg` also draws what has happened.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hopline::{Client, Coalesce, Context, Error, Fault, Method, Server, Service};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};

/// How long a call takes. The service runs one at a time.
const WORK: Duration = Duration::from_millis(20);
/// So many calls it can do in a second.
const CAPACITY: u32 = 50;
/// How many calls may wait: those of half a second.
const MAX_QUEUE: u32 = CAPACITY / 2;
/// Calls a second before, in and after the spike, and for how many seconds.
const LOAD: [(u32, u64); 3] = [(CAPACITY / 2, 1), (20 * CAPACITY, 2), (CAPACITY / 2, 2)];
/// What is counted together in the chart.
const SLOT: Duration = Duration::from_millis(100);

/// What has happened, and when.
#[derive(Default)]
struct Seen {
    offered: Vec<Duration>,
    taken: Vec<Duration>,
    refused: Vec<Duration>,
    done: Vec<Duration>,
    /// How long the calls took that were refused and not tried again.
    round_trips: Vec<Duration>,
    depth: Vec<(Duration, u64)>,
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let url = std::env::args().nth(1).or_else(|| std::env::var("HOPLINE_URL").ok());
    let url = url.unwrap_or_else(|| "memory://".to_owned());
    let runs = Arc::new(AtomicU64::new(0));
    let counted = runs.clone();
    let work = move |_: Context, (): ()| {
        counted.fetch_add(1, Ordering::Relaxed);
        async {
            sleep(WORK).await;
            Ok::<_, Fault>(())
        }
    };
    // One message is one call here: `max_queue` counts messages.
    let service = Service::new("smoothing", 1).method(Method::new("work").idempotent(), work);
    let service = service.concurrency(1).prefetch(1).max_queue(MAX_QUEUE);
    let server = Server::connect(&url).await?.serve(service).start().await?;
    let client = Client::builder().coalesce(Coalesce::Off).timeout(Duration::from_secs(30)).connect(&url).await?;

    let (seen, start) = (Arc::new(Mutex::new(Seen::default())), Instant::now());
    let watching = tokio::spawn(watch(client.clone(), seen.clone(), start));
    let mut calls = Vec::new();
    for (per_second, seconds) in LOAD {
        let mut ticks = interval(Duration::from_secs(1) / per_second);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
        for _ in 0..u64::from(per_second) * seconds {
            ticks.tick().await;
            // Every other call is tried again once.
            calls.push(tokio::spawn(call(client.clone(), calls.len() % 2 == 0, seen.clone(), start)));
        }
    }
    let offered = calls.len();
    for call in calls {
        call.await??;
    }
    watching.abort();
    server.drain().await;

    let mut seen = seen.lock().expect("no panic while holding it");
    let counts = client.policies();
    let took = seen.done.iter().max().copied().unwrap_or_default();
    let (done, refused) = (seen.done.len(), seen.refused.len());
    println!("{offered} calls: {done} done, {refused} refused, {} runs", runs.load(Ordering::Relaxed));
    println!("{} further attempts, {} over the budget", counts.retries, counts.refused_by_budget);
    println!("at most {} in the queue", seen.depth.iter().map(|(_, calls)| *calls).max().unwrap_or_default());
    println!("{:.1} done in a second", done as f64 / took.as_secs_f64());
    seen.round_trips.sort_unstable();
    if let Some(median) = seen.round_trips.get(seen.round_trips.len() / 2) {
        println!("refused within {median:.1?} (median)");
    }
    if let Some(path) = std::env::args().nth(2) {
        std::fs::write(&path, chart(&seen))?;
    }
    Ok(())
}

/// Makes one call, and notes what becomes of it.
async fn call(client: Client, is_tried_again: bool, seen: Arc<Mutex<Seen>>, start: Instant) -> Result<(), Error> {
    let since = start.elapsed();
    let call = client.call::<()>("smoothing", "work", ()).idempotent();
    let outcome = call.retry(u32::from(is_tried_again)).await;
    let now = start.elapsed();
    let mut seen = seen.lock().expect("no panic while holding it");
    seen.offered.push(since);
    match outcome {
        Ok(()) => {
            seen.taken.push(since);
            seen.done.push(now);
        }
        Err(Error::Overloaded { .. }) => {
            seen.refused.push(now);
            if !is_tried_again {
                seen.round_trips.push(now - since);
            }
        }
        Err(error) => return Err(error),
    }
    Ok(())
}

/// Looks into the queue, again and again.
async fn watch(client: Client, seen: Arc<Mutex<Seen>>, start: Instant) {
    let mut ticks = interval(SLOT / 2);
    loop {
        ticks.tick().await;
        let Ok(queues) = client.registry().queues("smoothing").await else { continue };
        let waiting = queues.calls.map_or(0, |calls| calls.waiting);
        seen.lock().expect("no panic while holding it").depth.push((start.elapsed(), waiting));
    }
}

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 340.0;
/// What is left of the chart, above it, to its right and below it.
const EDGES: [f64; 4] = [60.0, 40.0, 20.0, 45.0];

/// A chart of calls a second on a logarithmic scale, since the spike is twenty times as high as what is done.
fn chart(seen: &Seen) -> String {
    let [left, top, right, bottom] = EDGES;
    let end = seen.done.iter().max().copied().unwrap_or_default().as_secs_f64().ceil();
    let highest: f64 = 2_000.0;
    let x = |seconds: f64| left + seconds / end * (WIDTH - left - right);
    let y = |value: f64| {
        let part = (value + 1.0).log10() / (highest + 1.0).log10();
        HEIGHT - bottom - part * (HEIGHT - top - bottom)
    };
    let per_second = |times: &[Duration]| -> Vec<(f64, f64)> {
        let slots = (end / SLOT.as_secs_f64()) as usize;
        let count = |slot: usize| {
            let in_slot = |time: &&Duration| (time.as_secs_f64() / SLOT.as_secs_f64()) as usize == slot;
            times.iter().filter(in_slot).count() as f64 / SLOT.as_secs_f64()
        };
        (0..slots).map(|slot| ((slot as f64 + 0.5) * SLOT.as_secs_f64(), count(slot))).collect()
    };
    let depth = seen.depth.iter().map(|(time, calls)| (time.as_secs_f64(), *calls as f64)).collect();
    let lines = [
        ("offered/s", "#888888", per_second(&seen.offered)),
        ("refused/s", "#d62728", per_second(&seen.refused)),
        ("taken/s", "#1f77b4", per_second(&seen.taken)),
        ("done/s", "#2ca02c", per_second(&seen.done)),
        ("in the queue", "#9467bd", depth),
    ];
    let mut svg = format!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">
<rect width="100%" height="100%" fill="#ffffff"/>
"##
    );
    for value in [0, 10, 50, 100, 500, 1_000] {
        let at = y(f64::from(value));
        let (far, near) = (WIDTH - right, left - 8.0);
        let _ = writeln!(svg, r##"<path d="M{left} {at:.1}H{far}" stroke="#dddddd"/>"##);
        let _ = writeln!(svg, r##"<text x="{near}" y="{:.1}" text-anchor="end">{value}</text>"##, at + 4.0);
    }
    for second in 0..=end as u32 {
        let (at, low) = (x(f64::from(second)), HEIGHT - bottom + 18.0);
        let _ = writeln!(svg, r##"<text x="{at:.1}" y="{low}" text-anchor="middle">{second} s</text>"##);
    }
    for (n, (name, colour, points)) in lines.iter().enumerate() {
        let points: Vec<_> = points.iter().map(|(time, value)| format!("{:.1},{:.1}", x(*time), y(*value))).collect();
        let points = points.join(" ");
        let _ = writeln!(svg, r##"<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>"##);
        let at = left + n as f64 * 120.0;
        let (line, text) = (at + 18.0, at + 24.0);
        let _ = writeln!(svg, r##"<path d="M{at} 18H{line}" stroke="{colour}" stroke-width="3"/>"##);
        let _ = writeln!(svg, r##"<text x="{text}" y="22">{name}</text>"##);
    }
    svg + "</svg>\n"
}
