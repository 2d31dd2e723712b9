//! Settings from the environment of the process: which variables there are, and how they are read.
//!
//! [`Client::connect_env`](crate::Client::connect_env), [`Server::connect_env`](crate::Server::connect_env) and
//! [`DeadLetters::connect_env`](crate::DeadLetters::connect_env) use them. So do `with_env` of each builder, and the
//! command `hopline`, whose options set the same.
//!
//! | variable | what it sets | example | if it is not set |
//! | --- | --- | --- | --- |
//! | [`HOPLINE_URL`](URL) | the address of the broker, or several: see [`ClientBuilder::connect`](crate::ClientBuilder::connect) | `amqp://user:password@broker.example.com` | `connect_env` fails |
//! | [`HOPLINE_NAMESPACE`](NAMESPACE) | the prefix of every name on the broker, `[A-Za-z0-9_-]+` | `shop` | `hopline` |
//! | [`HOPLINE_NAME`](NAME) | the name of this program, which the broker shows and the log has | `billing-web` | the program's name |
//! | [`HOPLINE_TIMEOUT`](TIMEOUT) | for a client: how long a call may take; for dead letters: how long each answer of a queue may take; a server ignores it | `2s` | 30 s for a call, 8 s for an answer |
//! | [`HOPLINE_CONNECT_TIMEOUT`](CONNECT_TIMEOUT) | how long each address may take until its connection can be used | `500ms` | 10 s |
//! | [`HOPLINE_CA`](CA) | for `amqps://`: a PEM file with the CAs to trust | `/etc/hopline/ca.pem` | the system's CAs |
//! | [`HOPLINE_CERT`](CERT) | for `amqps://`: a PEM file with the certificate to show, and those that lead to its CA | `/etc/hopline/billing.pem` | no certificate is shown |
//! | [`HOPLINE_KEY`](KEY) | a PEM file with the private key of that certificate; set both or none | `/etc/hopline/billing.key` | |
//!
//! - **What the code sets wins** over the environment, before or after `with_env`. So a program sets what it has to,
//!   and leaves the rest to its operators.
//! - An empty variable counts as not set.
//! - A time is a whole number above 0 and a unit: `ms`, `s` or `m`.
//! - A value that cannot be used is [`Error::Invalid`]. It names the variable and says what was expected. It never
//!   shows an address, since there may be a password in it.
//!
//! ```
//! use hopline::{Client, Error};
//!
//! # async fn example() -> Result<(), Error> {
//! // All of it from the environment ...
//! let client = Client::connect_env().await?;
//! // ... or all but the name.
//! let client = Client::builder().name("billing-web").connect_env().await?;
//! # Ok(()) }
//! ```

use std::ffi::OsString;
use std::time::Duration;

use crate::error::Error;
use crate::topology::Namespace;
#[cfg(feature = "tls")]
use crate::transport::Tls;
use crate::transport::{check_address, check_program_name};

/// The broker's address.
pub const URL: &str = "HOPLINE_URL";
/// The prefix of every name on the broker.
pub const NAMESPACE: &str = "HOPLINE_NAMESPACE";
/// The name of the program, for people who look at the broker or the log.
pub const NAME: &str = "HOPLINE_NAME";
/// How long a call may take, or an answer of a queue of dead letters.
pub const TIMEOUT: &str = "HOPLINE_TIMEOUT";
/// How long each address may take until its connection can be used.
pub const CONNECT_TIMEOUT: &str = "HOPLINE_CONNECT_TIMEOUT";
/// A PEM file with the certificates to trust on `amqps://`.
pub const CA: &str = "HOPLINE_CA";
/// A PEM file with the certificate to show on `amqps://`.
pub const CERT: &str = "HOPLINE_CERT";
/// A PEM file with the private key of that certificate.
pub const KEY: &str = "HOPLINE_KEY";

/// The broker's address, for programs that pass it on themselves.
///
/// ```
/// # async fn example() -> Result<(), hopline::Error> {
/// use hopline::{Client, environment};
///
/// let client = Client::builder().with_env().connect_lazy(environment::url()?)?;
/// # Ok(()) }
/// ```
///
/// # Errors
/// `Invalid` if `HOPLINE_URL` is not set, or is no address of a broker.
pub fn url() -> Result<String, Error> {
    Variables(&|name| std::env::var_os(name)).url()
}

