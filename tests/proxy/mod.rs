//! A TCP proxy in front of a broker, that does what networks do.

// Each program of tests needs a part of this.
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

/// The bytes of a TCP segment on an Ethernet. The systems on both sides are told so: with the loopback's own 64 KiB they take
/// megabytes from whoever sends before any of that has passed.
const SEGMENT: usize = 1448;
/// What the proxy's own sockets hold, so that what waits does so where a [`Link`] says.
const SOCKET_BUFFER: u32 = 32 * 1024;
/// How many connections may wait to be accepted.
const BACKLOG: u32 = 1024;
/// How long TCP waits at least until it sends a segment again that was lost.
const MIN_RETRANSMISSION: Duration = Duration::from_millis(200);

/// What happens to the bytes of one direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flow {
    Pass,
    /// They wait, and are handed on once they may pass.
    Stall,
    /// They are taken, and handed to nobody.
    Lose,
    /// They pass as over such a link.
    Link(Link),
}

/// A link as networks have them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Link {
    /// So many bytes pass in a second, of all connections together.
    pub(crate) rate: usize,
    /// How long a byte takes to arrive once it has left.
    pub(crate) delay: Duration,
    /// How many bytes wait to leave before no more are taken.
    pub(crate) queue: usize,
    /// One of so many segments is lost, and holds up its connection until it has been sent again.
    pub(crate) loss: Option<u64>,
}

impl Link {
    /// A link of this rate, which delays and loses nothing, behind a router with more memory than is good for it.
    pub(crate) const fn of(rate: usize) -> Self {
        Self { rate, delay: Duration::ZERO, queue: 2 * 1024 * 1024, loss: None }
    }

    /// How long so many bytes take to leave.
    fn time(&self, bytes: usize) -> Duration {
        Duration::from_secs_f64(bytes as f64 / self.rate as f64)
    }

    /// As many bytes as are taken at once: a segment, or less of it if that would not trickle.
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

    /// The same at an address of the caller's choice.
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

    /// The broker's URL, by way of this.
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

    /// Treats the bytes of one direction like this from now on.
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

    /// Connections stay open, new ones too, and nothing passes: neither bytes nor the end of either side.
    pub(crate) fn stall(&self) {
        self.set_both(Flow::Stall);
    }

    /// Each direction is such a link.
    pub(crate) fn link(&self, link: Link) {
        self.set_both(Flow::Link(link));
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

/// One direction, which all connections share.
#[derive(Debug)]
struct Wire {
    flow: watch::Sender<Flow>,
    use_of: Mutex<Use>,
}

/// What a [`Link`] has to do.
#[derive(Debug)]
struct Use {
    /// When all that was taken has left.
    free_at: Instant,
    /// How many segments were taken.
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

    /// Takes a segment of a connection that is `held_up` so long by an earlier one, and tells when it arrives.
    fn take(&self, link: Link, bytes: usize, held_up: &mut Instant) -> Instant {
        let mut use_of = self.use_of.lock().expect("no panic while holding it");
        use_of.free_at = use_of.free_at.max(Instant::now()) + link.time(bytes);
        use_of.segments += 1;
        let arrives_at = use_of.free_at + link.delay;
        if link.loss.is_some_and(|loss| use_of.segments.is_multiple_of(loss)) {
            // It takes up the link a second time.
            use_of.free_at += link.time(bytes);
            *held_up = (*held_up).max(arrives_at + MIN_RETRANSMISSION.max(2 * link.delay));
        }
        arrives_at.max(*held_up)
    }
}

/// Bytes that were taken and not yet handed on; none at the end of their connection.
struct Segment {
    bytes: Vec<u8>,
    arrives_at: Instant,
}

/// Listens, with buffers and segments as a [`Link`] wants them.
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

/// Closes a connection by RST.
fn reset(stream: TcpStream) {
    // Of one that has ended already there is nothing to reset.
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
    // A packet of the one side is a packet to the other.
    for stream in [&client, &broker] {
        stream.set_nodelay(true).expect("it is a socket");
    }
    let decided = {
        let (from_client, to_client) = client.split();
        let (from_broker, to_broker) = broker.split();
        let pumps = async {
            // One that fails ends the connection; of two that end well, each has told the other side.
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

/// Hands bytes on, and their end.
async fn pump(mut from: ReadHalf<'_>, mut to: WriteHalf<'_>, wire: &Wire) -> io::Result<()> {
    let mut flow = wire.flow.subscribe();
    let mut buffer = [0; 16 * 1024];
    let mut under_way = VecDeque::<Segment>::new();
    let (mut has_ended, mut held_up) = (false, Instant::now());
    loop {
        let now = *flow.borrow_and_update();
        // While nothing passes, one buffer is taken and waits here.
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

/// Waits until the first of what is under way may be handed on.
async fn arrival(flow: Flow, first: Option<&Segment>) {
    match (flow, first) {
        (_, None) | (Flow::Stall, _) => future::pending().await,
        (Flow::Pass | Flow::Lose, _) => {}
        (Flow::Link(_), Some(segment)) => sleep_until(segment.arrives_at).await,
    }
}

/// Reads what comes, once there is room for it.
async fn take(flow: Flow, wire: &Wire, from: &mut ReadHalf<'_>, buffer: &mut [u8]) -> io::Result<usize> {
    let Flow::Link(link) = flow else { return from.read(buffer).await };
    let queue = link.time(link.queue);
    while wire.free_at() > Instant::now() + queue {
        sleep_until(wire.free_at() - queue).await;
    }
    from.read(&mut buffer[..link.segment()]).await
}

/// Takes all that comes, until nothing comes any more.
async fn swallow(client: &mut TcpStream) {
    let mut buffer = [0; 4096];
    while client.read(&mut buffer).await.is_ok_and(|read| read > 0) {}
}
