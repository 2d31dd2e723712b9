//! A slow method does not hold up the others of its service, and the queue in front of a pool is bounded.

use std::future::IntoFuture as _;
use std::time::Duration;

use futures::future::join_all;
use hopline::{Client, Code, Context, Dispatch, Error, Fault, Method, MethodStats, Pending, QueueFull, Service};

use crate::support::{Arrival, Held, PATIENCE, Scene, has_read, hold, later, soon};

/// On which thread it runs.
async fn thread(_: Context, _: [(); 0]) -> Result<String, Fault> {
    let thread = std::thread::current();
    Ok(format!("{} {:?}", thread.name().unwrap_or("unnamed"), thread.id()))
}

async fn quick(client: &Client) -> String {
    soon(client.call::<String>("held", "quick", [(); 0]).into_future()).await.expect("answered")
}

/// A service whose method `hold` has these settings, and waits for the test. It has another one, `quick`.
fn held(settings: impl FnOnce(Method) -> Method) -> Held {
    let held = Held::new();
    Held { service: held.service.method("quick", thread).configure("hold", settings), ..held }
}

fn bounded(queue: usize, when_full: QueueFull) -> Dispatch {
    Dispatch::BoundedPool { threads: 1, queue, when_full }
}

async fn next(held: &mut Held) -> Arrival {
    soon(held.arrived.recv()).await.expect("it runs")
}

async fn start(client: &Client, number: u64) -> Pending<u64> {
    hold(client, number).start().await.expect("on its way")
}

fn service(held: &mut Held) -> Service {
    std::mem::replace(&mut held.service, Service::new("none", 1))
}

async fn stats(client: &Client) -> MethodStats {
    stats_of(client, "hold").await
}

async fn stats_of(client: &Client, name: &str) -> MethodStats {
    let stats = client.registry().stats("held").await.expect("it can be asked");
    let methods = stats.iter().flat_map(|stats| &stats.methods).filter(|method| method.name == name);
    methods.fold(MethodStats::default(), |sum, method| sum.with(method))
}

/// The fault of a call that was refused since there is no room for it.
async fn refused(call: hopline::Call<u64>) -> Fault {
    match soon(call.into_future()).await {
        Err(Error::Fault(fault)) if fault.code == Code::ResourceExhausted => fault,
        other => panic!("expected a refusal, not {other:?}"),
    }
}

#[tokio::test]
async fn a_method_runs_on_threads_of_its_own_and_the_others_where_the_service_says() {
    let scene = Scene::new();
    let service = Service::new("thread", 1)
        .dispatch(Dispatch::Pool(1))
        .method("shared", thread)
        .method(Method::new("own").dispatch(Dispatch::Pool(2)), thread)
        .method(Method::new("spawned").dispatch(Dispatch::Spawn), thread)
        .method(Method::new("inline").dispatch(Dispatch::Inline), thread)
        .method(Method::new("blocking").dispatch(Dispatch::Blocking), thread)
        .method(Method::new("places").concurrency(20), thread);
    let _server = scene.serve(service).await;
    let client = scene.client().await;
    let of = async |method: &str| {
        let calls = (0..20).map(|_| client.call::<String>("thread", method, [(); 0]).into_future());
        let mut names: Vec<_> = soon(join_all(calls)).await.into_iter().map(|name| name.expect("answered")).collect();
        names.sort_unstable();
        names.dedup();
        names
    };
    let (shared, own) = (of("shared").await, of("own").await);
    assert!(shared.len() == 1 && (1..=2).contains(&own.len()), "{shared:?} {own:?}");
    assert!(own.iter().all(|name| !shared.contains(name)), "{shared:?} {own:?}");
    assert_eq!(of("places").await, shared, "it has places of its own, and no threads");
    // The test's runtime has one thread.
    let here = of("spawned").await;
    assert_eq!((here.len(), of("inline").await), (1, here.clone()));
    assert!(of("blocking").await.iter().all(|name| !here.contains(name) && !shared.contains(name)));
}

