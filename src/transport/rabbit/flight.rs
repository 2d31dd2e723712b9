//! One publication on its way: how it is sent, how it ends, and where that is told.

use std::sync::Arc;

use lapin::options::BasicPublishOptions;
use lapin::types::ShortString;
use lapin::{BasicProperties, Channel, Confirmation};
use tokio::sync::oneshot;

use super::{properties, words};
use crate::transport::{Confirm, Lost, Publication};

/// Where the outcome of a publication is told.
pub(super) type Outcome = oneshot::Sender<Result<Confirm, Lost>>;

/// When the outcome of a publication is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Told {
    /// As soon as it is known.
    AtOnce,
    /// When the task is awake for another reason, or [`IN_PASSING`] later. The confirm alone does not wake the task,
    /// which saves much work under load.
    InPassing,
}

/// Tells the outcome. It does not matter if nobody waits for it.
pub(super) fn tell(outcome: Outcome, what: Result<Confirm, Lost>) {
    let _ = outcome.send(what);
}

/// Tells that a publication was lost with its connection. `handed_over` tells whether it may have been sent.
pub(super) fn lose(outcome: Outcome, handed_over: bool, reason: &Arc<str>) {
    tell(outcome, Err(Lost::connection(handed_over, reason.clone())));
}

/// A publication that has ended, with the number that it had on its channel.
pub(super) struct Flight {
    pub(super) number: u64,
    pub(super) told: Told,
    pub(super) outcome: Outcome,
    pub(super) fate: PublishFate,
}

/// How a publication ended.
pub(super) enum PublishFate {
    /// The broker has confirmed it. lapin has attached the return of the publication with the number `returned`, which
    /// may be another one.
    Confirmed { acked: bool, returned: Option<u64> },
    /// It was sent, and the channel or connection ended before the confirm.
    Unknown { exchange: String, key: String, size: usize, error: lapin::Error },
    /// It was not sent completely, so the broker has not got it.
    Unsent { publication: Box<Publication>, error: lapin::Error },
}

/// Publishes a message and waits for its confirm. The first poll of this future puts the frames into lapin's queue.
pub(super) async fn fly(
    channel: Channel,
    number: u64,
    properties: BasicProperties,
    names: (ShortString, ShortString),
    publication: Publication,
    told: Told,
    outcome: Outcome,
) -> Flight {
    let options = BasicPublishOptions { mandatory: publication.mandatory, immediate: false };
    let (exchange, key) = names;
    let sent = channel.basic_publish(exchange, key, options, &publication.body, properties).await;
    let fate = match sent {
        Err(error) => PublishFate::Unsent { publication: Box::new(publication), error },
        Ok(confirm) => {
            let Publication { exchange, key, body, .. } = publication;
            match confirm.await {
                Ok(confirmation) => {
                    PublishFate::Confirmed { acked: !confirmation.is_nack(), returned: returned_number(confirmation) }
                }
                Err(error) => PublishFate::Unknown { exchange, key, size: body.len(), error },
            }
        }
    };
    Flight { number, told, outcome, fate }
}

/// The number of the publication whose return lapin has attached to this confirm.
fn returned_number(confirmation: Confirmation) -> Option<u64> {
    let message = confirmation.take_message()?;
    message.delivery.properties.message_id().as_ref()?.as_str().parse().ok()
}

/// What the broker said when it closed the channel.
pub(super) fn said(failed: &[Flight]) -> Option<String> {
    failed.iter().find_map(|flight| match &flight.fate {
        PublishFate::Unknown { error, .. } | PublishFate::Unsent { error, .. } if error.is_amqp_soft_error() => {
            Some(words::of(error))
        }
        _ => None,
    })
}

/// The names of an exchange and a key, as lapin takes them.
type Names = (ShortString, ShortString);

/// A publication as lapin takes it. Its number is sent as `message_id`: a return contains it.
///
/// # Errors
/// A sentence that names the text that is too long for AMQP.
pub(super) fn on_the_wire(
    publication: &Publication,
    user: Option<&ShortString>,
    number: u64,
) -> Result<(BasicProperties, Names), String> {
    let mut properties = properties::written(&publication.properties)?.with_message_id(number.to_string().into());
    if let Some(user) = user {
        properties = properties.with_user_id(user.clone());
    }
    Ok((properties, (properties::short(&publication.exchange)?, properties::short(&publication.key)?)))
}
