//! The options for the broker: its address, the CA to trust, and the certificate to show.

use std::fmt::Display;
use std::fs;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use futures::FutureExt as _;
use hopline::{
    Client, ClientBuilder, DeadLetters, DeadLettersBuilder, Error, Groups, GroupsBuilder, Server, ServerBuilder, State,
    Tls, environment,
};

use crate::context::Settings;
use crate::printed;

/// How much longer connecting as a whole may take. An address that takes all its time ends with an error that says why,
/// and that error has to arrive first.
const GRACE: Duration = Duration::from_millis(100);
/// How long closing the connection may take. If a call was cancelled, its server is told in this time.
const CLOSING: Duration = Duration::from_secs(1);

/// The options for the broker. Their environment variables are those of the library: see `hopline::environment`.
#[derive(Args)]
pub(crate) struct Address {
    /// The broker's address
    #[arg(long, env = environment::URL, default_value = "amqp://localhost", hide_env_values = true)]
    pub(crate) url: String,
    /// How long each address may take until its connection can be used, such as 500ms or 5s. Where there is a
    /// `--timeout`, never longer than that
    #[arg(
        long, env = environment::CONNECT_TIMEOUT, default_value = "10s", value_parser = environment::duration,
        hide_env_values = true
    )]
    connect_timeout: Duration,
    /// The name of this command's connections on the broker and in its log. Default: `hopline`
    #[arg(long, env = environment::NAME, hide_env_values = true)]
    name: Option<String>,
    /// The CAs to trust for amqps:// in place of the system's, in PEM
    #[arg(long, value_name = "FILE", env = environment::CA, hide_env_values = true)]
    ca: Option<PathBuf>,
    /// The certificate to show for amqps://, and those that lead to its CA, in PEM
    ///
    /// It is also used to log in if the address names no user.
    #[arg(long, value_name = "FILE", env = environment::CERT, hide_env_values = true, requires = "key")]
    cert: Option<PathBuf>,
    /// The private key of that certificate, in PEM
    #[arg(long, value_name = "FILE", env = environment::KEY, hide_env_values = true, requires = "cert")]
    key: Option<PathBuf>,
}

/// The option for the namespace.
#[derive(Args)]
pub(crate) struct Namespace {
    /// The prefix of every name on the broker
    #[arg(long, env = environment::NAMESPACE, default_value = "hopline", hide_env_values = true)]
    pub(crate) namespace: String,
}

/// The given builder with the options that clients, servers, dead letters and groups have in common.
macro_rules! told {
    ($address:expr, $timeout:expr, $builder:expr) => {{
        let mut builder = $builder.connect_timeout($address.connect_timeout.min($timeout));
        if let Some(name) = &$address.name {
            builder = builder.name(name);
        }
        if let Some(tls) = $address.tls()? {
            builder = builder.tls(tls);
        }
        builder
    }};
}

impl Address {
    /// The builder of a client with these options.
    ///
    /// # Errors
    /// `Invalid` for files that cannot be read.
    pub(crate) fn client(&self, timeout: Duration) -> Result<ClientBuilder, Error> {
        Ok(told!(self, timeout, Client::builder()))
    }

    /// The builder of a server with these options.
    ///
    /// # Errors
    /// As [`Address::client`].
    pub(crate) fn server(&self) -> Result<ServerBuilder, Error> {
        Ok(told!(self, self.connect_timeout, Server::builder()))
    }

    /// The builder of dead letters with these options.
    ///
    /// # Errors
    /// As [`Address::client`].
    pub(crate) fn dead_letters(&self, timeout: Duration) -> Result<DeadLettersBuilder, Error> {
        Ok(told!(self, timeout, DeadLetters::builder()))
    }

    /// The builder of groups with these options.
    ///
    /// # Errors
    /// As [`Address::client`].
    pub(crate) fn groups(&self, timeout: Duration) -> Result<GroupsBuilder, Error> {
        Ok(told!(self, timeout, Groups::builder()))
    }

