//! Calls that are delivered more than once: oneway calls that are tried again, and methods with `dedup`, which run a
//! call once.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use hopline::topology::{Declaration, Queue, QueueKind};
use hopline::transport::{Confirm, Consumer, Mode, Properties, Publication, Settle, Transport};
use hopline::{Code, Codec, Context, Fault, Method, Running, Service};
use tokio::sync::{mpsc, oneshot};
use uuid::Uuid;

use crate::stranger::KEEP_ALIVE;
use crate::support::{Held, Scene, frame, soon, told};

const ONEWAY: u8 = 3;
const REQUEST: u8 = 1;

/// A service whose `note` reports each attempt, and fails for lines that begin with `fail`.
fn notes() -> (Service, mpsc::UnboundedReceiver<(String, u64)>) {
    notes_of(Method::new("note").oneway().attempts(5).pause(Duration::from_millis(100)))
}

fn notes_of(method: Method) -> (Service, mpsc::UnboundedReceiver<(String, u64)>) {
    let (tell, told) = mpsc::unbounded_channel();
    let service = Service::new("notes", 1).method(method, move |context: Context, (line,): (String,)| {
        tell.send((line.clone(), context.attempt())).expect("the test listens");
        async move { if line.starts_with("fail") { Err(Fault::new(Code::Unavailable, "not now")) } else { Ok(()) } }
    });
    (service, told)
}

fn note(line: &str) -> (Uuid, Vec<u8>) {
    let id = Uuid::new_v4();
    (id, frame(ONEWAY, Codec::Json, id, "note", serde_json::json!([line]).to_string().as_bytes()))
}

/// A peer that publishes frames by hand, and reads the replies.
struct Stranger {
    transport: Transport,
    namespace: String,
    reply_to: String,
    replies: Consumer,
}

impl Stranger {
    async fn new(scene: &Scene) -> Self {
        let transport = scene.transport().await;
        let reply_to = format!("{}.stranger.{}", scene.namespace, Uuid::new_v4().simple());
        transport.declare(&[Declaration::Queue(Queue::new(&reply_to, QueueKind::Exclusive))]).await.expect("declared");
        let replies = transport.consume(&reply_to, Mode::NoAck).await.expect("it is ours");
        Self { transport, namespace: scene.namespace.clone(), reply_to, replies }
    }

    async fn publish(&self, exchange: &str, key: &str, body: &[u8]) {
        let publication = Publication {
            exchange: exchange.to_owned(),
            key: key.to_owned(),
            mandatory: true,
            properties: Properties { reply_to: Some(self.reply_to.clone()), ..Properties::default() },
            body: body.to_vec().into(),
        };
        assert_eq!(soon(self.transport.publish(publication)).await, Ok(Confirm::Accepted));
    }

    /// Sends oneway frames in one message.
    async fn send(&self, key: &str, body: &[u8]) {
        self.publish(&format!("{}.oneway", self.namespace), key, body).await;
    }

    /// Calls the service.
    async fn call(&self, service: &str, body: &[u8]) {
        self.publish(&format!("{}.rpc", self.namespace), service, body).await;
    }

    /// The next reply, which is alone in its message: its id, its status, and its payload.
    async fn reply(&mut self) -> (Uuid, u8, Vec<u8>) {
        let body = loop {
            let body = soon(self.replies.next()).await.expect("a reply").body;
            // A call that takes a second sends signs of life.
            if body[4] != KEEP_ALIVE {
                break body;
            }
        };
        let number = |at: usize| u32::from_be_bytes(body[at..at + 4].try_into().expect("4 bytes")) as usize;
        let payload = &body[32 + number(24)..];
        assert_eq!(payload.len(), number(28), "it came alone");
        (Uuid::from_slice(&body[8..24]).expect("16 bytes"), body[5], payload.to_vec())
    }
}

fn header<'a>(letter: &'a hopline::transport::Delivery, wanted: &str) -> &'a str {
    letter.properties.headers.iter().find(|(name, _)| name == wanted).map_or("", |(_, value)| value.as_str())
}

