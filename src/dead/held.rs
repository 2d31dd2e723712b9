//! Messages that are taken out of a queue, and put back when nobody needs them any more.

use std::future::Future;
use std::time::Duration;

use crate::error::Error;
use crate::transport::{Delivery, Settle, Transport};

/// What helps if a queue is unreachable.
const HELPS: &str = "start the node that the queue is on, or most of its nodes, and try again";

/// Takes a letter out of a queue, if the queue answers within `timeout`.
pub(super) async fn take(transport: &Transport, queue: &str, timeout: Duration) -> Result<Option<Delivery>, Error> {
    let operation = format!("take a dead letter out of `{queue}`");
    let taken = answered(timeout, &operation, transport.get(queue)).await;
    taken.map_err(|error| match error {
        // RabbitMQ closes the connection over a queue that has lost its leader.
        Error::Disconnected { reason, .. } if reason.contains(&format!("'{queue}'")) => {
            Error::refused(operation, format!("{reason}: {HELPS}"))
        }
        error => error,
    })
}

/// The broker's answer to an `operation` on a queue, if it comes within `timeout`.
pub(crate) async fn answered<T>(
    timeout: Duration,
    operation: &str,
    answer: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    tokio::time::timeout(timeout, answer).await.unwrap_or_else(|_| Err(helped(Error::silent(operation, timeout))))
}

/// Adds what helps to an error about a queue that does not answer.
fn helped(error: Error) -> Error {
    match error {
        Error::Broker { operation, reason, may_have_run } => {
            Error::Broker { operation, reason: format!("{reason}: {HELPS}"), may_have_run }
        }
        error => error,
    }
}

/// Messages that were taken out of a queue and stay there: they are requeued when this is dropped.
#[derive(Default)]
pub(super) struct HeldLetters(Vec<Delivery>);

impl HeldLetters {
    pub(super) fn keep(&mut self, mut delivery: Delivery) {
        // The broker has the message. Only its tag is needed here.
        delivery.body.clear();
        self.0.push(delivery);
    }

    /// Removes the last message for good.
    pub(super) fn remove_last(&mut self) {
        if let Some(delivery) = self.0.pop() {
            delivery.settle(Settle::Ack);
        }
    }
}

impl Drop for HeldLetters {
    fn drop(&mut self) {
        self.0.drain(..).for_each(|delivery| delivery.settle(Settle::GiveBack));
    }
}
