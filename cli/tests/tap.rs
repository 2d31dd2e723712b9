//! `hopline tap` as a shell sees it.
//!
//! Most need the RabbitMQ that `HOPLINE_TEST_URL` names, and are ignored unless they are asked for.

mod command;

use command::{Going, Place, is_refused, said, soon};
use hopline::{Context, Fault, Running, Service};
use serde_json::{Value, json};

impl Place {
    async fn serve(&self) -> Running {
        let service = Service::new("demo", 1)
            .method("add", |_: Context, (a, b): (i64, i64)| async move { Ok::<_, Fault>(a + b) });
        self.server().await.serve(service).start().await.expect("it can be served")
    }
}

#[test]
fn wrong_usage_says_what_to_write() {
    for (arguments, told) in [
        (&["tap"][..], "<SERVICE>"),
        (&["tap", "demo", "--for", "11m"], "10m is the longest"),
        (&["tap", "demo", "--rate", "1001"], "1001 is not in 1..=1000"),
    ] {
        is_refused(arguments, told);
    }
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: HOPLINE_TEST_URL"]
async fn calls_are_lines_until_it_is_told_to_end() {
    let place = Place::new("tap");
    let server = place.serve().await;
    let client = place.client().await;
    let mut tap = Going::start(place.here(&["tap", "demo", "--json"]));
    assert_eq!(tap.note().await, "hopline: tapping demo for 30s: Ctrl-C ends it");
    let five: i64 = soon(async { client.call("demo", "add", (2, 3)).await }).await.expect("it answers");
    let line: Value = serde_json::from_str(&tap.line().await.expect("it goes on")).expect("it prints JSON");
    assert_eq!((five, &line["method"], &line["code"]), (5, &json!("add"), &json!("OK")));
    assert_eq!((&line["instance"], &line["caller"]), (&json!(server.instance()), &json!(client.instance())));
    tap.signal("TERM").await;
    assert_eq!((tap.note().await.as_str(), tap.code().await), ("hopline: 1 call shown, 0 left out", Some(0)));
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: HOPLINE_TEST_URL"]
async fn it_ends_by_itself_and_fails_where_nobody_is() {
    let place = Place::new("tap-ends");
    let nobody = place.run_here(&["tap", "demo"]).await;
    assert_eq!(nobody.status.code(), Some(1), "{nobody:?}");
    assert!(said(&nobody).starts_with("no instance of `demo` replies"), "{nobody:?}");
    let _server = place.serve().await;
    let output = place.run_here(&["tap", "demo", "--for", "1s"]).await;
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stdout).starts_with("METHOD "), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).ends_with("hopline: 0 calls shown, 0 left out\n"), "{output:?}");
}
