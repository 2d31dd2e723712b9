//! Events reach everybody who subscribes to their key.

use std::collections::BTreeMap;

use futures::future::join_all;
use hopline::topology::{Binding, Declaration, Queue, QueueKind};
use hopline::transport::Settle;
use hopline::{Coalesce, Codec, Context, Error, Event, Invocation, Middleware, Next, Published, Reply, Server};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use crate::support::{Scene, soon};

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Order {
    id: u64,
}

fn subscribe(server: Server, pattern: &str) -> (Server, mpsc::UnboundedReceiver<(String, Order)>) {
    let (hear, heard) = mpsc::unbounded_channel();
    let server = server.subscribe(pattern, move |ctx: Context, order: Order| {
        assert_eq!(ctx.service(), "events");
        hear.send((ctx.method().to_owned(), order)).expect("the test listens");
        async {}
    });
    (server, heard)
}

#[tokio::test]
async fn an_event_reaches_every_subscriber_whose_pattern_matches() {
    let scene = Scene::new();
    let (server, mut one_word) = subscribe(scene.server().await, "order.*");
    let (server, mut everything) = subscribe(server, "order.#");
    let _server = server.start().await.expect("subscribed");
    let (other, mut elsewhere) = subscribe(scene.server().await, "*.created");
    let _other = other.start().await.expect("subscribed");

    let client = scene.client().await;
    for (id, key) in [(1, "order.created"), (2, "order.created.eu"), (3, "invoice.created"), (4, "nobody.listens.here")]
    {
        client.publish(key, &Order { id }).await.expect("the broker has it");
    }
    client.publish("order.end", &Order { id: 9 }).await.expect("the broker has it");
    client.publish("end.created", &Order { id: 9 }).await.expect("the broker has it");
    let heard = |(key, order): (String, Order)| format!("{key} {}", order.id);
    for expected in ["order.created 1", "order.end 9"] {
        assert_eq!(heard(soon(one_word.recv()).await.expect("an event")), expected);
    }
    for expected in ["order.created 1", "order.created.eu 2", "order.end 9"] {
        assert_eq!(heard(soon(everything.recv()).await.expect("an event")), expected);
    }
    for expected in ["order.created 1", "invoice.created 3", "end.created 9"] {
        assert_eq!(heard(soon(elsewhere.recv()).await.expect("an event")), expected);
    }
}

#[tokio::test]
async fn an_event_that_does_not_fit_or_a_handler_that_panics_stops_no_other() {
    let scene = Scene::new();
    let (hear, mut heard) = mpsc::unbounded_channel();
    let server = scene.server().await.subscribe("n", move |_: Context, n: u64| {
        assert!(n != 13, "as the test asks");
        hear.send(n).expect("the test listens");
        async {}
    });
    let _server = server.start().await.expect("subscribed");
    let client = scene.client().await;
    client.publish("n", "not a number").await.expect("the broker has it");
    client.publish("n", &13_u64).await.expect("the broker has it");
    client.publish("n", &14_u64).await.expect("the broker has it");
    assert_eq!(soon(heard.recv()).await, Some(14));
}

#[tokio::test]
async fn an_event_that_a_subscribers_queue_refuses_reaches_the_others_and_its_publisher_hears_it() {
    let scene = Scene::new();
    let (server, mut heard) = subscribe(scene.server().await, "order.*");
    let _server = server.start().await.expect("subscribed");
    let transport = scene.transport().await;
    let (name, events) = (format!("{}.full", scene.namespace), format!("{}.events", scene.namespace));
    let full = Queue { max_length: Some(1), ..Queue::new(&name, QueueKind::Exclusive) };
    let binding = Binding { exchange: events, key: "order.created".to_owned(), queue: name };
    transport.declare(&[Declaration::Queue(full), Declaration::Binding(binding)]).await.expect("it is new");
    let client = scene.client().await;
    // How many more messages a broker accepts before it refuses depends on the broker.
    let mut published = 0;
    loop {
        published += 1;
        let event = client.publish("order.created", &Order { id: published }).required();
        if event.await.expect("an answer") == Published::NotToAll {
            break;
        }
        assert!(published < 100, "the queue takes everything");
    }
    for id in 1..=published {
        assert_eq!(soon(heard.recv()).await.expect("an event").1, Order { id });
    }
    let other = client.publish("order.shipped", &Order { id: 0 }).await;
    assert_eq!(other.expect("an answer"), Published::ToAll);
}

#[tokio::test]
async fn keys_and_patterns_that_nothing_could_match_are_refused() {
    let scene = Scene::new();
    let client = scene.client().await;
    for key in ["", "order.", "order..created", "order.*", "#", &"x".repeat(256)] {
        match client.publish(key, &1).await {
            Err(Error::Invalid(why)) => assert!(why.contains("event key") && why.contains(key), "{why}"),
            other => panic!("{key}: {other:?}"),
        }
    }
    for pattern in ["", "order..#.*.", "order*", &"x".repeat(256)] {
        let (server, _) = subscribe(scene.server().await, pattern);
        match server.start().await {
            Err(Error::Invalid(why)) => assert!(why.contains("event pattern") && why.contains(pattern), "{why}"),
            other => panic!("{pattern}: {other:?}"),
        }
    }
}

/// Lets every call pass.
struct Passes;

impl Middleware for Passes {
    async fn handle(&self, call: Invocation, next: Next) -> Result<Reply, Error> {
        next.run(call).await
    }
}

