//! A wire between a broker that is written by hand here, and a lapin that is.

use futures::FutureExt as _;
use futures::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use super::super::frames::{
    BLOCKED, BODY, CANCEL, CHANNEL_CLOSE, CONNECTION_CLOSE, DELIVER, GOT, GOT_NOTHING, HEADER, HEARTBEAT, Head, METHOD,
    RETURN, UNBLOCKED, frame, method, payload,
};
use super::super::{properties, socket};
use super::*;
use crate::transport::{Properties, Receipt};
use bytes::BytesMut;

/// A wire, lapin's end of it, and the broker's.
struct Scene {
    wire: Arc<Wire>,
    lapin: Pipe,
    broker: TcpStream,
}

impl Scene {
    async fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("there is a free port");
        let address = listener.local_addr().expect("it is bound");
        let halves = socket::halves(TcpStream::connect(address).await.expect("it listens"), None);
        let (wire, lapin, task) = Wire::new(halves);
        tokio::spawn(task);
        Self { wire, lapin, broker: listener.accept().await.expect("it is connected").0 }
    }

    /// The next frame that the broker gets.
    async fn got(&mut self) -> Vec<u8> {
        let mut frame = vec![0; 7];
        self.broker.read_exact(&mut frame).await.expect("it is open");
        frame.resize(Head::of(&frame).expect("it is there").size, 0);
        self.broker.read_exact(&mut frame[7..]).await.expect("it is open");
        frame
    }

    /// The method of the next frame that the broker gets.
    async fn got_method(&mut self) -> Method {
        let frame = self.got().await;
        method(&frame).map_or((0, frame[0].into()), |(method, _)| method)
    }

    async fn broker_says(&mut self, channel: u16, said: Method, arguments: &[u8]) {
        let mut out = BytesMut::new();
        put_method(&mut out, channel, said, |out| out.extend_from_slice(arguments));
        self.broker.write_all(&out).await.expect("it is open");
    }

    /// The broker sends a message of one byte, whose method it has sent before.
    async fn broker_sends_content(&mut self, channel: u16, number: u64) {
        let mut out = BytesMut::new();
        frame(&mut out, HEADER, channel, |out| {
            properties::put(out, &Properties::default(), 1, number, None).expect("it is short");
        });
        frame(&mut out, BODY, channel, |out| out.put_u8(b'!'));
        self.broker.write_all(&out).await.expect("it is open");
    }

    async fn lapin_says(&mut self, channel: u16, said: Method) {
        let mut out = BytesMut::new();
        put_method(&mut out, channel, said, |_| {});
        self.lapin.write_all(&out).await.expect("it takes everything");
    }

    /// Publishes on channel 1.
    fn publish(&self, body: Bytes) -> Receipt {
        let (outcome, receipt) = Receipt::new();
        let (exchange, key, properties) = (String::new(), "queue".to_owned(), Properties::default());
        let publication = Publication { exchange, key, mandatory: true, properties, body };
        self.wire.publish(1, None, Submitted { publication, outcome }).expect("it is open");
        receipt
    }
}

#[tokio::test]
async fn a_publication_does_not_break_into_a_frame_of_lapins() {
    let mut scene = Scene::new().await;
    scene.wire.publish_on(1, 0);
    scene.lapin.write_all(&HEARTBEAT[..5]).await.expect("it takes everything");
    let _receipt = scene.publish(Bytes::from(vec![7; 300_000]));
    scene.lapin.write_all(&HEARTBEAT[5..]).await.expect("it takes everything");
    assert_eq!(scene.got_method().await, super::super::frames::PUBLISH);
    assert_eq!(scene.got().await[0], HEADER);
    let mut body = 0;
    while body < 300_000 {
        let part = scene.got().await;
        assert!(part[0] == BODY && part.len() <= state::FRAME_MAX);
        body += payload(&part).len();
    }
    assert_eq!((body, scene.got().await), (300_000, HEARTBEAT.to_vec()));
}

