//! `hopline call` as a shell sees it: what it prints, where, and what it exits with.
//!
//! The service is that of the examples. It runs in this process and the command in another, so the tests of a call that
//! is answered need the RabbitMQ that `HOPLINE_TEST_URL` names, and are ignored unless they are asked for.

use std::process::Output;

use assert_cmd::Command;
use hopline::{Context, Fault, Running};
use tokio::net::TcpSocket;

mod command;
#[path = "../../examples/demo/mod.rs"]
#[allow(dead_code, reason = "the command calls it, not a client of its own")]
mod demo;
#[path = "../../tests/proxy/mod.rs"]
mod proxy;

use command::{Place, hopline, printed, said};
use demo::{DemoServer, Service};
use proxy::Proxy;

fn run(arguments: &[&str]) -> Output {
    hopline(arguments).output().expect("it can be run")
}

/// The one line on stderr that a failed call ends with.
fn failure(output: Output) -> String {
    fault(output, 1)
}

/// The same of a call that ends with this exit code.
fn fault(output: Output, code: i32) -> String {
    assert_eq!(output.status.code(), Some(code), "{output:?}");
    only_line(output)
}

fn only_line(output: Output) -> String {
    assert!(output.stdout.is_empty(), "{output:?}");
    said(&output)
}

/// An address that nobody listens at, and nobody can as long as the socket is there.
fn nowhere() -> (TcpSocket, String) {
    let taken = TcpSocket::new_v4().expect("there is room for one");
    taken.bind(([127, 0, 0, 1], 0).into()).expect("there is a free port");
    let address = taken.local_addr().expect("it is bound").to_string();
    (taken, address)
}

/// The RabbitMQ under test.
fn rabbit() -> String {
    std::env::var("HOPLINE_TEST_URL").expect("HOPLINE_TEST_URL names a RabbitMQ")
}

/// The service of the examples, in a place of its own.
struct Scene {
    place: Place,
    server: Running,
}

impl Scene {
    async fn new(name: &str) -> Self {
        let place = Place::new(name);
        let server = place.server().await.serve(DemoServer::new(Service)).start().await.expect("it can be served");
        Self { place, server }
    }

    /// Runs `hopline call` with these arguments where the service is.
    async fn call(&self, arguments: &[&str]) -> Output {
        let mut command = hopline(&["call", "--url", &self.place.url, "--namespace", &self.place.namespace]);
        command.args(arguments);
        ended(command).await
    }
}

/// Runs the command on another thread: the service that it calls runs on this one.
async fn ended(mut command: Command) -> Output {
    tokio::task::spawn_blocking(move || command.output().expect("it can be run")).await.expect("no panic")
}

#[test]
fn with_json_the_log_is_json_as_well() {
    let mut command = hopline(&["call", "demo.add", "[2, 3]", "--url", "memory://", "--json", "--timeout", "1s"]);
    let output = command.env("RUST_LOG", "hopline=debug").output().expect("it can be run");
    let stderr = String::from_utf8(output.stderr).expect("it is text");
    let object = |line| serde_json::from_str::<serde_json::Value>(line).expect(line);
    let lines: Vec<_> = stderr.lines().map(object).collect();
    let [log @ .., error] = &lines[..] else { panic!("nothing is said") };
    assert!(error["error"].is_string() && !log.is_empty(), "{stderr}");
    assert!(log.iter().all(|line| line["level"].is_string() && line["message"].is_string()), "{stderr}");
}

#[test]
fn the_version_and_the_help_are_printed() {
    assert_eq!(printed(run(&["--version"])), concat!("hopline ", env!("CARGO_PKG_VERSION")));
    assert!(printed(run(&["--help"])).contains("\n  call "));
    let help = printed(run(&["call", "--help"]));
    let options = [
        "--url",
        "HOPLINE_URL",
        "--ca",
        "--cert",
        "--key",
        "--name",
        "--timeout",
        "HOPLINE_TIMEOUT",
        "--connect-timeout",
        "--namespace",
        "HOPLINE_NAMESPACE",
        "--metadata",
        "--to",
    ];
    for told in ["<TARGET>", "[ARGUMENTS]"].iter().chain(&options) {
        assert!(help.contains(told), "no {told} in {help}");
    }
    let secret = hopline(&["call", "--help"]).env("HOPLINE_URL", "amqp://me:s3cret@host").output();
    assert!(!printed(secret.expect("it can be run")).contains("s3cret"));
}

