//! RabbitMQ's management API: who is asked there, and how.

use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hopline::Error;
use hopline::transport::Account;
use percent_encoding::{NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use serde_json::Value;
use ureq::tls::{Certificate, ClientCert, PemItem, PrivateKey, RootCerts, TlsConfig, parse_pem};

use crate::address::Address;

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// The most bytes of an answer: a broker may have very many queues.
const LARGEST: u64 = 256 << 20;

/// The management API of a broker.
#[derive(Clone)]
pub(super) struct Management {
    agent: ureq::Agent,
    /// Such as `http://host:15672`.
    base: String,
    user: String,
    /// What stands in the header of that name.
    authorization: String,
    vhost: String,
}

impl Management {
    /// The API at `url`, if there is one.
    ///
    /// # Errors
    /// `Invalid` for an address or files that cannot be used. It shows nothing of the address.
    pub(super) fn new(url: Option<&str>, address: &Address) -> Result<Option<Self>, Error> {
        let Some(url) = url else { return Ok(None) };
        let wrong = || {
            Error::Invalid(
                "`--management` has no address that can be used: write http://HOST:15672 or https://HOST:15671"
                    .to_owned(),
            )
        };
        let account = Account::of(&address.url)?;
        let account =
            account.ok_or_else(|| Error::Invalid("`--management` is of a RabbitMQ: give `--url` of one".to_owned()))?;
        let (scheme, rest) =
            url.split_once("://").filter(|(scheme, _)| ["http", "https"].contains(scheme)).ok_or_else(wrong)?;
        let (login, host) = rest.rsplit_once('@').map_or((None, rest), |(login, host)| (Some(login), host));
        let host = host.trim_end_matches('/');
        if host.is_empty() || format!("{scheme}://{host}").parse::<ureq::http::Uri>().is_err() {
            return Err(wrong());
        }
        let decoded = |text: &str| percent_decode_str(text).decode_utf8_lossy().into_owned();
        let (user, password) = match login {
            Some(login) => {
                let (user, password) = login.split_once(':').unwrap_or((login, ""));
                (decoded(user), decoded(password))
            }
            None => (account.user, account.password),
        };
        let mut config = ureq::Agent::config_builder()
            .timeout_global(Some(PATIENCE))
            .http_status_as_error(false)
            // What it is asked for is in one place, and a password goes nowhere else.
            .max_redirects(0);
        if scheme == "https" {
            config = config.tls_config(tls(address)?);
        }
        Ok(Some(Self {
            agent: config.build().into(),
            base: format!("{scheme}://{host}"),
            authorization: format!("Basic {}", STANDARD.encode(format!("{user}:{password}"))),
            user,
            vhost: utf8_percent_encode(&account.vhost, NON_ALPHANUMERIC).to_string(),
        }))
    }

    /// What the API says at `path`, in which `VHOST` stands for the virtual host.
    ///
    /// # Errors
    /// A sentence that says why it says nothing, and what helps.
    pub(super) async fn get(&self, path: &str) -> Result<Value, String> {
        let (management, path) = (self.clone(), path.replace("VHOST", &self.vhost));
        let asked = tokio::task::spawn_blocking(move || management.ask(&path)).await;
        asked.unwrap_or_else(|_| Err("the question was broken off".to_owned()))
    }

    fn ask(&self, path: &str) -> Result<Value, String> {
        let (base, user) = (&self.base, &self.user);
        let asked = self.agent.get(format!("{base}/api/{path}")).header("Authorization", &self.authorization).call();
        let mut answer = asked.map_err(|error| {
            format!(
                "the management API at {base} cannot be asked ({error}): is the plugin `rabbitmq_management` enabled there, and \
                 for https the CA given by `--ca`?"
            )
        })?;
        match answer.status().as_u16() {
            200 => {}
            401 | 403 => {
                return Err(format!(
                    "the management API refuses the user `{user}`: `rabbitmqctl set_user_tags {user} monitoring`, or give another \
                     one in `--management http://USER:PASSWORD@HOST:15672`"
                ));
            }
            status => {
                return Err(format!(
                    "the management API at {base} answers with the status {status}: is it RabbitMQ's?"
                ));
            }
        }
        let text = answer.body_mut().with_config().limit(LARGEST).read_to_string();
        let text = text.map_err(|error| format!("the answer of the management API broke off: {error}"))?;
        serde_json::from_str(&text).map_err(|_| format!("what answers at {base} is not RabbitMQ's management API"))
    }
}

/// The settings for TLS, as those for AMQP.
fn tls(address: &Address) -> Result<TlsConfig, Error> {
    let roots = match address.ca()? {
        Some(pem) => certificates("--ca", &pem)?,
        None => {
            let found = rustls_native_certs::load_native_certs().certs;
            found.iter().map(|certificate| Certificate::from_der(certificate).to_owned()).collect()
        }
    };
    let identity = match address.identity()? {
        Some([chain, key]) => {
            let key = PrivateKey::from_pem(&key)
                .map_err(|error| Error::Invalid(format!("`--key` cannot be used: {error}")))?;
            Some(ClientCert::new_with_certs(&certificates("--cert", &chain)?, key))
        }
        None => None,
    };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = TlsConfig::builder().root_certs(RootCerts::new_with_certs(&roots)).client_cert(identity);
    Ok(builder.unversioned_rustls_crypto_provider(provider).build())
}

fn certificates(option: &str, pem: &[u8]) -> Result<Vec<Certificate<'static>>, Error> {
    let mut certificates = Vec::new();
    for item in parse_pem(pem) {
        match item {
            Ok(PemItem::Certificate(certificate)) => certificates.push(certificate),
            Ok(_) => {}
            Err(error) => return Err(Error::Invalid(format!("`{option}` cannot be read as PEM: {error}"))),
        }
    }
    if certificates.is_empty() {
        return Err(Error::Invalid(format!("`{option}` has no certificate in PEM")));
    }
    Ok(certificates)
}