    /// Checks whether the settings of a context can be used.
    ///
    /// # Errors
    /// `Invalid` for a setting or a file that cannot.
    pub(crate) fn check(settings: &Settings) -> Result<(), Error> {
        let Settings { url, namespace, name, ca, cert, key, .. } = settings.clone();
        let address = Self { url, connect_timeout: GRACE, name, ca, cert, key };
        let mut builder = address.client(GRACE)?;
        if let Some(namespace) = namespace {
            builder = builder.namespace(&namespace);
        }
        // It is not waited for, and so does not connect.
        hopline::blocking::wait(async { builder.connect_lazy(&address.url).map(drop) })
    }

    /// Whether the broker ends with this process. Then nobody else can use it.
    pub(crate) fn in_memory(&self) -> bool {
        self.url.trim_start().get(..7).is_some_and(|scheme| scheme.eq_ignore_ascii_case("memory:"))
    }

    /// The CAs to trust in place of the system's.
    ///
    /// # Errors
    /// `Invalid` for a file that cannot be read.
    pub(crate) fn ca(&self) -> Result<Option<Vec<u8>>, Error> {
        self.ca.as_ref().map(|ca| read("--ca", ca)).transpose()
    }

    /// The certificate to show, and its key.
    ///
    /// # Errors
    /// As [`Address::ca`].
    pub(crate) fn identity(&self) -> Result<Option<[Vec<u8>; 2]>, Error> {
        let (Some(cert), Some(key)) = (&self.cert, &self.key) else { return Ok(None) };
        Ok(Some([read("--cert", cert)?, read("--key", key)?]))
    }

    /// The settings for TLS. `None` if no option sets any.
    fn tls(&self) -> Result<Option<Tls>, Error> {
        if self.ca.is_none() && self.cert.is_none() {
            return Ok(None);
        }
        let mut tls = Tls::new();
        if let Some(ca) = self.ca()? {
            tls = tls.ca(ca);
        }
        if let Some([cert, key]) = self.identity()? {
            tls = tls.identity(cert, key);
        }
        Ok(Some(tls))
    }
}

fn read(option: &str, file: &Path) -> Result<Vec<u8>, Error> {
    fs::read(file).map_err(|error| Error::Invalid(format!("`{option} {}` cannot be read: {error}", file.display())))
}

/// Waits for `connecting`, but not longer than `timeout`.
///
/// # Errors
/// That of `connecting`, or a sentence when the time is over.
pub(crate) async fn within<T, F: From<Error>>(
    timeout: Duration,
    connecting: impl Future<Output = Result<T, Error>>,
    late: impl FnOnce(String) -> F,
) -> Result<T, F> {
    match tokio::time::timeout(timeout.saturating_add(GRACE), connecting).await {
        Ok(connected) => Ok(connected?),
        Err(_) => {
            Err(late(format!("no connection to the broker within {timeout:?}: allow more time with `--timeout`")))
        }
    }
}

/// Waits until a connection is closed, but not for long: the broker may not answer any more, or not while a queue owes it
/// an answer.
pub(crate) async fn closed(closing: impl Future<Output = ()>) {
    let _ = tokio::time::timeout(CLOSING, closing).await;
}

/// Closes a client. A broker with an alarm reads nothing, and so is not waited for.
pub(crate) async fn left(client: &Client) {
    if matches!(*client.state().borrow(), State::Blocked { .. }) {
        // It begins to close, as far as that goes.
        let _ = client.close().now_or_never();
    } else {
        closed(client.close()).await;
    }
}

/// An error in one line, in the words of the command line. If there is no connection, it says how to name another
/// broker.
pub(crate) fn said(error: &Error) -> String {
    match error {
        Error::Connect { .. } => format!("{} (`--url` or HOPLINE_URL names another broker)", one_line(error)),
        error => one_line(error),
    }
}

/// An error in one line, in the words of the command line.
pub(crate) fn one_line(error: &impl Display) -> String {
    let said = printed::one_line(&error.to_string());
    let said = said.replace("`Tls::ca`", "`--ca`").replace("`.timeout()`", "`--timeout`");
    said.replace("`Tls::identity`", "`--cert` and `--key`")
}
