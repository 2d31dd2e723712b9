//! Connecting: to the broker and nobody else, within a time, and with an error that says what is wrong.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::join_all;
use hopline::transport::{Role, Transport};
use hopline::{Client, Context, DeadLetters, Error, Fault, Server, Service, State, testing};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use crate::node::when;
use crate::support::{Calculator, MathClient, MathServer, Nobody, Scene, soon};

/// A server that is not RabbitMQ.
struct Peer {
    address: SocketAddr,
    came: Arc<AtomicUsize>,
    accepting: JoinHandle<()>,
}

/// What such a server does with a connection.
#[derive(Debug, Clone, Copy)]
enum Does {
    /// Sends this at once, and waits until the other side ends.
    Greets(&'static [u8]),
    /// Sends this after it has received something, and ends.
    Answers(&'static [u8]),
    Ends,
    /// Does nothing.
    Waits,
    /// Accepts every login, and does nothing after that.
    LogsIn,
}

/// An AMQP frame with this method of the class `connection`.
fn method(id: u8, arguments: &[u8]) -> Vec<u8> {
    let size = u32::try_from(4 + arguments.len()).expect("a short one").to_be_bytes();
    [&[1, 0, 0][..], &size, &[0, 10, 0, id], arguments, &[0xce]].concat()
}

/// Reads until the other side has called this method of the class `connection`.
async fn called(stream: &mut TcpStream, id: u8) -> io::Result<()> {
    let mut heard = Vec::new();
    while !heard.windows(4).any(|bytes| bytes == [0, 10, 0, id]) {
        if stream.read_buf(&mut heard).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(())
}

impl Peer {
    async fn new(does: Does) -> Self {
        Self::on(TcpListener::bind("127.0.0.1:0").await.expect("there is a free port"), does)
    }

    fn on(listener: TcpListener, does: Does) -> Self {
        let address = listener.local_addr().expect("it is bound");
        let came = Arc::new(AtomicUsize::new(0));
        let counted = came.clone();
        let accepting = tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.expect("the process may open as many");
                counted.fetch_add(1, Ordering::SeqCst);
                tokio::spawn(async move {
                    let mut heard = [0; 8];
                    match does {
                        Does::Greets(words) => stream.write_all(words).await?,
                        Does::Answers(words) => {
                            stream.read_exact(&mut heard).await?;
                            return stream.write_all(words).await;
                        }
                        Does::Ends => return Ok(()),
                        Does::Waits => {}
                        Does::LogsIn => {
                            stream.read_exact(&mut heard).await?;
                            // start: version 0-9, no properties, one mechanism, one language.
                            let start = b"\0\x09\0\0\0\0\0\0\0\x05PLAIN\0\0\0\x05en_US";
                            stream.write_all(&method(10, start)).await?;
                            called(&mut stream, 11).await?;
                            // tune: 2047 channels, 128 KiB, no heartbeat.
                            stream.write_all(&method(30, &[7, 255, 0, 2, 0, 0, 0, 0])).await?;
                            called(&mut stream, 40).await?;
                            stream.write_all(&method(41, &[0])).await?;
                        }
                    }
                    while stream.read(&mut heard).await? > 0 {}
                    Ok(())
                });
            }
        });
        Self { address, came, accepting }
    }

    fn url(&self) -> String {
        format!("amqp://guest:s3cret@{}", self.address)
    }

