//! The settings for dead letters, and connecting.

use std::time::Duration;

use super::DeadLetters;
use crate::environment;
use crate::error::Error;
use crate::limits::{ANSWER_TIMEOUT, QUEUE_TIMEOUT};
use crate::settings::{Decided, Settings, common_settings};
use crate::topology::{Namespace, ServiceId};
use crate::transport::{Role, Transport};

/// Settings for [`DeadLetters`], to change before connecting.
///
/// ```no_run
/// # async fn example() -> Result<(), hopline::Error> {
/// let builder = hopline::DeadLetters::builder().namespace("shop").timeout(std::time::Duration::from_secs(5));
/// let dead = builder.connect("amqp://operator:secret@broker.example.com", "mail").await?;
/// println!("{}", dead.count().await?);
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, Default)]
pub struct DeadLettersBuilder {
    settings: Settings,
}

impl DeadLettersBuilder {
    common_settings!("operator PROCESS");

    /// How long a queue may take for each answer, such as one more letter. Default: 8 s. At most 30 s.
    ///
    /// A queue does not answer if its node is down, or most of its nodes are. If it is asked for a letter, RabbitMQ
    /// closes the connection: 3.10 at once, and 4.3 after a minute.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.settings.timeout = Some(timeout);
        self
    }

    /// How many dead letters each service has, in the order of the services' names. Services are found whether they run
    /// or not, if they have oneway methods or have ever had a dead letter.
    ///
    /// If a queue does not answer within [`timeout`](DeadLettersBuilder::timeout), since its nodes are down, its
    /// service has the error in place of a number. Other services do not wait for it. A service whose queue of dead
    /// letters does not exist is left out.
    ///
    /// The services are in a catalogue, the queue `NAMESPACE.services`, where every server enters its own. It is read
    /// at least twice, with 300 ms in between, since another program may be reading it at the same time. If it is
    /// empty, it is read for 3 s, but not longer than [`timeout`](DeadLettersBuilder::timeout). The user needs the
    /// permission to read `NAMESPACE.services`. On RabbitMQ 4.3 it also needs some permission on each
    /// `NAMESPACE.SERVICE.dead`, such as to read it.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), hopline::Error> {
    /// for (service, count) in hopline::DeadLetters::builder().counts("memory://").await? {
    ///     println!("{service}: {}", count?);
    /// }
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// As [`DeadLettersBuilder::connect`]. `Broker` if the catalogue cannot be read, since the permission is missing or
    /// its node is down. Then [`DeadLetters::count`] still works for each service.
    pub async fn counts(self, url: impl AsRef<str>) -> Result<Vec<(String, Result<u64, Error>)>, Error> {
        let decided = self.settings.decide()?;
        let dial = decided.dial.dial(url.as_ref())?;
        super::catalogue::counts(&dial, &decided.namespace, queue_timeout(&decided)).await
    }

    /// The connection alone, and the namespace: for tools that look at the broker itself. It is no part of the API.
    ///
    /// # Errors
    /// As [`connect`](Self::connect).
    #[doc(hidden)]
    pub async fn transport(self, url: impl AsRef<str>) -> Result<(Transport, Namespace), Error> {
        let decided = self.settings.decide()?;
        let transport = decided.dial.dial(url.as_ref())?.connect(Role::Operator).await?;
        Ok((transport, decided.namespace))
    }

    /// Connects to the broker in the variable `HOPLINE_URL`, with all other settings from the environment that the code
    /// does not set: see [`environment`](crate::environment).
    ///
    /// # Errors
    /// As [`connect`](Self::connect), and `Invalid` for a variable that is missing or cannot be used.
    pub async fn connect_env(self, service: &str) -> Result<DeadLetters, Error> {
        self.with_env().connect(environment::url()?, service).await
    }

    /// Connects to the broker at `url`, for the dead letters of `service`, which is `name` or `name.vMAJOR`. For the
    /// forms of `url`, see [`ClientBuilder::connect`](crate::ClientBuilder::connect). If the connection is lost, it is
    /// not opened again.
    ///
    /// # Errors
    /// `Invalid` for an address, a name or a setting that cannot be used. `Connect` if no broker answers, or the broker
    /// refuses.
    pub async fn connect(self, url: impl AsRef<str>, service: &str) -> Result<DeadLetters, Error> {
        let decided = self.settings.decide()?;
        let service = ServiceId::parse(service).map_err(Error::Invalid)?;
        // The role of an operator asks the broker for the own user at once, which replaying needs.
        let transport = decided.dial.dial(url.as_ref())?.connect(Role::Operator).await?;
        let timeout = queue_timeout(&decided);
        Ok(DeadLetters { transport, namespace: decided.namespace, service, timeout })
    }
}

/// How long a queue may take for each answer.
pub(crate) fn queue_timeout(decided: &Decided) -> Duration {
    decided.timeout.unwrap_or(QUEUE_TIMEOUT).min(ANSWER_TIMEOUT)
}
