//! Opens connections: lapin gets them from a pool, over wires to sockets that Hopline has opened itself.
//!
//! The pool is given a runtime ([`Kit`]) that does not connect to anything, but hands out lapin's end of a wire that was
//! made before.

use std::future::Future;
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use async_rs::traits::{Executor, Reactor, RuntimeKit};
use async_rs::util::Task;
use async_rs::{Runtime, Tokio};
use deadpool_lapin::{Manager, Object, Pool, PoolError};
use futures::future::BoxFuture;
use futures::io::{AsyncRead, AsyncWrite};
use futures::{FutureExt as _, Stream};
use lapin::ConnectionProperties;
use lapin::uri::{AMQPAuthority, AMQPQueryString, AMQPScheme, AMQPUri, AMQPUserInfo, SASLMechanism};

use super::diagnosis::{self, ConnectStage};
use super::socket;
use super::tls::Connector;
use super::wire::{Pipe, Wire};
use crate::transport::Dial;
use crate::transport::address::{Mechanism, RabbitAddress, Scheme};

/// The heartbeat in seconds, unless the address sets another. Each side sends a sign of life twice in this time. After
/// two to three times of silence, a side gives up the other. With RabbitMQ's own 60 s, a broken network would be
/// noticed after minutes.
const HEARTBEAT: u16 = 10;
/// The largest AMQP frame in bytes, unless the address sets another. RabbitMQ would propose the same, but too late:
/// lapin makes its buffers before that, and growing them later costs 8 MiB of memory for each connection.
const FRAME_MAX: u32 = 128 * 1024;
/// The user and the password that are used with an address that names no user.
const GUEST: &str = "guest";

/// Opens the connections of one transport, all to the same address.
pub(super) struct ConnectionSource<'a> {
    address: &'a RabbitAddress,
    uri: AMQPUri,
    tls: Option<&'a Connector>,
    /// The runtime that hands lapin its socket.
    kit: Kit,
    pool: Pool,
}

impl<'a> ConnectionSource<'a> {
    /// Prepares connections to `address`. `label` is their name on the broker, for its management page.
    ///
    /// # Errors
    /// A sentence that says what is wrong with the settings.
    pub(super) fn of(address: &'a RabbitAddress, dial: &'a Dial, label: String) -> Result<Self, String> {
        let (kit, uri) = (Kit::new(), uri(address, dial.tls.as_ref().is_some_and(Connector::has_identity)));
        let properties = move || ConnectionProperties::default().with_connection_name(label.as_str().into());
        let manager = Manager::new(uri.to_string(), properties, Runtime::new(kit.clone()));
        // Each connection is taken out of the pool once and never returned.
        let pool = Pool::builder(manager).max_size(1).build().map_err(|error| error.to_string())?;
        let tls = match address.scheme {
            Scheme::Amqp => None,
            Scheme::Amqps => Some(dial.tls.as_ref().ok_or("there are no settings for TLS")?),
        };
        Ok(Self { address, uri, tls, kit, pool })
    }

    /// Opens a connection, and returns it with its wire. `stage` tells how far it has come, for the error message if the
    /// caller gives up. When the future is dropped, the socket is closed.
    ///
    /// # Errors
    /// A sentence that says why, and what to look at.
    pub(super) async fn connect(&self, stage: &mut ConnectStage) -> Result<(lapin::Connection, Arc<Wire>), String> {
        let (wire, pipe, task) = Wire::new(socket::open(self.address, self.tls, stage).await?);
        *stage = ConnectStage::LoggingIn;
        tokio::spawn(task);
        let cutter = Cutter(Some(wire.clone()));
        self.kit.offer(pipe, &wire);
        match self.pool.get().await {
            Ok(connection) => {
                cutter.spare();
                Ok((Object::take(connection), wire))
            }
            Err(PoolError::Backend(error)) => {
                Err(diagnosis::refused(&error, &self.uri, self.address, wire.first_words()))
            }
            Err(other) => Err(other.to_string()),
        }
    }

