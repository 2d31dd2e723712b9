//! A TCP proxy in front of a broker, that does what networks do.

// Each program of tests needs a part of this.
#![allow(dead_code)]

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use std::{future, io};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// What happens to the bytes of one direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flow {
    Pass,
    /// They wait, and are handed on once they may pass.
    Stall,
    /// They are taken, and handed to nobody.
    Lose,
    /// As many pass in a second.
    Slow(usize),
}

/// The two directions of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    ToBroker,
    ToClient,
}

/// What becomes of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Open,
    /// Closed towards the broker; towards the client it stays open, takes all and answers nothing.
    HalfOpen,
    Closed,
    /// Closed by RST, in both directions.
    Reset,
}

/// A proxy at an address of its own. All its connections end when it is dropped.
#[derive(Debug)]
pub(crate) struct Proxy {
    address: SocketAddr,
    to_broker: watch::Sender<Flow>,
    to_client: watch::Sender<Flow>,
    accepts: watch::Sender<bool>,
    connections: Arc<Mutex<Vec<Connection>>>,
    accepting: JoinHandle<()>,
}

#[derive(Debug)]
struct Connection {
    fate: watch::Sender<Fate>,
    task: JoinHandle<()>,
}

impl Proxy {
    /// A proxy that passes everything on to a broker.
    pub(crate) async fn to(broker: SocketAddr) -> Self {
        Self::at("127.0.0.1:0", broker).await
    }

