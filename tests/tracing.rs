//! What a subscriber of `tracing` sees: a span for each call on both sides, in one trace, and no secrets.
//!
//! It is a process of its own, since the subscriber is set once for all threads of a process.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::io::Write;
use std::sync::{LazyLock, Mutex};
use std::time::Duration;

use hopline::transport::{Confirm, Properties, Publication, Role, Transport};
use hopline::{Absent, Caller, Client, Code, Context, Fault, Invocation, Method, Middleware, Next, Reply};
use hopline::{Server, Service, State};
use tokio::sync::{mpsc, watch};
use tracing::Subscriber;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing_subscriber::fmt::format::FmtSpan;
use tracing_subscriber::layer::{self, Layer, SubscriberExt as _};
use tracing_subscriber::registry::{LookupSpan, SpanRef};
use tracing_subscriber::util::SubscriberInitExt as _;
use uuid::Uuid;

use crate::proxy::Proxy;

#[path = "proxy/mod.rs"]
mod proxy;

/// Everything that this process logs.
static LOG: Mutex<Vec<u8>> = Mutex::new(Vec::new());

static LISTENING: LazyLock<()> = LazyLock::new(|| {
    let log = tracing_subscriber::fmt::layer().with_span_events(FmtSpan::NEW).with_ansi(false).with_writer(|| Log);
    tracing_subscriber::registry().with(log).with(Spans).init();
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

/// A span that was made, with what it tells.
#[derive(Debug, Clone, Default)]
struct SpanSeen {
    number: usize,
    parent: Option<usize>,
    name: &'static str,
    fields: BTreeMap<&'static str, String>,
    is_closed: bool,
}

impl SpanSeen {
    fn field(&self, name: &str) -> &str {
        self.fields.get(name).map_or("", String::as_str)
    }

    fn trace(&self) -> &str {
        self.field("traceparent").split('-').nth(1).unwrap_or_else(|| panic!("no trace id: {self:?}"))
    }
}

/// All spans of this process.
static SPANS: Mutex<Vec<SpanSeen>> = Mutex::new(Vec::new());

/// The number of a span among them.
struct Numbered(usize);

struct Spans;

impl<S: Subscriber + for<'s> LookupSpan<'s>> Layer<S> for Spans {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: layer::Context<'_, S>) {
        let span = context.span(id).expect("it is new");
        let number_of = |span: SpanRef<'_, S>| span.extensions().get::<Numbered>().map(|numbered| numbered.0);
        let mut spans = SPANS.lock().expect("no panic while noting a span");
        let mut seen = SpanSeen { number: spans.len(), name: span.name(), ..SpanSeen::default() };
        seen.parent = span.parent().and_then(number_of);
        attributes.record(&mut seen);
        span.extensions_mut().insert(Numbered(seen.number));
        spans.push(seen);
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: layer::Context<'_, S>) {
        let span = context.span(id).expect("it is there");
        if let Some(Numbered(number)) = span.extensions().get() {
            values.record(&mut SPANS.lock().expect("no panic while noting a span")[*number]);
        }
    }

    fn on_close(&self, id: Id, context: layer::Context<'_, S>) {
        let span = context.span(&id).expect("it is there");
        if let Some(Numbered(number)) = span.extensions().get() {
            SPANS.lock().expect("no panic while noting a span")[*number].is_closed = true;
        }
    }
}

impl Visit for SpanSeen {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.fields.insert(field.name(), format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.fields.insert(field.name(), value.to_owned());
    }
}

/// The spans of a method, in the order in which they were made, once they are all closed: its calls, their attempts, and
/// what handled them.
async fn spans_of(method: &str, count: usize) -> Vec<SpanSeen> {
    let seen = || -> Vec<SpanSeen> {
        let spans = SPANS.lock().expect("no panic while noting a span").clone();
        let is_of = |span: &SpanSeen| span.field("rpc.method") == method;
        let of_call =
            |span: &SpanSeen| span.name == "hopline.attempt" && span.parent.is_some_and(|at| is_of(&spans[at]));
        spans.iter().filter(|span| is_of(span) || of_call(span)).cloned().collect()
    };
    let closed = async {
        while seen().len() < count || seen().iter().any(|span| !span.is_closed) {
            tokio::task::yield_now().await;
        }
    };
    let ended = tokio::time::timeout(Duration::from_secs(60), closed).await;
    assert!(ended.is_ok() && seen().len() == count, "{count} spans of {method}: {:#?}", seen());
    seen()
}

/// Name, kind and outcome.
fn told_of_span(span: &SpanSeen) -> [&str; 4] {
    let kind = if span.name == "hopline.attempt" { "hopline.attempt.kind" } else { "otel.kind" };
    assert!(span.field("duration_ms").parse::<f64>().is_ok_and(|took| took >= 0.0), "{span:?}");
    assert_eq!(span.field("otel.status_code") == "ERROR", span.fields.contains_key("error.type"), "{span:?}");
    [span.name, span.field(kind), span.field("rpc.response.status_code"), span.field("error.type")]
}

#[tokio::test]
async fn a_call_has_a_span_on_either_side_in_one_trace_which_tells_its_outcome() {
    let (server, client, _) = named("spans").await;
    let service = Service::new("traced", 1)
        .method("add", |_: Context, (a, b): (i64, i64)| async move { Ok::<_, Fault>(a + b) })
        .method("own", |_: Context, _: [(); 0]| async { Err::<(), _>("no".to_owned()) })
        .method("wait", |_: Context, _: [(); 0]| async {
            tokio::task::yield_now().await;
            Err::<(), _>(Fault::new(Code::NotFound, "gone"))
        })
        .method(Method::new("note").oneway(), |_: Context, _: [(); 0]| async { Ok::<_, Fault>(()) });
    let running = server.serve(service).start().await.expect("it can be served");
    client.call::<i64>("traced", "add", (2, 3)).await.expect("answered");
    client.call::<()>("traced", "own", [(); 0]).await.expect_err("its own error");
    client.call::<()>("traced", "wait", [(); 0]).await.expect_err("a fault");
    client.oneway("traced", "note", [(); 0]).send().await.expect("the broker has it");
    client.call::<()>("nobody-traced", "x", [(); 0]).absent(Absent::Fail).await.expect_err("nobody is there");
    let both = |kinds: [&'static str; 2], code, error| {
        [("call", kinds[0]), ("handle", kinds[1])].map(|(name, kind)| [name, kind, code, error])
    };
    for (method, expected) in [
        ("add", both(["client", "server"], "OK", "")),
        ("own", both(["client", "server"], "UNKNOWN", "service_error")),
        ("wait", both(["client", "server"], "NOT_FOUND", "NOT_FOUND")),
        ("note", both(["producer", "consumer"], "OK", "")),
    ] {
        let name = format!("traced.v1/{method}");
        let spans = spans_of(&name, 2).await;
        assert_eq!(spans.iter().map(told_of_span).collect::<Vec<_>>(), expected);
        assert_eq!((spans[0].trace(), spans[0].field("id")), (spans[1].trace(), spans[1].field("id")));
        assert!(spans.iter().all(|span| span.field("otel.name") == name && span.field("rpc.system.name") == "hopline"));
    }
    let nobody = spans_of("nobody-traced.v1/x", 1).await;
    assert_eq!(told_of_span(&nobody[0]), ["call", "client", "UNAVAILABLE", "no_service"]);
    running.drain().await;
}

#[tokio::test]
async fn the_span_of_a_call_covers_its_attempts_each_of_which_has_one_of_its_own() {
    let (server, client, _) = named("attempts").await;
    let (begun, mut begins) = mpsc::unbounded_channel();
    let run = move |context: Context, (outcome,): (String,)| {
        begun.send(()).expect("the test listens");
        let is_first = context.attempt() == 1;
        async move {
            match outcome.as_str() {
                "fails once" if is_first => Err(Fault::new(Code::Unavailable, "the first fails")),
                "hangs" => std::future::pending().await,
                _ => Ok(()),
            }
        }
    };
    let service = Service::new("attempted", 1)
        .method(Method::new("retried").idempotent(), run.clone())
        .method(Method::new("dropped").idempotent(), run);
    let running = server.serve(service).start().await.expect("it can be served");
    let call =
        |method, outcome: &str| client.call::<()>("attempted", method, (outcome.to_owned(),)).idempotent().retry(1);
    call("retried", "fails once").await.expect("the second attempt");
    let spans = spans_of("attempted.v1/retried", 5).await;
    let mut told: Vec<_> = spans.iter().map(told_of_span).collect();
    told.sort_unstable();
    let expected = [
        ["call", "client", "OK", ""],
        ["handle", "server", "OK", ""],
        ["handle", "server", "UNAVAILABLE", "UNAVAILABLE"],
        ["hopline.attempt", "first", "UNAVAILABLE", "UNAVAILABLE"],
        ["hopline.attempt", "retry", "OK", ""],
    ];
    assert_eq!(told, expected);
    let outer = spans.iter().find(|span| span.name == "call").expect("there is one");
    for span in &spans {
        assert_eq!(span.trace(), outer.trace(), "{span:?}");
        assert_eq!(span.parent == Some(outer.number), span.name == "hopline.attempt", "{span:?}");
    }
    begins.recv().await.expect("the first");
    begins.recv().await.expect("the second");
    let pending = call("dropped", "hangs").start().await.expect("on its way");
    begins.recv().await.expect("it runs");
    drop(pending);
    let told: Vec<_> =
        spans_of("attempted.v1/dropped", 3).await.iter().map(|span| told_of_span(span)[2].to_owned()).collect();
    assert_eq!(told, ["CANCELLED"; 3]);
    running.drain().await;
}

/// At a client, sends a span of another system. At a server, tells which span has come.
struct Foreign(Option<mpsc::UnboundedSender<String>>);

const FOREIGN: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

impl Middleware for Foreign {
    async fn handle(&self, mut call: Invocation, next: Next) -> Result<Reply, hopline::Error> {
        match &self.0 {
            Some(came) => came.send(call.traceparent().unwrap_or_default().to_owned()).expect("the test listens"),
            None => call.set_traceparent(FOREIGN),
        }
        next.run(call).await
    }
}

#[tokio::test]
async fn the_span_that_a_middleware_sets_goes_to_the_server_as_it_is() {
    LazyLock::force(&LISTENING);
    let namespace = format!("tracing-{}", Uuid::new_v4().simple());
    let (came, mut comes) = mpsc::unbounded_channel();
    let server = Server::builder().namespace(&namespace).with(Foreign(Some(came))).connect(&broker()).await;
    let within = |context: Context, _: [(); 0]| async move { Ok::<_, Fault>(context.traceparent()) };
    let service = Service::new("foreign", 1).method("within", within);
    let (heard, mut hears) = mpsc::unbounded_channel();
    let server =
        server.expect("the broker is there").serve(service).subscribe("foreign.*", move |context: Context, (): ()| {
            heard.send(context.traceparent()).expect("the test listens");
            async {}
        });
    let running = server.start().await.expect("it can be served");
    let client = Client::builder().namespace(&namespace).with(Foreign(None)).connect(&broker()).await;
    let client = client.expect("the broker is there");
    let own = client.call::<String>("foreign", "within", [(); 0]).await.expect("answered");
    assert_eq!(comes.recv().await.as_deref(), Some(FOREIGN));
    assert!(own.starts_with(&FOREIGN[..36]) && own != FOREIGN, "a span of its own under it: {own}");
    client.publish("foreign.event", &()).await.expect("the broker has it");
    assert_eq!(comes.recv().await.as_deref(), Some(FOREIGN));
    assert!(hears.recv().await.expect("it is heard").starts_with(&FOREIGN[..36]));
    running.drain().await;
}

#[tokio::test]
async fn a_password_is_never_logged() {
    LazyLock::force(&LISTENING);
    // At the first address nobody listens. The second, if a broker is under test, refuses the password.
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
    // Nobody listens at this address, so the attempts to connect fail.
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
        let namespace = format!("tracing-{}", Uuid::new_v4().simple());
        let server = Server::builder().namespace(&namespace).connect(&broker()).await.expect("the broker is there");
        let one = |_: Context, (): ()| async move { Ok::<_, Fault>(1) };
        let running =
            server.serve(Service::new("closed", 1).method("one", one)).start().await.expect("it can be served");
        let client = Client::builder().namespace(&namespace).connect(&broker()).await.expect("the broker is there");
        assert_eq!(client.call::<i64>("closed", "one", ()).await.expect("answered"), 1);
        tokio::join!(client.close(), running.drain());
    }
    let log = logged();
    // What lapin logs before it ends a connection without the broker's consent.
    let broken: Vec<&str> = log.lines().filter(|line| line.contains("Connection error error=invalid")).collect();
    assert!(broken.is_empty(), "{broken:#?}");
}

