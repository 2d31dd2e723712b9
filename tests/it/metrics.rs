//! What clients and servers count for Prometheus, as they tell it.

use std::collections::BTreeMap;
use std::future::IntoFuture as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures::future::join_all;
use hopline::metrics::{CONTENT_TYPE, Metrics, PLAIN_CONTENT_TYPE};
use hopline::{
    Absent, Client, Code, Context, Error, Fault, Invocation, Method, Middleware, Next, RateLimit, Reply, Service,
    Shedding,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::support::{Held, PATIENCE, Scene, code, hold, soon};

/// The values of all series, each by its name and labels, as text.
fn series(metrics: &Metrics) -> BTreeMap<String, f64> {
    let text = metrics.render();
    let lines =
        text.lines().filter(|line| !line.starts_with('#')).map(|line| line.split(" # ").next().expect("a part"));
    lines
        .map(|line| line.rsplit_once(' ').expect("a value"))
        .map(|(name, value)| (name.to_owned(), number(value)))
        .collect()
}

fn number(text: &str) -> f64 {
    text.parse().unwrap_or_else(|_| panic!("no number: {text}"))
}

/// The value of the only series whose name and labels have all of these parts, or 0 if there is none.
fn value(metrics: &Metrics, parts: &[&str]) -> f64 {
    let all = series(metrics);
    let mut found = all.iter().filter(|(name, _)| parts.iter().all(|part| name.contains(part)));
    let first = found.next().map_or(0.0, |(_, value)| *value);
    assert!(found.next().is_none(), "several series have {parts:?}: {all:#?}");
    first
}

async fn is(metrics: &Metrics, parts: &[&str], expected: f64) {
    let waiting = async {
        while value(metrics, parts) != expected {
            tokio::task::yield_now().await;
        }
    };
    let came = tokio::time::timeout(PATIENCE, waiting).await;
    assert!(came.is_ok(), "{parts:?} never is {expected}:\n{}", metrics.render());
}

/// The same, for what is asked for anew only now and then.
async fn until(metrics: &Metrics, parts: &[&str], expected: f64) {
    let waiting = async {
        while value(metrics, parts) != expected {
            // So that the processor is free for what is waited for.
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let came = tokio::time::timeout(PATIENCE, waiting).await;
    assert!(came.is_ok(), "{parts:?} never is {expected}:\n{}", metrics.render());
}

fn ends() -> Service {
    Service::new("ends", 1)
        .method("well", |_: Context, _: [(); 0]| async { Ok::<_, Fault>(()) })
        .method("own", |_: Context, _: [(); 0]| async { Err::<(), _>("no".to_owned()) })
        .method("fails", |_: Context, _: [(); 0]| async { Err::<(), _>(Fault::new(Code::Unavailable, "never")) })
        .method("fault", |_: Context, _: [(); 0]| async { Err::<(), _>(Fault::new(Code::NotFound, "gone")) })
        .method(Method::new("oneway").oneway().attempts(1), |_: Context, (fails,): (bool,)| async move {
            if fails { Err(Fault::new(Code::Internal, "as the test asks")) } else { Ok(()) }
        })
}

#[tokio::test]
async fn a_call_is_counted_on_both_sides_by_how_it_ended() {
    let scene = Scene::new();
    let (server, client) = (scene.serve(ends()).await, scene.client().await);
    let metrics = Metrics::new().server(&server).client(&client);
    for method in ["well", "well", "own", "fault", "absent", "well"] {
        let _ = soon(async { client.call::<()>("ends", method, [(); 0]).await }).await;
    }
    let nobody = client.call::<()>("nobody", "x", [(); 0]).absent(Absent::Fail);
    assert!(matches!(soon(nobody.into_future()).await, Err(Error::NoService { .. })));
    let at_client = |method, rest| {
        [
            "rpc_client_call_duration_seconds_count{rpc_system_name=\"hopline\"",
            method,
            rest,
            "server_address=\"ends.v1\"",
        ]
    };
    let at_server = |method, rest| ["rpc_server_call_duration_seconds_count", method, rest, "rpc_system_name"];
    let (own, ok) = ("\"UNKNOWN\",error_type=\"service_error\"", "rpc_response_status_code=\"OK\"");
    let fault = "rpc_response_status_code=\"NOT_FOUND\",error_type=\"NOT_FOUND\"";
    for (method, rest, count) in [("ends.v1/well", ok, 3.0), ("ends.v1/own", own, 1.0), ("ends.v1/fault", fault, 1.0)] {
        is(&metrics, &at_client(method, rest), count).await;
        is(&metrics, &at_server(method, rest), count).await;
    }
    // A client knows which names it has called. To a server they come from outside.
    is(&metrics, &at_client("ends.v1/absent", "error_type=\"UNIMPLEMENTED\""), 1.0).await;
    is(&metrics, &at_server("rpc_method=\"_OTHER\"", "error_type=\"UNIMPLEMENTED\""), 1.0).await;
    let nobody = ["rpc_client_call_duration_seconds_count", "nobody.v1/x", "\"UNAVAILABLE\",error_type=\"no_service\""];
    is(&metrics, &nobody, 1.0).await;
    is(&metrics, &["hopline_client_attempts_total", "ends.v1/well", "\"first\""], 3.0).await;
    is(&metrics, &["hopline_server_handler_duration_seconds_count", "ends.v1/well"], 3.0).await;
    is(&metrics, &["hopline_server_queue_duration_seconds_count", "ends.v1/well"], 3.0).await;
    assert!(!series(&metrics).keys().any(|name| name.contains(server.instance()) || name.contains(client.instance())));
}

#[tokio::test]
async fn oneway_calls_and_what_becomes_of_them_are_counted() {
    let scene = Scene::new();
    let (server, client) = (scene.serve(ends()).await, scene.client().await);
    let metrics = Metrics::new().server(&server).client(&client);
    for fails in [false, true] {
        soon(client.oneway("ends", "oneway", (fails,)).send()).await.expect("the broker has it");
    }
    is(&metrics, &["rpc_client_call_duration_seconds_count", "ends.v1/oneway", "\"OK\""], 2.0).await;
    is(&metrics, &["rpc_server_call_duration_seconds_count", "ends.v1/oneway", "\"INTERNAL\",error_type"], 1.0).await;
    let letters = |reason| ["hopline_server_dead_lettered_total{rpc_service=\"ends.v1\"", reason];
    is(&metrics, &letters("\"failed\""), 1.0).await;
    is(&metrics, &letters("\"refused\""), 0.0).await;
}

#[tokio::test]
async fn what_waits_and_what_is_given_up_is_counted() {
    let scene = Scene::new();
    let Held { service, mut arrived } = Held::new();
    let (server, client) = (scene.serve(service).await, scene.client().await);
    let metrics = Metrics::new().server(&server).client(&client);
    let pending = hold(&client, 1).start().await.expect("on its way");
    let held = soon(arrived.recv()).await.expect("it runs");
    assert_eq!(value(&metrics, &["hopline_client_in_flight{rpc_method=\"held.v1/hold\"}"]), 1.0);
    assert_eq!(value(&metrics, &["hopline_server_active{rpc_method=\"held.v1/hold\"}"]), 1.0);
    drop(pending);
    is(&metrics, &["hopline_client_in_flight"], 0.0).await;
    is(&metrics, &["hopline_server_active"], 0.0).await;
    is(&metrics, &["hopline_server_cancelled_total", "\"stopped\""], 1.0).await;
    is(&metrics, &["rpc_client_call_duration_seconds_count", "error_type=\"CANCELLED\""], 1.0).await;
    is(&metrics, &["rpc_server_call_duration_seconds_count", "error_type=\"CANCELLED\""], 1.0).await;
    drop(held);
}

/// Tries a call once more that has failed.
struct OnceMore;

impl Middleware for OnceMore {
    async fn handle(&self, call: Invocation, next: Next) -> Result<Reply, Error> {
        match next.run(call.clone()).await {
            Err(_) => next.run(call).await,
            reply => reply,
        }
    }
}

#[tokio::test]
async fn attempts_are_counted_beside_calls() {
    let scene = Scene::new();
    let server = scene.serve(ends()).await;
    let client = Client::builder().namespace(&scene.namespace).with(OnceMore);
    let client = client.connect(&scene.url).await.expect("the broker is there");
    let metrics = Metrics::new().client(&client);
    assert!(soon(async { client.call::<()>("ends", "fault", [(); 0]).await }).await.is_err());
    let attempts = |kind| ["hopline_client_attempts_total", "ends.v1/fault", kind];
    assert_eq!((value(&metrics, &attempts("first")), value(&metrics, &attempts("retry"))), (1.0, 1.0));
    assert_eq!(value(&metrics, &["rpc_client_call_duration_seconds_count", "ends.v1/fault"]), 1.0);
    drop(server);
}

#[tokio::test(start_paused = true)]
async fn what_policies_do_to_calls_is_told_by_method() {
    let scene = Scene::in_memory();
    let _server = scene.serve(ends()).await;
    let builder = || Client::builder().namespace(&scene.namespace);
    let attempts = |kind| ["hopline_client_attempts_total", "ends.v1/fails", kind];
    let rejected = |reason| ["hopline_client_rejected_total", "ends.v1/fails", reason];
    let fails = |client: &Client| client.call::<()>("ends", "fails", [(); 0]).idempotent();

    let client = builder().retry(1).connect(&scene.url).await.expect("the broker is there");
    let metrics = Metrics::new().client(&client);
    for outcome in join_all((0..100).map(|_| fails(&client).into_future())).await {
        assert_eq!(outcome.expect_err("it always does").code(), Code::Unavailable);
    }
    // A fifth of the calls, and ten in this second.
    assert_eq!((value(&metrics, &attempts("\"first\"")), value(&metrics, &attempts("\"retry\""))), (100.0, 30.0));
    assert_eq!(value(&metrics, &rejected("\"budget\"")), 70.0);
    let of_calls = |name, part| value(&metrics, &[name, part, "ends.v1/fails"]);
    assert_eq!((of_calls("hopline_client_call_retries", "_count"), of_calls("_retries", "_sum")), (30.0, 30.0));
    let paused = of_calls("hopline_client_call_retry_delay_seconds", "_sum");
    assert!(of_calls("retry_delay_seconds", "_count") == 30.0 && paused > 0.0 && paused < 1.5, "{paused}");
    assert!(!metrics.render().contains("hopline_client_call_hedges"), "zero is not told");

    let client = builder().breaker().connect(&scene.url).await.expect("the broker is there");
    let metrics = Metrics::new().client(&client);
    let states = || {
        ["closed", "open", "half_open"]
            .map(|state| value(&metrics, &["hopline_breaker_state{", "ends.v1/fails", &format!("state=\"{state}\"")]))
    };
    for _ in 0..25 {
        fails(&client).await.expect_err("it always does");
    }
    assert_eq!((value(&metrics, &rejected("\"circuit\"")), states()), (5.0, [0.0, 1.0, 0.0]));
    tokio::time::advance(Duration::from_secs(5)).await;
    assert_eq!(states(), [0.0, 0.0, 1.0]);
    client.close_breaker("ends", "fails").expect("good names");
    fails(&client).await.expect_err("it always does");
    assert_eq!(states(), [1.0, 0.0, 0.0]);
    assert_eq!(client.policies().refused_by_breaker, 5, "they are the same counters");

    let client = builder().rate("ends", 2).connect(&scene.url).await.expect("the broker is there");
    let metrics = Metrics::new().client(&client);
    join_all((0..3).map(|_| fails(&client).into_future())).await;
    assert_eq!((value(&metrics, &rejected("\"rate\"")), value(&metrics, &attempts("\"first\""))), (1.0, 2.0));

    let cached = || client.call::<()>("ends", "well", [(); 0]).idempotent().cache(Duration::from_secs(5));
    assert!(!metrics.render().contains("hopline_client_cache"), "nobody has asked it");
    join_all((0..2).map(|_| cached().into_future())).await.into_iter().for_each(|outcome| outcome.expect("answered"));
    cached().await.expect("kept");
    let results = ["hit", "miss", "shared", "stale"]
        .map(|result| value(&metrics, &["hopline_client_cache_total", "ends.v1/well", result]));
    assert_eq!(results, [1.0, 1.0, 1.0, 0.0]);
    assert_eq!(value(&metrics, &["hopline_client_policy_events_total", "ends.v1/fails", "waited_for_rate"]), 1.0);
    fails(&client).fail_safe(()).await.expect("a value");
    assert_eq!(value(&metrics, &["hopline_client_policy_events_total", "ends.v1/fails", "value_for_error"]), 1.0);
}

#[tokio::test]
async fn attempts_at_the_same_time_are_no_retries() {
    let scene = Scene::new();
    let fails = Arc::new(AtomicBool::new(true));
    let pair = || {
        let fails = fails.clone();
        Service::new("pair", 1).method("run", move |_: Context, _: [(); 0]| {
            let fails = fails.swap(false, Ordering::Relaxed);
            async move { if fails { Err(Fault::new(Code::Aborted, "once")) } else { Ok(()) } }
        })
    };
    let (_one, _two) = (scene.serve(pair()).await, scene.serve(pair()).await);
    let client = scene.client().await;
    let metrics = Metrics::new().client(&client);
    let run = || client.call::<()>("pair", "run", [(); 0]).idempotent().timeout(PATIENCE);
    soon(run().hedge().into_future()).await.expect("the other instance is well");
    soon(run().fork(2).into_future()).await.expect("both are");
    let attempts = ["first", "retry", "resend", "hedge", "fork"]
        .map(|kind| value(&metrics, &["hopline_client_attempts_total", &format!("kind=\"{kind}\"")]));
    assert_eq!(attempts, [2.0, 0.0, 0.0, 1.0, 1.0]);
    assert_eq!(value(&metrics, &["hopline_client_call_hedges_count", "pair.v1/run"]), 1.0);
    assert_eq!((client.policies().hedges, client.policies().forks), (1, 1));
}

/// Refuses what it does not know.
struct Door;

impl Middleware for Door {
    fn admit(&self, call: &Invocation) -> Result<(), Fault> {
        match call.metadata("password") {
            Some(_) => Ok(()),
            // A question of discovery.
            None if call.method().contains('.') => Ok(()),
            None => Err(Fault::new(Code::Unauthenticated, "who are you")),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn what_a_server_refuses_is_told_by_what_refuses_it() {
    let scene = Scene::in_memory();
    let time = Duration::from_millis(100);
    let slow = move |_: Context, _: [(); 0]| async move {
        tokio::time::sleep(time).await;
        Ok::<_, Fault>(())
    };
    let limit = RateLimit::per_user(0.001).burst(21);
    let service = Service::new("strict", 1).method("slow", slow);
    let service = service.with(Door).with(Shedding::default().measured_by(|| None)).with(limit);
    let (server, client) = (scene.serve(service).await, scene.client().await);
    let metrics = Metrics::new().server(&server);
    let call = || client.call::<()>("strict", "slow", [(); 0]).metadata("password", "1234");
    for _ in 0..20 {
        call().await.expect("well");
    }
    assert_eq!(code(call().timeout(time / 2).await), Code::DeadlineExceeded);
    call().await.expect("the last within the rate");
    for _ in 0..3 {
        assert_eq!(code(call().await), Code::ResourceExhausted);
    }
    assert_eq!(code(client.call::<()>("strict", "slow", [(); 0]).await), Code::Unauthenticated);
    assert_eq!(code(client.call::<()>("strict", "absent", [(); 0]).await), Code::Unauthenticated);
    let rejected = |method, reason: &str| {
        value(&metrics, &["hopline_server_rejected_total", method, &format!("reason=\"{reason}\"")])
    };
    let reasons = ["rate", "fair_share", "late", "overloaded", "other"];
    assert_eq!(reasons.map(|reason| rejected("strict.v1/slow", reason)), [3.0, 0.0, 1.0, 0.0, 1.0]);
    assert_eq!(rejected("_OTHER", "other"), 1.0);
    let stats = client.registry().stats("strict").await.expect("it can be asked");
    assert_eq!(stats[0].methods[0].refused, 5, "they are the same counters");
}

#[tokio::test]
async fn how_much_waits_in_queues_is_told_if_it_is_asked_for() {
    let scene = Scene::new();
    let Held { service, mut arrived } = Held::new();
    let service = service.prefetch(1).concurrency(1);
    let (server, client) = (scene.serve(service).await, scene.client().await);
    let metrics = Metrics::new().server(&server).queues(&client);
    let queue = |name| [name, "rpc_service=\"held.v1\",kind=\"work\""];
    assert!(!metrics.render().contains("hopline_queue"), "nobody was asked yet");
    until(&metrics, &queue("hopline_queue_consumers"), 1.0).await;
    for number in 1..=3 {
        soon(client.oneway("held", "hold", (number,)).send()).await.expect("the broker has it");
    }
    let held = soon(arrived.recv()).await.expect("the first runs");
    until(&metrics, &queue("hopline_queue_messages"), 2.0).await;
    is(&metrics, &["hopline_queue_messages", "kind=\"calls\""], 0.0).await;
    is(&metrics, &["hopline_queue_messages", "kind=\"dead\""], 0.0).await;
    held.release();
    for _ in 0..2 {
        soon(arrived.recv()).await.expect("the next").release();
    }
    soon(server.drain()).await;
    assert!(
        !metrics.render().contains("hopline_queue_messages{"),
        "of services that are not served here it knows nothing"
    );
}

#[tokio::test]
async fn a_call_over_the_limit_is_told_apart_from_one_that_was_sent() {
    let scene = Scene::new();
    let Held { service, mut arrived } = Held::new();
    let _server = scene.serve(service).await;
    let client = Client::builder().namespace(&scene.namespace).max_in_flight(1, hopline::WhenFull::Refuse);
    let client = client.connect(&scene.url).await.expect("the broker is there");
    let metrics = Metrics::new().client(&client);
    let pending = hold(&client, 1).start().await.expect("on its way");
    let held = soon(arrived.recv()).await.expect("it runs");
    assert!(matches!(soon(async { hold(&client, 2).await }).await, Err(Error::Overloaded { .. })));
    assert_eq!(value(&metrics, &["hopline_client_rejected_total", "\"in_flight\""]), 1.0);
    assert_eq!(value(&metrics, &["rpc_client_call_duration_seconds_count", "\"overloaded\""]), 1.0);
    held.release();
    soon(pending).await.expect("answered");
}

#[tokio::test]
async fn a_call_of_a_handler_is_an_exemplar_of_its_trace() {
    let scene = Scene::new();
    let inner = scene.client().await;
    let calls = inner.clone();
    let front = Service::new("front", 1).method("ask", move |ctx: Context, _: [(); 0]| {
        let calls = calls.clone();
        async move {
            calls
                .call::<()>("ends", "well", [(); 0])
                .await
                .map_err(|error| Fault::new(error.code(), error.to_string()))?;
            Ok::<_, Fault>(ctx.traceparent())
        }
    });
    let server = scene.server().await.serve(front).serve(ends()).start().await.expect("it can be served");
    let client = scene.client().await;
    let metrics = Metrics::new().client(&inner).server(&server);
    let traceparent: String = soon(async { client.call("front", "ask", [(); 0]).await }).await.expect("answered");
    let trace = traceparent.split('-').nth(1).expect("the id of the trace");
    let text = metrics.render();
    let with_trace = |name: &str| {
        text.lines().any(|line| line.starts_with(name) && line.contains(&format!("# {{trace_id=\"{trace}\"}} 0.")))
    };
    assert!(with_trace("rpc_client_call_duration_seconds_bucket"), "{text}");
    // The server counts when it has handed the reply over.
    soon(async {
        while !metrics.render().lines().any(|line| line.starts_with("rpc_server_call") && line.contains(trace)) {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert!(!metrics.render_plain().contains("trace_id"));
}

#[tokio::test]
async fn several_clients_are_summed_up_and_none_is_kept_alive() {
    let scene = Scene::new();
    let server = scene.serve(ends()).await;
    let metrics = Metrics::new().server(&server);
    for _ in 0..2 {
        let client = scene.client().await;
        let _ = metrics.clone().client(&client).client(&client.clone());
        soon(async { client.call::<()>("ends", "well", [(); 0]).await }).await.expect("answered");
        let mut state = client.state();
        drop(client);
        soon(state.wait_for(|state| *state == hopline::State::Closed)).await.expect("it is told");
    }
    assert_eq!(value(&metrics, &["rpc_client_call_duration_seconds_count", "ends.v1/well"]), 2.0);
    soon(server.drain()).await;
    assert!(!metrics.render().contains("hopline_server"), "a server that has ended counts no more");
    assert_eq!(value(&metrics, &["rpc_client_call_duration_seconds_count", "ends.v1/well"]), 2.0);
}

#[tokio::test]
async fn a_connection_that_is_lost_is_counted_when_it_is_back() {
    let (scene, broker) = Scene::alone();
    let Held { service, mut arrived } = Held::new();
    let (server, client) = (scene.serve(service).await, scene.client().await);
    let metrics = Metrics::new().server(&server).client(&client);
    let pending = hold(&client, 1).start().await.expect("on its way");
    let held = soon(arrived.recv()).await.expect("it runs");
    broker.alarm("low on memory");
    // Who publishes hears of it: the server when it replies.
    held.release();
    let publisher = client.clone();
    let publishing = tokio::spawn(async move { publisher.publish("something.happened", &()).await });
    for role in ["client", "server"] {
        let blocked = ["hopline_connection_blocked_duration_seconds_total", role];
        soon(async {
            while value(&metrics, &blocked) == 0.0 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await;
    }
    broker.restore();
    broker.cut();
    for role in ["client", "server"] {
        is(&metrics, &["hopline_connection_reconnects_total", role], 1.0).await;
    }
    publishing.abort();
    drop(pending);
}

async fn get(address: std::net::SocketAddr, head: &str) -> String {
    let mut stream = TcpStream::connect(address).await.expect("it listens");
    stream.write_all(head.as_bytes()).await.expect("it reads");
    let mut told = String::new();
    stream.read_to_string(&mut told).await.expect("it answers");
    told
}

#[tokio::test]
async fn they_are_served_over_http_until_that_is_closed() {
    let metrics = Metrics::new().client(&Scene::in_memory().client().await);
    let endpoint = metrics.serve("0").await.expect("some port is free");
    let address = endpoint.address();
    assert!(address.ip().is_loopback(), "a port alone is for this machine");
    let plain = soon(get(address, "GET /metrics HTTP/1.1\r\n\r\n")).await;
    assert!(plain.contains(&format!("Content-Type: {PLAIN_CONTENT_TYPE}\r\n")), "{plain}");
    let open = soon(get(address, "GET /metrics HTTP/1.1\r\nAccept: application/openmetrics-text\r\n\r\n")).await;
    assert!(open.starts_with("HTTP/1.1 200 OK\r\n") && open.ends_with("# EOF\n"), "{open}");
    assert!(open.contains(&format!("Content-Type: {CONTENT_TYPE}\r\n")), "{open}");
    let (_, body) = open.split_once("\r\n\r\n").expect("it has a body");
    assert!(open.contains(&format!("Content-Length: {}\r\n", body.len())));
    assert!(soon(get(address, "GET / HTTP/1.1\r\n\r\n")).await.starts_with("HTTP/1.1 404 "));
    let taken = metrics.serve(address.to_string()).await.expect_err("the port is taken");
    assert_eq!(taken.kind(), std::io::ErrorKind::AddrInUse);
    endpoint.close().await;
    assert!(TcpStream::connect(address).await.is_err());
}
