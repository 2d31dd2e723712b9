//! Calls that share a message. Each has its own outcome, the same as if it had been alone.

use std::collections::HashMap;
use std::future::IntoFuture;
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use hopline::{Client, Coalesce, Code, Context, Error, Fault, Method, Service};
use tokio::sync::mpsc;

use crate::stranger::{Impostor, frames, overheard, reply_after};
use crate::support::{Arrival, Calculator, Held, MathClient, MathServer, Scene, code, has_read, hold, later, soon};

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
async fn calls_of_a_method_share_messages_while_it_is_known_to_be_quick() {
    const CALLS: usize = 64;
    let (quick, slow) = (Duration::from_micros(1), Duration::from_millis(20));
    let scene = Scene::new();
    let server = scene.serve(MathServer::new(Calculator)).await;
    let client = scene.client().await;
    let math = MathClient::new(&client);
    // A peer takes the server's place. Its replies say how long each call took.
    server.drain().await;
    let mut impostor = Impostor::new(&scene, "math.v1").await;
    for (messages, took) in [(CALLS, quick), (1, slow), (CALLS, quick)] {
        let before = client.traffic();
        let mut pending = Vec::new();
        for n in 0..CALLS as i64 {
            pending.push(math.add(n, 1).start().await.expect("on its way"));
        }
        let mut calls = Vec::new();
        while calls.len() < CALLS {
            let (message, reply_to) = impostor.taken().await;
            calls.extend(frames(message).into_iter().map(|call| (call, reply_to.clone())));
        }
        let since = client.traffic().since(before);
        assert_eq!((since.messages_sent, since.calls_sent), (messages as u64, CALLS as u64));
        for (call, reply_to) in calls {
            impostor.send(&reply_to, reply_after(&call, took, &[5])).await;
        }
        for pending in pending {
            assert_eq!(soon(pending).await.expect("answered"), 5);
        }
    }
}

#[tokio::test]
async fn replies_that_are_ready_together_share_a_message() {
    let scene = Scene::new();
    let _server = scene.serve(MathServer::new(Calculator)).await;
    let client = sharing(&scene, Coalesce::Fixed(64)).await;
    add_all(&client, 64).await;
    let traffic = client.traffic();
    assert_eq!((traffic.messages_sent, traffic.messages_received, traffic.replies_received), (1, 1, 64));
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
async fn calls_that_go_alone_are_shared_evenly() {
    const SERVERS: usize = 4;
    const EACH: usize = 4;
    let scene = Scene::new();
    let mut servers = Vec::new();
    for _ in 0..SERVERS {
        let Held { service, arrived } = Held::new();
        // The service would run more calls at once if it got them.
        servers.push((scene.serve(service.prefetch(EACH as u16)).await, arrived));
    }
    let client = scene.client().await;
    let mut pending = Vec::new();
    for n in 0..(SERVERS * EACH) as u64 {
        pending.push(hold(&client, n).start().await.expect("on its way"));
    }
    // An instance that has its share gets no more while that runs; the others get the rest.
    let mut running = Vec::new();
    for (_, arrived) in &mut servers {
        running.extend(held(arrived, EACH).await.into_values());
    }
    assert_eq!(client.traffic().messages_sent, pending.len() as u64, "nobody knew how long they take");
    running.into_iter().for_each(Arrival::release);
    for (n, pending) in (0..).zip(pending) {
        assert_eq!(soon(pending).await.expect("answered"), n);
    }
}

#[tokio::test]
async fn a_returned_message_of_many_is_no_service_to_each() {
    let scene = Scene::new();
    let client = sharing(&scene, Coalesce::Fixed(64)).await;
    for outcome in soon(join_all((0..20).map(|n| hold(&client, n).into_future()))).await {
        assert!(matches!(&outcome, Err(Error::NoService { service, .. }) if service == "held.v1"), "{outcome:?}");
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
    // The queue holds one message. RabbitMQ may accept a few more before it notices.
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
    // One message holds a call of an idempotent method and one of another.
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
    // Calls share a message only if their time-outs differ by at most a quarter.
    const SHORTER: Duration = Duration::from_secs(400);
    const LONGER: Duration = Duration::from_secs(480);
    let scene = Scene::new();
    let Held { service, mut arrived } = Held::new();
    let server = scene.serve(service.prefetch(1).concurrency(1)).await;
    let transport = scene.transport().await;
    let mut cancels = overheard(&transport, &format!("{}.rpc", scene.namespace), "held.v1@*").await;
    let client = sharing(&scene, Coalesce::Fixed(64)).await;
    let _first = hold(&client, 1).timeout(LONGER).start().await.expect("on its way");
    let busy = soon(arrived.recv()).await.expect("it runs");
    let shorter = hold(&client, 2).timeout(SHORTER).start().await.expect("on its way");
    let longer = hold(&client, 3).timeout(LONGER).start().await.expect("on its way");
    scene.waiting(&transport, "held.v1.calls", 1).await;
    assert_eq!(client.traffic().messages_sent, 2, "the two share one");
    let expired = later(SHORTER, shorter).await;
    assert!(matches!(expired, Err(Error::Timeout { .. })), "{expired:?}");
    // The cancel goes to every instance that may run the call.
    soon(cancels.next()).await.expect("a cancel");
    has_read(&client, "held", server.instance()).await;
    busy.release();
    let next = soon(arrived.recv()).await.expect("it runs");
    assert_eq!(next.number, 3, "the one that nobody waits for was run");
    next.release();
    assert_eq!(soon(longer).await.expect("answered"), 3);
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

/// A service of oneway calls that run until the test lets them end, and the calls that have come.
fn slow_notes() -> (Service, mpsc::UnboundedReceiver<u64>, Arc<tokio::sync::Semaphore>) {
    let (keep, kept) = mpsc::unbounded_channel();
    let go = Arc::new(tokio::sync::Semaphore::new(0));
    let until = go.clone();
    let service = Service::new("notes", 1).method(Method::new("note").oneway(), move |_: Context, (n,): (u64,)| {
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
    // Each instance runs as many as it may, although all came in one message.
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
