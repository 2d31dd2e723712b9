//! What a subscriber of `tracing` sees: a span for each call on both sides, in one trace, and nothing secret.

use std::io::Write;
use std::sync::{Arc, Mutex};

use hopline::Client;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::fmt::format::FmtSpan;

use crate::support::{Calculator, MathClient, MathServer, Scene};

/// Everything that is logged on this thread, where all tasks of a test run.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().expect("no panic while logging")).into_owned()
    }
}

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().expect("no panic while logging").write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Log {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

fn listen() -> (Log, tracing::subscriber::DefaultGuard) {
    let log = Log::default();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::TRACE)
        .with_span_events(FmtSpan::NEW)
        .with_ansi(false)
        .with_writer(log.clone())
        .finish();
    (log, tracing::subscriber::set_default(subscriber))
}

#[tokio::test]
async fn a_call_has_a_span_on_either_side_in_one_trace() {
    let (log, _guard) = listen();
    let scene = Scene::new();
    let _server = scene.serve(MathServer::new(Calculator)).await;
    let client = scene.client().await;
    MathClient::new(&client).add(2, 3).await.expect("answered");
    let log = log.text();
    let span = |beginning: &str| {
        let line = log.lines().find(|line| line.contains(beginning) && line.contains("rpc.method"));
        line.unwrap_or_else(|| panic!("no {beginning} in {log}"))
    };
    let trace = |line: &str| {
        let (_, rest) = line.split_once("traceparent=").expect("a traceparent");
        rest.trim_matches('"').split('-').nth(1).expect("a trace id").to_owned()
    };
    let (call, handle) = (span("call{"), span("handle{"));
    assert!(call.contains("rpc.service=math.v1") && handle.contains("rpc.service=math.v1"), "{call}\n{handle}");
    assert_eq!(trace(call), trace(handle));
}

#[tokio::test]
async fn a_password_is_never_logged() {
    let (log, _guard) = listen();
    // Nobody listens there; and a broker, if one is under test, that refuses the password.
    let mut urls = vec!["amqp://bob:s3cret@127.0.0.1:1".to_owned()];
    let broker = Scene::new().url;
    if let Some((_, address)) = broker.split_once('@') {
        urls.push(format!("amqp://bob:s3cret@{address}"));
    }
    for url in urls {
        let error = Client::connect(&url).await.expect_err("refused");
        assert!(!error.to_string().contains("s3cret"), "{error}");
        assert!(!format!("{error:?}").contains("s3cret"), "{error:?}");
    }
    if broker.starts_with("amqp") {
        let client = Client::connect(&broker).await.expect("the broker is there");
        assert!(!format!("{client:?}").contains("guest:guest"));
    }
    let log = log.text();
    assert!(!log.contains("s3cret") && !log.contains("guest:guest"), "{log}");
}
