//! Publishing a dead letter without waiting for ever: for a broker under an alarm, or for a queue that does not answer.

use std::time::Duration;

use crate::error::Error;
use crate::limits::BLOCKED_WAIT;
use crate::transport::{Confirm, Publication, Transport, is_end};

/// Publishes a message as soon as the broker accepts messages, and waits for its confirm. Returns `None` if that does
/// not come within `timeout`, for example since most nodes of a quorum queue are down. The message may be in the queue
/// then.
///
/// # Errors
/// `Blocked` if the broker has accepted nothing for [`BLOCKED_WAIT`]. If `may_have_run` is true, the message was handed
/// over, and is published when the alarm ends. `Disconnected` if the connection is lost.
pub(super) async fn publish(
    transport: &Transport,
    publication: Publication,
    timeout: Duration,
) -> Result<Option<Confirm>, Error> {
    until_open(transport, false).await?;
    let receipt = transport.publish(publication);
    tokio::select! {
        biased;
        confirm = receipt => Ok(Some(confirm?)),
        error = blocked_for_long(transport) => Err(error),
        () = tokio::time::sleep(timeout) => Ok(None),
    }
}

/// Waits until the broker accepts messages. Also returns when the connection is lost: publishing then fails with the
/// reason.
///
/// # Errors
/// `Blocked` after [`BLOCKED_WAIT`], with `may_have_run` as given.
async fn until_open(transport: &Transport, may_have_run: bool) -> Result<(), Error> {
    let mut events = transport.events();
    let Some(reason) = transport.blocked() else { return Ok(()) };
    let opened = async { while transport.blocked().is_some() && !is_end(&events.recv().await) {} };
    tokio::time::timeout(BLOCKED_WAIT, opened).await.map_err(|_| Error::Blocked {
        method: None,
        reason: reason.to_string(),
        after: BLOCKED_WAIT,
        may_have_run,
    })
}

/// Waits until the broker has accepted nothing for [`BLOCKED_WAIT`]. Never resolves once the connection is lost.
async fn blocked_for_long(transport: &Transport) -> Error {
    let mut events = transport.events();
    loop {
        if let Err(error) = until_open(transport, true).await {
            return error;
        }
        if is_end(&events.recv().await) {
            return std::future::pending().await;
        }
    }
}
