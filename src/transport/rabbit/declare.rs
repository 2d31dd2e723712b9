//! Declares exchanges, queues and bindings. If one exists with other arguments, the error names every argument that
//! differs.

mod difference;

use std::collections::BTreeMap;

use futures::FutureExt as _;
use futures::future::join_all;
use lapin::options::{ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{Channel, ExchangeKind as Kind};

use self::difference::{Difference, INEQUIVALENT};
use super::connection::{Link, NOT_FOUND, PRECONDITION_FAILED, Refusal};
use super::probe::Comparison;
use super::properties::short;
use crate::error::Error;
use crate::topology::{Binding, Declaration, Exchange, ExchangeKind, Queue, QueueKind};
use crate::transport::forbids;

/// Over how many channels bindings are deleted at once: the broker does one after the other of a channel.
const CHANNELS_TO_UNBIND: usize = 8;

/// Declares each part in this order.
///
/// A user who may not declare an exchange may still use it. So if that is refused, this goes on if the exchange exists.
///
/// # Errors
/// `Mismatch` if a part exists with other arguments, `Broker` for any other refusal, `Disconnected`.
pub(super) async fn declare(link: &Link, parts: &[Declaration]) -> Result<(), Error> {
    let mut channel = opened(link).await?;
    for part in parts {
        match part {
            Declaration::Exchange(exchange) => {
                let declared = declare_shape(link, &channel, Shape::of_exchange(exchange)?).await;
                match declared {
                    Ok(()) => {}
                    Err(Error::Broker { reason, .. })
                        if forbids(&reason) && may_be_there(link, &exchange.name).await? =>
                    {
                        channel = opened(link).await?;
                    }
                    Err(error) => return Err(error),
                }
            }
            Declaration::Queue(queue) => declare_shape(link, &channel, Shape::of_queue(queue)?).await?,
            Declaration::Binding(binding) => bind(link, &channel, binding).await?,
        }
    }
    close(link, &channel).await;
    Ok(())
}

/// How what is there compares with a declaration. What is not there is not declared.
///
/// # Errors
/// `Broker` for a refusal, `Disconnected`.
pub(super) async fn compare(link: &Link, part: &Declaration) -> Result<Comparison, Error> {
    let shape = match part {
        Declaration::Exchange(exchange) => Shape::of_exchange(exchange)?,
        Declaration::Queue(queue) => Shape::of_queue(queue)?,
        Declaration::Binding(binding) => return Err(Error::Invalid(format!("{}: no thing", binding_of(binding)))),
    };
    let channel = opened(link).await?;
    match link.hear(shape.declare(&channel, true)).await {
        Ok(()) => {}
        // The broker also says NOT_FOUND of a queue whose node is down, but in other words.
        Err(Refusal::Refused { code: NOT_FOUND, text })
            if ["no queue", "no exchange"].iter().any(|no| text.contains(no)) =>
        {
            return Ok(Comparison::Absent);
        }
        Err(refusal) => return Err(refusal.during(format!("look for the {}", shape.title()))),
    }
    match declare_shape(link, &channel, shape).await {
        Ok(()) => {
            close(link, &channel).await;
            Ok(Comparison::Same)
        }
        Err(Error::Mismatch { differences, .. }) => Ok(Comparison::Differs(differences)),
        Err(error) => Err(error),
    }
}

/// The declaration of these parts in words, for errors.
pub(super) fn operation(parts: &[Declaration]) -> String {
    match parts {
        [Declaration::Queue(Queue { name, .. }), ..] => format!("declare the queue `{name}`"),
        [Declaration::Exchange(Exchange { name, .. }), ..] => format!("declare the exchange `{name}`"),
        [Declaration::Binding(binding), ..] => binding_of(binding),
        [] => "declare nothing".to_owned(),
    }
}

fn binding_of(Binding { exchange, queue, .. }: &Binding) -> String {
    format!("bind the queue `{queue}` to the exchange `{exchange}`")
}

/// Whether to use an exchange that this user may not declare. RabbitMQ 4 does not even tell whether it exists to a user
/// without permissions on it. Then it is used, and publishing to it fails if it has to.
async fn may_be_there(link: &Link, name: &str) -> Result<bool, Error> {
    match exchange_exists(link, name).await {
        Err(Error::Broker { reason, .. }) if forbids(&reason) => Ok(true),
        there => there,
    }
}

/// Whether an exchange exists. Asks on a channel of its own, since the broker closes it if the answer is no.
pub(super) async fn exchange_exists(link: &Link, name: &str) -> Result<bool, Error> {
    let channel = opened(link).await?;
    let there = is_there(link, &channel, name).await?;
    if there {
        close(link, &channel).await;
    }
    Ok(there)
}

/// Which of these exchanges do not exist. An exchange of which the broker tells this user nothing counts as existing.
pub(super) async fn missing(link: &Link, exchanges: &[String]) -> Result<Vec<String>, Error> {
    let mut channel = opened(link).await?;
    let mut missing = Vec::new();
    for name in exchanges {
        match is_there(link, &channel, name).await {
            Ok(true) => continue,
            Ok(false) => missing.push(name.clone()),
            Err(Error::Broker { reason, .. }) if forbids(&reason) => {}
            Err(error) => return Err(error),
        }
        // The broker has closed the channel with its answer.
        channel = opened(link).await?;
    }
    close(link, &channel).await;
    Ok(missing)
}

/// Whether an exchange exists. If it does not, the broker has closed the channel.
async fn is_there(link: &Link, channel: &Channel, name: &str) -> Result<bool, Error> {
    let shape = Shape { what: What::Exchange, name: name_of(name)?, properties: BTreeMap::new() };
    match link.hear(shape.declare(channel, true)).await {
        Ok(()) => Ok(true),
        Err(Refusal::Refused { code: NOT_FOUND, .. }) => Ok(false),
        Err(refusal) => Err(refusal.during(format!("look for the exchange `{name}`"))),
    }
}

async fn opened(link: &Link) -> Result<Channel, Error> {
    link.channel().await.map_err(|refusal| refusal.during("open a channel"))
}

async fn bind(link: &Link, channel: &Channel, binding: &Binding) -> Result<(), Error> {
    let Binding { exchange, key, queue } = binding;
    let names = (name_of(queue)?, name_of(exchange)?, name_of(key)?);
    let bound = channel.queue_bind(names.0, names.1, names.2, QueueBindOptions::default(), FieldTable::default());
    link.hear(bound).await.map_err(|refusal| refusal.during(binding_of(binding)))
}

/// Deletes bindings, several at once. For the broker, deleting one that does not exist is no error.
pub(super) async fn unbind(link: &Link, bindings: &[Binding]) -> Result<(), Error> {
    let share = bindings.len().div_ceil(CHANNELS_TO_UNBIND).max(1);
    // Each is waited for: a channel must not be dropped while it is open.
    join_all(bindings.chunks(share).map(|share| unbind_in_turn(link, share))).await.into_iter().collect()
}

async fn unbind_in_turn(link: &Link, bindings: &[Binding]) -> Result<(), Error> {
    let channel = opened(link).await?;
    for Binding { exchange, key, queue } in bindings {
        let names = (name_of(queue)?, name_of(exchange)?, name_of(key)?);
        let unbound = channel.queue_unbind(names.0, names.1, names.2, FieldTable::default());
        let refused = |refusal: Refusal| refusal.during(format!("unbind the queue `{queue}` from `{exchange}`"));
        link.hear(unbound).await.map_err(refused)?;
    }
    close(link, &channel).await;
    Ok(())
}

/// Closes a channel that is not needed any more. It must not just be dropped: if the broker closes it at that moment,
/// or the connection is being closed, lapin would end the whole connection.
pub(super) async fn close(link: &Link, channel: &Channel) {
    let closing = channel.close(200, "OK".into());
    if link.is_blocked() {
        // The first poll queues the frame. lapin sends it when the alarm ends.
        let _ = closing.now_or_never();
    } else {
        // An error means that the channel has ended already.
        let _ = link.ask(closing).await;
    }
}

/// A name, checked for AMQP's limit of 255 bytes.
fn name_of(name: &str) -> Result<ShortString, Error> {
    short(name).map_err(Error::Invalid)
}

/// Declares a queue or an exchange.
///
/// # Errors
/// `Mismatch` with all differences if it exists with other arguments.
async fn declare_shape(link: &Link, channel: &Channel, shape: Shape) -> Result<(), Error> {
    match link.hear(shape.declare(channel, false)).await {
        Ok(()) => Ok(()),
        Err(Refusal::Refused { code: PRECONDITION_FAILED, text }) if text.contains(INEQUIVALENT) => {
            let name = shape.title();
            Err(Error::Mismatch { name, differences: differences(link, shape, text).await })
        }
        Err(refusal) => Err(refusal.during(format!("declare the {}", shape.title()))),
    }
}

/// What kind of thing a [`Shape`] is.
#[derive(Debug, Clone, Copy)]
enum What {
    Exchange,
    Queue,
}

/// A queue or an exchange with everything that the broker compares, under the broker's names.
#[derive(Debug)]
struct Shape {
    what: What,
    name: ShortString,
    properties: BTreeMap<String, AMQPValue>,
}

impl Shape {
    fn of_exchange(exchange: &Exchange) -> Result<Self, Error> {
        let kind = match exchange.kind {
            ExchangeKind::Direct => "direct",
            ExchangeKind::Topic => "topic",
            ExchangeKind::Fanout => "fanout",
        };
        let properties = [("type", text(kind)), ("durable", AMQPValue::Boolean(true))];
        Ok(Self { what: What::Exchange, name: name_of(&exchange.name)?, properties: owned(properties) })
    }

    /// The queue as it is declared. All numbers are 64 bits wide: some versions of RabbitMQ take the same number in
    /// another width for another argument.
    fn of_queue(queue: &Queue) -> Result<Self, Error> {
        let exclusive = queue.kind == QueueKind::Exclusive;
        let mut properties =
            owned([("durable", AMQPValue::Boolean(!exclusive)), ("exclusive", AMQPValue::Boolean(exclusive))]);
        // The type is given even if it is RabbitMQ's default, since a virtual host may have another default.
        match queue.kind {
            QueueKind::Exclusive => {}
            QueueKind::Classic => drop(properties.insert("x-queue-type".into(), text("classic"))),
            QueueKind::Quorum => drop(properties.insert("x-queue-type".into(), text("quorum"))),
            QueueKind::Stream => drop(properties.insert("x-queue-type".into(), text("stream"))),
        }
        let sizes =
            [("x-max-length-bytes", queue.max_bytes), ("x-stream-max-segment-size-bytes", queue.segment_bytes())];
        for (argument, bytes) in sizes.into_iter().filter_map(|(argument, bytes)| Some((argument, bytes?))) {
            let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
            properties.insert(argument.into(), AMQPValue::LongLongInt(bytes));
        }
        if let Some(age) = queue.age() {
            properties.insert("x-max-age".into(), text(&age));
        }
        if let Some(expires) = queue.expires {
            let milliseconds = expires.as_millis().clamp(1, u128::from(u32::MAX));
            properties.insert("x-expires".into(), AMQPValue::LongLongInt(milliseconds as i64));
        }
        if let Some(length) = queue.max_length {
            properties.insert("x-max-length".into(), AMQPValue::LongLongInt(length.into()));
        }
        if let Some(overflow) = queue.overflow() {
            properties.insert("x-overflow".into(), text(overflow));
        }
        if queue.single_active {
            properties.insert("x-single-active-consumer".into(), AMQPValue::Boolean(true));
        }
        if let Some(priority) = queue.max_priority {
            properties.insert("x-max-priority".into(), AMQPValue::LongLongInt(priority.into()));
        }
        if let Some(limit) = queue.delivery_limit {
            properties.insert("x-delivery-limit".into(), AMQPValue::LongLongInt(limit.into()));
        }
        if let Some((exchange, key)) = &queue.dead_letter {
            properties.insert("x-dead-letter-exchange".into(), text(exchange));
            properties.insert("x-dead-letter-routing-key".into(), text(key));
            if queue.kind == QueueKind::Quorum && !queue.keeps_latest {
                // Otherwise the broker drops a message that the queue of dead letters refuses. This strategy requires
                // this overflow.
                properties.insert("x-dead-letter-strategy".into(), text("at-least-once"));
                properties.insert("x-overflow".into(), text("reject-publish"));
            }
        }
        Ok(Self { what: What::Queue, name: name_of(&queue.name)?, properties })
    }

    /// The thing in words, for errors.
    fn title(&self) -> String {
        match self.what {
            What::Exchange => format!("exchange `{}`", self.name),
            What::Queue => format!("queue `{}`", self.name),
        }
    }

    /// Declares it. If `passive` is set, this only checks that it exists.
    async fn declare(&self, channel: &Channel, passive: bool) -> lapin::Result<()> {
        let is = |property: &str| self.properties.get(property) == Some(&AMQPValue::Boolean(true));
        let arguments = self.properties.iter().filter(|(name, _)| name.starts_with("x-"));
        let arguments: BTreeMap<ShortString, AMQPValue> =
            arguments.map(|(name, value)| (name.as_str().into(), value.clone())).collect();
        let (durable, auto_delete) = (is("durable"), is("auto_delete"));
        match self.what {
            What::Exchange => {
                let kind = match self.properties.get("type") {
                    Some(AMQPValue::LongString(kind)) => Kind::Custom(kind.to_string()),
                    _ => Kind::Direct,
                };
                let options =
                    ExchangeDeclareOptions { passive, durable, auto_delete, internal: is("internal"), nowait: false };
                channel.exchange_declare(self.name.clone(), kind, options, arguments.into()).await
            }
            What::Queue => {
                let options =
                    QueueDeclareOptions { passive, durable, exclusive: is("exclusive"), auto_delete, nowait: false };
                channel.queue_declare(self.name.clone(), options, arguments.into()).await.map(|_| ())
            }
        }
    }
}

fn text(value: &str) -> AMQPValue {
    AMQPValue::LongString(value.into())
}

fn owned<const N: usize>(properties: [(&str, AMQPValue); N]) -> BTreeMap<String, AMQPValue> {
    properties.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

/// A sentence for each argument that differs from what the broker has. `complaint` is the broker's first refusal.
///
/// The broker names only the first argument that differs. So the broker's value is put in its place, and the
/// declaration is tried again, until the broker accepts it or refuses it for another reason. This never creates
/// anything, since each try first checks that the thing exists.
async fn differences(link: &Link, mut shape: Shape, complaint: String) -> Vec<String> {
    let mut differences = Vec::new();
    let mut complaint = complaint;
    let mut seen = Vec::new();
    loop {
        let Some(difference) = Difference::read(&complaint) else {
            if differences.is_empty() {
                differences.push(complaint);
            }
            return differences;
        };
        if seen.contains(&difference.argument) {
            return differences;
        }
        differences.push(difference.sentence());
        match &difference.current {
            None => shape.properties.remove(&difference.argument),
            Some(current) => match current.value(shape.properties.get(&difference.argument)) {
                Some(value) => shape.properties.insert(difference.argument.clone(), value),
                None => return differences,
            },
        };
        seen.push(difference.argument);
        match declare_again(link, &shape).await {
            Err(Refusal::Refused { text, .. }) if text.contains(INEQUIVALENT) => complaint = text,
            _ => return differences,
        }
    }
}

/// Declares on a channel of its own what exists already.
async fn declare_again(link: &Link, shape: &Shape) -> Result<(), Refusal> {
    let channel = link.channel().await?;
    link.hear(shape.declare(&channel, true)).await?;
    link.hear(shape.declare(&channel, false)).await?;
    close(link, &channel).await;
    Ok(())
}
