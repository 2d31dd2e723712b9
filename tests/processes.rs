//! Servers as processes: several share the work, and they are stopped, killed and sent garbage.
//!
//! Processes share no memory, so this needs the RabbitMQ that `HOPLINE_TEST_URL` names.
//! `scripts/test processes-3.10 processes-4.3` runs it with both versions. Otherwise the tests that need one are
//! ignored. The servers are the example `server`, on the service `demo` of the default namespace. Nobody else may serve
//! or call that service at the same time.

use std::collections::{BTreeSet, HashMap};
use std::process::Stdio;
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use hopline::topology::{Declaration, Queue, QueueKind};
use hopline::transport::{Confirm, Consumer, Mode, Properties, Publication, Role, Settle, Transport};
use hopline::{Client, Code, Codec, Error, Route};
use tokio::io::AsyncReadExt;
use tokio::net::TcpSocket;
use uuid::Uuid;

#[path = "../examples/demo/mod.rs"]
#[allow(dead_code, reason = "the servers use the other half of it")]
mod demo;
#[path = "processes/outbox.rs"]
mod outbox;
mod programs;

use demo::DemoClient;
use programs::{DEMO, Server, example, soon};

/// A time-out that is longer than [`soon`] waits: a call that is answered within `soon` did not end by its deadline.
const LONG: Duration = Duration::from_secs(300);

/// The RabbitMQ under test.
fn rabbit() -> String {
    std::env::var("HOPLINE_TEST_URL").expect("HOPLINE_TEST_URL names a RabbitMQ")
}

async fn client(url: &str) -> (Client, DemoClient) {
    let client = Client::builder().timeout(LONG).connect(url).await.expect("the broker is there");
    let demo = DemoClient::new(&client);
    (client, demo)
}

/// A server that accepts one call at a time.
async fn unhurried(url: &str) -> Server {
    Server::run(example("server").arg(url).env("PREFETCH", "1")).await
}

/// The memory that a server uses, in KiB.
fn memory_of(server: &Server) -> i64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", server.id())).expect("it runs on Linux");
    let memory = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a process uses memory");
    memory.trim().trim_end_matches(" kB").parse().expect("a number")
}

/// The ids of the replies in a message, without signs of life.
fn ids(mut body: &[u8]) -> Vec<String> {
    const REPLY: u8 = 2;
    let mut ids = Vec::new();
    while !body.is_empty() {
        if body[4] == REPLY {
            ids.push(Uuid::from_slice(&body[8..24]).expect("16 bytes").to_string());
        }
        let number = |at: usize| u32::from_be_bytes(body[at..at + 4].try_into().expect("4 bytes")) as usize;
        body = &body[32 + number(24) + number(28)..];
    }
    ids
}

/// A peer that publishes directly to the service's exchange.
struct Stranger {
    transport: Transport,
    reply_to: String,
    replies: Consumer,
}

impl Stranger {
    async fn new(url: &str) -> Self {
        let transport = Transport::connect(url, Role::Client).await.expect("the broker is there");
        let reply_to = format!("hopline.stranger.{}", Uuid::new_v4().simple());
        transport.declare(&[Declaration::Queue(Queue::new(&reply_to, QueueKind::Exclusive))]).await.expect("declared");
        let replies = transport.consume(&reply_to, Mode::NoAck).await.expect("it is ours");
        Self { transport, reply_to, replies }
    }

    /// Publishes each body with an id of its own. Returns the ids that the answers will name, and how many answers each
    /// will have.
    async fn send(&self, bodies: impl Iterator<Item = (Vec<u8>, bool, usize)>) -> HashMap<String, usize> {
        let mut ids = HashMap::new();
        let mut receipts = Vec::new();
        for (body, answerable, answers) in bodies {
            let id = Uuid::new_v4().to_string();
            let properties = Properties {
                reply_to: answerable.then(|| self.reply_to.clone()),
                correlation_id: Some(id.clone()),
                ..Properties::default()
            };
            // An answer names the frame that it belongs to, if that could be read, and otherwise the message.
            let named = body.get(8..24).filter(|_| answerable && body.starts_with(b"HL"));
            let named = named.map_or(id, |bytes| Uuid::from_slice(bytes).expect("16 bytes").to_string());
            *ids.entry(named).or_default() += answers;
            receipts.push(self.transport.publish(Publication {
                exchange: "hopline.rpc".to_owned(),
                key: "demo.v1".to_owned(),
                mandatory: true,
                properties,
                body: body.into(),
            }));
        }
        for receipt in receipts {
            assert_eq!(soon(receipt).await, Ok(Confirm::Accepted));
        }
        ids
    }

