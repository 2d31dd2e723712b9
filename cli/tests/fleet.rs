//! Rules in a fleet of processes, and over a restart of the broker.
//!
//! This needs a RabbitMQ node of the version that `HOPLINE_TEST_NODE` names, and is ignored unless it is asked for.

use std::time::Instant;

use hopline::Client;

mod command;
#[path = "../../tests/node/mod.rs"]
mod node;

use command::{Going, Place, printed, said, soon};
use node::{Node, version};

/// How many servers there are, and as many callers.
const SIDE: usize = 5;
/// A call takes so long, and a caller makes so many, that it takes far longer than a test waits, unless a rule keeps them
/// back.
const SCRIPT: &str = r#"{"method": "wait", "reply": 1, "delay_ms": 100}"#;
const CALLS: &str = "2000";

impl Place {
    async fn servers(&self, file: &str) -> Vec<Going> {
        let mut servers = Vec::new();
        for _ in 0..SIDE {
            let mut server = Going::start(self.here(&["serve", "demo", "--script", file, "--rules", "--quiet"]));
            // Just after a restart of the broker it may have to connect again, and says so.
            while !server.note().await.starts_with("hopline: serving demo.v1") {}
            servers.push(server);
        }
        servers
    }

    /// Waits until so many instances of the service serve, and go by these settings.
    async fn in_force(&self, client: &Client, servers: usize, settings: &[&str]) {
        soon(async {
            loop {
                let told = client.registry().count(servers).instances("demo").await;
                // While the broker is away, there is no answer.
                let rules = told.unwrap_or_default().into_iter().map(|instance| instance.rules.unwrap_or_default());
                let rules = rules.map(|rules| rules.into_iter().map(|rule| rule.settings).collect::<Vec<_>>());
                if rules.filter(|rules| rules == settings).count() == servers {
                    break;
                }
            }
        })
        .await;
    }
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn a_rule_is_in_force_in_ten_processes_survives_a_restart_of_the_broker_and_is_gone_when_it_is_unset() {
    let node = Node::start(&version()).await;
    let scene = Place::at(node.url(), "fleet");
    let file = format!("{}/{}.jsonl", env!("CARGO_TARGET_TMPDIR"), scene.namespace);
    std::fs::write(&file, SCRIPT).expect("it can be written");
    let call = ["call", "demo.wait", "--rules", "--no-check", "--timeout", "5m"];
    let mut servers = scene.servers(&file).await;
    let mut callers: Vec<_> =
        (0..SIDE).map(|_| Going::start(scene.here(&[&call[..], &["--repeat", CALLS]].concat()))).collect();
    let client = scene.client().await;
    // All callers call.
    soon(async {
        loop {
            let stats = client.registry().count(SIDE).stats("demo").await.expect("it is asked");
            if stats.iter().map(|stats| stats.running).sum::<u64>() >= SIDE as u64 {
                break;
            }
        }
    })
    .await;

    printed(scene.run_here(&["rules", "set", "demo", "breaker=open", "server_concurrency=7"]).await);
    let since = Instant::now();
    scene.in_force(&client, SIDE, &["server_concurrency=7"]).await;
    let at_servers = since.elapsed();
    for caller in &mut callers {
        // Its calls fail at once, so it comes to its end.
        let summed = caller.line().await.expect("what became of its calls");
        assert!(summed.starts_with(&format!("{CALLS} calls: ")) && summed.contains("UNAVAILABLE"), "{summed}");
    }
    let at_callers = since.elapsed();
    println!("in force after {at_servers:?} at {SIDE} servers, calls kept back after {at_callers:?} at {SIDE} callers");
    for caller in &mut callers {
        let said = caller.note().await;
        assert!(said.contains("by the rule of `demo.v1` that `guest` has set"), "{said}");
    }

    node.remembers().await;
    node.stop().await;
    node.start_again().await;
    servers.extend(scene.servers(&file).await);
    scene.in_force(&client, 2 * SIDE, &["server_concurrency=7"]).await;
    let refused = scene.run_here(&call).await;
    assert!(said(&refused).contains("by the rule of `demo.v1` that `guest` has set"), "{refused:?}");

    printed(scene.run_here(&["rules", "unset", "demo"]).await);
    scene.in_force(&client, 2 * SIDE, &[]).await;
    assert_eq!(printed(scene.run_here(&call).await), "1");
}
