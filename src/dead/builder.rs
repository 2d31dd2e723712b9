//! What may be said before dead letters are looked at, and connecting.

use std::time::Duration;

use super::DeadLetters;
use crate::error::Error;
use crate::topology::{Namespace, ServiceId};
#[cfg(feature = "tls")]
use crate::transport::Tls;
use crate::transport::{ANSWER_TIMEOUT, DialSettings, Role};

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
#[derive(Debug, Clone)]
pub struct DeadLettersBuilder {
    namespace: Result<Namespace, String>,
    timeout: Duration,
    dial: DialSettings,
}

impl Default for DeadLettersBuilder {
    fn default() -> Self {
        Self { namespace: Ok(Namespace::default()), timeout: QUEUE_TIMEOUT, dial: DialSettings::default() }
    }
}

impl DeadLettersBuilder {
    /// The prefix of every name on the broker, `[A-Za-z0-9_-]+`: that of the services. Default `hopline`.
    #[must_use]
    pub fn namespace(mut self, name: &str) -> Self {
        self.namespace = Namespace::new(name);
        self
    }

    /// What people are to call whoever looks, so that they find its connection: it is shown by the broker as
    /// `NAME operator PROCESS`, and in the log. 1 to 64 bytes, no control characters. Default: the program's name.
    #[must_use]
    pub fn name(mut self, name: &str) -> Self {
        self.dial.name = Some(name.to_owned());
        self
    }

    /// How long each address of the broker may take until its connection can be used, from the first question to the name
    /// server on; an address may say otherwise (`?connection_timeout=`, in milliseconds). Default 10 s.
    #[must_use]
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.dial.timeout = timeout;
        self
    }

    /// How long each queue may take over each answer, such as one more letter. Default 8 s, at most 30 s.
    ///
    /// A queue whose node is away, or most of whose nodes are, gives none. When it is asked for a letter, RabbitMQ ends the whole
    /// connection, 3.10 at once and 4.3 after a minute.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout.min(ANSWER_TIMEOUT);
        self
    }

    /// Whom to trust and who to be on `amqps://`. Default: the system's roots, and no certificate.
    #[cfg(feature = "tls")]
    #[must_use]
    pub fn tls(mut self, tls: Tls) -> Self {
        self.dial.tls = Some(tls);
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
    pub async fn counts(self, url: &str) -> Result<Vec<(String, Result<u64, Error>)>, Error> {
        let namespace = self.namespace.map_err(Error::Invalid)?;
        super::catalogue::counts(&self.dial.dial(url)?, &namespace, self.timeout).await
    }

    /// Connects to the broker that `url` names, as [`ClientBuilder::connect`](crate::ClientBuilder::connect) reads it, for
    /// the dead letters of `service`, which is `name` or `name.vMAJOR`. A connection that is lost is not made again.
    ///
    /// # Errors
    /// `Invalid` for an address, a name or a setting that cannot be used, `Connect` when no broker answers or it refuses.
    pub async fn connect(self, url: &str, service: &str) -> Result<DeadLetters, Error> {
        let namespace = self.namespace.map_err(Error::Invalid)?;
        let service = ServiceId::parse(service).map_err(Error::Invalid)?;
        // Who it is to the broker is known from the beginning then.
        let transport = self.dial.dial(url)?.connect(Role::Operator).await?;
        Ok(DeadLetters { transport, namespace, service, timeout: self.timeout })
    }
}