/// Waits for the one line that contains all of these.
async fn told(said: &[&str]) -> String {
    let told = async {
        loop {
            let log = logged();
            let mut lines = log.lines().filter(|line| said.iter().all(|said| line.contains(said)));
            if let Some(line) = lines.next() {
                assert_eq!(lines.next(), None, "a fact is told once");
                return line.to_owned();
            }
            tokio::task::yield_now().await;
        }
    };
    let told = tokio::time::timeout(Duration::from_secs(60), told).await;
    told.unwrap_or_else(|_| panic!("nothing with {said:?} is logged"))
}

fn assert_says(line: &str, all: &[&str]) {
    for said in all {
        assert!(line.contains(said), "no {said} in {line}");
    }
}

/// Waits for the line that says that the handler of this call was dropped.
async fn told_of(id: Uuid) -> String {
    told(&["half-way", &id.to_string()]).await
}

/// A server and a client with this `name`, in a namespace of their own, which is returned last.
async fn named(name: &str) -> (Server, Client, String) {
    LazyLock::force(&LISTENING);
    let namespace = format!("tracing-{}", Uuid::new_v4().simple());
    let server = Server::builder().namespace(&namespace).name(name).connect(&broker()).await;
    let client = Client::builder().namespace(&namespace).name(name).connect(&broker()).await;
    (server.expect("the broker is there"), client.expect("the broker is there"), namespace)
}

