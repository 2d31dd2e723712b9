//! Calls that share a message: each has an outcome of its own, the same as if it had been alone.

use std::collections::HashMap;
use std::future::IntoFuture;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::future::join_all;
use hopline::{Client, Coalesce, Code, Context, Error, Fault, Method, Service, Traffic};
use tokio::sync::mpsc;

use crate::support::{Arrival, Calculator, Held, MathClient, MathServer, Scene, code, hold, soon};

async fn sharing(scene: &Scene, coalesce: Coalesce) -> Client {
    let builder = Client::builder().namespace(&scene.namespace).timeout(Duration::from_secs(60));
    builder.coalesce(coalesce).connect(&scene.url).await.expect("the broker is there")
}

async fn add_all(client: &Client, calls: i64) {
    let math = MathClient::new(client);
    let sums = soon(join_all((0..calls).map(|n| math.add(n, 1).into_future()))).await;
    for (n, sum) in (1..).zip(sums) {
        assert_eq!(sum.expect("answered"), n);
    }
}

async fn held(arrived: &mut mpsc::UnboundedReceiver<Arrival>, calls: usize) -> HashMap<u64, Arrival> {
    let mut held = HashMap::new();
    while held.len() < calls {
        let arrival = soon(arrived.recv()).await.expect("it comes");
        assert!(held.insert(arrival.number, arrival).is_none(), "it came twice");
    }
    held
}

#[tokio::test]
async fn calls_of_a_quick_method_share_messages_once_it_is_known_to_be_quick() {
    let scene = Scene::new();
    let _server = scene.serve(MathServer::new(Calculator)).await;
    let client = scene.client().await;
    add_all(&client, 64).await;
    let first = client.traffic();
    assert_eq!((first.messages_sent, first.calls_sent), (64, 64), "nobody knew how long the method takes");
    // A machine that was busy just then may have made it look slow.
    let mut second = Traffic::default();
    for _ in 0..100 {
        let before = client.traffic();
        add_all(&client, 64).await;
        second = client.traffic().since(before);
        if second.messages_sent == 1 {
            break;
        }
    }
    assert_eq!((second.messages_sent, second.calls_sent, second.replies_received), (1, 64, 64));
    assert!(second.messages_received < 64, "replies that are ready together share: {second:?}");
}

#[tokio::test]
async fn a_client_may_say_how_many_calls_share_or_that_none_does() {
    let scene = Scene::new();
    let _server = scene.serve(MathServer::new(Calculator)).await;
    for (coalesce, messages) in [(Coalesce::Fixed(8), 8), (Coalesce::Fixed(0), 64), (Coalesce::Off, 64)] {
        let client = sharing(&scene, coalesce).await;
        add_all(&client, 64).await;
        let traffic = client.traffic();
        assert_eq!((traffic.messages_sent, traffic.calls_sent), (messages, 64), "{coalesce:?}");
        assert_eq!(traffic.replies_received, 64);
    }
}

#[tokio::test]
async fn slow_calls_go_alone_and_are_shared_evenly() {
    let scene = Scene::new();
    let shares = Arc::new(Mutex::new(HashMap::<String, usize>::new()));
    let mut servers = Vec::new();
    for _ in 0..4 {
        let shares = shares.clone();
        let service = Service::new("slow", 1).method(Method::new("work"), move |ctx: Context, (n,): (u64,)| {
            *shares.lock().expect("no panic").entry(ctx.instance().to_owned()).or_default() += 1;
            async move {
                // The time is the work itself.
                tokio::time::sleep(Duration::from_millis(20)).await;
                Ok::<_, Fault>(n)
            }
        });
        servers.push(scene.serve(service.prefetch(4)).await);
    }
    let client = scene.client().await;
    for (n, outcome) in
        (0..).zip(soon(join_all((0..1000_u64).map(|n| client.call::<u64>("slow", "work", (n,)).into_future()))).await)
    {
        assert_eq!(outcome.expect("answered"), n);
    }
    // Known to be slow by now, they go alone still.
    let before = client.traffic();
    soon(join_all((0..100_u64).map(|n| client.call::<u64>("slow", "work", (n,)).into_future()))).await;
    assert_eq!(client.traffic().since(before).messages_sent, 100);
    let shares = shares.lock().expect("no panic");
    assert_eq!(shares.values().sum::<usize>(), 1100, "each ran once");
    assert!(shares.len() == 4 && shares.values().all(|share| (220..=330).contains(share)), "{shares:?}");
}

