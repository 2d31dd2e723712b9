//! Instances that are lost while somebody watches, on a broker that tells which queues it deletes.

use std::time::Duration;

use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use hopline::transport::{Confirm, Properties, Publication, Transport};
use hopline::{Change, Client};
use tokio::time::interval;

use crate::node::{Node, version};
use crate::proxy::Proxy;
use crate::stranger::overheard;
use crate::support::{Calculator, MathServer, Scene, soon};

/// How often somebody else says that an instance is there. It is asked only if nothing was heard of it for 5 s.
const OFTEN: Duration = Duration::from_millis(200);

/// Says again and again what an instance has announced.
async fn announce(transport: &Transport, exchange: String, said: Bytes) {
    let mut times = interval(OFTEN);
    loop {
        times.tick().await;
        let publication = Publication {
            exchange: exchange.clone(),
            key: "tell".to_owned(),
            mandatory: false,
            properties: Properties::default(),
            body: said.clone(),
        };
        assert_eq!(transport.publish(publication).await, Ok(Confirm::Accepted));
    }
}

async fn came(changes: &mut (impl Stream<Item = Change> + Unpin)) -> String {
    match soon(changes.next()).await {
        Some(Change::Up(info)) => info.instance,
        other => panic!("{other:?}"),
    }
}

async fn gone(changes: &mut (impl Stream<Item = Change> + Unpin)) -> String {
    match soon(changes.next()).await {
        Some(Change::Down { instance, .. }) => instance,
        other => panic!("{other:?}"),
    }
}

async fn with_events() -> Node {
    Node::with(&version(), "", &[], &["rabbitmq_event_exchange"]).await
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn one_whose_connection_is_cut_is_told_by_the_broker_though_somebody_says_that_it_is_there() {
    let node = with_events().await;
    let scene = Scene::at(node.url());
    let transport = scene.transport().await;
    let exchange = format!("{}.discovery", scene.namespace);
    let client = scene.client().await;
    let mut announced = overheard(&transport, &exchange, "tell").await;
    let proxy = Proxy::to(node.address()).await;
    let server = scene.by_way_of(proxy.url()).serve(MathServer::new(Calculator)).await;
    let said = soon(announced.next()).await.expect("it announces that it is up").body;
    let mut changes = client.registry().watch();
    let instance = came(&mut changes).await;
    assert_eq!(instance, server.instance());
    // As long as this goes on, the watch has no reason of its own to ask the instance.
    let announcing = announce(&transport, exchange, said);
    let told = async {
        proxy.refuse();
        proxy.cut().await;
        gone(&mut changes).await
    };
    tokio::select! {
        () = announcing => unreachable!("it goes on"),
        gone = told => assert_eq!(gone, instance),
    }
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn one_that_is_back_with_another_queue_is_not_gone() {
    let node = with_events().await;
    let scene = Scene::at(node.url());
    let client = scene.client().await;
    let server = scene.serve(MathServer::new(Calculator)).await;
    let (instance, namespace) = (server.instance().to_owned(), &scene.namespace);
    let mut changes = client.registry().watch();
    assert_eq!(came(&mut changes).await, instance);
    // A queue that is of the instance by its name, and goes. The watch asks, and the instance replies.
    let old = format!("{namespace}.math.v1@{instance}.old");
    let resource = format!("rabbit_misc:r(<<\"/\">>, queue, <<\"{old}\">>)");
    node.eval(&format!("{{new, Q}} = rabbit_amqqueue:declare({resource}, false, false, [], none, <<\"it\">>), ok."))
        .await;
    node.delete_queue(&old).await;
    // Nothing else comes before the next change, which is real.
    let next = scene.serve(MathServer::new(Calculator)).await;
    assert_eq!(came(&mut changes).await, next.instance());
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn a_user_who_may_not_hear_of_deleted_queues_misses_one_that_is_lost_all_the_same() {
    let node = with_events().await;
    node.ctl(&["add_user", "bob", "bob"]).await;
    node.ctl(&["set_permissions", "bob", ".*", ".*", "^(?!amq\\.rabbitmq\\.).*"]).await;
    let scene = Scene::at(node.url());
    let url = format!("amqp://bob:bob@{}", node.authority());
    let client = Client::builder().namespace(&scene.namespace).connect(&url).await.expect("bob may");
    let mut changes = client.registry().watch();
    let server = scene.serve(MathServer::new(Calculator)).await;
    let instance = came(&mut changes).await;
    assert_eq!(instance, server.instance());
    let sum: i64 = client.call("math", "add", (2, 3)).await.expect("its connection is well");
    assert_eq!(sum, 5);
    drop(server);
    assert_eq!(gone(&mut changes).await, instance);
}
