//! `hopline groups` as a shell sees it.
//!
//! Most of it needs the RabbitMQ that `HOPLINE_TEST_URL` names, and is ignored unless it is asked for.

use hopline::{Context, Replay, Running, Subscription};
use serde_json::{Value, json};
use tokio::sync::mpsc;

mod command;

use command::{Place, hopline, printed, said, soon};

#[test]
fn the_help_tells_what_can_be_done() {
    let help = printed(hopline(&["groups", "--help"]).output().expect("it can be run"));
    for told in ["ls", "lag", "rm", "unbind"] {
        assert!(help.contains(&format!("\n  {told} ")), "no {told} in {help}");
    }
    for arguments in [&["rm"][..], &["lag"], &["unbind", "billing"]] {
        let output = hopline(&["groups"]).args(arguments).output().expect("it can be run");
        assert_eq!(output.status.code(), Some(2), "{output:?}");
    }
}

/// A server of a group, and what it hears.
async fn hear(place: &Place, subscription: Subscription<u64>) -> (Running, mpsc::UnboundedReceiver<u64>) {
    let (tell, heard) = mpsc::unbounded_channel();
    let server = place.server().await.subscribe(subscription, move |_: Context, event: u64| {
        // Where the test does not listen, nobody is told.
        let _ = tell.send(event);
        async {}
    });
    (server.start().await.expect("it can subscribe"), heard)
}

/// Runs `hopline groups` until it prints this.
async fn until(place: &Place, arguments: &[&str], told: &str) -> String {
    soon(async {
        loop {
            let output = place.run_here(arguments).await;
            let printed = String::from_utf8_lossy(&output.stdout).into_owned();
            if printed.contains(told) {
                return printed;
            }
        }
    })
    .await
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: HOPLINE_TEST_URL"]
async fn groups_are_listed_unbound_and_removed() {
    let place = Place::new("groups");
    let none = place.run_here(&["groups", "ls"]).await;
    assert_eq!(
        (none.status.code(), said(&none)),
        (Some(0), format!("there is no group in the namespace `{}`", place.namespace))
    );
    let (old, _) = hear(&place, Subscription::to("order.created").shared("billing")).await;
    let (new, _) = hear(&place, Subscription::to("order.*").shared("billing")).await;
    // It stands in the catalogue soon after it has started.
    until(&place, &["groups", "ls"], "billing  2        0        0         0     -    order.* order.created").await;
    let refused = place.run_here(&["groups", "rm", "billing"]).await;
    assert_eq!(refused.status.code(), Some(2), "{refused:?}");
    assert!(said(&refused).contains("2 instances are subscribed as the group `billing`"), "{refused:?}");
    old.drain().await;
    new.drain().await;
    place.client().await.publish("order.created", &7_u64).await.expect("the broker has it");
    let listed = until(&place, &["groups", "ls"], "billing  0        1 ").await;
    assert!(listed.starts_with("GROUP    SERVERS  WAITING  RETRYING  DEAD  LAG  PATTERNS\n"), "{listed}");
    let unbound = printed(place.run_here(&["groups", "unbind", "billing", "order.created"]).await);
    assert_eq!(unbound, "unbound order.created from billing");
    let wrong = place.run_here(&["groups", "unbind", "billing", "order.created"]).await;
    assert_eq!(wrong.status.code(), Some(2), "{wrong:?}");
    assert!(said(&wrong).contains("no pattern `order.created`: it has `order.*`"), "{wrong:?}");
    let refused = place.run_here(&["groups", "rm", "billing"]).await;
    assert_eq!(refused.status.code(), Some(2), "{refused:?}");
    assert!(said(&refused).contains("1 events wait") && said(&refused).contains("--force"), "{refused:?}");
    let told = place.run_here(&["doctor", "--json"]).await;
    let told = String::from_utf8_lossy(&told.stdout).into_owned();
    assert!(told.contains("nobody of the group `billing` is up, and 1 messages"), "{told}");
    let removed = printed(place.run_here(&["groups", "rm", "billing", "--force"]).await);
    assert_eq!(removed, "removed billing, and 1 messages");
    let gone = place.run_here(&["groups", "lag", "billing"]).await;
    assert_eq!(gone.status.code(), Some(2), "{gone:?}");
    assert!(said(&gone).contains("there is no group `billing`"), "{gone:?}");
}

#[tokio::test]
#[ignore = "needs a RabbitMQ: HOPLINE_TEST_URL"]
async fn the_lag_of_a_replay_is_told() {
    let place = Place::new("lag");
    let (running, mut heard) = hear(&place, Subscription::to("order.*").shared("reports").from(Replay::Start)).await;
    let client = place.client().await;
    for event in 0..5_u64 {
        client.publish("order.created", &event).await.expect("the broker has it");
    }
    for event in 0..5 {
        assert_eq!(soon(heard.recv()).await, Some(event));
    }
    until(&place, &["groups", "ls"], "reports").await;
    running.drain().await;
    for event in 5..8_u64 {
        client.publish("order.created", &event).await.expect("the broker has it");
    }
    let told = until(&place, &["groups", "lag", "reports", "--json"], "\"lag\":3").await;
    let told: Value = serde_json::from_str(&told).expect("JSON");
    assert_eq!(told["replay"], json!({ "next": 5, "last": 7, "lag": 3 }));
    let told = printed(place.run_here(&["groups", "lag", "reports"]).await);
    let lines: Vec<_> = told.lines().map(|line| line.split_whitespace().collect::<Vec<_>>()).collect();
    assert!(lines.contains(&vec!["lag", "3"]) && lines.contains(&vec!["next", "5"]), "{told}");
    printed(place.run_here(&["groups", "rm", "reports"]).await);
}
