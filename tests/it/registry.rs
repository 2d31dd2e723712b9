//! Who serves what.

use std::collections::BTreeMap;
use std::future::IntoFuture as _;
use std::time::{Duration, SystemTime};

use futures::future::join_all;
use hopline::{Context, Dispatch, Error, Fault, Method, Registry, Service};

use crate::support::{Calculator, Held, MathServer, Scene, everybody, hold, soon, told};

#[tokio::test]
async fn every_instance_tells_what_it_serves() {
    let scene = Scene::new();
    let client = scene.client().await;
    assert!(soon(everybody(&client, Duration::MAX)).await.expect("nobody is fine").is_empty());
    assert_eq!(soon(client.registry().total(Duration::MAX).instances("math")).await.expect("nobody is fine"), []);
    let one = scene.serve(MathServer::new(Calculator)).await;
    let two = scene.server().await.serve(MathServer::new(Calculator)).serve(Service::new("other", 2)).start().await;
    let two = two.expect("both can be served");
    let told = told(3, async |window| everybody(&client, window).await).await;
    let mut expected = [("math.v1", one.instance()), ("math.v1", two.instance()), ("other.v2", two.instance())];
    expected.sort_unstable();
    let served: Vec<_> = told.iter().map(|told| (told.service.as_str(), told.instance.as_str())).collect();
    assert_eq!(served, expected);
    let add = &told[0].methods[0];
    assert_eq!((add.name.as_str(), add.signature.as_str()), ("add", "add(a: i64, b: i64) -> i64"));
    assert!(!add.oneway && !add.idempotent);
    let oneway: Vec<_> = told[0].methods.iter().filter(|method| method.oneway).map(|method| &*method.name).collect();
    assert_eq!(oneway, ["heard"]);
}

#[tokio::test]
async fn an_instance_tells_how_busy_it_is_even_when_every_place_is_taken() {
    let scene = Scene::new();
    let Held { service, mut arrived } = Held::new();
    let server = scene.serve(service.concurrency(1)).await;
    let client = scene.client().await;
    for _ in 0..2 {
        let pending = hold(&client, 1).start().await.expect("on its way");
        soon(arrived.recv()).await.expect("it runs").release();
        pending.await.expect("answered");
    }
    let _pending = hold(&client, 1).start().await.expect("on its way");
    let _running = soon(arrived.recv()).await.expect("it runs");
    let told = told(1, async |window| client.registry().total(window).all_stats().await).await;
    let told: Vec<_> = told.iter().map(|told| (told.instance.as_str(), told.running, told.finished)).collect();
    assert_eq!(told, [(server.instance(), 1, 2)]);
}

/// Waits for ever, unless it knows when to stop.
fn patient(registry: Registry) -> Registry {
    registry.total(Duration::MAX).stall(Duration::MAX)
}

#[tokio::test]
async fn an_instance_tells_where_and_since_when_it_runs_and_what_its_program_says_of_it() {
    let scene = Scene::new();
    let method = Method::new("import").idempotent().finishes().dedup(Duration::from_secs(60));
    let method = method.timeout(Duration::from_secs(300));
    let service = Service::new("told", 3).method(method, |_: Context, _: [(); 0]| async { Ok::<_, Fault>(()) });
    let before = SystemTime::now() - Duration::from_secs(1);
    let server = scene.server().await.attribute("zone", "us1").attribute("weight", "3").attribute("zone", "eu1");
    let server = server.serve(service).start().await.expect("it can be served");
    let client = scene.client().await;
    let registry = patient(client.registry()).count(1);
    let [told] = soon(registry.instances("told.v3")).await.expect("it answers").try_into().expect("there is one");
    assert_eq!((told.service.as_str(), told.instance.as_str()), ("told.v3", server.instance()));
    assert_eq!((told.pid, told.hopline.as_str()), (std::process::id(), env!("CARGO_PKG_VERSION")));
    assert!(!told.host.is_empty());
    let started = told.started_at().expect("it is known");
    assert!(before <= started && started <= SystemTime::now(), "{started:?}");
    let attributes = [("weight", "3"), ("zone", "eu1")].map(|(name, value)| (name.to_owned(), value.to_owned()));
    assert_eq!(told.attributes, BTreeMap::from(attributes));
    assert!(told.codecs.contains(&"CBOR".to_owned()) && told.compressions.contains(&"lz4".to_owned()), "{told:?}");
    let import = &told.methods[0];
    assert!(import.idempotent && import.finishes && !import.oneway);
    assert_eq!((import.dedup_ms, import.timeout_ms), (Some(60_000), Some(300_000)));
    let [stats] = soon(registry.stats("told.v3")).await.expect("it answers").try_into().expect("there is one");
    assert_eq!(stats.cpu_micros.is_some(), cfg!(unix));
    assert_eq!(stats.memory_bytes.is_some(), cfg!(target_os = "linux"));
}

