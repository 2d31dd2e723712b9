//! What a subscriber of `tracing` sees: a span for each call on both sides, in one trace, and nothing secret.
//!
//! A process of its own: what is logged is decided once for all threads of one.

use std::io::Write;
use std::sync::{LazyLock, Mutex};
use std::time::Duration;

use hopline::transport::{Confirm, Properties, Publication, Role, Transport};
use hopline::{Client, Context, Fault, Method, Server, Service, State};
use tracing_subscriber::fmt::format::FmtSpan;

/// Everything that this process logs.
static LOG: Mutex<Vec<u8>> = Mutex::new(Vec::new());

static LISTENING: LazyLock<()> = LazyLock::new(|| {
    let everything = tracing_subscriber::fmt().with_max_level(tracing::Level::TRACE);
    everything.with_span_events(FmtSpan::NEW).with_ansi(false).with_writer(|| Log).init();
});

struct Log;

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        LOG.lock().expect("no panic while logging").write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn logged() -> String {
    String::from_utf8_lossy(&LOG.lock().expect("no panic while logging")).into_owned()
}

fn broker() -> String {
    std::env::var("HOPLINE_TEST_URL").unwrap_or_else(|_| "memory://".to_owned())
}

#[tokio::test]
async fn a_call_has_a_span_on_either_side_in_one_trace() {
    LazyLock::force(&LISTENING);
    let namespace = format!("tracing-{}", uuid::Uuid::new_v4().simple());
    let server = Server::builder().namespace(&namespace).connect(&broker()).await.expect("the broker is there");
    let server = server.method("traced", "add", |_: Context, (a, b): (i64, i64)| async move { Ok::<_, Fault>(a + b) });
    let _running = server.start().await.expect("it can be served");
    let client = Client::builder().namespace(&namespace).connect(&broker()).await.expect("the broker is there");
    client.call::<i64>("traced", "add", (2, 3)).await.expect("answered");
    let log = logged();
    let span = |beginning: &str| {
        let line = log.lines().find(|line| line.contains(beginning) && line.contains("rpc.service=traced.v1"));
        line.unwrap_or_else(|| panic!("no {beginning} in {log}"))
    };
    let trace = |line: &str| {
        let (_, rest) = line.split_once("traceparent=").expect("a traceparent");
        rest.trim_matches('"').split('-').nth(1).expect("a trace id").to_owned()
    };
    assert_eq!(trace(span("call{")), trace(span("handle{")));
}

#[tokio::test]
async fn a_password_is_never_logged() {
    LazyLock::force(&LISTENING);
    // Nobody listens there; and a broker, if one is under test, that refuses the password.
    let mut urls = vec!["amqp://bob:s3cret@127.0.0.1:1".to_owned()];
    let broker = broker();
    if let Some((_, address)) = broker.split_once('@') {
        urls.push(format!("amqp://bob:s3cret@{address}"));
    }
    for url in urls {
        let error = Client::connect(&url).await.expect_err("refused");
        assert!(!error.to_string().contains("s3cret"), "{error}");
        assert!(!format!("{error:?}").contains("s3cret"), "{error:?}");
    }
    for url in ["amqp://bob:12#s3cret@127.0.0.1:1", "amqp:bob:s3cret@127.0.0.1", "amqp://127.0.0.1:1/s3cret@v"] {
        let error = Client::connect(url).await.expect_err("no address");
        assert!(!format!("{error} {error:?}").contains("s3cret"), "{error:?}");
    }
    let client = Client::connect(&broker).await.expect("the broker is there");
    assert!(!format!("{client:?}").contains("guest:guest"));
    let log = logged();
    assert!(!log.contains("s3cret") && !log.contains("guest:guest"), "{log}");
}