/// A request of the method, written by hand. It has 100 ms and is never cancelled.
fn request(id: Uuid, method: &str) -> Vec<u8> {
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
    let namespace = format!("tracing-{}", Uuid::new_v4().simple());
    let server = Server::builder().namespace(&namespace).connect(&broker()).await.expect("the broker is there");
    let (begun, mut begins) = mpsc::unbounded_channel();
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
        let method = format!("method=\"{method}\"");
        assert_says(&line, &[level, "service=halves.v1", &method, "caller=", "ran=", "its caller gave up"]);
        assert_eq!(line.contains("mark its method `finishes`"), level == " WARN ", "{line}");
    }
    let transport = Transport::connect(&broker(), Role::Client).await.expect("the broker is there");
    let id = Uuid::new_v4();
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

#[tokio::test]
async fn a_call_that_fails_is_told_once_at_debug_since_its_caller_hears_of_it() {
    let (server, client, _) = named("shop").await;
    let service = Service::new("asked", 1)
        .method(Method::new("add"), |_: Context, (a, b): (i64, i64)| async move { Ok::<_, Fault>(a + b) })
        .method(Method::new("hidden"), |_: Context, _: [(); 0]| async { Ok::<_, Fault>(()) });
    let running = server.serve(service).allow(|_, method| method != "asked.v1.hidden").start().await;
    let running = running.expect("it can be served");
    client.call::<i64>("asked", "subtract", (1, 2)).await.expect_err("there is no such method");
    client.call::<i64>("asked", "add", ("one", "two")).await.expect_err("no numbers");
    client.call::<()>("asked", "hidden", [(); 0]).await.expect_err("not allowed");
    running.drain().await;
    for (method, code) in
        [("subtract", Code::Unimplemented), ("add", Code::InvalidArgument), ("hidden", Code::PermissionDenied)]
    {
        let line = told(&["a call failed", "service=asked.v1", &format!("method=\"{method}\"")]).await;
        assert_says(&line, &["DEBUG ", "id=", "caller=\"shop ", &format!("code={code:?}"), "reason="]);
    }
}

