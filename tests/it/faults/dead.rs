//! Operators look at dead letters while a queue or a node does not answer. They see the rest, and are told what is
//! missing.

use hopline::topology::{self, Declaration, QueueKind};
use hopline::transport::{Confirm, Properties, Publication};
use hopline::{Code, Context, DeadLetters, Error, Fault, Method, Service, WhichLetters};

use super::node::shared;
use crate::cluster::Cluster;
use crate::node::version;
use crate::proxy::{Link, Proxy};
use crate::support::{Scene, soon};

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn dead_letters_can_be_seen_to_while_a_node_is_away_and_say_so_while_most_are() {
    let cluster = Cluster::of_nodes_that_go_on_alone(&version()).await;
    let first = Scene::at(cluster.url(0));
    let third = first.by_way_of(cluster.url(2));
    let refuse = |_: Context, (): ()| async { Err::<(), _>(Fault::new(Code::InvalidArgument, "no address")) };
    let running = first.serve(Service::new("mail", 1).method(Method::new("send").oneway(), refuse)).await;
    // The catalogue is only on the first node.
    soon(async { while first.counts().await.is_empty() {} }).await;
    let client = first.client().await;
    client.oneway("mail", "send", ()).send().await.expect("the broker has it");
    soon(async { while first.counts().await != [("mail.v1".to_owned(), 1)] {} }).await;
    soon(running.drain()).await;
    drop(client);
    let builder = || DeadLetters::builder().namespace(&third.namespace);
    cluster.nodes[0].kill().await;
    let counts = soon(builder().counts(&third.url)).await;
    let catalogue = format!("{}.services", third.namespace);
    assert!(matches!(&counts, Err(Error::Broker { operation, .. }) if operation.contains(&catalogue)), "{counts:?}");
    let queue = format!("{}.mail.v1.dead", third.namespace);
    let is_away = |end: &Error| matches!(end, Error::Broker { operation, .. } if operation.contains(&queue));
    let connect = async |url: &str| soon(builder().connect(url, "mail")).await.expect("a node is there");
    let listed = async {
        loop {
            match connect(&third.url).await.list(10).await {
                Ok(listed) => return listed.letters,
                // The queue is electing a new leader.
                Err(error) => assert!(is_away(&error), "{error}"),
            }
        }
    };
    let [letter] = &soon(listed).await[..] else { panic!("there is one") };
    cluster.nodes[0].start_again().await;
    for node in &cluster.nodes[1..] {
        node.kill().await;
    }
    let counts = soon(builder().counts(&first.url)).await.expect("the catalogue is there");
    // RabbitMQ tells the number that it last knew, or an error; but not that there is none.
    match &counts[..] {
        [(mail, Ok(1))] => assert_eq!(mail, "mail.v1"),
        [(_, Err(error))] => assert!(is_away(error), "{error}"),
        other => panic!("{other:?}"),
    }
    let which = WhichLetters::Ids(vec![letter.id.clone()]);
    let ends = [
        soon(connect(&first.url).await.list(10)).await.map(drop),
        soon(connect(&first.url).await.find(&letter.id)).await.map(drop),
        soon(connect(&first.url).await.replay(&which, |_| {})).await.map(drop),
        soon(connect(&first.url).await.discard(&which, |_| {})).await.map(drop),
    ];
    for end in ends {
        assert!(end.as_ref().is_err_and(is_away), "{end:?}");
    }
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn a_queue_of_dead_letters_that_does_not_answer_keeps_no_other_from_being_counted() {
    let node = shared().await;
    let scene = node.scene();
    let service = |name| {
        Service::new(name, 1).method(Method::new("send").oneway(), |_: Context, (): ()| async { Ok::<_, Fault>(()) })
    };
    let server = scene.server().await.serve(service("mail")).serve(service("post")).start().await;
    let server = server.expect("both are served");
    soon(async { while scene.counts().await.len() < 2 {} }).await;
    let silent = format!("{}.mail.v1.dead", scene.namespace);
    node.answers(&silent, false).await;
    let builder = DeadLetters::builder().namespace(&scene.namespace);
    let counts = soon(builder.counts(&scene.url)).await.expect("the catalogue answers");
    match &counts[..] {
        [(mail, Err(error)), (post, Ok(0))] => {
            assert_eq!([&**mail, &**post], ["mail.v1", "post.v1"]);
            let said = error.to_string();
            assert!(said.contains(&silent) && said.contains("no answer within 8s: start the node"), "{said}");
        }
        other => panic!("{other:?}"),
    }
    node.answers(&silent, true).await;
    soon(server.drain()).await;
    node.delete_queues().await;
    node.nothing_left().await;
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn a_list_that_is_broken_off_has_the_letters_that_were_read() {
    let node = shared().await;
    let scene = node.scene();
    let transport = scene.transport().await;
    let queue = format!("{}.mail.v1.dead", scene.namespace);
    let declared = topology::Queue::new(&queue, QueueKind::Quorum);
    transport.declare(&[Declaration::Queue(declared)]).await.expect("it is new");
    for size in [10, 8_000_000] {
        let (properties, body) = (Properties::default(), vec![0; size].into());
        let publication =
            Publication { exchange: String::new(), key: queue.clone(), mandatory: true, properties, body };
        assert_eq!(soon(transport.publish(publication)).await, Ok(Confirm::Accepted));
    }
    let proxy = Proxy::to(node.address()).await;
    let builder = DeadLetters::builder().namespace(&scene.namespace);
    let dead = builder.connect(&proxy.url(), "mail").await.expect("it is there");
    assert_eq!(dead.list(10).await.expect("they are there").letters.len(), 2);
    // The second letter would take minutes.
    proxy.link(Link::of(50_000));
    let listed = soon(dead.list(10)).await.expect("one can be read");
    assert_eq!(listed.letters.len(), 1);
    match listed.broken_off {
        Some(Error::Broker { operation, reason, .. }) => assert!(operation.contains(&queue), "{operation}: {reason}"),
        other => panic!("{other:?}"),
    }
    drop((dead, proxy));
    node.delete_queues().await;
    transport.close().await;
    node.nothing_left().await;
}
