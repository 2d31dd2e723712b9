//! The settings for TLS: whom to trust, and which certificate to show.

use std::fmt;

/// Settings for `amqps://`. They are only needed if the system's CAs are not enough, or if the broker asks for a client
/// certificate. The broker always has to prove that it is the host in the address.
///
/// ```no_run
/// use hopline::{Client, Tls};
///
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// let tls = Tls::new()
///     .ca(std::fs::read("ca.pem")?)
///     .identity(std::fs::read("client.pem")?, std::fs::read("client.key")?);
/// let client = Client::builder().tls(tls).connect("amqps://broker.example.com").await?;
/// # Ok(()) }
/// ```
#[derive(Clone, Default)]
pub struct Tls {
    pub(super) ca: Option<Vec<u8>>,
    pub(super) identity: Option<Identity>,
}

/// A client certificate, the certificates that lead to its root, and its key, all in PEM.
#[derive(Clone)]
pub(super) struct Identity {
    pub(super) certificates: Vec<u8>,
    pub(super) key: Vec<u8>,
}

impl Tls {
    /// Trusts the system's CAs, and shows no certificate. `amqps://` without settings means the same.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Trusts the certificates in `pem`, one or several, and not the system's CAs. The broker's certificate has to be
    /// one of them, or signed by one of them.
    #[must_use]
    pub fn ca(mut self, pem: impl Into<Vec<u8>>) -> Self {
        self.ca = Some(pem.into());
        self
    }

    /// Shows the broker a client certificate. `certificates` are in PEM: the client's own first, then those that lead
    /// to a root. `key` is its private key in PEM (PKCS#8, PKCS#1 or SEC1, without a password).
    ///
    /// If the address names no user, the certificate is also used to log in, with SASL EXTERNAL. RabbitMQ needs the
    /// plugin `rabbitmq_auth_mechanism_ssl` for that. With `amqps://user:password@host` the password is used.
    #[must_use]
    pub fn identity(mut self, certificates: impl Into<Vec<u8>>, key: impl Into<Vec<u8>>) -> Self {
        self.identity = Some(Identity { certificates: certificates.into(), key: key.into() });
        self
    }
}

impl fmt::Debug for Tls {
    /// Does not show the key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls")
            .field("own_ca", &self.ca.is_some())
            .field("identity", &self.identity.is_some())
            .finish_non_exhaustive()
    }
}