#[tokio::test]
async fn each_publication_gets_its_own_return_and_its_own_confirm() {
    let mut scene = Scene::new().await;
    scene.wire.publish_on(1, 0);
    let receipts: Vec<_> = (0..4).map(|_| scene.publish(Bytes::new())).collect();
    scene.broker_says(1, RETURN, b"").await;
    scene.broker_sends_content(1, 3).await;
    scene.broker_says(1, ACK, b"\0\0\0\0\0\0\0\x01\0").await;
    scene.broker_says(1, NACK, b"\0\0\0\0\0\0\0\x02\0").await;
    scene.broker_says(1, ACK, b"\0\0\0\0\0\0\0\x04\x01").await;
    let mut outcomes = Vec::new();
    for receipt in receipts {
        outcomes.push(receipt.await.expect("it is confirmed"));
    }
    assert_eq!(outcomes, [Confirm::Accepted, Confirm::Refused, Confirm::Returned, Confirm::Accepted]);
    scene.wire.all_confirmed(1).await;
}

#[tokio::test]
async fn what_has_not_left_is_told_from_what_has() {
    let mut scene = Scene::new().await;
    scene.wire.publish_on(1, 0);
    let first = scene.publish(Bytes::from_static(b"first"));
    // The broker reads none of these, so the system's buffers are full at last.
    let large = Bytes::from(vec![0; 1024 * 1024]);
    let mut count = 1;
    while scene.wire.lock().unsent.pushed() < 64 * 1024 * 1024 {
        drop(scene.publish(large.clone()));
        count += 1;
    }
    // lapin sees the end after the wire.
    drop(scene.broker);
    assert!(matches!(scene.lapin.read(&mut [0; 8]).await, Ok(0) | Err(_)));
    let unfinished = scene.wire.take_unfinished(1).await;
    assert_eq!(unfinished.len(), count);
    let left = unfinished.iter().take_while(|one| one.has_left).count();
    assert!(left >= 1 && left < count && unfinished.iter().skip(left).all(|one| !one.has_left), "{left} of {count}");
    assert!(first.now_or_never().is_none(), "its outcome is for whoever publishes");
    assert!(scene.wire.take_unfinished(1).await.is_empty());
}

#[tokio::test]
async fn under_an_alarm_nothing_is_written() {
    let mut scene = Scene::new().await;
    scene.wire.publish_on(1, 0);
    scene.broker_says(0, BLOCKED, b"\0").await;
    // lapin is told as well.
    scene.lapin.read_exact(&mut [0; 13]).await.expect("it is open");
    let _receipt = scene.publish(Bytes::new());
    assert_eq!(scene.wire.lock().unsent.left(), 0);
    scene.broker_says(0, UNBLOCKED, b"").await;
    assert_eq!(scene.got_method().await, super::super::frames::PUBLISH);
}

#[tokio::test]
async fn the_end_of_a_channel_is_told_after_lapin_has_handled_it() {
    let mut scene = Scene::new().await;
    let mut closed = scene.wire.publish_on(1, 0);
    let receipt = scene.publish(Bytes::new());
    scene.broker_says(1, CHANNEL_CLOSE, b"\x01\x94\x02no\0\0\0\0").await;
    let mut handled = [0; 64];
    let count = scene.lapin.read(&mut handled).await.expect("it is open");
    assert_eq!(method(&handled[..count]).map(|(method, _)| method), Some(CHANNEL_CLOSE));
    assert!((&mut closed).now_or_never().is_none(), "lapin has read it and not handled it");
    // When nothing is there, lapin handles what it has read, and then it reads again.
    assert!(scene.lapin.read(&mut handled).now_or_never().is_none());
    assert!((&mut closed).now_or_never().is_none());
    assert!(scene.lapin.read(&mut handled).now_or_never().is_none());
    assert_eq!(closed.await, Ok(ChannelClosed { code: 404, text: "no".to_owned() }));
    let (outcome, _) = Receipt::new();
    let publication = Publication::to_nobody(String::new());
    let late = Submitted { publication, outcome };
    assert!(scene.wire.publish(1, None, late).is_err(), "nothing more is sent on it");
    assert_eq!(scene.wire.take_unfinished(1).await.len(), 1);
    receipt.await.expect_err("nobody tells its outcome");
}