fn is_unheard(outcome: Result<Published, Error>, key: &str) {
    match outcome {
        Err(Error::NoSubscriber { key: told, .. }) => assert_eq!(told, key),
        other => panic!("nobody is there: {other:?}"),
    }
}

#[tokio::test]
async fn who_asks_hears_that_nobody_gets_an_event() {
    let scene = Scene::new();
    let around = scene.client_with(|client| client.with(Passes)).await;
    for client in [scene.client().await, around] {
        let publish = |key: &str, id| client.publish(key, &Order { id });
        assert_eq!(publish("order.created", 1).await.expect("no error"), Published::ToAll, "it did not ask");
        assert_eq!(publish("order.created", 2).confirmed().await.expect("no error"), Published::ToNobody);
        is_unheard(publish("order.created", 3).required().await, "order.created");
        let (server, mut heard) = subscribe(scene.server().await, "order.created");
        let server = server.start().await.expect("subscribed");
        for event in [publish("order.created", 4).confirmed(), publish("order.created", 5).required()] {
            assert_eq!(event.await.expect("it is there"), Published::ToAll);
        }
        assert_eq!(publish("order.shipped", 6).confirmed().await.expect("no error"), Published::ToNobody);
        is_unheard(publish("order.shipped", 7).required().await, "order.shipped");
        for id in [4, 5] {
            assert_eq!(soon(heard.recv()).await.expect("an event").1, Order { id });
        }
        server.drain().await;
    }
}

#[tokio::test]
async fn events_that_ask_share_messages_of_their_own_and_each_hears_that_nobody_gets_it() {
    let scene = Scene::new();
    let client = scene.client_with(|client| client.coalesce(Coalesce::Fixed(64))).await;
    let publish = |id| client.publish("order.created", &Order { id });
    let all = (0..30).map(|id| match id % 3 {
        0 => publish(id),
        1 => publish(id).confirmed(),
        _ => publish(id).required(),
    });
    for (id, outcome) in soon(join_all(all)).await.into_iter().enumerate() {
        match id % 3 {
            0 => assert_eq!(outcome.expect("no error"), Published::ToAll, "{id}"),
            1 => assert_eq!(outcome.expect("no error"), Published::ToNobody, "{id}"),
            _ => is_unheard(outcome, "order.created"),
        }
    }
    assert_eq!(client.traffic().messages_sent, 2);
}

#[tokio::test]
async fn an_event_is_written_when_it_is_made_and_its_errors_come_when_it_is_awaited() {
    let scene = Scene::new();
    let (server, mut heard) = subscribe(scene.server().await, "order.created");
    let _server = server.start().await.expect("subscribed");
    let client = scene.client().await;
    let publish = {
        let gone = Order { id: 1 };
        client.publish("order.created", &gone)
    };
    tokio::spawn(publish.required()).await.expect("no panic").expect("it is there");
    assert_eq!(soon(heard.recv()).await.expect("an event").1, Order { id: 1 });
    let raw = scene.client_with(|client| client.codec(Codec::Raw)).await;
    let unwritten = raw.publish("order.created", &Order { id: 2 }).confirmed();
    match unwritten.await {
        Err(Error::Codec(why)) => assert!(why.to_string().starts_with("the event cannot be written as raw"), "{why}"),
        other => panic!("{other:?}"),
    }
    is_invalid(client.publish("order.*", &3).required().await);
}

fn is_invalid(outcome: Result<Published, Error>) {
    assert!(matches!(outcome, Err(Error::Invalid(_))), "{outcome:?}");
}

/// The first form of an event.
#[hopline::event(key = "order.placed")]
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Placed {
    id: u64,
}

/// The next form of the same event.
#[hopline::event(key = "order.placed", version = 2)]
#[derive(Debug, PartialEq, Serialize, Deserialize)]
enum PlacedAnew {
    ByWeb { id: u64 },
}

#[tokio::test]
async fn an_event_of_a_type_goes_by_its_key_and_says_its_version() {
    assert_eq!((Placed::KEY, Placed::VERSION), ("order.placed", 1));
    assert_eq!((PlacedAnew::KEY, PlacedAnew::VERSION), ("order.placed", 2));
    let scene = Scene::new();
    let client = scene.client_with(|client| client.codec(Codec::Json)).await;
    let transport = scene.transport().await;
    let (name, events) = (format!("{}.placed", scene.namespace), format!("{}.events", scene.namespace));
    let binding = Binding { exchange: events, key: "order.placed".to_owned(), queue: name.clone() };
    let queue = Queue::new(&name, QueueKind::Exclusive);
    transport.declare(&[Declaration::Queue(queue), Declaration::Binding(binding)]).await.expect("it is new");
    client.emit(&Placed { id: 7 }).required().await.expect("there is a queue");
    client.emit(&PlacedAnew::ByWeb { id: 7 }).required().await.expect("there is a queue");
    for (version, payload) in [(None, r#"{"id":7}"#), (Some(2), r#"{"ByWeb":{"id":7}}"#)] {
        let delivery = soon(transport.get(&name)).await.expect("it answers").expect("an event");
        let body = delivery.body.clone();
        let metadata_end = 32 + u32::from_be_bytes(body[24..28].try_into().expect("4 bytes")) as usize;
        let metadata: BTreeMap<u64, serde_cbor::Value> =
            serde_cbor::from_slice(&body[32..metadata_end]).expect("a map with numbers as keys");
        assert_eq!(metadata.get(&17), version.map(serde_cbor::Value::Integer).as_ref());
        assert_eq!(str::from_utf8(&body[metadata_end..]), Ok(payload));
        delivery.settle(Settle::Ack);
    }
}
