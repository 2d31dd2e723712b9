//! How much waits in the queues of a service, as the broker says.

use std::time::Duration;

use tokio::time::Instant;

use super::Registry;
use crate::clock::later;
use crate::error::{Error, Unanswered};
use crate::topology::ServiceId;
use crate::transport::QueueCount;

/// The queues of a service. A queue is `None` if it does not exist: a service without oneway methods has none for oneway
/// calls, and after its last instance has left, its queues are deleted once the [grace period](crate::Service::grace) is
/// over.
///
/// ```
/// # async fn example(client: hopline::Client) -> Result<(), hopline::Error> {
/// let registry = client.registry();
/// let (instances, queues) = (registry.instances("demo").await?.len(), registry.queues("demo").await?);
/// if let Some(calls) = queues.calls {
///     println!("{} calls wait; {instances} instances reply, and {} read them", calls.waiting, calls.consumers);
/// }
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ServiceQueues {
    /// Calls to any instance.
    pub calls: Option<QueueCount>,
    /// Oneway calls to any instance.
    pub oneway: Option<QueueCount>,
    /// Dead letters. Nobody but [`DeadLetters`](crate::DeadLetters) reads them.
    pub dead: Option<QueueCount>,
}

impl Registry {
    /// How much waits in the queues of `service`, and how many consumers these have. That is what the broker knows. What
    /// the instances know is in [`stats`](Self::stats). Where both do not fit together, an instance hangs, or one cannot
    /// be asked.
    ///
    /// # Errors
    /// `Invalid` for a name that no service can have, `Disconnected` without a connection, `Timeout` if the broker has not
    /// answered within the [total time](Self::total), for example since the node of a queue is away.
    pub async fn queues(&self, service: &str) -> Result<ServiceQueues, Error> {
        let service = ServiceId::parse(service).map_err(Error::Invalid)?;
        tokio::select! {
            biased;
            queues = self.client.queues(&service, true) => {
                let [calls, oneway, dead] = queues?;
                Ok(ServiceQueues { calls, oneway, dead })
            }
            () = self.wait_until(Some(later(Instant::now(), self.total))) => Err(silent(&service, self.total)),
        }
    }
}

fn silent(service: &ServiceId, after: Duration) -> Error {
    Error::Timeout { method: format!("the count of the queues of {service}"), after, why: Unanswered::Unsent }
}