    fn came(&self) -> usize {
        self.came.load(Ordering::SeqCst)
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// The error of an attempt to connect.
async fn reason(url: &str) -> String {
    match soon(Client::connect(url)).await {
        Err(Error::Connect { url, reason, .. }) => {
            assert!(!url.contains('@') && !reason.contains("s3cret"), "{url}: {reason}");
            reason
        }
        other => panic!("expected no connection, not {other:?}"),
    }
}

/// The host and port of the RabbitMQ under test. `None` in memory.
fn rabbit() -> Option<String> {
    let url = Scene::new().url;
    url.strip_prefix("amqp://guest:guest@").map(str::to_owned)
}

/// A port at which nobody listens. It was free a moment ago.
async fn nowhere() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").await.and_then(|listener| listener.local_addr()).expect("there is a free port")
}

#[tokio::test]
async fn who_is_no_rabbitmq_is_told_by_what_it_says() {
    let nats = b"INFO {\"server_id\":\"NB2\",\"version\":\"2.10.22\",\"proto\":1,\"max_payload\":1048576} \r\n";
    let http = b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
    for (does, said) in [
        (Does::Greets(nats), "it speaks NATS at this port"),
        (Does::Answers(http), "it speaks HTTP at this port"),
        // An alert: a TLS listener sends it to a client that does not begin with TLS.
        (
            Does::Answers(b"\x15\x03\x03\x00\x02\x02\x46"),
            "it speaks TLS at this port, which the address does not: use amqps://",
        ),
        (Does::Answers(b"AMQP\x03\x01\x00\x00"), "it speaks AMQP of another version than RabbitMQ's 0-9-1"),
        (Does::Greets(b"SSH-2.0-OpenSSH_9.2\r\n"), "it does not speak AMQP at this port"),
        (Does::Ends, "the other side ended the connection without a word"),
    ] {
        let peer = Peer::new(does).await;
        let reason = reason(&peer.url()).await;
        assert!(reason.starts_with(said), "{does:?}: {reason}");
        assert_eq!(peer.came(), 1, "{does:?}");
    }
    let reason = reason(&format!("amqp://guest:s3cret@{}", nowhere().await)).await;
    assert!(reason.starts_with("nobody listens there: check that RabbitMQ runs, and the port"), "{reason}");
}

#[tokio::test]
async fn who_says_nothing_is_waited_for_no_longer_than_was_allowed() {
    let peer = Peer::new(Does::Waits).await;
    let short = Duration::from_millis(100);
    match soon(Server::builder().connect_timeout(short).connect(&peer.url())).await {
        Err(Error::Connect { reason, .. }) => {
            assert!(reason.starts_with("no answer within 100ms: something accepts connections there"), "{reason}");
        }
        other => panic!("{other:?}"),
    }
    let reason = reason(&format!("{}?connection_timeout=50", peer.url())).await;
    assert!(reason.starts_with("no answer within the `connection_timeout` of 50ms: "), "{reason}");
}

/// How many sockets of this process are connected to `port`.
fn sockets_to(port: u16) -> usize {
    let sockets = std::fs::read_to_string("/proc/net/tcp").expect("it runs on Linux");
    let columns = sockets.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let peer = format!("0100007F:{port:04X}");
    columns.filter(|columns| columns[2] == peer && columns.get(9).is_some_and(|inode| *inode != "0")).count()
}

#[tokio::test]
async fn who_says_nothing_keeps_neither_socket_nor_thread_of_those_who_gave_it_up() {
    let peer = Peer::new(Does::Waits).await;
    let url = peer.url();
    // lapin has a thread for each connection, which keeps the socket until it ends.
    let attempts = (0..20).map(|_| Client::builder().connect_timeout(Duration::from_millis(100)).connect(&url));
    for outcome in soon(join_all(attempts)).await {
        assert!(matches!(outcome, Err(Error::Connect { .. })), "{outcome:?}");
    }
    assert!(peer.came() > 0);
    when(async || sockets_to(peer.address.port()), |left| *left == 0).await;
    // A future that is dropped in the middle leaves nothing behind either.
    let mut connecting = Box::pin(Client::connect(&url));
    let came = peer.came();
    tokio::select! {
        outcome = &mut connecting => panic!("{outcome:?}"),
        () = async { while peer.came() == came { tokio::task::yield_now().await } } => {}
    }
    drop(connecting);
    when(async || sockets_to(peer.address.port()), |left| *left == 0).await;
}

#[tokio::test]
async fn who_falls_silent_after_the_login_is_waited_for_no_longer_than_was_allowed() {
    let peer = Peer::new(Does::LogsIn).await;
    let (url, short) = (peer.url(), Duration::from_secs(2));
    let outcomes = tokio::join!(
        Client::builder().connect_timeout(short).connect(&url).map(|outcome| outcome.map(drop)),
        Server::builder().connect_timeout(short).connect(&url).map(|outcome| outcome.map(drop)),
        DeadLetters::builder().connect_timeout(short).connect(&url, "mail").map(|outcome| outcome.map(drop)),
    );
    for outcome in [outcomes.0, outcomes.1, outcomes.2] {
        let Err(Error::Connect { reason, .. }) = outcome else { panic!("{outcome:?}") };
        assert!(
            reason.starts_with("no answer within 2s: the broker accepts the login and opens no channel"),
            "{reason}"
        );
    }
    assert_eq!(peer.came(), 5, "servers and operators have two connections");
}

#[tokio::test]
async fn the_longest_timeout_is_one_like_any_other() {
    let nowhere = format!("amqp://{}", nowhere().await);
    let refused = Client::builder().connect_timeout(Duration::MAX).connect(&nowhere);
    assert!(matches!(soon(refused).await, Err(Error::Connect { .. })));
    let scene = Scene::new();
    let client = Client::builder().namespace(&scene.namespace).connect_timeout(Duration::MAX).connect(&scene.url);
    soon(soon(client).await.expect("the broker is there").close()).await;
    let server = Server::builder().namespace(&scene.namespace).connect_timeout(Duration::MAX).connect(&scene.url);
    soon(soon(server).await.expect("the broker is there").run_until(std::future::ready(()))).await.expect("it serves");
}

#[tokio::test]
async fn an_ip_address_leads_there_and_to_nobody_else() {
    // A port that is free at both addresses.
    let (here, trap) = loop {
        let here = TcpListener::bind("[::1]:0").await.expect("there is a free port");
        let port = here.local_addr().expect("it is bound").port();
        if let Ok(trap) = TcpListener::bind(("127.0.0.1", port)).await {
            break (Peer::on(here, Does::Ends), Peer::on(trap, Does::Ends));
        }
    };
    let port = here.address.port();
    reason(&format!("amqp://guest:s3cret@[::1]:{port}")).await;
    assert_eq!((here.came(), trap.came()), (1, 0));
    // This address is from the network for documentation: nobody has it.
    let nobody = format!("amqp://guest:s3cret@[2001:db8::1]:{port}?connection_timeout=200");
    reason(&nobody).await;
    assert_eq!((here.came(), trap.came()), (1, 0));
    reason(&format!("amqp://guest:s3cret@127.0.0.1:{port}")).await;
    assert_eq!((here.came(), trap.came()), (1, 1));
}

#[tokio::test]
async fn a_name_that_nobody_has_is_named() {
    let reason = reason("amqp://guest:s3cret@no-such-host.invalid/v").await;
    assert!(reason.starts_with("the host `no-such-host.invalid` is not known: check its name"), "{reason}");
}

#[tokio::test]
async fn a_mistyped_address_shows_nothing_that_could_be_a_secret() {
    for url in [
        "amqp://guest:12#s3cret@host",
        "amqp:guest:s3cret@host",
        "guest:s3cret@host",
        "amqp://guest:12/s3cret@host",
        "amqp://guest:s3cret/host",
        "amqp://guest:12?s3cret@host",
        "amqp://guest@s3cret@host",
        "amqp://guest:s3cret@ho st",
        "amqp://guest:s3cret,host",
        "amqp://host?password=s3cret",
        "amqp://host?heartbeat=s3cret",
        "amqp://host/v#s3cret",
        "s3cret://host",
        "nats://guest:s3cret@host",
        #[cfg(not(feature = "tls"))]
        "amqps://guest:s3cret@host",
        "memory://guest:s3cret@it",
    ] {
        let outcomes = [
            Client::connect(url).await.map(drop),
            Client::builder().connect_lazy(url).map(drop),
            Server::connect(url).await.map(drop),
            Server::builder().connect_lazy(url).map(drop),
            DeadLetters::connect(url, "mail").await.map(drop),
        ];
        for outcome in outcomes {
            let Err(error @ Error::Invalid(_)) = outcome else { panic!("{url}: {outcome:?}") };
            assert!(!format!("{error} {error:?}").contains("s3cret"), "{url}: {error}");
            assert!(error.to_string().starts_with("the broker's address"), "{url}: {error}");
        }
    }
}

#[tokio::test]
async fn a_state_and_what_is_printed_of_a_client_show_where_it_connects_to_and_not_as_whom() {
    let nowhere = nowhere().await;
    let url = format!("amqp://some%40body:s3cret@{nowhere}/v?heartbeat=9");
    let client = Client::builder().connect_lazy(&url).expect("a good address");
    let mut state = client.state();
    let tried = |state: &State| matches!(state, State::Connecting { reason: Some(_) });
    let state = soon(state.wait_for(tried)).await.expect("the client is there").clone();
    let shown = format!("{state:?} {client:?}");
    assert!(shown.contains(&format!("cannot connect to amqp://{nowhere}/v: ")), "{shown}");
    for hidden in ["s3cret", "some", "heartbeat"] {
        assert!(!shown.contains(hidden), "{hidden} in {shown}");
    }
    client.close().await;
}

#[tokio::test]
async fn a_lazy_server_serves_when_its_broker_is_there() {
    let scene = Scene::new();
    let server = Server::builder().namespace(&scene.namespace).connect_lazy(&scene.url).expect("a good address");
    let instance = server.instance().to_owned();
    let running = server.serve(MathServer::new(Calculator)).start().await.expect("it need not be there");
    assert_eq!(running.instance(), instance);
    let mut state = running.state();
    soon(state.wait_for(|state| *state == State::Ready)).await.expect("the server is there");
    let client = scene.client().await;
    assert_eq!(MathClient::new(&client).add(2, 3).await.expect("it is served"), 5);
    running.drain().await;
    assert_eq!(*state.borrow(), State::Closed);
}

#[tokio::test(start_paused = true)]
async fn a_lazy_server_waits_for_its_broker_however_long_that_takes() {
    let broker = testing::broker();
    broker.take_down();
    let server = Server::builder().connect_lazy(&broker).expect("a good address").serve(MathServer::new(Calculator));
    let running = server.start().await.expect("it need not be there");
    let mut state = running.state();
    // The time is virtual: it is how long the broker is down.
    tokio::time::sleep(Duration::from_secs(3600)).await;
    assert!(matches!(*state.borrow_and_update(), State::Connecting { reason: Some(_) }), "{:?}", *state.borrow());
    broker.restore();
    state.wait_for(|state| *state == State::Ready).await.expect("the server is there");
    let client = Client::connect(&broker).await.expect("the broker is there");
    assert_eq!(MathClient::new(&client).add(2, 3).await.expect("it is served"), 5);
    // From then on it is as any other: what is lost is made again.
    broker.cut();
    assert_eq!(MathClient::new(&client).add(3, 3).await.expect("it is served again"), 6);
    running.drain().await;
}

#[tokio::test]
async fn a_lazy_server_tells_why_its_broker_is_not_there_and_drains_all_the_same() {
    let nobody = Nobody::new();
    let server = Server::builder().connect_lazy(nobody.url()).expect("a good address");
    let running = server.serve(MathServer::new(Calculator)).start().await.expect("it need not be there");
    let mut state = running.state();
    let tried = |state: &State| matches!(state, State::Connecting { reason: Some(_) });
    let State::Connecting { reason: Some(reason) } = soon(state.wait_for(tried)).await.expect("it is there").clone()
    else {
        unreachable!("it was waited for")
    };
    assert!(reason.starts_with(&format!("cannot connect to {}: nobody listens there", nobody.url())), "{reason}");
    soon(running.drain()).await;
    assert_eq!(*state.borrow(), State::Closed);
}

#[tokio::test]
async fn a_lazy_server_that_cannot_be_started_says_so_at_once() {
    let nobody = Nobody::new();
    let server = Server::builder().connect_lazy(nobody.url()).expect("a good address");
    let twice = server.serve(MathServer::new(Calculator)).serve(MathServer::new(Calculator)).start().await;
    assert!(matches!(twice, Err(Error::Invalid(_))), "{twice:?}");
}

#[tokio::test]
async fn a_client_is_known_by_its_instance() {
    let scene = Scene::new();
    let caller = |context: Context, (): ()| async move { Ok::<_, Fault>(context.caller().map(str::to_owned)) };
    let _server = scene.serve(Service::new("known", 1).method("caller", caller)).await;
    for name in [None, Some("billing-web")] {
        let builder = Client::builder().namespace(&scene.namespace);
        let builder = name.into_iter().fold(builder, hopline::ClientBuilder::name);
        let client = builder.connect(&scene.url).await.expect("the broker is there");
        let caller = client.call::<String>("known", "caller", ()).await.expect("answered");
        assert_eq!(caller.strip_suffix(client.instance()).map(str::trim_end), Some(name.unwrap_or_default()));
    }
}

#[tokio::test]
async fn a_broker_that_refuses_says_what_to_look_at() {
    let Some(host) = rabbit() else { return };
    let wrong = reason(&format!("amqp://guest:s3cret@{host}")).await;
    assert!(wrong.starts_with("access refused: check user and password ("), "{wrong}");
    let nobody = reason(&format!("amqp://s3cret:guest@{host}")).await;
    assert!(nobody.starts_with("access refused: check user and password ("), "{nobody}");
    let absent = reason(&format!("amqp://guest:guest@{host}/no%2Fsuch")).await;
    assert!(absent.starts_with("there is no virtual host `no/such`: check its name"), "{absent}");
    let empty = reason(&format!("amqp://guest:guest@{host}/")).await;
    assert!(empty.contains("leave out the `/` at the end of the address"), "{empty}");
}

#[tokio::test]
async fn percent_encoded_names_are_the_brokers_own() {
    let Some(host) = rabbit() else { return };
    let client = soon(Client::connect(&format!("amqp://gu%65st:%67uest@{host}/%2F"))).await.expect("it is `guest`");
    client.close().await;
}

#[tokio::test]
async fn the_next_broker_is_taken_when_one_is_none() {
    let scene = Scene::new();
    let Some(host) = rabbit() else { return };
    let peer = Peer::new(Does::Answers(b"HTTP/1.1 400 Bad Request\r\n\r\n")).await;
    let url = format!("amqp://guest:guest@{},{},{host}?order=given", nowhere().await, peer.address);
    let client =
        soon(Client::builder().namespace(&scene.namespace).connect(&url)).await.expect("the third one is there");
    client.close().await;
    // If no address works, the error names each with its reason.
    let url = format!("amqp://guest:s3cret@{},{}", nowhere().await, peer.address);
    match soon(Client::connect(&url)).await {
        Err(Error::Connect { reason, .. }) => {
            assert!(reason.contains("nobody listens there") && reason.contains("it speaks HTTP"), "{reason}");
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_broker_that_says_nothing_keeps_nobody_from_the_next() {
    let (silent, next) = (Peer::new(Does::Waits).await, Peer::new(Does::Waits).await);
    let url = format!("{},{}?order=given", silent.url(), next.url());
    // With a single address it would wait this long.
    let connecting = Client::builder().connect_timeout(Duration::from_secs(3600)).connect(&url);
    tokio::select! {
        outcome = connecting => panic!("nobody answers: {outcome:?}"),
        _ = when(async || next.came(), |came| *came == 1) => {}
    }
    assert_eq!(silent.came(), 1);
}

#[tokio::test]
async fn a_name_that_cannot_be_shown_is_refused() {
    for name in ["", "a\nb", &"x".repeat(65)] {
        let outcomes = [
            Client::builder().name(name).connect("memory://").await.map(drop),
            Server::builder().name(name).connect("memory://").await.map(drop),
            DeadLetters::builder().name(name).connect("memory://", "mail").await.map(drop),
        ];
        for outcome in outcomes {
            let Err(Error::Invalid(why)) = outcome else { panic!("{name:?}: {outcome:?}") };
            assert!(why.ends_with("write 1 to 64 bytes without control characters"), "{why}");
        }
    }
}

#[tokio::test]
async fn refusals_one_after_the_other_cost_a_connection_their_channels_and_no_more() {
    let Some(host) = rabbit() else { return };
    let url = format!("amqp://guest:guest@{host}?channel_max=64");
    let transport = soon(Transport::connect(&url, Role::Client)).await.expect("the broker is there");
    let missing = format!("missing-{}", uuid::Uuid::new_v4());
    for _ in 0..20 {
        assert_eq!(soon(transport.count(&missing)).await.expect("an answer"), None);
    }
    // The loop is long enough that every order comes several times.
    for _ in 0..200 {
        soon(transport.declare(&[])).await.expect("there are good ones");
    }
    transport.close().await;
}
