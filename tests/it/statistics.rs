//! What an instance counts of each method.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hopline::transport::Settle;
use hopline::{Client, Code, Codec, Context, Fault, Histogram, Method, MethodStats, Service};
use tokio::sync::mpsc;
use uuid::Uuid;

use crate::stranger::Stranger;
use crate::support::{Held, Scene, code, frame, hold, soon, told, with_metadata};

const REQUEST: u8 = 1;
const CANCEL: u8 = 7;

/// What the only instance counts of a method, once it is as it should be.
async fn counted(client: &Client, method: &str, is_there: impl Fn(&MethodStats) -> bool) -> MethodStats {
    let counting = async {
        loop {
            let told = told(1, async |window| client.registry().total(window).all_stats().await).await;
            let found = told[0].methods.iter().find(|stats| stats.name == method).expect("it is served");
            if is_there(found) {
                return found.clone();
            }
        }
    };
    soon(counting).await
}

fn broken() -> Result<(), Fault> {
    panic!("as the test asks")
}

async fn call(stranger: &Stranger, service: &str, body: Vec<u8>) {
    stranger.send("rpc", service, body, Some(stranger.reply_to.clone()), None).await;
}

#[tokio::test]
async fn each_method_tells_how_its_calls_ended() {
    let scene = Scene::new();
    let service = Service::new("ends", 1)
        .method("well", |_: Context, _: [(); 0]| async { Ok::<_, Fault>(()) })
        .method("own", |_: Context, _: [(); 0]| async { Err::<(), _>("no".to_owned()) })
        .method("fault", |_: Context, _: [(); 0]| async { Err::<(), _>(Fault::new(Code::NotFound, "gone")) })
        .method("panic", |_: Context, _: [(); 0]| async { broken() });
    let _server = scene.serve(service).await;
    let client = scene.client().await;
    for method in ["well", "well", "own", "fault", "panic", "well"] {
        let _ = soon(async { client.call::<()>("ends", method, [(); 0]).await }).await;
    }
    let ended = async |method: &str, count: u64| counted(&client, method, |stats| stats.finished == count).await;
    let well = ended("well", 3).await;
    assert_eq!((well.running, well.service_errors, well.faults, well.cancelled), (0, 0, BTreeMap::new(), 0));
    for times in [well.handler_time, well.queue_time] {
        assert_eq!((times.count, times.buckets.iter().sum(), times.buckets.len()), (3, 3_u64, 17));
    }
    assert_eq!((well.received_bytes, well.returned_bytes, well.last_fault), (3, 3, None), "[] and null, in CBOR");
    let own = ended("own", 1).await;
    assert_eq!((own.service_errors, own.returned_bytes, own.last_fault), (1, 3, None));
    let fault = ended("fault", 1).await;
    assert_eq!(fault.faults, BTreeMap::from([("NOT_FOUND".to_owned(), 1)]));
    let last = fault.last_fault.expect("it failed");
    assert_eq!((last.code.as_str(), last.message.as_str(), last.at().is_some()), ("NOT_FOUND", "gone", true));
    assert_eq!(ended("panic", 1).await.faults, BTreeMap::from([("INTERNAL".to_owned(), 1)]));
}

#[tokio::test]
async fn a_oneway_call_that_its_handler_refuses_has_run_and_counts_as_a_fault() {
    let scene = Scene::new();
    let service = Service::new("picky", 1).method(Method::new("note").oneway(), |_: Context, _: [(); 0]| async {
        Err::<(), _>(Fault::new(Code::InvalidArgument, "as the test asks"))
    });
    let _server = scene.serve(service).await;
    let client = scene.client().await;
    soon(client.oneway("picky", "note", [(); 0]).send()).await.expect("the broker has it");
    // It is kept as a dead letter after it was counted.
    let transport = scene.transport().await;
    let mut dead = scene.dead_letters(&transport, "picky.v1").await;
    soon(dead.next()).await.expect("it is kept");
    let note = counted(&client, "note", |stats| stats.finished == 1).await;
    assert_eq!(note.faults, BTreeMap::from([("INVALID_ARGUMENT".to_owned(), 1)]));
    assert_eq!(note.refused, 0, "it was let run");
}

#[tokio::test]
async fn what_runs_is_given_up_or_is_late_is_counted() {
    let scene = Scene::new();
    let Held { service, mut arrived } = Held::new();
    let _server = scene.serve(service).await;
    let client = scene.client().await;
    let pending = hold(&client, 1).start().await.expect("on its way");
    let _held = soon(arrived.recv()).await.expect("it runs");
    let running = counted(&client, "hold", |_| true).await;
    assert_eq!((running.running, running.finished), (1, 0));
    drop(pending);
    let given_up = counted(&client, "hold", |stats| stats.finished == 1).await;
    assert_eq!((given_up.running, given_up.cancelled, given_up.faults.len()), (0, 1, 0));
    assert_eq!(given_up.handler_time.count, 1);
    let stranger = Stranger::new(&scene).await;
    // A CBOR map: 1 => the method, 2 => 50 ms.
    let metadata = [&[0xa2, 0x01, 0x64], &b"hold"[..], &[0x02, 0x18, 50]].concat();
    call(&stranger, "held.v1", with_metadata(REQUEST, Codec::Json, Uuid::new_v4(), &metadata, b"[2]")).await;
    let late = counted(&client, "hold", |stats| stats.finished == 2).await;
    assert_eq!(late.faults, BTreeMap::from([("DEADLINE_EXCEEDED".to_owned(), 1)]));
    assert!(late.handler_time.sum() >= Duration::from_millis(40), "{:?}", late.handler_time);
}

