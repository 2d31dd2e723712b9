//! Opens sockets to a broker: looks up the host, connects, and negotiates TLS. Only then does lapin get the socket.
//!
//! lapin has no time-out for this, and would connect to the first address of a host only. The socket also helps lapin
//! to read everything that has arrived before it notices the end of a connection.

use std::io::{self, IoSlice};
use std::net::{Shutdown, SocketAddr, ToSocketAddrs};
use std::pin::Pin;
use std::sync::{Arc, OnceLock, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use futures::StreamExt as _;
use futures::io::{AsyncRead, AsyncWrite};
use futures::stream::FuturesUnordered;
use lapin::tcp::AsyncTcpStream;
use tokio::net::TcpStream;
use tokio::sync::{oneshot, watch};
use tokio_util::compat::{Compat, TokioAsyncReadCompatExt as _};

use super::diagnosis::{self, ConnectStage};
use super::tls::Connector;
use crate::transport::address::{Host, RabbitAddress};

/// How long an address of a host is tried alone. After that, the next one is tried at the same time (RFC 8305).
const HEAD_START: Duration = Duration::from_millis(250);
/// How many of the first bytes from the other side are kept.
const FIRST_WORDS: usize = 16;

/// A socket to a broker, with or without TLS, in the form that lapin needs. It reports its end only after everything
/// that has arrived was read.
#[derive(Debug)]
pub(super) struct Socket {
    stream: AsyncTcpStream<Compat<TcpStream>>,
    /// The same socket, for those who need it while lapin has the stream.
    handle: Arc<std::net::TcpStream>,
    /// `None` after the first bytes have arrived.
    first_words: Option<FirstWords>,
    /// The error that ended reading. It is reported after lapin has handled what it has read before.
    failed: Option<io::Error>,
    /// How far lapin has read.
    notes: watch::Sender<Notes>,
}

/// The first bytes from the other side. They show which protocol it speaks.
pub(super) type FirstWords = Arc<OnceLock<Vec<u8>>>;

/// How far lapin has read. When it asks to read more, it has handled what it has read before.
#[derive(Debug, Clone, Copy, Default)]
struct Notes {
    /// How many times it has handled something.
    count: u64,
    /// Whether it has read something that it has not handled.
    is_missing: bool,
}

/// Shuts the socket down when it is dropped, unless [`Cutter::spare`] was called. lapin would wait for ever on a socket
/// whose other side says nothing.
#[derive(Debug)]
pub(super) struct Cutter(Option<Weak<std::net::TcpStream>>);

impl Cutter {
    /// Leaves the socket open: the connection has been established.
    pub(super) fn spare(mut self) {
        self.0 = None;
    }
}

impl Drop for Cutter {
    fn drop(&mut self) {
        if let Some(socket) = self.0.as_ref().and_then(Weak::upgrade) {
            // An error means that the socket has ended already.
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}

/// Knows whether something has arrived at a socket that lapin has not handled.
#[derive(Debug, Clone)]
pub(super) struct Unread {
    socket: Weak<std::net::TcpStream>,
    notes: watch::Receiver<Notes>,
}

impl Unread {
    /// Waits until lapin has handled everything that has arrived by now, or has dropped the socket.
    pub(super) async fn is_noted(&mut self) {
        let before = self.notes.borrow_and_update().count;
        loop {
            let is_there = self.is_there();
            let Notes { count, is_missing } = *self.notes.borrow_and_update();
            let is_noted = count > before || !(is_there || is_missing);
            if is_noted || self.notes.changed().await.is_err() {
                return;
            }
        }
    }

    /// Whether there is something to read. The socket is non-blocking, so this returns at once.
    fn is_there(&self) -> bool {
        self.socket.upgrade().is_some_and(|socket| matches!(socket.peek(&mut [0]), Ok(1)))
    }
}

impl Socket {
    /// Connects to the first of the host's addresses that answers. `stage` tells how far it has come.
    ///
    /// # Errors
    /// A sentence that says why this fails, and what to look at.
    pub(super) async fn open(
        address: &RabbitAddress,
        tls: Option<&Connector>,
        stage: &mut ConnectStage,
    ) -> Result<(Self, Cutter), String> {
        *stage = ConnectStage::Resolving;
        let resolved =
            resolve(&address.host, address.port).await.map_err(|error| diagnosis::unresolved(address, &error))?;
        *stage = ConnectStage::Connecting;
        let connected = connect(&resolved).await.map_err(|error| diagnosis::unreachable(&error))?;
        let (stream, handle) = shared(connected).map_err(|error| error.to_string())?;
        let cutter = Cutter(Some(Arc::downgrade(&handle)));
        let stream = AsyncTcpStream::Plain(stream.compat());
        let stream = match tls {
            Some(tls) => {
                *stage = ConnectStage::Encrypting;
                let encrypted = tls.encrypt(stream, &address.host).await;
                encrypted.map_err(|error| diagnosis::unencrypted(&error))?
            }
            None => stream,
        };
        let (first_words, notes) = (Some(FirstWords::default()), watch::Sender::new(Notes::default()));
        Ok((Self { stream, handle, first_words, failed: None, notes }, cutter))
    }

    /// Where the first bytes from the other side will be.
    pub(super) fn first_words(&self) -> FirstWords {
        self.first_words.clone().unwrap_or_default()
    }

    /// Tells whether lapin has handled everything that has arrived.
    pub(super) fn unread(&self) -> Unread {
        Unread { socket: Arc::downgrade(&self.handle), notes: self.notes.subscribe() }
    }
}

/// The addresses of a host, in the order that the system prefers.
async fn resolve(host: &Host, port: u16) -> io::Result<Vec<SocketAddr>> {
    let name = match host {
        Host::Ip(ip) => return Ok(vec![SocketAddr::new(*ip, port)]),
        Host::Name(name) => name.clone(),
    };
    let (tell, told) = oneshot::channel();
    // It is a thread of its own and not one of tokio's: a runtime that ends waits for its threads, and a name server
    // may not answer.
    std::thread::Builder::new().name("hopline-resolve".to_owned()).spawn(move || {
        let resolved = (name.as_str(), port).to_socket_addrs().map(Iterator::collect);
        // An error means that nobody waits any more.
        let _ = tell.send(resolved);
    })?;
    let resolved: Vec<_> = told.await.map_err(io::Error::other)??;
    if resolved.is_empty() { Err(io::Error::other("it has no address")) } else { Ok(resolved) }
}

/// Connects to one of these addresses. Each is tried when the one before it has failed, or has not answered for
/// [`HEAD_START`].
///
/// # Errors
/// The first error, if all have failed.
async fn connect(addresses: &[SocketAddr]) -> io::Result<TcpStream> {
    let mut waiting = addresses.iter();
    let mut trying = FuturesUnordered::new();
    let mut first_error = None;
    loop {
        trying.extend(waiting.next().map(|address| connect_to(*address)));
        let has_more = waiting.len() > 0;
        tokio::select! {
            Some(tried) = trying.next() => match tried {
                Ok(stream) => return Ok(stream),
                Err(error) => _ = first_error.get_or_insert(error),
            },
            () = tokio::time::sleep(HEAD_START), if has_more => {}
            else => break,
        }
    }
    Err(first_error.unwrap_or_else(|| io::ErrorKind::AddrNotAvailable.into()))
}

/// Connects to one address.
async fn connect_to(address: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(address).await?;
    is_right(address, stream.local_addr()?, stream.peer_addr()?)?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Checks that the other side is the one that was asked for, since it will be told a password.
fn is_right(asked: SocketAddr, own: SocketAddr, peer: SocketAddr) -> io::Result<()> {
    // If nobody listens at a local port, the system may give the socket that same port, and connect it to itself.
    if own == peer {
        return Err(io::ErrorKind::ConnectionRefused.into());
    }
    if (peer.ip(), peer.port()) != (asked.ip(), asked.port()) {
        return Err(io::Error::other(format!("connected to {peer} in the place of {asked}")));
    }
    Ok(())
}

/// The same stream, and its socket for others.
fn shared(stream: TcpStream) -> io::Result<(TcpStream, Arc<std::net::TcpStream>)> {
    let stream = stream.into_std()?;
    let handle = Arc::new(stream.try_clone()?);
    Ok((TcpStream::from_std(stream)?, handle))
}

/// The result of writing, without the error that the other side is gone: reading reports that too, after everything
/// that has arrived. lapin reads nothing more once it knows of an error.
fn written<T>(written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset};
    match written {
        Poll::Ready(Err(error)) if matches!(error.kind(), BrokenPipe | ConnectionAborted | ConnectionReset) => {
            Poll::Pending
        }
        written => written,
    }
}

impl AsyncRead for Socket {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        self.notes.send_modify(|notes| {
            notes.count += u64::from(notes.is_missing);
            notes.is_missing = true;
        });
        if let Some(error) = self.failed.take() {
            return Poll::Ready(Err(error));
        }
        let read = Pin::new(&mut self.stream).poll_read(context, buffer);
        if let Poll::Ready(Ok(bytes @ 1..)) = read {
            if let Some(first_words) = self.first_words.take() {
                // This is the only place that sets it, and it does so once.
                let _ = first_words.set(buffer[..bytes.min(FIRST_WORDS)].to_vec());
            }
            return read;
        }
        self.notes.send_modify(|notes| notes.is_missing = false);
        let Poll::Ready(Err(error)) = read else { return read };
        // After an error lapin would throw away what it has read before. So this pretends that nothing is there, which
        // makes lapin handle that first.
        self.failed = Some(error);
        context.waker().wake_by_ref();
        Poll::Pending
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &[u8]) -> Poll<io::Result<usize>> {
        written(Pin::new(&mut self.stream).poll_write(context, buffer))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffers: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        written(Pin::new(&mut self.stream).poll_write_vectored(context, buffers))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        written(Pin::new(&mut self.stream).poll_flush(context))
    }

    fn poll_close(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_close(context)
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;
    use futures::io::{AsyncReadExt as _, AsyncWriteExt};
    use tokio::io::AsyncWriteExt as _;
    use tokio::net::{TcpListener, TcpSocket};

    use super::*;

    /// Where nobody listens; the port was free a moment ago.
    async fn closed() -> SocketAddr {
        open().await.1
    }

    async fn open() -> (TcpListener, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("there is a free port");
        let address = listener.local_addr().expect("it is bound");
        (listener, address)
    }

    #[tokio::test]
    async fn the_next_address_of_a_host_is_tried_when_one_refuses() {
        let (_listener, address) = open().await;
        let connected = connect(&[closed().await, closed().await, address]).await.expect("the last one is there");
        assert_eq!(connected.peer_addr().expect("it is connected"), address);
        let error = connect(&[closed().await, closed().await]).await.expect_err("nobody is there");
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    }

    #[tokio::test]
    async fn an_address_that_does_not_answer_keeps_nobody_from_the_next() {
        let hole = TcpSocket::new_v4().expect("there are sockets");
        hole.bind("127.0.0.1:0".parse().expect("an address")).expect("there is a free port");
        let hole = hole.listen(1).expect("it can listen");
        let deaf = hole.local_addr().expect("it is bound");
        // Nobody accepts these connections. With two of them its queue is full, and the system does not answer any
        // more.
        let _queued = [(); 2].map(|()| std::net::TcpStream::connect(deaf).expect("there is room in the queue"));
        let (_listener, address) = open().await;
        let connected = connect(&[deaf, address]).await.expect("the other one answers");
        assert_eq!(connected.peer_addr().expect("it is connected"), address);
    }

    #[tokio::test]
    async fn a_name_is_resolved_and_an_ip_address_is_as_it_is() {
        let localhost = resolve(&Host::Name("localhost".to_owned()), 1).await.expect("every machine has one");
        assert!(localhost.iter().all(|address| address.ip().is_loopback() && address.port() == 1), "{localhost:?}");
        let ip = "2001:db8::1".parse().expect("an address");
        assert_eq!(resolve(&Host::Ip(ip), 5672).await.expect("nobody is asked"), [SocketAddr::new(ip, 5672)]);
        resolve(&Host::Name("no.such.host.invalid".to_owned()), 1).await.expect_err("that name is nobody's");
    }

    #[test]
    fn only_who_was_asked_for_is_right() {
        let [asked, own, other] = ["[2001:db8::1]:5672", "[2001:db8::2]:40000", "127.0.0.1:5672"];
        let address = |text: &str| text.parse().expect("an address");
        let is_right = |peer| is_right(address(asked), address(own), address(peer)).map_err(|error| error.kind());
        assert_eq!(is_right(asked), Ok(()));
        assert_eq!(is_right(own), Err(io::ErrorKind::ConnectionRefused));
        assert_eq!(is_right(other), Err(io::ErrorKind::Other));
        assert_eq!(is_right("[2001:db8::1]:5671"), Err(io::ErrorKind::Other));
    }

    #[tokio::test]
    async fn a_socket_that_is_given_up_is_shut_down_and_one_that_is_spared_is_not() {
        let (mut socket, _peer) = opened().await;
        drop(Cutter(Some(Arc::downgrade(&socket.handle))));
        assert_eq!(socket.read(&mut [0]).await.expect("it has ended"), 0);
        let (mut socket, mut peer) = opened().await;
        Cutter(Some(Arc::downgrade(&socket.handle))).spare();
        peer.write_all(b"a").await.expect("it is open");
        assert_eq!(socket.read(&mut [0]).await.expect("it is open"), 1);
    }

    /// A socket, and the other side of it.
    async fn opened() -> (Socket, TcpStream) {
        let (listener, address) = open().await;
        let (stream, handle) = shared(connect(&[address]).await.expect("it is there")).expect("as any socket");
        let stream = AsyncTcpStream::Plain(stream.compat());
        let socket =
            Socket { stream, handle, first_words: None, failed: None, notes: watch::Sender::new(Notes::default()) };
        (socket, listener.accept().await.expect("somebody connected").0)
    }

    #[tokio::test]
    async fn what_has_arrived_is_read_though_writing_fails() {
        let (mut socket, mut peer) = opened().await;
        peer.write_all(b"last words").await.expect("it is open");
        peer.set_zero_linger().expect("it is a socket");
        drop(peer);
        assert!(AsyncWriteExt::write_all(&mut socket, b"to nobody").now_or_never().is_none(), "lapin would end here");
        assert_eq!(socket.read(&mut [0; 16]).await.expect("it has arrived"), 10);
        assert!(matches!(socket.read(&mut [0; 16]).await, Ok(0) | Err(_)));
    }

    #[tokio::test]
    async fn what_was_read_can_be_looked_into_before_a_failure_is_told() {
        let (mut socket, mut peer) = opened().await;
        peer.write_all(b"last words").await.expect("it is open");
        peer.set_zero_linger().expect("it is a socket");
        drop(peer);
        assert_eq!(socket.read(&mut [0; 16]).await.expect("it has arrived"), 10);
        let mut is_kept = false;
        let told = std::future::poll_fn(|context| {
            let told = Pin::new(&mut socket).poll_read(context, &mut [0; 16]);
            is_kept |= told.is_pending() && socket.failed.is_some();
            told
        });
        assert_eq!(told.await.expect_err("it was reset").kind(), io::ErrorKind::ConnectionReset);
        assert!(is_kept);
    }

    /// Waits until something has arrived at a socket.
    async fn arrived(socket: &Socket) {
        while !matches!(socket.handle.peek(&mut [0]), Ok(1)) {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn what_has_arrived_is_noted_once_it_has_been_read_and_more_is_wanted() {
        let (mut socket, mut peer) = opened().await;
        let mut unread = socket.unread();
        unread.is_noted().await;
        peer.write_all(b"news").await.expect("it is open");
        arrived(&socket).await;
        let mut noted = Box::pin(unread.is_noted());
        assert!(noted.as_mut().now_or_never().is_none());
        assert_eq!(socket.read(&mut [0; 16]).await.expect("it is open"), 4);
        assert!(noted.as_mut().now_or_never().is_none(), "whoever read it may not have seen to it");
        assert!(socket.read(&mut [0; 16]).now_or_never().is_none());
        noted.await;
    }

    #[tokio::test]
    async fn nobody_waits_for_a_socket_that_is_gone() {
        let (socket, mut peer) = opened().await;
        let mut unread = socket.unread();
        peer.write_all(b"late").await.expect("it is open");
        arrived(&socket).await;
        let mut noted = Box::pin(unread.is_noted());
        assert!(noted.as_mut().now_or_never().is_none());
        drop(socket);
        noted.await;
        unread.is_noted().await;
    }
}
