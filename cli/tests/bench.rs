//! `hopline bench` as a shell sees it: what it prints, what it writes, and what it exits with.
//!
//! Client and server side of a bench meet in one process on the broker in memory; in two they need the RabbitMQ that
//! `HOPLINE_TEST_URL` names, and those tests are ignored unless they are asked for.

use std::collections::BTreeSet;
use std::process::{ExitStatus, Output, Stdio};
use std::time::Duration;

use hopline::{Context, Error, Service};
use serde_bytes::ByteBuf;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

mod command;

use command::{Place, cleaned, printed, said, soon};

/// Long enough for a few calls on a machine that does much else.
const SHORT: &[&str] = &["--seconds", "1", "--concurrency", "4"];
const MEMORY: &[&str] = &["--url", "memory://"];

fn bench(arguments: &[&[&str]]) -> Command {
    let mut command = Command::from(cleaned());
    command.env_remove("TOKIO_WORKER_THREADS");
    command.stdin(Stdio::null()).kill_on_drop(true).arg("bench").args(arguments.concat());
    command
}

async fn run(arguments: &[&[&str]]) -> Output {
    soon(bench(arguments).output()).await.expect("it can be run")
}

/// The one line on stderr of a bench that failed.
fn failure(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    said(output)
}

/// The same as an object, of a bench that prints JSON.
fn json_failure(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let told: Value = serde_json::from_slice(&output.stderr).expect("it is JSON, and one value");
    told["error"].as_str().expect("it is a sentence").to_owned()
}

/// What `--json` prints: one object with these keys and no others.
fn object(printed: &str) -> Value {
    let object: Value = serde_json::from_str(printed).expect("it is JSON, and one value");
    let keys: BTreeSet<&str> = object.as_object().expect("it is an object").keys().map(String::as_str).collect();
    let expected = [
        "calls",
        "calls_per_message",
        "calls_per_s",
        "concurrency",
        "cpu_us_per_call",
        "errors",
        "p50_us",
        "p999_us",
        "p99_us",
        "size",
    ];
    assert_eq!(keys, BTreeSet::from(expected));
    object
}

/// The figures of calls that went well.
fn assert_well(object: &Value) {
    assert!(object["calls"].as_u64() > Some(0), "{object}");
    assert_eq!(object["errors"], 0, "{object}");
    assert!(object["calls_per_s"].as_f64() > Some(0.0), "{object}");
    let latencies = ["p50_us", "p99_us", "p999_us"].map(|part| object[part].as_u64().expect("it is a number"));
    assert!(latencies.is_sorted() && latencies[2] > 0, "{object}");
}

impl Place {
    fn options(&self) -> [&str; 4] {
        ["--url", &self.url, "--namespace", &self.namespace]
    }

    async fn call(&self, arguments: &[&str]) -> Output {
        run(&[&["call"], &self.options(), SHORT, arguments]).await
    }

    /// `hopline bench serve`, once it says that it serves.
    async fn serve(&self, arguments: &[&str]) -> Child {
        let mut serve = bench(&[&["serve"], &self.options(), arguments]);
        let mut process = serve.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("it can be run");
        let mut printed = BufReader::new(process.stdout.take().expect("it is piped")).lines();
        let line = soon(printed.next_line()).await.expect("it prints text");
        assert_eq!(line.as_deref(), Some("serving"));
        process
    }

    /// Whether anybody serves anything here.
    async fn served(&self) -> bool {
        !self.client().await.registry().services().await.expect("it can be asked").is_empty()
    }
}

async fn ended(mut process: Child, signal: &str) -> ExitStatus {
    let id = process.id().expect("it has not ended").to_string();
    // A shell has `kill` built in.
    let told = Command::new("sh").args(["-c", "kill -s \"$0\" \"$1\"", signal, &id]).status().await;
    assert!(told.expect("there is a shell").success());
    soon(process.wait()).await.expect("it can be waited for")
}

#[tokio::test]
async fn json_is_one_object_with_the_figures() {
    let arguments: &[&[&str]] = &[&["call"], MEMORY, SHORT, &["--json", "--size", "100"]];
    let object = object(&printed(run(arguments).await));
    assert_well(&object);
    assert_eq!((&object["concurrency"], &object["size"]), (&4.into(), &100.into()));
}

