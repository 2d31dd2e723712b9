//! Queues that do not answer, for example since their node is down. Nothing else waits for them, and each is asked one
//! question at a time.

use std::future::IntoFuture as _;
use std::time::Duration;

use hopline::topology::{Declaration, Queue, QueueKind};
use hopline::transport::{Mode, Role, Settle, Transport};
use hopline::{Context, Fault, Service, State};
use tokio::time::Instant;

use super::LONG;
use super::node::shared;
use crate::support::{Calculator, MathClient, MathServer, soon};

fn service(number: usize) -> Service {
    let answer = |_: Context, (n,): (u64,)| async move { Ok::<_, Fault>(n) };
    Service::new(&format!("s{number}"), 1).method("answer", answer).grace(LONG)
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn a_server_starts_without_many_queues_that_do_not_answer_and_asks_each_once() {
    const SILENT: usize = 40;
    let node = shared().await;
    let scene = node.scene();
    // The queues outlive this server.
    let server = (0..SILENT).fold(scene.server().await, |server, number| server.serve(service(number)));
    soon(server.start().await.expect("all are new").drain()).await;
    let calls = |number: usize| format!("{}.s{number}.v1.calls", scene.namespace);
    let silent: Vec<_> = (0..SILENT).map(calls).collect();
    node.all_answer(&silent, false).await;

    let server = (0..SILENT).fold(scene.server().await, |server, number| server.serve(service(number)));
    let begun = Instant::now();
    let running = server.serve(MathServer::new(Calculator)).start().await.expect("it serves the rest");
    let took = begun.elapsed();
    // The server waits up to 10 s for the first answer and for the next one, and only shortly for the others after
    // that.
    assert!(took < Duration::from_secs(25), "{took:?}");
    let client = scene.client().await;
    assert_eq!(soon(MathClient::new(&client).add(1, 2).into_future()).await.expect("answered"), 3);
    match &*running.state().borrow() {
        State::Degraded { reason, .. } => {
            let named = silent.iter().any(|queue| reason.contains(queue));
            assert!(named && reason.contains("has not answered") && reason.contains("cluster_status"), "{reason}");
        }
        other => panic!("{other:?}"),
    }
    for number in [0, SILENT - 1] {
        assert_eq!(node.untold(&silent[number], "$gen_call").await, 1, "it was asked once");
    }
    node.all_answer(&silent, true).await;
    let mut state = running.state();
    soon(state.wait_for(|state| *state == State::Ready)).await.expect("it serves");
    for number in [0, SILENT - 1] {
        let call = client.call::<u64>(&format!("s{number}"), "answer", (7_u64,));
        assert_eq!(soon(call.into_future()).await.expect("answered"), 7);
    }
    soon(running.drain()).await;
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn a_connection_closes_though_it_has_asked_what_is_not_answered() {
    let node = shared().await;
    let scene = node.scene();
    let queue = |name: &str| Declaration::Queue(Queue::new(format!("{}.{name}", scene.namespace), QueueKind::Classic));
    let (silent, other) = (format!("{}.silent", scene.namespace), format!("{}.other", scene.namespace));
    let transport = scene.transport().await;
    transport.declare(&[queue("silent"), queue("other")]).await.expect("new queues");
    let publication = hopline::transport::Publication {
        exchange: String::new(),
        key: other.clone(),
        mandatory: true,
        properties: hopline::transport::Properties::default(),
        body: "held".into(),
    };
    transport.publish(publication).await.expect("it is connected");
    node.answers(&silent, false).await;
    for (asked, is_closed) in (1..).zip([false, true]) {
        let leaving = Transport::connect(&scene.url, Role::Server).await.expect("the broker is there");
        let mut consumer = leaving.consume(&other, Mode::Settle { prefetch: 1 }).await.expect("it is there");
        let held = soon(consumer.next()).await.expect("it is ready");
        // Nobody waits for these answers, which never come.
        let questions = [(); 3].map(|()| leaving.clone());
        let [declaring, counting, getting] = questions;
        let (parts, [one, two]) = ([queue("silent")], [silent.clone(), silent.clone()]);
        let asking = [
            tokio::spawn(async move { declaring.declare_however_long(&parts).await.is_ok() }),
            tokio::spawn(async move { counting.count(&one).await.is_ok() }),
            tokio::spawn(async move { getting.get(&two).await.is_ok() }),
        ];
        crate::node::when(async || node.untold(&silent, "$gen_call").await, |untold| *untold >= 3 * asked).await;
        if is_closed {
            let begun = Instant::now();
            leaving.close().await;
            let took = begun.elapsed();
            // This is how long the broker may take to confirm publications.
            assert!(took < Duration::from_secs(5), "{took:?}");
        }
        asking.iter().for_each(tokio::task::JoinHandle::abort);
        drop((leaving, consumer));
        // Other consumers get what it had.
        let mut next = transport.consume(&other, Mode::Settle { prefetch: 1 }).await.expect("it is there");
        soon(next.next()).await.expect("it came back").settle(if is_closed { Settle::Ack } else { Settle::GiveBack });
        drop(held);
    }
    node.answers(&silent, true).await;
    drop(transport);
    node.nothing_left().await;
}
