//! What a subscriber of `tracing` sees: a span for each call on both sides, in one trace, and nothing secret.
//!
//! A process of its own: what is logged is decided once for all threads of one.

use std::io::Write;
use std::sync::{LazyLock, Mutex};

use hopline::{Client, Context, Fault, Server};
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
    let client = Client::connect(&broker).await.expect("the broker is there");
    assert!(!format!("{client:?}").contains("guest:guest"));
    let log = logged();
    assert!(!log.contains("s3cret") && !log.contains("guest:guest"), "{log}");
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