#[tokio::test]
async fn the_report_for_people_has_a_line_for_each_figure() {
    let report = printed(run(&[&["call"], MEMORY, SHORT, &["--size", "1024", "--coalesce", "8"]]).await);
    assert!(report.starts_with("4 calls in flight, 1 KiB each, coalesce 8, measured for "), "{report}");
    for name in [
        "calls",
        "calls/s",
        "errors",
        "p50 latency",
        "p90 latency",
        "p99 latency",
        "p99.9 latency",
        "longest latency",
        "messages/s",
        "calls a message",
    ] {
        let column = format!("{name:<16} ");
        assert_eq!(report.lines().filter(|line| line.starts_with(&column)).count(), 1, "no {name} in {report}");
    }
    assert!(report.lines().any(|line| line.starts_with("p99 latency ") && line.ends_with(" µs")), "{report}");
    #[cfg(unix)]
    assert!(report.lines().any(|line| line.starts_with("CPU time a call ")), "{report}");
}

#[tokio::test]
async fn in_memory_there_are_oneway_calls_and_several_methods_too() {
    for arguments in [&["--style", "oneway"], &["--methods", "3"], &["--size", "0"], &["--coalesce", "off"]] {
        assert_well(&object(&printed(run(&[&["call"], MEMORY, SHORT, &["--json"], arguments]).await)));
    }
}

#[tokio::test]
async fn bad_usage_exits_with_2_and_says_what_to_write() {
    let cases: &[(&[&str], &str)] = &[
        (&[], "Usage: hopline bench"),
        (&["call", "--concurrency", "0"], "write a number from 1 to 65536"),
        (&["call", "--size", "16777217"], "write a number of bytes up to 16777216, which is 16 MiB"),
        (&["call", "--seconds", "0"], "write a number of seconds above 0"),
        (&["call", "--seconds", "soon"], "write a number of seconds above 0"),
        (&["call", "--coalesce", "maybe"], "write auto, off, or how many calls may share a message"),
        (&["call", "--coalesce", "0"], "write auto, off, or how many calls may share a message"),
        (&["call", "--style", "event"], "[possible values: call, oneway]"),
        (&["call", "--style", "oneway", "--methods", "2"], "there is one oneway method"),
        (&["call", "--url", "http://localhost"], "unknown scheme: use memory://"),
        (&["call", "--url", "memory://", "--namespace", "a.b"], "the namespace `a.b` has a '.' in it"),
        (&["serve", "--instances", "0"], "write a number from 1 to 100"),
        (&["serve", "--methods", "0"], "write a number from 1 to 1000"),
        (&["serve", "--url", "memory://"], "`hopline bench call` serves for itself there"),
        (&["call", "--seconds=-1"], "write a number of seconds above 0"),
    ];
    for (arguments, said) in cases {
        let output = run(&[*arguments]).await;
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {output:?}");
        assert!(output.stdout.is_empty(), "{arguments:?}: {output:?}");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(stderr.contains(said), "{arguments:?}: no `{said}` in {stderr}");
    }
}

