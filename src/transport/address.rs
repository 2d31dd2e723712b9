//! Addresses of brokers. They are read strictly, so that no part is misunderstood, and are shown without anything
//! secret.

mod reading;

use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

pub(crate) use self::reading::read;
use crate::error::Error;

/// Where a broker is. Text and `{:?}` show neither user, password nor options.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum BrokerAddress {
    /// The broker with this name in this process.
    Memory { name: String, user: Option<String> },
    /// A RabbitMQ.
    Rabbit(RabbitAddress),
}

/// Where a RabbitMQ is, and how to log in there.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct RabbitAddress {
    pub(crate) scheme: Scheme,
    pub(crate) login: Option<Login>,
    pub(crate) host: Host,
    pub(crate) port: u16,
    pub(crate) vhost: String,
    pub(crate) options: Options,
}

/// Who logs in where: for a tool that asks the broker by another way, too.
pub struct Account {
    /// The user.
    pub user: String,
    /// The password.
    pub password: String,
    /// The virtual host.
    pub vhost: String,
}

impl Account {
    /// Of the first broker in `url`. Without a user in it, that is `guest`. `None` if it is not RabbitMQ.
    ///
    /// # Errors
    /// `Invalid` for an address that cannot be used.
    pub fn of(url: &str) -> Result<Option<Self>, Error> {
        let Some(BrokerAddress::Rabbit(address)) = read(url)?.into_iter().next() else { return Ok(None) };
        let guest = || "guest".to_owned();
        let (user, password) = match address.login {
            Some(Login { user, password }) => (user, password.unwrap_or_else(guest)),
            None => (guest(), guest()),
        };
        Ok(Some(Self { user, password, vhost: address.vhost }))
    }
}

impl fmt::Debug for Account {
    /// Does not show the password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Account").field("vhost", &self.vhost).finish_non_exhaustive()
    }
}

/// The part before `://`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scheme {
    /// Without encryption.
    Amqp,
    /// With TLS.
    Amqps,
}

/// User and password. They are never shown.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Login {
    pub(crate) user: String,
    pub(crate) password: Option<String>,
}

/// The host: a name that is looked up, or an IP address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Host {
    Name(String),
    Ip(IpAddr),
}

/// The options after the `?` of an address. `None` means the default.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Options {
    /// In seconds. 0 means no heartbeats.
    pub(crate) heartbeat: Option<u16>,
    /// The largest AMQP frame, in bytes.
    pub(crate) frame_max: Option<u32>,
    pub(crate) channel_max: Option<u16>,
    pub(crate) mechanism: Option<Mechanism>,
    pub(crate) connect_timeout: Option<Duration>,
    pub(crate) order: Option<AddressOrder>,
}

/// The order in which several addresses are tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AddressOrder {
    /// In a random order, so that connections spread over the nodes of a cluster. This is the default.
    Random,
    /// In the order in which they are written.
    Given,
}

/// How to log in (SASL).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mechanism {
    Plain,
    AmqPlain,
    /// With the client certificate.
    External,
    Anonymous,
}

impl Mechanism {
    const ALL: [Self; 4] = [Self::Plain, Self::AmqPlain, Self::External, Self::Anonymous];

    fn name(self) -> &'static str {
        match self {
            Self::Plain => "PLAIN",
            Self::AmqPlain => "AMQPLAIN",
            Self::External => "EXTERNAL",
            Self::Anonymous => "ANONYMOUS",
        }
    }
}

impl Scheme {
    /// The port where brokers usually listen.
    fn port(self) -> u16 {
        match self {
            Self::Amqp => 5672,
            Self::Amqps => 5671,
        }
    }
}

impl BrokerAddress {
    /// Whether it asks to be tried in the order in which it was written.
    pub(crate) fn has_its_place(&self) -> bool {
        matches!(self, Self::Rabbit(address) if address.options.order == Some(AddressOrder::Given))
    }
}

impl fmt::Display for BrokerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Memory { name, .. } => write!(f, "memory://{name}"),
            Self::Rabbit(address) => address.fmt(f),
        }
    }
}

impl fmt::Debug for BrokerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for RabbitAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = match self.scheme {
            Scheme::Amqp => "amqp",
            Scheme::Amqps => "amqps",
        };
        write!(f, "{scheme}://{}:{}", self.host, self.port)?;
        // An address without a virtual host means the usual one, `/`.
        if self.vhost == "/" { Ok(()) } else { write!(f, "/{}", encoded(&self.vhost)) }
    }
}

impl fmt::Debug for RabbitAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Host {
    /// The host as it is written in front of a port.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => f.write_str(name),
            Self::Ip(IpAddr::V4(ip)) => ip.fmt(f),
            Self::Ip(IpAddr::V6(ip)) => write!(f, "[{ip}]"),
        }
    }
}

/// The percent-encoding of a part.
fn encoded(part: &str) -> String {
    let mut encoded = String::with_capacity(part.len());
    for byte in part.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b'~') {
            encoded.push(byte.into());
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    encoded
}
