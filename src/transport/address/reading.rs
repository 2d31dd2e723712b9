//! Reads addresses. Whatever could be misunderstood is refused, with the way to write it.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;
use std::str::FromStr;
use std::time::Duration;

use super::{AddressOrder, BrokerAddress, Host, Login, Mechanism, Options, RabbitAddress, Scheme};
use crate::error::Error;

/// The largest frame that an address may set, in bytes. lapin allocates two buffers of 32 frames for each connection.
const MAX_FRAME: u32 = 16 * 1024 * 1024;
/// The smallest frame that RabbitMQ 4 accepts, in bytes.
const MIN_FRAME: u32 = 8192;
/// The longest name in AMQP and in DNS, in bytes.
const LONGEST: usize = 255;

/// Reads one address, or several with commas between them.
pub(crate) fn read(text: &str) -> Result<Vec<BrokerAddress>, Error> {
    let whole: Vec<&str> = whole_addresses(text).collect();
    let mut addresses = Vec::new();
    for (at, one) in whole.iter().enumerate() {
        let scheme = scheme(one).map_or_else(String::new, |(scheme, _)| format!(" `{scheme}://...`"));
        let which = if whole.len() == 1 { String::new() } else { format!(" ({} of {})", at + 1, whole.len()) };
        let invalid = |why| Error::Invalid(format!("the broker's address{scheme}{which} {why}"));
        addresses.extend(hosts_of(one).map_err(invalid)?);
    }
    if addresses.len() > 1 && addresses.iter().any(|address| matches!(address, BrokerAddress::Memory { .. })) {
        return Err(Error::Invalid("memory:// is one broker, in this process: it stands alone".to_owned()));
    }
    Ok(addresses)
}

/// Splits the text at commas that stand before another scheme. A comma in a password does not.
fn whole_addresses(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = Some(text);
    std::iter::from_fn(move || {
        let text = rest?;
        let next = text.match_indices(',').map(|(at, _)| at).find(|at| scheme(text[at + 1..].trim_start()).is_some());
        rest = next.map(|at| &text[at + 1..]);
        Some(text[..next.unwrap_or(text.len())].trim())
    })
}

/// The scheme, if it is known, and the text after `://`.
fn scheme(text: &str) -> Option<(&'static str, &str)> {
    let (scheme, rest) = text.split_once("://")?;
    let known = ["memory", "amqp", "amqps"].into_iter().find(|known| scheme.eq_ignore_ascii_case(known))?;
    Some((known, rest))
}

/// An address for each host in one whole address.
///
/// # Errors
/// What is wrong, as the rest of a sentence that begins with the address's name.
fn hosts_of(text: &str) -> Result<Vec<BrokerAddress>, String> {
    let Some((scheme, rest)) = scheme(text) else {
        let why = match text {
            "" => "is empty",
            _ if text.contains("://") => "has an unknown scheme",
            _ => "does not begin with a scheme and `://`",
        };
        return Err(format!("{why}: use memory://, amqp:// or amqps://, as in amqp://user:password@host:5672/vhost"));
    };
    if rest.contains(|c: char| c.is_whitespace() || c.is_control()) {
        return Err("has a space or a control character in it".to_owned());
    }
    if rest.contains('#') {
        return Err("has a `#` in it: in a user, a password or a virtual host it is written %23".to_owned());
    }
    let (authority, path) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
    let (path, query) = path.split_once('?').map_or((path, None), |(path, query)| (path, Some(query)));
    if path.contains('@') || query.is_some_and(|query| query.contains('@')) {
        return Err(
            "has an `@` after the host: in a user, a password or a virtual host `@` is written %40, `/` %2F and \
                    `?` %3F"
                .to_owned(),
        );
    }
    let (login, hosts) = authority.rsplit_once('@').map_or((None, authority), |(login, hosts)| (Some(login), hosts));
    if login.is_some_and(|login| login.contains('@')) {
        return Err("has more than one `@` before the host: in a user or a password it is written %40".to_owned());
    }
    if scheme == "memory" {
        return memory(login, hosts, path, query).map(|address| vec![address]);
    }
    let scheme = if scheme == "amqps" { Scheme::Amqps } else { Scheme::Amqp };
    if scheme == Scheme::Amqps && cfg!(not(feature = "tls")) {
        return Err("asks for TLS, which this build does not have: enable hopline's feature `tls`".to_owned());
    }
    let login = login.map(read_login).transpose()?;
    let vhost = path.strip_prefix('/').map_or(Ok("/".to_owned()), read_vhost)?;
    let options = query.map_or(Ok(Options::default()), Options::read)?;
    let each = hosts.split(',').map(|host| {
        let (host, port) = read_host(host)?;
        let port = port.unwrap_or(scheme.port());
        let (login, vhost, options) = (login.clone(), vhost.clone(), options.clone());
        Ok(BrokerAddress::Rabbit(RabbitAddress { scheme, login, host, port, vhost, options }))
    });
    each.collect()
}

