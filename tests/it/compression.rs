//! Compressed payloads: for whom, when, and what happens if they are not what they claim to be.

use std::future::IntoFuture;

use hopline::transport::Settle;
use hopline::{Client, Code, Codec, Compression, Error, Running, Server};
use lz4_flex::block::compress_prepend_size;
use serde_bytes::ByteBuf;
use uuid::Uuid;

use crate::stranger::{Impostor, Stranger, reply};
use crate::support::{Calculator, Held, MathClient, MathServer, Scene, code, frame, soon};

const LZ4: u8 = 2;
const MIB: usize = 1024 * 1024;

/// An array with one argument in CBOR, for `echo`.
fn one(bytes: &[u8]) -> Vec<u8> {
    let length = u32::try_from(bytes.len()).expect("a short one").to_be_bytes();
    [&[0x81, 0x5a][..], &length, bytes].concat()
}

/// A frame with this payload, which is compressed as `number` says.
fn compressed(kind: u8, number: u8, method: &str, payload: &[u8]) -> (Uuid, Vec<u8>) {
    let id = Uuid::new_v4();
    let mut frame = frame(kind, Codec::Cbor, id, method, payload);
    frame[6] |= number;
    (id, frame)
}

/// A request whose sender can read these compressions.
fn from_reader(accepts: u8, method: &str, payload: &[u8]) -> Vec<u8> {
    let mut request = frame(1, Codec::Cbor, Uuid::new_v4(), method, payload);
    request[27] += 2;
    request[32] += 1;
    let end = 32 + 3 + method.len();
    request.splice(end..end, [13, accepts]);
    request
}

async fn serve(scene: &Scene, compression: Compression) -> Running {
    let server = Server::builder().namespace(&scene.namespace).compression(compression).connect(&scene.url).await;
    server.expect("the broker is there").serve(MathServer::new(Calculator)).start().await.expect("it can be served")
}

async fn client(scene: &Scene) -> Client {
    let builder = Client::builder().namespace(&scene.namespace).compression(Compression::Lz4).max_message_size(MIB);
    builder.connect(&scene.url).await.expect("the broker is there")
}

#[tokio::test]
async fn a_result_comes_compressed_to_who_reads_it_if_it_is_large_and_becomes_smaller() {
    let scene = Scene::new();
    let _server = serve(&scene, Compression::Lz4).await;
    let mut stranger = Stranger::new(&scene).await;
    let (text, little) = (b"hopline ".repeat(1000), b"hopline ".repeat(100));
    let noise: Vec<u8> = (0..100).flat_map(|_| Uuid::new_v4().into_bytes()).collect();
    let reads = 0b10;
    for (accepts, bytes, flags) in [
        (Some(reads), &text, LZ4),
        (Some(reads), &little, 0),
        (Some(reads), &noise, 0),
        (Some(1), &text, 0),
        (None, &text, 0),
    ] {
        let call = match accepts {
            Some(accepts) => from_reader(accepts, "echo", &one(bytes)),
            None => frame(1, Codec::Cbor, Uuid::new_v4(), "echo", &one(bytes)),
        };
        stranger.send("rpc", "math.v1", call, Some(stranger.reply_to.clone()), None).await;
        let (_, status, body) = stranger.answer().await;
        assert_eq!((status, body[6]), (0, flags), "{} bytes for {accepts:?}", bytes.len());
        assert_eq!(body.len() < bytes.len(), flags == LZ4);
    }
}

#[tokio::test]
async fn a_client_compresses_once_the_service_has_said_that_it_reads_it_and_no_more_once_one_instance_does_not() {
    let scene = Scene::new();
    let server = scene.serve(MathServer::new(Calculator)).await;
    let client = client(&scene).await;
    let math = MathClient::new(&client);
    let text = ByteBuf::from(b"hopline ".repeat(1000));
    // From now on a peer in the server's place sees what is sent to it.
    server.drain().await;
    let mut impostor = Impostor::new(&scene, "math.v1").await;
    for (says, expected) in [(Some(0b10), 0), (Some(0b11), LZ4), (None, LZ4), (Some(0b10), 0), (Some(0b10), 0)] {
        let call = math.echo(text.clone()).start().await.expect("on its way");
        let (body, reply_to) = impostor.taken().await;
        assert_eq!(body[6] & 0b11, expected, "after what was said before {says:?}");
        assert_eq!(body.len() < 1000, expected == LZ4);
        impostor.send(&reply_to, reply(&body, LZ4, &compress_prepend_size(&[0x41, 7]), says)).await;
        assert_eq!(soon(call).await.expect("a compressed result is read"), ByteBuf::from(vec![7]));
    }
}

