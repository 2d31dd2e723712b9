//! Opens sockets to a broker: looks up the host, connects, and negotiates TLS. Then they are read and written.
//!
//! lapin has no time-out for this, and would connect to the first address of a host only.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::net::{Shutdown, SocketAddr, ToSocketAddrs};
use std::time::Duration;

use bytes::{BufMut as _, BytesMut};
use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use socket2::SockRef;
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::oneshot;

use super::diagnosis::{self, ConnectStage};
use super::tls::{Connector, Encryption};
use crate::transport::address::{Host, RabbitAddress};

/// How long an address of a host is tried alone. After that, the next one is tried at the same time (RFC 8305).
const HEAD_START: Duration = Duration::from_millis(250);

/// Opens a socket to the first of the host's addresses that answers, and negotiates TLS if `tls` is given. `stage`
/// tells how far it has come.
///
/// # Errors
/// A sentence that says why this fails, and what to look at.
pub(super) async fn open(
    address: &RabbitAddress,
    tls: Option<&Connector>,
    stage: &mut ConnectStage,
) -> Result<(SocketReader, SocketWriter), String> {
    *stage = ConnectStage::Resolving;
    let resolved =
        resolve(&address.host, address.port).await.map_err(|error| diagnosis::unresolved(address, &error))?;
    *stage = ConnectStage::Connecting;
    let stream = connect(&resolved).await.map_err(|error| diagnosis::unreachable(&error))?;
    let encryption = match tls {
        Some(tls) => {
            *stage = ConnectStage::Encrypting;
            let encrypted = tls.encrypt(&stream, &address.host).await;
            Some(encrypted.map_err(|error| diagnosis::unencrypted(&error))?)
        }
        None => None,
    };
    Ok(halves(stream, encryption))
}

/// A socket as what reads it and what writes to it.
pub(super) fn halves(stream: TcpStream, encryption: Option<Encryption>) -> (SocketReader, SocketWriter) {
    let (reader, writer) = stream.into_split();
    let reader = SocketReader { socket: reader, encryption: encryption.clone(), encrypted: BytesMut::new() };
    (reader, SocketWriter { socket: writer, encryption })
}

/// Reads a socket.
#[derive(Debug)]
pub(super) struct SocketReader {
    socket: OwnedReadHalf,
    encryption: Option<Encryption>,
    /// What has arrived and is not decrypted.
    encrypted: BytesMut,
}

impl SocketReader {
    /// Whether it is read without decryption.
    pub(super) fn is_plain(&self) -> bool {
        self.encryption.is_none()
    }

    /// Waits until something has arrived on a plain socket, and puts up to `most` bytes of it behind what is in `into`.
    /// Returns how many; 0 when the other side has ended the connection. Nothing is lost if this is dropped.
    pub(super) async fn read_some(&mut self, into: &mut BytesMut, most: usize) -> io::Result<usize> {
        self.socket.read_buf(&mut into.limit(most)).await
    }

    /// Waits until something has arrived, and puts it behind what is in `into`. `false` when the other side has ended
    /// the connection. Nothing is lost if this is dropped.
    ///
    /// # Errors
    /// Those of the socket and of TLS.
    pub(super) async fn read(&mut self, into: &mut BytesMut, room: usize) -> io::Result<bool> {
        match &self.encryption {
            None => {
                into.reserve(room);
                Ok(self.socket.read_buf(into).await? > 0)
            }
            Some(encryption) => {
                self.encrypted.reserve(room);
                let is_open = self.socket.read_buf(&mut self.encrypted).await? > 0;
                encryption.decrypt(&mut self.encrypted, into, self.socket.as_ref())?;
                Ok(is_open)
            }
        }
    }
}

/// Writes to a socket.
#[derive(Debug)]
pub(super) struct SocketWriter {
    socket: OwnedWriteHalf,
    encryption: Option<Encryption>,
}

impl SocketWriter {
    /// Writes as much as the socket takes without waiting, and returns how many bytes. With TLS, some of them may have
    /// to wait behind: see [`is_behind`](Self::is_behind).
    ///
    /// # Errors
    /// `WouldBlock` if it takes nothing now, and those of the socket.
    pub(super) fn write(&self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        match &self.encryption {
            None => self.socket.try_write_vectored(parts),
            Some(encryption) => encryption.write(parts, self.socket.as_ref()),
        }
    }

    /// Whether something has been encrypted that the socket has not taken.
    pub(super) fn is_behind(&self) -> bool {
        self.encryption.as_ref().is_some_and(Encryption::is_behind)
    }

    /// Waits until the socket may take something.
    pub(super) async fn writable(&self) -> io::Result<()> {
        self.socket.writable().await
    }

    /// Whether something has arrived that was not read. This returns at once.
    pub(super) fn has_unread(&self) -> bool {
        matches!(SockRef::from(self.socket.as_ref()).peek(&mut [MaybeUninit::uninit()]), Ok(1))
    }

    /// Ends the connection in both directions. Whoever reads sees the end.
    pub(super) fn shut_down(&self) {
        // An error means that the connection has ended already.
        let _ = SockRef::from(self.socket.as_ref()).shutdown(Shutdown::Both);
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

#[cfg(test)]
mod tests {
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
}
