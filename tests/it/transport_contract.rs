//! The contract of the transport: what every broker promises. It is checked on the broker that `HOPLINE_TEST_URL` names, or
//! in memory.

use std::collections::BTreeSet;
use std::future::Future;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures::FutureExt as _;
use hopline::Error;
use hopline::topology::{Binding, Declaration, Exchange, ExchangeKind, Queue, QueueKind};
use hopline::transport::{
    Confirm, Consumer, ConsumerEnd, Delivery, Loss, Lost, Mode, Properties, Publication, Receipt, Role, Settle,
    StreamStart, Transport,
};
use uuid::Uuid;

use crate::support::{PATIENCE, Scene, after_polls};

const DIRECT: &str = "contract.direct";
const TOPIC: &str = "contract.topic";
const FANOUT: &str = "contract.fanout";

/// A broker, to which a test opens several connections.
struct Broker {
    url: String,
}

impl Broker {
    fn new() -> Self {
        Self { url: Scene::new().url }
    }

    /// A connection, with the exchanges of this suite declared.
    async fn connect(&self) -> Transport {
        let transport = soon(Transport::connect(&self.url, Role::Client)).await.expect("a broker that answers");
        let exchanges = [(DIRECT, ExchangeKind::Direct), (TOPIC, ExchangeKind::Topic), (FANOUT, ExchangeKind::Fanout)];
        for (name, kind) in exchanges {
            declare(&transport, Declaration::Exchange(Exchange { name: name.into(), kind })).await;
        }
        transport
    }
}

/// Waits for an event that has to come. The limit only turns a hang into a failure.
#[track_caller]
fn soon<F: Future>(event: F) -> impl Future<Output = F::Output> {
    let caller = std::panic::Location::caller();
    async move {
        let outcome = tokio::time::timeout(PATIENCE, event).await;
        outcome.unwrap_or_else(|_| panic!("what {caller} waits for never happened"))
    }
}

fn unique(name: &str) -> String {
    format!("contract.{name}.{}", Uuid::new_v4().simple())
}

/// A queue with a name of its own. It is deleted a minute after its test.
fn queue(kind: QueueKind) -> Queue {
    let expires = (kind != QueueKind::Exclusive).then_some(Duration::from_secs(60));
    Queue { expires, ..Queue::new(unique("queue"), kind) }
}

async fn declare(transport: &Transport, part: Declaration) {
    soon(transport.declare(&[part])).await.expect("a declaration that the broker takes");
}

/// Declares a queue and returns its name.
async fn declared(transport: &Transport, queue: Queue) -> String {
    let name = queue.name.clone();
    declare(transport, Declaration::Queue(queue)).await;
    name
}

async fn bind(transport: &Transport, exchange: &str, key: &str, queue: &str) {
    let binding = Binding { exchange: exchange.into(), key: key.into(), queue: queue.into() };
    declare(transport, Declaration::Binding(binding)).await;
}

/// Declares a queue for dead letters; returns its name and what to put in [`Queue::dead_letter`].
async fn dead_letters(transport: &Transport) -> (String, Option<(String, String)>) {
    let name = declared(transport, queue(QueueKind::Exclusive)).await;
    bind(transport, DIRECT, &name, &name).await;
    (name.clone(), Some((DIRECT.into(), name)))
}

/// A mandatory message.
fn message(exchange: &str, key: &str, body: impl Into<String>) -> Publication {
    Publication {
        exchange: exchange.into(),
        key: key.into(),
        mandatory: true,
        properties: Properties::default(),
        body: Bytes::from(body.into()),
    }
}

fn to_queue(queue: &str, body: impl Into<String>) -> Publication {
    message("", queue, body)
}

fn expiring(queue: &str, body: &str, milliseconds: u64) -> Publication {
    let expiration = Some(Duration::from_millis(milliseconds));
    Publication { properties: Properties { expiration, ..Properties::default() }, ..to_queue(queue, body) }
}

async fn outcome(receipt: Receipt) -> Result<Confirm, Lost> {
    soon(receipt).await
}

async fn accepted(transport: &Transport, publication: Publication) {
    assert_eq!(outcome(transport.publish(publication)).await, Ok(Confirm::Accepted));
}

async fn fill(transport: &Transport, queue: &str, bodies: &[&str]) {
    for body in bodies {
        accepted(transport, to_queue(queue, *body)).await;
    }
}

async fn consume(transport: &Transport, queue: &str, mode: Mode) -> Consumer {
    soon(transport.consume(queue, mode)).await.expect("a queue to consume")
}

async fn consume_up_to(transport: &Transport, queue: &str, prefetch: u16) -> Consumer {
    consume(transport, queue, Mode::Settle { prefetch }).await
}

async fn next(consumer: &mut Consumer) -> Delivery {
    soon(consumer.next()).await.expect("a consumer that goes on")
}

fn text(delivery: &Delivery) -> String {
    String::from_utf8(delivery.body.to_vec()).expect("bodies of this suite are text")
}

/// The next `count` deliveries, left unsettled.
async fn take(consumer: &mut Consumer, count: usize) -> Vec<Delivery> {
    let mut deliveries = Vec::new();
    for _ in 0..count {
        deliveries.push(next(consumer).await);
    }
    deliveries
}

fn texts(deliveries: &[Delivery]) -> Vec<String> {
    deliveries.iter().map(text).collect()
}

/// Checks that nothing else was in the queue: this marker is the next message that the consumer gets.
async fn nothing_more(transport: &Transport, queue: &str, consumer: &mut Consumer) {
    let marker = unique("marker");
    accepted(transport, to_queue(queue, marker.clone())).await;
    let delivery = next(consumer).await;
    assert_eq!(text(&delivery), marker);
    delivery.settle(Settle::Ack);
}

// Streams: everybody gets everything.

#[tokio::test]
async fn a_stream_keeps_its_messages_and_gives_them_to_every_consumer() {
    let transport = Broker::new().connect().await;
    let stream = Queue { max_bytes: Some(16 * 1024 * 1024), ..stream() };
    let queue = declared(&transport, stream.clone()).await;
    declare(&transport, Declaration::Queue(stream)).await;
    let reading = |from| Mode::Stream { from, prefetch: 2 };
    let mut early = consume(&transport, &queue, reading(StreamStart::Last)).await;
    let words = ["a", "b", "c", "d", "e"];
    fill(&transport, &queue, &words).await;
    let mut late = consume(&transport, &queue, reading(StreamStart::First)).await;
    for reader in [&mut early, &mut late] {
        for word in words {
            let delivery = next(reader).await;
            assert_eq!(text(&delivery), word);
            delivery.settle(Settle::Ack);
        }
    }
    let mut last = consume(&transport, &queue, reading(StreamStart::Last)).await;
    assert_eq!(text(&next(&mut last).await), "e");
    fill(&transport, &queue, &["f"]).await;
    for reader in [&mut early, &mut late, &mut last] {
        assert_eq!(text(&next(reader).await), "f");
    }
}

fn stream() -> Queue {
    Queue::new(unique("stream"), QueueKind::Stream)
}

/// A stream that is deleted by the test: streams do not expire.
struct KeptStream {
    transport: Transport,
    name: String,
}

impl KeptStream {
    async fn new(arguments: Queue) -> Self {
        let transport = Broker::new().connect().await;
        let name = declared(&transport, arguments).await;
        Self { transport, name }
    }

    async fn read(&self, from: StreamStart, prefetch: u16) -> Consumer {
        consume(&self.transport, &self.name, Mode::Stream { from, prefetch }).await
    }

    /// Writes a message with each of these numbers.
    async fn write(&self, numbers: std::ops::Range<u64>) {
        for number in numbers {
            accepted(&self.transport, to_queue(&self.name, number.to_string())).await;
        }
    }

    /// The same, but some of them are written together.
    async fn write_together(&self, numbers: std::ops::Range<u64>) {
        let publications = numbers.map(|number| to_queue(&self.name, number.to_string()));
        let receipts: Vec<_> = publications.map(|publication| self.transport.publish(publication)).collect();
        for receipt in receipts {
            assert_eq!(outcome(receipt).await, Ok(Confirm::Accepted));
        }
    }

    async fn delete(self) {
        assert!(soon(self.transport.delete(&self.name)).await.expect("its owner may").is_some());
    }
}