    /// Makes this many calls, and returns the instance that answers all of them.
    async fn answered_by(&mut self, calls: usize) -> String {
        self.send((0..calls).map(|_| (request("add", b"[2,3]"), true, 1))).await;
        let (mut instances, mut answers) = (BTreeSet::new(), 0);
        while answers < calls {
            let message = soon(self.replies.next()).await.expect("a reply");
            let replies = ids(&message.body).len();
            if replies > 0 {
                assert_eq!(message.body[5], Code::Ok as u8);
                instances.insert(message.properties.app_id.expect("it names itself"));
            }
            answers += replies;
        }
        assert_eq!(instances.len(), 1, "{instances:?} have taken calls");
        instances.pop_first().expect("there is one")
    }
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: HOPLINE_TEST_URL"]
async fn of_processes_that_take_a_call_at_a_time_whoever_is_free_takes_the_next() {
    let url = rabbit();
    let _demo = DEMO.lock().await;
    let mut servers = vec![unhurried(&url).await, unhurried(&url).await];
    let mut stranger = Stranger::new(&url).await;
    // One server gets this call and is busy. All following calls go to the other.
    stranger.send([(request("sleep", b"[3600000]"), true, 1)].into_iter()).await;
    let free = stranger.answered_by(100).await;
    assert!(servers.iter().any(|server| server.instance == free), "{free}");
    // When neither is free, a new server gets what waits.
    stranger.send([(request("sleep", b"[3600000]"), true, 1)].into_iter()).await;
    soon(async {
        while stranger.transport.count("hopline.demo.v1.calls").await.expect("an answer") != Some(0) {
            tokio::task::yield_now().await;
        }
    })
    .await;
    servers.push(unhurried(&url).await);
    assert_eq!(stranger.answered_by(100).await, servers[2].instance);
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: HOPLINE_TEST_URL"]
async fn a_process_that_is_terminated_under_load_loses_no_call() {
    let url = rabbit();
    let _demo = DEMO.lock().await;
    let leaving = unhurried(&url).await;
    let staying = [unhurried(&url).await, unhurried(&url).await];
    let (_client, demo) = client(&url).await;

    const CALLS: usize = 300;
    let mut calls = FuturesUnordered::new();
    for _ in 0..CALLS {
        calls.push(demo.sleep(20).start().await.expect("on its way"));
    }
    for _ in 0..CALLS / 4 {
        soon(calls.next()).await.expect("one of them").expect("answered");
    }
    let gone = leaving.instance.clone();
    leaving.signal("TERM").await;
    let rest = async {
        let mut answered = 0;
        while let Some(outcome) = calls.next().await {
            outcome.expect("no call is lost or aborted");
            answered += 1;
        }
        answered
    };
    let (status, answered) = tokio::join!(leaving.ended(), soon(rest));
    assert_eq!(status.code(), Some(0));
    assert_eq!(answered, CALLS - CALLS / 4);

    let mut replies = demo.whoami().all().replies(Duration::from_secs(30)).await.expect("they are asked");
    let mut instances = BTreeSet::new();
    while instances.len() < staying.len() {
        instances.insert(soon(replies.next()).await.expect("another one answers").instance);
    }
    assert_eq!(instances, staying.iter().map(|server| server.instance.clone()).collect());
    match demo.whoami().to(&gone).await {
        Err(Error::NoService { service, .. }) => assert_eq!(service, format!("demo.v1@{gone}")),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: HOPLINE_TEST_URL"]
async fn a_call_that_a_killed_process_held_is_aborted_at_once() {
    let url = rabbit();
    let _demo = DEMO.lock().await;
    let killed = Server::start(&url).await;
    let (_client, demo) = client(&url).await;
    let held = demo.sleep(u64::try_from(LONG.as_millis()).expect("it is short")).start().await.expect("on its way");
    // Calls are delivered in order. When this one is answered, the one before it is running.
    assert_eq!(soon(demo.add(2, 3).into_future()).await.expect("answered"), 5);

    let living = Server::start(&url).await;
    let began = Instant::now();
    killed.signal("KILL").await;
    let outcome = soon(held).await;
    println!("aborted {:?} after the kill", began.elapsed());
    match outcome {
        Err(Error::Fault(fault)) => assert_eq!(fault.code, Code::Aborted, "{fault}"),
        other => panic!("{other:?}"),
    }
    assert!(!killed.ended().await.success());
    assert_eq!(soon(demo.whoami().into_future()).await.expect("the other lives"), living.instance);
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: HOPLINE_TEST_URL"]
async fn a_hundred_thousand_hostile_bodies_leave_a_process_as_it_was() {
    let url = rabbit();
    let _demo = DEMO.lock().await;
    // Otherwise it would log a warning for every body that it keeps.
    let server = Server::run(example("server").arg(&url).env("RUST_LOG", "error,lapin=off")).await;
    let mut stranger = Stranger::new(&url).await;
    let mode = Mode::Settle { prefetch: 1000 };
    let mut letters = stranger.transport.consume("hopline.demo.v1.dead", mode).await.expect("the server declared it");
    const BATCH: usize = 10_000;
    let mut hostile = Hostile::default();
    let mut memory = Vec::new();
    // The first bodies warm it up: growth after that would go on.
    for _ in 0..11 {
        let mut awaited = stranger.send(hostile.by_ref().take(BATCH)).await;
        let mut open: usize = awaited.values().sum();
        while open > 0 {
            soon(async {
                let told = tokio::select! {
                    reply = stranger.replies.next() => ids(&reply.expect("the connection stays").body),
                    letter = letters.next() => {
                        let letter = letter.expect("the connection stays");
                        let id = letter.properties.correlation_id.clone().expect("it is told what it is about");
                        letter.settle(Settle::Ack);
                        vec![id]
                    }
                };
                for id in told {
                    // An earlier test may have left letters.
                    if let Some(more) = awaited.get_mut(&id).filter(|more| **more > 0) {
                        (*more, open) = (*more - 1, open - 1);
                    }
                }
            })
            .await;
        }
        memory.push(memory_of(&server));
    }
    println!("VmRSS after each {BATCH} bodies, in KiB: {memory:?}");
    let (_client, demo) = client(&url).await;
    assert_eq!(soon(demo.add(2, 3).into_future()).await.expect("the next good call"), 5);
    let grown = memory[10] - memory[0];
    assert!(grown < 20 * 1024, "VmRSS grew by {grown} KiB");
    stranger.transport.close().await;
    server.signal("TERM").await;
    assert!(server.ended().await.success(), "it still drains");
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: HOPLINE_TEST_URL"]
async fn a_process_that_is_interrupted_finishes_what_it_runs_and_ends_in_silence() {
    let url = rabbit();
    let _demo = DEMO.lock().await;
    let mut server = Server::run(example("server").arg(&url).stderr(Stdio::piped())).await;
    let mut log = server.process.stderr.take().expect("it is piped");
    let (_client, demo) = client(&url).await;
    let running = demo.sleep(500).start().await.expect("on its way");
    assert_eq!(soon(demo.add(2, 3).into_future()).await.expect("the one before it runs"), 5);
    soon(demo.note("to whom it may concern".to_owned()).send()).await.expect("the broker has it");
    assert_eq!(server.line().await, "note: to whom it may concern");
    server.signal("INT").await;
    soon(running).await.expect("it was let finish");
    assert_eq!(server.ended().await.code(), Some(0));
    let mut noise = String::new();
    soon(log.read_to_string(&mut noise)).await.expect("it is text");
    assert_eq!(noise, "", "all went well");
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: HOPLINE_TEST_URL"]
async fn no_idempotent_call_along_a_route_is_lost_with_a_killed_process() {
    const CALLERS: u64 = 16;
    const CALLS: u64 = 100;
    let url = rabbit();
    let _demo = DEMO.lock().await;
    let servers = [Server::start(&url).await, Server::start(&url).await, Server::start(&url).await];
    let client = Client::builder().timeout(LONG).route("demo", Route::RoundRobin).connect(&url).await;
    let client = client.expect("the broker is there");
    let demo = DemoClient::new(&client);
    let (answered, mut count) = tokio::sync::mpsc::unbounded_channel();
    let callers: Vec<_> = (0..CALLERS)
        .map(|caller| {
            let (demo, answered) = (demo.clone(), answered.clone());
            tokio::spawn(async move {
                for number in 0..CALLS {
                    let bytes = [caller, number].map(|number| u8::try_from(number).expect("small")).to_vec();
                    assert_eq!(demo.echo(bytes.clone()).await.expect("it is idempotent"), bytes);
                    answered.send(()).expect("the test counts");
                }
            })
        })
        .collect();
    for _ in 0..CALLERS * CALLS / 4 {
        soon(count.recv()).await.expect("more are to come");
    }
    let [killed, left @ ..] = servers;
    killed.signal("KILL").await;
    for caller in callers {
        soon(caller).await.expect("each of its calls was answered");
    }
    let left: BTreeSet<_> = left.iter().map(|server| server.instance.clone()).collect();
    let instances = soon(async {
        loop {
            let answers = [demo.whoami().await, demo.whoami().await, demo.whoami().await];
            let answers: BTreeSet<_> =
                answers.into_iter().map(|instance| instance.expect("it is idempotent")).collect();
            if answers.len() == 2 {
                return answers;
            }
        }
    });
    assert_eq!(instances.await, left);
    assert!(!killed.ended().await.success());
}

#[tokio::test]
async fn a_process_without_a_broker_says_which_and_hides_the_password() {
    // A port that is taken, but nobody listens on it.
    let taken = TcpSocket::new_v4().expect("there is room for one");
    taken.bind(([127, 0, 0, 1], 0).into()).expect("there is a free port");
    let port = taken.local_addr().expect("it is bound").port();
    let output = example("server").arg(format!("amqp://somebody:s3cret@127.0.0.1:{port}")).output();
    let output = soon(output).await.expect("it can be run");
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        said.starts_with(&format!("server: cannot connect to amqp://127.0.0.1:{port}: nobody listens there")),
        "{said}"
    );
    assert!(!said.contains("s3cret") && !said.contains("somebody"), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(output.stdout.is_empty(), "it is not ready");
}

/// A request frame, written by hand after the description of the wire.
fn request(method: &str, arguments: &[u8]) -> Vec<u8> {
    // A CBOR map of one entry: 1 => the method, a text of under 24 bytes.
    let metadata = [&[0xa1, 0x01, 0x60 | u8::try_from(method.len()).expect("short")], method.as_bytes()].concat();
    with_metadata(Codec::Json, 0, &metadata, arguments)
}

/// A request with these flags, this metadata and this payload.
fn with_metadata(codec: Codec, flags: u8, metadata: &[u8], payload: &[u8]) -> Vec<u8> {
    let length = |bytes: &[u8]| u32::try_from(bytes.len()).expect("a short one").to_be_bytes();
    let id = Uuid::new_v4();
    let header = header(codec, flags, id.as_bytes());
    [header.as_slice(), &length(metadata), &length(payload), metadata, payload].concat()
}

/// The beginning of a request, up to its id.
fn header(codec: Codec, flags: u8, id: &[u8]) -> Vec<u8> {
    [&[b'H', b'L', 1, codec as u8, 1, 0, flags, 0], id].concat()
}

/// Bodies that nobody should send, of many kinds. They are the same in every run, except for their ids. Each comes with
/// the number of answers or dead letters that it causes.
struct Hostile {
    count: usize,
    /// The state of Marsaglia's xorshift.
    state: u64,
    /// 16 MiB and one byte, compressed by lz4: possible for lz4, and over the cap.
    lz4_bomb: Vec<u8>,
}

impl Default for Hostile {
    fn default() -> Self {
        let lz4_bomb = lz4_flex::block::compress_prepend_size(&vec![0; 16 * 1024 * 1024 + 1]);
        Self { count: 0, state: 0x9e37_79b9_7f4a_7c15, lz4_bomb }
    }
}

impl Hostile {
    fn byte(&mut self) -> u8 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        self.state.to_be_bytes()[0]
    }

    fn noise(&mut self, bytes: u8) -> Vec<u8> {
        (0..bytes).map(|_| self.byte()).collect()
    }

    /// A request for `add` with this payload.
    fn with_payload(codec: Codec, flags: u8, payload: &[u8]) -> Vec<u8> {
        with_metadata(codec, flags, b"\xa1\x01\x63add", payload)
    }
}

impl Iterator for Hostile {
    type Item = (Vec<u8>, bool, usize);

    fn next(&mut self) -> Option<Self::Item> {
        const LZ4: u8 = 2;
        const ZSTD: u8 = 1;
        let n = self.count;
        self.count += 1;
        let size = self.byte();
        let noise = self.noise(size);
        let good = request("add", b"[2,3]");
        // Bodies that are expensive come only once in a thousand, each kind at its own time.
        let sort = match n % 1000 {
            1 => 100,
            2 => 101,
            3 => 102,
            // This one is answered a thousand times.
            4 if n % 10_000 == 4 => 103,
            _ => n % 23,
        };
        let body = match sort {
            // Noise that cannot be a frame, with noise as headers.
            0 => noise,
            1 => header(Codec::Json, 0, &noise),
            2 => [header(Codec::Json, 0, &self.noise(16)), vec![0, 0, 0, size], vec![0; 4], noise].concat(),
            3 => good[..usize::from(size) % good.len()].to_vec(),
            // Lengths that are longer than the body.
            4 => [&good[..24], &[0xff; 4], &good[28..]].concat(),
            5 => [&good[..28], &[0xff; 4], &good[32..]].concat(),
            6 => [&good[..24], &[0, 1, 0, 1], &good[28..]].concat(),
            // Flags and other bytes of the header without a meaning.
            7 => Self::with_payload(Codec::Json, size | 0x10, b"[2,3]"),
            8 => Self::with_payload(Codec::Json, LZ4 | ZSTD, b"[2,3]"),
            9 => [&good[..2], &[size | 2], &good[3..]].concat(),
            10 => [&good[..4], &[9 + size % 200 + 1], &good[5..]].concat(),
            // Payloads that claim to decompress to 4 GiB or to 16 MiB, and some that are cut off, or noise.
            11 => Self::with_payload(Codec::Cbor, LZ4, &[&[0xff; 4], &noise[..]].concat()),
            12 => Self::with_payload(Codec::Cbor, LZ4, &[&[0, 0, 0, 1], &noise[..]].concat()),
            13 => Self::with_payload(Codec::Cbor, LZ4, &[&[size, 1, 0, 0], &noise[..]].concat()),
            14 => Self::with_payload(Codec::Cbor, LZ4, &self.lz4_bomb[..100]),
            15 => Self::with_payload(Codec::Cbor, ZSTD, &[b"\x28\xb5\x2f\xfd", &noise[..]].concat()),
            16 => Self::with_payload(Codec::Cbor, ZSTD, b"\x28\xb5\x2f\xfd\xa0\xff\xff\xff\xff\x03\x00\x00"),
            // Deep nesting, and arrays and texts of 2^32 elements and more.
            17 => Self::with_payload(Codec::Json, 0, &b"[".repeat(10_000)),
            18 => Self::with_payload(Codec::Cbor, 0, &[0x81].repeat(10_000)),
            19 => Self::with_payload(Codec::MessagePack, 0, &[0x91].repeat(10_000)),
            20 => Self::with_payload(Codec::MessagePack, 0, &[0xdd, 0xff, 0xff, 0xff, 0xff, 2, 3]),
            21 => Self::with_payload(Codec::Cbor, 0, &[0x9b, 0, 0, 0, 1, 0, 0, 0, 0, 2, 3]),
            // Metadata with 2^60 entries, and with 60 000 levels in an unknown entry.
            22 => with_metadata(Codec::Cbor, 0, &[0xa1, 10, 0xbb, 0x10, 0, 0, 0, 0, 0, 0, 0], b""),
            100 => with_metadata(Codec::Cbor, 0, &[&[0xa1, 0x18, 99][..], &[0x81].repeat(60_000), &[0]].concat(), b""),
            // A user's map of 30 000 empty names.
            101 => with_metadata(
                Codec::Cbor,
                0,
                &[&[0xa1, 10, 0xb9, 0x75, 0x30][..], &[0x60].repeat(60_000)].concat(),
                b"",
            ),
            // A complete bomb, and a message with one frame too many.
            102 => Self::with_payload(Codec::Cbor, LZ4, &self.lz4_bomb),
            _ => request("absent", b"[]").repeat(1025),
        };
        // If a body can be read in part, each frame is answered, and then the rest.
        let answers = if sort == 103 { 1025 } else { 1 };
        Some((body, n.is_multiple_of(3), answers))
    }
}
