//! Publishes one message again and again, on a channel of its own. If its queue does not answer, nothing else is held
//! up.
//!
//! A server that drains uses it. Messages without content push calls through a quorum queue to its consumer, before the
//! consumer is cancelled.

use std::sync::Arc;

use futures::{StreamExt as _, TryStreamExt as _, stream};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::connection::Link;
use super::declare;
use super::publisher::confirming;
use super::user::User;
use super::wire::Submitted;
use crate::transport::{Lost, Publication, Receipt};

/// How many of the messages may be unconfirmed. RabbitMQ stops reading from a connection that has sent 32 unconfirmed
/// messages to a quorum queue.
const MAX_UNCONFIRMED: usize = 16;

/// Publishes the message again and again, until `until` is cancelled. If the channel or the connection ends before
/// that, it stops without an error: the caller looks at its consumer, not at these messages.
pub(super) async fn repeat(link: Arc<Link>, user: Arc<User>, publication: Publication, until: CancellationToken) {
    let Ok(channel) = confirming(&link).await else { return };
    let closed = link.wire().publish_on(channel.id(), 0);
    let publish = || {
        let (outcome, receipt) = Receipt::new();
        let handed = Submitted { publication: publication.clone(), outcome };
        if let Err(back) = link.wire().publish(channel.id(), user.name(), handed) {
            back.tell(Err(Lost::connection(false, "the channel has ended".into())));
        }
        receipt
    };
    let each = stream::repeat_with(publish).buffer_unordered(MAX_UNCONFIRMED);
    let repeating = each.try_for_each(|_| std::future::ready(Ok(())));
    tokio::select! {
        ended = repeating => debug!(name = link.name(), error = ?ended.err(), "a message is not repeated any more"),
        closed = closed => debug!(name = link.name(), ?closed, "a message is not repeated any more"),
        _ = link.end() => {}
        () = until.cancelled() => {}
    }
    drop(link.wire().take_unfinished(channel.id()).await);
    declare::close(&link, &channel).await;
}