#[tokio::test]
async fn what_is_settled_after_a_cancel_is_sent_after_it() {
    let mut scene = Scene::new().await;
    let (deliver, mut deliveries) = tokio::sync::mpsc::unbounded_channel();
    scene.wire.consume(1, Arc::new(move |arrived: Arrived| _ = deliver.send(arrived)));
    scene.broker_says(1, DELIVER, b"\x01c\0\0\0\0\0\0\0\x09\x01\x02ex\x03key").await;
    scene.broker_sends_content(1, 1).await;
    let arrived = deliveries.recv().await.expect("it is open");
    let envelope = &arrived.envelope;
    assert_eq!((envelope.tag, envelope.redelivered, &envelope.exchange[..], &envelope.key[..]), (9, true, "ex", "key"));
    assert_eq!(arrived.body, "!");
    scene.wire.ack(1, 7, false);
    scene.wire.hold_until_cancelled(1);
    scene.wire.ack(1, 8, true);
    scene.wire.settle(1, 9, Settle::Discard);
    scene.lapin_says(1, CANCEL).await;
    scene.wire.settle(1, 10, Settle::GiveBack);
    for expected in [ACK, CANCEL, ACK, REJECT, NACK] {
        assert_eq!(scene.got_method().await, expected);
    }
    // The broker is told nothing on a channel that is being closed.
    scene.lapin_says(1, CHANNEL_CLOSE).await;
    scene.wire.ack(1, 11, false);
    scene.lapin.write_all(&HEARTBEAT).await.expect("it takes everything");
    assert_eq!(scene.got_method().await, CHANNEL_CLOSE);
    assert_eq!(scene.got().await, HEARTBEAT);
}

/// The frames of a delivery on channel 1 with this body, in which each frame has at most so many bytes.
fn delivery(body: &[u8], most: usize) -> Vec<BytesMut> {
    let mut frames = vec![BytesMut::new(), BytesMut::new()];
    put_method(&mut frames[0], 1, DELIVER, |out| out.extend_from_slice(b"\x01c\0\0\0\0\0\0\0\x01\0\0\0"));
    frame(&mut frames[1], HEADER, 1, |out| {
        properties::put(out, &Properties::default(), body.len(), 1, None).expect("it is short");
    });
    for part in body.chunks(most) {
        let mut out = BytesMut::new();
        frame(&mut out, BODY, 1, |out| out.extend_from_slice(part));
        frames.push(out);
    }
    frames
}

