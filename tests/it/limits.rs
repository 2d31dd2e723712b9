//! What a server takes: rates, calls that come too late or are too many for it, and how many run at once.

use std::future::IntoFuture as _;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::future::join_all;
use hopline::{Adaptive, Client, Code, Context, Error, Fault, Method, RateLimit, Service, Shedding};
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::support::{Held, Scene, code, hold, soon};

const MILLI: Duration = Duration::from_millis(1);

fn fault<T: std::fmt::Debug>(outcome: Result<T, Error>) -> Fault {
    match outcome {
        Err(Error::Fault(fault)) => fault,
        other => panic!("expected a fault, not {other:?}"),
    }
}

/// A service whose method takes this long.
fn slow(time: Duration) -> (Service, Arc<AtomicUsize>) {
    let runs = Arc::new(AtomicUsize::new(0));
    let counted = runs.clone();
    let wait = move |_: Context, _: [(); 0]| {
        counted.fetch_add(1, Ordering::Relaxed);
        async move {
            tokio::time::sleep(time).await;
            Ok::<_, Fault>(())
        }
    };
    (Service::new("slow", 1).method("wait", wait), runs)
}

async fn wait(client: &Client) -> Result<(), Error> {
    client.call("slow", "wait", [(); 0]).await
}

#[tokio::test(start_paused = true)]
async fn a_request_over_the_rate_is_refused_and_told_when_there_is_room() {
    let scene = Scene::in_memory();
    let limit = Arc::new(RateLimit::per_user(10.0).burst(5));
    let (service, runs) = slow(Duration::ZERO);
    let _server = scene.serve(service.with(limit.clone())).await;
    let client = scene.client().await;
    for _ in 0..5 {
        wait(&client).await.expect("within the burst");
    }
    let refused = fault(wait(&client).await);
    assert_eq!((refused.code, refused.retry_after), (Code::ResourceExhausted, Some(100 * MILLI)));
    assert!(refused.message.contains("`wait`"), "{}", refused.message);
    tokio::time::advance(100 * MILLI).await;
    wait(&client).await.expect("there is room again");
    assert_eq!(code(wait(&client).await), Code::ResourceExhausted);
    // Questions of discovery are none of its business.
    client.registry().ping("slow").await.expect("it can be asked");
    let counts = limit.counts();
    assert_eq!((counts.admitted, counts.refused, counts.held, counts.buckets), (6, 2, 0, 1));
    assert_eq!(runs.load(Ordering::Relaxed), 6);
}

#[tokio::test]
async fn oneway_calls_over_the_rate_are_held_and_each_runs_at_its_first_attempt() {
    let scene = Scene::new();
    let limit = Arc::new(RateLimit::per_user(50.0).burst(2));
    let (ran, mut runs) = mpsc::unbounded_channel();
    let note = move |ctx: Context, (number,): (u32,)| {
        ran.send((number, ctx.attempt())).expect("the test listens");
        async { Ok::<_, Fault>(()) }
    };
    let service = Service::new("notes", 1).method(Method::new("note").oneway().attempts(1), note);
    let _server = scene.serve(service.with(limit.clone())).await;
    let client = scene.client().await;
    let began = Instant::now();
    let sent = (0..12_u32).map(|number| client.oneway("notes", "note", (number,)).send());
    join_all(sent).await.into_iter().for_each(|sent| sent.expect("the broker has it"));
    let mut seen = Vec::new();
    for _ in 0..12 {
        seen.push(soon(runs.recv()).await.expect("it runs"));
    }
    seen.sort_unstable();
    assert_eq!(seen, (0..12).map(|number| (number, 1)).collect::<Vec<_>>(), "each once, at its first attempt");
    assert!(began.elapsed() >= 199 * MILLI, "ten of them have waited for their turn: {:?}", began.elapsed());
    let counts = limit.counts();
    // One that was too much for its message was published again, and admitted once more.
    assert!(counts.admitted >= 12 && counts.held >= 10 && counts.refused == 0, "{counts:?}");
}

