//! Sockets to a broker: its name is resolved and connected to here, and TLS put on, before lapin has anything to do.

use std::io::{self, IoSlice};
use std::net::{Shutdown, SocketAddr, ToSocketAddrs};
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::Duration;

use futures::StreamExt as _;
use futures::io::{AsyncRead, AsyncWrite};
use futures::stream::FuturesUnordered;
use lapin::tcp::AsyncTcpStream;
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio_util::compat::{Compat, TokioAsyncReadCompatExt as _};

use super::diagnosis::{self, Stage};
use crate::transport::address::{Host, RabbitAddress};

/// How long one of a host's addresses is alone in being tried: the next one is tried beside it then (RFC 8305).
const HEAD_START: Duration = Duration::from_millis(250);
/// How much of what the other side says first is kept.
const FIRST_WORDS: usize = 16;

/// A connection to a broker, by TLS or not, for lapin.
#[derive(Debug)]
pub(super) struct Socket {
    stream: AsyncTcpStream<Compat<TcpStream>>,
    /// Until something has been heard.
    first_words: Option<FirstWords>,
}

/// What the other side said first, which shows what it speaks.
pub(super) type FirstWords = Arc<OnceLock<Vec<u8>>>;

/// Shuts a socket down that lapin has, unless [`Cutter::spare`] does not let it: nothing else would make lapin give up one
/// on which nothing is said.
#[derive(Debug)]
pub(super) struct Cutter(Option<std::net::TcpStream>);

impl Cutter {
    pub(super) fn spare(mut self) {
        self.0 = None;
    }
}

impl Drop for Cutter {
    fn drop(&mut self) {
        if let Some(socket) = &self.0 {
            // One that has ended needs no end.
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}

impl Socket {
    /// Connects to the first that answers of the addresses that the host has. `stage` tells how far it has come.
    ///
    /// # Errors
    /// Why not, in a sentence.
    pub(super) async fn open(
        address: &RabbitAddress,
        #[cfg(feature = "tls")] tls: Option<&super::tls::Connector>,
        stage: &mut Stage,
    ) -> Result<(Self, Cutter), String> {
        *stage = Stage::Resolving;
        let resolved =
            resolve(&address.host, address.port).await.map_err(|error| diagnosis::unresolved(address, &error))?;
        *stage = Stage::Connecting;
        let connected = connect(&resolved).await.map_err(|error| diagnosis::unreachable(&error))?;
        let (stream, cutter) = cuttable(connected).map_err(|error| error.to_string())?;
        let stream = AsyncTcpStream::Plain(stream.compat());
        #[cfg(feature = "tls")]
        let stream = match tls {
            Some(tls) => {
                *stage = Stage::Encrypting;
                let encrypted = tls.encrypt(stream, &address.host).await;
                encrypted.map_err(|error| diagnosis::unencrypted(&error))?
            }
            None => stream,
        };
        Ok((Self { stream, first_words: Some(FirstWords::default()) }, cutter))
    }

    /// Where what the other side says first will be.
    pub(super) fn first_words(&self) -> FirstWords {
        self.first_words.clone().unwrap_or_default()
    }
}

/// The addresses of a host, in the order in which the system prefers them.
async fn resolve(host: &Host, port: u16) -> io::Result<Vec<SocketAddr>> {
    let name = match host {
        Host::Ip(ip) => return Ok(vec![SocketAddr::new(*ip, port)]),
        Host::Name(name) => name.clone(),
    };
    let (tell, told) = oneshot::channel();
    // A thread of its own, and not one of tokio's: a runtime that ends would wait for a name server that does not answer.
    std::thread::Builder::new().name("hopline-resolve".to_owned()).spawn(move || {
        let resolved = (name.as_str(), port).to_socket_addrs().map(Iterator::collect);
        // Whoever asked may have given up.
        let _ = tell.send(resolved);
    })?;
    let resolved: Vec<_> = told.await.map_err(io::Error::other)??;
    if resolved.is_empty() { Err(io::Error::other("it has no address")) } else { Ok(resolved) }
}

/// Connects to one of these, in their order: the next one has its turn when one has failed or does not answer soon.
///
/// # Errors
/// What the first of them said, when all have failed.
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

async fn connect_to(address: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(address).await?;
    let (own, peer) = (stream.local_addr()?, stream.peer_addr()?);
    // The system may connect a socket to itself where nobody listens, if it has given it that very port.
    if own == peer {
        return Err(io::ErrorKind::ConnectionRefused.into());
    }
    // A password is told to nobody else than who was asked for.
    if (peer.ip(), peer.port()) != (address.ip(), address.port()) {
        return Err(io::Error::other(format!("connected to {peer} in the place of {address}")));
    }
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// The same stream, and what can cut it off from elsewhere.
fn cuttable(stream: TcpStream) -> io::Result<(TcpStream, Cutter)> {
    let stream = stream.into_std()?;
    let cutter = Cutter(Some(stream.try_clone()?));
    Ok((TcpStream::from_std(stream)?, cutter))
}

impl AsyncRead for Socket {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        let read = Pin::new(&mut self.stream).poll_read(context, buffer);
        if let Poll::Ready(Ok(bytes)) = read
            && bytes > 0
            && let Some(first_words) = self.first_words.take()
        {
            // It is set here only, and once.
            let _ = first_words.set(buffer[..bytes.min(FIRST_WORDS)].to_vec());
        }
        read
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, buffer)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffers: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, buffers)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_close(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_close(context)
    }
}
