//! Dialling: which addresses to connect to, in which order, under which name, and how long to try.

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use tokio::time::Instant;
use uuid::Uuid;

#[cfg(feature = "tls")]
use super::Tls;
#[cfg(feature = "tls")]
use super::address::Scheme;
use super::address::{self, BrokerAddress};
use super::{Role, Transport, memory, rabbit};
use crate::error::Error;
use crate::limits::CONNECT_TIMEOUT;

/// How long an address is tried alone. After that the next one is tried at the same time.
const HEAD_START: Duration = Duration::from_secs(2);
/// The shortest pause between two rounds over the addresses. It grows with the time without a connection.
const MIN_PAUSE: Duration = Duration::from_millis(50);
/// The longest pause between two rounds.
const MAX_PAUSE: Duration = Duration::from_secs(10);
/// How often a client or server that is connected to another address tries its first one. It varies by a half, so that
/// those who lost a node together do not come back at the same moment.
const LOOK_BACK: Duration = Duration::from_secs(300);
/// The longest name of a connection, in bytes.
const MAX_NAME: usize = 64;

/// The settings for connecting that clients, servers and operators have in common.
#[derive(Debug, Clone)]
pub(crate) struct DialSettings {
    /// How long each address may take.
    pub(crate) timeout: Duration,
    /// The name of the connections. `None`: the program's name.
    pub(crate) name: Option<String>,
    #[cfg(feature = "tls")]
    pub(crate) tls: Option<Tls>,
}

impl Default for DialSettings {
    fn default() -> Self {
        Self {
            timeout: CONNECT_TIMEOUT,
            name: None,
            #[cfg(feature = "tls")]
            tls: None,
        }
    }
}

impl DialSettings {
    /// Reads an address in the forms of [`Dial::parse`].
    ///
    /// # Errors
    /// `Invalid` for an address, a name or settings for TLS that cannot be used.
    pub(crate) fn dial(&self, url: &str) -> Result<Dial, Error> {
        let mut addresses = address::read(url)?;
        if !addresses.iter().any(BrokerAddress::has_its_place) {
            addresses.sort_by_cached_key(|_| Uuid::new_v4());
        }
        Ok(Dial {
            #[cfg(feature = "tls")]
            tls: connector(&addresses, self.tls.as_ref())?,
            #[cfg(not(feature = "tls"))]
            tls: None,
            addresses,
            connect_timeout: self.timeout,
            name: match &self.name {
                Some(name) => {
                    let wrong =
                        |why| Error::Invalid(format!("a connection cannot have the name {:?}: {why}", shortened(name)));
                    check_program_name(name).map_err(wrong)?;
                    name.as_str().into()
                }
                None => program().into(),
            },
            instance: None,
        })
    }
}

/// How to connect to one broker, or to one of the nodes of a cluster.
#[derive(Clone)]
pub struct Dial {
    /// The addresses in the order in which they are tried. The order is random for each dial, unless an address says
    /// `?order=given`.
    addresses: Vec<BrokerAddress>,
    /// How long each address may take.
    pub(super) connect_timeout: Duration,
    /// The name of the connections. Default: the program's name.
    pub(crate) name: Arc<str>,
    /// The id of the client or server that connects.
    instance: Option<Arc<str>>,
    /// The settings for TLS, if an address is `amqps://`.
    pub(super) tls: Option<rabbit::Connector>,
}

impl Dial {
    /// Reads `memory://`, `memory://name`, `memory://user@name`, `amqp://host`, or with the cargo feature `tls`
    /// `amqps://host`. Several addresses are written as hosts in one, `amqp://user:password@a,b:5673,c/vhost`, or as
    /// whole addresses with commas between them.
    ///
    /// # Errors
    /// `Invalid`. The error says what cannot be used, and shows nothing of the address but its scheme.
    pub fn parse(text: &str) -> Result<Self, Error> {
        DialSettings::default().dial(text)
    }

    /// The same, for this instance.
    pub(crate) fn of(self, instance: Arc<str>) -> Self {
        Self { instance: Some(instance), ..self }
    }

