//! Publishing that waits neither for the end of a broker's alarm nor for a queue that does not answer.

use std::time::Duration;

use crate::client::BLOCKED_WAIT;
use crate::error::Error;
use crate::transport::{Confirm, Publication, Transport, is_end};

/// Publishes once the broker takes messages, and waits for its word: none when it has not said one for `timeout`, as of a
/// quorum queue without its majority. The message may be in it.
///
/// # Errors
/// `Blocked` when it has taken nothing for [`BLOCKED_WAIT`]: the message has left, or will when it can, if `may_have_run`
/// says so. `Disconnected`.
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

/// Waits until the broker takes messages, or is gone, which whoever publishes is told.
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

/// Waits until the broker has taken nothing for too long; for ever if it is gone.
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
