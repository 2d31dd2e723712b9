//! Messages that nobody should send. Each is answered or kept, and the next good call is served.

use hopline::transport::{Confirm, Properties, Publication, Settle};
use hopline::{Code, Codec};
use uuid::Uuid;

use crate::stranger::{Impostor, Stranger, reply};
use crate::support::{Calculator, Held, MathClient, MathServer, Scene, frame, hold, soon, told};

fn add(id: Uuid) -> Vec<u8> {
    frame(1, Codec::Json, id, "add", b"[2,3]")
}

/// The frame with some bytes replaced.
fn with(mut frame: Vec<u8>, at: usize, bytes: &[u8]) -> Vec<u8> {
    frame[at..at + bytes.len()].copy_from_slice(bytes);
    frame
}

#[tokio::test]
async fn a_malformed_message_is_answered_with_the_field_that_is_wrong() {
    let scene = Scene::new();
    let _server = scene.serve(MathServer::new(Calculator)).await;
    let mut stranger = Stranger::new(&scene).await;
    let id = Uuid::new_v4();
    let good = add(id);
    let (refused, unknown) = (Code::InvalidArgument as u8, Code::Unimplemented as u8);
    let cases = [
        ("magic", with(good.clone(), 0, b"XX"), refused),
        ("protocol version", with(good.clone(), 2, &[2]), unknown),
        ("serialization", with(good.clone(), 3, &[9]), unknown),
        ("message type", with(good.clone(), 4, &[0]), unknown),
        ("message type", with(good.clone(), 4, &[77]), unknown),
        ("status", with(good.clone(), 5, &[99]), unknown),
        ("flags", with(good.clone(), 6, &[3]), unknown),
        ("zstd", with(good.clone(), 6, &[1]), if cfg!(feature = "zstd") { refused } else { unknown }),
        ("over the cap", with(good.clone(), 6, &[2]), Code::ResourceExhausted as u8),
        ("flags", with(good.clone(), 6, &[0x80]), unknown),
        ("reserved", with(good.clone(), 7, &[1]), unknown),
        ("metadata length", with(good.clone(), 24, &[0xff; 4]), refused),
        ("payload length", with(good.clone(), 28, &[0xff; 4]), refused),
        ("metadata 1 (method)", with(good.clone(), 34, &[0x1a]), refused),
        ("header", good[..31].to_vec(), refused),
        ("payload length", good[..good.len() - 1].to_vec(), refused),
        ("header", Vec::new(), refused),
        // These are well-formed frames that are not for a server.
        ("type 2", with(good.clone(), 4, &[2]), unknown),
        ("type 5", with(good.clone(), 4, &[5]), unknown),
        ("has no method ``", frame(1, Codec::Json, id, "", b"[]"), unknown),
    ];
    for (field, body, status) in cases {
        stranger.send("rpc", "math.v1", body, Some(stranger.reply_to.clone()), Some(id)).await;
        let (answered, code, body) = stranger.answer().await;
        assert_eq!((answered, code), (id, status), "{field}");
        let said = String::from_utf8_lossy(&body);
        assert!(said.contains(field), "{field} is not in: {said}");
    }
    stranger.send("rpc", "math.v1", good, Some(stranger.reply_to.clone()), Some(id)).await;
    let (answered, code, body) = stranger.answer().await;
    assert_eq!((answered, code, body.last()), (id, 0, Some(&b'5')));
}

#[tokio::test]
async fn numbers_at_the_end_of_their_range_harm_nobody() {
    let scene = Scene::new();
    let _server = scene.serve(MathServer::new(Calculator)).await;
    let mut stranger = Stranger::new(&scene).await;
    // A CBOR map: 1 => "add", and a key of a number at u64::MAX.
    for key in [2, 3, 6, 7, 8, 9, 99] {
        let metadata = [b"\xa2\x01\x63add".as_slice(), &[0x18, key, 0x1b], &[0xff; 8]].concat();
        for kind in [1, 7] {
            let id = Uuid::new_v4();
            let plain = frame(kind, Codec::Json, id, "add", b"[2,3]");
            let length = u32::try_from(metadata.len()).expect("a short one").to_be_bytes();
            let body = [&plain[..24], &length, &plain[28..32], &metadata, b"[2,3]"].concat();
            stranger.send("rpc", "math.v1", body, Some(stranger.reply_to.clone()), Some(id)).await;
            if kind == 1 {
                let (answered, code, _) = stranger.answer().await;
                assert_eq!((answered, code), (id, 0), "key {key}");
            }
        }
    }
}

#[tokio::test]
async fn a_call_cancelled_with_no_time_left_is_not_run_when_it_comes() {
    let scene = Scene::new();
    let server = scene.serve(MathServer::new(Calculator)).await;
    let mut stranger = Stranger::new(&scene).await;
    let (given_up, other) = (Uuid::new_v4(), Uuid::new_v4());
    let instance = format!("math.v1@{}", server.instance());
    let reply_to = || Some(stranger.reply_to.clone());
    stranger.send("rpc", &instance, frame(7, Codec::Raw, given_up, "add", b""), None, None).await;
    // Once the instance has answered a later call, it has received the cancel.
    stranger.send("rpc", &instance, add(other), reply_to(), None).await;
    assert_eq!(stranger.answer().await.0, other);
    let reply_to = || Some(stranger.reply_to.clone());
    stranger.send("rpc", "math.v1", add(given_up), reply_to(), None).await;
    stranger.send("rpc", "math.v1", add(other), reply_to(), None).await;
    assert_eq!(stranger.answer().await.0, other, "nobody waits for the first");
}