#[tokio::test]
async fn a_returned_message_of_many_is_no_service_to_each() {
    let scene = Scene::new();
    let client = sharing(&scene, Coalesce::Fixed(64)).await;
    for outcome in soon(join_all((0..20).map(|n| hold(&client, n).into_future()))).await {
        assert!(matches!(&outcome, Err(Error::NoService { service }) if service == "held.v1"), "{outcome:?}");
    }
    assert_eq!(client.traffic().messages_sent, 1);
}

#[tokio::test]
async fn a_refused_message_of_many_is_overloaded_to_each_and_none_of_them_runs() {
    let scene = Scene::new();
    let Held { service, mut arrived } = Held::new();
    let server = scene.serve(service.prefetch(1).concurrency(1).max_queue(1)).await;
    let client = sharing(&scene, Coalesce::Fixed(10)).await;
    let running = hold(&client, 1).start().await.expect("on its way");
    let busy = soon(arrived.recv()).await.expect("it runs");
    // The queue holds one message, and RabbitMQ may take a few more before it notices.
    let mut waiting = Vec::new();
    for n in 0..250 {
        waiting.push(hold(&client, n).start().await.expect("on its way"));
    }
    let last = soon(waiting.pop().expect("the last")).await;
    assert!(matches!(last, Err(Error::Overloaded { .. })), "{last:?}");
    assert_eq!(client.traffic().messages_sent, 26);
    busy.release();
    assert_eq!(soon(running).await.expect("answered"), 1);
    let ran = tokio::spawn(async move {
        let mut ran = Vec::new();
        while let Some(arrival) = arrived.recv().await {
            ran.push(arrival.number);
            arrival.release();
        }
        ran
    });
    let mut taken = Vec::new();
    for (n, outcome) in (0..).zip(soon(join_all(waiting)).await) {
        match outcome {
            Ok(answer) => taken.push(answer),
            Err(Error::Overloaded { .. }) => {}
            Err(error) => panic!("{n}: {error}"),
        }
    }
    soon(server.drain()).await;
    assert_eq!(soon(ran).await.expect("no panic"), taken, "what was refused did not run");
    assert!(taken.len() % 10 == 0 && taken.len() < 200, "{} of 250 were taken", taken.len());
}

#[tokio::test]
async fn of_a_message_that_comes_again_what_was_answered_stays_and_the_rest_is_as_if_alone() {
    let scene = Scene::new();
    // One method that may run twice, and one that may not, in one message.
    let held_twice = || {
        let (announce, arrived) = mpsc::unbounded_channel::<(&'static str, u64, bool)>();
        let handler = |name: &'static str, announce: mpsc::UnboundedSender<_>| {
            move |ctx: Context, (n, wait): (u64, bool)| {
                announce.send((name, n, ctx.redelivered())).expect("the test listens");
                async move {
                    if wait && !ctx.redelivered() {
                        std::future::pending::<()>().await;
                    }
                    Ok::<_, Fault>(n)
                }
            }
        };
        let service = Service::new("mixed", 1)
            .method(Method::new("once"), handler("once", announce.clone()))
            .method(Method::new("again").idempotent(), handler("again", announce));
        (service, arrived)
    };
    let (service, mut first) = held_twice();
    let dying = scene.serve(service).await;
    let client = sharing(&scene, Coalesce::Fixed(64)).await;
    let call = |method, n: u64, wait: bool| client.call::<u64>("mixed", method, (n, wait));
    let (answered, lost, rerun) = (call("once", 1, false), call("once", 2, true), call("again", 3, true).idempotent());
    let (answered, lost, rerun) = (answered.start().await, lost.start().await, rerun.start().await);
    let (answered, lost, rerun) = (answered.expect("sent"), lost.expect("sent"), rerun.expect("sent"));
    for _ in 0..3 {
        soon(first.recv()).await.expect("all three came");
    }
    assert_eq!(soon(answered).await.expect("answered before the end"), 1);
    assert_eq!(client.traffic().messages_sent, 1);
    let (service, mut second) = held_twice();
    let _heir = scene.serve(service).await;
    drop(dying);
    assert_eq!(code(soon(lost).await), Code::Aborted);
    assert_eq!(soon(rerun).await.expect("it runs again"), 3);
    assert_eq!(soon(second.recv()).await, Some(("again", 3, true)));
    second.try_recv().expect_err("what may not run twice did");
}

