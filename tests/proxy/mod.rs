//! A TCP proxy in front of a broker. It can do what networks do: stall, lose, delay, slow down and cut connections.

// Each test program uses only a part of this module.
#![allow(dead_code)]

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use std::{future, io};

use socket2::SockRef;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};

/// The bytes in a TCP segment on an Ethernet. The sockets are told to use it: with the loopback's 64 KiB, the systems
/// on both sides would buffer megabytes before anything has passed.
const SEGMENT: usize = 1448;
/// The size of the proxy's own socket buffers, in bytes. They are small, so that bytes wait where a [`Link`] says.
const SOCKET_BUFFER: u32 = 32 * 1024;
/// How many connections may wait to be accepted.
const BACKLOG: u32 = 1024;
/// How long TCP waits at least until it repeats a segment that was lost.
const MIN_RETRANSMISSION: Duration = Duration::from_millis(200);

/// What happens to the bytes of one direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flow {
    Pass,
    /// They wait until they may pass.
    Stall,
    /// They are read and thrown away.
    Lose,
    /// They pass as over this link.
    Link(Link),
}

/// A network link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Link {
    /// How many bytes pass in a second, of all connections together.
    pub(crate) rate: usize,
    /// How long a byte takes from one end to the other.
    pub(crate) delay: Duration,
    /// How many bytes wait in front of the link before it accepts no more.
    pub(crate) queue: usize,
    /// One segment in this many is lost. It holds up its connection until it was repeated.
    pub(crate) loss: Option<u64>,
}

impl Link {
    /// A link with this rate, without delay and loss. The router in front of it has a large queue (2 MiB), as many do.
    pub(crate) const fn of(rate: usize) -> Self {
        Self { rate, delay: Duration::ZERO, queue: 2 * 1024 * 1024, loss: None }
    }

    /// How long this many bytes take to be sent.
    fn time(&self, bytes: usize) -> Duration {
        Duration::from_secs_f64(bytes as f64 / self.rate as f64)
    }

    /// How many bytes are read at once: a segment, or less on a slow link, so that bytes trickle.
    fn segment(&self) -> usize {
        (self.rate / 20).clamp(1, SEGMENT)
    }
}

/// The two directions of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    ToBroker,
    ToClient,
}

/// The state of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Open,
    /// It was closed towards the broker. Towards the client it stays open; what arrives is thrown away, and nothing is
    /// answered.
    HalfOpen,
    Closed,
    /// It was closed with RST in both directions.
    Reset,
}

/// A proxy at an address of its own. All its connections are closed when it is dropped.
#[derive(Debug)]
pub(crate) struct Proxy {
    address: SocketAddr,
    to_broker: Arc<Wire>,
    to_client: Arc<Wire>,
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

