//! `hopline ls`, `info`, `stats`, `ping`, `watch` and `drain` as a shell sees them, and calls along a route.
//!
//! They need the RabbitMQ that `HOPLINE_TEST_URL` names, and are ignored unless they are asked for.

use std::process::Output;

use hopline::Running;
use serde_json::{Value, json};
use tokio::process::Command;

mod command;
#[path = "../../examples/demo/mod.rs"]
#[allow(dead_code, reason = "the tests call a few of its methods")]
mod demo;

use command::{Going, PATIENCE, Place, cleaned, hopline, is_refused, printed, said};
use demo::{DemoServer, Service};

impl Place {
    /// Starts an instance of the service of the examples, with the attribute `zone`.
    async fn serve(&self, zone: &str) -> Running {
        let server = self.server().await.attribute("zone", zone).serve(DemoServer::new(Service));
        server.start().await.expect("it can be served")
    }

    /// The command with these arguments, where the service is.
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::from(cleaned());
        command.args(arguments).args(["--url", &self.url, "--namespace", &self.namespace]).kill_on_drop(true);
        command
    }

    async fn run(&self, arguments: &[&str]) -> Output {
        let output = tokio::time::timeout(PATIENCE, self.command(arguments).output()).await;
        output.expect("it ends within a minute").expect("it can be run")
    }

    async fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&printed(self.run(arguments).await)).expect("it prints JSON")
    }
}

/// The cells of the line that begins with `first`.
fn cells<'a>(table: &'a str, first: &str) -> Vec<&'a str> {
    let cells = |line: &'a str| line.split_whitespace().collect::<Vec<_>>();
    let line = table.lines().map(cells).find(|cells| cells.first() == Some(&first));
    line.unwrap_or_else(|| panic!("no line of {first} in {table}"))
}