#[tokio::test]
async fn more_calls_than_one_instance_has_out_at_once_wait_for_their_turn() {
    let scene = Scene::new();
    let Held { service, mut arrived } = Held::new();
    let server = scene.serve(service.concurrency(1)).await;
    let client = scene.client().await;
    let mut pending = Vec::new();
    for n in 0..1100 {
        pending.push(hold(&client, n).to(server.instance()).start().await.expect("on its way"));
    }
    let release = tokio::spawn(async move {
        while let Some(arrival) = arrived.recv().await {
            arrival.release();
        }
    });
    for (n, pending) in (0..).zip(pending) {
        assert_eq!(soon(pending).await.expect("answered"), n);
    }
    soon(server.drain()).await;
    soon(release).await.expect("no panic");
}

#[tokio::test]
async fn frames_of_one_message_are_answered_each_for_itself() {
    let scene = Scene::new();
    let _server = scene.serve(MathServer::new(Calculator)).await;
    let mut stranger = Stranger::new(&scene).await;
    let ids: Vec<Uuid> = (0..3).map(|_| Uuid::new_v4()).collect();
    let body = [add(ids[0]), frame(1, Codec::Json, ids[1], "absent", b"[]"), add(ids[2])].concat();
    stranger.send("rpc", "math.v1", body, Some(stranger.reply_to.clone()), None).await;
    let mut answers = Vec::new();
    for _ in 0..3 {
        let (id, status, _) = stranger.answer().await;
        answers.push((id, status));
    }
    for expected in [(ids[0], 0), (ids[1], Code::Unimplemented as u8), (ids[2], 0)] {
        assert!(answers.contains(&expected), "{expected:?} is not in {answers:?}");
    }
    // A good frame before a broken one is answered, and so is the broken rest.
    let broken = Uuid::new_v4();
    let body = [add(ids[0]), with(add(broken), 4, &[200])].concat();
    stranger.send("rpc", "math.v1", body, Some(stranger.reply_to.clone()), None).await;
    let mut answers = vec![];
    for _ in 0..2 {
        let (id, status, _) = stranger.answer().await;
        answers.push((id, status));
    }
    assert!(answers.contains(&(ids[0], 0)) && answers.contains(&(broken, Code::Unimplemented as u8)), "{answers:?}");
}

#[tokio::test]
async fn what_cannot_be_answered_is_kept_for_an_operator() {
    let scene = Scene::new();
    let _server = scene.serve(MathServer::new(Calculator)).await;
    let stranger = Stranger::new(&scene).await;
    let mut letters = scene.dead_letters(&stranger.transport, "math.v1").await;
    let id = Uuid::new_v4();
    let unanswerable = frame(1, Codec::Json, id, "add", b"[2,3]");
    let garbage = b"HLgarbage".to_vec();
    let cases = [
        ("rpc", "math.v1", garbage.clone(), garbage.clone(), "header"),
        ("oneway", "math.v1.heard", garbage.clone(), garbage.clone(), "header"),
        ("rpc", "math.v1", unanswerable.clone(), unanswerable.clone(), "nobody can be answered"),
        // The key that the broker matched is of another method than the frame names.
        (
            "oneway",
            "math.v1.heard",
            frame(3, Codec::Json, id, "nothing", b"[]"),
            frame(3, Codec::Json, id, "nothing", b"[]"),
            "its key is `math.v1.heard`, and it names `nothing`",
        ),
        // The call before the garbage runs, so it is not kept with it.
        (
            "oneway",
            "math.v1.heard",
            [frame(3, Codec::Json, id, "heard", b"[]"), garbage.clone()].concat(),
            garbage,
            "header",
        ),
    ];
    for (exchange, key, body, kept, reason) in cases {
        stranger.send(exchange, key, body, None, None).await;
        let letter = soon(letters.next()).await.expect("it is kept");
        assert_eq!(letter.body, kept);
        let header = |wanted: &str| {
            let found = letter.properties.headers.iter().find(|(name, _)| name == wanted);
            found.map(|(_, value)| value.clone()).unwrap_or_default()
        };
        assert!(header("x-hopline-reason").contains(reason), "{}", header("x-hopline-reason"));
        assert_eq!(header("x-hopline-key"), key);
        letter.settle(Settle::Ack);
    }
}