/// An address that begins with `memory://`.
fn memory(user: Option<&str>, name: &str, path: &str, query: Option<&str>) -> Result<BrokerAddress, String> {
    let is_name = name.is_empty() || is_host_name(name);
    if !is_name || !path.is_empty() || query.is_some() || user.is_some_and(|user| user.contains(':')) {
        return Err(
            "has more than a name in letters, digits, `-`, `_` and `.`, and a user before it: write memory://, \
                    memory://name or memory://user@name"
                .to_owned(),
        );
    }
    let user = user.map(|user| read_part("user", user)).transpose()?;
    Ok(BrokerAddress::Memory { name: name.to_owned(), user })
}

/// The part before the `@`.
fn read_login(text: &str) -> Result<Login, String> {
    let (user, password) = text.split_once(':').map_or((text, None), |(user, password)| (user, Some(password)));
    let password = password.map(|password| read_part("password", password)).transpose()?;
    Ok(Login { user: read_part("user", user)?, password })
}

/// A user or a password, without its percent-encoding.
fn read_part(what: &str, text: &str) -> Result<String, String> {
    let part = decoded(what, text)?;
    if part.is_empty() {
        return Err(format!("has an `@` and an empty {what}: leave both out to log in as `guest` or by certificate"));
    }
    if part.contains('\0') {
        return Err(format!("has a zero byte in its {what}"));
    }
    Ok(part)
}

/// The virtual host, without its percent-encoding.
fn read_vhost(text: &str) -> Result<String, String> {
    if text.contains('/') {
        return Err("has a `/` in its virtual host: it is written %2F".to_owned());
    }
    let vhost = decoded("virtual host", text)?;
    match &*vhost {
        "." | ".." => Err("has the virtual host `.` or `..`, which cannot be connected to".to_owned()),
        long if long.len() > LONGEST => Err(format!("has a virtual host of more than {LONGEST} bytes")),
        _ => Ok(vhost),
    }
}

/// A host, and its port if there is one.
fn read_host(text: &str) -> Result<(Host, Option<u16>), String> {
    let bracketed = text.strip_prefix('[').map(|rest| rest.split_once(']').unwrap_or((rest, "")));
    let (host, port) = bracketed.unwrap_or_else(|| text.split_at(text.find(':').unwrap_or(text.len())));
    let port = match port {
        "" => None,
        port => {
            let port = port.strip_prefix(':').and_then(|port| number(port, 1..=u16::MAX)).ok_or_else(|| {
                "has no number from 1 to 65535 where its port is: an IPv6 address is written in brackets, and between a \
                 password and the host stands an `@`"
                    .to_owned()
            });
            Some(port?)
        }
    };
    let host = match bracketed {
        Some(_) => {
            let ip: Result<Ipv6Addr, _> = host.parse();
            Host::Ip(ip.map_err(|_| "has something in brackets that is no IPv6 address".to_owned())?.into())
        }
        None => read_name(host)?,
    };
    Ok((host, port))
}

