//! An instance that fails leaves its service's queue for a while.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use futures::future::join_all;
use hopline::{
    Client, Code, Context, Error, Fault, Invocation, Method, Middleware, Next, Quarantine, Readiness, Reply, Running,
    Service,
};

use crate::support::{PATIENCE, Scene, soon};

/// Tries a call again, at most three times.
struct Again;

impl Middleware for Again {
    async fn handle(&self, call: Invocation, next: Next) -> Result<Reply, Error> {
        for _ in 0..3 {
            match next.run(call.clone()).await {
                Err(error) if call.idempotent() && error.code() == Code::Internal => {}
                outcome => return outcome,
            }
        }
        next.run(call).await
    }
}

/// An instance, which fails at once while `failing` says so. How many calls it has run is counted.
struct Member {
    running: Running,
    failing: Arc<AtomicBool>,
    runs: Arc<AtomicUsize>,
    quarantine: Arc<Quarantine>,
}

impl Member {
    async fn start(scene: &Scene, quarantine: Option<Quarantine>, fails: bool) -> Self {
        let (failing, runs) = (Arc::new(AtomicBool::new(fails)), Arc::new(AtomicUsize::new(0)));
        let (broken, counted) = (failing.clone(), runs.clone());
        let work = move |_: Context, _: [(); 0]| {
            let (broken, counted) = (broken.clone(), counted.clone());
            async move {
                counted.fetch_add(1, Ordering::Relaxed);
                if broken.load(Ordering::Relaxed) {
                    return Err(Fault::new(Code::Internal, "the database lets nobody in"));
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
                Ok(())
            }
        };
        let service = Service::new("fleet", 1).concurrency(4).method(Method::new("work").idempotent(), work);
        let on = quarantine.is_some();
        let quarantine = Arc::new(quarantine.unwrap_or_default());
        let service = if on { service.with(quarantine.clone()) } else { service };
        Self { running: scene.serve(service).await, failing, runs, quarantine }
    }

    fn is_out(&self) -> bool {
        self.quarantine.counts().now == 1
    }

    fn runs(&self) -> usize {
        self.runs.load(Ordering::Relaxed)
    }
}

async fn work(client: &Client) -> Result<(), Error> {
    client.call("fleet", "work", [(); 0]).idempotent().await
}

/// How many of so many calls fail, with sixteen at a time.
async fn failures(client: &Client, calls: usize) -> usize {
    let caller = async || {
        let mut failed = 0;
        for _ in 0..calls / 16 {
            failed += usize::from(work(client).await.is_err());
        }
        failed
    };
    join_all((0..16).map(|_| caller())).await.into_iter().sum()
}

async fn until(is_so: impl Fn() -> bool) {
    soon(async {
        while !is_so() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
}

/// How many of `calls` fail in a fleet of four of which one fails at once.
async fn in_a_fleet(scene: &Scene, with: Option<fn() -> Quarantine>, tries_again: bool, calls: usize) -> usize {
    let mut members = Vec::new();
    for number in 0..4 {
        members.push(Member::start(scene, with.map(|with| with()), number == 0).await);
    }
    let builder = Client::builder().namespace(&scene.namespace).timeout(PATIENCE);
    let builder = if tries_again { builder.with(Again) } else { builder };
    let client = builder.connect(&scene.url).await.expect("the broker is there");
    failures(&client, calls).await
}

#[tokio::test]
async fn a_fleet_with_one_instance_that_fails_at_once_answers_nearly_all_with_quarantine_and_retry() {
    const CALLS: usize = 8_000;
    let share = |failed: usize| 100.0 * (1.0 - failed as f64 / CALLS as f64);
    let with: Option<fn() -> Quarantine> = Some(Quarantine::default);
    let neither = in_a_fleet(&Scene::new(), None, false, CALLS).await;
    let retry = in_a_fleet(&Scene::new(), None, true, CALLS).await;
    let quarantine = in_a_fleet(&Scene::new(), with, false, CALLS).await;
    let both = in_a_fleet(&Scene::new(), with, true, CALLS).await;
    println!(
        "answered: {:.2} % with neither, {:.2} % with retry, {:.2} % with quarantine, {:.3} % with both",
        share(neither),
        share(retry),
        share(quarantine),
        share(both)
    );
    assert!(share(neither) < 75.0, "it attracts calls: {neither}");
    assert!(share(retry) < 99.9, "{retry}");
    assert!(quarantine < neither / 10, "{quarantine} of {neither}");
    assert!(share(both) >= 99.9, "{both}");
}

#[tokio::test(start_paused = true)]
async fn a_quarantine_takes_its_time_and_longer_the_next_time_and_is_told() {
    let scene = Scene::in_memory();
    let bad = Member::start(&scene, Some(Quarantine::default()), true).await;
    let good = Member::start(&scene, None, false).await;
    let client = scene.client().await;
    let (health, mut began) = (bad.running.health(), tokio::time::Instant::now());
    for time in [30, 60, 90] {
        assert!(failures(&client, 160).await > 0);
        until(|| bad.is_out()).await;
        assert!(began.elapsed() < Duration::from_secs(30 + 1), "{:?}", began.elapsed());
        began = tokio::time::Instant::now();
        let now = health.now();
        let reason = now.reason().expect("it is told").to_owned();
        assert!(matches!(now, Readiness::Degraded { .. }) && reason.starts_with("quarantined for"), "{reason}");
        assert!(reason.contains(&format!("{time}s")), "{reason}");
        let instances = client.registry().instances("fleet").await.expect("they can be asked");
        let out: Vec<_> = instances.iter().filter(|instance| instance.quarantined).collect();
        assert_eq!(out.iter().map(|instance| &*instance.instance).collect::<Vec<_>>(), [bad.running.instance()]);
        let before = bad.runs();
        assert_eq!(failures(&client, 160).await, 0, "the others answer");
        assert_eq!(bad.runs(), before);
        let to_it = client.call::<()>("fleet", "work", [(); 0]).to(bad.running.instance());
        assert!(to_it.await.is_err(), "who calls it by its id reaches it");
        tokio::time::sleep(Duration::from_secs(time) - began.elapsed() - Duration::from_secs(1)).await;
        assert!(bad.is_out());
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert!(!bad.is_out());
        until(|| health.now() == Readiness::Ready).await;
        began = tokio::time::Instant::now();
    }
    bad.failing.store(false, Ordering::Relaxed);
    let before = bad.runs();
    until(|| health.now() == Readiness::Ready).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(failures(&client, 160).await, 0);
    assert!(bad.runs() > before, "it takes its part again");
    assert!(good.runs() > 0);
    assert_eq!((bad.quarantine.counts().begun, bad.quarantine.counts().spared), (3, 0));
}

#[tokio::test]
async fn the_only_instance_stays_and_one_that_has_become_the_only_one_comes_back() {
    let scene = Scene::new();
    let bad = Member::start(&scene, Some(Quarantine::default()), true).await;
    let client = scene.client().await;
    assert_eq!(failures(&client, 160).await, 160);
    until(|| bad.quarantine.counts().spared > 0).await;
    assert_eq!(bad.quarantine.counts().begun, 0);
    let other = Member::start(&scene, None, false).await;
    soon(async {
        while !bad.is_out() {
            failures(&client, 16).await;
        }
    })
    .await;
    let before = bad.runs();
    soon(other.running.drain()).await;
    until(|| !bad.is_out()).await;
    assert!(soon(work(&client)).await.is_err(), "a failure is better than nobody");
    assert!(bad.runs() > before);
}

#[tokio::test]
async fn what_waits_in_an_instance_that_leaves_is_given_back_and_runs_elsewhere() {
    let scene = Scene::new();
    let bad = Member::start(&scene, Some(Quarantine::default()), true).await;
    let _good = Member::start(&scene, None, false).await;
    let builder = Client::builder().namespace(&scene.namespace).timeout(PATIENCE);
    let client = builder.connect(&scene.url).await.expect("the broker is there");
    // All at once: some of them wait in the instance when it leaves.
    let outcomes = soon(join_all((0..2_000).map(|_| work(&client)))).await;
    let failed = outcomes.iter().filter(|outcome| outcome.is_err()).count();
    assert!(outcomes.iter().all(|outcome| outcome.as_ref().err().is_none_or(|error| error.code() == Code::Internal)));
    until(|| bad.is_out()).await;
    assert_eq!(failed, bad.runs(), "each call ran once");
}