#[tokio::test]
async fn calls_of_a_slow_method_take_no_place_of_the_others_and_more_than_fit_are_refused() {
    let pool: fn(Method) -> Method = |method| method.dispatch(Dispatch::Pool(1));
    for settings in [pool, |method| method.concurrency(4)] {
        let scene = Scene::new();
        let mut held = held(settings);
        let _server = scene.serve(service(&mut held).concurrency(4)).await;
        let client = scene.client().await;
        let pending = join_all((0..4).map(|number| start(&client, number))).await;
        let mut running = Vec::new();
        for _ in 0..4 {
            running.push(next(&mut held).await);
        }
        for number in 4..24 {
            let fault = refused(hold(&client, number)).await;
            assert_eq!(fault.retry_after, Some(Duration::from_millis(100)));
            assert!(fault.message.contains("no room for `hold`"), "{}", fault.message);
            quick(&client).await;
        }
        running.into_iter().for_each(Arrival::release);
        for pending in pending {
            soon(pending).await.expect("answered");
        }
        assert!(held.arrived.try_recv().is_err(), "none of the others has run");
        assert_eq!((stats(&client).await.finished, stats(&client).await.refused), (4, 20));
    }
}

#[tokio::test]
async fn a_small_prefetch_of_the_service_is_not_used_up_by_a_slow_method() {
    let scene = Scene::new();
    let mut held = held(|method| method.concurrency(3));
    let _server = scene.serve(service(&mut held).prefetch(1)).await;
    let client = scene.client().await;
    let pending = join_all((0..3).map(|number| start(&client, number))).await;
    let mut running = Vec::new();
    for _ in 0..3 {
        running.push(next(&mut held).await);
        quick(&client).await;
    }
    running.into_iter().for_each(Arrival::release);
    for pending in pending {
        soon(pending).await.expect("answered");
    }
}

#[tokio::test]
async fn a_bounded_queue_holds_so_many_calls_and_refuses_others() {
    for on_service in [false, true] {
        let scene = Scene::new();
        let dispatch = bounded(2, QueueFull::Refuse);
        let mut held = held(|method| if on_service { method } else { method.dispatch(dispatch).concurrency(1) });
        let service = service(&mut held);
        let service = if on_service { service.dispatch(dispatch).concurrency(1) } else { service };
        let _server = scene.serve(service).await;
        let client = scene.client().await;
        let first = start(&client, 1).await;
        let mut running = next(&mut held).await;
        let waiting = [start(&client, 2).await, start(&client, 3).await];
        refused(hold(&client, 4)).await;
        assert!(held.arrived.try_recv().is_err(), "one runs, no more");
        let mut order = Vec::new();
        for _ in 0..2 {
            order.push(running.number);
            running.release();
            running = next(&mut held).await;
        }
        order.push(running.number);
        running.release();
        assert_eq!(order, [1, 2, 3]);
        for pending in [first].into_iter().chain(waiting) {
            soon(pending).await.expect("answered");
        }
        assert_eq!((stats(&client).await.refused, stats(&client).await.caller_runs), (1, 0));
    }
}

