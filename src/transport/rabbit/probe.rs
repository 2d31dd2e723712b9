//! What an operator asks the broker about itself, and about what this user may do. Nothing here makes or changes anything
//! there.

use lapin::BasicProperties;
use lapin::options::BasicPublishOptions;
use lapin::protocol::{AMQPClass, connection, parse_class};
use lapin::types::{AMQPValue, FieldTable};

use super::connection::{Link, PRECONDITION_FAILED, Refusal};
use super::frames;
use super::properties::short;
use super::publisher;

/// What the broker says of itself when a connection begins.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Greeting {
    /// Its name, such as `RabbitMQ`.
    pub product: String,
    /// Its version, such as `4.3.0`.
    pub version: String,
    /// What it can do, such as `publisher_confirms`.
    pub capabilities: Vec<String>,
}

/// How an exchange or a queue compares with its declaration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Comparison {
    /// It is not there.
    Absent,
    /// It is as declared.
    Same,
    /// It is there and differs: a sentence for each difference, which names the argument in backticks.
    Differs(Vec<String>),
}

/// What the broker said when the connection began. `None` if that cannot be read.
pub(super) fn greeting(link: &Link) -> Option<Greeting> {
    read(link.first_words())
}

fn read(first_words: &[u8]) -> Option<Greeting> {
    let head = frames::Head::of(first_words)?;
    let frame = first_words.get(..head.size)?;
    let (_, class) = parse_class(frames::payload(frame)).ok()?;
    let AMQPClass::Connection(connection::AMQPMethod::Start(start)) = class else { return None };
    let said = |name: &str| match value(&start.server_properties, name) {
        Some(AMQPValue::LongString(text)) => text.to_string(),
        _ => String::new(),
    };
    let capabilities = match value(&start.server_properties, "capabilities") {
        Some(AMQPValue::FieldTable(table)) => {
            let there = table.inner().iter().filter(|(_, value)| **value == AMQPValue::Boolean(true));
            there.map(|(name, _)| name.to_string()).collect()
        }
        _ => Vec::new(),
    };
    Some(Greeting { product: said("product"), version: said("version"), capabilities })
}

fn value<'a>(table: &'a FieldTable, name: &str) -> Option<&'a AMQPValue> {
    table.inner().get(name)
}

/// Sends a message whose `expiration` is no number. The broker looks at permissions and at the exchange first, and at
/// this before it routes the message. So its refusal of the `expiration` means that the rest is in order.
pub(super) async fn publish(link: &Link, exchange: &str, key: &str) -> Result<(), Refusal> {
    let channel = publisher::confirming(link).await?;
    let name = |text: &str| short(text).map_err(|text| Refusal::Refused { code: 0, text });
    let (exchange, key) = (name(exchange)?, name(key)?);
    let properties = BasicProperties::default().with_expiration("never".into());
    let options = BasicPublishOptions::default();
    let said = async { channel.basic_publish(exchange, key, options, &[], properties).await?.await };
    match link.hear(said).await {
        Err(Refusal::Refused { code: PRECONDITION_FAILED, .. }) => Ok(()),
        Err(refusal) => Err(refusal),
        Ok(_) => Err(Refusal::Refused { code: 0, text: "the broker takes a message that it has to refuse".to_owned() }),
    }
}