#[tokio::test]
async fn a_oneway_call_that_is_given_up_is_told_in_one_line_with_where_it_went() {
    let (server, client, namespace) = named("shop").await;
    let (run, mut runs) = mpsc::unbounded_channel();
    let method = |name| Method::new(name).oneway().attempts(3).pause(Duration::from_millis(1));
    let panics = {
        let run = run.clone();
        move |context: Context, _: [(); 0]| {
            run.send(context.request_id()).expect("the test listens");
            async { if true { panic!("out of paper") } else { Ok::<_, Fault>(()) } }
        }
    };
    let fails = move |context: Context, _: [(); 0]| {
        run.send(context.request_id()).expect("the test listens");
        std::future::ready(Err::<(), _>("the customer's secret".to_owned()))
    };
    let service = Service::new("mails", 1).method(method("print"), panics).method(method("send"), fails);
    let running = server.serve(service).start().await.expect("it can be served");
    for (method, reason) in [("print", "panicked: out of paper"), ("send", "the method returned its own error")] {
        client.oneway("mails", method, [(); 0]).send().await.expect("the broker has it");
        let id = runs.recv().await.expect("it runs").to_string();
        for _ in 1..3 {
            assert_eq!(runs.recv().await.expect("it runs again").to_string(), id);
        }
        let fields = ["service=mails.v1", &format!("method=\"{method}\""), "caller=\"shop ", reason];
        let line = told(&["kept with the dead letters", &id]).await;
        let queue = format!("queue=\"{namespace}.mails.v1.dead\"");
        assert_says(&line, &[" WARN ", "attempt=3", &queue]);
        assert_says(&line, &fields);
        for (attempt, level, pause) in [("attempt=1", " WARN ", "pause=1ms"), ("attempt=2", "DEBUG ", "pause=2ms")] {
            let line = told(&["a oneway call failed", attempt, &id]).await;
            assert_says(&line, &[level, pause]);
            assert_says(&line, &fields);
        }
    }
    running.drain().await;
    let log = logged();
    assert!(!log.contains("the customer's secret"), "{log}");
    assert!(!log.lines().any(|line| line.contains("ERROR ") && line.contains("out of paper")), "{log}");
}

