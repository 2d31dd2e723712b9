//! Deleted exchanges. No publication is reported as delivered if it was not, and what can be repaired is repaired.

use hopline::{Error, State};

use super::node::shared;
use super::{LONG, worker};
use crate::node::Node;
use crate::support::{Calculator, MathClient, MathServer, hold, soon};

impl Node {
    /// Binds a queue, also another connection's exclusive one.
    async fn bind(&self, exchange: &str, key: &str, queue: &str) {
        let resource = |kind, name| format!("rabbit_misc:r(<<\"/\">>, {kind}, <<\"{name}\">>)");
        let (exchange, queue) = (resource("exchange", exchange), resource("queue", queue));
        let binding = format!("{{binding, {exchange}, <<\"{key}\">>, {queue}, []}}");
        let done = self.eval(&format!("rabbit_binding:add({binding}, <<\"it\">>).")).await;
        assert_eq!(done.trim(), "ok", "{key}");
    }

    async fn exchanges(&self) -> String {
        self.ctl(&["list_exchanges", "name"]).await
    }
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn an_event_whose_exchange_is_gone_reaches_nobody_and_says_so_once() {
    let node = shared().await;
    let scene = node.scene();
    let client = scene.client().await;
    client.publish("order.created", &1).await.expect("the broker has it");
    let exchange = format!("{}.events", scene.namespace);
    for event in [client.publish("order.created", &2), client.publish("order.created", &2).confirmed()] {
        node.delete_exchange(&exchange).await;
        match soon(event).await {
            Err(Error::Broker { operation, reason, .. }) => {
                assert!(operation.contains(&exchange) && reason.contains("declared again"), "{operation}: {reason}");
            }
            other => panic!("nobody got it: {other:?}"),
        }
    }
    soon(client.publish("order.created", &3)).await.expect("it is there again");
    assert!(node.exchanges().await.contains(&exchange));
    assert_eq!(*client.state().borrow(), State::Ready);
    drop(client);
    node.nothing_left().await;
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn a_broadcast_whose_exchange_is_gone_reaches_nobody_and_the_next_call_is_as_good_as_ever() {
    let node = shared().await;
    let scene = node.scene();
    let running = scene.serve(MathServer::new(Calculator)).await;
    let client = scene.client().await;
    let math = MathClient::new(&client);
    assert_eq!(math.add(1, 2).await.expect("answered"), 3);
    node.delete_exchange(&format!("{}.rpc", scene.namespace)).await;
    // The first call to find out may be told that its channel was closed.
    let told = async {
        loop {
            match math.whoami().all().gather(LONG).await {
                Err(Error::NoService { service, .. }) => break assert_eq!(service, "math.v1"),
                Err(Error::Disconnected { .. }) => {}
                other => panic!("{other:?}"),
            }
        }
    };
    soon(told).await;
    drop((client, math, running));
    node.nothing_left().await;
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn broadcasts_to_services_that_nobody_serves_leave_no_exchange() {
    let node = shared().await;
    let scene = node.scene();
    let client = scene.client().await;
    let before = node.exchanges().await;
    for number in 0..10 {
        let call = client.call::<()>(&format!("made-up-{number}"), "call", [(); 0]);
        call.all().gather(LONG).await.expect_err("nobody serves it");
    }
    assert_eq!(node.exchanges().await, before);
    drop(client);
    node.nothing_left().await;
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn a_cancel_whose_exchange_is_gone_arrives_once_it_is_back() {
    let node = shared().await;
    let scene = node.scene();
    let (running, mut arrivals) = worker(&scene, 1).await;
    let client = scene.client().await;
    let pending = hold(&client, 1).timeout(LONG).start().await.expect("on its way");
    let runs = soon(arrivals.recv()).await.expect("it runs");
    let own = format!("{}.held.v1@", scene.namespace);
    let queues = node.queues_when(|queues| queues.iter().any(|queue| queue.name.starts_with(&own))).await;
    let own = queues.into_iter().find(|queue| queue.name.starts_with(&own)).expect("it is there").name;
    let exchange = format!("{}.rpc", scene.namespace);
    node.delete_exchange(&exchange).await;
    drop(pending);
    // A new client declares the exchange, but only the server can bind its queues again.
    let other = scene.client().await;
    for instance in ["*", running.instance()] {
        node.bind(&exchange, &format!("held.v1@{instance}"), &own).await;
    }
    soon(runs.context.cancelled()).await;
    drop((client, other, running));
    node.nothing_left().await;
}
