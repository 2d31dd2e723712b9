//! `hopline serve` as a shell sees it, and those who call what it serves.
//!
//! Most need the RabbitMQ that `HOPLINE_TEST_URL` names, and are ignored unless they are asked for.

use hopline::{CallError, Client, Code, Error};
use serde_json::{Value, json};

mod command;

use command::{Going, Place, is_refused, printed, said, soon};

const SCRIPT: &str = r#"{"method": "add", "reply": 5}
{"method": "sub", "error": {"too": "small"}}
{"method": "find", "fault": "NOT_FOUND", "message": "there is no order 7"}
{"method": "turns", "reply": "first"}
{"method": "turns", "reply": "then", "delay_ms": 1}
{"method": "slow", "reply": "done", "delay_ms": 1500}
{"method": "note", "reply": null, "oneway": true}
"#;

impl Place {
    /// `hopline serve`, once it says that it serves.
    async fn stand_in(&self, arguments: &[&str]) -> Going {
        let mut going = Going::start(self.here(&[&["serve"], arguments].concat()));
        let note = going.note().await;
        assert!(note.starts_with("hopline: serving ") && note.ends_with(": Ctrl-C ends it"), "{note}");
        going
    }

    /// A file with this text, and its path.
    fn file(&self, text: &str) -> String {
        let file = format!("{}/{}.jsonl", env!("CARGO_TARGET_TMPDIR"), self.namespace);
        std::fs::write(&file, text).expect("it can be written");
        file
    }
}

async fn called(client: &Client, target: &str) -> Result<Value, CallError<Value>> {
    let (service, method) = target.rsplit_once('.').expect("it has both");
    client.call::<Value>(service, method, (2, 3)).fails_with::<Value>().await
}