#[tokio::test]
async fn a_oneway_call_that_is_held_goes_to_another_instance_when_the_server_drains() {
    let scene = Scene::new();
    let limit = Arc::new(RateLimit::per_user(0.001));
    let Held { service, mut arrived } = Held::new();
    let first = scene.serve(service.with(limit.clone())).await;
    let client = scene.client().await;
    for number in [1, 2] {
        client.oneway("held", "hold", (number,)).send().await.expect("the broker has it");
    }
    let call = soon(arrived.recv()).await.expect("the first runs");
    soon(async {
        while limit.counts().held == 0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let Held { service, arrived: mut other } = Held::new();
    let _second = scene.serve(service).await;
    let number = call.number;
    call.release();
    soon(first.drain()).await;
    let moved = soon(other.recv()).await.expect("the second runs here");
    assert_eq!(moved.number, 3 - number);
    // RabbitMQ before 4 counts what is given back as well.
    assert!(moved.context.attempt() <= 3, "{}", moved.context.attempt());
    moved.release();
}

#[tokio::test(start_paused = true)]
async fn a_call_that_could_not_end_in_time_is_not_run_until_that_is_in_doubt() {
    let scene = Scene::in_memory();
    let shedding = Arc::new(Shedding::default().measured_by(|| None));
    let (service, runs) = slow(100 * MILLI);
    let _server = scene.serve(service.with(shedding.clone())).await;
    let client = scene.client().await;
    let short = || client.call::<()>("slow", "wait", [(); 0]).timeout(50 * MILLI).into_future();
    for _ in 0..20 {
        wait(&client).await.expect("it has the time");
    }
    let began = Instant::now();
    let late = fault(short().await);
    assert_eq!((late.code, late.retry_after), (Code::DeadlineExceeded, None));
    assert!(began.elapsed() < 50 * MILLI, "it is told at once");
    assert_eq!((runs.load(Ordering::Relaxed), shedding.counts().late), (20, 1));
    tokio::time::advance(Duration::from_secs(11)).await;
    assert!(matches!(short().await, Err(Error::Timeout { .. })), "what is old is not believed");
    assert_eq!(runs.load(Ordering::Relaxed), 21);
}

#[tokio::test(start_paused = true)]
async fn a_busy_machine_takes_as_many_calls_as_it_ends_and_refuses_others_by_their_own_code() {
    let scene = Scene::in_memory();
    let load = Arc::new(Mutex::new(Some(0.5)));
    let measured = load.clone();
    let shedding = Shedding::default().measured_by(move || *measured.lock().expect("no panic"));
    let shedding = Arc::new(shedding);
    let (service, runs) = slow(100 * MILLI);
    let _server = scene.serve(service.with(shedding.clone())).await;
    let client = scene.client().await;
    for _ in 0..20 {
        wait(&client).await.expect("there is nothing else");
    }
    let calls = || async { join_all((0..10).map(|_| wait(&client))).await };
    assert!(calls().await.iter().all(Result::is_ok), "the machine is idle");
    tokio::time::advance(Duration::from_secs(11)).await;
    for _ in 0..20 {
        wait(&client).await.expect("there is nothing else");
    }
    *load.lock().expect("no panic") = Some(0.95);
    tokio::time::advance(Duration::from_millis(250)).await;
    let (taken, refused): (Vec<_>, Vec<_>) = calls().await.into_iter().partition(Result::is_ok);
    assert!((1..=2).contains(&taken.len()), "one call in 0.1 s was the most: {}", taken.len());
    for refused in refused {
        let refused = fault(refused);
        assert_eq!((refused.code, refused.retry_after), (Code::ResourceExhausted, Some(100 * MILLI)));
    }
    let counts = shedding.counts();
    assert_eq!((counts.overloaded + taken.len() as u64, counts.load), (10, Some(0.95)));
    assert_eq!(runs.load(Ordering::Relaxed) as u64, counts.admitted);
}

/// What a machine does that runs 16 calls at once in 10 ms each. More of them take as many times as long.
fn crowded() -> (Service, Arc<AtomicUsize>) {
    let (running, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let busiest = most.clone();
    let work = move |_: Context, _: [(); 0]| {
        let (running, most) = (running.clone(), most.clone());
        async move {
            let now = running.fetch_add(1, Ordering::Relaxed) + 1;
            most.fetch_max(now, Ordering::Relaxed);
            let times = u32::try_from(now.div_ceil(16)).expect("few");
            tokio::time::sleep(10 * MILLI * times).await;
            running.fetch_sub(1, Ordering::Relaxed);
            Ok::<_, Fault>(())
        }
    };
    (Service::new("slow", 1).method("wait", work), busiest)
}

#[tokio::test(start_paused = true)]
async fn an_adaptive_limit_settles_where_calls_do_not_slow_each_other_down_and_the_others_wait() {
    let load = async |service: Service| {
        let scene = Scene::in_memory();
        let _server = scene.serve(service).await;
        let client = scene.client().await;
        let until = Instant::now() + Duration::from_secs(12);
        let caller = async || {
            while Instant::now() < until {
                wait(&client).await.expect("none is refused");
            }
        };
        join_all((0..100).map(|_| caller())).await;
    };
    let (service, fixed) = crowded();
    load(service).await;
    assert_eq!(fixed.load(Ordering::Relaxed), 100);
    let adaptive = Arc::new(Adaptive::default());
    let (service, most) = crowded();
    load(service.with(adaptive.clone())).await;
    let counts = adaptive.counts();
    assert!((8..=64).contains(&counts.limit), "{counts:?}");
    assert!(most.load(Ordering::Relaxed) <= 64, "{most:?}");
    assert!(counts.raised > 0 || counts.lowered > 0, "{counts:?}");
}

#[tokio::test]
async fn an_adaptive_limit_begins_with_its_start_and_is_no_refusal() {
    let scene = Scene::new();
    let adaptive = Arc::new(Adaptive::between(1, 8).start(2));
    let Held { service, mut arrived } = Held::new();
    let _server = scene.serve(service.with(adaptive.clone())).await;
    let client = scene.client().await;
    let mut pending = Vec::new();
    for number in 0..4 {
        pending.push(hold(&client, number).start().await.expect("on its way"));
    }
    let [first, second] = [soon(arrived.recv()).await, soon(arrived.recv()).await].map(|call| call.expect("it runs"));
    let stats = client.registry().stats("held").await.expect("it can be asked");
    assert_eq!(stats.iter().map(|stats| stats.running).sum::<u64>(), 2);
    first.release();
    second.release();
    for _ in 0..2 {
        soon(arrived.recv()).await.expect("it runs when there is a place").release();
    }
    for pending in pending {
        soon(pending).await.expect("answered");
    }
}
