//! A TCP proxy between one process and the broker, that does what networks do.

use std::io;
use std::net::SocketAddr;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// How connections end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    Closed,
    Reset,
}

/// A proxy at an address of its own.
#[derive(Debug)]
pub(crate) struct Proxy {
    address: SocketAddr,
    /// Whether bytes pass.
    passes: watch::Sender<bool>,
    end: watch::Sender<End>,
}

impl Proxy {
    pub(crate) async fn to(broker: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("there is a free port");
        let address = listener.local_addr().expect("it is bound");
        let (passes, end) = (watch::channel(true).0, watch::channel(End::Closed).0);
        let proxy = Self { address, passes: passes.clone(), end: end.clone() };
        tokio::spawn(async move {
            loop {
                let (client, _) = listener.accept().await.expect("the process may open as many");
                tokio::spawn(serve(client, broker, passes.subscribe(), end.subscribe()));
            }
        });
        proxy
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Ends all connections that are there.
    pub(crate) fn end(&self, how: End) {
        self.end.send_replace(how);
    }

    /// Connections stay open, new ones too, and nothing passes.
    pub(crate) fn stall(&self) {
        self.passes.send_replace(false);
    }

    /// What waited passes, and everything from now on.
    pub(crate) fn resume(&self) {
        self.passes.send_replace(true);
    }
}

async fn serve(
    mut client: TcpStream,
    broker: SocketAddr,
    passes: watch::Receiver<bool>,
    mut end: watch::Receiver<End>,
) {
    let Ok(mut broker) = TcpStream::connect(broker).await else { return reset(client) };
    for stream in [&client, &broker] {
        stream.set_nodelay(true).expect("it is a socket");
    }
    let how = {
        let (from_client, to_client) = client.split();
        let (from_broker, to_broker) = broker.split();
        let pumps = async {
            tokio::try_join!(pump(from_client, to_broker, passes.clone()), pump(from_broker, to_client, passes))
        };
        tokio::select! {
            told = end.changed() => told.map_or(End::Closed, |()| *end.borrow()),
            _ = pumps => End::Closed,
        }
    };
    if how == End::Reset {
        reset(client);
        reset(broker);
    }
}

/// Hands bytes on, and their end.
async fn pump(mut from: ReadHalf<'_>, mut to: WriteHalf<'_>, mut passes: watch::Receiver<bool>) -> io::Result<()> {
    let mut buffer = vec![0; 16 * 1024];
    loop {
        let read = from.read(&mut buffer).await?;
        if passes.wait_for(|passes| *passes).await.is_err() || read == 0 {
            return to.shutdown().await;
        }
        to.write_all(&buffer[..read]).await?;
    }
}

fn reset(stream: TcpStream) {
    // Of one that has ended already there is nothing to reset.
    let _ = stream.set_zero_linger();
}
