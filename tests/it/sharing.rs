//! Prefetch is the load balancing: whoever is free takes the next call.

use std::future::IntoFuture;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::future::join_all;
use hopline::{Context, Fault, Method, Service};

use crate::support::{Scene, soon};

/// A service whose method takes 50 ms, and how often it ran.
fn slow() -> (Service, Arc<AtomicUsize>) {
    let runs = Arc::new(AtomicUsize::new(0));
    let counter = runs.clone();
    let service = Service::new("slow", 1).method(Method::new("work"), move |_: Context, (n,): (u64,)| {
        counter.fetch_add(1, Ordering::SeqCst);
        async move {
            // The time is the work itself, not a wait for something.
            tokio::time::sleep(Duration::from_millis(50)).await;
            Ok::<_, Fault>(n)
        }
    });
    (service.prefetch(1).concurrency(1), runs)
}

#[tokio::test]
async fn two_servers_share_slow_calls_evenly_and_a_third_takes_its_part() {
    let scene = Scene::new();
    let (service, one) = slow();
    let _one = scene.serve(service).await;
    let (service, two) = slow();
    let _two = scene.serve(service).await;
    let client = scene.client().await;

    let calls = || join_all((0..200_u64).map(|n| client.call::<u64>("slow", "work", (n,)).into_future()));
    for (n, outcome) in (0..).zip(soon(calls()).await) {
        assert_eq!(outcome.expect("answered"), n);
    }
    let shares = (one.load(Ordering::SeqCst), two.load(Ordering::SeqCst));
    assert_eq!(shares.0 + shares.1, 200, "each call ran once");
    assert!((80..=120).contains(&shares.0), "shared {shares:?}");

    let (service, three) = slow();
    let _three = scene.serve(service).await;
    for (n, outcome) in (0..).zip(soon(calls()).await) {
        assert_eq!(outcome.expect("answered"), n);
    }
    let share = three.load(Ordering::SeqCst);
    assert!((40..=100).contains(&share), "the third took {share} of 200");
}