#[tokio::test]
async fn the_shorter_of_two_deadlines_of_calls_sent_together_holds_for_its_own_call() {
    let scene = Scene::new();
    let Held { service, mut arrived } = Held::new();
    let _server = scene.serve(service.prefetch(1).concurrency(1)).await;
    let client = sharing(&scene, Coalesce::Fixed(64)).await;
    let first = hold(&client, 1).start().await.expect("on its way");
    let busy = soon(arrived.recv()).await.expect("it runs");
    let brief = hold(&client, 2).timeout(Duration::from_millis(50)).start().await.expect("on its way");
    let long = hold(&client, 3).start().await.expect("on its way");
    let expired = soon(brief).await;
    assert!(matches!(expired, Err(Error::Timeout { .. })), "{expired:?}");
    // Whoever may run it is told. What is asked after that, and answered, was read after it.
    for _ in 0..2 {
        client.stats(Duration::from_millis(200)).await.expect("connected");
    }
    busy.release();
    soon(first).await.expect("answered");
    let next = soon(arrived.recv()).await.expect("it runs");
    assert_eq!(next.number, 3, "the one that nobody waits for was run");
    next.release();
    assert_eq!(soon(long).await.expect("answered"), 3);
}

#[tokio::test]
async fn one_of_many_can_be_cancelled() {
    let scene = Scene::new();
    let Held { service, mut arrived } = Held::new();
    let _server = scene.serve(service).await;
    let client = sharing(&scene, Coalesce::Fixed(64)).await;
    let mut pending = Vec::new();
    for n in 0..3 {
        pending.push(hold(&client, n).start().await.expect("on its way"));
    }
    let mut held = held(&mut arrived, 3).await;
    drop(pending.remove(1));
    soon(held.remove(&1).expect("it came").context.cancelled()).await;
    for (n, pending) in [0, 2].into_iter().zip(pending) {
        let arrival = held.remove(&n).expect("it came");
        assert!(!arrival.context.is_cancelled());
        arrival.release();
        assert_eq!(soon(pending).await.expect("answered"), n);
    }
}

#[tokio::test]
async fn what_has_not_started_of_a_message_is_given_back_at_a_drain() {
    let scene = Scene::new();
    let Held { service, mut arrived } = Held::new();
    let leaving = scene.serve(service.concurrency(2)).await;
    let client = sharing(&scene, Coalesce::Fixed(64)).await;
    let mut pending = Vec::new();
    for n in 0..10 {
        pending.push(hold(&client, n).start().await.expect("on its way"));
    }
    let running = held(&mut arrived, 2).await;
    assert_eq!(client.traffic().messages_sent, 1);
    let drained = tokio::spawn(leaving.drain());
    let Held { service, arrived: mut elsewhere } = Held::new();
    let _staying = scene.serve(service).await;
    let given_back = held(&mut elsewhere, 8).await;
    for arrival in given_back.into_values().chain(running.into_values()) {
        assert!(!arrival.context.redelivered(), "it is as new");
        arrival.release();
    }
    for (n, pending) in (0..).zip(pending) {
        assert_eq!(soon(pending).await.expect("answered"), n);
    }
    soon(drained).await.expect("no panic");
    arrived.try_recv().expect_err("nothing more was started");
}

