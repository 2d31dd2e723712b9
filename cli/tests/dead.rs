//! `hopline dead` as a shell sees it.
//!
//! The service runs in this process and the command in another, so most of this needs the RabbitMQ that
//! `HOPLINE_TEST_URL` names, and is ignored unless it is asked for.

use std::process::Output;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use hopline::topology::{Declaration, Queue, QueueKind};
use hopline::transport::{Confirm, Properties, Publication, Role, Transport};
use hopline::{Client, Code, Context, DeadLetters, Fault, Method, Running, Server, Service};
use serde_json::Value;
use tokio::sync::mpsc;

mod command;

use command::{PATIENCE, hopline};

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("it prints text")
}

/// What the command prints when all is well.
#[track_caller]
fn printed(output: Output) -> String {
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(output.stderr.is_empty(), "{output:?}");
    text(&output.stdout)
}

/// What it says on stderr when not.
#[track_caller]
fn failure(output: &Output, code: i32) -> String {
    assert_eq!(output.status.code(), Some(code), "{output:?}");
    text(&output.stderr)
}

/// A service of letters that it refuses until it is told otherwise, in a namespace of its own.
struct Scene {
    url: String,
    namespace: String,
    client: Client,
    dead: DeadLetters,
    open: Arc<AtomicBool>,
    taken: mpsc::UnboundedReceiver<String>,
    server: Option<Running>,
}

impl Scene {
    async fn new(name: &str) -> Self {
        let url = std::env::var("HOPLINE_TEST_URL").expect("HOPLINE_TEST_URL names a RabbitMQ");
        let namespace = format!("cli-dead-{}-{name}", std::process::id());
        let (tell, taken) = mpsc::unbounded_channel();
        let open = Arc::new(AtomicBool::new(false));
        let is_open = open.clone();
        let send = move |_: Context, (line,): (String,)| {
            let outcome = if is_open.load(Ordering::SeqCst) {
                tell.send(line).expect("the test listens");
                Ok(())
            } else {
                Err(Fault::new(Code::InvalidArgument, format!("no address for {line}")))
            };
            async move { outcome }
        };
        let server = Server::builder().namespace(&namespace).connect(&url).await.expect("the broker is there");
        let service = Service::new("mail", 1).method(Method::new("send").oneway(), send);
        let server = server.serve(service).start().await.expect("it can be served");
        let client = Client::builder().namespace(&namespace).connect(&url).await.expect("the broker is there");
        let dead =
            DeadLetters::builder().namespace(&namespace).connect(&url, "mail").await.expect("the broker is there");
        let entered = async {
            let builder = || DeadLetters::builder().namespace(&namespace);
            while builder().counts(&url).await.expect("the broker is there").is_empty() {}
        };
        tokio::time::timeout(PATIENCE, entered).await.expect("it stands in the catalogue within a minute");
        Self { url, namespace, client, dead, open, taken, server: Some(server) }
    }

    /// Runs `hopline dead` with these arguments where the service is, on another thread: the service runs on this one.
    async fn dead(&self, arguments: &[&str]) -> Output {
        let mut command = hopline(&["dead"]);
        command.args(arguments).args(["--url", &self.url, "--namespace", &self.namespace]);
        let ended = tokio::task::spawn_blocking(move || command.output().expect("it can be run"));
        ended.await.expect("no panic")
    }