#[tokio::test]
async fn a_call_that_is_too_late_while_it_waits_gives_its_room_to_another() {
    let scene = Scene::new();
    let mut held = held(|method| method.dispatch(bounded(1, QueueFull::Refuse)).concurrency(1));
    let _server = scene.serve(service(&mut held)).await;
    let client = scene.client().await;
    let first = start(&client, 1).await;
    let running = next(&mut held).await;
    let time = Duration::from_secs(5);
    let late = hold(&client, 2).timeout(time).start().await.expect("on its way");
    refused(hold(&client, 3)).await;
    let late = later(time, late).await;
    assert!(matches!(late, Err(Error::Timeout { .. })), "{late:?}");
    soon(async {
        while stats(&client).await.expired == 0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let second = start(&client, 4).await;
    refused(hold(&client, 5)).await;
    running.release();
    let running = next(&mut held).await;
    assert_eq!(running.number, 4);
    running.release();
    for pending in [first, second] {
        soon(pending).await.expect("answered");
    }
}

#[tokio::test]
async fn a_call_that_finds_the_queue_full_may_run_on_the_task_that_reads_it_and_nothing_is_read_meanwhile() {
    let scene = Scene::new();
    let settings = |method: Method| method.dispatch(bounded(0, QueueFull::CallerRuns)).concurrency(1);
    let mut held = held(settings);
    let server = scene.serve(service(&mut held)).await;
    let client = scene.client().await;
    let first = start(&client, 1).await;
    let pooled = next(&mut held).await;
    let second = start(&client, 2).await;
    let read = next(&mut held).await;
    assert_eq!((pooled.number, read.number), (1, 2));
    let waits = client.call::<String>("held", "quick", [(); 0]).start().await.expect("on its way");
    // One to the instance is read, and waits for a place.
    let to_instance = hold(&client, 3).to(server.instance()).start().await.expect("on its way");
    has_read(&client, "held", server.instance()).await;
    assert_eq!((held.arrived.try_recv().is_err(), stats(&client).await.caller_runs), (true, 1));
    let told = stats(&client).await;
    assert_eq!((told.running, told.refused, stats_of(&client, "quick").await.finished), (2, 0, 0));
    // A cancel reaches it there.
    drop(second);
    soon(read.context.cancelled()).await;
    soon(waits).await.expect("it is read now");
    pooled.release();
    let last = next(&mut held).await;
    assert_eq!(last.number, 3);
    last.release();
    for pending in [first, to_instance] {
        soon(pending).await.expect("answered");
    }
}

#[tokio::test]
async fn oneway_calls_of_a_slow_method_wait_for_a_place_and_are_not_refused() {
    let scene = Scene::new();
    let mut held = held(|method| method.concurrency(1).attempts(1));
    let _server = scene.serve(service(&mut held)).await;
    let client = scene.client().await;
    for number in 0..6 {
        client.oneway("held", "hold", (number,)).send().await.expect("the broker has it");
    }
    let mut numbers = Vec::new();
    for _ in 0..6 {
        let running = next(&mut held).await;
        refused(hold(&client, 9)).await;
        quick(&client).await;
        assert!(held.arrived.try_recv().is_err(), "one runs, no more");
        assert_eq!(running.context.attempt(), 1);
        numbers.push(running.number);
        running.release();
    }
    numbers.sort_unstable();
    assert_eq!(numbers, [0, 1, 2, 3, 4, 5]);
}

#[tokio::test]
async fn what_waits_in_front_of_a_pool_goes_to_another_instance_when_the_server_drains() {
    let scene = Scene::new();
    let settings = |method: Method| method.dispatch(bounded(4, QueueFull::Refuse)).concurrency(1);
    let (mut here, mut there) = (held(settings), held(settings));
    let first = scene.serve(service(&mut here)).await;
    let client = scene.client().await;
    let mut pending = vec![start(&client, 1).await];
    let running = next(&mut here).await;
    pending.push(start(&client, 2).await);
    client.oneway("held", "hold", (3,)).send().await.expect("the broker has it");
    // It is read after these. Both wait by then, or they come to the other instance by themselves.
    quick(&client).await;
    let _second = scene.serve(service(&mut there)).await;
    let drained = tokio::spawn(first.drain());
    let mut moved = Vec::new();
    for _ in 0..2 {
        let running = next(&mut there).await;
        moved.push(running.number);
        running.release();
    }
    moved.sort_unstable();
    assert_eq!(moved, [2, 3]);
    running.release();
    for pending in pending {
        soon(pending).await.expect("answered");
    }
    soon(drained).await.expect("it drains");
    assert!(here.arrived.try_recv().is_err());
}

#[tokio::test]
async fn a_handler_that_blocks_the_threads_of_its_method_does_not_hold_up_others() {
    let scene = Scene::new();
    let (go, gone) = std::sync::mpsc::channel::<()>();
    let gone = std::sync::Mutex::new(Some(gone));
    let block = move |_: Context, _: [(); 0]| {
        let gone = gone.lock().expect("no panic").take();
        async move { gone.expect("called once").recv_timeout(PATIENCE).map_err(|error| error.to_string()) }
    };
    let service = held(|method| method).service.method(Method::new("block").dispatch(Dispatch::Pool(1)), block);
    // The test's runtime has one thread. If it was blocked, the second call could not be answered.
    let _server = scene.serve(service).await;
    let client = scene.client().await;
    let waiting = client.call::<()>("held", "block", [(); 0]).start().await.expect("on its way");
    quick(&client).await;
    go.send(()).expect("it waits");
    soon(waiting).await.expect("answered");
}

#[tokio::test]
async fn a_method_that_is_not_there_cannot_be_configured() {
    let scene = Scene::in_memory();
    let service = Service::new("held", 1).configure("hold", |method| method.concurrency(1));
    let error = scene.server().await.serve(service).start().await.expect_err("it has no such method");
    assert!(error.to_string().contains("there is no method `hold` to configure"), "{error}");
    let service = held(|method| method).service.configure("hold", |_| Method::new("other"));
    let error = scene.server().await.serve(service).start().await.expect_err("its handler would have another name");
    assert!(error.to_string().contains("`hold` cannot become `other`"), "{error}");
}
