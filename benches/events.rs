//! Events to one group and to three, confirmed and acknowledged, beside plain lapin doing the same with durable queues.
//!
//! `cargo bench -p hopline-benches --bench events -- --url amqp://localhost` prints how many events a second were published and
//! handled by every group or queue. Both take turns in each round. Publisher and consumers are in this process, with a
//! connection each.

use std::env;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures::future::try_join_all;
use futures::{StreamExt, TryStreamExt, stream};
use hopline::transport::{Role, Transport};
use hopline::{Client, Context, Published, Server, Subscription};
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions,
    ExchangeDeclareOptions, ExchangeDeleteOptions, QueueBindOptions, QueueDeclareOptions, QueueDeleteOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Confirmation, Connection, ConnectionProperties, ExchangeKind};
use tokio::sync::Notify;

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
    println!("| groups | lapin, events/s | Hopline, events/s | ratio |\n| --- | ---: | ---: | ---: |");
    for queues in [1, 3] {
        let (mut lapin, mut hopline, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
        // The first round warms up.
        for round in 0..=ROUNDS {
            let rate = |took: Duration| EVENTS as f64 / took.as_secs_f64();
            let (one, other) = (rate(with_lapin(url, queues).await?), rate(with_hopline(url, queues).await?));
            if round > 0 {
                lapin.push(one);
                hopline.push(other);
                ratios.push(other / one);
            }
        }
        let [lapin, hopline, ratio] = [&mut lapin, &mut hopline, &mut ratios].map(|numbers| middle(numbers));
        println!("| {queues} | {lapin:.0} | {hopline:.0} | {ratio:.1} |");
    }
    Ok(())
}

fn middle(numbers: &mut [f64]) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers[numbers.len() / 2]
}

/// The same by groups of Hopline, each with one instance.
async fn with_hopline(url: &str, groups: usize) -> Result<Duration, Failure> {
    let namespace = format!("bench-{}", std::process::id());
    let (mut instances, mut all_handled) = (Vec::new(), Vec::new());
    for group in 0..groups {
        let (left, all) = (Arc::new(AtomicUsize::new(EVENTS)), Arc::new(Notify::new()));
        let told = all.clone();
        let group = Subscription::to(PATTERN).shared(format!("group{group}")).prefetch(PREFETCH);
        let server = Server::builder().namespace(&namespace).connect(url).await?;
        let server = server.subscribe(group, move |_: Context, _: serde_bytes::ByteBuf| {
            if left.fetch_sub(1, Ordering::Relaxed) == 1 {
                told.notify_one();
            }
            async {}
        });
        instances.push(server.start().await?);
        all_handled.push(all);
    }
    let client = Client::builder().namespace(&namespace).connect(url).await?;
    let payload = serde_bytes::ByteBuf::from(vec![b'x'; PAYLOAD]);

    let since = Instant::now();
    let publish = async |_| match client.publish(KEY, &payload).required().await? {
        Published::ToAll => Ok::<_, Failure>(()),
        other => Err(Failure::from(format!("not every group has an event: {other:?}"))),
    };
    stream::iter(0..EVENTS).map(publish).buffer_unordered(AT_ONCE).try_for_each(|()| async { Ok(()) }).await?;
    for all in all_handled {
        all.notified().await;
    }
    let took = since.elapsed();

    for instance in instances {
        instance.drain().await;
    }
    let transport = Transport::connect(url, Role::Client).await?;
    for queue in
        (0..groups).flat_map(|group| ["work", "retry", "dead"].map(|role| format!("group:group{group}.{role}")))
    {
        transport.delete(&format!("{namespace}.{queue}")).await?;
    }
    transport.delete(&format!("{namespace}.services")).await?;
    transport.close().await;
    Ok(took)
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
