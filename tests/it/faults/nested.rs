//! A message whose headers are arrays in arrays. Whoever reads it by recursion overflows its stack, and its process
//! ends. The broker then delivers the message to the next one.

use hopline::DeadLetters;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::node::shared;
use crate::support::{Calculator, MathClient, MathServer, soon};

/// How many arrays are in each other, at most: RabbitMQ allows no more in its frames of 128 KiB.
const DEEPEST: usize = 26_000;

/// A client that speaks AMQP by hand. Libraries would write such headers by recursion.
struct Hand(TcpStream);

impl Hand {
    async fn connect(address: std::net::SocketAddr) -> Self {
        let mut socket = TcpStream::connect(address).await.expect("the node is there");
        socket.write_all(b"AMQP\0\0\x09\x01").await.expect("it is open");
        let mut hand = Self(socket);
        hand.hears((10, 10)).await;
        hand.says(0, (10, 11), b"\0\0\0\0\x05PLAIN\0\0\0\x0c\0guest\0guest\x05en_US").await;
        hand.hears((10, 30)).await;
        hand.says(0, (10, 31), &[7, 0xff, 0, 2, 0, 0, 0, 0]).await;
        hand.says(0, (10, 40), b"\x01/\0\0").await;
        hand.hears((10, 41)).await;
        hand.says(1, (20, 10), b"\0").await;
        hand.hears((20, 11)).await;
        hand.says(1, (85, 10), b"\0").await;
        hand.hears((85, 11)).await;
        hand
    }

    async fn frame(&mut self, kind: u8, channel: u16, payload: &[u8]) {
        let length = u32::try_from(payload.len()).expect("it is short enough");
        let frame = [&[kind][..], &channel.to_be_bytes(), &length.to_be_bytes(), payload, &[0xce]].concat();
        self.0.write_all(&frame).await.expect("it is open");
    }

    async fn says(&mut self, channel: u16, (class, method): (u16, u16), arguments: &[u8]) {
        self.frame(1, channel, &[&class.to_be_bytes()[..], &method.to_be_bytes(), arguments].concat()).await;
    }

    /// Waits for a method. Any other is a surprise.
    async fn hears(&mut self, method: (u16, u16)) {
        let mut head = [0; 7];
        soon(self.0.read_exact(&mut head)).await.expect("it is open");
        let length = u32::from_be_bytes([head[3], head[4], head[5], head[6]]) as usize;
        let mut rest = vec![0; length + 1];
        soon(self.0.read_exact(&mut rest)).await.expect("it is open");
        let heard = (u16::from_be_bytes([rest[0], rest[1]]), u16::from_be_bytes([rest[2], rest[3]]));
        assert_eq!(heard, method, "{}", String::from_utf8_lossy(&rest));
    }

    /// Publishes a message with these headers to a queue, and waits for the confirm.
    async fn publishes(&mut self, queue: &str, headers: &[u8]) {
        let name = [&[u8::try_from(queue.len()).expect("a short name")][..], queue.as_bytes()].concat();
        self.says(1, (60, 40), &[&b"\0\0\0"[..], &name, b"\0"].concat()).await;
        let length = u32::try_from(headers.len()).expect("it is short enough");
        // A body of one byte, and of the properties only the headers.
        let header = [&b"\0\x3c\0\0\0\0\0\0\0\0\0\x01\x20\0"[..], &length.to_be_bytes(), headers].concat();
        self.frame(2, 1, &header).await;
        self.frame(3, 1, b"?").await;
        self.hears((60, 80)).await;
    }
}

/// Headers with so many arrays in each other.
fn nested(depth: usize) -> Vec<u8> {
    let mut table = b"\x06nested".to_vec();
    for level in (0..depth).rev() {
        table.push(b'A');
        table.extend((u32::try_from(level * 5).expect("it is short enough")).to_be_bytes());
    }
    table
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn arrays_in_each_other_end_neither_servers_nor_clients_nor_those_who_look_at_dead_letters() {
    let node = shared().await;
    let scene = node.scene();
    let server = scene.serve(MathServer::new(Calculator)).await;
    let client = scene.client().await;
    let math = MathClient::new(&client);
    assert_eq!(soon(math.add(2, 3)).await.expect("it is served"), 5);
    let mut hand = Hand::connect(node.address()).await;
    for depth in [1, 1_000, DEEPEST] {
        let queues = node.queues_when(|queues| queues.iter().any(|queue| queue.exclusive)).await;
        for queue in &queues {
            hand.publishes(&queue.name, &nested(depth)).await;
            // Behind it on the same queue, or after it.
            assert_eq!(soon(math.add(2, 3)).await.expect("it is served"), 5, "{depth} in {}", queue.name);
        }
    }
    // What is no call has become a dead letter, or nothing.
    let operator = soon(DeadLetters::builder().namespace(&scene.namespace).connect(&scene.url, "math")).await;
    let operator = operator.expect("the node is there");
    soon(operator.list(100)).await.expect("they can be read");
    soon(operator.close()).await;
    soon(client.close()).await;
    soon(server.drain()).await;
}