#[tokio::test]
async fn a_failing_oneway_call_has_its_attempts_and_then_tells_why() {
    let scene = Scene::new();
    let (service, mut told) = notes();
    let server = scene.serve(service).await;
    let stranger = Stranger::new(&scene).await;
    let (id, body) = note("fail");
    stranger.send("notes.v1.note", &body).await;
    for attempt in 1..=5 {
        assert_eq!(soon(told.recv()).await.expect("it is tried"), ("fail".to_owned(), attempt));
    }
    let mut letters = scene.dead_letters(&stranger.transport, "notes.v1").await;
    let letter = soon(letters.next()).await.expect("it is kept");
    assert_eq!(letter.body, body);
    assert_eq!(letter.death, None, "the server brought it there");
    let expected = [
        ("x-hopline-reason", "not now"),
        ("x-hopline-instance", server.instance()),
        ("x-hopline-exchange", &format!("{}.oneway", scene.namespace)),
        ("x-hopline-key", "notes.v1.note"),
        ("x-hopline-attempts", "5"),
        ("x-hopline-method", "note"),
        ("x-hopline-id", &id.to_string()),
        ("x-hopline-history", ""),
    ];
    for (name, value) in expected {
        assert_eq!(header(&letter, name), value, "{name}");
    }
    assert!(header(&letter, "x-hopline-failed-at").parse::<u64>().is_ok_and(|at| at > 1_700_000_000_000));
    letter.settle(Settle::Ack);
    told.try_recv().expect_err("it is not tried again");
}

#[tokio::test]
async fn a_call_has_more_attempts_than_the_broker_delivers_it_if_its_method_says_so() {
    let scene = Scene::new();
    let (service, mut told) = notes_of(Method::new("note").oneway().attempts(45).pause(Duration::ZERO));
    let _server = scene.serve(service).await;
    let stranger = Stranger::new(&scene).await;
    let (id, body) = note("fail");
    stranger.send("notes.v1.note", &body).await;
    for attempt in 1..=45 {
        assert_eq!(soon(told.recv()).await.expect("it is tried"), ("fail".to_owned(), attempt));
    }
    let letter = soon(scene.dead_letters(&stranger.transport, "notes.v1").await.next()).await.expect("it is kept");
    assert_eq!(letter.death, None, "the server brought it there, and not the broker");
    let expected = [("x-hopline-reason", "not now"), ("x-hopline-attempts", "45"), ("x-hopline-id", &id.to_string())];
    for (name, value) in expected {
        assert_eq!(header(&letter, name), value, "{name}");
    }
    letter.settle(Settle::Ack);
    told.try_recv().expect_err("it is not tried again");
}

#[tokio::test(start_paused = true)]
async fn a_failing_call_has_a_minute_unless_its_method_says_otherwise() {
    let scene = Scene { url: "memory://pauses".to_owned(), ..Scene::new() };
    let (service, mut told) = notes_of(Method::new("note").oneway());
    let _server = scene.serve(service).await;
    let client = scene.client().await;
    client.oneway("notes", "note", ("fail",)).send().await.expect("the broker has it");
    let start = tokio::time::Instant::now();
    let mut pauses = Vec::new();
    for attempt in 1..=8 {
        let at = start.elapsed();
        // This comes later than `soon` would wait.
        assert_eq!(told.recv().await.expect("it is tried"), ("fail".to_owned(), attempt));
        pauses.push((start.elapsed() - at).as_millis());
    }
    for (pause, least) in pauses.into_iter().skip(1).zip([500, 1000, 2000, 4000, 8000, 16_000, 30_000]) {
        assert!((least..least + 50).contains(&pause), "{pause} ms instead of {least}");
    }
    assert!(start.elapsed() > Duration::from_secs(60), "an outage of a minute loses nothing");
}

#[tokio::test]
async fn a_call_that_fails_among_others_goes_on_counting_alone() {
    let scene = Scene::new();
    let (service, mut told) = notes();
    let _server = scene.serve(service).await;
    let stranger = Stranger::new(&scene).await;
    let ((_, good), (id, bad), (_, other)) = (note("good"), note("fail"), note("other"));
    stranger.send("notes.v1.note", &[good, bad, other].concat()).await;
    let mut letters = scene.dead_letters(&stranger.transport, "notes.v1").await;
    let letter = soon(letters.next()).await.expect("it is kept");
    assert_eq!((header(&letter, "x-hopline-attempts"), header(&letter, "x-hopline-id")), ("5", &*id.to_string()));
    letter.settle(Settle::Ack);
    let mut attempts = Vec::new();
    while let Ok(attempt) = told.try_recv() {
        attempts.push(attempt);
    }
    attempts.sort();
    let expected = [("fail", 1), ("fail", 2), ("fail", 3), ("fail", 4), ("fail", 5), ("good", 1), ("other", 1)];
    assert_eq!(attempts, expected.map(|(line, attempt)| (line.to_owned(), attempt)));
}

