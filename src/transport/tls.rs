//! What a connection by TLS is told: whom to trust, and who to be.

use std::fmt;

/// Settings for `amqps://`, where the system's roots alone do not do. The broker has to prove that it is the host in the
/// address in any case.
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

/// Certificates and the key of the first of them, in PEM.
#[derive(Clone)]
pub(super) struct Identity {
    pub(super) certificates: Vec<u8>,
    pub(super) key: Vec<u8>,
}

impl Tls {
    /// Trust in the system's roots, and no certificate of one's own: what `amqps://` means without settings.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Trusts the certificates in `pem`, one or several, instead of the system's roots: only they and what they have
    /// signed can be the broker.
    #[must_use]
    pub fn ca(mut self, pem: impl Into<Vec<u8>>) -> Self {
        self.ca = Some(pem.into());
        self
    }

    /// Shows the broker a certificate: `certificates` in PEM, one's own first and then those that lead to a root, and its
    /// private `key` in PEM (PKCS#8, PKCS#1 or SEC1, without a password).
    ///
    /// Where the address names no user, the certificate is also who logs in, by SASL EXTERNAL: RabbitMQ needs the plugin
    /// `rabbitmq_auth_mechanism_ssl` for that. With `amqps://user:password@host` the password does.
    #[must_use]
    pub fn identity(mut self, certificates: impl Into<Vec<u8>>, key: impl Into<Vec<u8>>) -> Self {
        self.identity = Some(Identity { certificates: certificates.into(), key: key.into() });
        self
    }
}

impl fmt::Debug for Tls {
    /// Without the key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls")
            .field("own_ca", &self.ca.is_some())
            .field("identity", &self.identity.is_some())
            .finish_non_exhaustive()
    }
}
