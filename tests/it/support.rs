//! The scene of every test: a broker, a namespace of its own on it, servers and clients.

use std::fmt;
use std::future::{Future, IntoFuture as _, poll_fn};
use std::pin::pin;
use std::task::Poll;
use std::time::Duration;

use hopline::testing::{self, Broker};
use hopline::transport::{Consumer, Mode, Role, Transport};
use hopline::{
    Call, Client, ClientBuilder, Code, Codec, Context, DeadLetters, Error, Fault, Instance, Method, Pending, Running,
    Server, Service,
};
use serde::{Deserialize, Serialize};
use tokio::net::TcpSocket;
use tokio::sync::mpsc;

/// How long a test waits for an event before it fails.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Waits for an event that has to come, and returns its outcome.
pub(crate) async fn soon<F: Future>(event: F) -> F::Output {
    tokio::time::timeout(PATIENCE, event).await.expect("what has to happen happens within a minute")
}

/// Advances the clock by `time`, and waits for an event that has to follow from that.
///
/// The clock stands still until the event has come. So only an event that needs no further time can be awaited. A call
/// whose deadline is reached in this way times out at its deadline on every machine, however slow, and not before.
pub(crate) async fn later<F: Future>(time: Duration, event: F) -> F::Output {
    tokio::time::pause();
    // A timer rings at the end of its millisecond.
    tokio::time::advance(time + Duration::from_millis(1)).await;
    let outcome = event.await;
    tokio::time::resume();
    outcome
}

/// Polls a future up to `times` times, and drops it before the next poll.
pub(crate) async fn after_polls<F: Future>(times: usize, future: F) -> Option<F::Output> {
    let (mut future, mut left) = (pin!(future), times);
    let polled = poll_fn(|context| {
        if left == 0 {
            return Poll::Ready(None);
        }
        left -= 1;
        future.as_mut().poll(context).map(Some)
    });
    soon(polled).await
}

/// A namespace of its own on the broker under test.
pub(crate) struct Scene {
    pub(crate) url: String,
    pub(crate) namespace: String,
}

impl Scene {
    pub(crate) fn new() -> Self {
        let rabbit = std::env::var("HOPLINE_TEST_URL").ok().filter(|url| !url.starts_with("memory:"));
        rabbit.map_or_else(Self::in_memory, Self::at)
    }

    /// A scene on a broker in memory that no other test uses, whatever broker is under test. It uses the test's clock,
    /// and believes everybody who they say they are.
    pub(crate) fn in_memory() -> Self {
        Self::at(testing::broker().to_string())
    }

    /// A scene on the broker with this address, whatever broker is under test.
    pub(crate) fn at(url: impl Into<String>) -> Self {
        Self { url: url.into(), namespace: format!("it-{}", uuid::Uuid::new_v4().simple()) }
    }

    /// A scene on a broker in memory that no other test uses, and that broker, which fails when the test says so.
    pub(crate) fn alone() -> (Self, Broker) {
        let broker = testing::broker();
        (Self::at(broker.to_string()), broker)
    }

    /// The same namespace, with another address for its broker.
    pub(crate) fn by_way_of(&self, url: impl Into<String>) -> Self {
        Self { url: url.into(), namespace: self.namespace.clone() }
    }

    pub(crate) async fn client(&self) -> Client {
        self.client_with(|client| client).await
    }

    pub(crate) fn client_with(
        &self,
        with: impl FnOnce(ClientBuilder) -> ClientBuilder,
    ) -> impl Future<Output = Client> {
        let builder = with(Client::builder().namespace(&self.namespace).timeout(PATIENCE));
        let url = self.url.clone();
        async move { builder.connect(&url).await.expect("the broker is there") }
    }

    pub(crate) async fn server(&self) -> Server {
        Server::builder().namespace(&self.namespace).connect(&self.url).await.expect("the broker is there")
    }

    pub(crate) async fn serve(&self, service: Service) -> Running {
        self.server().await.serve(service).start().await.expect("it can be served")
    }

    /// A connection to the broker, for what no client or server does.
    pub(crate) async fn transport(&self) -> Transport {
        Transport::connect(&self.url, Role::Client).await.expect("the broker is there")
    }

