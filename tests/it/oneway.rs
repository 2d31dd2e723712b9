//! Oneway calls are kept by the broker and run at least once.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use hopline::transport::{Confirm, Properties, Publication};
use hopline::{Client, Code, Codec, Context, DeadLetters, Error, Fault, Method, Service};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use crate::support::{Scene, frame, soon};

/// A service that keeps the lines that it is told, and fails when a line says so.
fn notes() -> (Service, mpsc::UnboundedReceiver<String>) {
    let (keep, kept) = mpsc::unbounded_channel();
    let method = Method::new("note").oneway().attempts(3).pause(Duration::from_millis(1));
    let service = Service::new("notes", 1).method(method, move |_: Context, (line,): (String,)| {
        keep.send(line.clone()).expect("the test listens");
        async move {
            assert!(!line.starts_with("panic"), "as the test asks: {line}");
            if line.starts_with("fail") { Err(Fault::new(Code::Unavailable, "not now")) } else { Ok(()) }
        }
    });
    (service, kept)
}

async fn note(client: &Client, line: &str) -> Result<(), Error> {
    client.oneway("notes", "note", (line.to_owned(),)).send().await
}

#[tokio::test]
async fn a_oneway_call_is_run_by_one_instance() {
    let scene = Scene::new();
    let (service, mut one) = notes();
    let _one = scene.serve(service).await;
    let (service, mut two) = notes();
    let _two = scene.serve(service).await;
    let client = scene.client().await;
    for n in 0..100 {
        note(&client, &n.to_string()).await.expect("the broker has it");
    }
    let mut lines = Vec::new();
    while lines.len() < 100 {
        let line = tokio::select! { line = soon(one.recv()) => line, line = soon(two.recv()) => line };
        lines.push(line.expect("it runs").parse::<u64>().expect("a number"));
    }
    lines.sort_unstable();
    assert_eq!(lines, (0..100).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_oneway_call_waits_for_a_server_to_come() {
    let scene = Scene::new();
    let client = scene.client().await;
    match note(&client, "early").await {
        Err(Error::NoService { service, .. }) => assert_eq!(service, "notes.v1"),
        other => panic!("{other:?}"),
    }
    let (service, _kept) = notes();
    scene.serve(service).await.drain().await;
    note(&client, "late").await.expect("the broker keeps it");
    let (service, mut kept) = notes();
    let _server = scene.serve(service).await;
    assert_eq!(soon(kept.recv()).await.expect("it runs"), "late");
}

#[tokio::test]
async fn a_oneway_call_that_keeps_failing_is_kept_for_an_operator() {
    let scene = Scene::new();
    let (service, mut kept) = notes();
    let _server = scene.serve(service).await;
    let client = scene.client().await;
    let transport = scene.transport().await;
    for (line, reason) in
        [("fail always", "not now"), ("panic always", "`notes.v1.note` panicked: as the test asks: panic always")]
    {
        note(&client, line).await.expect("the broker has it");
        let letter = soon(scene.dead_letters(&transport, "notes.v1").await.next()).await.expect("it is dead-lettered");
        assert_eq!(letter.properties.kind.as_deref(), Some("notes.v1.note"));
        let told = letter.properties.headers.iter().find(|(name, _)| name == "x-hopline-reason");
        assert_eq!(told.map(|(_, reason)| reason.as_str()), Some(reason));
        letter.settle(hopline::transport::Settle::Ack);
        let mut attempts = 0;
        while kept.try_recv().is_ok() {
            attempts += 1;
        }
        assert_eq!(attempts, 3, "{line}");
    }
    note(&client, "good").await.expect("the broker has it");
    assert_eq!(soon(kept.recv()).await.expect("the queue is not held up"), "good");
}

#[derive(Debug, Serialize, Deserialize)]
enum MailError {
    Busy { host: String },
}

#[hopline::service(name = "mail")]
trait Mail {
    #[rpc(oneway, attempts = 3, pause = "1ms")]
    async fn send(&self, ctx: &Context, line: String) -> Result<(), MailError>;
    #[rpc(oneway, attempts = 2, pause = "1ms")]
    async fn forward(&self, ctx: &Context, code: u8) -> Result<(), Fault>;
}

struct Post(mpsc::UnboundedSender<u64>);

impl Mail for Post {
    async fn send(&self, ctx: &Context, line: String) -> Result<(), MailError> {
        self.0.send(ctx.attempt()).expect("the test listens");
        if ctx.attempt() < 3 || line == "lost" { Err(MailError::Busy { host: "mx".to_owned() }) } else { Ok(()) }
    }

    async fn forward(&self, ctx: &Context, code: u8) -> Result<(), Fault> {
        self.0.send(ctx.attempt()).expect("the test listens");
        let code = Code::ALL.iter().find(|known| **known as u8 == code).expect("a code");
        Err(Fault::new(*code, ""))
    }
}

#[tokio::test]
async fn a_oneway_method_of_a_trait_asks_by_its_error_for_another_attempt() {
    let scene = Scene::new();
    let (tell, mut told) = mpsc::unbounded_channel();
    let _server = scene.serve(MailServer::new(Post(tell))).await;
    let client = scene.client().await;
    let mail = MailClient::new(&client);
    let dead = DeadLetters::builder()
        .namespace(&scene.namespace)
        .connect(&scene.url, "mail")
        .await
        .expect("the broker is there");
    let letter = async || loop {
        let letters = dead.list(10).await.expect("they are there").letters;
        if let [letter] = &*letters {
            dead.discard(&hopline::WhichLetters::All, |_| {}).await.expect("it goes");
            return letter.clone();
        }
        tokio::task::yield_now().await;
    };
    mail.send("through".into()).send().await.expect("the broker has it");
    for attempt in 1..=3 {
        assert_eq!(soon(told.recv()).await, Some(attempt));
    }
    assert_eq!(dead.count().await.expect("it is there"), 0);
    mail.send("lost".into()).send().await.expect("the broker has it");
    let lost = soon(letter()).await;
    assert_eq!(lost.reason, r#"the method returned its own error: {"Busy":{"host":"mx"}}"#);
    assert_eq!(lost.attempts, Some(3));
    // The code of a fault says whether another attempt can help, even without a text.
    for (code, attempts) in [(Code::Unavailable, 2), (Code::InvalidArgument, 1), (Code::Ok, 2)] {
        mail.forward(code as u8).send().await.expect("the broker has it");
        let lost = soon(letter()).await;
        assert_eq!(lost.attempts, Some(attempts), "{code}");
        let said = if code == Code::Ok { "code OK" } else { code.name() };
        assert!(lost.reason.contains(said), "{}", lost.reason);
    }
}

#[tokio::test]
async fn a_oneway_call_that_cannot_be_run_is_kept_with_the_reason() {
    let scene = Scene::new();
    let (service, mut kept) = notes();
    let _server = scene.serve(service).await;
    let client = scene.client().await;
    let transport = scene.transport().await;
    let mut letters = scene.dead_letters(&transport, "notes.v1").await;
    // A server of another version may have accepted a method that this one does not know.
    let absent = Properties { kind: Some("notes.v1.absent".to_owned()), ..Properties::default() };
    let absent = Publication {
        exchange: String::new(),
        key: format!("{}.notes.v1.work", scene.namespace),
        mandatory: true,
        properties: absent,
        body: frame(3, Codec::Cbor, uuid::Uuid::new_v4(), "absent", &[0x81, 1]).into(),
    };
    assert_eq!(transport.publish(absent).await.expect("it is there"), Confirm::Accepted);
    client.oneway("notes", "note", (1, 2, 3)).send().await.expect("the broker has it");
    let mut reasons = Vec::new();
    for _ in 0..2 {
        let letter = soon(letters.next()).await.expect("it is dead-lettered");
        let reason = letter.properties.headers.iter().find(|(name, _)| name == "x-hopline-reason");
        reasons.push(reason.expect("a reason").1.clone());
        letter.settle(hopline::transport::Settle::Ack);
    }
    reasons.sort_unstable();
    assert_eq!(reasons, ["`note` takes 1 argument, got 3", "`notes.v1` has no method `absent`: it has note"]);
    kept.try_recv().expect_err("neither ran");
}

#[tokio::test]
async fn only_oneway_methods_take_oneway_calls() {
    let scene = Scene::new();
    let (service, _kept) = notes();
    let _server = scene.serve(service.method("ask", |_: Context, _: [(); 0]| async { Ok::<_, Fault>(()) })).await;
    let client = scene.client().await;
    client.call::<()>("notes", "ask", [(); 0]).await.expect("answered");
    let refused = client.oneway("notes", "ask", [(); 0]).send().await.expect_err("it is none");
    assert!(refused.to_string().contains("`notes.v1` takes no oneway calls of `ask`"), "{refused}");
    match refused {
        Error::NoService { service, method, .. } => {
            assert_eq!((&*service, method.as_deref()), ("notes.v1", Some("ask")))
        }
        other => panic!("{other:?}"),
    }
    client.call::<()>("notes", "note", ("answered, too",)).await.expect("answered");
}

#[tokio::test]
async fn a_service_without_oneway_methods_leaves_no_queue_for_them() {
    let scene = Scene::new();
    let answers = |_: Context, _: [(); 0]| async { Ok::<_, Fault>(()) };
    let server = scene.serve(Service::new("asked", 1).method("ask", answers)).await;
    let (client, transport) = (scene.client().await, scene.transport().await);
    let queue = |name| format!("{}.asked.v1.{name}", scene.namespace);
    for name in ["work", "retry", "dead"] {
        assert_eq!(transport.count(&queue(name)).await.expect("it can be counted"), None, "{name}");
    }
    // The call is given up, but it is kept.
    client.oneway("asked", "unheard_of", [(); 0]).all().send().await.expect("the broker has it");
    let dead = DeadLetters::builder().namespace(&scene.namespace).connect(&scene.url, "asked").await;
    let dead = dead.expect("the broker is there");
    let is_kept = async {
        while !matches!(dead.count().await, Ok(1)) {
            tokio::task::yield_now().await;
        }
    };
    soon(is_kept).await;
    soon(server.drain()).await;
}

#[tokio::test]
async fn a_oneway_call_to_all_runs_on_every_instance() {
    let scene = Scene::new();
    let (service, mut one) = notes();
    let first = scene.serve(service).await;
    let (service, mut two) = notes();
    let _second = scene.serve(service).await;
    let client = scene.client().await;
    client.oneway("notes", "note", ("all",)).all().send().await.expect("the broker has it");
    assert_eq!(soon(one.recv()).await.expect("it runs"), "all");
    assert_eq!(soon(two.recv()).await.expect("and there"), "all");
    client.oneway("notes", "note", ("one",)).to(first.instance()).send().await.expect("the broker has it");
    assert_eq!(soon(one.recv()).await.expect("it runs"), "one");
    two.try_recv().expect_err("it was for the other");
}

#[tokio::test]
async fn a_drain_gives_back_the_oneway_calls_that_wait() {
    let scene = Scene::new();
    let runs = Arc::new(AtomicUsize::new(0));
    let (running, mut started) = mpsc::unbounded_channel();
    let counter = runs.clone();
    let service =
        Service::new("notes", 1).method(Method::new("note").oneway(), move |_: Context, (_line,): (String,)| {
            counter.fetch_add(1, Ordering::SeqCst);
            let (go, gone) = tokio::sync::oneshot::channel::<()>();
            running.send(go).expect("the test listens");
            async move { gone.await.map_err(|_| "let go".to_owned()) }
        });
    let leaving = scene.serve(service.concurrency(1).prefetch(10)).await;
    let client = scene.client().await;
    for line in ["one", "two", "three"] {
        note(&client, line).await.expect("the broker has it");
    }
    let busy = soon(started.recv()).await.expect("the first runs");
    let drained = tokio::spawn(leaving.drain());
    let (service, mut kept) = notes();
    let _staying = scene.serve(service).await;
    let mut lines = [soon(kept.recv()).await.expect("it runs here"), soon(kept.recv()).await.expect("it runs here")];
    lines.sort_unstable();
    assert_eq!(lines, ["three", "two"]);
    busy.send(()).expect("it still runs");
    soon(drained).await.expect("no panic");
    assert_eq!(runs.load(Ordering::SeqCst), 1);
}
