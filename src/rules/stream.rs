//! The stream of rules: how all of it is read, what comes later, and how a change gets there.

use std::time::Duration;

use bytes::Bytes;
use tokio::time::timeout;
use tracing::warn;
use uuid::Uuid;

use super::rule::RuleChange;
use crate::document::{RULE, RuleDocument};
use crate::error::Error;
use crate::limits::ANSWER_TIMEOUT;
use crate::topology::Namespace;
use crate::transport::{
    Confirm, Consumer, Delivery, Mode, Properties, Publication, Settle, StreamStart, Transport, forbids,
};

/// How long the last message of a stream is waited for, before the stream is taken for empty and gets a first one.
const SILENCE: Duration = Duration::from_millis(300);
/// How long a further message is waited for after the last. The broker delivers messages together that were written
/// together.
const TOGETHER: Duration = Duration::from_millis(5);
/// How many messages may be on their way.
const PREFETCH: u16 = 500;

/// The rules as they come, over a connection of their own. While a stream is not ready, as after a restart, RabbitMQ ends
/// the connection of who asks for it, which must not be that of calls.
pub(crate) struct RuleStream {
    consumer: Consumer,
    pub(crate) transport: Transport,
}

impl RuleStream {
    /// Reads all changes that there are. The stream is declared if this user may do that; otherwise it has to be there.
    ///
    /// Nobody tells where a stream ends. So a second consumer begins with its last message, and the first one reads up to
    /// that. A stream without messages gets one that says nothing.
    ///
    /// # Errors
    /// `Broker` if it cannot be read, `Mismatch` if it is another kind of queue, `Disconnected`.
    pub(super) async fn read(transport: Transport, namespace: &Namespace) -> Result<(Self, Vec<RuleChange>), Error> {
        let queue = namespace.rules();
        match transport.declare(&namespace.rules_kept()).await {
            Err(Error::Broker { reason, .. }) if forbids(&reason) => {}
            declared => declared?,
        }
        let consume = |from| transport.consume(&queue, Mode::Stream { from, prefetch: PREFETCH });
        let mut consumer = consume(StreamStart::First).await.map_err(not_there)?;
        let mut ending = consume(StreamStart::Last).await?;
        let last = match timeout(SILENCE, ending.next()).await {
            Ok(last) => last,
            Err(_) => {
                match publish(&transport, namespace, &RuleDocument { kind: RULE.to_owned(), ..RuleDocument::default() })
                    .await
                {
                    Ok(()) => timeout(ANSWER_TIMEOUT, ending.next()).await.unwrap_or_default(),
                    // Who may not write reads what others have written: nothing yet.
                    Err(Error::Broker { reason, .. }) if forbids(&reason) => {
                        return Ok((Self { consumer, transport }, Vec::new()));
                    }
                    Err(error) => return Err(error),
                }
            }
        };
        let last = last.ok_or_else(ended)?;
        let mut changes = Vec::new();
        loop {
            let delivery = timeout(ANSWER_TIMEOUT, consumer.next()).await.unwrap_or_default().ok_or_else(ended)?;
            let is_last = is_same(&delivery, &last);
            changes.extend(read(delivery));
            if is_last {
                break;
            }
        }
        while let Ok(Some(delivery)) = timeout(TOGETHER, consumer.next()).await {
            changes.extend(read(delivery));
        }
        Ok((Self { consumer, transport }, changes))
    }

    /// The next change. `None` when the queue or the connection is gone.
    pub(super) async fn next(&mut self) -> Option<RuleChange> {
        loop {
            if let Some(change) = read(self.consumer.next().await?) {
                return Some(change);
            }
        }
    }
}

/// Publishes a document, and waits until the stream has it.
///
/// # Errors
/// `Broker` if this user may not write to it, or it takes nothing. `Disconnected`.
pub(crate) async fn publish(transport: &Transport, namespace: &Namespace, rule: &RuleDocument) -> Result<(), Error> {
    let body = serde_json::to_vec(rule).expect("texts and numbers can be JSON");
    let properties = Properties {
        // By this the message is known again.
        correlation_id: Some(Uuid::new_v4().to_string()),
        content_type: Some("application/json".to_owned()),
        persistent: true,
        ..Properties::default()
    };
    let (exchange, key) = (namespace.rules(), rule.target.clone());
    let publication = Publication { exchange, key, mandatory: true, properties, body: Bytes::from(body) };
    let failed = |reason: &str, may_have_run| Error::Broker {
        operation: "keep the rule".to_owned(),
        reason: reason.to_owned(),
        may_have_run,
    };
    match timeout(ANSWER_TIMEOUT, transport.publish(publication)).await {
        Ok(confirm) => match confirm? {
            Confirm::Accepted => Ok(()),
            Confirm::Returned => Err(failed("no queue is bound to the exchange of rules", false)),
            Confirm::Refused | Confirm::TooLarge(_) => Err(failed("the queue of rules takes nothing", false)),
        },
        Err(_) => Err(failed(&format!("no confirm within {ANSWER_TIMEOUT:?}"), true)),
    }
}

/// What a message says. `None` if it says nothing of any target, or cannot be read.
fn read(delivery: Delivery) -> Option<RuleChange> {
    let user = delivery.properties.user_id.clone();
    let change = RuleChange::read(&delivery.body, user.clone()).unwrap_or_else(|error| {
        warn!(user, %error, "a rule that cannot be read is ignored");
        None
    });
    delivery.settle(Settle::Ack);
    change
}

fn is_same(one: &Delivery, other: &Delivery) -> bool {
    one.properties.correlation_id == other.properties.correlation_id && one.body == other.body
}

fn ended() -> Error {
    Error::Broker {
        operation: "deliver the rules".to_owned(),
        reason: "the consumer has ended, or nothing came".to_owned(),
        may_have_run: false,
    }
}

/// Says who can make the stream.
fn not_there(error: Error) -> Error {
    match error {
        Error::Broker { operation, reason, may_have_run } => {
            let way_out = "who may declare it makes it by `hopline rules get`";
            Error::Broker { operation, reason: format!("{reason} ({way_out})"), may_have_run }
        }
        error => error,
    }
}