#[tokio::test(start_paused = true)]
async fn each_pause_is_longer_than_the_one_before_and_holds_nobody_up() {
    // Only in memory does the clock stand still until every task waits.
    let scene = Scene::in_memory();
    let (service, mut told) = notes();
    let _server = scene.serve(service.concurrency(1)).await;
    let client = scene.client().await;
    let start = tokio::time::Instant::now();
    client.oneway("notes", "note", ("fail",)).send().await.expect("the broker has it");
    soon(told.recv()).await.expect("it is tried");
    client.oneway("notes", "note", ("good",)).send().await.expect("the broker has it");
    assert_eq!(soon(told.recv()).await.expect("its place is free"), ("good".to_owned(), 1));
    assert!(start.elapsed() < Duration::from_millis(100), "and at once");
    let mut at = Vec::new();
    for attempt in 2..=5 {
        assert_eq!(soon(told.recv()).await.expect("it is tried"), ("fail".to_owned(), attempt));
        at.push(start.elapsed().as_millis());
    }
    let pauses: Vec<_> = std::iter::once(&0).chain(&at).zip(&at).map(|(before, after)| after - before).collect();
    for (pause, least) in pauses.into_iter().zip([100, 200, 400, 800]) {
        assert!((least..least + 50).contains(&pause), "{pause} ms instead of {least}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_drain_does_not_wait_for_a_pause_and_the_next_attempt_is_anothers() {
    let scene = Scene::in_memory();
    let (service, mut told) = notes();
    let leaving = scene.serve(service).await;
    let client = scene.client().await;
    client.oneway("notes", "note", ("fail",)).send().await.expect("the broker has it");
    for _ in 0..4 {
        soon(told.recv()).await.expect("it is tried");
    }
    let start = tokio::time::Instant::now();
    soon(leaving.drain()).await;
    assert!(start.elapsed() < Duration::from_millis(700), "the pause after the fourth is 800 ms");
    let (service, mut told) = notes();
    let _staying = scene.serve(service).await;
    assert_eq!(soon(told.recv()).await.expect("it is tried"), ("fail".to_owned(), 5));
}

/// A service with one method with `dedup`. It reports how many times it has run.
struct Once {
    _server: Running,
    runs: Arc<AtomicUsize>,
    /// Each run waits here until the test sends its number.
    started: mpsc::UnboundedReceiver<oneshot::Sender<Result<u64, Fault>>>,
}

impl Once {
    async fn new(scene: &Scene) -> Self {
        Self::holding(scene, 64).await
    }

    /// A service whose instance gets this many messages at a time.
    async fn holding(scene: &Scene, prefetch: u16) -> Self {
        let runs = Arc::new(AtomicUsize::new(0));
        let (starts, started) = mpsc::unbounded_channel();
        let counter = runs.clone();
        let charge = move |_: Context, (_cents,): (u64,)| {
            counter.fetch_add(1, Ordering::SeqCst);
            let (answer, told) = oneshot::channel();
            starts.send(answer).expect("the test listens");
            async move { told.await.unwrap_or_else(|_| Err(Fault::new(Code::Internal, "the test let go of it"))) }
        };
        let method = Method::new("charge").oneway().dedup(Duration::from_secs(600));
        let server = scene.serve(Service::new("billing", 1).method(method, charge).prefetch(prefetch)).await;
        Self { _server: server, runs, started }
    }

    async fn run(&mut self) -> oneshot::Sender<Result<u64, Fault>> {
        soon(self.started.recv()).await.expect("it runs")
    }

    fn runs(&self) -> usize {
        self.runs.load(Ordering::SeqCst)
    }
}

fn charge(kind: u8) -> (Uuid, Vec<u8>) {
    let id = Uuid::new_v4();
    (id, frame(kind, Codec::Json, id, "charge", b"[5]"))
}

#[tokio::test]
async fn a_call_that_comes_again_gets_the_first_reply_without_running() {
    let scene = Scene::new();
    let mut once = Once::new(&scene).await;
    let mut stranger = Stranger::new(&scene).await;
    let (id, body) = charge(REQUEST);
    stranger.call("billing.v1", &body).await;
    once.run().await.send(Ok(7)).expect("it waits");
    assert_eq!(stranger.reply().await, (id, 0, b"7".to_vec()));
    for _ in 0..3 {
        stranger.call("billing.v1", &body).await;
        assert_eq!(stranger.reply().await, (id, 0, b"7".to_vec()));
    }
    assert_eq!(once.runs(), 1);
    let client = scene.client().await;
    let told = told(1, async |window| client.registry().total(window).all_stats().await).await;
    assert_eq!((told[0].finished, told[0].repeated), (1, 3));
    // Another id is another call.
    let (other, body) = charge(REQUEST);
    stranger.call("billing.v1", &body).await;
    once.run().await.send(Err(Fault::new(Code::NotFound, "no such card"))).expect("it waits");
    for _ in 0..2 {
        let (answered, status, _) = stranger.reply().await;
        assert_eq!((answered, status), (other, Code::NotFound as u8), "a fault is a reply too");
        stranger.call("billing.v1", &body).await;
    }
    assert_eq!(once.runs(), 2);
}

#[tokio::test]
async fn a_call_that_comes_again_while_it_runs_waits_for_its_reply() {
    let scene = Scene::new();
    let mut once = Once::new(&scene).await;
    let (mut first, mut second) = (Stranger::new(&scene).await, Stranger::new(&scene).await);
    let (id, body) = charge(REQUEST);
    first.call("billing.v1", &body).await;
    let running = once.run().await;
    second.call("billing.v1", &body).await;
    // Once the instance runs a later call, it has received the second delivery.
    let (_, later) = charge(REQUEST);
    second.call("billing.v1", &later).await;
    let _later = once.run().await;
    running.send(Ok(7)).expect("it waits");
    assert_eq!(first.reply().await, (id, 0, b"7".to_vec()));
    assert_eq!(second.reply().await, (id, 0, b"7".to_vec()));
    assert_eq!(once.runs(), 2);
}

#[tokio::test]
async fn a_redelivered_call_is_answered_by_the_instance_that_ran_it_instead_of_aborted() {
    let scene = Scene::new();
    let mut once = Once::holding(&scene, 1).await;
    let mut stranger = Stranger::new(&scene).await;
    let ((known, body), (unknown, other)) = (charge(REQUEST), charge(REQUEST));
    stranger.call("billing.v1", &body).await;
    let running = once.run().await;
    // The next deliveries wait in the queue until that one has ended.
    for body in [&body, &other] {
        stranger.call("billing.v1", body).await;
    }
    let queue = format!("{}.billing.v1.calls", scene.namespace);
    let mut waiting = Vec::new();
    for _ in 0..2 {
        waiting.push(soon(stranger.transport.get(&queue)).await.expect("it is there").expect("it waits"));
    }
    waiting.into_iter().for_each(|delivery| delivery.settle(Settle::GiveBack));
    running.send(Ok(7)).expect("it waits");
    for _ in 0..2 {
        assert_eq!(stranger.reply().await, (known, 0, b"7".to_vec()));
    }
    // It does not know this call, so it cannot tell whether it has run.
    let (answered, status, _) = stranger.reply().await;
    assert_eq!((answered, status), (unknown, Code::Aborted as u8));
    assert_eq!(once.runs(), 1);
}

#[tokio::test]
async fn a_oneway_call_that_ended_well_does_not_run_again_and_one_that_failed_does() {
    let scene = Scene::new();
    let mut once = Once::new(&scene).await;
    let stranger = Stranger::new(&scene).await;
    let (_, body) = charge(ONEWAY);
    stranger.send("billing.v1.charge", &body).await;
    once.run().await.send(Err(Fault::new(Code::Unavailable, "not now"))).expect("it waits");
    once.run().await.send(Ok(7)).expect("it is tried again");
    let (_, other) = charge(ONEWAY);
    for _ in 0..2 {
        stranger.send("billing.v1.charge", &body).await;
    }
    stranger.send("billing.v1.charge", &other).await;
    once.run().await.send(Ok(8)).expect("it waits");
    assert_eq!(once.runs(), 3, "twice the first, once the other");
}

#[tokio::test]
async fn without_dedup_each_delivery_runs() {
    let scene = Scene::new();
    let Held { service, mut arrived } = Held::new();
    let _server = scene.serve(service).await;
    let mut stranger = Stranger::new(&scene).await;
    let body = frame(REQUEST, Codec::Json, Uuid::new_v4(), "hold", b"[1]");
    for _ in 0..2 {
        stranger.call("held.v1", &body).await;
        soon(arrived.recv()).await.expect("it runs").release();
        stranger.reply().await;
    }
}