/// The next message of a stream, which is its offset in words.
async fn next_number(consumer: &mut Consumer) -> u64 {
    let delivery = next(consumer).await;
    let offset = delivery.offset.expect("it comes from a stream");
    assert_eq!(text(&delivery), offset.to_string());
    delivery.settle(Settle::Ack);
    offset
}

#[tokio::test]
async fn a_consumer_of_a_stream_begins_where_it_says_and_is_told_where_each_message_is() {
    let stream = KeptStream::new(stream()).await;
    let (past, future) = (SystemTime::UNIX_EPOCH, SystemTime::now() + Duration::from_secs(3600));
    // It waits for a message that is not written yet, and leaves out those before.
    let mut ahead = stream.read(StreamStart::Offset(8), 1).await;
    stream.write(0..6).await;
    let starts = [
        (StreamStart::First, 0),
        (StreamStart::Offset(0), 0),
        (StreamStart::Offset(3), 3),
        (StreamStart::Offset(5), 5),
        (StreamStart::Time(past), 0),
    ];
    for (from, expected) in starts {
        let mut consumer = stream.read(from, 2).await;
        for offset in expected..6 {
            assert_eq!(next_number(&mut consumer).await, offset, "{from:?}");
        }
    }
    // Of a time when nothing was written yet, the next message is the first.
    let mut late = stream.read(StreamStart::Time(future), 2).await;
    let mut never = stream.read(StreamStart::Offset(u64::MAX), 2).await;
    stream.write(6..10).await;
    for offset in 6..10 {
        assert_eq!(next_number(&mut late).await, offset);
    }
    for offset in 8..10 {
        assert_eq!(next_number(&mut ahead).await, offset);
    }
    assert!(never.next().now_or_never().is_none());
    stream.delete().await;
}

#[tokio::test]
async fn a_consumer_from_a_time_on_gets_everything_that_was_written_since() {
    let stream = KeptStream::new(stream()).await;
    stream.write(0..3).await;
    let since = SystemTime::now();
    stream.write(3..6).await;
    let mut consumer = stream.read(StreamStart::Time(since), 10).await;
    let first = next_number(&mut consumer).await;
    // RabbitMQ may begin earlier.
    assert!(first <= 3, "{first}");
    for offset in first + 1..6 {
        assert_eq!(next_number(&mut consumer).await, offset);
    }
    stream.delete().await;
}

#[tokio::test]
async fn a_consumer_of_a_stream_gets_more_as_it_acknowledges_in_any_order_or_some_never() {
    let stream = KeptStream::new(stream()).await;
    stream.write(0..8).await;
    let mut slow = stream.read(StreamStart::First, 2).await;
    let mut held = take(&mut slow, 2).await;
    // This one reads everything, so there was time for more.
    let mut fast = stream.read(StreamStart::First, 100).await;
    for offset in 0..8 {
        assert_eq!(next_number(&mut fast).await, offset);
    }
    assert!(slow.next().now_or_never().is_none(), "it has as many as it may");
    held.remove(1).settle(Settle::Ack);
    held.push(next(&mut slow).await);
    assert_eq!(texts(&held), ["0", "2"]);
    assert!(slow.next().now_or_never().is_none());
    // A stream takes nothing back: whatever is said of a message makes room for the next.
    held.remove(1).settle(Settle::GiveBack);
    for (offset, settle) in (3..7).zip([Settle::Failed, Settle::Discard, Settle::Ack, Settle::Ack]) {
        let delivery = next(&mut slow).await;
        assert_eq!((delivery.offset, delivery.redelivered), (Some(offset), false));
        delivery.settle(settle);
    }
    // The first one is never settled.
    drop(held);
    assert_eq!(next_number(&mut slow).await, 7);
    let mut other = stream.read(StreamStart::First, 1).await;
    assert_eq!(next_number(&mut other).await, 0);
    stream.delete().await;
}

#[tokio::test]
async fn what_was_written_together_comes_in_order_and_begins_at_the_very_offset() {
    let stream = KeptStream::new(stream()).await;
    stream.write_together(0..1000).await;
    for first in [0, 1, 501, 999] {
        let mut consumer = stream.read(StreamStart::Offset(first), 10).await;
        for offset in first..1000 {
            assert_eq!(next_number(&mut consumer).await, offset);
        }
    }
    stream.delete().await;
}

#[tokio::test]
async fn what_a_publisher_says_of_the_place_in_a_stream_counts_for_nothing() {
    let stream = KeptStream::new(stream()).await;
    let classic = declared(&stream.transport, queue(QueueKind::Exclusive)).await;
    let lie = |queue: &str| {
        let headers = vec![("x-stream-offset".to_owned(), "7".to_owned())];
        Publication { properties: Properties { headers, ..Properties::default() }, ..to_queue(queue, "lie") }
    };
    for queue in [&stream.name, &classic] {
        accepted(&stream.transport, lie(queue)).await;
    }
    let mut consumer = stream.read(StreamStart::First, 1).await;
    assert_eq!(next(&mut consumer).await.offset, Some(0));
    let mut consumer = consume(&stream.transport, &classic, Mode::NoAck).await;
    assert_eq!(next(&mut consumer).await.offset, None);
    stream.delete().await;
}

/// Writes to a stream until its first message is gone. Returns the offset of the oldest.
async fn fill_until_the_oldest_goes(stream: &KeptStream, bytes: usize, at_most: usize) -> u64 {
    for _ in 0..at_most {
        accepted(&stream.transport, to_queue(&stream.name, "x".repeat(bytes))).await;
        let mut consumer = stream.read(StreamStart::First, 1).await;
        match next(&mut consumer).await.offset {
            Some(0) => {}
            oldest => return oldest.expect("it comes from a stream"),
        }
    }
    panic!("{at_most} messages of {bytes} bytes are all there");
}

#[tokio::test]
async fn a_stream_that_keeps_so_many_bytes_deletes_the_oldest_messages() {
    let stream = KeptStream::new(Queue { max_bytes: Some(64 * 1024), ..stream() }).await;
    let oldest = fill_until_the_oldest_goes(&stream, 4096, 1000).await;
    // Whoever asks for a message that is gone gets the oldest.
    let mut consumer = stream.read(StreamStart::Offset(0), 1).await;
    assert!(next(&mut consumer).await.offset >= Some(oldest));
    stream.delete().await;
}

#[tokio::test]
async fn a_stream_that_keeps_so_long_deletes_the_oldest_messages() {
    let bounds = Queue { max_bytes: Some(16 << 20), max_age: Some(Duration::from_secs(1)), ..stream() };
    let stream = KeptStream::new(bounds).await;
    for _ in 0..3 {
        accepted(&stream.transport, to_queue(&stream.name, "x".repeat(1 << 20))).await;
    }
    // These have to become older than the broker keeps them.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    // All together are fewer bytes than it keeps.
    fill_until_the_oldest_goes(&stream, 1 << 20, 10).await;
    stream.delete().await;
}

#[tokio::test]
async fn the_end_of_a_stream_is_the_offset_of_its_last_message() {
    let stream = KeptStream::new(stream()).await;
    let last = async || soon(stream.transport.last_offset(&stream.name)).await.expect("it is there");
    assert_eq!(last().await, None);
    stream.write(0..3).await;
    assert_eq!(last().await, Some(2));
    stream.write_together(3..5000).await;
    assert_eq!(last().await, Some(4999));
    let missing = soon(stream.transport.last_offset(&unique("missing"))).await;
    assert!(matches!(missing, Err(Error::Broker { .. })), "{missing:?}");
    stream.delete().await;
}

// Publishing: what the receipt says.

#[tokio::test]
async fn a_mandatory_message_that_no_queue_takes_is_returned() {
    let transport = Broker::new().connect().await;
    for exchange in ["", DIRECT, TOPIC] {
        let receipt = transport.publish(message(exchange, &unique("nowhere"), "lost"));
        assert_eq!(outcome(receipt).await, Ok(Confirm::Returned), "exchange `{exchange}`");
        assert!(transport.knows(exchange), "exchange `{exchange}`");
    }
}

#[tokio::test]
async fn a_message_that_is_not_mandatory_is_accepted_even_when_no_queue_takes_it() {
    let transport = Broker::new().connect().await;
    for exchange in ["", DIRECT, TOPIC] {
        let optional = Publication { mandatory: false, ..message(exchange, &unique("nowhere"), "lost") };
        accepted(&transport, optional).await;
    }
}