/// A host that is not in brackets.
fn read_name(name: &str) -> Result<Host, String> {
    if name.is_empty() {
        return Err("has no host".to_owned());
    }
    if let Ok(ip) = name.parse::<Ipv4Addr>() {
        return Ok(Host::Ip(ip.into()));
    }
    if !is_host_name(name) {
        return Err("has a host that is no name: letters, digits, `-`, `_` and `.`".to_owned());
    }
    // Name servers read `127.1` and `0x7f000001` as IP addresses. Hardly anybody means that.
    let last = name.trim_end_matches('.').rsplit('.').next().unwrap_or_default();
    let hex = last.strip_prefix("0x").or_else(|| last.strip_prefix("0X"));
    if is_number(last) || hex.is_some_and(|hex| hex.bytes().all(|digit| digit.is_ascii_hexdigit())) {
        return Err("has a host that ends in a number and is no IPv4 address".to_owned());
    }
    Ok(Host::Name(name.to_owned()))
}

fn is_host_name(name: &str) -> bool {
    let is_of_one = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'_' | b'.');
    name.len() <= LONGEST && !name.starts_with(['.', '-']) && !name.is_empty() && name.bytes().all(is_of_one)
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|digit| digit.is_ascii_digit())
}

/// A number that is written only with digits and lies in `range`.
fn number<T: FromStr + PartialOrd>(text: &str, range: RangeInclusive<T>) -> Option<T> {
    text.parse().ok().filter(|number| is_number(text) && range.contains(number))
}

/// Removes the percent-encoding of a part. `what` names the part in the error.
fn decoded(what: &str, text: &str) -> Result<String, String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, after @ ..] = rest {
        let (byte, after) = match (first, after) {
            (b'%', [high, low, after @ ..]) => (hex(*high).zip(hex(*low)).map(|(high, low)| high << 4 | low), after),
            (b'%', after) => (None, after),
            (byte, after) => (Some(*byte), after),
        };
        let Some(byte) = byte else {
            return Err(format!("has a `%` in its {what} without two hexadecimal digits after it: `%` is written %25"));
        };
        bytes.push(byte);
        rest = after;
    }
    String::from_utf8(bytes).map_err(|_| format!("has a {what} that is not UTF-8"))
}

fn hex(digit: u8) -> Option<u8> {
    char::from(digit).to_digit(16).and_then(|digit| u8::try_from(digit).ok())
}