    /// The same at an address of the caller's choice.
    pub(crate) async fn at(address: &str, broker: SocketAddr) -> Self {
        let listener = TcpListener::bind(address).await.expect("there is a free port");
        let address = listener.local_addr().expect("it is bound");
        let [to_broker, to_client] = [(); 2].map(|()| watch::channel(Flow::Pass).0);
        let accepts = watch::channel(true).0;
        let connections = Arc::new(Mutex::new(Vec::<Connection>::new()));
        let accept = {
            let [to_broker, to_client] = [&to_broker, &to_client].map(watch::Sender::subscribe);
            let (accepts, connections) = (accepts.subscribe(), connections.clone());
            async move {
                loop {
                    let (client, _) = listener.accept().await.expect("the process may open as many");
                    if !*accepts.borrow() {
                        reset(client);
                        continue;
                    }
                    let (fate, told) = watch::channel(Fate::Open);
                    let flows = [to_broker.clone(), to_client.clone()];
                    let task = tokio::spawn(serve(client, broker, flows, told));
                    let mut connections = connections.lock().expect("no panic while holding it");
                    connections.retain(|connection| !connection.task.is_finished());
                    connections.push(Connection { fate, task });
                }
            }
        };
        Self { address, to_broker, to_client, accepts, connections, accepting: tokio::spawn(accept) }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// The broker's URL, by way of this.
    pub(crate) fn url(&self) -> String {
        format!("amqp://guest:guest@{}", self.address)
    }

    /// How many connections are open.
    pub(crate) fn open(&self) -> usize {
        let connections = self.connections.lock().expect("no panic while holding it");
        connections.iter().filter(|connection| !connection.task.is_finished()).count()
    }

    /// Treats the bytes of one direction like this from now on.
    pub(crate) fn set(&self, direction: Direction, flow: Flow) {
        let sender = match direction {
            Direction::ToBroker => &self.to_broker,
            Direction::ToClient => &self.to_client,
        };
        sender.send_replace(flow);
    }

    fn set_both(&self, flow: Flow) {
        self.set(Direction::ToBroker, flow);
        self.set(Direction::ToClient, flow);
    }

    /// Connections stay open, new ones too, and nothing passes: neither bytes nor the end of either side.
    pub(crate) fn stall(&self) {
        self.set_both(Flow::Stall);
    }

    /// As many bytes a second pass in each direction.
    pub(crate) fn slow(&self, bytes_per_second: usize) {
        self.set_both(Flow::Slow(bytes_per_second));
    }

    /// What waited passes, and everything from now on.
    pub(crate) fn resume(&self) {
        self.set_both(Flow::Pass);
    }

    /// New connections are reset at once, as those to a port where nobody listens; those that are there stay.
    pub(crate) fn refuse(&self) {
        self.accepts.send_replace(false);
    }

    /// New connections are accepted again.
    pub(crate) fn allow(&self) {
        self.accepts.send_replace(true);
    }

    /// Closes all connections that are there; they are closed when this returns.
    pub(crate) async fn cut(&self) {
        self.end(Fate::Closed).await;
    }

    /// As [`cut`](Self::cut), by RST.
    pub(crate) async fn reset(&self) {
        self.end(Fate::Reset).await;
    }

    async fn end(&self, fate: Fate) {
        let connections = std::mem::take(&mut *self.connections.lock().expect("no panic while holding it"));
        for connection in connections {
            connection.fate.send_replace(fate);
            connection.task.await.expect("no panic");
        }
    }

    /// Closes all connections that are there towards the broker only: the clients are not told.
    pub(crate) fn half_open(&self) {
        for connection in self.connections.lock().expect("no panic while holding it").iter() {
            connection.fate.send_replace(Fate::HalfOpen);
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accepting.abort();
        for connection in self.connections.lock().expect("no panic while holding it").iter() {
            connection.task.abort();
        }
    }
}

/// Closes a connection by RST.
fn reset(stream: TcpStream) {
    // Of one that has ended already there is nothing to reset.
    let _ = stream.set_zero_linger();
}

/// Serves a connection until its end.
async fn serve(
    mut client: TcpStream,
    broker: SocketAddr,
    flows: [watch::Receiver<Flow>; 2],
    mut fate: watch::Receiver<Fate>,
) {
    let connected = tokio::select! {
        connected = TcpStream::connect(broker) => connected,
        _ = fate.wait_for(|fate| *fate != Fate::Open) => return reset(client),
    };
    let Ok(mut broker) = connected else { return reset(client) };
    // A packet of the one side is a packet to the other.
    for stream in [&client, &broker] {
        stream.set_nodelay(true).expect("it is a socket");
    }
    let decided = {
        let (from_client, to_client) = client.split();
        let (from_broker, to_broker) = broker.split();
        let [flow_to_broker, flow_to_client] = flows;
        let pumps = async {
            // One that fails ends the connection; of two that end well, each has told the other side.
            tokio::try_join!(pump(from_client, to_broker, flow_to_broker), pump(from_broker, to_client, flow_to_client),)
        };
        tokio::select! {
            biased;
            decided = fate.wait_for(|fate| *fate != Fate::Open) => decided.map_or(Fate::Closed, |fate| *fate),
            _ = pumps => Fate::Closed,
        }
    };
    match decided {
        Fate::Open | Fate::Closed => {}
        Fate::Reset => {
            reset(client);
            reset(broker);
        }
        Fate::HalfOpen => {
            drop(broker);
            let ended =
                async { fate.wait_for(|fate| matches!(fate, Fate::Closed | Fate::Reset)).await.map(|fate| *fate) };
            let decided = tokio::select! {
                () = swallow(&mut client) => return,
                decided = ended => decided,
            };
            if matches!(decided, Ok(Fate::Reset)) {
                reset(client);
            }
        }
    }
}

/// Hands bytes on, and their end.
async fn pump(mut from: ReadHalf<'_>, mut to: WriteHalf<'_>, mut flow: watch::Receiver<Flow>) -> io::Result<()> {
    let mut buffer = [0; 16 * 1024];
    loop {
        let size = match *flow.borrow_and_update() {
            // A twentieth of a second's bytes at a time, so that they trickle.
            Flow::Slow(rate) => (rate / 20).clamp(1, buffer.len()),
            _ => buffer.len(),
        };
        let read = tokio::select! {
            biased;
            // Without a proxy nobody changes anything any more.
            Ok(()) = flow.changed() => continue,
            read = from.read(&mut buffer[..size]) => read?,
        };
        // Bytes that are read while they may not pass wait here.
        let Ok(now) = flow.wait_for(|flow| *flow != Flow::Stall).await.map(|flow| *flow) else {
            future::pending().await
        };
        if read == 0 {
            return to.shutdown().await;
        }
        if now != Flow::Lose {
            to.write_all(&buffer[..read]).await?;
        }
        if let Flow::Slow(rate) = now {
            // The time is the rate itself.
            let pause = tokio::time::sleep(Duration::from_secs_f64(read as f64 / rate as f64));
            tokio::select! {
                () = pause => {}
                _ = flow.wait_for(|flow| *flow != now) => {}
            }
        }
    }
}

/// Takes all that comes, until nothing comes any more.
async fn swallow(client: &mut TcpStream) {
    let mut buffer = [0; 4096];
    while client.read(&mut buffer).await.is_ok_and(|read| read > 0) {}
}