#[tokio::test]
async fn each_receipt_is_right_among_two_thousand_in_flight() {
    let transport = Broker::new().connect().await;
    let queue = declared(&transport, queue(QueueKind::Exclusive)).await;
    let nowhere = unique("nowhere");
    let receipts: Vec<_> = (0..2000)
        .map(|n| transport.publish(to_queue(if n % 3 == 0 { &nowhere } else { &queue }, n.to_string())))
        .collect();
    for (n, receipt) in receipts.into_iter().enumerate() {
        let expected = if n % 3 == 0 { Confirm::Returned } else { Confirm::Accepted };
        assert_eq!(outcome(receipt).await, Ok(expected), "publication {n}");
    }
}

#[tokio::test]
async fn receipts_are_right_for_several_publishers_at_once() {
    let transport = Broker::new().connect().await;
    let queue = declared(&transport, queue(QueueKind::Exclusive)).await;
    let publishers: Vec<_> = (0..8)
        .map(|publisher| {
            let (transport, queue, nowhere) = (transport.clone(), queue.clone(), unique("nowhere"));
            tokio::spawn(async move {
                for n in 0..100 {
                    let lost = (n + publisher) % 3 == 0;
                    let receipt = transport.publish(to_queue(if lost { &nowhere } else { &queue }, n.to_string()));
                    let expected = if lost { Confirm::Returned } else { Confirm::Accepted };
                    assert_eq!(outcome(receipt).await, Ok(expected), "publication {n} of publisher {publisher}");
                }
            })
        })
        .collect();
    for publisher in publishers {
        soon(publisher).await.expect("a publisher with the right receipts");
    }
}

#[tokio::test]
async fn a_message_for_an_exchange_that_does_not_exist_is_returned_and_later_ones_arrive() {
    let transport = Broker::new().connect().await;
    let queue = declared(&transport, queue(QueueKind::Exclusive)).await;
    let mut consumer = consume(&transport, &queue, Mode::NoAck).await;
    for mandatory in [true, false] {
        let exchange = unique("missing");
        let missing = Publication { mandatory, ..message(&exchange, "key", "lost") };
        assert_eq!(outcome(transport.publish(missing)).await, Ok(Confirm::Returned), "mandatory: {mandatory}");
        assert!(!transport.knows(&exchange));
        nothing_more(&transport, &queue, &mut consumer).await;
    }
}

#[tokio::test]
async fn a_missing_exchange_leaves_no_receipt_of_its_neighbours_open() {
    let transport = Broker::new().connect().await;
    let queue = declared(&transport, queue(QueueKind::Exclusive)).await;
    let missing = unique("missing");
    let receipts: Vec<_> = (0..30)
        .map(|n| transport.publish(message(if n % 10 == 5 { &missing } else { "" }, &queue, n.to_string())))
        .collect();
    for (n, receipt) in receipts.into_iter().enumerate() {
        let outcome = outcome(receipt).await;
        if n % 10 == 5 {
            assert_ne!(outcome, Ok(Confirm::Accepted), "publication {n}");
        } else {
            // The broker closes the channel. The outcome of its neighbours may be unknown, but none may be reported as
            // returned.
            assert_ne!(outcome, Ok(Confirm::Returned), "publication {n}");
        }
    }
    accepted(&transport, to_queue(&queue, "later")).await;
}

#[tokio::test]
async fn a_consumer_that_is_given_up_while_it_begins_keeps_nothing() {
    let transport = Broker::new().connect().await;
    let queue = declared(&transport, queue(QueueKind::Exclusive)).await;
    let mode = Mode::Settle { prefetch: 10 };
    let mut given_up = 0..;
    while after_polls(given_up.next().expect("there are more"), transport.consume(&queue, mode)).await.is_none() {}
    let mut consumer = consume_up_to(&transport, &queue, 10).await;
    for n in 0..20 {
        accepted(&transport, to_queue(&queue, n.to_string())).await;
        next(&mut consumer).await.settle(Settle::Ack);
    }
}

#[tokio::test]
async fn a_declaration_that_is_given_up_is_seen_through_and_costs_no_connection() {
    let broker = Broker::new();
    let (transport, owner) = (broker.connect().await, broker.connect().await);
    let mut events = transport.events();
    let (queue, own) =
        (declared(&owner, queue(QueueKind::Exclusive)).await, declared(&transport, queue(QueueKind::Exclusive)).await);
    // The broker refuses the declaration and closes its channel.
    let locked = [Declaration::Queue(Queue::new(&queue, QueueKind::Exclusive))];
    for micros in (0..2000).step_by(2) {
        // The declaration is given up at a different moment each time. One of them is when the refusal arrives.
        let given_up = tokio::time::timeout(Duration::from_micros(micros), transport.declare(&locked));
        if let Ok(refused) = given_up.await {
            assert!(matches!(refused, Err(Error::Broker { .. })), "{refused:?}");
        }
    }
    accepted(&transport, to_queue(&own, "later")).await;
    assert!(events.try_recv().is_err(), "the connection is as good as before");
}

#[tokio::test]
async fn a_full_queue_refuses_and_accepts_again_once_there_is_room() {
    let transport = Broker::new().connect().await;
    let queue = declared(&transport, Queue { max_length: Some(2), ..queue(QueueKind::Classic) }).await;
    fill(&transport, &queue, &["first", "second"]).await;
    assert_eq!(outcome(transport.publish(to_queue(&queue, "third"))).await, Ok(Confirm::Refused));
    let mut consumer = consume_up_to(&transport, &queue, 1).await;
    let first = next(&mut consumer).await;
    assert_eq!(text(&first), "first");
    accepted(&transport, to_queue(&queue, "fourth")).await;
    assert_eq!(outcome(transport.publish(to_queue(&queue, "fifth"))).await, Ok(Confirm::Refused));
    first.settle(Settle::Ack);
    for expected in ["second", "fourth"] {
        let delivery = next(&mut consumer).await;
        assert_eq!(text(&delivery), expected);
        delivery.settle(Settle::Ack);
    }
}

#[tokio::test]
async fn a_full_queue_that_keeps_the_latest_drops_the_oldest() {
    let transport = Broker::new().connect().await;
    for kind in [QueueKind::Quorum, QueueKind::Classic] {
        let (dead, dead_letter) = dead_letters(&transport).await;
        let latest = Queue { max_length: Some(1), keeps_latest: true, dead_letter, ..queue(kind) };
        let queue = declared(&transport, latest).await;
        fill(&transport, &queue, &["a", "b", "c"]).await;
        let mut graveyard = consume(&transport, &dead, Mode::NoAck).await;
        for expected in ["a", "b"] {
            let letter = next(&mut graveyard).await;
            let death = letter.death.clone().expect("the broker has made it a dead letter");
            assert_eq!((text(&letter).as_str(), death.reason.as_str()), (expected, "maxlen"), "{kind:?}");
        }
        let mut consumer = consume_up_to(&transport, &queue, 1).await;
        let out = next(&mut consumer).await;
        assert_eq!(text(&out), "c", "{kind:?}");
        // What is out does not count.
        fill(&transport, &queue, &["d"]).await;
        out.settle(Settle::Ack);
        let out = next(&mut consumer).await;
        assert_eq!(text(&out), "d", "{kind:?}");
        // When it comes back, there is one too many. RabbitMQ 3 may drop the later one.
        fill(&transport, &queue, &["e"]).await;
        consumer.cancel();
        assert!(soon(consumer.next()).await.is_none(), "{kind:?}");
        out.settle(Settle::GiveBack);
        let dropped = text(&next(&mut graveyard).await);
        let mut consumer = consume_up_to(&transport, &queue, 1).await;
        let kept = next(&mut consumer).await;
        assert!([("d", "e"), ("e", "d")].contains(&(&dropped, &text(&kept))), "{kind:?}");
        kept.settle(Settle::Ack);
        nothing_more(&transport, &queue, &mut consumer).await;
    }
}

// Routing: who gets it.

