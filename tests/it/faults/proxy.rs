//! The proxy does what the names of its functions say.

use std::io::ErrorKind;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;

use crate::node::when;
use crate::proxy::{Direction, Flow, Link, Proxy};
use crate::support::soon;

/// A proxy to a server that sends everything back. It announces what arrives at the server, and `None` when a
/// connection ends.
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

/// How many bytes can be read at once.
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
    // The end of the connection passes too, after the bytes.
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
    // It may be closed or reset: unread bytes cause a reset.
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
    proxy.link(Link::of(1));
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
async fn connections_share_the_rate_of_a_link_and_each_byte_has_its_delay() {
    let (proxy, _echo) = echo().await;
    let mut streams = [connected(&proxy).await, connected(&proxy).await];
    let delay = Duration::from_millis(50);
    proxy.link(Link { delay, ..Link::of(100_000) });
    let began = Instant::now();
    let line = vec![7; 10_000];
    let said = futures::future::join_all(streams.iter_mut().map(|stream| said(stream, &line))).await;
    // How much longer it takes depends on the machine.
    assert!(began.elapsed() >= Duration::from_millis(200) + 2 * delay, "{:?}", began.elapsed());
    assert!(said.iter().all(|said| *said == line));
}

#[tokio::test]
async fn a_link_takes_what_its_queue_holds_and_no_more() {
    let (proxy, _echo) = echo().await;
    let mut stream = connected(&proxy).await;
    let queue = 300_000;
    proxy.link(Link { queue, ..Link::of(1000) });
    let waiting = || proxy.waiting(Direction::ToBroker);
    // The rest fills the socket buffers on both sides.
    let more = vec![7; 10 * queue];
    tokio::select! {
        written = stream.write_all(&more) => panic!("it takes minutes: {written:?}"),
        _ = when(async || waiting(), |waiting| *waiting >= queue) => {}
    }
    assert!(waiting() <= queue + 1000, "{} wait", waiting());
    proxy.resume();
    assert_eq!(waiting(), 0);
    connected(&proxy).await;
}

#[tokio::test]
async fn a_segment_that_is_lost_comes_later_and_what_follows_it_as_well() {
    let (proxy, _echo) = echo().await;
    let mut stream = connected(&proxy).await;
    proxy.set(Direction::ToBroker, Flow::Link(Link { loss: Some(2), ..Link::of(1_000_000) }));
    let began = Instant::now();
    assert_eq!(said(&mut stream, b"first").await, b"first");
    assert_eq!(said(&mut stream, b"second").await, b"second");
    assert!(began.elapsed() >= Duration::from_millis(200), "{:?}", began.elapsed());
    let line: Vec<u8> = (0..20_000_u32).map(|number| number.to_be_bytes()[3]).collect();
    assert_eq!(said(&mut stream, &line).await, line);
}

#[tokio::test]
async fn refused_connections_leave_the_others_alone() {
    let (proxy, _echo) = echo().await;
    let mut stream = connected(&proxy).await;
    proxy.refuse();
    // The system completes the handshake before the proxy refuses the connection.
    let refused = match TcpStream::connect(proxy.address()).await {
        Ok(mut refused) => soon(refused.read(&mut [0; 1])).await.expect_err("it is reset"),
        Err(error) => error,
    };
    assert!(matches!(refused.kind(), ErrorKind::ConnectionReset | ErrorKind::ConnectionRefused));
    assert_eq!(said(&mut stream, b"on").await, b"on");
    proxy.allow();
    connected(&proxy).await;
}