#[test]
fn each_command_has_a_help_with_an_example_and_says_what_to_write() {
    for command in ["ls", "info", "stats", "ping", "drain"] {
        let output = hopline(&[command, "--help"]).output().expect("it can be run");
        let help = printed(output);
        assert!(help.contains(&format!("  hopline {command}")) && help.contains("Example"), "{help}");
    }
    for (arguments, told) in [
        (&["info"][..], "<SERVICE>"),
        (&["stats", "a b"], "the service `a b` has a ' ' in it"),
        (&["ping", "demo", "--wait", "5"], "write a whole number above 0 and a unit"),
        (&["ping", "demo", "--count", "0"], "0 is not in 1.."),
    ] {
        is_refused(arguments, told);
    }
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: HOPLINE_TEST_URL"]
async fn the_services_are_listed_with_what_they_have_done() {
    let scene = Place::new("ls");
    let nothing = scene.run(&["ls", "--json"]).await;
    assert_eq!((nothing.status.code(), &nothing.stdout[..]), (Some(0), &b"[]\n"[..]));
    assert_eq!(said(&nothing), format!("no instance replies in the namespace `{}`", scene.namespace));
    let _servers = [scene.serve("eu1").await, scene.serve("us1").await];
    let client = scene.client().await;
    for _ in 0..3 {
        let five: i64 = client.call("demo", "add", (2, 3)).await.expect("it answers");
        assert_eq!(five, 5);
    }
    client.call::<i64>("demo", "div", (2, 0)).await.expect_err("nobody divides by zero");
    let table = printed(scene.run(&["ls", "--timeout", "3s"]).await);
    let cells = cells(&table, "demo.v1");
    assert_eq!(cells[1..7], ["2", "0", "0", "0", "4", "1"], "{table}");
    let listed = scene.json(&["ls", "--json", "--timeout", "3s"]).await;
    assert_eq!(
        (&listed[0]["service"], &listed[0]["instances"], &listed[0]["finished"]),
        (&json!("demo.v1"), &json!(2), &json!(4))
    );
    assert_eq!(
        (&listed[0]["waiting"], &listed[0]["dead"], &listed[0]["readers"]),
        (&json!(0), &json!(0), &json!(2)),
        "{listed}"
    );
    assert!(listed[0]["p99_us"].is_u64() && listed[0]["calls_per_s"].is_f64(), "{listed}");
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: HOPLINE_TEST_URL"]
async fn a_service_shows_its_instances_and_methods() {
    let scene = Place::new("info");
    let server = scene.serve("eu1").await;
    let shown = printed(scene.run(&["info", "demo"]).await);
    let instance = cells(&shown, server.instance());
    assert_eq!(instance[2..], [&std::process::id().to_string(), instance[3], env!("CARGO_PKG_VERSION"), "zone=eu1"]);
    for method in [
        "add(a: integer, b: integer) -> integer",
        "note(line: string)  [oneway dedup=600s]",
        "exp(base: i64, exp: u32) -> ExpReply  [idempotent]",
    ] {
        assert!(shown.lines().any(|line| line == method), "no `{method}` in {shown}");
    }
    let told = printed(scene.run(&["info", "demo", "--json"]).await);
    assert!(told.starts_with(r#"[{"type":"hopline.v1.info","service":"demo.v1","#), "{told}");
    let told: Value = serde_json::from_str(&told).expect("it prints JSON");
    assert_eq!((&told[0]["type"], &told[0]["attributes"]["zone"]), (&json!("hopline.v1.info"), &json!("eu1")));
    let absent = scene.run(&["info", "absent"]).await;
    assert_eq!(absent.status.code(), Some(1));
    assert!(said(&absent).starts_with("no instance of `absent` replies"), "{absent:?}");
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: HOPLINE_TEST_URL"]
async fn a_service_shows_what_its_methods_have_counted() {
    let scene = Place::new("stats");
    let server = scene.serve("eu1").await;
    let client = scene.client().await;
    for _ in 0..2 {
        client.call::<i64>("demo", "add", (2, 3)).await.expect("it answers");
    }
    client.call::<()>("demo", "panic", [(); 0]).await.expect_err("it panics");
    let shown = printed(scene.run(&["stats", "demo"]).await);
    assert_eq!(cells(&shown, "add")[1..4], ["0", "2", "0"], "{shown}");
    assert_eq!(cells(&shown, "panic")[2..5], ["1", "0", "1"], "{shown}");
    assert_eq!(cells(&shown, server.instance())[1..3], ["0", "3"], "{shown}");
    let fault = shown.split_once("LAST FAULTS\n").expect("there is one").1;
    assert!(fault.starts_with("panic: ") && fault.contains(" ago, INTERNAL: "), "{shown}");
    let told = scene.json(&["stats", "demo", "--json"]).await;
    assert_eq!((&told[0]["type"], &told[0]["finished"]), (&json!("hopline.v1.stats"), &json!(3)));
    let absent = scene.run(&["stats", "absent"]).await;
    assert_eq!(absent.status.code(), Some(1));
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: HOPLINE_TEST_URL"]
async fn a_ping_tells_by_its_exit_status_whether_anybody_is_there_and_can_wait_for_it() {
    let scene = Place::new("ping");
    let absent = scene.run(&["ping", "demo"]).await;
    assert_eq!(absent.status.code(), Some(1));
    assert!(said(&absent).starts_with("no instance of `demo` replies"), "{absent:?}");
    let waiting = tokio::spawn(scene.command(&["ping", "demo", "--wait", "60s", "--json"]).output());
    let server = scene.serve("eu1").await;
    let waited = tokio::time::timeout(PATIENCE, waiting).await.expect("it ends").expect("no panic").expect("it runs");
    let pongs: Value = serde_json::from_str(&printed(waited)).expect("it prints JSON");
    assert_eq!(pongs[0]["instance"], server.instance());
    assert!(pongs[0]["round_trip_us"].is_u64(), "{pongs}");
    let twice = printed(scene.run(&["ping", "demo", "--count", "2"]).await);
    let first: Vec<_> = twice.lines().filter_map(|line| line.split_whitespace().next()).collect();
    assert_eq!(first, [server.instance(); 2]);
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: HOPLINE_TEST_URL"]
async fn an_instance_is_drained_if_its_server_allows_it() {
    let scene = Place::new("drain");
    let absent = scene.run(&["drain", "absent"]).await;
    assert_eq!(absent.status.code(), Some(1));
    assert!(said(&absent).starts_with("no instance `absent` replies in the namespace"), "{absent:?}");
    let server = scene.serve("eu1").await;
    let refused = scene.run(&["drain", server.instance()]).await;
    assert_eq!(refused.status.code(), Some(64 + 7));
    assert!(said(&refused).contains("`Server::allow_drain`"), "{refused:?}");
    let allowing = scene.server().await.serve(DemoServer::new(Service)).allow_drain(|caller| caller.user.is_some());
    let allowing = allowing.start().await.expect("it can be served");
    let told = scene.json(&["drain", allowing.instance(), "--json"]).await;
    assert_eq!(told, json!({ "instance": allowing.instance(), "service": "demo.v1", "draining": true }));
    let mut state = allowing.state();
    let ended = state.wait_for(|state| *state == hopline::State::Closed);
    tokio::time::timeout(PATIENCE, ended).await.expect("it ends within a minute").expect("it is told");
    assert!(server.health().now().is_ready());
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: HOPLINE_TEST_URL"]
async fn instances_are_shown_as_they_come_and_go() {
    let scene = Place::new("watch");
    let first = scene.serve("eu1").await;
    let mut shown = Going::start(scene.here(&["watch"]));
    let is = |line: Option<String>, what: &str, instance: &str| {
        let line = line.expect("it goes on");
        assert_eq!(line.split_whitespace().take(3).collect::<Vec<_>>(), [what, "demo.v1", instance], "{line}");
    };
    is(shown.line().await, "up", first.instance());
    let second = scene.serve("us1").await;
    let leaving = second.instance().to_owned();
    is(shown.line().await, "up", &leaving);
    second.drain().await;
    let line = shown.line().await;
    // It may have ended before it was asked.
    match line.as_deref().is_some_and(|line| line.starts_with("draining")) {
        true => is(shown.line().await, "down", &leaving),
        false => is(line, "down", &leaving),
    }
    shown.signal("INT").await;
    assert_eq!((shown.line().await, shown.code().await), (None, Some(0)));
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: HOPLINE_TEST_URL"]
async fn a_call_goes_along_a_route() {
    let scene = Place::new("route");
    let [east, _west] = [scene.serve("eu1").await, scene.serve("us1").await];
    for route in ["zone=zone=eu1", "any", "round-robin", "least-in-flight", "key=c-17", "weight=zone"] {
        let who = scene.json(&["call", "demo.whoami", "--route", route]).await;
        assert!(who.is_string() && (!route.starts_with("zone") || who == east.instance()), "{route}: {who}");
    }
    let places = [
        scene.json(&["call", "demo.whoami", "--route", "key=c-17"]).await,
        scene.json(&["call", "demo.whoami", "--route", "key=c-17"]).await,
    ];
    assert_eq!(places[0], places[1]);
    let wrong = scene.run(&["call", "demo.whoami", "--route", "fast"]).await;
    assert_eq!(wrong.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&wrong.stderr).contains("least-in-flight"), "{wrong:?}");
}

/// `hopline serve` of this service, suspended: it reads its calls and answers nothing.
async fn suspended(scene: &Place, service: &str) -> Going {
    let mut going = Going::start(scene.here(&["serve", service, "--echo"]));
    assert!(going.note().await.starts_with("hopline: serving "), "it serves");
    going.signal("STOP").await;
    going
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: HOPLINE_TEST_URL"]
async fn a_service_whose_instances_all_hang_is_listed_if_it_is_named() {
    let scene = Place::new("hang");
    let _server = scene.serve("eu1").await;
    let _hangs = suspended(&scene, "stuck").await;
    let listed = scene.json(&["ls", "--json"]).await;
    assert_eq!(listed.as_array().map(Vec::len), Some(1), "nobody tells its name: {listed}");
    let listed = scene.json(&["ls", "stuck", "absent", "--json"]).await;
    let shown = |at: usize| (&listed[at]["service"], &listed[at]["instances"], &listed[at]["readers"]);
    assert_eq!(listed.as_array().map(Vec::len), Some(2), "only these: {listed}");
    assert_eq!(shown(0), (&json!("absent.v1"), &json!(0), &json!(null)));
    assert_eq!(shown(1), (&json!("stuck.v1"), &json!(0), &json!(1)));
    let table = printed(scene.run(&["ls", "stuck"]).await);
    assert_eq!(cells(&table, "stuck.v1")[1..4], ["0", "of", "1"], "{table}");
}