/// Reads a time: a whole number above 0 and a unit, `ms`, `s` or `m`.
///
/// ```
/// use std::time::Duration;
///
/// assert_eq!(hopline::environment::duration("2s"), Ok(Duration::from_secs(2)));
/// assert!(hopline::environment::duration("2").is_err());
/// ```
///
/// # Errors
/// A sentence that says what to write.
pub fn duration(text: &str) -> Result<Duration, String> {
    let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let millis = match unit {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        _ => 0,
    };
    match number.parse::<u64>().ok().and_then(|number| number.checked_mul(millis)) {
        Some(millis) if millis > 0 => Ok(Duration::from_millis(millis)),
        _ => Err("write a whole number above 0 and a unit: 500ms, 5s or 2m".to_owned()),
    }
}

/// The settings that the environment has. `None`: the variable is not set.
#[derive(Debug, Default)]
pub(crate) struct Environment {
    pub(crate) namespace: Option<Namespace>,
    pub(crate) name: Option<String>,
    pub(crate) timeout: Option<Duration>,
    pub(crate) connect_timeout: Option<Duration>,
    #[cfg(feature = "tls")]
    pub(crate) tls: Option<Tls>,
}

impl Environment {
    /// Reads the environment of this process.
    ///
    /// # Errors
    /// `Invalid` for a value that cannot be used.
    pub(crate) fn read() -> Result<Self, Error> {
        Self::of(&Variables(&|name| std::env::var_os(name)))
    }

    fn of(variables: &Variables) -> Result<Self, Error> {
        #[cfg(not(feature = "tls"))]
        variables.check_no_tls()?;
        Ok(Self {
            namespace: variables.read(NAMESPACE, Namespace::new)?,
            name: variables.read(NAME, |name| check_program_name(name).map(|()| name.to_owned()))?,
            timeout: variables.read(TIMEOUT, duration)?,
            connect_timeout: variables.read(CONNECT_TIMEOUT, duration)?,
            #[cfg(feature = "tls")]
            tls: variables.tls()?,
        })
    }
}

/// Where the values of variables come from: the process, or a test.
struct Variables<'a>(&'a dyn Fn(&str) -> Option<OsString>);

impl Variables<'_> {
    /// The value of a variable. `None` if it is not set or empty.
    fn value(&self, name: &str) -> Option<OsString> {
        (self.0)(name).filter(|value| !value.is_empty())
    }

    fn read<T>(&self, name: &str, parse: impl Fn(&str) -> Result<T, String>) -> Result<Option<T>, Error> {
        let Some(value) = self.value(name) else { return Ok(None) };
        let text = value.to_str().ok_or_else(|| Error::Invalid(format!("{name} is not UTF-8")))?;
        let parsed = parse(text).map_err(|why| Error::Invalid(format!("{name} is {text:?}: {why}")))?;
        Ok(Some(parsed))
    }

    fn url(&self) -> Result<String, Error> {
        let value = self.value(URL).ok_or_else(|| {
            Error::Invalid(format!(
                "{URL} is not set: it names the broker, such as amqp://user:password@broker.example.com"
            ))
        })?;
        // The value is not shown, since there may be a password in it.
        let url = value.into_string().map_err(|_| Error::Invalid(format!("{URL} is not UTF-8")))?;
        match check_address(&url) {
            Ok(()) => Ok(url),
            Err(Error::Invalid(why)) => Err(Error::Invalid(format!("{URL} cannot be used: {why}"))),
            Err(error) => Err(error),
        }
    }

    #[cfg(feature = "tls")]
    fn tls(&self) -> Result<Option<Tls>, Error> {
        let [ca, cert, key] = [CA, CERT, KEY].map(|name| self.file(name));
        let (ca, identity) = (ca?, (cert?, key?));
        let mut tls = Tls::new();
        match identity {
            (Some(cert), Some(key)) => tls = tls.identity(cert, key),
            (None, None) if ca.is_none() => return Ok(None),
            (None, None) => {}
            (Some(_), None) => return Err(alone(CERT, KEY, "the file with its private key")),
            (None, Some(_)) => return Err(alone(KEY, CERT, "the file with the certificate of this key")),
        }
        if let Some(ca) = ca {
            tls = tls.ca(ca);
        }
        Ok(Some(tls))
    }

    /// The content of the file that a variable names.
    #[cfg(feature = "tls")]
    fn file(&self, name: &str) -> Result<Option<Vec<u8>>, Error> {
        let Some(path) = self.value(name) else { return Ok(None) };
        let path = std::path::Path::new(&path);
        let unreadable =
            |error| Error::Invalid(format!("{name} names `{}`, which cannot be read: {error}", path.display()));
        std::fs::read(path).map(Some).map_err(unreadable)
    }

    #[cfg(not(feature = "tls"))]
    fn check_no_tls(&self) -> Result<(), Error> {
        match [CA, CERT, KEY].into_iter().find(|name| self.value(name).is_some()) {
            Some(name) => {
                Err(Error::Invalid(format!("{name} is set, but this program is built without the feature `tls`")))
            }
            None => Ok(()),
        }
    }
}