#[test]
fn what_cannot_be_served_is_refused_before_anything_is_served() {
    let file = concat!(env!("CARGO_TARGET_TMPDIR"), "/wrong.jsonl");
    std::fs::write(file, "{\"method\": \"add\", \"reply\": 5}\n{\"method\": \"add\"}\n").expect("it can be written");
    for (arguments, told) in [
        (&["serve", "demo"][..], "<--reply <JSON>|--script <FILE>|--echo>"),
        (&["serve", "demo", "--echo", "--reply", "1"], "cannot be used with"),
        (&["serve", "de mo", "--echo"], "the service `de mo` has a ' ' in it"),
        (&["serve", "demo", "--reply", "{"], "not JSON: "),
        (&["serve", "demo", "--script", file], "wrong.jsonl`, line 2: write one of `reply`, `error` and `fault`"),
        (&["serve", "demo", "--script", "/no/such"], "`/no/such` cannot be read: "),
        (&["serve", "demo", "--echo", "--url", "memory://"], "nobody else can call at `memory://`"),
    ] {
        is_refused(arguments, told);
    }
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: HOPLINE_TEST_URL"]
async fn a_script_says_what_each_method_answers() {
    let scene = Place::new("script");
    let mut served = scene.stand_in(&["shop.v2", "--script", &scene.file(SCRIPT)]).await;
    let client = scene.client().await;
    assert_eq!(called(&client, "shop.v2.add").await.expect("a reply"), 5);
    let error = called(&client, "shop.v2.sub").await.expect_err("its own error");
    assert!(matches!(&error, CallError::Service(error) if *error == json!({ "too": "small" })), "{error}");
    for (target, code) in [("shop.v2.find", Code::NotFound), ("shop.v2.other", Code::Unimplemented)] {
        let error = called(&client, target).await.expect_err("a fault");
        assert!(matches!(&error, CallError::Failed(Error::Fault(fault)) if fault.code == code), "{error}");
    }
    for expected in ["first", "then", "then"] {
        assert_eq!(called(&client, "shop.v2.turns").await.expect("a reply"), expected);
    }
    client.oneway("shop.v2", "note", ("x",)).send().await.expect("it takes oneway calls");
    let caller = client.instance().to_owned();
    for (method, code) in [
        ("add", "OK"),
        ("sub", "SERVICE_ERROR"),
        ("find", "NOT_FOUND"),
        ("other", "UNIMPLEMENTED"),
        ("turns", "OK"),
        ("turns", "OK"),
        ("turns", "OK"),
        ("note", "OK"),
    ] {
        let line = served.line().await.expect("a line for each call");
        assert!(line.starts_with(&format!("{method}  {caller}  ")) && line.ends_with(&format!("s  {code}")), "{line}");
    }
    // A call that runs is answered before it ends.
    let slow = tokio::spawn(async move { called(&client, "shop.v2.slow").await });
    let asker = scene.client().await;
    let running = async {
        loop {
            let stats = asker.registry().count(1).stats("shop.v2").await.expect("it is asked");
            let methods = stats.iter().flat_map(|stats| &stats.methods);
            if methods.filter(|method| method.name == "slow").any(|method| method.running + method.finished > 0) {
                return;
            }
        }
    };
    soon(running).await;
    served.signal("TERM").await;
    assert_eq!(slow.await.expect("no panic").expect("a reply"), "done");
    assert_eq!(served.code().await, Some(0));
    assert!(served.line().await.expect("its line").starts_with("slow  "));
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: HOPLINE_TEST_URL"]
async fn all_methods_reply_the_same_or_their_arguments() {
    let scene = Place::new("echo");
    let _quiet = scene.stand_in(&["const", "--reply", r#"{"sum": 5}"#, "--quiet"]).await;
    let mut echo = scene.stand_in(&["--echo", "demo", "--json"]).await;
    assert_eq!(printed(scene.run_here(&["call", "const.any"]).await), r#"{"sum":5}"#);
    for codec in ["json", "cbor", "msgpack"] {
        let output = scene.run_here(&["call", "demo.any", r#"[1, {"a": null}]"#, "--codec", codec]).await;
        assert_eq!(printed(output), r#"[1,{"a":null}]"#);
        let line: Value = serde_json::from_str(&echo.line().await.expect("a line")).expect("it is JSON");
        assert_eq!((&line["method"], &line["code"]), (&json!("any"), &json!("OK")));
        assert!(line["took_us"].is_u64() && line["caller"].is_string(), "{line}");
    }
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: HOPLINE_TEST_URL"]
async fn repeated_calls_are_summed_up() {
    let scene = Place::new("repeat");
    let _served = scene.stand_in(&["shop", "--script", &scene.file(SCRIPT), "--quiet"]).await;
    let told = printed(scene.run_here(&["call", "shop.add", "--repeat", "50", "--concurrency", "8"]).await);
    assert!(told.starts_with("50 calls: 50 ok, 0 failed\np50 ") && told.ends_with(" calls/s"), "{told}");
    let output = scene.run_here(&["call", "shop.turns", "--repeat", "3", "--oneway"]).await;
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(said(&output).starts_with("3 calls failed, the first one with: `shop.v1` takes no oneway calls"));
    let output = scene.run_here(&["call", "shop.find", "--repeat", "3", "--json"]).await;
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let told: Value = serde_json::from_slice(&output.stdout).expect("it is JSON");
    assert_eq!((&told["ok"], &told["failed"]), (&json!(0), &json!({ "NOT_FOUND": 3 })));
    let told: Value = serde_json::from_slice(&output.stderr).expect("it is JSON");
    assert_eq!(told["error"], "3 calls failed, the first one with: NOT_FOUND: there is no order 7");
    // Once is a call as any other.
    assert_eq!(printed(scene.run_here(&["call", "shop.add", "--repeat", "1"]).await), "5");
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: HOPLINE_TEST_URL"]
async fn a_verbose_call_tells_who_answered_and_how_long_it_took() {
    let scene = Place::new("verbose");
    let _served = scene.stand_in(&["shop", "--script", &scene.file(SCRIPT), "--quiet"]).await;
    let instance = &scene.client().await.registry().instances("shop").await.expect("it is asked")[0].instance;
    let output = scene.run_here(&["call", "shop.add", "[2, 3]", "--verbose"]).await;
    assert_eq!((output.status.code(), &output.stdout[..]), (Some(0), &b"5\n"[..]));
    let told = String::from_utf8(output.stderr).expect("it prints text");
    let lines: Vec<_> = told.lines().collect();
    assert_eq!(
        [lines[0], lines[2], lines[3]],
        [&format!("instance    {instance}"), "arguments   5 B", "result      1 B"]
    );
    assert!(lines[1].starts_with("round trip  ") && lines[1].contains(" in the handler, "), "{told}");
    let output = scene.run_here(&["call", "shop.find", "--verbose", "--json"]).await;
    assert_eq!(output.status.code(), Some(69), "{output:?}");
    let told = String::from_utf8(output.stderr).expect("it prints text");
    let (verbose, error) = told.split_once('\n').expect("two objects");
    let [verbose, error] = [verbose, error].map(|text| serde_json::from_str::<Value>(text).expect("it is JSON"));
    assert!(verbose["round_trip_us"].is_u64() && verbose["arguments_bytes"] == 2, "{verbose}");
    assert_eq!(error, json!({ "error": "NOT_FOUND: there is no order 7", "code": "NOT_FOUND" }));
}
