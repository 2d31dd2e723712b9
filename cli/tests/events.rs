//! `hopline publish` and `hopline subscribe` as a shell sees them.
//!
//! Most need the RabbitMQ that `HOPLINE_TEST_URL` names, and are ignored unless they are asked for.

use hopline::Context;
use hopline::topology::{Binding, Declaration, Queue, QueueKind};
use hopline::transport::{Role, Transport};
use serde_json::{Value, json};

mod command;

use command::{Going, Place, is_refused, printed, said, soon};

impl Place {
    /// `hopline subscribe`, once it says that it has subscribed.
    async fn subscribe(&self, arguments: &[&str]) -> Going {
        let mut going = Going::start(self.here(&[&["subscribe"], arguments].concat()));
        let note = going.note().await;
        assert!(note.starts_with("hopline: subscribed to "), "{note}");
        going
    }
}

fn object(line: Option<String>) -> Value {
    serde_json::from_str(&line.expect("it prints a line")).expect("it is JSON")
}

#[test]
fn bad_usage_exits_with_2_and_says_what_to_write() {
    for (arguments, told) in [
        (&["publish"][..], "<KEY>"),
        (&["publish", "a", "{"], "not JSON: "),
        (&["publish", "a.*", "1", "--url", "memory://"], "the event key `a.*` has a wildcard in it"),
        (&["subscribe"], "<PATTERN>"),
        (&["subscribe", "a", "--count", "0"], "invalid value '0'"),
        (&["subscribe", "a", "--url", "memory://"], "nobody else can publish at `memory://`"),
    ] {
        is_refused(arguments, told);
    }
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: HOPLINE_TEST_URL"]
async fn events_are_printed_as_they_come_and_nobody_else_misses_them() {
    let scene = Place::new("events");
    let (heard, mut hear) = tokio::sync::mpsc::unbounded_channel();
    let server = scene.server().await.subscribe("order.*", move |_: Context, event: Value| {
        heard.send(event).expect("the test listens");
        async {}
    });
    let _server = server.start().await.expect("it can be subscribed");
    let mut lines = scene.subscribe(&["order.*"]).await;
    let mut two = scene.subscribe(&["#", "--count", "2", "--json"]).await;
    let told = printed(scene.run_here(&["publish", "order.created", r#"{"id": 7}"#, "--required"]).await);
    assert_eq!(told, "order.created: taken by the queues of all subscribers");
    let told =
        scene.run_here(&["publish", "order.shipped", "[1]", "--metadata", "user=alice", "--codec", "cbor", "--json"]);
    assert_eq!(printed(told.await), r#"{"key":"order.shipped","to_all":true,"to_nobody":false}"#);
    assert_eq!(lines.line().await.as_deref(), Some(r#"order.created  {"id":7}"#));
    assert_eq!(lines.line().await.as_deref(), Some("order.shipped  [1]"));
    let first = object(two.line().await);
    assert_eq!((&first["key"], &first["event"]), (&json!("order.created"), &json!({ "id": 7 })));
    let second = object(two.line().await);
    assert_eq!((&second["key"], &second["metadata"]), (&json!("order.shipped"), &json!({ "user": "alice" })));
    assert!(second["caller"].is_string(), "{second}");
    // It has had its two.
    assert_eq!((two.line().await, two.code().await), (None, Some(0)));
    for event in [json!({ "id": 7 }), json!([1])] {
        assert_eq!(soon(hear.recv()).await, Some(event));
    }
    for signal in ["INT", "TERM"] {
        let mut going = scene.subscribe(&["order.*"]).await;
        going.signal(signal).await;
        assert_eq!((going.line().await, going.code().await), (None, Some(0)));
    }
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: HOPLINE_TEST_URL"]
async fn an_event_does_not_steer_the_terminal() {
    let scene = Place::new("steer");
    let mut lines = scene.subscribe(&["#"]).await;
    scene.client().await.publish("a", "\u{1b}[2J\u{9b}\n").await.expect("the broker has it");
    assert_eq!(lines.line().await.as_deref(), Some(r#"a  "\u001b[2J\u009b\n""#));
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: HOPLINE_TEST_URL"]
async fn an_event_that_a_queue_does_not_take_is_an_error() {
    let scene = Place::new("full");
    // It declares the exchange.
    let mut lines = scene.subscribe(&["#"]).await;
    let transport = Transport::connect(&scene.url, Role::Operator).await.expect("the broker is there");
    let (name, events) = (format!("{}.full", scene.namespace), format!("{}.events", scene.namespace));
    let full = Queue { max_length: Some(1), ..Queue::new(&name, QueueKind::Exclusive) };
    let binding = Binding { exchange: events, key: "a".to_owned(), queue: name };
    transport.declare(&[Declaration::Queue(full), Declaration::Binding(binding)]).await.expect("it is new");
    // How many more a broker accepts before it refuses depends on the broker.
    let refused = loop {
        let output = scene.run_here(&["publish", "a", "--json"]).await;
        assert_eq!(lines.line().await.as_deref(), Some("a  null"));
        if output.status.code() != Some(0) {
            break output;
        }
    };
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    assert_eq!(refused.stdout, b"{\"key\":\"a\",\"to_all\":false,\"to_nobody\":false}\n");
    let refused = scene.run_here(&["publish", "a"]).await;
    assert!(refused.stdout.is_empty() && refused.status.code() == Some(1), "{refused:?}");
    assert!(said(&refused).starts_with("not all subscribers have the event"), "{refused:?}");
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: HOPLINE_TEST_URL"]
async fn an_event_that_nobody_gets_is_told_and_an_error_if_it_is_required() {
    let scene = Place::new("nobody");
    let told = printed(scene.run_here(&["publish", "order.created"]).await);
    assert_eq!(told, "order.created: taken by nobody, since there is no subscriber and no group");
    let object = r#"{"key":"order.created","to_all":true,"to_nobody":true}"#;
    assert_eq!(printed(scene.run_here(&["publish", "order.created", "--json"]).await), object);
    let refused = scene.run_here(&["publish", "order.created", "--required"]).await;
    assert!(refused.stdout.is_empty() && refused.status.code() == Some(1), "{refused:?}");
    assert!(said(&refused).starts_with("nobody gets the event `order.created`: start a subscriber"), "{refused:?}");
    let refused = scene.run_here(&["publish", "order.created", "--required", "--json"]).await;
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    assert_eq!(String::from_utf8_lossy(&refused.stdout).trim_end(), object);
    assert!(String::from_utf8_lossy(&refused.stderr).contains(r#""code":"UNAVAILABLE""#), "{refused:?}");
}
