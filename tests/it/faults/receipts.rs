//! A hundred thousand publications, of which many reach no queue: each has its own outcome.

use futures::stream::{FuturesOrdered, StreamExt as _};
use hopline::topology::{Declaration, Queue, QueueKind};
use hopline::transport::{Confirm, Mode, Properties, Publication};

use super::node::shared;
use crate::support::soon;

/// How many publications there are.
const COUNT: usize = 100_000;
/// How many of them are not confirmed at once, at most.
const IN_FLIGHT: usize = 5_000;

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn each_of_many_receipts_is_right_however_many_messages_reach_no_queue() {
    let node = shared().await;
    let scene = node.scene();
    let transport = scene.transport().await;
    let there = format!("{}.there", scene.namespace);
    soon(transport.declare(&[Declaration::Queue(Queue::new(&there, QueueKind::Exclusive))])).await.expect("declared");
    let mut consumer = soon(transport.consume(&there, Mode::NoAck)).await.expect("it is ours");
    for (place, lost_of_20) in [1, 4, 10, 19, 20].into_iter().enumerate() {
        let is_lost = |number: usize| number * 7 % 20 < lost_of_20;
        let publish = |number: usize| {
            let key = if is_lost(number) { "hopline.nowhere".to_owned() } else { there.clone() };
            transport.publish(Publication {
                exchange: String::new(),
                key,
                mandatory: true,
                properties: Properties::default(),
                body: number.to_string().into(),
            })
        };
        let (mut receipts, mut next, mut checked) = (FuturesOrdered::new(), 0, 0);
        let numbers = COUNT / 5;
        while checked < numbers {
            while next < numbers && receipts.len() < IN_FLIGHT {
                receipts.push_back(publish(next));
                next += 1;
            }
            let outcome = soon(receipts.next()).await.expect("there is one");
            let expected = if is_lost(checked) { Confirm::Returned } else { Confirm::Accepted };
            assert_eq!(outcome, Ok(expected), "publication {checked} of part {place}");
            checked += 1;
        }
        for number in (0..numbers).filter(|number| !is_lost(*number)) {
            let delivery = soon(consumer.next()).await.expect("it has arrived");
            assert_eq!(delivery.body, number.to_string());
        }
    }
    soon(transport.close()).await;
}
