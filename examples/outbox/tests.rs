//! The outbox beside a broker that fails, events that cannot be published, and a second relay.

use std::path::PathBuf;
use std::time::Duration;

use hopline::testing::{self, Broker};
use hopline::topology::{Binding, Declaration, Queue, QueueKind};
use hopline::transport::{Mode, Role, Transport};
use hopline::{Client, Codec, Context, Running, Server};
use rusqlite::Connection;
use serde::Deserialize;
use serde_json::json;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::time::timeout;

mod outbox;

use outbox::{Outbox, Relay, is_new};

/// What a subscriber reads of an event.
#[derive(Debug, Clone, PartialEq, Deserialize)]
struct Heard {
    event_id: String,
    number: u64,
}

/// An outbox in a folder of its own, a broker in memory, and a subscriber that hears everything.
struct Scene {
    folder: PathBuf,
    outbox: Outbox,
    database: Connection,
    broker: Broker,
    heard: UnboundedReceiver<Heard>,
    _subscriber: Running,
}

impl Scene {
    async fn new(test: &str) -> Self {
        let folder = std::env::temp_dir().join(format!("hopline-outbox-{test}-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("it can be made");
        let outbox = Outbox::open(folder.join("shop.db")).expect("it is new");
        let database = outbox.connect().expect("it is there");
        let broker = testing::broker();
        let (told, heard) = unbounded_channel();
        let subscriber = Server::connect(&broker).await.expect("it is in memory");
        let subscriber = subscriber.subscribe("#", move |_: Context, event: Heard| {
            let _ = told.send(event);
            async {}
        });
        let _subscriber = subscriber.start().await.expect("it is in memory");
        Self { folder, outbox, database, broker, heard, _subscriber }
    }

    /// Writes events with these keys and numbers, each in a transaction of its own.
    fn write(&mut self, events: impl IntoIterator<Item = (&'static str, u64)>) {
        for (key, number) in events {
            let transaction = self.database.transaction().expect("it can begin");
            Outbox::write(&transaction, key, &json!({ "number": number })).expect("it fits");
            transaction.commit().expect("it is written");
        }
        self.outbox.wake();
    }

    async fn relay(&self) -> Relay {
        let client = Client::builder().codec(Codec::Json).max_message_size(10_000).timeout(Duration::from_secs(5));
        let client = client.connect(&self.broker).await.expect("it is in memory");
        self.outbox.relay(&client).await.expect("the file can be locked")
    }

    async fn heard(&mut self) -> Heard {
        self.heard.recv().await.expect("the subscriber is there")
    }

    fn count(&self, what: &str) -> i64 {
        let count = format!("SELECT count(*) FROM outbox WHERE {what}");
        self.database.query_row(&count, [], |row| row.get(0)).expect("the table is there")
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

#[tokio::test(start_paused = true)]
async fn events_wait_in_order_while_the_broker_takes_nothing() {
    let mut scene = Scene::new("alarm").await;
    let mut relay = scene.relay().await;
    scene.broker.alarm("low on disk");
    scene.write((0..100).map(|number| ("order.created", number)));
    for _ in 0..5 {
        let batch = relay.next().await.expect("the database is there");
        assert_eq!((batch.published.len(), batch.failed.len(), batch.left), (0, 0, 64));
    }
    assert_eq!(scene.count("failed IS NULL"), 100);
    scene.broker.restore();
    let mut published = 0;
    while !relay.is_done().await.expect("the database is there") {
        published += relay.next().await.expect("the database is there").published.len();
    }
    assert_eq!((published, scene.count("true")), (100, 0));
    let mut next = 0;
    while next < 100 {
        // What had left before the alarm was heard of comes twice.
        let number = scene.heard().await.number;
        assert!(number <= next, "{number} comes before {next}");
        next += u64::from(number == next);
    }
}

#[tokio::test(start_paused = true)]
async fn an_event_that_a_full_queue_refuses_is_tried_again_until_the_queue_has_it() {
    let mut scene = Scene::new("full").await;
    let queue = || "full".to_owned();
    let transport = Transport::connect(scene.broker.url(), Role::Client).await.expect("it is in memory");
    let declared = [
        Declaration::Queue(Queue { max_length: Some(1), ..Queue::new(queue(), QueueKind::Classic) }),
        Declaration::Binding(Binding { exchange: "hopline.events".to_owned(), key: "#".to_owned(), queue: queue() }),
    ];
    transport.declare(&declared).await.expect("declared");
    let mut relay = scene.relay().await;
    // One after the other: events that leave together may share a message.
    scene.write([("order.created", 1)]);
    assert_eq!(relay.next().await.expect("the database is there").published, [1]);
    scene.write([("order.created", 2)]);
    for _ in 0..3 {
        let batch = relay.next().await.expect("the database is there");
        assert_eq!((batch.published.len(), batch.left), (0, 1));
    }
    let mut emptied = transport.consume("full", Mode::NoAck).await.expect("it is there");
    assert!(emptied.next().await.is_some(), "the first event was in it");
    while !relay.is_done().await.expect("the database is there") {
        relay.next().await.expect("the database is there");
    }
    let mut heard = Vec::new();
    for _ in 0..5 {
        heard.push(scene.heard().await);
    }
    let numbers: Vec<_> = heard.iter().map(|event| event.number).collect();
    assert_eq!(numbers, [1, 2, 2, 2, 2], "the other subscriber gets a copy each time");
    assert!(heard[1..].iter().all(|event| event.event_id == heard[1].event_id), "{heard:?}");
}

#[tokio::test(start_paused = true)]
async fn an_event_that_can_never_be_published_holds_up_nothing() {
    let mut scene = Scene::new("never").await;
    let mut relay = scene.relay().await;
    scene.write([("order.*", 1), ("order.created", 2), ("order.created", 3), ("order.created", 4)]);
    let spoil = "UPDATE outbox SET event = ?2 WHERE number = ?1";
    scene.database.execute(spoil, (2, json!({ "event_id": "2", "text": "x".repeat(10_001) }).to_string())).expect("is");
    scene.database.execute(spoil, (3, "by hand")).expect("it is");
    let batch = relay.next().await.expect("the database is there");
    assert_eq!((batch.published, batch.left), (vec![4], 0));
    let reasons = ["wildcard", "the event takes", "expected value"];
    assert_eq!(batch.failed.len(), reasons.len());
    for ((number, why), (expected, reason)) in batch.failed.iter().zip((1..).zip(reasons)) {
        assert!(*number == expected && why.contains(reason), "{number}: {why}");
    }
    assert_eq!(scene.heard().await.number, 4);
    assert!(relay.is_done().await.expect("the database is there"), "nobody tries them again");
    assert_eq!(scene.count("failed NOT NULL"), 3);
}

#[tokio::test(start_paused = true)]
async fn what_comes_again_has_the_same_id_and_is_dropped() {
    let mut scene = Scene::new("again").await;
    scene.write([("order.created", 1)]);
    let mut relay = scene.relay().await;
    // The table cannot be written: it is as if the relay were killed between the confirm and the removal.
    let block = "CREATE TRIGGER kept BEFORE DELETE ON outbox BEGIN SELECT raise(ABORT, 'not now'); END";
    scene.database.execute_batch(block).expect("it is made");
    let error = relay.next().await.expect_err("it cannot be removed");
    assert!(error.to_string().contains("not now"), "{error}");
    drop(relay);
    scene.database.execute_batch("DROP TRIGGER kept").expect("it is there");
    assert_eq!(scene.relay().await.next().await.expect("the database is there").published, [1]);
    let (first, second) = (scene.heard().await, scene.heard().await);
    assert_eq!(first, second);
    for is_first in [true, false] {
        let transaction = scene.database.transaction().expect("it can begin");
        assert_eq!(is_new(&transaction, &first.event_id).expect("it can be asked"), is_first);
        transaction.commit().expect("it is written");
    }
}

#[tokio::test(start_paused = true)]
async fn a_second_relay_takes_over_when_the_first_has_ended() {
    let mut scene = Scene::new("second").await;
    let first = scene.relay().await;
    assert!(timeout(Duration::from_secs(60), scene.relay()).await.is_err(), "it has to wait");
    drop(first);
    scene.write([("order.created", 1)]);
    assert_eq!(scene.relay().await.next().await.expect("the database is there").published, [1]);
    assert_eq!(scene.heard().await.number, 1);
}

#[tokio::test]
async fn an_event_without_named_fields_is_refused_where_it_is_written() {
    let mut scene = Scene::new("unnamed").await;
    let transaction = scene.database.transaction().expect("it can begin");
    let error = Outbox::write(&transaction, "order.created", &7).expect_err("it has no place for an id");
    assert!(error.to_string().contains("named fields"), "{error}");
}
