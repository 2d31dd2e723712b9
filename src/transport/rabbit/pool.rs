//! The pool that connections come from, which has lapin speak on sockets of our own.

use std::future::Future;
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
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

use super::diagnosis::{self, Stage};
use super::socket::{Socket, Unread};
use super::tls::Connector;
use crate::transport::Dial;
use crate::transport::address::{Mechanism, RabbitAddress, Scheme};

/// The heartbeat, unless the address says otherwise, in seconds: each side says twice as often that it is there. After two of
/// silence, or half a one more, this side gives the other up, and the broker after two to three: with RabbitMQ's own minute, a
/// partition would go unnoticed for as many minutes.
const HEARTBEAT: u16 = 10;
/// The largest frame, unless the address says otherwise, in bytes. It is what RabbitMQ would say as well, but too late:
/// lapin makes its buffers before, and to grow them it touches all of their 8 MiB.
const FRAME_MAX: u32 = 128 * 1024;
/// Who logs in with an address that names nobody.
const GUEST: &str = "guest";

/// Where the connections of one transport come from.
pub(super) struct Source<'a> {
    address: &'a RabbitAddress,
    uri: AMQPUri,
    tls: Option<&'a Connector>,
    kit: Kit,
    pool: Pool,
}

impl<'a> Source<'a> {
    /// Connections to `address`, called `label` on the broker.
    ///
    /// # Errors
    /// Why there can be none, in a sentence.
    pub(super) fn of(address: &'a RabbitAddress, dial: &'a Dial, label: String) -> Result<Self, String> {
        let (kit, uri) = (Kit::new(), uri(address, dial.tls.as_ref().is_some_and(Connector::has_identity)));
        let properties = move || ConnectionProperties::default().with_connection_name(label.as_str().into());
        let manager = Manager::new(uri.to_string(), properties, Runtime::new(kit.clone()));
        // Each is taken once, and for good.
        let pool = Pool::builder(manager).max_size(1).build().map_err(|error| error.to_string())?;
        let tls = match address.scheme {
            Scheme::Amqp => None,
            Scheme::Amqps => Some(dial.tls.as_ref().ok_or("there are no settings for TLS")?),
        };
        Ok(Self { address, uri, tls, kit, pool })
    }

    /// Opens a connection. If the future is dropped, nothing is left of it. `stage` tells how far it has come.
    ///
    /// # Errors
    /// Why not, in a sentence.
    pub(super) async fn connect(&self, stage: &mut Stage) -> Result<lapin::Connection, String> {
        let (socket, cutter) = Socket::open(self.address, self.tls, stage).await?;
        *stage = Stage::LoggingIn;
        let first_words = socket.first_words();
        self.kit.offer(socket);
        match self.pool.get().await {
            Ok(connection) => {
                cutter.spare();
                Ok(Object::take(connection))
            }
            Err(PoolError::Backend(error)) => {
                Err(diagnosis::refused(&error, &self.uri, self.address, first_words.get().map_or(&[], Vec::as_slice)))
            }
            Err(other) => Err(other.to_string()),
        }
    }

    /// Where they lead.
    pub(super) fn address(&self) -> &RabbitAddress {
        self.address
    }

    /// How lapin logs in.
    pub(super) fn uri(&self) -> &AMQPUri {
        &self.uri
    }
}

/// What lapin has to know of an address: all but where it is, and whether TLS leads there. The pool hands it over as text,
/// which lapin reads.
fn uri(address: &RabbitAddress, has_identity: bool) -> AMQPUri {
    let options = &address.options;
    let auth_mechanism = match options.mechanism {
        Some(Mechanism::Plain) => SASLMechanism::Plain,
        Some(Mechanism::AmqPlain) => SASLMechanism::AMQPlain,
        Some(Mechanism::External) => SASLMechanism::External,
        Some(Mechanism::Anonymous) => SASLMechanism::Anonymous,
        // Without a user, who has a certificate logs in with that.
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

/// tokio as lapin uses it, except that it connects to nobody: it hands out the socket that it was offered. And whoever sleeps
/// wakes when what has arrived at these sockets by then has been read: lapin sleeps until it judges by heartbeats whether the
/// other side has gone, and a process that was suspended has yet to read them, and replies.
#[derive(Debug, Clone)]
struct Kit {
    tokio: Tokio,
    offered: Arc<Mutex<Option<Socket>>>,
    unread: Arc<Mutex<Vec<Unread>>>,
}

impl Kit {
    fn new() -> Self {
        Self { tokio: Tokio::current(), offered: Arc::default(), unread: Arc::default() }
    }

    fn offer(&self, socket: Socket) {
        self.unread.lock().expect("no panic while holding the list").push(socket.unread());
        *self.offered.lock().expect("no panic while holding the socket") = Some(socket);
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
    type TcpStream = Socket;
    type Sleep = BoxFuture<'static, ()>;

    fn register<H: Read + Write + Send + 'static>(
        &self,
        _: H,
    ) -> io::Result<impl AsyncRead + AsyncWrite + Send + Unpin + 'static> {
        Err::<Socket, _>(io::ErrorKind::Unsupported.into())
    }

    fn sleep(&self, duration: Duration) -> Self::Sleep {
        let (time, unread) = (self.tokio.sleep(duration), self.unread.clone());
        async move {
            time.await;
            let sockets = unread.lock().expect("no panic while holding the list").clone();
            for mut socket in sockets {
                socket.is_noted().await;
            }
        }
        .boxed()
    }

    fn interval(&self, duration: Duration) -> impl Stream<Item = Instant> + Send + 'static {
        self.tokio.interval(duration)
    }

    fn tcp_connect_addr(&self, _: SocketAddr) -> impl Future<Output = io::Result<Socket>> + Send + 'static {
        let offered = self.offered.lock().expect("no panic while holding the socket").take();
        std::future::ready(offered.ok_or_else(|| io::ErrorKind::NotConnected.into()))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::transport::address::{Address, read};

    fn uri_of(text: &str, has_identity: bool) -> AMQPUri {
        let [Address::Rabbit(address)] = &read(text).expect("a good address")[..] else { panic!("one of a RabbitMQ") };
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
