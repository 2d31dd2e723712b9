//! Handlers run where the service chooses.

use std::collections::BTreeSet;
use std::future::IntoFuture;
use std::time::Duration;

use futures::future::join_all;
use hopline::{Context, Dispatch, Error, Fault, Method, Service};

use crate::support::{Held, Scene, hold, later, soon};

fn thread() -> Service {
    Service::new("thread", 1).method(Method::new("name"), |_: Context, _: [(); 0]| async {
        let thread = std::thread::current();
        Ok::<_, Fault>(format!("{} {:?}", thread.name().unwrap_or("unnamed"), thread.id()))
    })
}

#[tokio::test]
async fn every_way_to_run_handlers_answers_and_cancels() {
    for dispatch in [Dispatch::Inline, Dispatch::Spawn, Dispatch::Blocking, Dispatch::Pool(2)] {
        let scene = Scene::new();
        let Held { service, mut arrived } = Held::new();
        let _server =
            scene.server().await.serve(thread().dispatch(dispatch)).serve(service.dispatch(dispatch)).start().await;
        let client = scene.client().await;
        let calls = join_all((0..50).map(|_| client.call::<String>("thread", "name", [(); 0]).into_future()));
        for outcome in soon(calls).await {
            outcome.unwrap_or_else(|error| panic!("{dispatch:?}: {error}"));
        }
        let pending = hold(&client, 1).start().await.expect("on its way");
        let running = soon(arrived.recv()).await.expect("it runs");
        drop(pending);
        soon(running.context.cancelled()).await;
        let time = Duration::from_secs(5);
        let late = hold(&client, 2).timeout(time).start().await.expect("on its way");
        let running = soon(arrived.recv()).await.expect("it runs");
        let late = later(time, late).await;
        assert!(matches!(late, Err(Error::Timeout { .. })), "{dispatch:?}: {late:?}");
        soon(running.context.cancelled()).await;
    }
}

#[tokio::test]
async fn a_pool_has_threads_of_its_own_and_no_more_than_asked_for() {
    let scene = Scene::new();
    let _server = scene.serve(thread().dispatch(Dispatch::Pool(2))).await;
    let client = scene.client().await;
    let calls = join_all((0..200).map(|_| client.call::<String>("thread", "name", [(); 0]).into_future()));
    let names: BTreeSet<String> = soon(calls).await.into_iter().map(|outcome| outcome.expect("answers")).collect();
    assert!((1..=2).contains(&names.len()), "{names:?}");
    assert!(names.iter().all(|name| name.starts_with("hopline-thread")), "{names:?}");
}

#[tokio::test]
async fn a_handler_that_blocks_its_thread_does_not_hold_up_others() {
    let scene = Scene::new();
    let (go, gone) = std::sync::mpsc::channel::<()>();
    let gone = std::sync::Mutex::new(Some(gone));
    let blocking = Service::new("block", 1).dispatch(Dispatch::Blocking).method(
        Method::new("wait"),
        move |_: Context, _: [(); 0]| {
            let gone = gone.lock().expect("no panic").take();
            async move {
                let gone = gone.expect("called once");
                gone.recv_timeout(Duration::from_secs(60)).map_err(|error| error.to_string())
            }
        },
    );
    // The test's runtime has one thread. If it was blocked, the second call could not be answered.
    let _server = scene.server().await.serve(blocking).serve(thread()).start().await;
    let client = scene.client().await;
    let waiting = client.call::<()>("block", "wait", [(); 0]).start().await.expect("on its way");
    soon(client.call::<String>("thread", "name", [(); 0]).into_future()).await.expect("answers meanwhile");
    go.send(()).expect("it waits");
    soon(waiting).await.expect("answered");
}

#[tokio::test]
async fn no_more_calls_run_at_once_than_allowed() {
    let scene = Scene::new();
    let Held { service, mut arrived } = Held::new();
    let server = scene.serve(service.prefetch(20).concurrency(3)).await;
    let client = scene.client().await;
    let mut pending = Vec::new();
    for n in 0..6 {
        // Half of them go to the instance's own queue: the limit is for all queues together.
        let call = if n % 2 == 0 { hold(&client, n) } else { hold(&client, n).to(server.instance()) };
        pending.push(call.start().await.expect("on its way"));
    }
    let mut running = Vec::new();
    for _ in 0..3 {
        running.push(soon(arrived.recv()).await.expect("it runs"));
    }
    // Each call that ends makes room for one.
    for _ in 0..3 {
        arrived.try_recv().expect_err("three run, no more");
        running.remove(0).release();
        running.push(soon(arrived.recv()).await.expect("the next runs"));
    }
    running.into_iter().for_each(crate::support::Arrival::release);
    for outcome in soon(join_all(pending)).await {
        outcome.expect("answered");
    }
}