#[tokio::test]
async fn what_goes_through_compressed_comes_out_as_it_was() {
    let scene = Scene::new();
    let server = serve(&scene, Compression::Lz4).await;
    let client = client(&scene).await;
    let math = MathClient::new(&client);
    let (half, whole) = (ByteBuf::from(vec![b'x'; MIB / 2]), ByteBuf::from(vec![b'x'; MIB]));
    for _ in 0..3 {
        assert_eq!(soon(math.echo(half.clone()).into_future()).await.expect("half"), half);
    }
    // Uncompressed, the argument is over the client's cap. So would be the result.
    match soon(math.echo(whole).into_future()).await {
        Err(Error::TooLarge { what: "reply", size, limit: MIB, .. }) => assert!(size > MIB),
        other => panic!("{other:?}"),
    }
    let words = vec!["hopline".to_owned(); 1000];
    let all = math.join(words.clone(), None).to(server.instance());
    assert_eq!(soon(all.into_future()).await.expect("joined"), words.join(", "));
}

#[tokio::test]
async fn bombs_and_what_cannot_be_decompressed_are_refused_and_the_frames_beside_them_are_not() {
    let scene = Scene::new();
    let _server = scene.serve(MathServer::new(Calculator)).await;
    let mut stranger = Stranger::new(&scene).await;
    let good = compress_prepend_size(&one(&[7; 2000]));
    let bomb = compress_prepend_size(&vec![0; 16 * MIB + 1]);
    let claim = [&[0xff; 4], &good[4..]].concat();
    let mut other_size = good.clone();
    other_size[0] ^= 1;
    let (exhausted, invalid) = (Code::ResourceExhausted as u8, Code::InvalidArgument as u8);
    let zstd = if cfg!(feature = "zstd") { invalid } else { Code::Unimplemented as u8 };
    let cases = [
        (LZ4, good.clone(), 0, ""),
        (LZ4, bomb, exhausted, "16777217 bytes or more, over the cap of 16777216"),
        (LZ4, claim, exhausted, "4294967295 bytes"),
        (LZ4, other_size, invalid, "lz4"),
        (LZ4, good[..good.len() / 2].to_vec(), invalid, "lz4"),
        (LZ4, Vec::new(), invalid, "lz4"),
        (1, good.clone(), zstd, "zstd"),
        (1, Vec::new(), zstd, "zstd"),
    ];
    for (number, payload, status, said) in cases {
        let (id, body) = compressed(1, number, "echo", &payload);
        let (beside, plain) = compressed(1, LZ4, "echo", &good);
        stranger.send("rpc", "math.v1", [body, plain].concat(), Some(stranger.reply_to.clone()), None).await;
        let answers = [stranger.answer().await, stranger.answer().await];
        for (answered, code, body) in answers {
            assert_eq!(code, if answered == beside { 0 } else { status }, "{said}");
            assert!(answered == beside || (answered == id && String::from_utf8_lossy(&body).contains(said)), "{said}");
        }
    }
    // A call whose caller cannot be told is kept as it came.
    let mut letters = scene.dead_letters(&stranger.transport, "math.v1").await;
    let (_, body) = compressed(3, LZ4, "heard", &good[..20]);
    stranger.send("oneway", "math.v1.heard", body.clone(), None, None).await;
    let letter = soon(letters.next()).await.expect("it is kept");
    assert_eq!(letter.body, body);
    letter.settle(Settle::Ack);
}