#[tokio::test]
async fn one_service_is_asked_without_the_others_and_no_question_is_cancelled() {
    let scene = Scene::new();
    let math = scene.serve(MathServer::new(Calculator)).await;
    let both = scene.server().await.serve(MathServer::new(Calculator)).serve(Service::new("other", 1)).start().await;
    let both = both.expect("both can be served");
    let client = scene.client().await;
    let mut expected = [math.instance(), both.instance()];
    expected.sort_unstable();
    let told = soon(patient(client.registry()).count(2).instances("math")).await.expect("they answer");
    assert_eq!(told.iter().map(|told| &*told.instance).collect::<Vec<_>>(), expected);
    let told = soon(client.registry().total(Duration::MAX).instances("other")).await.expect("it answers");
    assert_eq!(told.iter().map(|told| &*told.instance).collect::<Vec<_>>(), [both.instance()], "nobody else comes");
    // One reply is enough, and the other is not told that.
    let one = soon(patient(client.registry()).count(1).instances("math")).await.expect("they answer");
    assert_eq!(one.len(), 1);
    let pongs = soon(patient(client.registry()).count(2).ping("math")).await.expect("they answer");
    assert_eq!(pongs.iter().map(|pong| &*pong.instance).collect::<Vec<_>>(), expected);
    let all = soon(patient(client.registry()).count(3).all_stats()).await.expect("they answer");
    let ignored: Vec<_> = all.iter().map(|stats| (&*stats.service, stats.cancels_ignored)).collect();
    assert_eq!(ignored, [("math.v1", 0), ("math.v1", 0), ("other.v1", 0)]);
}

#[tokio::test]
async fn an_instance_that_does_not_reply_in_time_is_left_out() {
    let scene = Scene::new();
    let Held { service, mut arrived } = Held::new();
    // Its queue is not read while the handler runs.
    let server = scene.serve(service.dispatch(Dispatch::Inline)).await;
    let client = scene.client().await;
    let pending = hold(&client, 1).to(server.instance()).start().await.expect("on its way");
    let running = soon(arrived.recv()).await.expect("it runs");
    let hasty = client.registry().total(Duration::from_millis(300));
    let told = async {
        loop {
            match hasty.instances("held").await {
                // The broker was slower than that.
                Err(Error::Timeout { .. }) => {}
                told => return told.expect("that is no error"),
            }
        }
    };
    assert_eq!(soon(told).await, []);
    running.release();
    soon(pending.into_future()).await.expect("answered");
    let told = soon(patient(client.registry()).count(1).instances("held")).await.expect("it answers");
    assert_eq!(told[0].instance, server.instance());
}

#[tokio::test]
async fn names_and_attributes_that_cannot_be_are_refused() {
    let scene = Scene::new();
    let client = scene.client().await;
    for wrong in ["", "a b", "math.1", "math.v1.add"] {
        let refused = client.registry().instances(wrong).await;
        assert!(matches!(refused, Err(Error::Invalid(_))), "{wrong}: {refused:?}");
    }
    let large = scene.server().await.attribute("map", "x".repeat(70_000)).serve(MathServer::new(Calculator));
    let refused = large.start().await.expect_err("it is too much").to_string();
    assert!(refused.contains("attributes take 70013 bytes"), "{refused}");
    assert_eq!(soon(everybody(&client, Duration::MAX)).await.expect("nobody is fine"), []);
}

#[tokio::test]
async fn what_waits_at_the_broker_is_told_with_who_reads_it() {
    let scene = Scene::new();
    let client = scene.client().await;
    assert_eq!(client.registry().queues("held").await.expect("it answers"), hopline::ServiceQueues::default());
    let Held { service, mut arrived } = Held::new();
    let server = scene.serve(service.prefetch(1).concurrency(1)).await;
    let queues = client.registry().queues("held.v1").await.expect("it answers");
    assert_eq!(queues.calls.map(|queue| (queue.waiting, queue.consumers)), Some((0, 1)));
    assert_eq!(queues.oneway.map(|queue| (queue.waiting, queue.consumers)), Some((0, 1)));
    assert_eq!(queues.dead.map(|queue| (queue.waiting, queue.consumers)), Some((0, 0)));
    let pending = join_all((0..3).map(|number| hold(&client, number).start())).await;
    let running = soon(arrived.recv()).await.expect("it runs");
    let calls = async || client.registry().queues("held").await.expect("it answers").calls.expect("it is there");
    soon(async { while calls().await.waiting != 2 {} }).await;
    running.release();
    for _ in 1..3 {
        soon(arrived.recv()).await.expect("it runs").release();
    }
    for pending in pending {
        soon(pending.expect("on its way")).await.expect("answered");
    }
    assert!(matches!(client.registry().queues("a b").await, Err(Error::Invalid(_))));
    soon(server.drain()).await;
}