#[test]
fn bad_usage_exits_with_2_and_says_what_to_write() {
    let cases: &[(&[&str], &str)] = &[
        (&[], "Usage: hopline"),
        (&["call"], "<TARGET>"),
        (&["shout", "demo.add"], "unrecognized subcommand 'shout'"),
        (&["call", "demo.add", "[2, 3"], "not JSON: EOF while parsing a list"),
        (&["call", "demo.add", "2"], "write a JSON array with one element for each argument"),
        (&["call", "demo.add", "2", "3"], "write a JSON array with one element for each argument"),
        (&["call", "demo.add", "[2]", "[3]"], "give all arguments as one JSON array, such as '[2, 3]'"),
        (&["call", "demo", "[]"], "write SERVICE.METHOD, such as demo.add"),
        (&["call", "demo.add", "--metadata", "alice"], "write NAME=VALUE, such as user=alice"),
        (&["call", "demo.add", "--metadata", "=alice"], "write NAME=VALUE, such as user=alice"),
        (&["call", "demo.add", "[]", "--timeout", "5"], "write a whole number above 0 and a unit: 500ms, 5s or 2m"),
        (&["call", "demo.add", "[]", "--timeout", "0s"], "write a whole number above 0 and a unit"),
        (&["call", "demo.add", "[]", "--timeout=-1s"], "write a whole number above 0 and a unit"),
        (&["call", "demo.add", "[]", "--timeout", "99999999999999999999m"], "write a whole number above 0 and a unit"),
    ];
    for (arguments, said) in cases {
        let output = run(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {output:?}");
        assert!(output.stdout.is_empty(), "{arguments:?}: {output:?}");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(stderr.contains(said), "{arguments:?}: no `{said}` in {stderr}");
    }
}

#[test]
fn with_json_an_error_is_an_object_too() {
    for (arguments, code, error) in [
        (&["call", "demo.add", "--url", "memory://"][..], 1, "nobody serves `demo.v1`"),
        (&["call"], 2, "the following required arguments were not provided: <TARGET>"),
        (&["call", "demo.add", "2"], 2, "invalid value '2' for '[ARGUMENTS]...': write a JSON array"),
        (&["dead", "ls", "amqp://me:s3cret@host"], 2, "an address stands where none is expected"),
        (&["dead", "ls", "mail", "--url", "s3cret"], 2, "the broker's address does not begin with a scheme"),
        (&["bench", "call", "--url", "s3cret"], 2, "the broker's address does not begin with a scheme"),
        (&["dead", "drop", "mail", "--all"], 2, "there is no terminal to ask whether to drop them"),
    ] {
        let output = run(&[arguments, &["--json"]].concat());
        assert_eq!((output.status.code(), output.stdout.is_empty()), (Some(code), true), "{arguments:?}: {output:?}");
        let told: serde_json::Value = serde_json::from_slice(&output.stderr).expect("it is JSON, and one value");
        let said = told["error"].as_str().expect("it is a sentence");
        assert!(said.starts_with(error) && !said.contains("s3cret"), "{arguments:?}: {told}");
    }
}

#[test]
fn a_name_or_an_address_that_cannot_be_used_is_bad_usage() {
    let cases: &[(&[&str], &str)] = &[
        (
            &["demo.add", "--url", "http://me:s3cret@host"],
            "the broker's address has an unknown scheme: use memory://, amqp://",
        ),
        (&["demo.add", "--url", "s3cret"], "the broker's address does not begin with a scheme and `://`: "),
        (
            &["demo.add", "--url", "amqp:me:s3cret@host"],
            "the broker's address does not begin with a scheme and `://`: ",
        ),
        (&["demo.add", "--url", "amqp://me:s3cret@a b"], "the broker's address `amqp://...` has a space "),
        (&["demo.add", "--url", "amqp://me:12#s3cret@a"], "the broker's address `amqp://...` has a `#` in it: "),
        (
            &["demo.add", "--url", "amqp://me:s3cret/a"],
            "the broker's address `amqp://...` has no number from 1 to 65535 ",
        ),
        (
            &["demo.add", "--url", "amqp://a?heartbeat=s3cret"],
            "the broker's address `amqp://...` has a `heartbeat` that ",
        ),
        (&["demo.add", "--namespace", "a.b", "--url", "memory://"], "the namespace `a.b` has a '.' in it"),
    ];
    for (arguments, said) in cases {
        let output = run(&[&["call"], *arguments].concat());
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {output:?}");
        let line = only_line(output);
        assert!(line.starts_with(said) && !line.contains("s3cret"), "{arguments:?}: {line}");
    }
}

#[test]
fn an_address_in_the_wrong_place_is_not_repeated() {
    let (address, no_address) = ("amqp://me:s3cret@host", "me:s3cret@host");
    let json = "--json=amqp://me:s3cret@host";
    let cases: &[&[&str]] = &[
        &["call", address, "demo.add"],
        &["call", no_address],
        &["call", "demo.add", "[2, 3]", address],
        &["call", "demo.add", "[2, 3]", "--timeout", address],
        &["call", "demo.add", address],
        &["dead", "ls", address],
        &["dead", "ls", json],
        &["bench", "call", "--seconds", address],
        &[address],
    ];
    for arguments in cases {
        let output = run(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {output:?}");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains("it is given by `--url` or HOPLINE_URL") && !said.contains("s3cret"), "{said}");
    }
}

#[test]
fn a_target_that_cannot_be_is_bad_usage_with_or_without_a_broker() {
    for (target, said) in [
        ("de mo.add", "the service `de mo` has a ' ' in it: use letters, digits"),
        ("demo.a/d", "the method `a/d` has a '/' in it: use letters, digits"),
        ("demo.", "the method has no name"),
        (".add", "the service has no name"),
        ("demo.2.add", "`demo.2` is not a service: write `name` or `name.v2`"),
    ] {
        let output = run(&["call", target, "--url", "amqp://127.0.0.1:1"]);
        assert_eq!(output.status.code(), Some(2), "{target}: {output:?}");
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(told.contains(said), "{target}: {told}");
    }
}

#[test]
fn without_a_broker_the_address_is_told_and_the_password_is_not() {
    let (_taken, nowhere) = nowhere();
    let url = format!("amqp://me:s3cret@{nowhere}");
    let by_option = run(&["call", "demo.add", "[2, 3]", "--url", &url]);
    let by_environment = hopline(&["call", "demo.add", "[2, 3]"]).env("HOPLINE_URL", &url).output();
    for output in [by_option, by_environment.expect("it can be run")] {
        let line = failure(output);
        assert!(line.starts_with(&format!("cannot connect to amqp://{nowhere}: nobody listens there")), "{line}");
        assert!(!line.contains("s3cret") && !line.contains("me:"), "{line}");
    }
}

#[test]
#[ignore = "needs a RabbitMQ: HOPLINE_TEST_URL"]
fn a_wrong_password_is_told_in_a_line_without_it() {
    let url = rabbit();
    let (_, host) = url.rsplit_once('@').expect("it has a user");
    let line = failure(run(&["call", "demo.add", "--url", &format!("amqp://guest:s3cret@{host}")]));
    assert!(line.starts_with(&format!("cannot connect to amqp://{host}: ")), "{line}");
    assert!(line.contains("check user and password") && !line.contains("s3cret"), "{line}");
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: HOPLINE_TEST_URL"]
async fn a_reply_is_printed_as_json() {
    let scene = Scene::new("replies").await;
    assert_eq!(printed(scene.call(&["demo.fib", "[10]"]).await), "89");
    assert_eq!(printed(scene.call(&["demo.add", "[2, 3]"]).await), "5");
    assert_eq!(printed(scene.call(&["demo.v1.add", "[-2, -3]"]).await), "-5");
    assert_eq!(printed(scene.call(&["demo.div", "[7, 2]"]).await), "3");
    assert_eq!(printed(scene.call(&["demo.echo", "[[1, 2, 255]]"]).await), "[1,2,255]");
    assert_eq!(printed(scene.call(&["demo.sleep", "[0]"]).await), "null");
    // Without arguments there are none.
    assert_eq!(printed(scene.call(&["demo.whoami"]).await), format!("{:?}", scene.server.instance()));
    let exp = printed(scene.call(&["demo.exp", "[2, 10]"]).await);
    let exp: serde_json::Value = serde_json::from_str(&exp).expect("a reply is JSON");
    assert_eq!(exp["value"], 1024);
    assert!(exp["cost_nanos"].is_u64());
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: HOPLINE_TEST_URL"]
async fn the_broker_is_named_by_an_option_or_else_by_the_environment() {
    let scene = Scene::new("url").await;
    let arguments = ["call", "demo.add", "[2, 3]", "--namespace", &scene.place.namespace];
    let mut by_environment = hopline(&arguments);
    by_environment.env("HOPLINE_URL", &scene.place.url);
    assert_eq!(printed(ended(by_environment).await), "5");
    let mut by_both = hopline(&arguments);
    let (_taken, nowhere) = nowhere();
    by_both.args(["--url", &scene.place.url]).env("HOPLINE_URL", format!("amqp://{nowhere}"));
    assert_eq!(printed(ended(by_both).await), "5");
}

#[test]
fn the_environment_says_what_no_option_says() {
    let call = |variables: &[(&str, &str)]| {
        let mut command = hopline(&["call", "demo.add"]);
        command.env("HOPLINE_URL", "memory://").envs(variables.iter().copied()).output().expect("it can be run")
    };
    assert!(failure(call(&[("HOPLINE_NAMESPACE", "shop")])).starts_with("nobody serves `demo.v1`"));
    let empty = ["HOPLINE_NAMESPACE", "HOPLINE_NAME", "HOPLINE_TIMEOUT", "HOPLINE_CONNECT_TIMEOUT", "HOPLINE_CA"];
    assert!(failure(call(&empty.map(|name| (name, "")))).starts_with("nobody serves `demo.v1`"));
    for (name, value, said) in [
        ("HOPLINE_NAMESPACE", "a b", "the namespace `a b` has a ' ' in it"),
        ("HOPLINE_TIMEOUT", "2", "write a whole number above 0 and a unit"),
        ("HOPLINE_CONNECT_TIMEOUT", "soon", "write a whole number above 0 and a unit"),
        ("HOPLINE_NAME", "a\tb", "write 1 to 64 bytes without control characters"),
    ] {
        let output = call(&[(name, value)]);
        assert_eq!(output.status.code(), Some(2), "{name}: {output:?}");
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(told.contains(said), "{name}: {told}");
    }
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: HOPLINE_TEST_URL"]
async fn the_handler_reads_the_metadata_and_the_name_of_the_caller() {
    let scene = Scene::new("metadata").await;
    let told = |context: Context, (name,): (String,)| async move {
        Ok::<_, Fault>((context.metadata(&name).map(str::to_owned), context.caller().map(str::to_owned)))
    };
    let server = scene.place.server().await.serve(hopline::Service::new("told", 1).method("told", told)).start().await;
    let _server = server.expect("it can be served");
    let arguments = ["told.told", r#"["user"]"#, "--metadata", "user=alice=b", "--metadata", "a=", "--name", "nightly"];
    let printed = printed(scene.call(&arguments).await);
    assert!(printed.starts_with(r#"["alice=b","nightly "#), "{printed}");
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: HOPLINE_TEST_URL"]
async fn one_instance_can_be_called() {
    let scene = Scene::new("to").await;
    let other = scene.place.server().await.serve(DemoServer::new(Service)).start().await.expect("it can be served");
    for instance in [scene.server.instance(), other.instance()] {
        for _ in 0..3 {
            let answered = printed(scene.call(&["demo.whoami", "--to", instance]).await);
            assert_eq!(answered, format!("{instance:?}"));
        }
    }
    let line = failure(scene.call(&["demo.whoami", "--to", "somebody"]).await);
    assert!(line.starts_with("there is no instance `somebody` of `demo.v1`"), "{line}");
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: HOPLINE_TEST_URL"]
async fn all_instances_can_be_called() {
    let scene = Scene::new("all").await;
    let other = scene.place.server().await.serve(DemoServer::new(Service)).start().await.expect("it can be served");
    // It does not wait for the time-out: so many instances are there.
    let all = printed(scene.call(&["demo.whoami", "--all", "--timeout", "60m"]).await);
    let all: serde_json::Value = serde_json::from_str(&all).expect("it prints JSON");
    let mut told: Vec<_> = all.as_array().expect("an array").iter().map(|one| one["result"].as_str()).collect();
    let mut expected = [scene.server.instance(), other.instance()].map(Some);
    told.sort_unstable();
    expected.sort_unstable();
    assert_eq!(told, expected);
    let failed = scene.call(&["demo.div", "[1, 0]", "--all"]).await;
    assert_eq!(failed.status.code(), Some(1));
    assert_eq!(said(&failed), "2 of 2 instances have not replied with a result");
    assert!(String::from_utf8_lossy(&failed.stdout).contains(r#""service_error":"DivisionByZero""#), "{failed:?}");
    assert!(failure(scene.call(&["nobody.x", "--all"]).await).starts_with("nobody serves `nobody.v1`"));
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: HOPLINE_TEST_URL"]
async fn a_oneway_call_ends_when_the_broker_has_it() {
    let scene = Scene::new("oneway").await;
    let (heard, mut hear) = tokio::sync::mpsc::unbounded_channel();
    let note = move |_: Context, (line,): (String,)| {
        heard.send(line).expect("the test listens");
        async { Ok::<_, Fault>(()) }
    };
    let service = hopline::Service::new("notes", 1).method(hopline::Method::new("note").oneway(), note);
    let server = scene.place.server().await.serve(service).start().await.expect("it can be served");
    for options in [&[][..], &["--all"], &["--to", server.instance()], &["--codec", "cbor"]] {
        let output = scene.call(&[&["notes.note", r#"["hello"]"#, "--oneway"], options].concat()).await;
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        assert!(output.stdout.is_empty() && output.stderr.is_empty(), "{output:?}");
        assert_eq!(hear.recv().await.as_deref(), Some("hello"), "{options:?}");
    }
    let line = failure(scene.call(&["demo.add", "[2, 3]", "--oneway"]).await);
    assert!(line.starts_with("`demo.v1` takes no oneway calls of `add`"), "{line}");
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: HOPLINE_TEST_URL"]
async fn arguments_come_from_a_file_or_from_stdin_and_travel_in_any_codec() {
    let scene = Scene::new("arguments").await;
    let file = std::env::temp_dir().join(format!("{}.json", scene.place.namespace));
    std::fs::write(&file, "[2,\n 3]\n").expect("it can be written");
    let at_file = format!("@{}", file.display());
    for codec in ["json", "cbor", "msgpack"] {
        assert_eq!(printed(scene.call(&["demo.add", &at_file, "--codec", codec]).await), "5");
    }
    std::fs::remove_file(&file).expect("it is there");
    let mut command =
        hopline(&["call", "--url", &scene.place.url, "--namespace", &scene.place.namespace, "demo.add", "-"]);
    command.write_stdin("[4, 5]");
    assert_eq!(printed(ended(command).await), "9");
    let output = scene.call(&["demo.add", &at_file]).await;
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains(".json` cannot be read: "), "{output:?}");
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: HOPLINE_TEST_URL"]
async fn what_nobody_serves_is_told_at_once() {
    let scene = Scene::new("nobody").await;
    let line = "nobody serves `nobody.v1`: is a server running, and on the same namespace?";
    // What it waited for, it would wait for longer than this test does.
    let long = ["--timeout", "60m"];
    assert_eq!(failure(scene.call(&[&["nobody.x", "[]"], &long[..]].concat()).await), line);
    let other_version = scene.call(&[&["demo.v2.add", "[2, 3]"], &long[..]].concat()).await;
    assert!(failure(other_version).starts_with("nobody serves `demo.v2`"));
    // Another namespace is another world.
    let elsewhere = format!("{}-elsewhere", scene.place.namespace);
    let output =
        run(&[&["call", "demo.add", "[2, 3]", "--url", &scene.place.url, "--namespace", &elsewhere], &long[..]]
            .concat());
    assert!(failure(output).starts_with("nobody serves `demo.v1`"));
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: HOPLINE_TEST_URL"]
async fn a_refused_call_is_told_with_its_code() {
    let scene = Scene::new("refused").await;
    let line = fault(scene.call(&["demo.subtract", "[2, 3]"]).await, 64 + 12);
    assert!(
        line.starts_with("UNIMPLEMENTED: `demo.v1` has no method `subtract`: it has add, div, echo, exp, "),
        "{line}"
    );
    let line = fault(scene.call(&["demo.add", r#"["two", 3]"#, "--no-check"]).await, 64 + 3);
    assert!(line.starts_with("INVALID_ARGUMENT: the arguments of `add(a: i64, b: i64)"), "{line}");
    for (arguments, got) in [("[2]", 1), ("[2, 3, 4]", 3)] {
        let line = fault(scene.call(&["demo.add", arguments, "--no-check"]).await, 64 + 3);
        let said = format!("INVALID_ARGUMENT: `add(a: i64, b: i64) -> i64` takes 2 arguments, got {got}");
        assert_eq!(line, said);
    }
    let line = fault(scene.call(&["demo.panic"]).await, 64 + 13);
    assert!(line.starts_with("INTERNAL: `demo.v1.panic` panicked"), "{line}");
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: HOPLINE_TEST_URL"]
async fn the_methods_own_error_is_told_as_json() {
    let scene = Scene::new("typed").await;
    let line = failure(scene.call(&["demo.div", "[1, 0]"]).await);
    assert_eq!(line, r#"the service returned its own error: "DivisionByZero""#);
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: HOPLINE_TEST_URL"]
async fn a_timeout_ends_the_call() {
    let scene = Scene::new("timeout").await;
    let line = failure(scene.call(&["demo.sleep", "[3600000]", "--timeout", "5s"]).await);
    assert!(line.starts_with("`demo.v1.sleep` gave no reply within 5s: "), "{line}");
}

#[tokio::test]
async fn a_timeout_ends_connecting_too() {
    // It accepts, by the system's own hand, and never says a word.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").expect("there is a free port");
    let address = silent.local_addr().expect("it is bound");
    let one = format!("amqp://me:s3cret@{address}");
    // Each of ten may take as long as one: together they would take longer than the test waits.
    let ten = format!("amqp://me:s3cret@{}", vec![address.to_string(); 10].join(","));
    let cases: &[&[&str]] = &[&["call", "demo.add", "[2, 3]"], &["dead", "ls", "mail"], &["dead", "ls"]];
    for arguments in cases {
        for url in [&one, &ten] {
            let mut command = hopline(arguments);
            command.args(["--url", url, "--timeout", "300ms"]);
            let line = failure(ended(command).await);
            assert!(line.contains("within 300ms"), "{line}");
            // Where there is but one, it is told what it does.
            assert!(url != &one || line.contains("something accepts connections there"), "{line}");
        }
    }
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: HOPLINE_TEST_URL"]
async fn a_timeout_ends_a_call_of_a_broker_that_has_gone_silent() {
    let scene = Scene::new("silent").await;
    let (_, broker) = scene.place.url.rsplit_once('@').expect("it has a user");
    let proxy = Proxy::to(broker.parse().expect("it is an address")).await;
    let mut command = hopline(&["call", "demo.sleep", "[600000]", "--url", &proxy.url(), "--timeout", "2s"]);
    command.args(["--namespace", &scene.place.namespace]);
    let called = tokio::spawn(ended(command));
    while proxy.open() == 0 {
        tokio::task::yield_now().await;
    }
    // Wherever it is now, nothing comes back from there.
    proxy.stall();
    let line = failure(called.await.expect("no panic"));
    assert!(line.contains("within 2s"), "{line}");
}
