//! Which brokers to connect to, in which order, and how long to keep trying.

use std::collections::HashSet;
use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::Instant;
use url::Url;
use uuid::Uuid;

#[cfg(feature = "tls")]
use super::Tls;
use super::{Role, Transport, masked, memory, rabbit};
use crate::error::Error;

/// How long a broker may take to greet: one that accepts and stays silent would be waited for without end.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// The pause between two rounds over the addresses grows with the time without a connection, between these.
const MIN_PAUSE: Duration = Duration::from_millis(50);
const MAX_PAUSE: Duration = Duration::from_secs(10);

/// How a client or a server wants to connect.
#[derive(Debug, Clone)]
pub(crate) struct DialSettings {
    /// How long each address may take.
    pub(crate) timeout: Duration,
    #[cfg(feature = "tls")]
    pub(crate) tls: Option<Tls>,
}

impl Default for DialSettings {
    fn default() -> Self {
        Self {
            timeout: CONNECT_TIMEOUT,
            #[cfg(feature = "tls")]
            tls: None,
        }
    }
}

impl DialSettings {
    /// Reads an address, as [`Dial::parse`] does.
    pub(crate) fn dial(&self, url: &str) -> Result<Dial, Error> {
        let mut dial = Dial::parse(url)?;
        dial.connect_timeout = self.timeout;
        #[cfg(feature = "tls")]
        if let Some(tls) = &self.tls {
            dial.set_tls(tls)?;
        }
        Ok(dial)
    }
}

/// The addresses of one broker, or of the nodes of a cluster, and how they are connected to.
#[derive(Clone)]
pub struct Dial {
    addresses: Vec<Url>,
    /// How long each address may take. Default 5 s.
    pub(super) connect_timeout: Duration,
    /// Those that could not be connected to the last time.
    failed: Arc<Mutex<HashSet<Url>>>,
    /// Whom to trust and who to be on `amqps://`, where that is not up to the system.
    #[cfg(feature = "tls")]
    pub(super) tls: Option<rabbit::Connector>,
}

impl Dial {
    /// Reads `memory://`, `memory://name`, `memory://user@name`, `amqp://host`, with the feature `tls` `amqps://host`, or
    /// several: either hosts of one address, `amqp://user:password@a,b:5673,c/vhost`, or whole addresses with a comma
    /// between them.
    ///
    /// # Errors
    /// `Invalid`, which names what cannot be used, its password masked.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let mut addresses = Vec::new();
        for address in whole_addresses(text) {
            for single in hosts_apart(address) {
                addresses.push(checked(&single)?);
            }
        }
        if addresses.len() > 1 && addresses.iter().any(|address| address.scheme() == "memory") {
            return Err(Error::Invalid("memory:// is one broker, in this process: it stands alone".to_owned()));
        }
        Ok(Self {
            addresses,
            connect_timeout: CONNECT_TIMEOUT,
            failed: Arc::default(),
            #[cfg(feature = "tls")]
            tls: None,
        })
    }

    /// Sets what is otherwise up to the system on `amqps://`, which all addresses have to be.
    #[cfg(feature = "tls")]
    fn set_tls(&mut self, tls: &Tls) -> Result<(), Error> {
        if let Some(address) = self.addresses.iter().find(|address| address.scheme() != "amqps") {
            let address = masked(address.as_str());
            return Err(Error::Invalid(format!("`{address}` has no TLS, for which there are settings: use amqps://")));
        }
        self.tls = Some(rabbit::Connector::new(tls)?);
        Ok(())
    }

    /// Whether there is a certificate to log in with.
    pub(super) fn has_identity(&self) -> bool {
        #[cfg(feature = "tls")]
        return self.tls.as_ref().is_some_and(rabbit::Connector::has_identity);
        #[cfg(not(feature = "tls"))]
        false
    }

    /// Connects to the first address that can be had, in the order in which they were given.
    ///
    /// # Errors
    /// `Connect` with what each address said.
    pub async fn connect(&self, role: Role) -> Result<Transport, Error> {
        let failed = || self.failed.lock().expect("no panic while holding the addresses");
        let mut refusals = Vec::new();
        for address in &self.addresses {
            let again = failed().contains(address);
            match self.connect_to(address, role, again).await {
                Ok(transport) => {
                    failed().remove(address);
                    return Ok(transport);
                }
                Err(Error::Invalid(why)) => return Err(Error::Invalid(why)),
                Err(error) => {
                    failed().insert(address.clone());
                    refusals.push(match error {
                        Error::Connect { url, reason } => (url, reason),
                        other => (masked(address.as_str()).to_string(), other.to_string()),
                    });
                }
            }
        }
        let (urls, reasons): (Vec<_>, Vec<_>) = refusals.into_iter().unzip();
        let reason = match &*reasons {
            [only] => only.clone(),
            _ => {
                urls.iter().zip(&reasons).map(|(url, reason)| format!("{url}: {reason}")).collect::<Vec<_>>().join("; ")
            }
        };
        Err(Error::Connect { url: urls.join(","), reason })
    }

    async fn connect_to(&self, address: &Url, role: Role, again: bool) -> Result<Transport, Error> {
        if address.scheme() == "memory" {
            let user = Some(address.username()).filter(|user| !user.is_empty());
            let name = address.host_str().unwrap_or_default();
            return Ok(Transport::Memory(memory::Connection::open_as(user, name)));
        }
        // An attempt that is given up in the middle leaves a thread behind: no other one before somebody is there.
        if again {
            let greeted = tokio::time::timeout(self.connect_timeout, greeting(address)).await;
            let greeted = greeted.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()));
            let refused = |error: std::io::Error| Error::Connect {
                url: masked(address.as_str()).to_string(),
                reason: error.to_string(),
            };
            greeted.map_err(refused)?;
        }
        rabbit::Connection::open(address, self, role).await.map(Transport::Rabbit)
    }
}