    /// Sends letters that die, one after the other; returns their ids.
    async fn bury(&self, lines: &[&'static str]) -> Vec<String> {
        for (n, line) in lines.iter().enumerate() {
            self.client.oneway("mail", "send", (*line,)).send().await.expect("the broker has it");
            self.until(n as u64 + 1).await;
        }
        let letters = self.dead.list(100).await.expect("they are there").letters;
        // What was looked at is seen by another process once it is back.
        self.until(lines.len() as u64).await;
        letters.into_iter().map(|letter| letter.id).collect()
    }

    async fn until(&self, count: u64) {
        let counted = async { while self.dead.count().await.expect("it is there") != count {} };
        tokio::time::timeout(PATIENCE, counted).await.expect("they come within a minute");
    }

    async fn taken(&mut self) -> String {
        let taken = tokio::time::timeout(PATIENCE, self.taken.recv()).await;
        taken.expect("it runs within a minute").expect("the service is there")
    }
}

#[test]
fn the_help_tells_what_can_be_done() {
    let help = printed(hopline(&["dead", "--help"]).output().expect("it can be run"));
    for told in ["ls", "show", "replay", "drop"] {
        assert!(help.contains(&format!("\n  {told} ")), "no {told} in {help}");
    }
    let help = printed(hopline(&["dead", "replay", "--help"]).output().expect("it can be run"));
    for told in ["<SERVICE>", "[ID]...", "--all", "--yes", "--url", "--namespace"] {
        assert!(help.contains(told), "no {told} in {help}");
    }
}

#[test]
fn what_is_not_confirmed_on_a_terminal_needs_a_yes() {
    for arguments in [["drop", "mail", "some-id"], ["drop", "mail", "--all"], ["replay", "mail", "--all"]] {
        let output = hopline(&["dead"]).args(arguments).output().expect("it can be run");
        assert!(failure(&output, 2).contains("say `--yes`"), "{arguments:?}: {output:?}");
        assert!(output.stdout.is_empty(), "{output:?}");
    }
    for arguments in [&["drop", "mail"][..], &["replay", "mail", "id", "--all"], &["ls", "a.b.c"], &["show", "mail"]] {
        failure(&hopline(&["dead"]).args(arguments).output().expect("it can be run"), 2);
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a RabbitMQ: HOPLINE_TEST_URL"]
async fn dead_letters_are_listed_and_shown() {
    let mut scene = Scene::new("ls").await;
    assert_eq!(printed(scene.dead(&["ls"]).await), "SERVICE  DEAD\nmail.v1  0\n");
    let ids = scene.bury(&["one", "two\u{9b}\u{1b}[2J"]).await;
    assert_eq!(printed(scene.dead(&["ls"]).await), "SERVICE  DEAD\nmail.v1  2\n");
    let counts: Value = serde_json::from_str(&printed(scene.dead(&["ls", "--json"]).await)).expect("JSON");
    assert_eq!(counts, serde_json::json!([{ "service": "mail.v1", "count": 2 }]));
    for _ in 0..2 {
        let listed = printed(scene.dead(&["ls", "mail"]).await);
        let lines: Vec<_> = listed.lines().collect();
        assert_eq!(lines.len(), 3, "{listed}");
        assert!(lines[0].starts_with("ID "), "{listed}");
        assert!(lines[1].starts_with(&format!("{}  send    1 ", ids[0])), "{listed}");
        assert!(lines[1].ends_with("no address for one"), "{listed}");
        assert!(lines[2].ends_with("no address for two  [2J"), "it does not steer the terminal: {listed}");
    }
    let listed = printed(scene.dead(&["ls", "mail.v1", "--json"]).await);
    assert!(!listed.trim_end().contains(char::is_control), "it does not steer the terminal: {listed}");
    let listed: Value = serde_json::from_str(&listed).expect("JSON");
    assert_eq!((&listed[0]["id"], &listed[0]["kind"]), (&ids[0].as_str().into(), &"oneway".into()));
    assert_eq!(listed[1]["arguments"], serde_json::json!(["two\u{9b}\u{1b}[2J"]));
    let steering = printed(scene.dead(&["show", "mail", &ids[1]]).await);
    assert!(!steering.contains(['\u{1b}', '\u{9b}']), "it does not steer the terminal: {steering}");
    let shown = printed(scene.dead(&["show", "mail", &ids[0]]).await);
    for told in [&ids[0], "mail.v1", "a oneway call", "send", "no address for one", "CBOR", "[\"one\"]"] {
        assert!(shown.contains(told), "no {told} in {shown}");
    }
    let shown: Value =
        serde_json::from_str(&printed(scene.dead(&["show", "mail", &ids[0], "--json"]).await)).expect("JSON");
    assert_eq!(shown["reason"], "no address for one");
    let output = scene.dead(&["ls", "mail", "--limit", "1"]).await;
    assert!(text(&output.stderr).contains("1 of 2"), "{output:?}");
    // The beginning of an id will do where it is that of one alone.
    let same = ids[0].chars().zip(ids[1].chars()).take_while(|(one, other)| one == other).count();
    assert!(printed(scene.dead(&["show", "mail", &ids[0][..=same]]).await).contains(&ids[0]));
    // Services that do not run need it most.
    scene.server.take().expect("it runs").drain().await;
    assert_eq!(printed(scene.dead(&["ls"]).await), "SERVICE  DEAD\nmail.v1  2\n");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a RabbitMQ: HOPLINE_TEST_URL"]
async fn letters_are_replayed_by_id_and_all_together() {
    let mut scene = Scene::new("replay").await;
    let ids = scene.bury(&["one", "two", "three"]).await;
    scene.open.store(true, Ordering::SeqCst);
    assert_eq!(printed(scene.dead(&["replay", "mail", &ids[1]]).await), "replayed 1\n");
    assert_eq!(scene.taken().await, "two");
    let output = scene.dead(&["replay", "mail", "--all", "--yes"]).await;
    assert_eq!(printed(output), "replayed 2\n");
    let mut taken = [scene.taken().await, scene.taken().await];
    taken.sort_unstable();
    assert_eq!(taken, ["one", "three"]);
    scene.until(0).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a RabbitMQ: HOPLINE_TEST_URL"]
async fn dropped_letters_are_gone_and_an_id_that_is_not_there_is_an_error() {
    let scene = Scene::new("drop").await;
    let ids = scene.bury(&["one", "two", "three"]).await;
    let output = scene.dead(&["drop", "mail", &ids[0], "no-such-id", "--yes"]).await;
    assert!(failure(&output, 1).contains("no dead letter of `mail` has the id no-such-id"), "{output:?}");
    assert_eq!(text(&output.stdout), "dropped 1\n", "the other is dropped");
    scene.until(2).await;
    let output = scene.dead(&["drop", "mail", "no-such-id", "--yes", "--json"]).await;
    let told: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!((&told["dropped"], &told["left"][0]["id"]), (&0.into(), &"no-such-id".into()), "{told}");
    let told: Value = serde_json::from_slice(&output.stderr).expect("JSON");
    assert!(told["error"].as_str().is_some_and(|said| said.contains("no-such-id")), "{told}");
    assert_eq!(printed(scene.dead(&["drop", "mail", "--all", "--yes"]).await), "dropped 2\n");
    scene.until(0).await;
    for arguments in [&["show", "mail", &ids[0]][..], &["replay", "mail", &ids[0]]] {
        let output = scene.dead(arguments).await;
        assert!(failure(&output, 1).contains(&ids[0]), "{output:?}");
    }
    let output = scene.dead(&["ls", "nobody"]).await;
    assert!(failure(&output, 1).contains("`nobody.v1` has no dead letters here"), "{output:?}");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a RabbitMQ: HOPLINE_TEST_URL"]
async fn what_cannot_be_counted_is_told_line_by_line_and_the_rest_is_shown() {
    let scene = Scene::new("rest").await;
    let transport = Transport::connect(&scene.url, Role::Operator).await.expect("the broker is there");
    let taken =
        |queue: &str| Declaration::Queue(Queue::new(format!("{}.{queue}", scene.namespace), QueueKind::Exclusive));
    // Nobody else may use them.
    for service in ["post.v1", "post.v2"] {
        transport.declare(&[taken(&format!("{service}.dead"))]).await.expect("it is new");
        let key = format!("{}.services", scene.namespace);
        let (properties, body) = (Properties::default(), service.into());
        let entry = Publication { exchange: String::new(), key, mandatory: true, properties, body };
        assert_eq!(transport.publish(entry).await, Ok(Confirm::Accepted));
    }
    let output = scene.dead(&["ls"]).await;
    let said = failure(&output, 1);
    assert_eq!(text(&output.stdout), "SERVICE  DEAD\nmail.v1  0\npost.v1  ?\npost.v2  ?\n");
    let lines: Vec<_> = said.lines().collect();
    assert_eq!(lines.len(), 2, "{said}");
    for (line, service) in lines.iter().zip(["post.v1", "post.v2"]) {
        assert!(line.starts_with(&format!("hopline: `{service}` cannot be counted: ")), "{said}");
        assert!(line.contains("RESOURCE_LOCKED") && line.contains(&format!("{service}.dead")), "{said}");
    }
    let output = scene.dead(&["ls", "--json"]).await;
    let told: Value = serde_json::from_slice(&output.stderr).expect("JSON, and one value");
    let said = told["error"].as_str().expect("a sentence");
    assert!(said.contains("`post.v1` cannot be counted: ") && said.contains("; `post.v2` cannot"), "{said}");
    let output = scene.dead(&["ls", "post"]).await;
    assert!(failure(&output, 1).contains("RESOURCE_LOCKED"), "{output:?}");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a RabbitMQ: HOPLINE_TEST_URL"]
async fn a_catalogue_that_cannot_be_read_is_no_empty_one() {
    let url = std::env::var("HOPLINE_TEST_URL").expect("HOPLINE_TEST_URL names a RabbitMQ");
    let namespace = format!("cli-dead-{}-catalogue", std::process::id());
    let transport = Transport::connect(&url, Role::Operator).await.expect("the broker is there");
    let taken = Queue::new(format!("{namespace}.services"), QueueKind::Exclusive);
    transport.declare(&[Declaration::Queue(taken)]).await.expect("it is new");
    let mut command = hopline(&["dead", "ls", "--url", &url, "--namespace", &namespace]);
    let output = tokio::task::spawn_blocking(move || command.output().expect("it can be run")).await.expect("no panic");
    let said = failure(&output, 1);
    assert!(said.contains(&format!("{namespace}.services")) && said.contains("hopline dead ls SERVICE"), "{said}");
    assert!(output.stdout.is_empty(), "{output:?}");
}