#[tokio::test]
async fn a_large_body_arrives_as_it_was_sent_in_whatever_pieces() {
    let body: Vec<u8> = (0..1_000_000_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    for (most, piece) in
        [(131_064, 1_000_000), (131_064, 131_071), (131_064, 30_000), (131_000, 7_777), (4_088, 50_000)]
    {
        let mut scene = Scene::new().await;
        let (deliver, mut deliveries) = tokio::sync::mpsc::unbounded_channel();
        scene.wire.consume(1, Arc::new(move |arrived: Arrived| _ = deliver.send(arrived)));
        let mut frames = delivery(&body, most);
        // Something for lapin between two of its frames, and messages behind it.
        frames.insert(4, BytesMut::from(&HEARTBEAT[..]));
        frames.extend(delivery(b"small", most));
        frames.extend(delivery(&body[..200_000], most));
        let sent = frames.concat();
        let (_, mut broker) = scene.broker.split();
        let sending = async {
            for piece in sent.chunks(piece) {
                broker.write_all(piece).await.expect("it is open");
                tokio::task::yield_now().await;
            }
        };
        let receiving = async {
            for expected in [&body[..], b"small", &body[..200_000]] {
                let got = deliveries.recv().await.expect("it is open").body;
                assert!(got == expected, "{} bytes in frames of {most}, written by {piece}", got.len());
            }
        };
        tokio::join!(sending, receiving);
        scene.lapin.read_exact(&mut [0; HEARTBEAT.len()]).await.expect("it is open");
    }
}

#[tokio::test]
async fn a_large_body_that_breaks_off_or_has_a_broken_frame_ends_the_connection() {
    for is_broken in [true, false] {
        let mut scene = Scene::new().await;
        scene.wire.consume(1, Arc::new(|_| panic!("it is not complete")));
        let mut sent = delivery(&vec![7; 1_000_000], 131_064).concat();
        sent.truncate(300_000);
        if is_broken {
            // The last byte of the first frame of the body.
            let place = sent.windows(131_065).position(|part| part[..131_064] == [7; 131_064]).expect("it is there");
            sent[place + 131_064] = 0;
        }
        scene.broker.write_all(&sent).await.expect("it is open");
        scene.broker.shutdown().await.expect("it is open");
        match scene.lapin.read(&mut [0; 8]).await {
            Err(error) => assert!(is_broken && error.to_string().contains("a frame without its end"), "{error}"),
            Ok(count) => assert!(!is_broken && count == 0),
        }
    }
}

#[tokio::test]
async fn nothing_is_published_to_a_broker_that_closes_the_connection() {
    let mut scene = Scene::new().await;
    scene.wire.publish_on(1, 0);
    scene.broker_says(0, CONNECTION_CLOSE, b"\x01\x40\x03bye\0\0\0\0").await;
    let mut heard = [0; 22];
    scene.lapin.read_exact(&mut heard).await.expect("it is open");
    assert_eq!(method(&heard).map(|(method, _)| method), Some(CONNECTION_CLOSE));
    let (outcome, _) = Receipt::new();
    let late = Submitted { publication: Publication::to_nobody(String::new()), outcome };
    assert!(scene.wire.publish(1, None, late).is_err());
}

#[tokio::test]
async fn a_question_for_a_message_has_an_answer_also_when_its_channel_is_closed() {
    let mut scene = Scene::new().await;
    scene.wire.get_on(1);
    let empty = scene.wire.get(1, "queue");
    scene.broker_says(1, GOT_NOTHING, b"\0").await;
    assert!(matches!(empty.await, Ok(Ok(None))));
    let message = scene.wire.get(1, "queue");
    scene.broker_says(1, GOT, b"\0\0\0\0\0\0\0\x05\0\0\x05queue\0\0\0\0").await;
    scene.broker_sends_content(1, 1).await;
    let message = message.await.expect("it is answered").expect("the channel is open").expect("there is one");
    assert_eq!((message.envelope.tag, &message.body[..]), (5, &b"!"[..]));
    scene.broker_says(1, CHANNEL_CLOSE, b"\x01\x96\x04late\0\0\0\0").await;
    scene.lapin.read_exact(&mut [0; 23]).await.expect("it is open");
    let refused = scene.wire.get(1, "queue").await.expect("it is answered").expect_err("the channel is closed");
    assert!(refused.text.contains("ask again"), "{refused:?}");
    // When the connection has ended, its end is the answer.
    drop(scene.broker);
    assert!(matches!(scene.lapin.read(&mut [0; 8]).await, Ok(0) | Err(_)));
    assert!(scene.wire.get(1, "queue").await.is_err());
}

#[tokio::test]
async fn what_is_no_amqp_is_for_lapin_to_judge() {
    for said in [&b"HTTP/1.1 400 Bad Request\r\n"[..], b"AMQP\0\x01\0\0", b"\x15\x03\x01", b"?"] {
        let mut scene = Scene::new().await;
        scene.broker.write_all(said).await.expect("it is open");
        let mut heard = vec![0; said.len()];
        scene.lapin.read_exact(&mut heard).await.expect("it is open");
        assert_eq!((&heard[..], scene.wire.first_words()), (said, &said[..said.len().min(FIRST_WORDS)]));
    }
}

#[tokio::test]
async fn a_frame_that_is_broken_or_too_large_ends_the_connection_with_the_reason() {
    let too_large = [METHOD, 0, 0, 0x7f, 0xff, 0xff, 0xff];
    let mut endless = HEARTBEAT;
    endless[7] = 0;
    for (said, reason) in [(&too_large[..], "a frame of 2147483655 bytes"), (&endless, "a frame without its end")] {
        let mut scene = Scene::new().await;
        scene.broker.write_all(said).await.expect("it is open");
        let error = scene.lapin.read(&mut [0; 8]).await.expect_err("it is told");
        assert!(error.to_string().contains(reason), "{error}");
    }
}

#[tokio::test]
async fn lapin_learns_that_the_broker_lives_though_it_sees_none_of_what_comes() {
    let mut scene = Scene::new().await;
    scene.wire.consume(1, Arc::new(|_| {}));
    let mut heard = [0; HEARTBEAT.len()];
    let sign_of_life = scene.lapin.read_exact(&mut heard);
    let deliveries = async {
        loop {
            let mut out = BytesMut::new();
            put_method(&mut out, 1, DELIVER, |out| out.extend_from_slice(b"\x01c\0\0\0\0\0\0\0\x01\0\0\0"));
            frame(&mut out, HEADER, 1, |out| {
                properties::put(out, &Properties::default(), 0, 1, None).expect("it is short");
            });
            scene.broker.write_all(&out).await.expect("it is open");
            tokio::task::yield_now().await;
        }
    };
    tokio::select! {
        heard = sign_of_life => heard.expect("it is open"),
        () = deliveries => {}
    }
    assert_eq!(heard, HEARTBEAT);
}
