//! Which calls an instance runs, told as it happens.

use std::time::Duration;

use futures::StreamExt as _;
use hopline::{Code, Codec, Context, Error, Fault, Method, Service, Tapped, TappedCall};
use uuid::Uuid;

use crate::stranger::Stranger;
use crate::support::{Calculator, Held, MathServer, PATIENCE, Scene, code, has_read, hold, later, soon};

/// Long enough for every test: it ends its tap itself.
const LONG: Duration = Duration::from_secs(600);

/// The next document.
async fn next(tap: &mut (impl futures::Stream<Item = Result<Tapped, Error>> + Unpin)) -> Tapped {
    soon(tap.next()).await.expect("it goes on").expect("it is told")
}

/// The next so many calls, and how many were left out meanwhile.
async fn calls(
    tap: &mut (impl futures::Stream<Item = Result<Tapped, Error>> + Unpin),
    count: usize,
) -> (Vec<TappedCall>, u64) {
    let (mut calls, mut left_out) = (Vec::new(), 0);
    while calls.len() < count {
        let tapped = next(tap).await;
        calls.extend(tapped.calls);
        left_out += tapped.left_out;
    }
    (calls, left_out)
}

#[tokio::test]
async fn each_call_is_told_with_its_caller_its_times_its_end_and_its_sizes() {
    let scene = Scene::new();
    let service = Service::new("ends", 1)
        .method("well", |_: Context, _: [(); 0]| async { Ok::<_, Fault>("a result") })
        .method("own", |_: Context, _: [(); 0]| async { Err::<(), _>("no".to_owned()) })
        .method("fault", |_: Context, _: [(); 0]| async { Err::<(), _>(Fault::new(Code::NotFound, "gone")) })
        .method(Method::new("note").oneway(), |_: Context, _: (String,)| async { Ok::<_, Fault>(()) });
    let server = scene.serve(service).await;
    let client = scene.client().await;
    let mut tap = soon(client.registry().tap("ends", LONG, 100)).await.expect("it is there");
    let first = next(&mut tap).await;
    assert_eq!((first.service.as_str(), first.instance.as_str()), ("ends.v1", server.instance()));
    assert_eq!((first.calls.len(), first.left_out, first.last), (0, 0, false));
    for method in ["well", "own", "fault", "absent"] {
        let _ = soon(async { client.call::<String>("ends", method, [(); 0]).await }).await;
    }
    soon(client.oneway("ends", "note", ("secret",)).send()).await.expect("the broker has it");
    let (calls, left_out) = calls(&mut tap, 4).await;
    let told: Vec<_> = calls.iter().map(|call| (call.method.as_str(), call.code.as_str(), call.own_error)).collect();
    let expected =
        [("well", "OK", false), ("own", "UNKNOWN", true), ("fault", "NOT_FOUND", false), ("note", "OK", false)];
    assert_eq!((told, left_out), (expected.to_vec(), 0), "what did not run is not told");
    for call in &calls {
        assert_eq!(call.caller, client.instance());
        assert!(call.queue_time().is_some() && call.handler_time() < PATIENCE && call.at().is_some(), "{call:?}");
    }
    let sizes: Vec<_> = calls.iter().map(|call| (call.received_bytes, call.returned_bytes)).collect();
    assert_eq!(sizes, [(1, 9), (1, 3), (1, 0), (8, 1)], "in CBOR");
    assert!(!format!("{calls:?}").contains("secret"), "arguments are not told");
}

#[tokio::test]
async fn all_instances_tell_and_the_stream_ends_with_the_last() {
    let scene = Scene::new();
    let mut expected = vec![];
    let servers = [scene.serve(MathServer::new(Calculator)).await, scene.serve(MathServer::new(Calculator)).await];
    let client = scene.client().await;
    let mut tap = soon(client.registry().tap("math", LONG, 100)).await.expect("they are there");
    let mut begun = vec![next(&mut tap).await.instance, next(&mut tap).await.instance];
    begun.sort_unstable();
    for server in &servers {
        expected.push(server.instance().to_owned());
        let whoami = client.call::<String>("math", "whoami", [(); 0]).to(server.instance());
        assert_eq!(soon(whoami).await.expect("it answers"), server.instance());
    }
    expected.sort_unstable();
    assert_eq!(begun, expected);
    let (calls, _) = calls(&mut tap, 2).await;
    assert!(calls.iter().all(|call| call.method == "whoami"), "{calls:?}");
}

