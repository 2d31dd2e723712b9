//! Where the broker of a command is, whom to trust there, and who to be.

use std::fmt::Display;
use std::fs;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use hopline::{Client, ClientBuilder, DeadLetters, DeadLettersBuilder, Error, Server, ServerBuilder, Tls};

/// How long an address may take until its connection can be used, if nothing shorter is asked for.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How much longer connecting as a whole may take than an address: where that takes all the time, it says why.
const GRACE: Duration = Duration::from_millis(100);

#[derive(Args)]
pub(crate) struct Address {
    /// The broker's address
    #[arg(long, env = "HOPLINE_URL", default_value = "amqp://localhost", hide_env_values = true)]
    pub(crate) url: String,
    /// Whom to trust on amqps:// instead of the system's CAs: their certificates, in PEM
    #[arg(long, value_name = "FILE", env = "HOPLINE_CA", hide_env_values = true)]
    pub(crate) ca: Option<PathBuf>,
    /// The certificate to show on amqps://, and those that lead to its CA, in PEM
    ///
    /// It logs in, too, where the address names no user.
    #[arg(long, value_name = "FILE", env = "HOPLINE_CERT", hide_env_values = true, requires = "key")]
    pub(crate) cert: Option<PathBuf>,
    /// The private key of that certificate, in PEM
    #[arg(long, value_name = "FILE", env = "HOPLINE_KEY", hide_env_values = true, requires = "cert")]
    pub(crate) key: Option<PathBuf>,
}

impl Address {
    /// # Errors
    /// `Invalid` for files that cannot be read.
    pub(crate) fn client(&self) -> Result<ClientBuilder, Error> {
        let builder = Client::builder();
        Ok(match self.tls()? {
            Some(tls) => builder.tls(tls),
            None => builder,
        })
    }

    /// # Errors
    /// As [`Address::client`].
    pub(crate) fn server(&self) -> Result<ServerBuilder, Error> {
        let builder = Server::builder();
        Ok(match self.tls()? {
            Some(tls) => builder.tls(tls),
            None => builder,
        })
    }

    /// # Errors
    /// As [`Address::client`].
    pub(crate) fn dead_letters(&self) -> Result<DeadLettersBuilder, Error> {
        let builder = DeadLetters::builder();
        Ok(match self.tls()? {
            Some(tls) => builder.tls(tls),
            None => builder,
        })
    }

    /// What is set for TLS, if anything is.
    fn tls(&self) -> Result<Option<Tls>, Error> {
        if self.ca.is_none() && self.cert.is_none() {
            return Ok(None);
        }
        let mut tls = Tls::new();
        if let Some(ca) = &self.ca {
            tls = tls.ca(read("--ca", ca)?);
        }
        if let (Some(cert), Some(key)) = (&self.cert, &self.key) {
            tls = tls.identity(read("--cert", cert)?, read("--key", key)?);
        }
        Ok(Some(tls))
    }
}

fn read(option: &str, file: &Path) -> Result<Vec<u8>, Error> {
    fs::read(file).map_err(|error| Error::Invalid(format!("`{option} {}` cannot be read: {error}", file.display())))
}

/// How long each address may take, when connecting is to take no more than `timeout`.
pub(crate) fn connect_timeout(timeout: Duration) -> Duration {
    timeout.min(CONNECT_TIMEOUT)
}

/// What `connecting` comes to, if that is before its time is over.
///
/// # Errors
/// A sentence for people when it is not, and what it fails with otherwise.
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

/// An error in one line, in the words of the command line, with the way to another broker.
pub(crate) fn said(error: &Error) -> String {
    match error {
        Error::Connect { .. } => format!("{} (`--url` or HOPLINE_URL names another broker)", one_line(error)),
        error => one_line(error),
    }
}

/// An error in one line, in the words of the command line.
pub(crate) fn one_line(error: &impl Display) -> String {
    let said =
        error.to_string().replace('\n', " ").replace("`Tls::ca`", "`--ca`").replace("`.timeout()`", "`--timeout`");
    said.replace("`Tls::identity`", "`--cert` and `--key`")
}

/// How long, as it is written after `--timeout`.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let unit = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(unit);
    let millis = match unit {
        "ms" => 1,
        "s" => 1000,
        "m" => 60_000,
        _ => 0,
    };
    match number.parse::<u64>().ok().and_then(|number| number.checked_mul(millis)) {
        Some(millis) if millis > 0 => Ok(Duration::from_millis(millis)),
        _ => Err("write a number above 0 and a unit: 500ms, 5s or 2m".to_owned()),
    }
}
