//! Workers that are lost at each moment of a call. The broker notices, and another worker gets the call.

use hopline::{Code, Method, State};

use super::node::shared;
use super::{LONG, ends, on_their_way, the_next_call_works, worker};
use crate::node::Queue;
use crate::proxy::{Direction, Flow, Proxy};
use crate::support::{Held, code, hold, soon};

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn a_call_whose_worker_is_lost_while_it_runs_is_aborted_and_not_run_again() {
    let node = shared().await;
    let scene = node.scene();
    let proxy = Proxy::to(node.address()).await;
    let (lost, mut here) = worker(&scene.by_way_of(proxy.url()), 1).await;
    let client = scene.client().await;
    // One call runs, the other waits in the prefetch of the lost worker. The broker cannot tell the two apart.
    let pending = on_their_way(&client, 0..2).await;
    let _runs = soon(here.recv()).await.expect("it runs");
    let (staying, mut there) = worker(&scene, 1).await;
    proxy.refuse();
    proxy.cut().await;
    for outcome in ends(pending).await {
        assert_eq!(code(outcome), Code::Aborted);
    }
    assert!(there.is_empty(), "neither runs again");
    the_next_call_works(&client, &mut there).await;
    drop((lost, client));
    soon(staying.drain()).await;
    node.nothing_left().await;
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn an_idempotent_call_whose_worker_is_lost_runs_on_another() {
    let node = shared().await;
    let scene = node.scene();
    let proxy = Proxy::to(node.address()).await;
    let held = || Held::of(Method::new("hold").idempotent());
    let Held { service, arrived: mut here } = held();
    let lost = scene.by_way_of(proxy.url()).serve(service.concurrency(1).prefetch(64)).await;
    let client = scene.client().await;
    let mut pending = Vec::new();
    for number in 0..2 {
        pending.push(hold(&client, number).idempotent().timeout(LONG).start().await.expect("on its way"));
    }
    let _runs = soon(here.recv()).await.expect("it runs");
    let Held { service, arrived: mut there } = held();
    let staying = scene.serve(service).await;
    proxy.refuse();
    proxy.cut().await;
    for _ in 0..2 {
        let again = soon(there.recv()).await.expect("it runs again");
        assert!(again.context.redelivered());
        again.release();
    }
    for (number, outcome) in (0..).zip(ends(pending).await) {
        assert_eq!(outcome.expect("nothing but time is lost"), number);
    }
    the_next_call_works(&client, &mut there).await;
    drop((lost, client));
    soon(staying.drain()).await;
    node.nothing_left().await;
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn a_call_whose_worker_is_lost_between_its_reply_and_its_ack_is_answered_once() {
    let node = shared().await;
    let scene = node.scene();
    let proxy = Proxy::to(node.address()).await;
    let (lost, mut here) = worker(&scene.by_way_of(proxy.url()), 1).await;
    let client = scene.client().await;
    let pending = hold(&client, 7).timeout(LONG).start().await.expect("on its way");
    let arrival = soon(here.recv()).await.expect("it runs");
    // The reply is sent, but its confirm does not arrive. Without it the request is not acknowledged.
    proxy.set(Direction::ToClient, Flow::Stall);
    arrival.release();
    assert_eq!(soon(pending).await.expect("answered"), 7);
    let calls = format!("{}.held.v1.calls", scene.namespace);
    let at_the_broker = async |consumers, unacked| {
        let is_so = |queue: &Queue| queue.name == calls && (queue.consumers, queue.unacked) == (consumers, unacked);
        node.queues_when(|queues| queues.iter().any(is_so)).await;
    };
    at_the_broker(1, 1).await;
    let (staying, mut there) = worker(&scene, 1).await;
    proxy.refuse();
    proxy.cut().await;
    // Until the broker notices, it delivers calls to the lost worker as well, and these may have run.
    at_the_broker(1, 0).await;
    the_next_call_works(&client, &mut there).await;
    assert!(there.is_empty(), "it does not run again");
    drop((lost, client));
    soon(staying.drain()).await;
    node.nothing_left().await;
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn a_worker_cut_off_for_longer_than_its_heartbeat_has_lost_its_calls() {
    let node = shared().await;
    let scene = node.scene();
    let proxy = Proxy::to(node.address()).await;
    let (lost, mut here) = worker(&scene.by_way_of(format!("{}?heartbeat=2", proxy.url())), 1).await;
    let client = scene.client().await;
    let pending = on_their_way(&client, 0..1).await;
    let runs = soon(here.recv()).await.expect("it runs");
    let (staying, mut there) = worker(&scene, 1).await;
    proxy.stall();
    for outcome in ends(pending).await {
        assert_eq!(code(outcome), Code::Aborted);
    }
    // Nobody receives this answer any more.
    runs.release();
    proxy.resume();
    soon(lost.state().wait_for(|state| *state == State::Ready)).await.expect("it is told");
    soon(lost.drain()).await;
    the_next_call_works(&client, &mut there).await;
    drop(client);
    soon(staying.drain()).await;
    node.nothing_left().await;
}
