//! A server that drains loses nothing. The calls that run end; others get the rest, as if it had never been delivered.

use std::collections::HashMap;
use std::future::IntoFuture;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::future::join_all;
use hopline::{Absent, Client, Coalesce, Code, Context, Error, Fault, Method, Service, Unanswered};
use tokio::sync::{mpsc, oneshot};

use crate::node::when;
use crate::support::{Arrival, Held, Scene, code, hold, soon};

#[tokio::test]
async fn a_server_stopped_in_the_middle_loses_no_call_and_runs_none_twice() {
    let scene = Scene::new();
    let runs = Arc::new(Mutex::new(HashMap::<u64, usize>::new()));
    let (started, mut starts) = mpsc::unbounded_channel();
    let service = || {
        let (runs, started) = (runs.clone(), started.clone());
        let service = Service::new("work", 1).method(Method::new("do"), move |_: Context, (n,): (u64,)| {
            *runs.lock().expect("no panic").entry(n).or_default() += 1;
            started.send(n).expect("the test listens");
            async move {
                // The time is the work itself.
                tokio::time::sleep(Duration::from_millis(5)).await;
                Ok::<_, Fault>(n)
            }
        });
        // Many calls are prefetched and few run, so most of what the leaving server holds has not begun.
        service.prefetch(50).concurrency(2)
    };
    let leaving = scene.serve(service()).await;
    let _staying = scene.serve(service()).await;
    let client = scene.client().await;
    let calls = tokio::spawn(async move {
        join_all((0..400_u64).map(|n| client.call::<u64>("work", "do", (n,)).into_future())).await
    });
    for _ in 0..40 {
        soon(starts.recv()).await.expect("calls run");
    }
    soon(leaving.drain()).await;
    let outcomes = soon(calls).await.expect("no panic");
    for (n, outcome) in (0..).zip(outcomes) {
        assert_eq!(outcome.expect("no call is lost or aborted"), n);
    }
    let runs = runs.lock().expect("no panic");
    assert_eq!(runs.len(), 400);
    assert!(runs.values().all(|times| *times == 1), "some ran twice: {runs:?}");
}

/// When a consumer is cancelled, the broker requeues what it was about to deliver, and marks it as redelivered.
#[tokio::test]
async fn servers_that_come_and_go_fail_no_call_though_calls_wait_in_a_quorum_queue() {
    let scene = Scene::new();
    let runs = Arc::<AtomicU64>::default();
    let service = || {
        let runs = runs.clone();
        let run = move |_: Context, (n,): (u64,)| {
            runs.fetch_add(1, Ordering::SeqCst);
            async move { Ok::<_, Fault>(n) }
        };
        Service::new("work", 1).method("do", run).quorum()
    };
    let _staying = scene.serve(service()).await;
    // Each call is a message of its own.
    let client = Client::builder().namespace(&scene.namespace).coalesce(Coalesce::Off).connect(&scene.url);
    let (client, enough) = (client.await.expect("it is there"), AtomicBool::new(false));
    let caller = async || {
        let mut made = 0;
        while !enough.load(Ordering::SeqCst) {
            let answer = soon(client.call::<u64>("work", "do", (made,)).into_future()).await;
            assert_eq!(answer.expect("no call is lost or aborted"), made);
            made += 1;
        }
        made
    };
    let coming_and_going = async {
        for _ in 0..20 {
            let before = runs.load(Ordering::SeqCst);
            let leaving = scene.serve(service()).await;
            when(async || runs.load(Ordering::SeqCst), |now| *now > before + 64).await;
            soon(leaving.drain()).await;
        }
        enough.store(true, Ordering::SeqCst);
    };
    let (made, ()) = tokio::join!(join_all((0..32).map(|_| caller())), coming_and_going);
    assert_eq!(runs.load(Ordering::SeqCst), made.iter().sum::<u64>());
}

#[tokio::test]
async fn what_runs_finishes_and_what_waits_is_given_back_with_its_deadline() {
    let scene = Scene::new();
    let Held { service, mut arrived } = Held::new();
    let leaving = scene.serve(service.prefetch(10).concurrency(1)).await;
    let client = scene.client().await;
    let running = hold(&client, 1).start().await.expect("on its way");
    let busy = soon(arrived.recv()).await.expect("it runs");
    let waiting = hold(&client, 2).timeout(Duration::from_secs(500)).start().await.expect("on its way");

    let drained = tokio::spawn(leaving.drain());
    let Held { service, arrived: mut elsewhere } = Held::new();
    let _staying = scene.serve(service).await;
    let given_back = soon(elsewhere.recv()).await.expect("another server runs it");
    assert_eq!(given_back.number, 2);
    assert!(!given_back.context.redelivered(), "it is as new");
    let left = given_back.context.remaining().expect("a deadline");
    assert!((400..=500).contains(&left.as_secs()), "{left:?}");
    given_back.release();
    assert_eq!(soon(waiting).await.expect("answered"), 2);

    assert!(!drained.is_finished(), "a call still runs");
    busy.release();
    assert_eq!(soon(running).await.expect("it was let finish"), 1);
    soon(drained).await.expect("no panic");
}