    /// The name of the connections on the broker and in the log: name, role, process, and instance if there is one. For
    /// example `billing-web client 4711 a1b2c3d4e5f6`.
    pub(crate) fn label(&self, role: Role) -> String {
        let label = format!("{} {role} {}", self.name, std::process::id());
        self.instance.as_ref().map_or_else(|| label.clone(), |instance| format!("{label} {instance}"))
    }

    /// Connects to the first address that answers. If one takes longer than 2 s, the next is tried at the same time. So
    /// a broker that says nothing, for example since it is suspended, does not hold up a connection to another.
    ///
    /// # Errors
    /// `Connect` with the reason of each address.
    pub async fn connect(&self, role: Role) -> Result<Transport, Error> {
        self.connect_to_one_of(&self.addresses, role).await
    }

    /// Whether a transport is connected to another than the first of several addresses.
    pub(crate) fn is_elsewhere(&self, transport: &Transport) -> bool {
        match (&*self.addresses, transport.broker()) {
            ([first, _, ..], Some(broker)) => first.to_string() != broker,
            _ => false,
        }
    }

    /// Connects to the first address only.
    ///
    /// # Errors
    /// `Connect` with the reason.
    pub(crate) async fn connect_to_first(&self, role: Role) -> Result<Transport, Error> {
        self.connect_to_one_of(&self.addresses[..1], role).await
    }

    async fn connect_to_one_of(&self, addresses: &[BrokerAddress], role: Role) -> Result<Transport, Error> {
        let (mut addresses, mut attempts) = (addresses.iter(), FuturesUnordered::new());
        let mut refusals = Vec::new();
        loop {
            attempts.extend(addresses.next().map(|address| async move { (address, self.open(address, role).await) }));
            tokio::select! {
                biased;
                ended = attempts.next() => match ended {
                    Some((_, Ok(transport))) => return Ok(transport),
                    Some((address, Err(reason))) => refusals.push((address.to_string(), reason)),
                    None => break,
                },
                () = tokio::time::sleep(HEAD_START), if addresses.len() > 0 => {}
            }
        }
        let urls: Vec<_> = refusals.iter().map(|(url, _)| url.as_str()).collect();
        let reason = match &*refusals {
            [(_, only)] => only.clone(),
            several => several.iter().map(|(url, reason)| format!("{url}: {reason}")).collect::<Vec<_>>().join("; "),
        };
        Err(Error::Connect { url: urls.join(","), reason })
    }

    async fn open(&self, address: &BrokerAddress, role: Role) -> Result<Transport, String> {
        match address {
            BrokerAddress::Memory { name, user } => {
                let opened = memory::MemoryConnection::open(name, user.as_deref(), self.connect_timeout).await;
                opened.map(Transport::Memory)
            }
            BrokerAddress::Rabbit(address) => {
                rabbit::RabbitConnection::open(address, self, role).await.map(Transport::Rabbit)
            }
        }
    }
}

/// The settings for TLS in the form for lapin, if an address is `amqps://`.
///
/// # Errors
/// `Invalid` if there are settings for TLS, but an address does not use it.
#[cfg(feature = "tls")]
fn connector(addresses: &[BrokerAddress], tls: Option<&Tls>) -> Result<Option<rabbit::Connector>, Error> {
    let is_encrypted =
        |address: &BrokerAddress| matches!(address, BrokerAddress::Rabbit(it) if it.scheme == Scheme::Amqps);
    match (tls, addresses.iter().find(|address| !is_encrypted(address))) {
        (Some(_), Some(plain)) => {
            Err(Error::Invalid(format!("`{plain}` has no TLS, for which there are settings: use amqps://")))
        }
        (Some(tls), None) => rabbit::Connector::new(tls).map(Some),
        (None, _) if addresses.iter().any(is_encrypted) => rabbit::Connector::new(&Tls::new()).map(Some),
        (None, _) => Ok(None),
    }
}

/// Checks a name for connections. The error is a sentence without the name.
pub(crate) fn check_program_name(name: &str) -> Result<(), String> {
    if name.is_empty() || name.len() > MAX_NAME || name.contains(char::is_control) {
        return Err(format!("write 1 to {MAX_NAME} bytes without control characters"));
    }
    Ok(())
}

