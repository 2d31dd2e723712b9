//! Events to one and to three durable queues, confirmed and acknowledged, by plain lapin.
//!
//! `cargo bench -p hopline-benches --bench events -- --url amqp://localhost` prints how many events a second were published and
//! handled by every queue. Publisher and consumers are in this process, with a connection each.

use std::env;
use std::time::{Duration, Instant};

use futures::future::try_join_all;
use futures::{StreamExt, TryStreamExt, stream};
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions,
    ExchangeDeclareOptions, ExchangeDeleteOptions, QueueBindOptions, QueueDeclareOptions, QueueDeleteOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Confirmation, Connection, ConnectionProperties, ExchangeKind};

type Failure = Box<dyn std::error::Error + Send + Sync>;

const ROUNDS: usize = 11;
/// How many events are published in a round.
const EVENTS: usize = 10_000;
/// How many of them await their confirm at once.
const AT_ONCE: usize = 256;
/// How many a consumer has at once.
const PREFETCH: u16 = 256;
/// What an event has, in bytes.
const PAYLOAD: usize = 128;
/// The key of the events, and the pattern of the queues.
const KEY: &str = "bench.happened";
const PATTERN: &str = "bench.*";
const EXCHANGE: &str = "hopline-bench.lapin.events";
/// The delivery mode of a message that survives the broker.
const PERSISTENT: u8 = 2;

const USAGE: &str = "usage: cargo bench -p hopline-benches --bench events -- --url URL";

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let arguments: Vec<_> = env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let [flag, url] = &*arguments else { return Err(USAGE.into()) };
    if flag != "--url" {
        return Err(USAGE.into());
    }
    println!("| queues | lapin, events/s |\n| --- | ---: |");
    for queues in [1, 3] {
        let mut lapin = Vec::new();
        // The first round warms up.
        for round in 0..=ROUNDS {
            let rate = EVENTS as f64 / with_lapin(url, queues).await?.as_secs_f64();
            if round > 0 {
                lapin.push(rate);
            }
        }
        println!("| {queues} | {:.0} |", middle(&mut lapin));
    }
    Ok(())
}

fn middle(numbers: &mut [f64]) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers[numbers.len() / 2]
}

/// How long it takes until every event is confirmed, and handled from each queue.
async fn with_lapin(url: &str, queues: usize) -> Result<Duration, Failure> {
    let consuming = Connection::connect(url, ConnectionProperties::default()).await?;
    let setting = consuming.create_channel().await?;
    let topic = (ExchangeKind::Topic, ExchangeDeclareOptions { durable: true, ..Default::default() });
    setting.exchange_declare(EXCHANGE.into(), topic.0, topic.1, FieldTable::default()).await?;
    let names: Vec<_> = (0..queues).map(|number| format!("{EXCHANGE}.{number}")).collect();
    let mut consumers = Vec::new();
    for name in &names {
        let mut quorum = FieldTable::default();
        quorum.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
        // A run that was broken off may have left some events.
        setting.queue_delete(name.as_str().into(), QueueDeleteOptions::default()).await?;
        setting.queue_declare(name.as_str().into(), QueueDeclareOptions::durable(), quorum).await?;
        let bound = QueueBindOptions::default();
        setting.queue_bind(name.as_str().into(), EXCHANGE.into(), PATTERN.into(), bound, FieldTable::default()).await?;
        let channel = consuming.create_channel().await?;
        channel.basic_qos(PREFETCH, BasicQosOptions::default()).await?;
        let options = BasicConsumeOptions::default();
        consumers.push(
            channel.basic_consume(name.as_str().into(), name.as_str().into(), options, FieldTable::default()).await?,
        );
    }
    let publishing = Connection::connect(url, ConnectionProperties::default()).await?;
    let channel = publishing.create_channel().await?;
    channel.confirm_select(ConfirmSelectOptions::default()).await?;

    let since = Instant::now();
    let handled = consumers.into_iter().map(|consumer| {
        tokio::spawn(async move {
            let acks = consumer.take(EVENTS).map(|delivery| async { delivery?.ack(BasicAckOptions::default()).await });
            acks.buffer_unordered(usize::from(PREFETCH)).try_for_each(|_| async { Ok(()) }).await
        })
    });
    let handled: Vec<_> = handled.collect();
    let payload = vec![b'x'; PAYLOAD];
    let publish = async |_| {
        let properties = BasicProperties::default().with_delivery_mode(PERSISTENT);
        let published =
            channel.basic_publish(EXCHANGE.into(), KEY.into(), BasicPublishOptions::default(), &payload, properties);
        match published.await?.await? {
            Confirmation::Ack(None) => Ok(()),
            other => Err(Failure::from(format!("the broker has not taken an event: {other:?}"))),
        }
    };
    stream::iter(0..EVENTS).map(publish).buffer_unordered(AT_ONCE).try_for_each(|()| async { Ok(()) }).await?;
    for consumer in try_join_all(handled).await? {
        consumer?;
    }
    let took = since.elapsed();

    for name in &names {
        setting.queue_delete(name.as_str().into(), QueueDeleteOptions::default()).await?;
    }
    setting.exchange_delete(EXCHANGE.into(), ExchangeDeleteOptions::default()).await?;
    publishing.close(200, "done".into()).await?;
    consuming.close(200, "done".into()).await?;
    Ok(took)
}