    /// The address of the broker.
    pub(super) fn address(&self) -> &RabbitAddress {
        self.address
    }

    /// How lapin logs in.
    pub(super) fn uri(&self) -> &AMQPUri {
        &self.uri
    }
}

/// Ends the connection when it is dropped, unless [`Cutter::spare`] was called. lapin would wait for ever on a connection
/// whose other side says nothing.
struct Cutter(Option<Arc<Wire>>);

impl Cutter {
    /// Leaves the connection open: it has been established.
    fn spare(mut self) {
        self.0 = None;
    }
}

impl Drop for Cutter {
    fn drop(&mut self) {
        if let Some(wire) = &self.0 {
            wire.cut();
        }
    }
}

/// The address as lapin is told: user, virtual host and options, but not the host, since lapin does not connect itself.
/// The pool hands it over as text, which lapin reads again.
fn uri(address: &RabbitAddress, has_identity: bool) -> AMQPUri {
    let options = &address.options;
    let auth_mechanism = match options.mechanism {
        Some(Mechanism::Plain) => SASLMechanism::Plain,
        Some(Mechanism::AmqPlain) => SASLMechanism::AMQPlain,
        Some(Mechanism::External) => SASLMechanism::External,
        Some(Mechanism::Anonymous) => SASLMechanism::Anonymous,
        // A client with a certificate, and an address without a user: log in with the certificate.
        None if has_identity && address.login.is_none() => SASLMechanism::External,
        None => SASLMechanism::Plain,
    };
    let part = |part: Option<&str>| part.unwrap_or(GUEST).to_owned();
    let login = address.login.as_ref();
    AMQPUri {
        scheme: AMQPScheme::AMQP,
        authority: AMQPAuthority {
            userinfo: AMQPUserInfo {
                username: part(login.map(|login| login.user.as_str())),
                password: part(login.and_then(|login| login.password.as_deref())),
            },
            // Nobody connects to this: see [`Kit`].
            host: "127.0.0.1".to_owned(),
            port: 1,
        },
        vhost: address.vhost.clone(),
        query: AMQPQueryString {
            frame_max: Some(options.frame_max.unwrap_or(FRAME_MAX)),
            channel_max: options.channel_max,
            heartbeat: Some(options.heartbeat.unwrap_or(HEARTBEAT)),
            connection_timeout: None,
            auth_mechanism: Some(auth_mechanism),
        },
    }
}

/// The runtime that lapin uses: tokio, with two differences.
///
/// - It does not connect. It hands out the pipe that was offered with [`Kit::offer`].
/// - A sleep ends only after everything that has arrived at the sockets was handled. lapin sleeps before it judges by the
///   heartbeats whether the other side is gone. After a process was suspended, heartbeats and replies may have arrived
///   that it has not read.
#[derive(Debug, Clone)]
struct Kit {
    tokio: Tokio,
    /// The pipe for the next connection.
    offered: Arc<Mutex<Option<Pipe>>>,
    /// The wires of all connections.
    wires: Arc<Mutex<Vec<Weak<Wire>>>>,
}

impl Kit {
    fn new() -> Self {
        Self { tokio: Tokio::current(), offered: Arc::default(), wires: Arc::default() }
    }

    /// Gives lapin the pipe for its next connection.
    fn offer(&self, pipe: Pipe, wire: &Arc<Wire>) {
        self.wires.lock().expect("no panic while holding the list").push(Arc::downgrade(wire));
        *self.offered.lock().expect("no panic while holding the pipe") = Some(pipe);
    }
}

impl RuntimeKit for Kit {}

impl Executor for Kit {
    type Task<T: Send + 'static> = <Tokio as Executor>::Task<T>;

    fn block_on<T, F: Future<Output = T>>(&self, future: F) -> T {
        self.tokio.block_on(future)
    }

    fn spawn<T: Send + 'static, F: Future<Output = T> + Send + 'static>(&self, future: F) -> Task<Self::Task<T>> {
        self.tokio.spawn(future)
    }

