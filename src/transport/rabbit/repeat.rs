//! Publishes one message again and again, on a channel of its own. If its queue does not answer, nothing else is held
//! up.
//!
//! A server that drains uses it. Messages without content push calls through a quorum queue to its consumer, before the
//! consumer is cancelled.

use std::sync::Arc;

use futures::{StreamExt as _, TryStreamExt as _, stream};
use lapin::options::BasicPublishOptions;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::connection::Link;
use super::declare;
use super::flight::on_the_wire;
use super::publisher::confirming;
use super::user::User;
use crate::transport::Publication;

/// How many of the messages may be unconfirmed. RabbitMQ stops reading from a connection that has sent 32 unconfirmed
/// messages to a quorum queue.
const MAX_UNCONFIRMED: usize = 16;

/// Publishes the message again and again, until `until` is cancelled. If the channel or the connection ends before
/// that, it stops without an error: the caller looks at its consumer, not at these messages.
pub(super) async fn repeat(link: Arc<Link>, user: Arc<User>, publication: Publication, until: CancellationToken) {
    let Ok(channel) = confirming(&link).await else { return };
    let repeating = async {
        let (properties, (exchange, key)) = on_the_wire(&publication, user.name(), 0)?;
        let publish = || {
            let options = BasicPublishOptions { mandatory: publication.mandatory, immediate: false };
            let (exchange, key, properties) = (exchange.clone(), key.clone(), properties.clone());
            let sent = channel.basic_publish(exchange, key, options, &publication.body, properties);
            async { sent.await?.await }
        };
        let each = stream::repeat_with(publish).buffer_unordered(MAX_UNCONFIRMED);
        each.try_for_each(|_| std::future::ready(Ok(()))).await.map_err(|error: lapin::Error| error.to_string())
    };
    tokio::select! {
        ended = repeating => debug!(name = link.name(), error = ended.err(), "a message is not repeated any more"),
        _ = link.end() => return,
        () = until.cancelled() => {}
    }
    declare::close(&link, &channel).await;
}