#[tokio::test]
async fn a_compressed_call_that_a_leaving_server_gives_back_is_run_by_another() {
    let scene = Scene::new();
    let Held { service, mut arrived } = Held::new();
    let leaving = scene.serve(service.concurrency(1)).await;
    let mut stranger = Stranger::new(&scene).await;
    // `[7]`, which is 2 bytes.
    let payload = compress_prepend_size(&[0x81, 7]);
    for _ in 0..2 {
        let (_, body) = compressed(1, LZ4, "hold", &payload);
        stranger.send("rpc", "held.v1", body, Some(stranger.reply_to.clone()), None).await;
    }
    let running = soon(arrived.recv()).await.expect("it runs");
    let Held { service, arrived: mut elsewhere } = Held::new();
    let draining = tokio::spawn(leaving.drain());
    let _staying = scene.serve(service).await;
    let given_back = soon(elsewhere.recv()).await.expect("the other has it");
    assert_eq!(given_back.number, 7);
    given_back.release();
    running.release();
    soon(draining).await.expect("no panic");
    for _ in 0..2 {
        assert_eq!(stranger.answer().await.1, 0);
    }
}

#[tokio::test]
async fn a_client_is_not_harmed_by_replies_that_cannot_be_decompressed() {
    let scene = Scene::new();
    let server = scene.serve(MathServer::new(Calculator)).await;
    let client = client(&scene).await;
    let math = MathClient::new(&client);
    server.drain().await;
    let mut impostor = Impostor::new(&scene, "math.v1").await;
    let bomb = compress_prepend_size(&vec![0; MIB + 1]);
    for (number, payload) in [(LZ4, bomb), (LZ4, vec![1, 2, 3]), (1, vec![0; 100])] {
        let call = math.nothing().start().await.expect("on its way");
        let (body, reply_to) = impostor.taken().await;
        impostor.send(&reply_to, reply(&body, number, &payload, None)).await;
        match soon(call).await {
            Err(Error::TooLarge { what: "reply", size, limit: MIB, .. }) => assert_eq!((number, size), (LZ4, MIB + 1)),
            Err(Error::UnreadableReply(error)) => {
                assert!(error.to_string().starts_with("the reply cannot be read"), "{error}");
            }
            other => panic!("{other:?}"),
        }
    }
}

#[cfg(not(feature = "zstd"))]
#[tokio::test]
async fn a_compression_that_is_not_built_in_cannot_be_set() {
    let client = Client::builder().compression(Compression::Zstd).connect("memory://").await;
    let server = Server::builder().compression(Compression::Zstd).connect("memory://").await;
    for error in [client.map(drop), server.map(drop)] {
        assert!(matches!(error, Err(Error::Invalid(why)) if why.contains("cargo feature `zstd`")));
    }
}

#[cfg(feature = "zstd")]
#[tokio::test]
async fn zstd_works_like_lz4() {
    let scene = Scene::new();
    let _server = serve(&scene, Compression::Zstd).await;
    let mut stranger = Stranger::new(&scene).await;
    let text = one(&b"hopline ".repeat(1000));
    let small = zstd::bulk::compress(&text, 0).expect("it can be");
    let (_, mut body) = compressed(1, 1, "echo", &small);
    stranger.send("rpc", "math.v1", body.clone(), Some(stranger.reply_to.clone()), None).await;
    assert_eq!(stranger.answer().await.1, 0);
    let bomb = zstd::bulk::compress(&vec![0; 16 * MIB + 1], 0).expect("it can be");
    body = compressed(1, 1, "echo", &bomb).1;
    stranger.send("rpc", "math.v1", body, Some(stranger.reply_to.clone()), None).await;
    assert_eq!(stranger.answer().await.1, Code::ResourceExhausted as u8);
    let call = from_reader(0b01, "echo", &text);
    stranger.send("rpc", "math.v1", call, Some(stranger.reply_to.clone()), None).await;
    assert_eq!(stranger.answer().await.2[6], 1);
}

#[tokio::test]
async fn metadata_of_more_entries_than_allowed_does_not_leave() {
    let scene = Scene::new();
    let _server = scene.serve(MathServer::new(Calculator)).await;
    let client = scene.client().await;
    let math = MathClient::new(&client);
    let with = |entries: usize| (0..entries).fold(math.add(2, 3), |call, n| call.metadata(n.to_string(), ""));
    assert_eq!(soon(with(128).into_future()).await.expect("allowed"), 5);
    match soon(with(129).into_future()).await {
        Err(Error::Invalid(why)) => assert!(why.contains("129") && why.contains("128"), "{why}"),
        other => panic!("{other:?}"),
    }
    assert_eq!(code(soon(client.call::<i64>("math", "absent", ()).into_future()).await), Code::Unimplemented);
}