/// Checks that an address can be read.
///
/// # Errors
/// `Invalid`, which shows nothing of the address but its scheme.
pub(crate) fn check_address(url: &str) -> Result<(), Error> {
    address::read(url).map(drop)
}

/// The beginning of a name, for an error.
fn shortened(name: &str) -> String {
    name.chars().take(2 * MAX_NAME).collect()
}

/// The name of this program, without what a name of a connection must not contain.
fn program() -> String {
    let path = std::env::args_os().next().unwrap_or_default();
    let file = Path::new(&path).file_name().unwrap_or_default().to_string_lossy();
    let mut name = String::new();
    for c in file.chars().filter(|c| !c.is_control()) {
        if name.len() + c.len_utf8() > MAX_NAME {
            break;
        }
        name.push(c);
    }
    if name.is_empty() { "hopline".to_owned() } else { name }
}

impl fmt::Debug for Dial {
    /// Does not show users, passwords and keys.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Dial")
            .field("addresses", &self.addresses)
            .field("name", &self.name)
            .field("connect_timeout", &self.connect_timeout)
            .finish_non_exhaustive()
    }
}

/// The pause before the next round over the addresses, if there was no connection since `since`: about a quarter of
/// that time. So a broker that comes back is found soon. It is random, so that clients that lost their connections
/// together do not return at the same moment.
pub(crate) fn pause_before_next(since: Instant) -> Duration {
    let pause = (since.elapsed() / 4).clamp(MIN_PAUSE, MAX_PAUSE);
    let [random, ..] = Uuid::new_v4().into_bytes();
    pause.mul_f64(0.5 + f64::from(random) / 512.0)
}

/// When a client or server that is connected to another address tries its first one again.
pub(crate) fn next_look_back() -> Instant {
    let [random, ..] = Uuid::new_v4().into_bytes();
    Instant::now() + LOOK_BACK.mul_f64(0.5 + f64::from(random) / 256.0)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_memory_of_this_process_stands_alone() {
        let refused = Dial::parse("memory://a,amqp://b").expect_err("two brokers").to_string();
        assert!(refused.contains("stands alone"), "{refused}");
    }

    #[test]
    fn connections_spread_over_several_addresses_unless_their_order_is_given() {
        let first = |url: &str| Dial::parse(url).expect("good addresses").addresses[0].to_string();
        let firsts = |url: &str| (0..100).map(|_| first(url)).collect::<BTreeSet<_>>().len();
        assert_eq!(firsts("amqp://a,b,c"), 3);
        assert_eq!(firsts("amqp://a,b,c?order=random"), 3);
        assert_eq!(firsts("amqp://a,b,c?order=given"), 1);
        assert_eq!(firsts("amqp://a?order=given,amqp://b"), 1);
    }

    #[test]
    fn a_connection_is_called_by_name_role_process_and_instance() {
        let settings = DialSettings { name: Some("billing-web".to_owned()), ..DialSettings::default() };
        let dial = settings.dial("memory://").expect("a good address");
        let process = std::process::id();
        assert_eq!(dial.label(Role::Operator), format!("billing-web operator {process}"));
        assert_eq!(dial.of("a1b2".into()).label(Role::Client), format!("billing-web client {process} a1b2"));
        let program = Dial::parse("memory://").expect("a good address").name;
        assert!(program.starts_with("hopline-"), "the program of these tests, and not {program}");
    }

    #[test]
    fn a_name_that_cannot_be_shown_is_refused() {
        let named =
            |name: &str| DialSettings { name: Some(name.to_owned()), ..DialSettings::default() }.dial("memory://");
        let (longest, longer) = ("é".repeat(32), "é".repeat(32) + "!");
        assert!(named(&longest).is_ok() && named("billing web (blue)").is_ok());
        for name in ["", &longer, "a\nb", "a\u{1b}[2J"] {
            let refused = named(name).expect_err("not a name").to_string();
            assert!(refused.contains("1 to 64 bytes") && !refused.contains(char::is_control), "{refused}");
        }
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