#[cfg(feature = "tls")]
fn alone(name: &str, missing: &str, what: &str) -> Error {
    Error::Invalid(format!("{name} is set, but {missing} is not: it names {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(set: &[(&str, &str)]) -> Result<Environment, String> {
        let find = |name: &str| set.iter().find(|(known, _)| *known == name).map(|(_, value)| value.into());
        Environment::of(&Variables(&find)).map_err(|error| error.to_string())
    }

    fn refused(set: &[(&str, &str)]) -> String {
        read(set).expect_err("it cannot be used")
    }

    #[test]
    fn each_variable_sets_what_it_is_for() {
        let set = [(NAMESPACE, "shop"), (NAME, "billing-web"), (TIMEOUT, "2s"), (CONNECT_TIMEOUT, "500ms")];
        let environment = read(&set).expect("all can be used");
        assert_eq!(environment.namespace.map(|namespace| namespace.rpc()).as_deref(), Some("shop.rpc"));
        assert_eq!(environment.name.as_deref(), Some("billing-web"));
        assert_eq!(environment.timeout, Some(Duration::from_secs(2)));
        assert_eq!(environment.connect_timeout, Some(Duration::from_millis(500)));
    }

    #[test]
    fn what_is_empty_is_not_set() {
        let environment = read(&[(NAMESPACE, ""), (TIMEOUT, ""), (CA, ""), (CERT, "")]).expect("nothing is set");
        assert!(environment.namespace.is_none() && environment.timeout.is_none());
    }

    #[test]
    fn an_error_names_the_variable_and_says_what_to_write() {
        for text in ["2", "0s", "-1s", "1h", "s", "1.5s", "99999999999999999999s"] {
            let said = refused(&[(TIMEOUT, text)]);
            let expected =
                format!("HOPLINE_TIMEOUT is {text:?}: write a whole number above 0 and a unit: 500ms, 5s or 2m");
            assert!(said.contains(&expected), "{said}");
        }
        let said = refused(&[(NAME, &"n".repeat(65))]);
        assert!(
            said.contains("HOPLINE_NAME is \"nnn") && said.ends_with("write 1 to 64 bytes without control characters"),
            "{said}"
        );
        let said = refused(&[(NAMESPACE, "a.b")]);
        assert!(said.contains("HOPLINE_NAMESPACE is \"a.b\": the namespace `a.b` has a '.' in it"), "{said}");
    }

    #[test]
    fn an_address_is_needed_and_never_shown() {
        let url = |value: Option<&str>| {
            let find = |_: &str| value.map(OsString::from);
            Variables(&find).url().map_err(|error| error.to_string())
        };
        assert_eq!(url(Some("memory://")), Ok("memory://".to_owned()));
        let said = url(Some("amqp://guest:s3cret@")).expect_err("it has no host");
        assert!(said.starts_with("HOPLINE_URL cannot be used: ") && !said.contains("s3cret"), "{said}");
        for value in [None, Some("")] {
            let said = url(value).expect_err("there is none");
            assert!(said.contains("HOPLINE_URL is not set: it names the broker, such as amqp://"), "{said}");
        }
    }

    #[cfg(feature = "tls")]
    #[test]
    fn certificates_are_read_from_files_and_a_key_goes_with_its_certificate() {
        let here = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");
        let read = |set: &[(&str, &str)]| read(set).expect("all can be read").tls.map(|tls| format!("{tls:?}"));
        assert_eq!(read(&[]), None);
        let (ca, identity) = (read(&[(CA, here)]), read(&[(CERT, here), (KEY, here)]));
        assert!(ca.is_some_and(|tls| tls.contains("own_ca: true, identity: false")));
        assert!(identity.is_some_and(|tls| tls.contains("own_ca: false, identity: true")));
        assert!(refused(&[(CERT, here)]).contains("HOPLINE_CERT is set, but HOPLINE_KEY is not"));
        assert!(refused(&[(CA, here), (KEY, here)]).contains("HOPLINE_KEY is set, but HOPLINE_CERT is not"));
        let said = refused(&[(CA, "/no/such/file")]);
        assert!(said.contains("HOPLINE_CA names `/no/such/file`, which cannot be read"), "{said}");
    }

    #[cfg(not(feature = "tls"))]
    #[test]
    fn without_tls_its_variables_are_refused() {
        assert!(refused(&[(CA, "ca.pem")]).contains("HOPLINE_CA is set, but this program is built without"));
    }
}
