//! TLS for connections to RabbitMQ: with the user's own CA and certificate, and errors that say what to do.
//!
//! A build without the cargo feature `tls` has `without_tls.rs` in its place.

use std::io;

use futures::io::{AsyncRead, AsyncWrite};
use lapin::tcp::{AsyncTcpStream, RustlsConnector, RustlsConnectorConfig};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{AlertDescription, CertificateError};

use crate::error::Error;
use crate::transport::Tls;
use crate::transport::address::Host;

/// The settings for TLS, ready for use. They are read once and used for all connections.
#[derive(Debug, Clone)]
pub(in crate::transport) struct Connector {
    connector: RustlsConnector,
    /// Whether there is a client certificate, which can be used to log in.
    identified: bool,
}

impl Connector {
    /// Reads certificates and keys.
    ///
    /// # Errors
    /// `Invalid` with what is wrong with them.
    pub(in crate::transport) fn new(tls: &Tls) -> Result<Self, Error> {
        let roots = match &tls.ca {
            Some(pem) => RustlsConnectorConfig::default().with_parsable_certificates(certificates("CA", pem)?),
            None => RustlsConnectorConfig::new_with_native_certs()
                .map_err(|error| Error::Invalid(format!("no CA is given, and the system has none: {error}")))?,
        };
        let connector = match &tls.identity {
            None => roots.connector_with_no_client_auth(),
            Some(identity) => {
                let chain = certificates("identity", &identity.certificates)?;
                let key = PrivateKeyDer::from_pem_slice(&identity.key).map_err(|error| {
                    Error::Invalid(format!(
                        "the identity's key is not a private key in PEM without a password: {error}"
                    ))
                })?;
                roots.connector_with_single_cert(chain, key)
            }
        };
        let connector = connector.map_err(|error| {
            Error::Invalid(match said(&error) {
                Some(rustls::Error::InconsistentKeys(_)) => {
                    "the identity's key is not that of its first certificate".to_owned()
                }
                _ => format!("the certificates for TLS cannot be used: {error}"),
            })
        })?;
        Ok(Self { connector, identified: tls.identity.is_some() })
    }

    /// Whether there is a client certificate.
    pub(in crate::transport) fn has_identity(&self) -> bool {
        self.identified
    }

    /// Negotiates TLS on a socket. The other side has to prove that it is `host`.
    ///
    /// # Errors
    /// Those of the socket and of rustls. [`refusal`] makes a sentence of the latter.
    pub(super) async fn encrypt<S>(&self, socket: AsyncTcpStream<S>, host: &Host) -> io::Result<AsyncTcpStream<S>>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let host = match host {
            Host::Name(name) => name.clone(),
            Host::Ip(ip) => ip.to_string(),
        };
        socket.into_rustls(&self.connector, &host).await
    }
}

/// Reads certificates in PEM. `whose` names them in the error.
fn certificates(whose: &str, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, Error> {
    let read: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match read {
        Ok(certificates) if certificates.is_empty() => {
            Err(Error::Invalid(format!("the {whose} has no certificate in PEM")))
        }
        Ok(certificates) => Ok(certificates),
        Err(error) => Err(Error::Invalid(format!("the {whose}'s certificates cannot be read as PEM: {error}"))),
    }
}

/// The error of rustls in an I/O error, however deep it is wrapped.
fn said(error: &io::Error) -> Option<&rustls::Error> {
    let inner = error.get_ref()?;
    inner.downcast_ref().or_else(|| said(inner.downcast_ref()?))
}

/// Why there is no connection, if TLS is the reason: a sentence that says what to look at.
pub(super) fn refusal(error: &io::Error) -> Option<String> {
    let error = said(error)?;
    let what = match error {
        rustls::Error::InvalidCertificate(wrong) => match wrong {
            CertificateError::UnknownIssuer | CertificateError::BadSignature => {
                "the broker's certificate is of an unknown CA: give its CA with `Tls::ca`"
            }
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                "the broker's certificate has expired"
            }
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                "the broker's certificate is not valid yet: is this machine's clock right?"
            }
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                "the broker's certificate is for another host name: use the name in the certificate"
            }
            CertificateError::Revoked => "the broker's certificate has been revoked",
            _ => "the broker's certificate cannot be accepted",
        },
        rustls::Error::AlertReceived(alert) => match alert {
            AlertDescription::CertificateRequired => {
                "the broker asks for a client certificate: give one with `Tls::identity`"
            }
            AlertDescription::UnknownCA | AlertDescription::DecryptError => {
                "the broker does not know the CA of the client certificate"
            }
            AlertDescription::CertificateExpired => "the client certificate has expired",
            AlertDescription::BadCertificate
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::CertificateRevoked
            | AlertDescription::CertificateUnknown => "the broker does not accept the client certificate",
            AlertDescription::HandshakeFailure => {
                "the broker refused TLS: it may ask for a client certificate, given with `Tls::identity`"
            }
            _ => "the broker broke TLS off",
        },
        rustls::Error::InvalidMessage(_) => "the broker does not speak TLS at this port: amqps is usually at 5671",
        _ => "TLS failed",
    };
    Some(format!("{what} ({error})"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_used_is_named() {
        let refused = |tls: Tls| Connector::new(&tls).expect_err("cannot be used").to_string();
        assert_eq!(refused(Tls::new().ca("")), "the CA has no certificate in PEM");
        let issued = |name: &str| {
            let key = rcgen::KeyPair::generate().expect("a key");
            let parameters = rcgen::CertificateParams::new(vec![name.to_owned()]).expect("a good name");
            (parameters.self_signed(&key).expect("it can be signed").pem(), key.serialize_pem())
        };
        let ((ca, _), (certificate, key), (_, other_key)) = (issued("ca"), issued("one"), issued("other"));
        assert!(refused(Tls::new().ca(ca.as_str()).identity("", key.as_str())).contains("identity has no certificate"));
        let refusal = refused(Tls::new().ca(ca.as_str()).identity(certificate.as_str(), "no key"));
        assert!(refusal.contains("not a private key in PEM"), "{refusal}");
        let refusal = refused(Tls::new().ca(ca.as_str()).identity(certificate.as_str(), other_key));
        assert!(refusal.contains("is not that of its first certificate"), "{refusal}");
        assert!(Connector::new(&Tls::new().ca(ca).identity(certificate, key)).is_ok_and(|made| made.identified));
    }
}
