//! Policies of a client while workers are lost, busy or out of reach.

use std::future::IntoFuture as _;
use std::time::Duration;

use futures::future::join_all;
use hopline::{BreakerState, Client, Code, Error};

use super::node::shared;
use super::{LONG, is_answered, the_next_call_works, worker};
use crate::proxy::{Direction, Flow, Proxy};
use crate::support::{code, hold, soon};

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn a_call_of_a_lost_worker_is_tried_again_only_if_it_is_idempotent() {
    let node = shared().await;
    let scene = node.scene();
    let proxy = Proxy::to(node.address()).await;
    let (lost, mut here) = worker(&scene.by_way_of(proxy.url()), 2).await;
    let client = scene.client().await;
    let once = hold(&client, 1).retry(3).timeout(LONG).start().await.expect("on its way");
    let again = hold(&client, 2).retry(3).idempotent().timeout(LONG).start().await.expect("on its way");
    let _runs = [soon(here.recv()).await.expect("it runs"), soon(here.recv()).await.expect("it runs")];
    let (staying, mut there) = worker(&scene, 1).await;
    proxy.refuse();
    proxy.cut().await;
    // The other worker does not know that the method is idempotent, so it aborts both.
    let arrival = soon(there.recv()).await.expect("the second attempt runs");
    assert_eq!((arrival.number, arrival.context.redelivered()), (2, false));
    assert_ne!(arrival.context.call_id(), arrival.context.request_id());
    arrival.release();
    assert_eq!(soon(again).await.expect("answered"), 2);
    assert_eq!(code(soon(once).await), Code::Aborted);
    assert!(there.is_empty(), "the other one does not run again");
    assert_eq!(client.policies().retries, 1);
    the_next_call_works(&client, &mut there).await;
    drop((lost, client));
    soon(staying.drain()).await;
    node.nothing_left().await;
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn nothing_is_sent_to_a_service_that_does_not_answer_until_a_probe_does() {
    let node = shared().await;
    let scene = node.scene();
    let proxy = Proxy::to(node.address()).await;
    let (running, mut arrived) = worker(&scene.by_way_of(proxy.url()), 64).await;
    let client =
        Client::builder().namespace(&scene.namespace).breaker().connect(&scene.url).await.expect("it is there");
    the_next_call_works(&client, &mut arrived).await;
    proxy.set(Direction::ToClient, Flow::Stall);
    let quick = || hold(&client, 1).timeout(Duration::from_millis(100));
    let failed = soon(join_all((0..19).map(|_| quick().into_future()))).await;
    assert!(failed.iter().all(|outcome| matches!(outcome, Err(Error::Timeout { .. }))), "{failed:?}");
    // The one that was answered is one of twenty, so there is half and more.
    let before = client.traffic().calls_sent;
    for _ in 0..100 {
        let error = soon(quick().into_future()).await.expect_err("open");
        assert!(matches!(error, Error::CircuitOpen { .. }), "{error:?}");
    }
    assert_eq!(client.traffic().calls_sent, before);
    proxy.set(Direction::ToClient, Flow::Pass);
    // These wait until the breaker lets them through.
    for _ in 0..3 {
        is_answered(hold(&client, super::NEXT).retry(5), &mut arrived).await;
    }
    assert!(client.breakers().iter().all(|breaker| breaker.state == BreakerState::Closed));
    drop(client);
    soon(running.drain()).await;
    node.nothing_left().await;
}
