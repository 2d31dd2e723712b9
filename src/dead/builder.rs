//! What may be said before dead letters are looked at, and connecting.

use std::time::Duration;

use super::DeadLetters;
use crate::environment;
use crate::error::Error;
use crate::settings::{Decided, Settings, common_settings};
use crate::topology::ServiceId;
use crate::transport::{ANSWER_TIMEOUT, Role};

/// How long a queue may take over an answer unless it is said otherwise. One whose nodes run answers in milliseconds, and one
/// that has lost its leader within five seconds; one whose nodes are away keeps nobody waiting for longer.
const QUEUE_TIMEOUT: Duration = Duration::from_secs(8);

/// What may be said before dead letters are looked at.
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

    /// How long each queue may take over each answer, such as one more letter. Default 8 s, at most 30 s.
    ///
    /// A queue whose node is away, or most of whose nodes are, gives none. When it is asked for a letter, RabbitMQ ends the whole
    /// connection, 3.10 at once and 4.3 after a minute.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.settings.timeout = Some(timeout);
        self
    }

    /// How many dead letters each service has that takes oneway calls or has dead letters, in the order of their names,
    /// whether it runs or not: those that the catalogue names, the queue `NAMESPACE.services`, where every server enters its
    /// own. A service whose queue of dead letters is missing is left out. One whose queue does not answer within
    /// [`timeout`](DeadLettersBuilder::timeout), since the nodes that it is on are away, has the error in the place of its
    /// count, and holds up no other.
    ///
    /// The catalogue is read at least twice, 300 ms apart, since others may read it at the same moment, and what one has
    /// taken out another does not see until it is back; for 3 s if it is empty, but within
    /// [`timeout`](DeadLettersBuilder::timeout). The user needs the permission to read `NAMESPACE.services`
    /// and, to RabbitMQ 4.3, one on each `NAMESPACE.SERVICE.dead`, such as to read it.
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
    /// As [`DeadLettersBuilder::connect`], and `Broker` when the catalogue cannot be read, as without that permission, or
    /// while the node is away that it is on: only [`DeadLetters::count`] of each service tells then.
    pub async fn counts(self, url: impl AsRef<str>) -> Result<Vec<(String, Result<u64, Error>)>, Error> {
        let decided = self.settings.decide()?;
        let dial = decided.dial.dial(url.as_ref())?;
        super::catalogue::counts(&dial, &decided.namespace, queue_timeout(&decided)).await
    }

    /// Connects to the broker that `HOPLINE_URL` names, [with](Self::with_env) what else the environment says: see
    /// [`environment`](crate::environment).
    ///
    /// # Errors
    /// As [`connect`](Self::connect), and `Invalid` for a variable that is missing or cannot be used.
    pub async fn connect_env(self, service: &str) -> Result<DeadLetters, Error> {
        self.with_env().connect(environment::url()?, service).await
    }

    /// Connects to the broker that `url` names, as [`ClientBuilder::connect`](crate::ClientBuilder::connect) reads it, for
    /// the dead letters of `service`, which is `name` or `name.vMAJOR`. A connection that is lost is not made again.
    ///
    /// # Errors
    /// `Invalid` for an address, a name or a setting that cannot be used, `Connect` when no broker answers or it refuses.
    pub async fn connect(self, url: impl AsRef<str>, service: &str) -> Result<DeadLetters, Error> {
        let decided = self.settings.decide()?;
        let service = ServiceId::parse(service).map_err(Error::Invalid)?;
        // Who it is to the broker is known from the beginning then.
        let transport = decided.dial.dial(url.as_ref())?.connect(Role::Operator).await?;
        let timeout = queue_timeout(&decided);
        Ok(DeadLetters { transport, namespace: decided.namespace, service, timeout })
    }
}

fn queue_timeout(decided: &Decided) -> Duration {
    decided.timeout.unwrap_or(QUEUE_TIMEOUT).min(ANSWER_TIMEOUT)
}