#[tokio::test]
async fn a_direct_exchange_sends_to_the_queues_bound_with_the_very_key() {
    let transport = Broker::new().connect().await;
    let (red, blue) = (unique("red"), unique("blue"));
    let mut consumers = Vec::new();
    for keys in [vec![&red], vec![&red, &blue]] {
        let queue = declared(&transport, queue(QueueKind::Exclusive)).await;
        for key in keys {
            bind(&transport, DIRECT, key, &queue).await;
        }
        consumers.push((consume(&transport, &queue, Mode::NoAck).await, queue));
    }
    accepted(&transport, message(DIRECT, &blue, "blue")).await;
    accepted(&transport, message(DIRECT, &red, "red")).await;
    let [(only_red, _), (both, both_queue)] = &mut consumers[..] else { unreachable!("two were made") };
    let delivery = next(only_red).await;
    assert_eq!((text(&delivery).as_str(), delivery.exchange.as_str(), &delivery.key), ("red", DIRECT, &red));
    assert_eq!(texts(&take(both, 2).await), ["blue", "red"]);
    nothing_more(&transport, both_queue, both).await;
}

#[tokio::test]
async fn a_topic_exchange_sends_to_the_queues_whose_pattern_matches() {
    let transport = Broker::new().connect().await;
    let root = unique("topic");
    let mut consumers = Vec::new();
    for pattern in ["#", "order.*", "order.#", "*.*.eu"] {
        let queue = declared(&transport, queue(QueueKind::Exclusive)).await;
        bind(&transport, TOPIC, &format!("{root}.{pattern}"), &queue).await;
        consumers.push((pattern, consume(&transport, &queue, Mode::NoAck).await, queue));
    }
    for key in ["order", "order.created", "order.created.eu", "bill.paid.eu"] {
        accepted(&transport, message(TOPIC, &format!("{root}.{key}"), key)).await;
    }
    for (pattern, consumer, queue) in &mut consumers {
        let expected: &[&str] = match *pattern {
            "#" => &["order", "order.created", "order.created.eu", "bill.paid.eu"],
            "order.*" => &["order.created"],
            "order.#" => &["order", "order.created", "order.created.eu"],
            _ => &["order.created.eu", "bill.paid.eu"],
        };
        assert_eq!(texts(&take(consumer, expected.len()).await), expected, "pattern {pattern}");
        nothing_more(&transport, queue, consumer).await;
    }
}

#[tokio::test]
async fn a_queue_bound_twice_by_matching_patterns_gets_the_message_once() {
    let transport = Broker::new().connect().await;
    let root = unique("topic");
    let queue = declared(&transport, queue(QueueKind::Exclusive)).await;
    for pattern in ["#", "a.*", "*.b", "a.b"] {
        bind(&transport, TOPIC, &format!("{root}.{pattern}"), &queue).await;
    }
    let mut consumer = consume(&transport, &queue, Mode::NoAck).await;
    accepted(&transport, message(TOPIC, &format!("{root}.a.b"), "once")).await;
    assert_eq!(text(&next(&mut consumer).await), "once");
    nothing_more(&transport, &queue, &mut consumer).await;
}

#[tokio::test]
async fn a_fanout_exchange_sends_to_every_bound_queue() {
    let transport = Broker::new().connect().await;
    let mut consumers = Vec::new();
    for _ in 0..3 {
        let queue = declared(&transport, queue(QueueKind::Exclusive)).await;
        bind(&transport, FANOUT, "", &queue).await;
        consumers.push(consume(&transport, &queue, Mode::NoAck).await);
    }
    let body = unique("body");
    accepted(&transport, message(FANOUT, "any", body.clone())).await;
    for consumer in &mut consumers {
        // Another run of this suite may publish to the same exchange meanwhile.
        while text(&next(consumer).await) != body {}
    }
}

#[tokio::test]
async fn the_default_exchange_sends_to_the_queue_that_the_key_names() {
    let broker = Broker::new();
    let (owner, other) = (broker.connect().await, broker.connect().await);
    let queue = declared(&owner, queue(QueueKind::Exclusive)).await;
    let mut consumer = consume(&owner, &queue, Mode::NoAck).await;
    accepted(&other, to_queue(&queue, "hello")).await;
    let delivery = next(&mut consumer).await;
    assert_eq!((text(&delivery).as_str(), delivery.exchange.as_str(), &delivery.key), ("hello", "", &queue));
}

// The message: what survives the trip.

#[tokio::test]
async fn properties_and_headers_survive_the_trip() {
    let transport = Broker::new().connect().await;
    let queue = declared(&transport, queue(QueueKind::Exclusive)).await;
    let mut consumer = consume(&transport, &queue, Mode::NoAck).await;
    let full = Properties {
        correlation_id: Some(Uuid::new_v4().to_string()),
        reply_to: Some("some.queue".into()),
        expiration: Some(Duration::from_millis(60_123)),
        kind: Some("calculator.v1.add".into()),
        content_type: Some("application/vnd.hopline".into()),
        persistent: true,
        priority: Some(7),
        app_id: Some("instance".into()),
        user_id: None,
        headers: vec![("tenant".into(), "blue".into()), ("umlaut".into(), "Grüße".into())],
    };
    for properties in [full, Properties::default()] {
        accepted(&transport, Publication { properties: properties.clone(), ..to_queue(&queue, "") }).await;
        let mut delivery = next(&mut consumer).await;
        delivery.properties.headers.sort();
        let user_id = transport.user().map(str::to_owned);
        assert_eq!(delivery.properties, Properties { user_id, ..properties });
        assert!(!delivery.redelivered);
    }
}

#[tokio::test]
async fn a_message_carries_its_publishers_own_name_whatever_it_says() {
    let broker = Broker::new();
    let publisher = broker.connect().await;
    let queue = declared(&publisher, queue(QueueKind::Exclusive)).await;
    let mut consumer = consume(&publisher, &queue, Mode::NoAck).await;
    let properties = Properties { user_id: Some("mallory".into()), ..Properties::default() };
    accepted(&publisher, Publication { properties, ..to_queue(&queue, "") }).await;
    let delivery = next(&mut consumer).await;
    assert_eq!(delivery.properties.user_id.as_deref(), publisher.user());
    assert_ne!(publisher.user(), Some("mallory"));
    assert_eq!(publisher.user().is_some(), broker.url.starts_with("amqp"));
}

#[tokio::test]
async fn an_empty_body_and_one_of_a_mebibyte_survive_the_trip() {
    let transport = Broker::new().connect().await;
    let queue = declared(&transport, queue(QueueKind::Exclusive)).await;
    let mut consumer = consume(&transport, &queue, Mode::NoAck).await;
    let mebibyte: Vec<u8> = (0..1 << 20).map(|n: u32| (n % 251) as u8).collect();
    for body in [Bytes::new(), Bytes::from(mebibyte), Bytes::new()] {
        accepted(&transport, Publication { body: body.clone(), ..to_queue(&queue, "") }).await;
        assert!(next(&mut consumer).await.body == body, "the body of {} bytes changed", body.len());
    }
}

// Order.

#[tokio::test]
async fn messages_of_one_publisher_arrive_in_the_order_they_were_published() {
    let transport = Broker::new().connect().await;
    let queue = declared(&transport, queue(QueueKind::Exclusive)).await;
    let mut consumer = consume_up_to(&transport, &queue, 10).await;
    let receipts: Vec<_> = (0..1000).map(|n| transport.publish(to_queue(&queue, n.to_string()))).collect();
    for n in 0..1000 {
        let delivery = next(&mut consumer).await;
        assert_eq!(text(&delivery), n.to_string());
        delivery.settle(Settle::Ack);
    }
    for receipt in receipts {
        assert_eq!(outcome(receipt).await, Ok(Confirm::Accepted));
    }
}

#[tokio::test]
async fn the_higher_priority_comes_first_and_none_is_above_the_queues_highest() {
    let transport = Broker::new().connect().await;
    let queue = declared(&transport, Queue { max_priority: Some(5), ..queue(QueueKind::Classic) }).await;
    for priority in [Some(1), None, Some(5), Some(9), Some(0), Some(1)] {
        let properties = Properties { priority, ..Properties::default() };
        accepted(&transport, Publication { properties, ..to_queue(&queue, format!("{priority:?}")) }).await;
    }
    let mut consumer = consume(&transport, &queue, Mode::NoAck).await;
    let order = texts(&take(&mut consumer, 6).await);
    assert_eq!(order, ["Some(5)", "Some(9)", "Some(1)", "Some(1)", "None", "Some(0)"]);
}

