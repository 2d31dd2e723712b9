//! Commands during an alarm of the broker.
//!
//! This needs a RabbitMQ node of the version that `HOPLINE_TEST_NODE` names, and is ignored unless it is asked for.

use std::time::{Duration, Instant};

mod command;
#[path = "../../tests/node/mod.rs"]
mod node;

use command::hopline;
use node::{Alarm, Node, version};

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn a_command_says_that_an_alarm_blocks_the_broker_and_ends_in_time() {
    let node = Node::with(&version(), "", &[], &[]).await;
    node.memory_alarm(Alarm::On).await;
    for arguments in [&["publish", "order.created", "7"][..], &["call", "demo.add", "[2, 3]"], &["ls"]] {
        let mut command = hopline(&[arguments, &["--timeout", "2s", "--url", node.url()]].concat());
        let began = Instant::now();
        let output = command.output().expect("it can be run");
        let took = began.elapsed();
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        // Before it, the library logs the alarm.
        let stderr = String::from_utf8(output.stderr).expect("it is text");
        let said = stderr.lines().last().unwrap_or_default();
        assert!(said.starts_with("hopline: "), "{stderr}");
        assert!(said.contains("being blocked by an alarm (low on memory): `rabbitmq-diagnostics alarms`"), "{said}");
        assert!(took < Duration::from_millis(2_700), "{arguments:?} took {took:?}");
    }
    node.memory_alarm(Alarm::Off).await;
}