#[tokio::test]
async fn what_is_logged_of_a_connection_says_whose_it_is() {
    LazyLock::force(&LISTENING);
    let process = std::process::id();
    // Nobody listens there, as it will find out again and again.
    let client =
        Client::builder().name("billing-web").connect_lazy("amqp://bob:s3cret@127.0.0.1:1/v").expect("an address");
    let failed = |state: &State| matches!(state, State::Connecting { reason: Some(_) });
    client.state().wait_for(failed).await.expect("the client is there");
    let log = logged();
    let line = log.lines().find(|line| line.contains("no connection to the broker") && line.contains("billing-web"));
    let line = line.unwrap_or_else(|| panic!("nothing of it in {log}"));
    assert!(line.contains(&format!("name=\"billing-web client {process} ")), "{line}");
    assert!(line.contains("cannot connect to amqp://127.0.0.1:1/v: "), "{line}");
    if !broker().starts_with("memory:") {
        let _client = Client::builder().name("billing-cron").connect(&broker()).await.expect("the broker is there");
        let log = logged();
        let line = log.lines().find(|line| line.contains("connected") && line.contains("billing-cron"));
        assert!(line.is_some_and(|line| line.contains("broker=amqp://127.0.0.1:")), "{line:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_closes_does_not_break_connections_off() {
    LazyLock::force(&LISTENING);
    for _ in 0..40 {
        let namespace = format!("tracing-{}", uuid::Uuid::new_v4().simple());
        let server = Server::builder().namespace(&namespace).connect(&broker()).await.expect("the broker is there");
        let server = server.method("closed", "one", |_: Context, (): ()| async move { Ok::<_, Fault>(1) });
        let running = server.start().await.expect("it can be served");
        let client = Client::builder().namespace(&namespace).connect(&broker()).await.expect("the broker is there");
        assert_eq!(client.call::<i64>("closed", "one", ()).await.expect("answered"), 1);
        tokio::join!(client.close(), running.drain());
    }
    let log = logged();
    // What lapin says before it ends a connection without the broker's consent.
    let broken: Vec<&str> = log.lines().filter(|line| line.contains("Connection error error=invalid")).collect();
    assert!(broken.is_empty(), "{broken:#?}");
}

/// The line that says of this call that its handler was dropped.
async fn told_of(id: uuid::Uuid) -> String {
    let told = async {
        loop {
            let log = logged();
            let mut lines = log.lines().filter(|line| line.contains("half-way") && line.contains(&id.to_string()));
            if let Some(line) = lines.next() {
                assert_eq!(lines.next(), None, "a fact is told once");
                return line.to_owned();
            }
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), told).await.expect("it is logged")
}

/// A request of the method, by hand, that has 100 ms and is never cancelled.
fn request(id: uuid::Uuid, method: &str) -> Vec<u8> {
    // A CBOR map: 1 => the method, a text of under 24 bytes; 2 => the time.
    let text = 0x60 | u8::try_from(method.len()).expect("a short one");
    let metadata = [&[0xa2, 1, text], method.as_bytes(), &[2, 0x18, 100]].concat();
    let length = u32::try_from(metadata.len()).expect("a short one").to_be_bytes();
    let header = [b'H', b'L', 1, 2, 1, 0, 0, 0];
    [&header, id.as_bytes().as_slice(), &length, &[0, 0, 0, 2], &metadata, b"[]"].concat()
}

#[tokio::test]
async fn a_handler_that_is_dropped_half_way_is_told_of_once_to_who_must_see_to_it() {
    LazyLock::force(&LISTENING);
    let namespace = format!("tracing-{}", uuid::Uuid::new_v4().simple());
    let server = Server::builder().namespace(&namespace).connect(&broker()).await.expect("the broker is there");
    let (begun, mut begins) = tokio::sync::mpsc::unbounded_channel();
    let half = move |context: Context, _: [(); 0]| {
        begun.send(context.request_id()).expect("the test listens");
        std::future::pending::<Result<(), Fault>>()
    };
    let service = Service::new("halves", 1)
        .method(Method::new("reserve"), half.clone())
        .method(Method::new("look").idempotent(), half);
    let _running = server.serve(service).start().await.expect("it can be served");
    let client = Client::builder().namespace(&namespace).connect(&broker()).await.expect("the broker is there");
    for (method, level) in [("reserve", " WARN "), ("look", "DEBUG ")] {
        let pending = client.call::<()>("halves", method, [(); 0]).start().await.expect("on its way");
        let id = begins.recv().await.expect("it runs");
        drop(pending);
        let line = told_of(id).await;
        let fields = ["service=halves.v1", &format!("method=\"{method}\""), "caller=", "ran=", "its caller gave up"];
        for said in [level].iter().chain(&fields) {
            assert!(line.contains(said), "no {said} in {line}");
        }
        assert_eq!(line.contains("mark its method `finishes`"), level == " WARN ", "{line}");
    }
    let transport = Transport::connect(&broker(), Role::Client).await.expect("the broker is there");
    let id = uuid::Uuid::new_v4();
    let publication = Publication {
        exchange: format!("{namespace}.rpc"),
        key: "halves.v1".to_owned(),
        mandatory: true,
        properties: Properties { reply_to: Some("nobody".to_owned()), ..Properties::default() },
        body: request(id, "reserve").into(),
    };
    assert_eq!(transport.publish(publication).await, Ok(Confirm::Accepted));
    let line = told_of(id).await;
    assert!(line.contains("its deadline passed") && line.contains(" WARN "), "{line}");
}
