//! Watching the instances: who comes, drains, goes, and is killed.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::{Stream, StreamExt as _};
use hopline::testing;
use hopline::topology::{Declaration, Exchange, ExchangeKind};
use hopline::transport::{Confirm, Properties, Publication, Role, Transport};
use hopline::{Change, Client, Error, Invocation, Middleware, Next, Reply, Server, WhenFull};
use tokio::time::Instant;

use crate::support::{Calculator, Held, MathServer, Scene, hold, soon};

async fn next(changes: &mut (impl Stream<Item = Change> + Unpin)) -> Change {
    soon(changes.next()).await.expect("the client is open")
}

/// The instance that has come.
async fn came(changes: &mut (impl Stream<Item = Change> + Unpin)) -> String {
    match next(changes).await {
        Change::Up(instance) => instance.instance,
        other => panic!("{other:?}"),
    }
}

/// Checks that an instance goes, with or without a drain before.
async fn goes(changes: &mut (impl Stream<Item = Change> + Unpin), gone: &str) {
    loop {
        match next(changes).await {
            Change::Changed(leaving) => assert!(leaving.instance == gone && leaving.draining),
            Change::Down { instance, .. } => return assert_eq!(instance, gone),
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn whoever_is_there_comes_drains_and_goes_is_told() {
    let scene = Scene::new();
    let first = scene.serve(MathServer::new(Calculator)).await;
    let client = scene.client().await;
    let mut changes = client.registry().watch();
    assert_eq!(came(&mut changes).await, first.instance());
    let Held { service, mut arrived } = Held::new();
    let second = scene.serve(service).await;
    let instance = second.instance().to_owned();
    assert_eq!(came(&mut changes).await, instance);
    // While a call runs, it drains and does not go.
    let pending = hold(&client, 1).start().await.expect("on its way");
    let running = soon(arrived.recv()).await.expect("it runs");
    let drained = tokio::spawn(second.drain());
    match next(&mut changes).await {
        Change::Changed(changed) => assert!(changed.instance == instance && changed.draining),
        other => panic!("{other:?}"),
    }
    running.release();
    soon(pending).await.expect("answered");
    goes(&mut changes, &instance).await;
    soon(drained).await.expect("no panic");
    client.close().await;
    assert_eq!(soon(changes.next()).await, None);
    assert_eq!(soon(changes.next()).await, None, "it may be asked again");
}

#[tokio::test]
async fn one_that_was_killed_is_missed() {
    let scene = Scene::new();
    let client = scene.client().await;
    let mut changes = client.registry().watch();
    let server = scene.serve(MathServer::new(Calculator)).await;
    let instance = server.instance().to_owned();
    assert_eq!(came(&mut changes).await, instance);
    // It closes its connection without a word.
    drop(server);
    goes(&mut changes, &instance).await;
}

#[tokio::test]
async fn what_changes_while_the_client_is_away_is_told_when_it_is_back() {
    let broker = testing::broker();
    let serve = async || {
        let server = Server::connect(&broker).await.expect("it is there");
        server.serve(MathServer::new(Calculator)).start().await.expect("it can be served")
    };
    let (stays, leaves) = (serve().await, serve().await);
    let client = Client::connect(&broker).await.expect("it is there");
    let mut changes = client.registry().watch();
    let mut there = [came(&mut changes).await, came(&mut changes).await];
    there.sort_unstable();
    let (mut expected, gone) =
        ([stays.instance().to_owned(), leaves.instance().to_owned()], leaves.instance().to_owned());
    expected.sort_unstable();
    assert_eq!(there, expected);
    broker.take_down();
    drop(leaves);
    broker.restore();
    goes(&mut changes, &gone).await;
    let comes = serve().await;
    assert_eq!(came(&mut changes).await, comes.instance());
}

/// RabbitMQ's plugin declares this exchange. Elsewhere nobody may.
const EVENTS: &str = "amq.rabbitmq.event";

/// What RabbitMQ's plugin says of a queue that is deleted. Its setting `event_exchange.protocol` decides which header has
/// the name.
fn deletion(header: &str, queue: String) -> Publication {
    let headers = vec![("vhost".to_owned(), "/".to_owned()), (header.to_owned(), queue)];
    let properties = Properties { headers, persistent: true, ..Properties::default() };
    let (exchange, key) = (EVENTS.to_owned(), "queue.deleted".to_owned());
    Publication { exchange, key, mandatory: true, properties, body: bytes::Bytes::new() }
}

#[tokio::test(start_paused = true)]
async fn one_whose_queue_is_deleted_is_told_at_once_where_the_broker_says_so() {
    let broker = testing::broker();
    let transport = Transport::connect(broker.url(), Role::Client).await.expect("it is there");
    let events = Exchange { name: EVENTS.to_owned(), kind: ExchangeKind::Topic };
    transport.declare(&[Declaration::Exchange(events)]).await.expect("in memory anybody may");
    let serve = async || {
        let server = Server::connect(&broker).await.expect("it is there");
        server.serve(MathServer::new(Calculator)).start().await.expect("it can be served")
    };
    let client = Client::connect(&broker).await.expect("it is there");
    let mut changes = client.registry().watch();
    let (stays, leaves) = (serve().await, serve().await);
    let [first, second] = [came(&mut changes).await, came(&mut changes).await];
    let (staying, leaving) = (stays.instance().to_owned(), leaves.instance().to_owned());
    assert!([(&first, &second), (&second, &first)].contains(&(&staying, &leaving)));
    let since = Instant::now();
    drop(leaves);
    // Of the one that stays, an older queue goes.
    for (header, instance) in [("name", &staying), ("x-opt-name", &leaving)] {
        let said = transport.publish(deletion(header, format!("hopline.math.v1@{instance}.old"))).await;
        assert_eq!(said, Ok(Confirm::Accepted), "somebody listens");
    }
    goes(&mut changes, &leaving).await;
    assert!(since.elapsed() < Duration::from_secs(1), "after {:?}", since.elapsed());
    let comes = serve().await;
    assert_eq!(came(&mut changes).await, comes.instance(), "the other is still there");
}

#[tokio::test(start_paused = true)]
async fn whoever_watches_asks_apart_from_the_calls_of_the_program() {
    /// Notes what is called.
    struct Notes(Arc<Mutex<Vec<String>>>);
    impl Middleware for Notes {
        async fn handle(&self, call: Invocation, next: Next) -> Result<Reply, Error> {
            self.0.lock().expect("no panic").push(call.method().to_owned());
            next.run(call).await
        }
    }
    let scene = Scene::in_memory();
    let Held { service, mut arrived } = Held::new();
    let server = scene.serve(service).await;
    let notes = Arc::<Mutex<Vec<String>>>::default();
    let builder = Client::builder().namespace(&scene.namespace).timeout(Duration::from_secs(3600));
    let builder = builder.max_in_flight(1, WhenFull::Refuse).with(Notes(notes.clone()));
    let client = builder.connect(&scene.url).await.expect("the broker is there");
    let mut changes = client.registry().watch();
    came(&mut changes).await;
    let pending = hold(&client, 1).start().await.expect("on its way");
    let running = soon(arrived.recv()).await.expect("it runs");
    // It is killed, and that is found out by a question within 5 s. The only place among the calls is taken, for 15 s more.
    // The time is virtual.
    let watched = tokio::spawn(async move { changes.next().await });
    tokio::time::sleep(Duration::from_secs(12)).await;
    drop((server, running));
    let gone = tokio::time::timeout(Duration::from_secs(10), watched).await.expect("it is noticed").expect("no panic");
    assert!(matches!(gone, Some(Change::Down { .. })), "{gone:?}");
    drop(pending);
    let notes = notes.lock().expect("no panic");
    assert!(notes.iter().all(|method| method != "hopline.ping"), "{notes:?}");
}