/// A service of oneway calls that take until the test lets go of them, and what came.
fn slow_notes() -> (Service, mpsc::UnboundedReceiver<u64>, Arc<tokio::sync::Semaphore>) {
    let (keep, kept) = mpsc::unbounded_channel();
    let go = Arc::new(tokio::sync::Semaphore::new(0));
    let until = go.clone();
    let service = Service::new("notes", 1).method(Method::new("note"), move |_: Context, (n,): (u64,)| {
        keep.send(n).expect("the test listens");
        let until = until.clone();
        async move {
            until.acquire().await.expect("never closed").forget();
            Ok::<_, Fault>(())
        }
    });
    (service, kept, go)
}

async fn note_all(client: &Client, notes: u64) {
    let notes = (0..notes).map(|n| client.oneway("notes", "note", (n,)).send());
    for outcome in soon(join_all(notes)).await {
        outcome.expect("the broker has it");
    }
}

#[tokio::test]
async fn oneway_calls_share_messages_and_instances_share_the_slow_ones() {
    let scene = Scene::new();
    let (service, mut one, go_one) = slow_notes();
    let _one = scene.serve(service.prefetch(4).concurrency(4)).await;
    let (service, mut two, go_two) = slow_notes();
    let _two = scene.serve(service.prefetch(4).concurrency(4)).await;
    let client = scene.client().await;
    note_all(&client, 20).await;
    assert_eq!(client.traffic().messages_sent, 1);
    let mut notes = Vec::new();
    // Each takes as many as it may run, though all came in one message.
    for _ in 0..4 {
        notes.push(soon(one.recv()).await.expect("it runs"));
        notes.push(soon(two.recv()).await.expect("it runs"));
    }
    go_one.add_permits(20);
    go_two.add_permits(20);
    while notes.len() < 20 {
        notes.push(tokio::select! { n = soon(one.recv()) => n, n = soon(two.recv()) => n }.expect("it runs"));
    }
    notes.sort_unstable();
    assert_eq!(notes, (0..20).collect::<Vec<_>>(), "each ran once");
}

#[tokio::test]
async fn an_instance_that_dies_of_a_message_of_oneway_calls_loses_none_of_them() {
    let scene = Scene::new();
    let (service, mut first, _go) = slow_notes();
    let dying = scene.serve(service).await;
    let client = scene.client().await;
    note_all(&client, 10).await;
    soon(first.recv()).await.expect("it runs");
    let (service, mut second, go) = slow_notes();
    go.add_permits(100);
    let _heir = scene.serve(service).await;
    drop(dying);
    let mut notes = std::collections::BTreeSet::new();
    while notes.len() < 10 {
        notes.insert(soon(second.recv()).await.expect("it runs"));
    }
}

#[tokio::test]
async fn events_that_share_a_message_are_handled_in_order() {
    let scene = Scene::new();
    let (keep, mut kept) = mpsc::unbounded_channel();
    let server = scene.server().await.subscribe("order.*", move |_: Context, n: u64| {
        keep.send(n).expect("the test listens");
        async {}
    });
    let _server = server.start().await.expect("it can be served");
    let client = scene.client().await;
    for outcome in soon(join_all((0..30_u64).map(|n| {
        let client = client.clone();
        async move { client.publish("order.new", &n).await }
    })))
    .await
    {
        outcome.expect("the broker has it");
    }
    assert_eq!(client.traffic().messages_sent, 1);
    for n in 0..30 {
        assert_eq!(soon(kept.recv()).await, Some(n));
    }
}