    /// Waits until this many messages are ready in a queue.
    pub(crate) async fn waiting(&self, transport: &Transport, queue: &str, messages: u64) {
        let queue = format!("{}.{queue}", self.namespace);
        soon(async {
            while transport.count(&queue).await.expect("an answer") != Some(messages) {
                tokio::task::yield_now().await;
            }
        })
        .await;
    }

    /// The services in the catalogue, and how many dead letters each has.
    pub(crate) async fn counts(&self) -> Vec<(String, u64)> {
        let counts = DeadLetters::builder().namespace(&self.namespace).counts(&self.url).await;
        let counts = counts.expect("the broker is there").into_iter();
        counts.map(|(service, count)| (service, count.expect("its queue answers"))).collect()
    }

    /// A consumer of the queue of dead letters of a service.
    pub(crate) async fn dead_letters(&self, transport: &Transport, service: &str) -> Consumer {
        let queue = format!("{}.{service}.dead", self.namespace);
        transport.consume(&queue, Mode::Settle { prefetch: 1000 }).await.expect("the server has declared it")
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) enum MathError {
    DivisionByZero { dividend: i64 },
}

impl fmt::Display for MathError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self::DivisionByZero { dividend } = self;
        write!(f, "{dividend} cannot be divided by zero")
    }
}

#[hopline::service(name = "math", version = 1)]
pub(crate) trait Math {
    async fn add(&self, a: i64, b: i64) -> i64;
    async fn div(&self, a: i64, b: i64) -> Result<i64, MathError>;
    async fn join(&self, words: Vec<String>, separator: Option<String>) -> String;
    async fn nothing(&self);
    #[rpc(oneway)]
    async fn heard(&self);
    async fn echo(&self, bytes: serde_bytes::ByteBuf) -> serde_bytes::ByteBuf;
    async fn panic(&self);
    async fn whoami(&self, ctx: &Context) -> String;
}

pub(crate) struct Calculator;

impl Math for Calculator {
    async fn add(&self, a: i64, b: i64) -> i64 {
        a + b
    }

    async fn div(&self, a: i64, b: i64) -> Result<i64, MathError> {
        if b == 0 { Err(MathError::DivisionByZero { dividend: a }) } else { Ok(a / b) }
    }

    async fn join(&self, words: Vec<String>, separator: Option<String>) -> String {
        words.join(separator.as_deref().unwrap_or(", "))
    }

    async fn nothing(&self) {}

    async fn heard(&self) {}

    async fn echo(&self, bytes: serde_bytes::ByteBuf) -> serde_bytes::ByteBuf {
        bytes
    }

    async fn panic(&self) {
        panic!("as the test asks");
    }

    async fn whoami(&self, ctx: &Context) -> String {
        ctx.instance().to_owned()
    }
}

/// A service whose calls wait for the test. Each call of `hold` is announced, and returns what the test tells it.
pub(crate) struct Held {
    pub(crate) service: Service,
    pub(crate) arrived: mpsc::UnboundedReceiver<Arrival>,
}

/// A call of `hold` that waits for its answer.
#[derive(Debug)]
pub(crate) struct Arrival {
    pub(crate) number: u64,
    pub(crate) context: Context,
    answer: tokio::sync::oneshot::Sender<u64>,
}

impl Arrival {
    pub(crate) fn release(self) {
        // A cancelled call has nobody to receive its answer.
        let _ = self.answer.send(self.number);
    }
}

impl Held {
    pub(crate) fn new() -> Self {
        Self::of(Method::new("hold").oneway())
    }

    pub(crate) fn of(method: Method) -> Self {
        let (announce, arrived) = mpsc::unbounded_channel();
        let service = Service::new("held", 1).method(method, move |context: Context, (number,): (u64,)| {
            let (answer, told) = tokio::sync::oneshot::channel();
            announce.send(Arrival { number, context, answer }).expect("the test listens");
            async move { told.await.map_err(|_| Fault::new(hopline::Code::Internal, "the test let go of it")) }
        });
        Self { service, arrived }
    }
}