#[tokio::test]
async fn a_full_queue_costs_no_call_at_a_drain() {
    let scene = Scene::new();
    let service = || {
        let service = Service::new("work", 1).method(Method::new("do"), |_: Context, (n,): (u64,)| async move {
            // The time is the work itself.
            tokio::time::sleep(Duration::from_millis(20)).await;
            Ok::<_, Fault>(n)
        });
        service.prefetch(20).concurrency(1).max_queue(5)
    };
    let leaving = scene.serve(service()).await;
    let _staying = scene.serve(service()).await;
    let client = scene.client().await;
    let mut pending = Vec::new();
    for n in 0..45_u64 {
        pending.push((n, client.call::<u64>("work", "do", (n,)).start().await.expect("on its way")));
    }
    let drained = tokio::spawn(leaving.drain());
    for (n, pending) in pending {
        match soon(pending).await {
            Ok(answer) => assert_eq!(answer, n),
            // The call was refused before anybody received it: that is known at once, and it has not run.
            Err(Error::Overloaded { .. }) => {}
            Err(error) => panic!("{n}: {error}"),
        }
    }
    soon(drained).await.expect("no panic");
}

#[tokio::test]
async fn a_call_addressed_to_a_leaving_instance_is_told_so() {
    let scene = Scene::new();
    let Held { service, mut arrived } = Held::new();
    let leaving = scene.serve(service).await;
    let instance = leaving.instance().to_owned();
    let client = scene.client().await;
    let running = hold(&client, 1).start().await.expect("on its way");
    let busy = soon(arrived.recv()).await.expect("it runs");
    let drained = tokio::spawn(leaving.drain());
    soon(leaves(&client, &instance, &mut arrived)).await;
    busy.release();
    running.await.expect("it was let finish");
    soon(drained).await.expect("no panic");
    match soon(hold(&client, 3).to(&instance).into_future()).await {
        Err(Error::NoService { service, .. }) => assert_eq!(service, format!("held.v1@{instance}")),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn run_until_serves_until_it_is_told_to_stop() {
    let scene = Scene::new();
    let server = scene.server().await.serve(
        Service::new("ping", 1).method("ping", |_: Context, (): ()| async { Ok::<_, Fault>("pong".to_owned()) }),
    );
    let (stop, stopped) = oneshot::channel::<()>();
    let serving = tokio::spawn(server.run_until(stopped));
    let client = scene.client().await;
    let answered = async {
        loop {
            match client.call::<String>("ping", "ping", [(); 0]).await {
                // The server may have started only partly.
                Err(Error::NoService { .. } | Error::Unreachable { .. }) => tokio::task::yield_now().await,
                outcome => break outcome,
            }
        }
    };
    assert_eq!(soon(answered).await.expect("answers"), "pong");
    drop(stop);
    soon(serving).await.expect("no panic").expect("it stopped well");
}

/// Waits until an instance that drains says so to its callers. Calls that it still runs are let go.
async fn leaves(client: &Client, instance: &str, arrived: &mut mpsc::UnboundedReceiver<Arrival>) {
    loop {
        let call = pin!(hold(client, 0).to(instance).into_future());
        let outcome = tokio::select! {
            outcome = call => outcome,
            early = arrived.recv() => {
                early.expect("it runs").release();
                continue;
            }
        };
        if outcome.is_err() {
            return assert_eq!(code(outcome), Code::Unavailable);
        }
    }
}

#[tokio::test]
async fn a_call_to_an_instance_can_be_cancelled_and_is_answered_while_that_drains() {
    let scene = Scene::new();
    let Held { service, mut arrived } = Held::new();
    let leaving = scene.serve(service).await;
    let instance = leaving.instance().to_owned();
    let client = scene.client().await;
    let unwanted = hold(&client, 1).to(&instance).start().await.expect("on its way");
    let cancelled = soon(arrived.recv()).await.expect("it runs");
    let wanted = hold(&client, 2).to(&instance).start().await.expect("on its way");
    let answered = soon(arrived.recv()).await.expect("it runs");
    let drained = tokio::spawn(leaving.drain());
    soon(leaves(&client, &instance, &mut arrived)).await;
    // If the drain did not wait, it would end in this time.
    for number in 3..30 {
        assert_eq!(code(soon(hold(&client, number).to(&instance).into_future()).await), Code::Unavailable);
    }
    drop(unwanted);
    soon(cancelled.context.cancelled()).await;
    assert!(!drained.is_finished(), "a call still runs");
    answered.release();
    assert_eq!(soon(wanted).await.expect("it was let finish"), 2);
    soon(drained).await.expect("no panic");
}

#[tokio::test(start_paused = true)]
async fn a_call_to_an_instance_reports_in_while_that_drains() {
    let scene = Scene::in_memory();
    let Held { service, mut arrived } = Held::new();
    let leaving = scene.serve(service).await;
    let client = scene.client().await;
    let call = hold(&client, 1).to(leaving.instance()).timeout(Duration::from_secs(3600));
    let pending = call.start().await.expect("on its way");
    let running = arrived.recv().await.expect("it runs");
    // The time is virtual. It makes signs of life due; after the first, the client expects more.
    tokio::time::sleep(Duration::from_secs(3)).await;
    let drained = tokio::spawn(leaving.drain());
    // This is many times longer than an instance may be silent.
    tokio::time::sleep(Duration::from_secs(300)).await;
    running.release();
    assert_eq!(pending.await.expect("answered"), 1);
    drained.await.expect("no panic");
}

#[tokio::test]
async fn a_call_to_the_service_itself_that_runs_when_the_drain_begins_gets_its_result() {
    for elsewhere in [false, true] {
        let scene = Scene::new();
        let client = scene.client().await;
        let (starts, mut started) = mpsc::unbounded_channel();
        let inner = client.clone();
        let outer = move |_: Context, _: [(); 0]| {
            let client = inner.clone();
            async move { client.call::<u64>("nested", "inner", [(); 0]).await.map_err(|error| error.to_string()) }
        };
        let answer = move |_: Context, _: [(); 0]| {
            let (go, goes_on) = oneshot::channel::<u64>();
            starts.send(go).expect("the test listens");
            async move { Ok::<_, Fault>(goes_on.await.expect("the test lets it")) }
        };
        let service = || Service::new("nested", 1).method("outer", outer.clone()).method("inner", answer.clone());
        // With one place, the inner call goes to the other instance.
        let places = if elsewhere { 1 } else { 2 };
        let mut servers = vec![scene.serve(service().concurrency(places)).await];
        if elsewhere {
            servers.push(scene.serve(service().concurrency(places)).await);
        }
        let call = client.call::<u64>("nested", "outer", [(); 0]).timeout(Duration::from_secs(3600));
        let call = call.start().await.expect("on its way");
        let go = soon(started.recv()).await.expect("it runs");
        let drains: Vec<_> = servers.into_iter().map(|server| tokio::spawn(server.drain())).collect();
        let asks = || client.call::<u64>("nested", "inner", [(); 0]).absent(Absent::Fail);
        // The call is not delivered: nobody consumes the queue any more.
        let is_gone = async {
            while !matches!(asks().timeout(Duration::from_millis(100)).await, Err(Error::NoService { .. })) {}
        };
        soon(is_gone).await;
        go.send(7).expect("it waits");
        assert_eq!(soon(call).await.expect("answered"), 7);
        for drain in drains {
            soon(drain).await.expect("no panic");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_drain_does_not_wait_for_calls_to_the_service_itself_that_nobody_else_takes() {
    for during in [false, true] {
        let (scene, _broker) = Scene::alone();
        let client = scene.client().await;
        let (starts, mut started) = mpsc::unbounded_channel();
        let inner = client.clone();
        let outer = move |_: Context, _: [(); 0]| {
            let (client, starts) = (inner.clone(), starts.clone());
            async move {
                let (go, goes_on) = oneshot::channel::<()>();
                starts.send(go).expect("the test listens");
                goes_on.await.expect("the test lets it");
                let began = tokio::time::Instant::now();
                match client.call::<()>("nested", "inner", [(); 0]).await {
                    Err(Error::Timeout { why: Unanswered::Draining, after, .. }) if after <= began.elapsed() => {
                        Ok(began.elapsed())
                    }
                    other => Err(Fault::new(Code::Internal, format!("{other:?}"))),
                }
            }
        };
        let answer = |_: Context, _: [(); 0]| async { Ok::<_, Fault>(()) };
        let service = Service::new("nested", 1).method("outer", outer).method("inner", answer);
        // Only one of them can run.
        let server = scene.serve(service.concurrency(1).prefetch(2)).await;
        let call = client.call::<Duration>("nested", "outer", [(); 0]).timeout(Duration::from_secs(3600));
        let call = call.start().await.expect("on its way");
        let go = soon(started.recv()).await.expect("it runs");
        let drained = if during {
            let drained = tokio::spawn(server.drain());
            let asks = || client.call::<()>("nested", "inner", [(); 0]).absent(Absent::Fail);
            while !matches!(asks().timeout(Duration::from_millis(100)).await, Err(Error::NoService { .. })) {}
            go.send(()).expect("it waits");
            drained
        } else {
            go.send(()).expect("it waits");
            while client.in_flight() < 2 {
                tokio::task::yield_now().await;
            }
            tokio::spawn(server.drain())
        };
        let waited = call.await.expect("it ends");
        assert!(waited < Duration::from_secs(15), "{waited:?}");
        drained.await.expect("no panic");
    }
}