#[tokio::test]
async fn two_consumers_of_a_queue_take_turns() {
    let broker = Broker::new();
    let (one, other) = (broker.connect().await, broker.connect().await);
    let queue = declared(&one, queue(QueueKind::Classic)).await;
    let mut first = consume_up_to(&one, &queue, 100).await;
    let mut second = consume_up_to(&other, &queue, 100).await;
    fill(&one, &queue, &["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]).await;
    let shares = [texts(&take(&mut first, 5).await), texts(&take(&mut second, 5).await)];
    let all: BTreeSet<_> = shares.iter().flatten().collect();
    assert_eq!(all.len(), 10, "{shares:?}");
}

// Consuming: prefetch, settling, redelivery.

#[tokio::test]
async fn no_more_than_the_prefetch_is_out_at_once_and_a_settled_one_makes_room() {
    for kind in [QueueKind::Classic, QueueKind::Quorum] {
        let transport = Broker::new().connect().await;
        let queue = declared(&transport, queue(kind)).await;
        fill(&transport, &queue, &["a", "b", "c", "d", "e"]).await;
        let mut first = consume_up_to(&transport, &queue, 2).await;
        let mut held = take(&mut first, 2).await;
        assert_eq!(texts(&held), ["a", "b"]);
        // If the first consumer had been sent more, these would not all reach the second.
        let mut second = consume_up_to(&transport, &queue, 3).await;
        let full = take(&mut second, 3).await;
        assert_eq!(texts(&full), ["c", "d", "e"]);
        accepted(&transport, to_queue(&queue, "f")).await;
        held.remove(0).settle(Settle::Ack);
        assert_eq!(text(&next(&mut first).await), "f");
    }
}

#[tokio::test]
async fn a_message_given_back_returns_to_the_head_and_is_marked_as_redelivered() {
    let transport = Broker::new().connect().await;
    let queue = declared(&transport, queue(QueueKind::Classic)).await;
    fill(&transport, &queue, &["a", "b", "c"]).await;
    let mut consumer = consume_up_to(&transport, &queue, 2).await;
    let mut held = take(&mut consumer, 2).await;
    assert!(held.iter().all(|delivery| !delivery.redelivered));
    held.remove(0).settle(Settle::GiveBack);
    let again = next(&mut consumer).await;
    assert_eq!((text(&again).as_str(), again.redelivered), ("a", true));
    again.settle(Settle::Ack);
    let fresh = next(&mut consumer).await;
    assert_eq!((text(&fresh).as_str(), fresh.redelivered), ("c", false));
}

#[tokio::test]
async fn a_closed_connection_gives_its_unsettled_deliveries_to_others_in_order() {
    for kind in [QueueKind::Classic, QueueKind::Quorum] {
        let broker = Broker::new();
        let (leaving, staying) = (broker.connect().await, broker.connect().await);
        let queue = declared(&staying, queue(kind)).await;
        fill(&staying, &queue, &["a", "b", "c"]).await;
        let mut consumer = consume_up_to(&leaving, &queue, 10).await;
        let mut held = take(&mut consumer, 3).await;
        let mut next_in_line = consume_up_to(&staying, &queue, 10).await;
        // One is dropped without being settled, and one is held.
        drop(held.remove(1));
        soon(leaving.close()).await;
        let mut order = Vec::new();
        for delivery in take(&mut next_in_line, 3).await {
            assert!(delivery.redelivered);
            order.push(text(&delivery));
        }
        assert_eq!(order, ["a", "b", "c"]);
        assert_eq!(held.len(), 2);
    }
}

#[tokio::test]
async fn a_settled_delivery_never_comes_again() {
    let broker = Broker::new();
    let (leaving, staying) = (broker.connect().await, broker.connect().await);
    let queue = declared(&staying, queue(QueueKind::Classic)).await;
    fill(&staying, &queue, &["a", "b", "c"]).await;
    let mut consumer = consume_up_to(&leaving, &queue, 1).await;
    for _ in 0..2 {
        next(&mut consumer).await.settle(Settle::Ack);
    }
    // It came because the other two were settled.
    let last = next(&mut consumer).await;
    soon(leaving.close()).await;
    drop(last);
    let mut consumer = consume_up_to(&staying, &queue, 10).await;
    assert_eq!(text(&next(&mut consumer).await), "c");
    nothing_more(&staying, &queue, &mut consumer).await;
}

#[tokio::test]
async fn deliveries_without_acks_are_done_when_they_leave() {
    let broker = Broker::new();
    let (leaving, staying) = (broker.connect().await, broker.connect().await);
    let queue = declared(&staying, queue(QueueKind::Classic)).await;
    let mut consumer = consume(&leaving, &queue, Mode::NoAck).await;
    fill(&staying, &queue, &["a", "b", "c"]).await;
    let mut deliveries = take(&mut consumer, 3).await;
    assert_eq!(texts(&deliveries), ["a", "b", "c"]);
    // Settling a delivery that needs no acknowledgement is no error, and changes nothing.
    deliveries.remove(0).settle(Settle::GiveBack);
    soon(leaving.close()).await;
    let mut consumer = consume(&staying, &queue, Mode::NoAck).await;
    nothing_more(&staying, &queue, &mut consumer).await;
}

#[tokio::test]
async fn after_cancel_what_was_prefetched_comes_out_and_the_rest_stays_for_others() {
    let transport = Broker::new().connect().await;
    let queue = declared(&transport, queue(QueueKind::Classic)).await;
    fill(&transport, &queue, &["a", "b", "c", "d", "e"]).await;
    let mut consumer = consume_up_to(&transport, &queue, 3).await;
    let mut drained = vec![next(&mut consumer).await];
    consumer.cancel();
    while let Some(delivery) = soon(consumer.next()).await {
        drained.push(delivery);
    }
    let mut seen = texts(&drained);
    assert!(seen.len() <= 3 && ["a", "b", "c"].starts_with(&seen.iter().map(String::as_str).collect::<Vec<_>>()[..]));
    // The deliveries of a cancelled consumer can still be acknowledged or requeued.
    drained.remove(0).settle(Settle::GiveBack);
    drained.into_iter().for_each(|delivery| delivery.settle(Settle::Ack));
    let mut other = consume_up_to(&transport, &queue, 10).await;
    let rest = take(&mut other, 5 - seen.len() + 1).await;
    assert!(rest.iter().all(|delivery| delivery.redelivered == (text(delivery) == "a")));
    seen.extend(texts(&rest));
    seen.sort();
    assert_eq!(seen, ["a", "a", "b", "c", "d", "e"]);
}

#[tokio::test]
async fn a_dropped_consumer_leaves_what_it_did_not_hand_out_to_others() {
    let transport = Broker::new().connect().await;
    let queue = declared(&transport, queue(QueueKind::Classic)).await;
    fill(&transport, &queue, &["a", "b", "c"]).await;
    let mut dropped = consume_up_to(&transport, &queue, 10).await;
    next(&mut dropped).await.settle(Settle::Ack);
    drop(dropped);
    let mut other = consume_up_to(&transport, &queue, 10).await;
    let mut rest = texts(&take(&mut other, 2).await);
    rest.sort();
    assert_eq!(rest, ["b", "c"]);
}

// Dead letters.

#[tokio::test]
async fn a_discarded_message_is_dead_lettered_with_its_properties() {
    for kind in [QueueKind::Exclusive, QueueKind::Classic, QueueKind::Quorum] {
        let transport = Broker::new().connect().await;
        let (dead, dead_letter) = dead_letters(&transport).await;
        let queue = declared(&transport, Queue { dead_letter, ..queue(kind) }).await;
        let properties = Properties { correlation_id: Some("id".into()), ..Properties::default() };
        accepted(&transport, Publication { properties, ..to_queue(&queue, "poison") }).await;
        let mut consumer = consume_up_to(&transport, &queue, 1).await;
        next(&mut consumer).await.settle(Settle::Discard);
        let mut graveyard = consume(&transport, &dead, Mode::NoAck).await;
        let letter = next(&mut graveyard).await;
        assert_eq!((text(&letter).as_str(), letter.exchange.as_str(), &letter.key), ("poison", DIRECT, &dead));
        assert_eq!(letter.properties.correlation_id.as_deref(), Some("id"));
        nothing_more(&transport, &queue, &mut consumer).await;
    }
}

#[tokio::test]
async fn a_discarded_message_is_gone_where_there_are_no_dead_letters() {
    let transport = Broker::new().connect().await;
    let queue = declared(&transport, queue(QueueKind::Classic)).await;
    fill(&transport, &queue, &["poison"]).await;
    let mut consumer = consume_up_to(&transport, &queue, 1).await;
    next(&mut consumer).await.settle(Settle::Discard);
    nothing_more(&transport, &queue, &mut consumer).await;
}

#[tokio::test]
async fn a_message_that_keeps_failing_is_redelivered_up_to_its_limit_then_dead_lettered() {
    let transport = Broker::new().connect().await;
    let (dead, dead_letter) = dead_letters(&transport).await;
    let limited = Queue { delivery_limit: Some(3), dead_letter, ..queue(QueueKind::Quorum) };
    let queue = declared(&transport, limited).await;
    accepted(&transport, to_queue(&queue, "poison")).await;
    let mut consumer = consume_up_to(&transport, &queue, 1).await;
    let mut graveyard = consume(&transport, &dead, Mode::NoAck).await;
    // The limit counts the attempts after the first.
    for attempt in 0..=3 {
        let delivery = next(&mut consumer).await;
        assert_eq!((text(&delivery).as_str(), delivery.redelivered), ("poison", attempt > 0));
        assert_eq!((delivery.failures, delivery.death.is_some()), (attempt, false));
        delivery.settle(Settle::Failed);
    }
    let letter = next(&mut graveyard).await;
    assert_eq!(text(&letter), "poison");
    let death = letter.death.expect("the broker brought it there");
    assert_eq!((death.reason.as_str(), death.queue.as_str(), death.at > 0), ("delivery_limit", queue.as_str(), true));
    nothing_more(&transport, &queue, &mut consumer).await;
}

#[tokio::test]
async fn messages_are_taken_out_one_by_one_and_go_back_to_where_they_were() {
    let transport = Broker::new().connect().await;
    let queue = declared(&transport, queue(QueueKind::Classic)).await;
    // RabbitMQ may count before it has handled what was settled a moment ago.
    let counted = |number| {
        let (transport, queue) = (&transport, &queue);
        soon(async move {
            while transport.count(queue).await.expect("it is ours") != Some(number) {
                tokio::task::yield_now().await;
            }
        })
    };
    let get = || async { soon(transport.get(&queue)).await.expect("it is ours") };
    assert!(get().await.is_none(), "there is nothing in it");
    fill(&transport, &queue, &["one", "two", "three"]).await;
    counted(3).await;
    // A message that was requeued is there for the very next question.
    for _ in 0..3 {
        let mut taken = Vec::new();
        while let Some(delivery) = get().await {
            taken.push(delivery);
        }
        assert_eq!(taken.iter().map(text).collect::<Vec<_>>(), ["one", "two", "three"]);
        counted(0).await;
        taken.into_iter().for_each(|delivery| delivery.settle(Settle::GiveBack));
    }
    get().await.expect("the first").settle(Settle::Ack);
    let second = get().await.expect("the second");
    assert_eq!(text(&second), "two");
    get().await.expect("the third").settle(Settle::Discard);
    second.settle(Settle::GiveBack);
    counted(1).await;
    let mut consumer = consume_up_to(&transport, &queue, 10).await;
    assert_eq!(text(&next(&mut consumer).await), "two");
}

#[tokio::test]
async fn what_was_taken_out_and_not_settled_goes_back_with_its_connection() {
    let broker = Broker::new();
    let (leaving, staying) = (broker.connect().await, broker.connect().await);
    let queue = declared(&staying, queue(QueueKind::Classic)).await;
    fill(&staying, &queue, &["one", "two"]).await;
    let _one = soon(leaving.get(&queue)).await.expect("it is there").expect("the first");
    let _two = soon(leaving.get(&queue)).await.expect("it is there").expect("the second");
    soon(leaving.close()).await;
    let mut consumer = consume_up_to(&staying, &queue, 10).await;
    for body in ["one", "two"] {
        let delivery = next(&mut consumer).await;
        assert_eq!((text(&delivery).as_str(), delivery.redelivered), (body, true));
    }
    assert!(soon(leaving.get(&queue)).await.is_err(), "it is closed");
}

#[tokio::test]
async fn a_queue_that_is_not_there_has_no_count_and_nothing_to_take_out() {
    let broker = Broker::new();
    let (transport, owner) = (broker.connect().await, broker.connect().await);
    let absent = unique("absent");
    assert_eq!(soon(transport.count(&absent)).await.expect("it is an answer"), None);
    assert!(matches!(soon(transport.get(&absent)).await, Err(Error::Broker { .. })));
    let locked = declared(&owner, queue(QueueKind::Exclusive)).await;
    assert!(matches!(soon(transport.count(&locked)).await, Err(Error::Broker { .. })));
    assert!(matches!(soon(transport.get(&locked)).await, Err(Error::Broker { .. })));
    let queue = declared(&transport, queue(QueueKind::Classic)).await;
    fill(&transport, &queue, &["one"]).await;
    assert_eq!(text(&soon(transport.get(&queue)).await.expect("it is there").expect("the first")), "one");
}

#[tokio::test]
async fn asking_for_a_queue_in_vain_leaves_alone_what_is_out_of_another() {
    let broker = Broker::new();
    let (transport, owner) = (broker.connect().await, broker.connect().await);
    let (absent, locked) = (unique("absent"), declared(&owner, queue(QueueKind::Exclusive)).await);
    let mut queues = Vec::new();
    for in_vain in [&absent, &locked] {
        let queue = declared(&owner, queue(QueueKind::Classic)).await;
        fill(&owner, &queue, &["one", "two"]).await;
        let one = soon(transport.get(&queue)).await.expect("it is there").expect("the first");
        assert!(!matches!(soon(transport.count(in_vain)).await, Ok(Some(_))));
        let two = soon(transport.get(&queue)).await.expect("it is there").expect("the second");
        assert!(soon(transport.get(in_vain)).await.is_err());
        assert_eq!((text(&one).as_str(), text(&two).as_str()), ("one", "two"));
        assert!(soon(transport.get(&queue)).await.expect("it is there").is_none(), "both are out");
        one.settle(Settle::Ack);
        two.settle(Settle::Ack);
        queues.push(queue);
    }
    soon(transport.close()).await;
    for queue in queues {
        assert_eq!(soon(owner.count(&queue)).await.expect("it is there"), Some(0), "nothing came back");
    }
}

#[tokio::test]
async fn a_message_whose_consumers_are_lost_is_redelivered_up_to_its_limit_then_dead_lettered() {
    let broker = Broker::new();
    let transport = broker.connect().await;
    let (dead, dead_letter) = dead_letters(&transport).await;
    let limited = Queue { delivery_limit: Some(1), dead_letter, ..queue(QueueKind::Quorum) };
    let queue = declared(&transport, limited).await;
    accepted(&transport, to_queue(&queue, "poison")).await;
    for attempt in 0..=1 {
        let dying = broker.connect().await;
        let mut consumer = consume_up_to(&dying, &queue, 1).await;
        let delivery = next(&mut consumer).await;
        assert_eq!((text(&delivery).as_str(), delivery.redelivered), ("poison", attempt > 0));
        soon(dying.close()).await;
    }
    let mut graveyard = consume(&transport, &dead, Mode::NoAck).await;
    assert_eq!(text(&next(&mut graveyard).await), "poison");
    let mut consumer = consume_up_to(&transport, &queue, 1).await;
    nothing_more(&transport, &queue, &mut consumer).await;
}

#[tokio::test]
async fn a_message_that_is_not_consumed_in_time_is_dead_lettered_and_never_delivered() {
    let transport = Broker::new().connect().await;
    let (dead, dead_letter) = dead_letters(&transport).await;
    let queue = declared(&transport, Queue { dead_letter, ..queue(QueueKind::Classic) }).await;
    accepted(&transport, expiring(&queue, "late", 50)).await;
    accepted(&transport, to_queue(&queue, "patient")).await;
    let mut graveyard = consume(&transport, &dead, Mode::NoAck).await;
    let letter = next(&mut graveyard).await;
    assert_eq!(text(&letter), "late");
    assert_eq!(letter.properties.expiration, None, "or it would expire in the next queue too");
    let mut consumer = consume_up_to(&transport, &queue, 10).await;
    assert_eq!(text(&next(&mut consumer).await), "patient");
    nothing_more(&transport, &queue, &mut consumer).await;
}

#[tokio::test]
async fn a_message_that_may_not_wait_is_delivered_only_to_a_waiting_consumer() {
    let transport = Broker::new().connect().await;
    let (dead, dead_letter) = dead_letters(&transport).await;
    let queue = declared(&transport, Queue { dead_letter, ..queue(QueueKind::Classic) }).await;
    accepted(&transport, expiring(&queue, "nobody waits", 0)).await;
    let mut graveyard = consume(&transport, &dead, Mode::NoAck).await;
    assert_eq!(text(&next(&mut graveyard).await), "nobody waits");
    let mut consumer = consume_up_to(&transport, &queue, 1).await;
    accepted(&transport, expiring(&queue, "one waits", 0)).await;
    let delivery = next(&mut consumer).await;
    assert_eq!(text(&delivery), "one waits");
    accepted(&transport, expiring(&queue, "the one is busy", 0)).await;
    assert_eq!(text(&next(&mut graveyard).await), "the one is busy");
}

// A single active consumer.

/// A queue of which one consumer gets everything.
async fn of_one(transport: &Transport, kind: QueueKind) -> String {
    declared(transport, Queue { single_active: true, ..queue(kind) }).await
}

#[tokio::test]
async fn the_first_consumer_gets_everything_until_it_is_cancelled_and_then_the_next_does() {
    let transport = Broker::new().connect().await;
    for kind in [QueueKind::Quorum, QueueKind::Classic] {
        let queue = of_one(&transport, kind).await;
        let mut consumers = Vec::new();
        for _ in 0..3 {
            consumers.push(consume_up_to(&transport, &queue, 1).await);
        }
        fill(&transport, &queue, &["a", "b", "c", "d", "e", "f"]).await;
        for (consumer, expected) in consumers.iter_mut().zip([["a", "b"], ["c", "d"], ["e", "f"]]) {
            for expected in expected {
                let delivery = next(consumer).await;
                assert_eq!((text(&delivery).as_str(), delivery.redelivered), (expected, false), "{kind:?}");
                if expected == "a" || expected == "c" || expected == "e" {
                    delivery.settle(Settle::Ack);
                    continue;
                }
                // It is full with this one, so nothing is on its way to it.
                consumer.cancel();
                assert!(soon(consumer.next()).await.is_none(), "{kind:?}");
                delivery.settle(Settle::Ack);
            }
        }
    }
}

#[tokio::test]
async fn the_next_consumer_gets_in_order_what_the_first_has_not_settled_when_its_connection_ends() {
    let broker = Broker::new();
    let staying = broker.connect().await;
    for kind in [QueueKind::Quorum, QueueKind::Classic] {
        let leaving = broker.connect().await;
        let queue = of_one(&staying, kind).await;
        let mut first = consume_up_to(&leaving, &queue, 2).await;
        let mut second = consume_up_to(&staying, &queue, 10).await;
        fill(&staying, &queue, &["a", "b", "c"]).await;
        assert_eq!(texts(&take(&mut first, 2).await), ["a", "b"], "{kind:?}");
        soon(leaving.close()).await;
        let got = take(&mut second, 3).await;
        assert_eq!(texts(&got), ["a", "b", "c"], "{kind:?}");
        assert_eq!(got.iter().map(|delivery| delivery.redelivered).collect::<Vec<_>>(), [true, true, false]);
    }
}

#[tokio::test]
async fn the_next_consumer_does_not_wait_for_what_a_cancelled_one_has_not_settled() {
    let transport = Broker::new().connect().await;
    // A classic queue of RabbitMQ 3 may do nothing for the next consumer until something else happens to it.
    let queue = of_one(&transport, QueueKind::Quorum).await;
    let mut first = consume_up_to(&transport, &queue, 1).await;
    let mut second = consume_up_to(&transport, &queue, 10).await;
    fill(&transport, &queue, &["a", "b"]).await;
    let held = next(&mut first).await;
    first.cancel();
    assert_eq!(text(&next(&mut second).await), "b");
    held.settle(Settle::GiveBack);
    assert_eq!(text(&next(&mut second).await), "a");
}

#[tokio::test]
async fn nothing_is_taken_out_of_a_quorum_queue_of_a_single_consumer() {
    let transport = Broker::new().connect().await;
    let queue = of_one(&transport, QueueKind::Quorum).await;
    fill(&transport, &queue, &["a"]).await;
    let refused = soon(transport.get(&queue)).await;
    assert!(matches!(refused, Err(Error::Broker { .. })), "{refused:?}");
    let mut consumer = consume_up_to(&transport, &queue, 1).await;
    assert_eq!(text(&next(&mut consumer).await), "a");
}

// Queues: whose they are and how long they stay.

#[tokio::test]
async fn an_exclusive_queue_is_closed_to_others_and_dies_with_its_owner() {
    let broker = Broker::new();
    let (owner, other) = (broker.connect().await, broker.connect().await);
    let queue = declared(&owner, queue(QueueKind::Exclusive)).await;
    let refused = soon(other.consume(&queue, Mode::NoAck)).await;
    assert!(matches!(refused, Err(Error::Broker { .. })), "{refused:?}");
    let refused = soon(other.declare(&[Declaration::Queue(Queue::new(&queue, QueueKind::Exclusive))])).await;
    assert!(matches!(refused, Err(Error::Broker { .. })), "{refused:?}");
    accepted(&other, to_queue(&queue, "while it lives")).await;
    soon(owner.close()).await;
    soon(async {
        // At first RabbitMQ 4 may accept or refuse, since it still knows the queue that is being deleted.
        while outcome(other.publish(to_queue(&queue, "too late"))).await != Ok(Confirm::Returned) {}
    })
    .await;
    let refused = soon(other.consume(&queue, Mode::NoAck)).await;
    assert!(matches!(refused, Err(Error::Broker { .. })), "{refused:?}");
}

#[tokio::test]
async fn a_queue_without_consumers_expires_and_one_with_a_consumer_stays() {
    let transport = Broker::new().connect().await;
    let brief = |time| Queue { expires: Some(time), ..queue(QueueKind::Classic) };
    // If the consumer comes too late, the queue is gone. Then another one gets more time.
    let (mut time, mut consumed) = (Duration::from_millis(150), None);
    while consumed.is_none() {
        time *= 2;
        let used = declared(&transport, brief(time)).await;
        let consumer = soon(transport.consume(&used, Mode::Settle { prefetch: 10 })).await;
        consumed = consumer.ok().map(|consumer| (used, consumer));
    }
    let (used, mut consumer) = consumed.expect("it is consumed");
    let unused = declared(&transport, brief(time)).await;
    soon(async {
        while outcome(transport.publish(to_queue(&unused, "anyone?"))).await == Ok(Confirm::Accepted) {
            tokio::task::yield_now().await;
        }
    })
    .await;
    nothing_more(&transport, &used, &mut consumer).await;
}

#[tokio::test]
async fn declaring_the_same_again_changes_nothing() {
    let broker = Broker::new();
    let (one, other) = (broker.connect().await, broker.connect().await);
    let queue = Queue {
        max_length: Some(10),
        max_priority: Some(9),
        dead_letter: Some((DIRECT.into(), "dead".into())),
        ..queue(QueueKind::Classic)
    };
    let key = unique("key");
    for transport in [&one, &other, &one] {
        declared(transport, queue.clone()).await;
        bind(transport, DIRECT, &key, &queue.name).await;
    }
    accepted(&one, message(DIRECT, &key, "once")).await;
    let mut consumer = consume(&other, &queue.name, Mode::NoAck).await;
    assert_eq!(text(&next(&mut consumer).await), "once");
    nothing_more(&one, &queue.name, &mut consumer).await;
}

#[tokio::test]
async fn declaring_with_other_arguments_names_each_that_differs_and_harms_nothing() {
    let transport = Broker::new().connect().await;
    let (_, dead_letter) = dead_letters(&transport).await;
    let queue = Queue { max_length: Some(10), ..queue(QueueKind::Classic) };
    declared(&transport, queue.clone()).await;
    let other = Queue { max_length: Some(20), max_priority: Some(3), dead_letter, ..queue.clone() };
    let refused = soon(transport.declare(&[Declaration::Queue(other)])).await;
    let Err(Error::Mismatch { name, differences, .. }) = refused else { panic!("not a mismatch: {refused:?}") };
    assert!(name.contains(&queue.name), "{name}");
    for argument in ["x-max-length", "x-max-priority", "x-dead-letter-exchange", "x-dead-letter-routing-key"] {
        let named = differences.iter().filter(|difference| difference.contains(argument)).count();
        assert_eq!(named, 1, "{argument} in {differences:?}");
    }
    assert_eq!(differences.len(), 4, "{differences:?}");
    accepted(&transport, to_queue(&queue.name, "still there")).await;
}

#[tokio::test]
async fn what_a_stream_keeps_who_gets_the_messages_and_what_a_full_queue_does_are_named_when_they_differ() {
    let transport = Broker::new().connect().await;
    let hours = |hours: u64| Some(Duration::from_secs(hours * 3600));
    let stream = Queue { max_age: hours(1), ..stream() };
    let other_stream = Queue { max_age: hours(2), max_bytes: Some(20_000_000_000), ..stream.clone() };
    let one = Queue { single_active: true, max_length: Some(1), ..queue(QueueKind::Quorum) };
    let other = [
        (&stream, other_stream, &["`x-max-age` is 3600s, not 7200s", "`x-max-length-bytes` is not set"]),
        (
            &one,
            Queue { single_active: false, keeps_latest: true, ..one.clone() },
            &["`x-single-active-consumer` is true, but not", "`x-overflow` is reject-publish, not drop-head"],
        ),
    ];
    for (queue, other, expected) in other {
        declared(&transport, queue.clone()).await;
        let refused = soon(transport.declare(&[Declaration::Queue(other)])).await;
        let Err(Error::Mismatch { differences, .. }) = refused else { panic!("not a mismatch: {refused:?}") };
        assert_eq!(differences.len(), expected.len(), "{differences:?}");
        for expected in expected {
            assert!(differences.iter().any(|difference| difference.starts_with(expected)), "{differences:?}");
        }
    }
}

#[tokio::test]
async fn declaring_a_queue_or_exchange_of_another_kind_is_a_mismatch() {
    let transport = Broker::new().connect().await;
    let queue = queue(QueueKind::Classic);
    declared(&transport, queue.clone()).await;
    let parts = [
        Declaration::Queue(Queue { kind: QueueKind::Quorum, ..queue.clone() }),
        Declaration::Exchange(Exchange { name: DIRECT.into(), kind: ExchangeKind::Topic }),
    ];
    for (part, expected) in parts.into_iter().zip([queue.name.as_str(), DIRECT]) {
        let refused = soon(transport.declare(&[part])).await;
        let Err(Error::Mismatch { name, differences, .. }) = refused else { panic!("not a mismatch: {refused:?}") };
        assert!(name.contains(expected), "{name}");
        assert_eq!(differences.len(), 1, "{differences:?}");
    }
}

#[tokio::test]
async fn an_argument_that_a_kind_of_queue_does_not_have_is_refused() {
    let transport = Broker::new().connect().await;
    let bad = [
        Queue { delivery_limit: Some(3), ..queue(QueueKind::Classic) },
        Queue { max_priority: Some(3), ..queue(QueueKind::Quorum) },
        Queue { max_age: Some(Duration::from_secs(60)), ..queue(QueueKind::Quorum) },
        Queue { max_age: Some(Duration::from_secs(60)), ..queue(QueueKind::Classic) },
        Queue { single_active: true, ..stream() },
        Queue { max_length: Some(3), ..stream() },
        Queue { expires: Some(Duration::from_secs(60)), ..stream() },
    ];
    for queue in bad {
        let refused = soon(transport.declare(&[Declaration::Queue(queue)])).await;
        assert!(matches!(refused, Err(Error::Broker { .. })), "{refused:?}");
    }
}

#[tokio::test]
async fn what_the_broker_refuses_leaves_the_connection_usable() {
    let transport = Broker::new().connect().await;
    let queue = declared(&transport, queue(QueueKind::Exclusive)).await;
    let mut consumer = consume_up_to(&transport, &queue, 10).await;
    let missing = unique("missing");
    let bad_binding = |exchange: &str, queue: &str| {
        Declaration::Binding(Binding { exchange: exchange.into(), key: "key".into(), queue: queue.into() })
    };
    let refused = soon(transport.consume(&missing, Mode::NoAck)).await;
    assert!(matches!(refused, Err(Error::Broker { .. })), "{refused:?}");
    for binding in [bad_binding(&missing, &queue), bad_binding(DIRECT, &missing)] {
        let refused = soon(transport.declare(&[binding])).await;
        assert!(matches!(refused, Err(Error::Broker { .. })), "{refused:?}");
    }
    nothing_more(&transport, &queue, &mut consumer).await;
}

#[tokio::test]
async fn a_binding_that_is_taken_away_leads_nowhere() {
    let transport = Broker::new().connect().await;
    let queue = declared(&transport, queue(QueueKind::Exclusive)).await;
    let mut consumer = consume_up_to(&transport, &queue, 10).await;
    let key = unique("key");
    let binding = |key: &str| Binding { exchange: DIRECT.into(), key: key.into(), queue: queue.clone() };
    soon(transport.declare(&[Declaration::Binding(binding(&key))])).await.expect("bound");
    let publication = || Publication { exchange: DIRECT.into(), key: key.clone(), ..to_queue("", "by the binding") };
    assert_eq!(outcome(transport.publish(publication())).await, Ok(Confirm::Accepted));
    next(&mut consumer).await.settle(Settle::Ack);
    // Deleting a binding that is gone, or never existed, is no error.
    for gone in [&key, &key, &unique("never")] {
        soon(transport.unbind(&[binding(gone)])).await.expect("not bound any more");
        assert_eq!(outcome(transport.publish(publication())).await, Ok(Confirm::Returned));
    }
    nothing_more(&transport, &queue, &mut consumer).await;
}

#[tokio::test]
async fn a_queue_that_is_deleted_is_gone_with_its_messages_and_consumers() {
    let broker = Broker::new();
    let (transport, other) = (broker.connect().await, broker.connect().await);
    for kind in [QueueKind::Classic, QueueKind::Quorum, QueueKind::Exclusive] {
        let queue = declared(&transport, queue(kind)).await;
        let key = unique("key");
        bind(&transport, DIRECT, &key, &queue).await;
        fill(&transport, &queue, &["a", "b", "c"]).await;
        let mut consumer = consume_up_to(&transport, &queue, 1).await;
        let out = next(&mut consumer).await;
        assert_eq!(soon(transport.delete(&queue)).await.expect("it is there"), Some(2), "{kind:?}");
        assert!(soon(consumer.next()).await.is_none());
        assert_eq!(consumer.ended().await, Some(ConsumerEnd::Cancelled), "{kind:?}");
        // Nobody misses what was out.
        out.settle(Settle::Ack);
        assert_eq!(soon(transport.delete(&queue)).await.expect("that is no error"), None, "{kind:?}");
        assert_eq!(soon(other.count(&queue)).await.expect("that is no error"), None, "{kind:?}");
        assert_eq!(outcome(transport.publish(message(DIRECT, &key, "late"))).await, Ok(Confirm::Returned), "{kind:?}");
    }
    let own = declared(&transport, queue(QueueKind::Exclusive)).await;
    let refused = soon(other.delete(&own)).await;
    assert!(matches!(refused, Err(Error::Broker { .. })), "{refused:?}");
    fill(&transport, &own, &["still there"]).await;
}

// The end.

#[tokio::test]
async fn after_close_nothing_is_handed_over_and_consumers_end() {
    let transport = Broker::new().connect().await;
    let queue = declared(&transport, queue(QueueKind::Exclusive)).await;
    let mut consumer = consume_up_to(&transport, &queue, 1).await;
    soon(transport.close()).await;
    assert!(soon(consumer.next()).await.is_none());
    let lost = outcome(transport.publish(to_queue(&queue, "late"))).await;
    assert!(matches!(lost, Err(Lost { loss: Loss::Unsent, .. })), "{lost:?}");
    let refused = soon(transport.consume(&queue, Mode::NoAck)).await;
    assert!(matches!(refused, Err(Error::Disconnected { .. })), "{refused:?}");
    let refused = soon(transport.declare(&[])).await;
    assert!(matches!(refused, Ok(()) | Err(Error::Disconnected { .. })), "{refused:?}");
    // Closing twice is no error.
    soon(transport.close()).await;
}
