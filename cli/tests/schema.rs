//! Schemas as a shell sees them: `hopline schema`, calls by name, and signatures.
//!
//! They need the RabbitMQ that `HOPLINE_TEST_URL` names, and are ignored unless they are asked for.

use std::process::Output;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use hopline::Running;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::process::Command;

mod command;

use command::{PATIENCE, Place, cleaned, hopline, printed, said};

#[derive(Serialize, Deserialize, JsonSchema)]
struct Order {
    lines: Vec<Line>,
}

#[derive(Serialize, Deserialize, JsonSchema)]
struct Line {
    article: String,
    price: u32,
}

#[hopline::service]
trait Shop {
    async fn add(&self, a: i64, b: i64) -> i64;
    async fn total(&self, order: Order, currency: Option<String>) -> Result<String, String>;
    #[rpc(oneway)]
    async fn note(&self, line: String);
    async fn opaque(&self, bytes: serde_bytes::ByteBuf) -> usize;
}

/// Counts the calls that come.
struct Counting(Arc<AtomicUsize>);

impl Shop for Counting {
    async fn add(&self, a: i64, b: i64) -> i64 {
        self.0.fetch_add(1, Ordering::SeqCst);
        a + b
    }

    async fn total(&self, order: Order, currency: Option<String>) -> Result<String, String> {
        self.0.fetch_add(1, Ordering::SeqCst);
        let sum: u32 = order.lines.iter().map(|line| line.price).sum();
        currency.map(|currency| format!("{sum} {currency}")).ok_or_else(|| "no currency".to_owned())
    }

    async fn note(&self, _: String) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }

    async fn opaque(&self, bytes: serde_bytes::ByteBuf) -> usize {
        self.0.fetch_add(1, Ordering::SeqCst);
        bytes.len()
    }
}

/// A place with the service.
struct Scene {
    place: Place,
    came: Arc<AtomicUsize>,
    server: Running,
}

impl Scene {
    async fn new(name: &str) -> Self {
        let (place, came) = (Place::new(name), Arc::default());
        let server = place.server().await.serve(ShopServer::new(Counting(Arc::clone(&came))));
        Self { place, came, server: server.start().await.expect("it can be served") }
    }

    async fn run(&self, arguments: &[&str]) -> Output {
        let mut command = Command::from(cleaned());
        command.args(arguments).args(["--url", &self.place.url, "--namespace", &self.place.namespace]);
        let output = tokio::time::timeout(PATIENCE, command.kill_on_drop(true).output()).await;
        output.expect("it ends within a minute").expect("it can be run")
    }
}

/// What is said of wrong usage.
#[track_caller]
fn misused(output: &Output) -> String {
    assert_eq!((output.status.code(), &output.stdout[..]), (Some(2), &b""[..]), "{output:?}");
    said(output)
}