#[tokio::test]
async fn a_payload_that_leaves_no_room_for_the_rest_of_a_message_is_told_at_once() {
    let output = run(&[&["call"], MEMORY, SHORT, &["--size", "16777216"]]).await;
    let line = failure(&output);
    assert!(line.contains("over the client's cap of 16777216: send less"), "{line}");
    assert!(output.stdout.is_empty(), "{output:?}");
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: HOPLINE_TEST_URL"]
async fn client_and_server_meet_on_a_broker() {
    let scene = Place::new("meet");
    let server = scene.serve(&["--instances", "2", "--methods", "2", "--quorum"]).await;
    let ways: &[&[&str]] = &[
        &["--coalesce", "auto"],
        &["--coalesce", "off"],
        &["--coalesce", "8", "--methods", "2"],
        &["--style", "oneway"],
        &["--size", "100000"],
    ];
    for way in ways {
        let object = object(&printed(scene.call(&[&["--json"], *way].concat()).await));
        assert_well(&object);
        let calls = object["calls_per_message"].as_f64().expect("it is a number");
        match way {
            // A payload over 64 KiB goes alone.
            ["--coalesce", "off"] | ["--size", _] => assert!((1.0..1.001).contains(&calls), "{object}"),
            // How many share depends on how quick this machine is just now.
            ["--coalesce", "auto"] => assert!(calls >= 1.0, "{object}"),
            _ => assert!(calls > 1.0, "{object}"),
        }
    }
    // It has two methods, and not three.
    let line = failure(&scene.call(&["--methods", "3"]).await);
    assert!(line.starts_with("UNIMPLEMENTED: `bench.v1` has no method `echo2`"), "{line}");
    assert!(line.ends_with("(start `hopline bench serve --methods 3`)"), "{line}");
    assert_eq!(ended(server, "TERM").await.code(), Some(0));
    assert!(!scene.served().await);
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: HOPLINE_TEST_URL"]
async fn handlers_that_take_time_are_waited_for() {
    let scene = Place::new("work");
    for work in [500, 20_000] {
        let server = scene.serve(&["--work-us", &work.to_string()]).await;
        let object = object(&printed(scene.call(&["--json"]).await));
        assert_well(&object);
        assert!(object["p50_us"].as_u64() >= Some(work), "{object}");
        assert_eq!(ended(server, "INT").await.code(), Some(0));
    }
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: HOPLINE_TEST_URL"]
async fn a_server_that_is_told_so_ends_with_its_input() {
    let scene = Place::new("orphan");
    let mut server = scene.serve(&["--until-input-ends"]).await;
    soon(async { while !scene.served().await {} }).await;
    // As the system does for a process that is killed.
    drop(server.stdin.take());
    assert_eq!(soon(server.wait()).await.expect("it can be waited for").code(), Some(0));
    assert!(!scene.served().await);
    // Whoever calls now hears at once that nobody serves it any more.
    let line = failure(&scene.call(&[]).await);
    assert!(line.starts_with("nobody serves `bench.v1`"), "{line}");
    // What it served is gone soon, and nothing of it is in the way of the next one.
    let client = scene.client().await;
    let gone = async {
        loop {
            let call =
                client.call::<ByteBuf>("bench.v1", "echo", (ByteBuf::new(),)).timeout(Duration::from_millis(200));
            if let Err(Error::NoService { .. }) = call.await {
                return;
            }
        }
    };
    soon(gone).await;
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: HOPLINE_TEST_URL"]
async fn that_nobody_serves_is_told_at_once_with_the_way_out() {
    let scene = Place::new("nobody");
    for style in ["call", "oneway"] {
        let output = scene.call(&["--style", style]).await;
        let line = failure(&output);
        assert!(line.starts_with("nobody serves `bench.v1`"), "{line}");
        assert!(line.ends_with("(start one with `hopline bench serve`)"), "{line}");
        assert!(output.stdout.is_empty(), "{output:?}");
    }
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: HOPLINE_TEST_URL"]
async fn a_wrong_reply_is_an_error() {
    let scene = Place::new("wrong");
    let server = scene.server().await;
    let service = Service::new("bench", 1).method("echo", |_: Context, (mut payload,): (ByteBuf,)| async move {
        payload.push(1);
        Ok::<_, hopline::Fault>(payload)
    });
    let server = server.serve(service).start().await.expect("it can be served");
    let output = scene.call(&["--json"]).await;
    let line = json_failure(&output);
    assert!(line.ends_with(" calls failed, the first one with: a reply had other bytes than its call"), "{line}");
    let object = object(&String::from_utf8_lossy(&output.stdout));
    assert_eq!(object["calls"], 0, "{object}");
    assert!(object["errors"].as_u64() > Some(0), "{object}");
    assert!(object["p50_us"].is_null(), "{object}");
    server.drain().await;
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: HOPLINE_TEST_URL"]
async fn a_failed_call_is_an_error() {
    let scene = Place::new("failed");
    let server = scene.server().await;
    let first = std::sync::atomic::AtomicBool::new(true);
    let service = Service::new("bench", 1).method("echo", move |_: Context, (payload,): (ByteBuf,)| {
        // The bench looks once whether there is anybody at all.
        let first = first.swap(false, std::sync::atomic::Ordering::Relaxed);
        async move { if first { Ok(payload) } else { Err(hopline::Fault::new(hopline::Code::Internal, "no more")) } }
    });
    let server = server.serve(service).start().await.expect("it can be served");
    let line = json_failure(&scene.call(&["--json"]).await);
    assert!(line.ends_with(" calls failed, the first one with: INTERNAL: no more"), "{line}");
    server.drain().await;
}
