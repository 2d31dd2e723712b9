//! TLS for connections to RabbitMQ: with the user's own CA and certificate, and errors that say what to do.
//!
//! A build without the cargo feature `tls` has `without_tls.rs` in its place.

use std::io::{self, IoSlice, Read as _, Write};
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::{Buf as _, BytesMut};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{AlertDescription, CertificateError, ClientConfig, ClientConnection, RootCertStore};
use tokio::net::TcpStream;

use crate::error::Error;
use crate::transport::Tls;
use crate::transport::address::Host;

/// The settings for TLS, ready for use. They are read once and used for all connections.
#[derive(Debug, Clone)]
pub(in crate::transport) struct Connector {
    config: Arc<ClientConfig>,
    /// Whether there is a client certificate, which can be used to log in.
    identified: bool,
}

impl Connector {
    /// Reads certificates and keys.
    ///
    /// # Errors
    /// `Invalid` with what is wrong with them.
    pub(in crate::transport) fn new(tls: &Tls) -> Result<Self, Error> {
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(match &tls.ca {
            Some(pem) => certificates("CA", pem)?,
            None => systems_certificates()?,
        });
        let unusable = |error: rustls::Error| {
            Error::Invalid(match error {
                rustls::Error::InconsistentKeys(_) => {
                    "the identity's key is not that of its first certificate".to_owned()
                }
                error => format!("the certificates for TLS cannot be used: {error}"),
            })
        };
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let config = config.map_err(unusable)?.with_root_certificates(roots);
        let config = match &tls.identity {
            None => config.with_no_client_auth(),
            Some(identity) => {
                let chain = certificates("identity", &identity.certificates)?;
                let key = PrivateKeyDer::from_pem_slice(&identity.key).map_err(|error| {
                    Error::Invalid(format!(
                        "the identity's key is not a private key in PEM without a password: {error}"
                    ))
                })?;
                config.with_client_auth_cert(chain, key).map_err(unusable)?
            }
        };
        Ok(Self { config: Arc::new(config), identified: tls.identity.is_some() })
    }

    /// Whether there is a client certificate.
    pub(in crate::transport) fn has_identity(&self) -> bool {
        self.identified
    }

    /// Negotiates TLS on a socket. The other side has to prove that it is `host`.
    ///
    /// # Errors
    /// Those of the socket and of rustls. [`refusal`] makes a sentence of the latter.
    pub(super) async fn encrypt(&self, socket: &TcpStream, host: &Host) -> io::Result<Encryption> {
        let name = match host {
            Host::Name(name) => ServerName::try_from(name.clone()).map_err(io::Error::other)?,
            Host::Ip(ip) => ServerName::from(*ip),
        };
        let mut tls = ClientConnection::new(self.config.clone(), name).map_err(io::Error::other)?;
        loop {
            while tls.wants_write() {
                socket.writable().await?;
                unless_full(tls.write_tls(&mut Unbuffered(socket)))?;
            }
            if !tls.is_handshaking() {
                return Ok(Encryption(Arc::new(Mutex::new(tls))));
            }
            socket.readable().await?;
            if unless_full(tls.read_tls(&mut Unbuffered(socket)))? == Some(0) {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            progress(&mut tls, socket)?;
        }
    }
}

/// The CAs that the system trusts.
fn systems_certificates() -> Result<Vec<CertificateDer<'static>>, Error> {
    let found = rustls_native_certs::load_native_certs();
    if found.certs.is_empty() {
        let why = found.errors.first().map(ToString::to_string).unwrap_or_else(|| "it trusts nobody".to_owned());
        return Err(Error::Invalid(format!("no CA is given, and the system has none: {why}")));
    }
    Ok(found.certs)
}

/// Encrypts and decrypts what goes over one socket.
#[derive(Debug, Clone)]
pub(super) struct Encryption(Arc<Mutex<ClientConnection>>);

impl Encryption {
    fn lock(&self) -> MutexGuard<'_, ClientConnection> {
        self.0.lock().expect("no panic while holding the connection")
    }

    /// Decrypts what has arrived, and puts it behind what is in `into`.
    ///
    /// # Errors
    /// What rustls finds wrong with it.
    pub(super) fn decrypt(&self, from: &mut BytesMut, into: &mut BytesMut, socket: &TcpStream) -> io::Result<()> {
        let mut tls = self.lock();
        loop {
            let ready = progress(&mut tls, socket)?;
            let start = into.len();
            into.resize(start + ready, 0);
            tls.reader().read_exact(&mut into[start..])?;
            if from.is_empty() {
                return Ok(());
            }
            match tls.read_tls(&mut &from[..])? {
                // The other side has said that nothing more comes.
                0 => from.clear(),
                taken => from.advance(taken),
            }
        }
    }

    /// Encrypts as much as there is room for, and writes as much as the socket takes. Returns how many bytes were
    /// encrypted.
    ///
    /// # Errors
    /// `WouldBlock` if there is no room, and those of the socket.
    pub(super) fn write(&self, parts: &[IoSlice<'_>], socket: &TcpStream) -> io::Result<usize> {
        let mut tls = self.lock();
        while tls.wants_write() {
            tls.write_tls(&mut Unbuffered(socket))?;
        }
        let taken = tls.writer().write_vectored(parts)?;
        while tls.wants_write() && unless_full(tls.write_tls(&mut Unbuffered(socket)))?.is_some() {}
        if taken == 0 && parts.iter().any(|part| !part.is_empty()) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok(taken)
    }

    /// Whether something has been encrypted that the socket has not taken.
    pub(super) fn is_behind(&self) -> bool {
        self.lock().wants_write()
    }
}

/// Lets rustls handle what it was given. Returns how many bytes are decrypted.
fn progress(tls: &mut ClientConnection, socket: &TcpStream) -> io::Result<usize> {
    let state = tls.process_new_packets().map_err(|error| {
        // The alert tells the other side why. It may have gone already.
        let _ = tls.write_tls(&mut Unbuffered(socket));
        io::Error::new(io::ErrorKind::InvalidData, error)
    })?;
    Ok(state.plaintext_bytes_to_read())
}

/// `None` if the socket takes or has nothing now.
fn unless_full(result: io::Result<usize>) -> io::Result<Option<usize>> {
    match result {
        Ok(count) => Ok(Some(count)),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(error),
    }
}

/// A socket that does not wait.
struct Unbuffered<'a>(&'a TcpStream);

impl io::Read for Unbuffered<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.try_read(buffer)
    }
}

impl Write for Unbuffered<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.try_write(bytes)
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        self.0.try_write_vectored(parts)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
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