/// Waits until the broker at `address` says something, where it does so by itself.
async fn greeting(address: &Url) -> std::io::Result<()> {
    let encrypted = address.scheme() == "amqps";
    let host = address.host_str().unwrap_or("localhost").trim_matches(['[', ']']);
    let port = address.port().unwrap_or(if encrypted { 5671 } else { 5672 });
    let mut stream = TcpStream::connect((host, port)).await?;
    if !encrypted {
        stream.write_all(b"AMQP\x00\x00\x09\x01").await?;
        stream.read_u8().await?;
    }
    Ok(())
}

impl fmt::Debug for Dial {
    /// Without passwords and keys.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let addresses: Vec<_> = self.addresses.iter().map(|address| masked(address.as_str()).to_string()).collect();
        f.debug_struct("Dial")
            .field("addresses", &addresses)
            .field("connect_timeout", &self.connect_timeout)
            .finish_non_exhaustive()
    }
}

/// How long to wait before the next round, when there has been no connection since `since`: about a quarter of that time,
/// so that one that comes back is found soon, and never the same for two that lost theirs together.
pub(crate) fn pause_before_next(since: Instant) -> Duration {
    let pause = (since.elapsed() / 4).clamp(MIN_PAUSE, MAX_PAUSE);
    let [random, ..] = Uuid::new_v4().into_bytes();
    pause.mul_f64(0.5 + f64::from(random) / 512.0)
}

fn whole_addresses(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = Some(text);
    std::iter::from_fn(move || {
        let text = rest?;
        // A comma that begins another address, and not one in a password.
        let next = text.match_indices(',').map(|(at, _)| at).find(|at| {
            let scheme = text[at + 1..].trim_start().split_once("://").map_or("", |(scheme, _)| scheme);
            !scheme.is_empty() && scheme.chars().all(|c| c.is_ascii_alphanumeric())
        });
        rest = next.map(|at| &text[at + 1..]);
        Some(text[..next.unwrap_or(text.len())].trim())
    })
}

/// An address for each of the hosts that `address` names.
fn hosts_apart(address: &str) -> Vec<String> {
    let Some((scheme, rest)) = address.split_once("://") else { return vec![address.to_owned()] };
    let (authority, path) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
    let (user, hosts) = authority.split_at(authority.rfind('@').map_or(0, |at| at + 1));
    hosts.split(',').map(|host| format!("{scheme}://{user}{host}{path}")).collect()
}

fn checked(address: &str) -> Result<Url, Error> {
    let invalid = |why: String| Error::Invalid(format!("`{}` {why}", masked(address)));
    let parsed = Url::parse(address).map_err(|error| invalid(format!("is not an address: {error}")))?;
    match parsed.scheme() {
        "amqps" if cfg!(not(feature = "tls")) => {
            Err(invalid("asks for TLS, which this build does not have: enable hopline's feature `tls`".to_owned()))
        }
        "memory" | "amqp" | "amqps" => Ok(parsed),
        other => Err(Error::Invalid(format!("unknown scheme `{other}://`: use memory://, amqp:// or amqps://"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Vec<String> {
        Dial::parse(text).expect("good addresses").addresses.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn several_brokers_are_hosts_of_one_address_or_whole_addresses() {
        assert_eq!(read("amqp://a"), ["amqp://a"]);
        assert_eq!(
            read("amqp://u:p@a,b:5673,[::1]/v?heartbeat=5"),
            ["amqp://u:p@a/v?heartbeat=5", "amqp://u:p@b:5673/v?heartbeat=5", "amqp://u:p@[::1]/v?heartbeat=5"]
        );
        assert_eq!(read("amqp://a/v, amqp://b:1/w"), ["amqp://a/v", "amqp://b:1/w"]);
        assert_eq!(read("amqp://u:p,q@a,b"), ["amqp://u:p,q@a", "amqp://u:p,q@b"]);
    }

    #[test]
    fn what_cannot_be_used_is_named_without_its_password() {
        let refused = |text| Dial::parse(text).expect_err("cannot be used").to_string();
        assert!(refused("http://a").contains("unknown scheme `http://`"));
        assert!(refused("amqp://u:s3cret@a b").contains("is not an address"));
        assert!(!refused("amqp://u:s3cret@a b").contains("s3cret"));
        assert!(refused("memory://a,amqp://b").contains("stands alone"));
        assert!(refused("localhost").contains("is not an address"));
    }

    #[test]
    fn addresses_are_shown_without_their_passwords() {
        let shown = format!("{:?}", Dial::parse("amqp://u:s3cret@a,b").expect("good addresses"));
        assert!(shown.contains("u:***@b") && !shown.contains("s3cret"), "{shown}");
    }

    #[tokio::test(start_paused = true)]
    async fn the_pause_grows_with_the_time_without_a_connection() {
        let since = Instant::now();
        assert!(pause_before_next(since) < Duration::from_millis(51));
        tokio::time::advance(Duration::from_secs(8)).await;
        assert!((1.0..=2.0).contains(&pause_before_next(since).as_secs_f64()));
        tokio::time::advance(Duration::from_secs(3600)).await;
        assert!((5.0..=10.0).contains(&pause_before_next(since).as_secs_f64()));
    }
}