impl Options {
    fn read(query: &str) -> Result<Self, String> {
        let mut options = Self::default();
        for option in query.split('&') {
            let (key, value) = option.split_once('=').unwrap_or((option, ""));
            let not = |right: &str| format!("has a `{key}` that is not {right}");
            let twice = match key {
                "heartbeat" => {
                    let seconds = number(value, 0..=u16::MAX);
                    let seconds = seconds.ok_or_else(|| not("a number of seconds from 0 to 65535"))?;
                    options.heartbeat.replace(seconds).is_some()
                }
                "frame_max" => {
                    let bytes = number(value, MIN_FRAME..=MAX_FRAME);
                    let bytes = bytes.ok_or_else(|| not("a number of bytes from 8192 to 16777216"))?;
                    options.frame_max.replace(bytes).is_some()
                }
                "channel_max" => {
                    let channels = number(value, 0..=u16::MAX);
                    options.channel_max.replace(channels.ok_or_else(|| not("a number from 0 to 65535"))?).is_some()
                }
                "auth_mechanism" => {
                    let mechanism = Mechanism::ALL.into_iter().find(|known| known.name().eq_ignore_ascii_case(value));
                    let mechanism = mechanism.ok_or_else(|| not("plain, amqplain, external or anonymous"))?;
                    options.mechanism.replace(mechanism).is_some()
                }
                "connection_timeout" => {
                    let millis = number(value, 1..=u64::MAX);
                    let millis = millis.ok_or_else(|| not("a number of milliseconds above 0"))?;
                    options.connect_timeout.replace(Duration::from_millis(millis)).is_some()
                }
                "order" => {
                    let order = match value {
                        "random" => AddressOrder::Random,
                        "given" => AddressOrder::Given,
                        _ => return Err(not("random or given")),
                    };
                    options.order.replace(order).is_some()
                }
                _ => {
                    return Err("has an unknown option after its `?`: there are heartbeat, frame_max, channel_max, \
                                auth_mechanism, connection_timeout and order, and a `?` in a password is written %3F"
                        .to_owned());
                }
            };
            if twice {
                return Err(format!("has the option `{key}` twice"));
            }
        }
        Ok(options)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::encoded;
    use super::*;

    fn only(text: &str) -> RabbitAddress {
        match &read(text).unwrap_or_else(|error| panic!("`{text}`: {error}"))[..] {
            [BrokerAddress::Rabbit(address)] => address.clone(),
            other => panic!("`{text}` is {other:?}"),
        }
    }

    fn refused(text: &str) -> String {
        read(text).map(|read| panic!("`{text}` is {read:?}")).unwrap_or_else(|error: Error| error.to_string())
    }

    fn shown(text: &str) -> Vec<String> {
        read(text).unwrap_or_else(|error| panic!("`{text}`: {error}")).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn every_part_is_read() {
        let address =
            only("amqp://b%6Fb:p%40ss:w%2F%C3%B6rd@rabbit-1.example.com:5673/shop%2Feu?heartbeat=60&frame_max=65536");
        let login = address.login.as_ref().expect("it has one");
        assert_eq!((login.user.as_str(), login.password.as_deref()), ("bob", Some("p@ss:w/örd")));
        assert_eq!(address.host, Host::Name("rabbit-1.example.com".to_owned()));
        assert_eq!((address.scheme, address.port, address.vhost.as_str()), (Scheme::Amqp, 5673, "shop/eu"));
        assert_eq!((address.options.heartbeat, address.options.frame_max), (Some(60), Some(65536)));
        let options = only("AMQP://h?channel_max=7&auth_mechanism=External&connection_timeout=1500").options;
        assert_eq!((options.channel_max, options.mechanism), (Some(7), Some(Mechanism::External)));
        assert_eq!(options.connect_timeout, Some(Duration::from_millis(1500)));
        let bare = only("  amqp://localhost\n");
        assert!(bare.login.is_none() && bare.options == Options::default());
        assert_eq!((bare.port, bare.vhost.as_str()), (5672, "/"));
        assert_eq!(only("amqp://bob@localhost").login.map(|login| login.password), Some(None));
    }

    #[test]
    fn a_host_is_a_name_or_an_ip_address() {
        let host = |text: &str| only(&format!("amqp://guest:guest@{text}/")).host;
        assert_eq!(host("[2001:db8::1]:5672"), Host::Ip("2001:db8::1".parse().expect("an address")));
        assert_eq!(host("[::1]"), Host::Ip("::1".parse().expect("an address")));
        assert_eq!(host("127.0.0.1:1"), Host::Ip("127.0.0.1".parse().expect("an address")));
        for name in
            ["a", "my_broker", "RabbitMQ.example.com.", "xn--bcher-kva.example", "10-0-0-1.pod.local", "0xbeef.io"]
        {
            assert_eq!(host(name), Host::Name(name.to_owned()));
        }
    }

    #[test]
    fn several_brokers_are_hosts_of_one_address_or_whole_addresses() {
        assert_eq!(
            shown("amqp://u:p@a,b:5673,[::1]/v?heartbeat=5"),
            ["amqp://a:5672/v", "amqp://b:5673/v", "amqp://[::1]:5672/v"]
        );
        assert_eq!(shown("amqp://a/v, AMQP://b:1/w"), ["amqp://a:5672/v", "amqp://b:1/w"]);
        let read = read("amqp://u:p,q@a,b,amqp://c").expect("good addresses");
        let logins = read.iter().map(|address| match address {
            BrokerAddress::Rabbit(address) => address.login.clone().map(|login| (login.user, login.password)),
            BrokerAddress::Memory { .. } => panic!("none of them"),
        });
        let bob = Some(("u".to_owned(), Some("p,q".to_owned())));
        assert_eq!(logins.collect::<Vec<_>>(), [bob.clone(), bob, None]);
    }

    #[test]
    fn the_broker_in_this_process_has_a_name_and_a_user_at_most() {
        let read = |text| read(text).map(|mut read| read.remove(0)).map_err(|error| error.to_string());
        let memory =
            |name: &str, user: Option<&str>| BrokerAddress::Memory { name: name.into(), user: user.map(Into::into) };
        assert_eq!(read("memory://"), Ok(memory("", None)));
        assert_eq!(read("memory://it"), Ok(memory("it", None)));
        assert_eq!(read("memory://o%27hara@it"), Ok(memory("it", Some("o'hara"))));
        for wrong in
            ["memory://u:p@it", "memory://it:1", "memory://it/v", "memory://it?a=b", "memory://a,b", "memory:///"]
        {
            let error = read(wrong).expect_err("not one of this process");
            assert!(error.starts_with("the broker's address `memory://...` has more than a name"), "{error}");
        }
    }

    #[test]
    fn an_address_is_shown_as_where_it_leads_alone() {
        assert_eq!(shown("amqp://bob:s3cret@host?heartbeat=7"), ["amqp://host:5672"]);
        assert_eq!(shown("amqp://bob:s3cret@host:1/"), ["amqp://host:1/"]);
        assert_eq!(shown("amqp://bob:s3cret@host/%2f"), ["amqp://host:5672"]);
        assert_eq!(shown("amqp://bob:s3cret@[::1]/a%20b%2Fc"), ["amqp://[::1]:5672/a%20b%2Fc"]);
        assert_eq!(shown("memory://bob@it"), ["memory://it"]);
        assert_eq!(format!("{:?}", read("amqp://bob:s3cret@host/v").expect("a good address")), "[amqp://host:5672/v]");
    }

    #[cfg(feature = "tls")]
    #[test]
    fn tls_has_a_port_of_its_own() {
        assert_eq!(shown("amqps://bob:s3cret@host/v"), ["amqps://host:5671/v"]);
    }

    #[cfg(not(feature = "tls"))]
    #[test]
    fn tls_is_refused_where_there_is_none() {
        assert!(refused("amqps://bob:s3cret@host").contains("enable hopline's feature `tls`"));
    }

    #[test]
    fn what_cannot_be_understood_is_named() {
        let long = format!("amqp://host/{}", "v".repeat(256));
        for (text, culprit) in [
            ("", "is empty: use memory://, amqp:// or amqps://"),
            ("localhost:5672", "does not begin with a scheme and `://`"),
            ("amqp:guest:s3cret@host", "does not begin with a scheme and `://`"),
            ("amqp:/guest:s3cret@host", "does not begin with a scheme and `://`"),
            ("http://guest:s3cret@host", "has an unknown scheme: use memory://"),
            ("s3cret://host", "has an unknown scheme: use memory://"),
            ("amqp://", "has no host"),
            ("amqp://guest:s3cret@", "has no host"),
            ("amqp://guest:s3cret@/v", "has no host"),
            ("amqp://a,,b", "has no host"),
            ("amqp:///v", "has no host"),
            ("amqp://guest:s3cret@ho st", "has a space or a control character"),
            ("amqp://guest:s3\u{7}cret@host", "has a space or a control character"),
            ("amqp://guest:12#s3cret@host", "has a `#` in it"),
            ("amqp://host/v#s3cret", "has a `#` in it"),
            ("amqp://guest:12/s3cret@host", "has an `@` after the host"),
            ("amqp://guest:12?s3cret@host", "has an `@` after the host"),
            ("amqp://host/s3cret@v", "has an `@` after the host"),
            ("amqp://guest:12@s3cret@host", "has more than one `@` before the host"),
            ("amqp://guest:s3cret", "has no number from 1 to 65535 where its port is"),
            ("amqp://guest:s3cret/v", "has no number from 1 to 65535 where its port is"),
            ("amqp://host:0", "has no number from 1 to 65535 where its port is"),
            ("amqp://host:", "has no number from 1 to 65535 where its port is"),
            ("amqp://host:65536", "has no number from 1 to 65535 where its port is"),
            ("amqp://host:+1", "has no number from 1 to 65535 where its port is"),
            ("amqp://[::1]5672", "has no number from 1 to 65535 where its port is"),
            ("amqp://2001:db8::1", "an IPv6 address is written in brackets"),
            ("amqp://[2001:db8::g]", "has something in brackets that is no IPv6 address"),
            ("amqp://[127.0.0.1]", "has something in brackets that is no IPv6 address"),
            ("amqp://[fe80::1%25eth0]", "has something in brackets that is no IPv6 address"),
            ("amqp://bücher.example", "has a host that is no name"),
            ("amqp://a%2Eb", "has a host that is no name"),
            ("amqp://guest\\host", "has a host that is no name"),
            ("amqp://127.1", "ends in a number and is no IPv4 address"),
            ("amqp://10.0.0.256", "ends in a number and is no IPv4 address"),
            ("amqp://0x7f000001", "ends in a number and is no IPv4 address"),
            ("amqp://guest:50%@host", "has a `%` in its password without two hexadecimal digits"),
            ("amqp://gu%zzst@host", "has a `%` in its user without two hexadecimal digits"),
            ("amqp://host/%f", "has a `%` in its virtual host without two hexadecimal digits"),
            ("amqp://guest:%ff@host", "has a password that is not UTF-8"),
            ("amqp://guest:a%00b@host", "has a zero byte in its password"),
            ("amqp://guest:@host", "has an `@` and an empty password"),
            ("amqp://:s3cret@host", "has an `@` and an empty user"),
            ("amqp://@host", "has an `@` and an empty user"),
            ("amqp://host//", "has a `/` in its virtual host: it is written %2F"),
            ("amqp://host/..", "has the virtual host `.` or `..`"),
            ("amqp://host/%2e", "has the virtual host `.` or `..`"),
            (&long, "has a virtual host of more than 255 bytes"),
            ("amqp://host?", "has an unknown option after its `?`"),
            ("amqp://host?hearbeat=5", "has an unknown option after its `?`: there are heartbeat, "),
            ("amqp://a,b?order=first", "has a `order` that is not random or given"),
            ("amqp://host?heartbeat", "has a `heartbeat` that is not a number of seconds"),
            ("amqp://host?heartbeat=abc", "has a `heartbeat` that is not a number of seconds from 0 to 65535"),
            ("amqp://host?heartbeat=65536", "has a `heartbeat` that is not a number of seconds"),
            ("amqp://host?heartbeat=5&heartbeat=6", "has the option `heartbeat` twice"),
            ("amqp://host?frame_max=4096", "has a `frame_max` that is not a number of bytes from 8192"),
            ("amqp://host?channel_max=-1", "has a `channel_max` that is not a number from 0 to 65535"),
            ("amqp://host?auth_mechanism=kerberos", "has a `auth_mechanism` that is not plain, amqplain, external or"),
            ("amqp://host?connection_timeout=0", "has a `connection_timeout` that is not a number of milliseconds"),
            ("amqp://a,amqp://b:x", "the broker's address `amqp://...` (2 of 2) has no number"),
            ("memory://a,amqp://b", "memory:// is one broker, in this process: it stands alone"),
        ] {
            let error = refused(text);
            assert!(error.contains(culprit), "`{text}`: {error}");
            assert!(!error.contains("s3cret") && !error.contains('\n'), "`{text}`: {error}");
        }
    }

    /// What stands in addresses beside what people choose.
    const SIGNS: &str = ":/@?#,[]%&= ";

    /// Whatever is shown of an address: what it is refused with, or how it is shown when it is read.
    fn all_shown(text: &str) -> String {
        match read(text) {
            Ok(read) => format!("{read:?} {}", read.iter().map(ToString::to_string).collect::<String>()),
            Err(error) => format!("{error} {error:?}"),
        }
    }

    #[test]
    fn no_slip_of_the_hand_shows_a_password() {
        let secret = "s3cret";
        for right in [
            "amqp://guest:s3cret@host:5672/vhost?heartbeat=10",
            "amqp://guest:s3cret@host",
            "amqp://guest:s3cret@a,b:5673/v",
            "amqp://a,amqp://guest:s3cret@b/v?frame_max=8192",
        ] {
            for at in 0..=right.len() {
                let (before, after) = right.split_at(at);
                let rest = after.get(1..).unwrap_or_default();
                // Within the secret, what is left of it may well be a host: only its end counts then.
                let parts = [before, after].map(|part| part.contains(secret));
                let slips = SIGNS.chars().flat_map(|sign| {
                    [format!("{before}{sign}{after}"), format!("{before}{sign}{rest}"), format!("{before}{rest}")]
                });
                for slip in slips.chain([before.to_owned(), after.to_owned()]) {
                    let shown = all_shown(&slip);
                    let hidden = if parts.contains(&true) { secret } else { &secret[3..] };
                    assert!(!shown.contains(hidden), "`{slip}` shows {shown}");
                }
            }
        }
    }

    proptest! {
        #[test]
        fn a_password_is_hidden_whatever_it_is(user in "\\PC{1,8}", password in "\\PC{1,12}#\\PC{1,12}") {
            let part = |part: &str| encoded(part);
            let text = format!("amqp://{}:{}@host:1/v", part(&user), part(&password));
            let address = only(&text);
            let login = address.login.as_ref().expect("it has one");
            prop_assert_eq!((&login.user, login.password.as_ref()), (&user, Some(&password)));
            prop_assert_eq!(format!("{address} {address:?}"), "amqp://host:1/v amqp://host:1/v");
            // As it is, it is no address.
            let shown = all_shown(&format!("amqp://{user}:{password}@host:1/v"));
            prop_assert!(shown.starts_with("the broker's address `amqp://...` has "), "{}", shown);
        }

        #[test]
        fn what_is_refused_shows_nothing_of_itself(
            before in "(memory|amqps?|redis|)(://|:|)[a-z0-9:/@?#,%&=\\[\\]. -]{0,20}",
            after in "[a-z0-9:/@?#,%&=\\[\\]. -]{0,20}",
        ) {
            if let Err(error) = read(&format!("{before}s3cret{after}")) {
                let shown = format!("{error} {error:?}");
                prop_assert!(!shown.contains("s3cret"), "{}", shown);
            }
        }

        #[test]
        fn what_is_shown_is_an_address_that_leads_to_the_same_place(
            host in "([a-z][a-z0-9-]{0,8}|127\\.0\\.0\\.[1-9]|\\[2001:db8::[1-9a-f]\\])",
            port in 1..u16::MAX,
            vhost in "\\PC{0,12}",
        ) {
            prop_assume!(!matches!(vhost.as_str(), "." | ".."));
            let address = only(&format!("amqp://u:p@{host}:{port}/{}?heartbeat=1", encoded(&vhost)));
            let again = only(&address.to_string());
            prop_assert_eq!((&again.host, again.port, &again.vhost), (&address.host, address.port, &address.vhost));
        }
    }
}