#[test]
fn arguments_that_do_not_go_together_are_refused_before_connecting() {
    for (arguments, told) in [
        (&["a=1", "[2]"][..], "give all arguments as one JSON array, such as '[2, 3]', or each as NAME=VALUE"),
        (&["a=1", "a=2"], "a is given twice"),
    ] {
        let arguments = [&["call", "shop.add", "--url", "amqp://127.0.0.1:1"], arguments].concat();
        assert_eq!(misused(&hopline(&arguments).output().expect("it can be run")), told);
    }
    for command in ["schema", "generate"] {
        let help = printed(hopline(&[command, "--help"]).output().expect("it can be run"));
        assert!(help.contains(&format!("  hopline {command}")), "{help}");
    }
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: HOPLINE_TEST_URL"]
async fn arguments_are_given_by_name() {
    let scene = Scene::new("by-name").await;
    for arguments in [&["b=3", "a=2"][..], &["[2, 3]"], &[r#"{"b": 3, "a": 2}"#], &["a=2", "b=3", "--codec", "cbor"]] {
        assert_eq!(printed(scene.run(&[&["call", "shop.add"], arguments].concat()).await), "5");
    }
    let order = r#"order={"lines": [{"article": "tea", "price": 5}]}"#;
    // A number where a string is wanted is a string.
    assert_eq!(printed(scene.run(&["call", "shop.total", order, "currency=978"]).await), r#""5 978""#);
    let own = scene.run(&["call", "shop.total", order]).await;
    assert_eq!(
        (own.status.code(), said(&own)),
        (Some(1), r#"the service returned its own error: "no currency""#.to_owned())
    );
    let oneway = scene.run(&["call", "shop.note", "line=true", "--oneway"]).await;
    assert_eq!((oneway.status.code(), &oneway.stdout[..]), (Some(0), &b""[..]), "{oneway:?}");
    let all = printed(scene.run(&["call", "shop.add", "a=2", "b=3", "--all"]).await);
    assert!(all.contains(r#""result":5"#), "{all}");
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: HOPLINE_TEST_URL"]
async fn what_does_not_fit_is_wrong_usage_and_not_sent() {
    let scene = Scene::new("misfit").await;
    let line = r#"{"article": "tea", "price": 5}"#;
    let order = format!(r#"order={{"lines": [{line}, {line}, {{"article": "tea", "price": "5"}}]}}"#);
    for (arguments, told) in [
        (&["shop.add", "a=2", "b=x"][..], r#"b must be an integer, and it is "x""#),
        (&["shop.add", r#"[2, "x"]"#], r#"b must be an integer, and it is "x""#),
        (&["shop.add", "a=2"], "b is missing: write `add(a: integer, b: integer) -> integer`"),
        (&["shop.add", "[2, 3, 4]"], "`add(a: integer, b: integer) -> integer` takes 2 arguments, got 3"),
        (&["shop.add", "a=2", "b=3", "c=4"], "`add(a: integer, b: integer) -> integer` has no parameter `c`"),
        (&["shop.total", &order], r#"order.lines[2].price must be an integer, and it is "5""#),
        (&["shop.note", "[3]", "--oneway"], "line must be a string, and it is 3"),
        (
            &["shop.opaque", "bytes=[1]"],
            "`shop.v1` tells no schema of `opaque`: give its arguments as an array, such as [2, 3]",
        ),
    ] {
        assert_eq!(misused(&scene.run(&[&["call"], arguments].concat()).await), told);
    }
    let unchecked = scene.run(&["call", "shop.add", r#"[2, "x"]"#, "--no-check"]).await;
    assert_eq!(unchecked.status.code(), Some(64 + 3), "the service refuses it: {unchecked:?}");
    assert_eq!(printed(scene.run(&["call", "shop.opaque", "[[1, 2]]"]).await), "2");
    scene.server.drain().await;
    assert_eq!(scene.came.load(Ordering::SeqCst), 1, "only the last of them has come");
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: HOPLINE_TEST_URL"]
async fn a_service_shows_its_schema_and_its_signatures_and_code_is_generated_from_it() {
    let scene = Scene::new("schema").await;
    let shown = printed(scene.run(&["schema", "shop"]).await);
    let schema: Value = serde_json::from_str(&shown).expect("it prints JSON");
    assert_eq!((&schema["type"], &schema["service"]), (&json!("hopline.v1.schema"), &json!("shop.v1")));
    assert_eq!(schema["methods"][0]["parameters"][1]["name"], "b");
    assert!(shown.starts_with("{\n  \"type\": \"hopline.v1.schema\",\n"), "{shown}");
    let line = printed(scene.run(&["schema", "shop", "--json"]).await);
    assert_eq!(serde_json::from_str::<Value>(&line).expect("JSON"), schema);
    let info = printed(scene.run(&["info", "shop"]).await);
    for line in [
        "add(a: integer, b: integer) -> integer",
        "note(line: string)  [oneway]",
        "opaque(bytes: serde_bytes::ByteBuf) -> usize",
    ] {
        assert!(info.lines().any(|shown| shown == line), "no `{line}` in {info}");
    }
    let code = printed(scene.run(&["generate", "rust", "shop"]).await);
    assert!(code.contains("    async fn add(&self, a: i64, b: i64) -> i64;\n"), "{code}");
    let absent = scene.run(&["schema", "absent"]).await;
    assert_eq!(absent.status.code(), Some(1));
    assert!(said(&absent).starts_with("nobody serves `absent.v1`"), "{absent:?}");
}
