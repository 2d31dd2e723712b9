//! Rules when the broker or its connections are lost.

use hopline::Client;

use super::node::shared;
use crate::rules::heeds;
use crate::support::soon;

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn a_rule_outlives_the_broker_and_what_was_set_meanwhile_is_heard_afterwards() {
    let node = shared().await;
    let scene = node.scene();
    let heeding = async || {
        let builder = Client::builder().namespace(&scene.namespace).rules();
        soon(builder.connect(&scene.url)).await.expect("the broker is there")
    };
    let client = heeding().await;
    client.rules().set("demo.add", &"timeout=2s".parse().expect("a rule")).await.expect("it may");
    heeds(&client, &["demo.v1.add timeout=2s"]).await;
    node.kill().await;
    heeds(&client, &["demo.v1.add timeout=2s"]).await;
    node.start_again().await;
    let other = heeding().await;
    heeds(&other, &["demo.v1.add timeout=2s"]).await;
    other.rules().set("demo.add", &"retry=1".parse().expect("a rule")).await.expect("it may");
    heeds(&client, &["demo.v1.add timeout=2s retry=1"]).await;
    other.rules().unset("demo.add", &[]).await.expect("it may");
    heeds(&client, &[]).await;
    // Without its stream there are no rules, and the stream is made again.
    other.rules().set("demo", &"retry=1".parse().expect("a rule")).await.expect("it may");
    heeds(&client, &["demo.v1 retry=1"]).await;
    node.delete_queue(&format!("{}.rules", scene.namespace)).await;
    heeds(&client, &[]).await;
    other.rules().set("demo", &"retry=2".parse().expect("a rule")).await.expect("it may");
    heeds(&client, &["demo.v1 retry=2"]).await;
}