#[tokio::test]
async fn a_call_that_nobody_waits_for_any_more_is_counted_though_it_does_not_run() {
    let scene = Scene::new();
    let Held { service, .. } = Held::new();
    let _server = scene.serve(service).await;
    let (stranger, client, id) = (Stranger::new(&scene).await, scene.client().await, Uuid::new_v4());
    stranger.send("rpc", "held.v1@*", frame(CANCEL, Codec::Raw, id, "hold", b""), None, None).await;
    while told(1, async |window| client.registry().total(window).all_stats().await).await[0].cancels_ignored == 0 {}
    call(&stranger, "held.v1", frame(REQUEST, Codec::Json, id, "hold", b"[1]")).await;
    let expired = counted(&client, "hold", |stats| stats.expired > 0).await;
    assert_eq!((expired.expired, expired.finished, expired.refused), (1, 0, 0));
}

#[tokio::test]
async fn what_comes_again_is_counted_whether_it_is_refused_or_answered_as_before() {
    let scene = Scene::new();
    let Held { service, mut arrived } = Held::of(Method::new("hold").dedup(Duration::from_secs(600)));
    let _server = scene.serve(service.prefetch(1)).await;
    let client = scene.client().await;
    let (mut stranger, id) = (Stranger::new(&scene).await, Uuid::new_v4());
    let body = frame(REQUEST, Codec::Json, id, "hold", b"[1]");
    call(&stranger, "held.v1", body.clone()).await;
    let running = soon(arrived.recv()).await.expect("it runs");
    // The next one waits in the queue, since the instance takes one at a time.
    call(&stranger, "held.v1", frame(REQUEST, Codec::Json, Uuid::new_v4(), "hold", b"[2]")).await;
    let queue = format!("{}.held.v1.calls", scene.namespace);
    let waiting = soon(stranger.transport.get(&queue)).await.expect("it is there").expect("it waits");
    waiting.settle(Settle::GiveBack);
    running.release();
    let (_, status, _) = stranger.answer().await;
    assert_eq!(status, 0);
    let (_, status, _) = stranger.answer().await;
    assert_eq!(status, Code::Aborted as u8);
    call(&stranger, "held.v1", body).await;
    assert_eq!(stranger.answer().await.0, id);
    let stats = counted(&client, "hold", |stats| stats.repeated > 0).await;
    assert_eq!((stats.redelivered, stats.refused, stats.repeated, stats.finished), (1, 1, 1, 1));
    let instance = &told(1, async |window| client.registry().total(window).all_stats().await).await[0];
    assert_eq!((instance.refused, instance.repeated, instance.finished), (1, 1, 1));
}

#[tokio::test]
async fn a_refusal_is_counted_where_the_method_is_known() {
    let scene = Scene::new();
    let Held { service, .. } = Held::new();
    let server = scene.server().await.serve(service).allow(|_, method| !method.ends_with("hold"));
    let _server = server.start().await.expect("it can be served");
    let client = scene.client().await;
    assert_eq!(code(soon(async { hold(&client, 1).await }).await), Code::PermissionDenied);
    assert_eq!(counted(&client, "hold", |stats| stats.refused > 0).await.refused, 1);
}

#[tokio::test]
async fn a_handler_and_the_statistics_know_how_long_a_call_has_waited() {
    let scene = Scene::new();
    let (tell, mut told) = mpsc::unbounded_channel();
    let service = Service::new("queue", 1).method("wait", move |context: Context, _: [(); 0]| {
        tell.send(context.queue_time()).expect("the test listens");
        async { Ok::<_, Fault>(()) }
    });
    let _server = scene.serve(service).await;
    let (stranger, client) = (Stranger::new(&scene).await, scene.client().await);
    let sent_at = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970") - Duration::from_secs(7);
    let sent_at = u64::try_from(sent_at.as_millis()).expect("before the year 584 million").to_be_bytes();
    // A CBOR map: 1 => the method, 3 => a number of 8 bytes.
    let metadata = [&[0xa2, 0x01, 0x64], &b"wait"[..], &[0x03, 0x1b], &sent_at].concat();
    call(&stranger, "queue.v1", with_metadata(REQUEST, Codec::Json, Uuid::new_v4(), &metadata, b"[]")).await;
    let waited = soon(told.recv()).await.expect("it runs").expect("it says when it was sent");
    assert!(waited >= Duration::from_secs(7), "{waited:?}");
    call(&stranger, "queue.v1", frame(REQUEST, Codec::Json, Uuid::new_v4(), "wait", b"[]")).await;
    assert_eq!(soon(told.recv()).await.expect("it runs"), None);
    let stats = counted(&client, "wait", |stats| stats.finished == 2).await;
    assert_eq!(stats.queue_time.count, 1);
    assert!(stats.queue_time.sum() >= Duration::from_secs(7));
    let over_5_s = Histogram::BOUNDS.iter().position(|bound| *bound > Duration::from_secs(5)).expect("there is one");
    assert_eq!(stats.queue_time.buckets[over_5_s..].iter().sum::<u64>(), 1);
}