    /// A proxy at an address of the caller's choice.
    pub(crate) async fn at(address: &str, broker: SocketAddr) -> Self {
        let listener = listen(address.parse().expect("an address"));
        let address = listener.local_addr().expect("it is bound");
        let [to_broker, to_client] = [(); 2].map(|()| Arc::new(Wire::default()));
        let accepts = watch::channel(true).0;
        let connections = Arc::new(Mutex::new(Vec::<Connection>::new()));
        let accept = {
            let wires = [&to_broker, &to_client].map(Arc::clone);
            let (accepts, connections) = (accepts.subscribe(), connections.clone());
            async move {
                loop {
                    let (client, _) = listener.accept().await.expect("the process may open as many");
                    if !*accepts.borrow() {
                        reset(client);
                        continue;
                    }
                    let (fate, told) = watch::channel(Fate::Open);
                    let task = tokio::spawn(serve(client, broker, wires.clone(), told));
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

    /// The broker's URL through this proxy.
    pub(crate) fn url(&self) -> String {
        format!("amqp://guest:guest@{}", self.address)
    }

    /// How many connections are open.
    pub(crate) fn open(&self) -> usize {
        let connections = self.connections.lock().expect("no panic while holding it");
        connections.iter().filter(|connection| !connection.task.is_finished()).count()
    }

    fn wire(&self, direction: Direction) -> &Wire {
        match direction {
            Direction::ToBroker => &self.to_broker,
            Direction::ToClient => &self.to_client,
        }
    }

    /// Sets what happens to the bytes of one direction from now on.
    pub(crate) fn set(&self, direction: Direction, flow: Flow) {
        self.wire(direction).treat(flow);
    }

    /// How many bytes wait in the queue of a [`Link`].
    pub(crate) fn waiting(&self, direction: Direction) -> usize {
        self.wire(direction).waiting()
    }

    fn set_both(&self, flow: Flow) {
        self.set(Direction::ToBroker, flow);
        self.set(Direction::ToClient, flow);
    }

    /// Lets nothing pass, neither bytes nor the end of a connection. Connections stay open, and new ones are accepted.
    pub(crate) fn stall(&self) {
        self.set_both(Flow::Stall);
    }

    /// Makes a link of each direction.
    pub(crate) fn link(&self, link: Link) {
        self.set_both(Flow::Link(link));
    }

    /// Lets everything pass, with what has waited.
    pub(crate) fn resume(&self) {
        self.set_both(Flow::Pass);
    }

    /// Resets new connections at once, as if nobody listened. Those that exist stay.
    pub(crate) fn refuse(&self) {
        self.accepts.send_replace(false);
    }

    /// Accepts new connections again.
    pub(crate) fn allow(&self) {
        self.accepts.send_replace(true);
    }

    /// Closes all existing connections, and returns when they are closed.
    pub(crate) async fn cut(&self) {
        self.end(Fate::Closed).await;
    }

    /// Closes all existing connections with RST.
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

    /// Closes all existing connections towards the broker. The clients are not told.
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

/// One direction. All connections share it.
#[derive(Debug)]
struct Wire {
    flow: watch::Sender<Flow>,
    use_of: Mutex<Use>,
}

/// How busy a [`Link`] is.
#[derive(Debug)]
struct Use {
    /// When everything that it has accepted is sent.
    free_at: Instant,
    /// How many segments it has accepted.
    segments: u64,
}

impl Default for Wire {
    fn default() -> Self {
        let idle = Use { free_at: Instant::now(), segments: 0 };
        Self { flow: watch::channel(Flow::Pass).0, use_of: Mutex::new(idle) }
    }
}

impl Wire {
    fn treat(&self, flow: Flow) {
        self.use_of.lock().expect("no panic while holding it").free_at = Instant::now();
        self.flow.send_replace(flow);
    }

    fn free_at(&self) -> Instant {
        self.use_of.lock().expect("no panic while holding it").free_at
    }

    fn waiting(&self) -> usize {
        let Flow::Link(link) = *self.flow.borrow() else { return 0 };
        (self.free_at().saturating_duration_since(Instant::now()).as_secs_f64() * link.rate as f64) as usize
    }

    /// Accepts a segment, and returns when it arrives. `held_up` is until when an earlier segment holds up its
    /// connection.
    fn take(&self, link: Link, bytes: usize, held_up: &mut Instant) -> Instant {
        let mut use_of = self.use_of.lock().expect("no panic while holding it");
        use_of.free_at = use_of.free_at.max(Instant::now()) + link.time(bytes);
        use_of.segments += 1;
        let arrives_at = use_of.free_at + link.delay;
        if link.loss.is_some_and(|loss| use_of.segments.is_multiple_of(loss)) {
            // The segment was lost, so it is sent a second time.
            use_of.free_at += link.time(bytes);
            *held_up = (*held_up).max(arrives_at + MIN_RETRANSMISSION.max(2 * link.delay));
        }
        arrives_at.max(*held_up)
    }
}

/// Bytes that were read and not yet passed on. No bytes mean the end of the connection.
struct Segment {
    bytes: Vec<u8>,
    arrives_at: Instant,
}

/// Listens, with socket buffers and segments of the sizes that a [`Link`] needs.
fn listen(address: SocketAddr) -> TcpListener {
    let socket = socket(address);
    socket.set_reuseaddr(true).expect("it is a socket");
    socket.bind(address).expect("there is a free port");
    socket.listen(BACKLOG).expect("it is bound")
}

fn socket(address: SocketAddr) -> TcpSocket {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() };
    let socket = socket.expect("there is room for one");
    socket.set_recv_buffer_size(SOCKET_BUFFER).expect("it is a socket");
    socket.set_send_buffer_size(SOCKET_BUFFER).expect("it is a socket");
    SockRef::from(&socket).set_tcp_mss(SEGMENT as u32).expect("it is a socket of TCP");
    socket
}

/// Closes a connection with RST.
fn reset(stream: TcpStream) {
    // This fails if the connection has ended already, which is fine.
    let _ = stream.set_zero_linger();
}

/// Serves a connection until its end.
async fn serve(
    mut client: TcpStream,
    broker: SocketAddr,
    [wire_to_broker, wire_to_client]: [Arc<Wire>; 2],
    mut fate: watch::Receiver<Fate>,
) {
    let connected = tokio::select! {
        connected = socket(broker).connect(broker) => connected,
        _ = fate.wait_for(|fate| *fate != Fate::Open) => return reset(client),
    };
    let Ok(mut broker) = connected else { return reset(client) };
    // What one side sends as one packet is passed on as one packet.
    for stream in [&client, &broker] {
        stream.set_nodelay(true).expect("it is a socket");
    }
    let decided = {
        let (from_client, to_client) = client.split();
        let (from_broker, to_broker) = broker.split();
        let pumps = async {
            // If one direction fails, the connection ends. If both end well, each has told the other side.
            tokio::try_join!(
                pump(from_client, to_broker, &wire_to_broker),
                pump(from_broker, to_client, &wire_to_client)
            )
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

/// Passes bytes on, and the end of the connection.
async fn pump(mut from: ReadHalf<'_>, mut to: WriteHalf<'_>, wire: &Wire) -> io::Result<()> {
    let mut flow = wire.flow.subscribe();
    let mut buffer = [0; 16 * 1024];
    let mut under_way = VecDeque::<Segment>::new();
    let (mut has_ended, mut held_up) = (false, Instant::now());
    loop {
        let now = *flow.borrow_and_update();
        // While nothing passes, one buffer is read and waits here.
        let has_room = now != Flow::Stall || under_way.is_empty();
        tokio::select! {
            biased;
            Ok(()) = flow.changed() => {}
            () = arrival(now, under_way.front()) => {
                let bytes = under_way.pop_front().map(|segment| segment.bytes).unwrap_or_default();
                if bytes.is_empty() {
                    return to.shutdown().await;
                }
                if now != Flow::Lose {
                    to.write_all(&bytes).await?;
                }
            }
            read = take(now, wire, &mut from, &mut buffer), if has_room && !has_ended => {
                let read = read?;
                has_ended = read == 0;
                let arrives_at = match now {
                    Flow::Link(link) => wire.take(link, read, &mut held_up),
                    _ => Instant::now(),
                };
                under_way.push_back(Segment { bytes: buffer[..read].to_vec(), arrives_at });
            }
        }
    }
}

/// Waits until the first segment may be passed on.
async fn arrival(flow: Flow, first: Option<&Segment>) {
    match (flow, first) {
        (_, None) | (Flow::Stall, _) => future::pending().await,
        (Flow::Pass | Flow::Lose, _) => {}
        (Flow::Link(_), Some(segment)) => sleep_until(segment.arrives_at).await,
    }
}

/// Reads bytes, once there is room for them.
async fn take(flow: Flow, wire: &Wire, from: &mut ReadHalf<'_>, buffer: &mut [u8]) -> io::Result<usize> {
    let Flow::Link(link) = flow else { return from.read(buffer).await };
    let queue = link.time(link.queue);
    while wire.free_at() > Instant::now() + queue {
        sleep_until(wire.free_at() - queue).await;
    }
    from.read(&mut buffer[..link.segment()]).await
}

/// Reads and throws away everything until the connection ends.
async fn swallow(client: &mut TcpStream) {
    let mut buffer = [0; 4096];
    while client.read(&mut buffer).await.is_ok_and(|read| read > 0) {}
}