    fn spawn_blocking<T: Send + 'static, F: FnOnce() -> T + Send + 'static>(&self, work: F) -> Task<Self::Task<T>> {
        self.tokio.spawn_blocking(work)
    }
}

impl Reactor for Kit {
    type TcpStream = Pipe;
    type Sleep = BoxFuture<'static, ()>;

    fn register<H: Read + Write + Send + 'static>(
        &self,
        _: H,
    ) -> io::Result<impl AsyncRead + AsyncWrite + Send + Unpin + 'static> {
        Err::<Pipe, _>(io::ErrorKind::Unsupported.into())
    }

    fn sleep(&self, duration: Duration) -> Self::Sleep {
        let (time, wires) = (self.tokio.sleep(duration), self.wires.clone());
        async move {
            time.await;
            let wires = wires.lock().expect("no panic while holding the list").clone();
            for wire in wires.iter().filter_map(Weak::upgrade) {
                wire.is_caught_up().await;
            }
        }
        .boxed()
    }

    fn interval(&self, duration: Duration) -> impl Stream<Item = Instant> + Send + 'static {
        self.tokio.interval(duration)
    }

    fn tcp_connect_addr(&self, _: SocketAddr) -> impl Future<Output = io::Result<Pipe>> + Send + 'static {
        let offered = self.offered.lock().expect("no panic while holding the pipe").take();
        std::future::ready(offered.ok_or_else(|| io::ErrorKind::NotConnected.into()))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::transport::address::{BrokerAddress, read};

    fn uri_of(text: &str, has_identity: bool) -> AMQPUri {
        let [BrokerAddress::Rabbit(address)] = &read(text).expect("a good address")[..] else {
            panic!("one of a RabbitMQ")
        };
        uri(address, has_identity)
    }

    #[test]
    fn what_an_address_leaves_open_is_said_to_lapin() {
        let left_open = uri_of("amqp://host", false);
        assert_eq!((left_open.vhost.as_str(), left_open.query.heartbeat), ("/", Some(10)));
        // Whatever else it is, lapin's buffers would cost 8 MiB for each connection.
        assert_eq!(left_open.query.frame_max, Some(131_072));
        assert_eq!(left_open.authority.userinfo, AMQPUserInfo { username: GUEST.into(), password: GUEST.into() });
        let said = uri_of("amqp://b%40b:p%2Fw@host/v%2Fw?heartbeat=0&frame_max=8192&channel_max=9", false);
        assert_eq!((said.vhost.as_str(), said.query.heartbeat, said.query.channel_max), ("v/w", Some(0), Some(9)));
        assert_eq!(said.query.frame_max, Some(8192));
        assert_eq!(said.authority.userinfo, AMQPUserInfo { username: "b@b".into(), password: "p/w".into() });
    }

    #[test]
    fn a_certificate_logs_in_where_the_address_names_no_user() {
        let mechanism = |text, has_identity| uri_of(text, has_identity).query.auth_mechanism.expect("it is said");
        assert_eq!(mechanism("amqp://host", false), SASLMechanism::Plain);
        assert_eq!(mechanism("amqp://host", true), SASLMechanism::External);
        assert_eq!(mechanism("amqp://bob:s3cret@host", true), SASLMechanism::Plain);
        assert_eq!(mechanism("amqp://host?auth_mechanism=plain", true), SASLMechanism::Plain);
        assert_eq!(mechanism("amqp://bob:s3cret@host?auth_mechanism=EXTERNAL", false), SASLMechanism::External);
    }

    proptest! {
        // The pool hands the address over as text.
        #[test]
        fn lapin_reads_what_was_meant(user in "\\PC{1,20}", password in "\\PC{1,20}", vhost in "\\PC{0,20}") {
            let mut meant = uri_of("amqp://host?auth_mechanism=external", false);
            meant.authority.userinfo = AMQPUserInfo { username: user, password };
            meant.vhost = vhost;
            prop_assume!(!matches!(meant.vhost.as_str(), "." | ".."));
            prop_assert_eq!(meant.to_string().parse::<AMQPUri>(), Ok(meant));
        }
    }
}
