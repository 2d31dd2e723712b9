//! A TCP proxy in front of a broker, that does what networks do.

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
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("there is a free port");
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

mod tests {
    use std::io::ErrorKind;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::{TcpListener, TcpStream};
    use tokio::sync::mpsc;

    use super::{Direction, Flow, Proxy};
    use crate::support::soon;

    /// A proxy to an echo, whose connections are announced: what arrives there, and `None` at their end.
    async fn echo() -> (Proxy, mpsc::UnboundedReceiver<Option<Vec<u8>>>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("there is a free port");
        let address = listener.local_addr().expect("it is bound");
        let (announce, announced) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let announce = announce.clone();
                tokio::spawn(async move {
                    let mut buffer = [0; 1024];
                    while let Ok(read @ 1..) = stream.read(&mut buffer).await {
                        // The test may have ended.
                        let _ = announce.send(Some(buffer[..read].to_vec()));
                        let _ = stream.write_all(&buffer[..read]).await;
                    }
                    let _ = announce.send(None);
                });
            }
        });
        (Proxy::to(address).await, announced)
    }

    async fn connected(proxy: &Proxy) -> TcpStream {
        let mut stream = TcpStream::connect(proxy.address()).await.expect("it listens");
        assert_eq!(said(&mut stream, b"hello").await, b"hello");
        stream
    }

    async fn said(stream: &mut TcpStream, bytes: &[u8]) -> Vec<u8> {
        stream.write_all(bytes).await.expect("it is open");
        heard(stream, bytes.len()).await
    }

    async fn heard(stream: &mut TcpStream, bytes: usize) -> Vec<u8> {
        let mut heard = vec![0; bytes];
        soon(stream.read_exact(&mut heard)).await.expect("it is open");
        heard
    }

    /// What is there to be read at once.
    fn lies_there(stream: &TcpStream) -> usize {
        match stream.try_read(&mut [0; 1024]) {
            Ok(read) => read,
            Err(error) if error.kind() == ErrorKind::WouldBlock => 0,
            Err(error) => panic!("{error}"),
        }
    }

    #[tokio::test]
    async fn what_stalls_waits_and_passes_later() {
        let (proxy, mut echo) = echo().await;
        let mut stream = connected(&proxy).await;
        assert_eq!(soon(echo.recv()).await, Some(Some(b"hello".to_vec())));
        proxy.set(Direction::ToClient, Flow::Stall);
        stream.write_all(b"question").await.expect("it is open");
        assert_eq!(soon(echo.recv()).await, Some(Some(b"question".to_vec())));
        assert_eq!(lies_there(&stream), 0);
        proxy.stall();
        let mut late = TcpStream::connect(proxy.address()).await.expect("it still accepts");
        late.write_all(b"late").await.expect("it is open");
        proxy.set(Direction::ToClient, Flow::Pass);
        assert_eq!(heard(&mut stream, 8).await, b"question");
        assert!(echo.is_empty(), "nothing reaches the other side");
        proxy.resume();
        assert_eq!(heard(&mut late, 4).await, b"late");
    }

    #[tokio::test]
    async fn what_is_lost_never_arrives() {
        let (proxy, mut echo) = echo().await;
        let mut stream = connected(&proxy).await;
        proxy.set(Direction::ToClient, Flow::Lose);
        stream.write_all(b"lost").await.expect("it is open");
        for expected in [b"hello".to_vec(), b"lost".to_vec()] {
            assert_eq!(soon(echo.recv()).await, Some(Some(expected)));
        }
        proxy.set(Direction::ToBroker, Flow::Lose);
        stream.write_all(b"never").await.expect("it is open");
        // The end does pass, and it comes after the bytes.
        drop(stream);
        assert_eq!(soon(echo.recv()).await, Some(None));
        proxy.resume();
        connected(&proxy).await;
    }

    #[tokio::test]
    async fn a_cut_connection_is_closed_for_both_sides_and_a_new_one_passes() {
        let (proxy, mut echo) = echo().await;
        let mut stream = connected(&proxy).await;
        proxy.cut().await;
        assert_eq!(soon(stream.read(&mut [0; 1])).await.expect("it is closed, not reset"), 0);
        assert_eq!(soon(echo.recv()).await, Some(Some(b"hello".to_vec())));
        assert_eq!(soon(echo.recv()).await, Some(None));
        connected(&proxy).await;
    }

    #[tokio::test]
    async fn a_stalled_connection_can_be_cut() {
        let (proxy, _echo) = echo().await;
        let mut stream = connected(&proxy).await;
        proxy.stall();
        stream.write_all(b"held").await.expect("it is open");
        soon(proxy.cut()).await;
        // Closed or reset: bytes that nobody read make it the latter.
        assert!(matches!(soon(stream.read(&mut [0; 1])).await, Ok(0) | Err(_)));
    }

    #[tokio::test]
    async fn a_reset_is_one_for_the_client() {
        let (proxy, mut echo) = echo().await;
        let mut stream = connected(&proxy).await;
        proxy.reset().await;
        let error = soon(stream.read(&mut [0; 1])).await.expect_err("it is reset");
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        assert_eq!(soon(echo.recv()).await, Some(Some(b"hello".to_vec())));
        assert_eq!(soon(echo.recv()).await, Some(None));
    }

    #[tokio::test]
    async fn the_client_of_a_half_open_connection_is_not_told() {
        let (proxy, mut echo) = echo().await;
        let mut stream = connected(&proxy).await;
        assert_eq!(soon(echo.recv()).await, Some(Some(b"hello".to_vec())));
        proxy.half_open();
        assert_eq!(soon(echo.recv()).await, Some(None));
        stream.write_all(b"anybody?").await.expect("for the client it is open");
        assert_eq!(lies_there(&stream), 0);
        connected(&proxy).await;
        proxy.cut().await;
        assert!(matches!(soon(stream.read(&mut [0; 1])).await, Ok(0) | Err(_)));
    }

    #[tokio::test]
    async fn slow_bytes_trickle() {
        let (proxy, _echo) = echo().await;
        let mut stream = connected(&proxy).await;
        proxy.slow(1);
        let line = [7; 300];
        stream.write_all(&line).await.expect("it is open");
        let mut heard = [0; 300];
        let first = soon(stream.read(&mut heard)).await.expect("it is open");
        assert!((1..300).contains(&first), "it would take five minutes");
        proxy.resume();
        soon(stream.read_exact(&mut heard[first..])).await.expect("it is open");
        assert_eq!(heard, line);
    }

    #[tokio::test]
    async fn refused_connections_leave_the_others_alone() {
        let (proxy, _echo) = echo().await;
        let mut stream = connected(&proxy).await;
        proxy.refuse();
        // The system completes a connection before it is refused.
        let refused = match TcpStream::connect(proxy.address()).await {
            Ok(mut refused) => soon(refused.read(&mut [0; 1])).await.expect_err("it is reset"),
            Err(error) => error,
        };
        assert!(matches!(refused.kind(), ErrorKind::ConnectionReset | ErrorKind::ConnectionRefused));
        assert_eq!(said(&mut stream, b"on").await, b"on");
        proxy.allow();
        connected(&proxy).await;
    }
}