/// Asks instances until this many have answered. On a busy machine one may take longer than one window.
pub(crate) async fn told<T>(instances: usize, ask: impl AsyncFn(Duration) -> Result<Vec<T>, Error>) -> Vec<T> {
    soon(async {
        loop {
            let told = ask(Duration::from_millis(200)).await.expect("they can be asked");
            if told.len() >= instances {
                return told;
            }
        }
    })
    .await
}

/// All instances that reply within `window`, sorted by service and instance.
pub(crate) async fn everybody(client: &Client, window: Duration) -> Result<Vec<Instance>, Error> {
    Ok(client.registry().total(window).services().await?.into_values().flatten().collect())
}

/// Waits until an instance of a service has read everything that a client has sent to it.
pub(crate) async fn has_read(client: &Client, service: &str, instance: &str) {
    // This is read after everything that was sent before it, and is answered at once.
    let probe = client.call::<()>(service, "absent", [(); 0]).to(instance);
    assert_eq!(code(soon(probe.into_future()).await), Code::Unimplemented);
}

/// An address at which nobody listens, and nobody can as long as this exists.
pub(crate) struct Nobody(TcpSocket);

impl Nobody {
    pub(crate) fn new() -> Self {
        let socket = TcpSocket::new_v4().expect("there is room for one");
        socket.bind(([127, 0, 0, 1], 0).into()).expect("there is a free port");
        Self(socket)
    }

    pub(crate) fn url(&self) -> String {
        format!("amqp://{}", self.0.local_addr().expect("it is bound"))
    }
}

/// Lets a call of a [`Held`] service that is on its way run, and gives out its result.
pub(crate) async fn run(pending: Pending<u64>, arrived: &mut mpsc::UnboundedReceiver<Arrival>) -> u64 {
    soon(arrived.recv()).await.expect("it runs").release();
    soon(pending).await.expect("answered")
}

/// A call of a [`Held`] service.
pub(crate) fn hold(client: &Client, number: u64) -> Call<u64> {
    client.call("held", "hold", (number,))
}

/// A frame of the wire, written by hand after its description.
pub(crate) fn frame(kind: u8, codec: Codec, id: uuid::Uuid, method: &str, payload: &[u8]) -> Vec<u8> {
    // A CBOR map of one entry.
    with_metadata(kind, codec, id, &[&[0xa1], &*named(method)].concat(), payload)
}

/// A frame that is another attempt of a call, and its own id.
pub(crate) fn attempt(
    kind: u8,
    codec: Codec,
    call_id: uuid::Uuid,
    method: &str,
    payload: &[u8],
) -> (uuid::Uuid, Vec<u8>) {
    let id = uuid::Uuid::new_v4();
    // A CBOR map of two entries: the second is 14 => 16 bytes.
    let metadata = [&[0xa2], &*named(method), &[14, 0x50], call_id.as_bytes()].concat();
    (id, with_metadata(kind, codec, id, &metadata, payload))
}

/// An entry of a CBOR map: 1 => the method, a text of under 24 bytes.
fn named(method: &str) -> Vec<u8> {
    assert!(method.len() < 24, "longer ones are written otherwise");
    [&[0x01, 0x60 | u8::try_from(method.len()).expect("under 24")], method.as_bytes()].concat()
}

/// A frame of the wire with these bytes as its metadata.
pub(crate) fn with_metadata(kind: u8, codec: Codec, id: uuid::Uuid, metadata: &[u8], payload: &[u8]) -> Vec<u8> {
    let length = |bytes: &[u8]| u32::try_from(bytes.len()).expect("a short one").to_be_bytes();
    let header = [b'H', b'L', 1, codec as u8, kind, 0, 0, 0];
    [&header, id.as_bytes().as_slice(), &length(metadata), &length(payload), metadata, payload].concat()
}

/// The code of a fault.
pub(crate) fn code<T: fmt::Debug>(outcome: Result<T, Error>) -> Code {
    match outcome {
        Err(Error::Fault(fault)) => fault.code,
        other => panic!("expected a fault, not {other:?}"),
    }
}