#[tokio::test]
async fn a_wrong_event_and_one_whose_handler_panics_are_told_with_their_key_and_pattern() {
    let (server, client, _) = named("shop").await;
    let handler = |_: Context, n: u32| async move { assert!(n < 7, "no more than seven") };
    let _running = server.subscribe("stock.*", handler).start().await.expect("it can be served");
    client.publish("stock.wrong", "many").await.expect("the broker has it");
    client.publish("stock.eight", &8).await.expect("the broker has it");
    for (key, reason) in [("stock.wrong", "the event"), ("stock.eight", "panicked: no more than seven")] {
        let line = told(&[&format!("key=\"{key}\""), "reason="]).await;
        assert_says(&line, &[" WARN ", "pattern=\"stock.*\"", "id=", "caller=\"shop ", reason]);
    }
}

#[tokio::test]
async fn a_drain_tells_how_much_runs_and_at_its_end_what_became_of_it() {
    let (server, client, _) = named("leaving").await;
    let (begun, mut begins) = mpsc::unbounded_channel();
    let (release, released) = watch::channel(false);
    let hold = move |_: Context, _: [(); 0]| {
        begun.send(()).expect("the test listens");
        let mut released = released.clone();
        async move {
            released.wait_for(|released| *released).await.expect("it is told");
            Ok::<_, Fault>(())
        }
    };
    let service = Service::new("held", 1).method(Method::new("hold"), hold).concurrency(1).prefetch(10);
    let (come, mut comes) = mpsc::unbounded_channel();
    // The rule is asked for each call that has arrived, before the call waits for a place.
    let rule = move |_: &Caller<'_>, _: &str| come.send(()).is_ok();
    let running = server.serve(service).allow(rule).start().await.expect("it can be served");
    let first = client.call::<()>("held", "hold", [(); 0]).start().await.expect("on its way");
    begins.recv().await.expect("it runs");
    let _second = client.call::<()>("held", "hold", [(); 0]).start().await.expect("on its way");
    for _ in 0..2 {
        comes.recv().await.expect("it comes");
    }
    let name = format!("name=\"leaving server {} {}\"", std::process::id(), running.instance());
    let draining = tokio::spawn(running.drain());
    assert_says(&told(&["draining", &name]).await, &[" INFO ", "running=1"]);
    assert_says(&told(&["a call is given back", "service=held.v1"]).await, &["DEBUG ", "method=\"hold\"", "id="]);
    release.send_replace(true);
    first.await.expect("answered");
    draining.await.expect("no panic");
    assert_says(&told(&["drained", &name]).await, &[" INFO ", "after=", "ended=1", "given_back=1"]);
}

