//! A flood by one caller, and what it costs another.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use futures::future::join_all;
use hopline::{Client, Code, Context, Error, FairShare, Fault, Service};
use tokio::time::Instant;

use crate::support::{Scene, soon};

const MILLI: Duration = Duration::from_millis(1);
/// How many calls the instance runs at once, and how long each takes.
const PLACES: usize = 8;
const TAKES: Duration = Duration::from_millis(20);

fn service() -> Service {
    let work = |_: Context, _: [(); 0]| async {
        tokio::time::sleep(TAKES).await;
        Ok::<_, Fault>(())
    };
    Service::new("shared", 1).concurrency(PLACES).method("work", work)
}

async fn work(client: &Client) -> Result<(), Error> {
    client.call("shared", "work", [(); 0]).timeout(Duration::from_secs(30)).await
}

/// What one caller sees who makes two calls at a time.
#[derive(Debug)]
struct Seen {
    p99: Duration,
    failed: usize,
}

async fn quiet(client: &Client, calls: usize) -> Seen {
    let one = async || {
        let mut times = Vec::new();
        let mut failed = 0;
        for _ in 0..calls / 2 {
            let began = Instant::now();
            failed += usize::from(work(client).await.is_err());
            times.push(began.elapsed());
        }
        (times, failed)
    };
    let (mut times, mut failed) = (Vec::new(), 0);
    for (its, fails) in join_all([one(), one()]).await {
        times.extend(its);
        failed += fails;
    }
    times.sort_unstable();
    Seen { p99: times[(times.len() * 99 / 100).min(times.len() - 1)], failed }
}

/// What a quiet caller sees alone, and then beside a caller that has 50 times its share of calls under way and makes each
/// again when it is refused, `pause` later. How many calls of that one were refused is the third.
async fn beside_a_flood(scene: &Scene, service: Service, calls: usize) -> (Seen, Seen, usize) {
    let _server = scene.serve(service).await;
    let (client, flooding) = (scene.client().await, scene.client().await);
    let alone = quiet(&client, calls).await;
    let (over, refused, done) = (Arc::new(AtomicBool::new(false)), AtomicUsize::new(0), AtomicUsize::new(0));
    let flood = async || {
        while !over.load(Ordering::Relaxed) {
            match work(&flooding).await {
                Ok(()) => _ = done.fetch_add(1, Ordering::Relaxed),
                Err(Error::Fault(fault)) => {
                    assert_eq!((fault.code, fault.retry_after), (Code::ResourceExhausted, Some(100 * MILLI)));
                    refused.fetch_add(1, Ordering::Relaxed);
                    tokio::time::sleep(100 * MILLI).await;
                }
                Err(error) => panic!("{error}"),
            }
        }
    };
    let share = PLACES / 2;
    let flood = join_all((0..50 * share).map(|_| flood()));
    let beside = async {
        let seen = quiet(&client, calls).await;
        over.store(true, Ordering::Relaxed);
        seen
    };
    let (beside, _) = soon(async { tokio::join!(beside, flood) }).await;
    assert!(done.load(Ordering::Relaxed) > 0, "it gets its share");
    (alone, beside, refused.load(Ordering::Relaxed))
}

#[tokio::test(start_paused = true)]
async fn a_flood_by_one_caller_at_fifty_times_its_share_at_most_doubles_the_time_of_another() {
    let (alone, beside, refused) = beside_a_flood(&Scene::in_memory(), service(), 40).await;
    println!("virtual time, p99 of another caller: alone {:?}, beside a flood {:?}", alone.p99, beside.p99);
    assert!(beside.p99 > 5 * alone.p99, "without shares it waits behind the flood: {alone:?}, {beside:?}");
    assert_eq!(refused, 0);
    let share = Arc::new(FairShare::by_caller(PLACES));
    let (alone, beside, refused) = beside_a_flood(&Scene::in_memory(), service().with(share.clone()), 400).await;
    println!("with shares: alone {:?}, beside {:?}, refused {refused}", alone.p99, beside.p99);
    assert!(beside.p99 <= 2 * alone.p99, "{alone:?}, {beside:?}");
    assert_eq!((alone.failed, beside.failed), (0, 0), "who keeps to its share is never refused");
    let counts = share.counts();
    assert_eq!((counts.refused, counts.callers), (refused as u64, 2));
    assert!(refused > 0);
    soon(async {
        while share.counts().calls > 0 {
            tokio::time::sleep(MILLI).await;
        }
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_is_alone_is_never_refused() {
    let scene = Scene::in_memory();
    let share = Arc::new(FairShare::by_caller(PLACES));
    let _server = scene.serve(service().with(share.clone())).await;
    let client = scene.client().await;
    for outcome in join_all((0..200).map(|_| work(&client))).await {
        outcome.expect("it has the instance for itself");
    }
    assert_eq!((share.counts().admitted, share.counts().refused, share.counts().calls), (200, 0, 0));
}

/// Real time decides nothing here: what happens with shares is compared with what happens without.
#[tokio::test]
async fn on_this_broker_a_flood_costs_another_caller_less_with_shares() {
    let (alone, beside, _) = beside_a_flood(&Scene::new(), service(), 20).await;
    let share = Arc::new(FairShare::by_caller(PLACES));
    let (with_alone, with_beside, refused) = beside_a_flood(&Scene::new(), service().with(share), 200).await;
    println!("p99 of another caller: alone {:?}, beside a flood {:?}", alone.p99, beside.p99);
    println!("with shares: alone {:?}, beside {:?}, refused {refused}", with_alone.p99, with_beside.p99);
    assert!(with_beside.p99 < beside.p99, "{beside:?}, {with_beside:?}");
    assert_eq!(with_beside.failed, 0);
}