#[tokio::test]
async fn what_comes_to_a_client_from_peers_that_it_did_not_ask_is_ignored_and_counted() {
    let scene = Scene::new();
    let server = scene.serve(MathServer::new(Calculator)).await;
    let client = scene.client().await;
    let math = MathClient::new(&client);
    server.drain().await;
    let mut impostor = Impostor::new(&scene, "math.v1").await;
    let asked = math.add(2, 3).start().await.expect("on its way");
    let (call, reply_to) = impostor.taken().await;
    let before = client.traffic();
    let five = reply(&call, 0, &[5], None);
    let unasked = with(reply(&call, 0, &[6], None), 8, Uuid::new_v4().as_bytes());
    let forged = [
        // A reply to another client's call, alone and in a message with a second one.
        unasked.clone(),
        [unasked.clone(), unasked].concat(),
        // Requests, cancels and streams are not for a client.
        add(Uuid::new_v4()),
        frame(7, Codec::Raw, Uuid::from_slice(&call[8..24]).expect("16 bytes"), "add", b""),
        with(five.clone(), 4, &[5]),
        // Bodies that cannot be read, although some of them name the call.
        Vec::new(),
        b"HLgarbage".to_vec(),
        five[..five.len() - 1].to_vec(),
        with(five.clone(), 6, &[3]),
        with(five.clone(), 24, &[0xff; 4]),
    ];
    for body in forged {
        impostor.send(&reply_to, body).await;
    }
    impostor.send(&reply_to, five.clone()).await;
    assert_eq!(soon(asked).await.expect("the one that was asked for"), 5);
    // A second reply to the same call; then the reply to the next one.
    impostor.send(&reply_to, five).await;
    let next = math.add(2, 3).start().await.expect("on its way");
    let (call, reply_to) = impostor.taken().await;
    impostor.send(&reply_to, reply(&call, 0, &[5], None)).await;
    assert_eq!(soon(next).await.expect("the client lives"), 5);
    let since = client.traffic().since(before);
    assert_eq!((since.replies_ignored, since.replies_received), (12, 6));
}

#[tokio::test]
async fn a_server_counts_what_it_does_not_run_and_a_forged_cancel_ends_nobodys_call() {
    let scene = Scene::new();
    let Held { service, mut arrived } = Held::new();
    let server = scene.serve(service).await;
    let client = scene.client().await;
    let mut stranger = Stranger::new(&scene).await;
    let running = hold(&client, 1).start().await.expect("on its way");
    let arrival = soon(arrived.recv()).await.expect("it runs");
    let instance = format!("held.v1@{}", server.instance());
    for _ in 0..3 {
        stranger.send("rpc", &instance, frame(7, Codec::Raw, Uuid::new_v4(), "hold", b""), None, None).await;
    }
    let absent = || frame(1, Codec::Json, Uuid::new_v4(), "absent", b"[]");
    for body in [absent(), [absent(), b"HLgarbage".to_vec()].concat(), b"garbage".to_vec()] {
        stranger.send("rpc", &instance, body, Some(stranger.reply_to.clone()), Some(Uuid::new_v4())).await;
    }
    for _ in 0..4 {
        assert_ne!(stranger.answer().await.1, 0);
    }
    let stats = told(1, async |window| client.registry().total(window).all_stats().await).await;
    let [stats] = &*stats else { panic!("one instance, not {stats:?}") };
    assert_eq!((stats.malformed, stats.refused, stats.cancels_ignored, stats.running), (2, 2, 3, 1));
    arrival.release();
    assert_eq!(soon(running).await.expect("nobody has cancelled it"), 1);
}

#[tokio::test]
async fn ten_thousand_random_bodies_leave_a_server_as_it_was() {
    let scene = Scene::new();
    let _server = scene.serve(MathServer::new(Calculator)).await;
    let mut stranger = Stranger::new(&scene).await;
    let mut letters = scene.dead_letters(&stranger.transport, "math.v1").await;
    const BODIES: usize = 10_000;
    let mut receipts = Vec::with_capacity(BODIES);
    for n in 0..BODIES {
        // Half of them begin like a frame, so that the reader gets further.
        let noise: Vec<u8> = (0..n % 9).flat_map(|_| Uuid::new_v4().into_bytes()).collect();
        let body = if n % 2 == 0 { noise } else { [b"HL\x01\x01\x01\x00\x00\x00".as_slice(), &noise].concat() };
        let reply_to = (n % 3 == 0).then(|| stranger.reply_to.clone());
        let correlation_id = Some(Uuid::new_v4().to_string());
        let publication = Publication {
            exchange: format!("{}.rpc", scene.namespace),
            key: "math.v1".to_owned(),
            mandatory: true,
            properties: Properties { reply_to, correlation_id, ..Properties::default() },
            body: body.into(),
        };
        receipts.push(stranger.transport.publish(publication));
    }
    for receipt in receipts {
        assert_eq!(soon(receipt).await, Ok(Confirm::Accepted));
    }
    let (mut answered, mut kept) = (0, 0);
    while answered + kept < BODIES {
        let next = async {
            tokio::select! {
                _ = stranger.answer() => answered += 1,
                letter = letters.next() => { letter.expect("a letter").settle(Settle::Ack); kept += 1; }
            }
        };
        soon(next).await;
    }
    assert_eq!(answered, BODIES.div_ceil(3));
    let client = scene.client().await;
    assert_eq!(MathClient::new(&client).add(2, 3).await.expect("the next good call"), 5);
}