#[tokio::test]
async fn a_tap_ends_by_itself_and_says_what_it_left_out() {
    let scene = Scene::in_memory();
    let _server = scene.serve(MathServer::new(Calculator)).await;
    let client = scene.client().await;
    let time = Duration::from_secs(30);
    let mut tap = soon(client.registry().tap("math", time, 2)).await.expect("it is there");
    assert_eq!(next(&mut tap).await.calls, []);
    for _ in 0..5 {
        soon(async { client.call::<()>("math", "nothing", [(); 0]).await }).await.expect("it answers");
    }
    let all = async {
        let (mut told, mut left_out, mut last) = (0, 0, 0);
        while let Some(tapped) = tap.next().await {
            let tapped = tapped.expect("it is told");
            told += tapped.calls.len();
            left_out += tapped.left_out;
            last += usize::from(tapped.last);
        }
        (told, left_out, last)
    };
    assert_eq!(later(time, all).await, (2, 3, 1));
}

#[tokio::test]
async fn a_tap_that_is_dropped_makes_room_for_another_and_a_fifth_is_refused() {
    let scene = Scene::new();
    let server = scene.serve(MathServer::new(Calculator)).await;
    let client = scene.client().await;
    let mut taps = Vec::new();
    for _ in 0..4 {
        let mut tap = soon(client.registry().tap("math", LONG, 100)).await.expect("it is there");
        next(&mut tap).await;
        taps.push(tap);
    }
    let mut fifth = soon(client.registry().tap("math", LONG, 100)).await.expect("it is there");
    assert_eq!(code(soon(fifth.next()).await.expect("it is told")), Code::ResourceExhausted);
    drop((taps.pop(), fifth));
    // The tap ends a moment after its cancel was read.
    soon(async {
        loop {
            has_read(&client, "math", server.instance()).await;
            let mut again = soon(client.registry().tap("math", LONG, 100)).await.expect("it is there");
            if soon(again.next()).await.expect("it is told").is_ok() {
                break;
            }
        }
    })
    .await;
}

#[tokio::test]
async fn a_tap_ends_when_the_queue_of_its_asker_is_gone() {
    let scene = Scene::new();
    let _server = scene.serve(MathServer::new(Calculator)).await;
    let client = scene.client().await;
    let (asker, reply_to) = (Stranger::new(&scene).await, format!("{}.nobody", scene.namespace));
    for _ in 0..4 {
        // The array of 600 000 and 1000.
        let arguments = [0x82, 0x1a, 0x00, 0x09, 0x27, 0xc0, 0x19, 0x03, 0xe8];
        let body = crate::support::frame(1, Codec::Cbor, Uuid::new_v4(), "hopline.tap", &arguments);
        asker.send("rpc", "math.v1@*", body, Some(reply_to.clone()), None).await;
    }
    soon(async {
        loop {
            // Each tap ends with the first document that nobody gets.
            soon(async { client.call::<()>("math", "nothing", [(); 0]).await }).await.expect("it answers");
            let mut tap = soon(client.registry().tap("math", LONG, 100)).await.expect("it is there");
            if soon(tap.next()).await.expect("it is told").is_ok() {
                break;
            }
        }
    })
    .await;
}

#[tokio::test]
async fn a_drain_does_not_wait_for_a_tap_and_tells_the_calls_that_it_waited_for() {
    let scene = Scene::new();
    let Held { service, mut arrived } = Held::new();
    let server = scene.serve(service).await;
    let client = scene.client().await;
    let mut tap = soon(client.registry().tap("held", LONG, 100)).await.expect("it is there");
    next(&mut tap).await;
    let pending = hold(&client, 7).start().await.expect("on its way");
    let running = soon(arrived.recv()).await.expect("it runs");
    let draining = tokio::spawn(server.drain());
    running.release();
    assert_eq!(soon(pending).await.expect("answered"), 7);
    soon(draining).await.expect("it drains");
    let rest: Vec<_> = soon(tap.map(|tapped| tapped.expect("it is told")).collect()).await;
    let calls = rest.iter().flat_map(|tapped| &tapped.calls).count();
    assert_eq!((calls, rest.last().map(|tapped| tapped.last)), (1, Some(true)), "{rest:?}");
}

#[tokio::test]
async fn a_rule_may_forbid_taps_and_nonsense_is_refused() {
    let scene = Scene::new();
    let server = scene.server().await.allow(|_, method| method != "math.v1.hopline.tap");
    let _server = server.serve(MathServer::new(Calculator)).start().await.expect("it can be served");
    let _other = scene.serve(Held::new().service).await;
    let client = scene.client().await;
    let mut tap = soon(client.registry().tap("math", LONG, 100)).await.expect("it is there");
    assert_eq!(code(soon(tap.next()).await.expect("it is told")), Code::PermissionDenied);
    let mut stranger = Stranger::new(&scene).await;
    let body = crate::support::frame(1, Codec::Json, Uuid::new_v4(), "hopline.tap", br#"["soon"]"#);
    stranger.send("rpc", "held.v1", body, Some(stranger.reply_to.clone()), None).await;
    assert_eq!(stranger.answer().await.1, Code::InvalidArgument as u8);
    assert!(matches!(soon(client.registry().tap("a b", LONG, 1)).await.map(drop), Err(Error::Invalid(_))));
}