#[tokio::test]
async fn who_is_dropped_while_calls_run_warns_of_them() {
    let (server, client, _) = named("rash").await;
    let (begun, mut begins) = mpsc::unbounded_channel();
    let hold = move |_: Context, _: [(); 0]| {
        begun.send(()).expect("the test listens");
        std::future::pending::<Result<(), Fault>>()
    };
    let service = Service::new("rash", 1).method(Method::new("hold"), hold);
    let running = server.serve(service).start().await.expect("it can be served");
    let _pending = client.call::<()>("rash", "hold", [(); 0]).start().await.expect("on its way");
    begins.recv().await.expect("it runs");
    let name = format!("name=\"rash server {} {}\"", std::process::id(), running.instance());
    drop(running);
    assert_says(&told(&["dropped before it had drained", &name]).await, &[" WARN ", "running=1"]);
}

#[tokio::test]
async fn an_outage_is_told_when_it_begins_and_when_it_ends_and_not_by_every_attempt() {
    LazyLock::force(&LISTENING);
    let broker = broker();
    // A broker in memory is never away.
    let Some((_, address)) = broker.split_once('@') else { return };
    let address = tokio::net::lookup_host(address.trim_end_matches('/')).await.expect("it is known").next();
    let proxy = Proxy::to(address.expect("it has an address")).await;
    let namespace = format!("tracing-{}", Uuid::new_v4().simple());
    let server = Server::builder().namespace(&namespace).name("outage").connect(&proxy.url()).await;
    let running = server.expect("the broker is there").start().await.expect("it serves nothing");
    let client = Client::builder().namespace(&namespace).name("outage").connect(&proxy.url()).await;
    let client = client.expect("the broker is there");
    proxy.refuse();
    proxy.cut().await;
    let roles = ["client", "server"].map(|role| format!("name=\"outage {role} "));
    for name in &roles {
        told(&["still no connection to the broker", name, "attempt=5 "]).await;
    }
    proxy.allow();
    for name in &roles {
        assert_says(&told(&["connected again", name]).await, &[" INFO ", "broker=", "after=", "attempts=", "was="]);
    }
    let log = logged();
    for name in &roles {
        let told = |what: &str| log.lines().filter(|line| line.contains(name) && line.contains(what)).count();
        assert_eq!(told("connection lost"), 1);
        assert_eq!(told(" WARN "), 1 + told("it is tried again for as long as it takes"));
        assert_eq!(told(" INFO "), told("connected") + told("serving"));
        assert_eq!(told("connected"), 2, "at first, and again");
    }
    tokio::join!(client.close(), running.drain());
}
